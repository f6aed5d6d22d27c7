"""Arithmetic on tensors, which knows no file and no DPO.

logprob.py    hidden states -> log-probs of tokens, without holding the logits
heads.py      what a real model's head does: weight, bias, scale, soft-cap
attention.py  many sequences in one row, and a pair's prompt computed once
device.py     whether a GPU's or a CPU's path is taken
"""
