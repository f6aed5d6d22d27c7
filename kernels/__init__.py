"""Arithmetic on tensors: no files and no DPO here.

logprob.py    hidden states -> log-probs of tokens, without holding the logits
heads.py      what a real model's head does: weight, bias, scale, soft-cap
attention.py  many sequences in one row, and a pair's prompt computed once
device.py     whether the path of a GPU or of a CPU is taken
"""
