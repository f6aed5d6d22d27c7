"""Run by test_dpo_train.py, under torchrun or alone: every layout on these ranks, against one plain
sequence at a time.

    torchrun --nproc_per_node 2 tests/equivalence.py FOLDER

FOLDER holds models (tests/small_models.py), each in its own folder. The output is one line of JSON
per model, packing and checkpointing: how far the log-probs (in nats per token) and the gradient (as
a share of its norm) are from those of transformers in fp64, with its own attention, logits and
autograd.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import dpo_train
from training.batches import PARTS, collate
from training.plans import cost, microbatches

rng = random.Random(0)
pairs = [
    {
        k: np.array([rng.randrange(6, 300) for _ in range(rng.randint(1, 14))], np.int32)
        for k in PARTS
    }
    | {"id": str(i)}
    for i in range(7)
]
tokens = torch.tensor([[len(p["chosen"]), len(p["rejected"])] for p in pairs])
G = torch.tensor(
    [1.0, -0.5]
)  # the loss: sum over pairs of l_w - 0.5 l_l, another factor for each answer


def plain(folder):
    """Log-probs [n, 2] and the gradient by name, in fp64, one sequence after the other."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).train()
    rows = []
    for pair in pairs:
        for k in ("chosen", "rejected"):
            ids = torch.tensor(np.concatenate([pair["prompt"], pair[k]]), dtype=torch.long)  # [L]
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]  # [L-1, V]
            rows.append(
                logits.log_softmax(-1).gather(1, ids[1:, None])[len(pair["prompt"]) - 1 :].sum()
            )
    logprobs = torch.stack(rows).view(-1, 2)
    (logprobs * G).sum().backward()
    return logprobs.detach(), {n: p.grad for n, p in model.named_parameters()}


def ours(folder, packing, checkpointing, device):
    flags = ["--model", folder, "--pairs", "none", "--output", "none"]
    flags += ["--packing", packing, "--dtype", "fp32"]
    flags += ["--gradient_checkpointing"] * checkpointing
    args = dpo_train.parse(dpo_train.arguments(), list(map(str, flags)))
    policy = dpo_train.load_policy(folder, args, device, pairs)
    rank, world = dpo_train.ranks()
    plan = microbatches({i: cost(p, packing) for i, p in enumerate(pairs)}, 60, world, packing)
    logprobs = dpo_train.all_logprobs(policy, pairs, [plan], packing, device)
    for batch in plan[rank]:
        out = policy(collate([pairs[i] for i in batch or [0]], packing, device))  # [n, 2]
        ((out * G).sum() * (world if batch else 0)).backward()  # FSDP divides by the ranks
    return logprobs, {
        n.removeprefix("model."): p.grad.full_tensor() for n, p in policy.named_parameters()
    }


device = dpo_train.fsdp.start()
for folder in sorted(Path(sys.argv[1]).iterdir()):
    expected, gradient = plain(folder)
    size = sum(g.norm() ** 2 for g in gradient.values()) ** 0.5
    for packing in ("prefix", "padded"):
        for checkpointing in (False, True):
            logprobs, found = ours(folder, packing, checkpointing, device)
            assert found.keys() == gradient.keys()
            error = sum((found[n] - g).norm() ** 2 for n, g in gradient.items()) ** 0.5 / size
            gap = ((logprobs - expected).abs() / tokens).max()
            if dpo_train.ranks()[0] == 0:
                print(json.dumps([folder.name, packing, checkpointing, gap.item(), error.item()]))
dpo_train.fsdp.leave()
