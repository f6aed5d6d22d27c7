"""Run by test_lora.py, under torchrun or alone: our policy on these ranks, and peft with the same
factors.

    torchrun --nproc_per_node 2 tests/lora_against_peft.py FOLDER

FOLDER holds models (tests/small_models.py), each in its own folder. The output is one line of JSON
per model, packing and checkpointing: how far the log-probs are from those of peft in fp64, as a
share of them, and how far the gradient is, as a share of its norm. peft computes one plain sequence
at a time, with transformers' own attention and logits.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import AutoModelForCausalLM

import dpo_train
from training.batches import PARTS, collate
from training.plans import cost, microbatches

RANK, ALPHA = 4, 12.0
OF_ANSWERS = torch.tensor([1.0, -0.5])  # the loss: the sum over pairs of l_w - 0.5 l_l


def made_up_pairs(n: int) -> list[dict]:
    rng = random.Random(0)
    pairs = []
    for i in range(n):
        pair = {"id": str(i)}
        for part in PARTS:
            ids = [rng.randrange(6, 300) for _ in range(rng.randint(1, 14))]
            pair[part] = np.array(ids, np.int32)
        pairs.append(pair)
    return pairs


def random_factors(model) -> dict[str, torch.Tensor]:
    """Neither A nor B is zero, so that both have a gradient."""
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            factors[name] = 0.05 * torch.randn(parameter.shape, generator=generator)
    return factors


def ours(folder, packing: str, checkpointing: bool, pairs: list[dict], device):
    """Log-probs [n, 2], the gradient of each factor by name, and the factors."""
    flags = ["--model", folder, "--pairs", "none", "--output", "none", "--dtype", "fp32"]
    flags += ["--packing", packing, "--lora_rank", RANK, "--lora_alpha", ALPHA]
    flags += ["--gradient_checkpointing"] * checkpointing
    args = dpo_train.parse(dpo_train.arguments(), list(map(str, flags)))
    policy = dpo_train.load_policy(folder, args, device, pairs, factor_seed=0)
    factors = random_factors(policy.model)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(policy.model, dict(factors), options=options)

    rank, world = dpo_train.ranks()
    costs = {i: cost(pair, packing) for i, pair in enumerate(pairs)}
    plan = microbatches(costs, 60, world, packing)
    logprobs = dpo_train.all_logprobs(policy, pairs, [plan], packing, device)
    for batch in plan[rank]:
        out = policy(collate([pairs[i] for i in batch or [0]], packing, device))  # [n, 2]
        weight = world if batch else 0  # FSDP divides by the ranks
        ((out * OF_ANSWERS).sum() * weight).backward()

    gradient = {}
    for name, parameter in policy.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (name in factors), name
        if parameter.requires_grad:
            gradient[name] = parameter.grad.full_tensor()
    return logprobs, gradient, factors


def theirs(folder, factors: dict, pairs: list[dict]):
    """The same from peft, in fp64."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    layers = [name.removesuffix(".lora_A") for name in factors if name.endswith(".lora_A")]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers, task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            found[name] = parameter
            parameter.data = factors[name].double()
    assert found.keys() == factors.keys()

    rows = []
    for pair in pairs:
        for answer in ("chosen", "rejected"):
            ids = torch.tensor(np.concatenate([pair["prompt"], pair[answer]]), dtype=torch.long)
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]  # [L - 1, V]
            logprobs = logits.log_softmax(-1).gather(1, ids[1:, None])  # [L - 1, 1]
            rows.append(logprobs[len(pair["prompt"]) - 1 :].sum())
    logprobs = torch.stack(rows).view(-1, 2)
    (logprobs * OF_ANSWERS).sum().backward()
    return logprobs.detach(), {name: parameter.grad for name, parameter in found.items()}


def norm(tensors) -> float:
    return sum(t.double().square().sum().item() for t in tensors) ** 0.5


def main():
    device = dpo_train.fsdp.start()
    pairs = made_up_pairs(7)
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        expected = None
        for packing, checkpointing in (("prefix", False), ("padded", True)):
            logprobs, gradient, factors = ours(folder, packing, checkpointing, pairs, device)
            if expected is None:
                expected, expected_gradient = theirs(folder, factors, pairs)
            gap = ((logprobs - expected) / expected).abs().max().item()
            differences = [gradient[name] - g for name, g in expected_gradient.items()]
            error = norm(differences) / norm(expected_gradient.values())
            if dpo_train.ranks()[0] == 0:
                print(json.dumps([folder.name, packing, checkpointing, gap, error]))
    dpo_train.fsdp.leave()


main()
