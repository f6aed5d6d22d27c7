"""A complete, offline instance of the problem: prompts, a policy, a reward model, and the truth."""
