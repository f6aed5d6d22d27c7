"""A complete offline example: prompts, a policy, a reward model, and the true reward."""
