"""What dpo_train.py needs around its loop: batches, sharding, the checks before the first update,
and what a step costs.
"""
