"""What dpo_train.py needs around its loop.

flags        what can be set, and what is refused
pairs        pairs.jsonl -> token ids
batches      which pairs make a step and a microbatch, and their tensors
network      the model as it is trained: its packing, nothing random left on
fsdp         sharding, loading, saving
lora         small factors beside frozen weights
reference    the reference's log-probs, kept for a resumed run
checks       before the first update: nothing random, causal, transformers' own numbers, the audit
checkpoints  of an interrupted run
log          one row per step
tracker      the same rows in tensorboard, wandb or trackio
speed        what a step costs
"""
