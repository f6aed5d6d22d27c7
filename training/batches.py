"""From preference pairs to the tensors of a forward: which pairs share a microbatch, and how they
lie in it.

A pair is three integer arrays, prompt P, chosen C and rejected R. Three ways to lay n of them out:

    prefix   input_ids [1, T]    [P|C|R][P|C|R]…              no padding, each prompt once   T = sum of p + c + r
    packed   input_ids [1, T]    [P|C][P|R][P|C][P|R]…        no padding                     T = sum of 2p + c + r
    padded   input_ids [2n, L]   a row a sequence, padded on the right, for attention that cannot be packed

With UltraFeedback-like lengths (p 200, c and r 350) that is 900, 1100 and about 1900 tokens a pair.
"""

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch

from kernels.attention import Layout, packed_layout, prefix_layout

PARTS = ("prompt", "chosen", "rejected")


def cost(pair: dict, packing: str) -> int:
    """Tokens that a pair adds to a forward; padded: if no pair beside it is longer."""
    p, c, r = (len(pair[k]) for k in PARTS)
    return {"prefix": p + c + r, "packed": 2 * p + c + r, "padded": 2 * (p + max(c, r))}[packing]


def shortest_and_longest(pairs: list[dict], packing: str, budget: int) -> tuple[dict, dict]:
    """The cheapest pair, and the most expensive that fits into `budget` tokens, else the cheapest.

    For checks: the longest shows most, and if it fits, training runs microbatches as large anyway.
    """
    shortest = min(pairs, key=lambda pair: cost(pair, packing))
    fitting = [pair for pair in pairs if cost(pair, packing) <= budget]
    longest = max(fitting, key=lambda pair: cost(pair, packing), default=shortest)
    return shortest, longest


def microbatches(
    costs: dict[int, int], budget: int, world: int, packing: str
) -> list[list[list[int]]]:
    """Cut a step's pairs into microbatches of at most `budget` tokens: [rank][microbatch] -> pairs.

    costs: pair -> its tokens in a forward, see `cost`; any number may name a pair.

    FSDP's collectives need as many forwards on one rank as on another, and no rank should wait, so
    all ranks get the same number of bins of about the same weight: the longest pair first, each
    into the lightest bin (Graham's LPT rule, within 4/3 of the best balance), with as few bins as
    will do. Padded rows cost as much as the longest beside them, so there the bins are runs of
    similar length instead. A bin may be empty. A pair above the budget goes alone.
    """
    order = sorted(costs, key=lambda i: -costs[i])
    if packing == "padded":
        bins: list[list[int]] = []
        for i in order:
            if not bins or (len(bins[-1]) + 1) * costs[bins[-1][0]] > budget:
                bins.append([])
            bins[-1].append(i)
        bins += [[] for _ in range(-len(bins) % world)]
    else:
        budget = max(budget, costs[order[0]])
        count = math.ceil(sum(costs.values()) / budget / world) * world
        while True:
            bins, loads = (
                [[] for _ in range(count)],
                [(0, b) for b in range(count)],
            )  # loads is a heap
            for i in order:
                load, b = loads[0]
                heapq.heapreplace(loads, (load + costs[i], b))
                bins[b].append(i)
            if max(loads)[0] <= budget:
                break
            count += world
    return [bins[rank::world] for rank in range(world)]


def collate(pairs: list[dict], packing: str, device="cpu") -> dict:
    """The tensors of one forward, made on the CPU and moved to `device`. With n pairs of Tc answer
    tokens in all:

    inputs     keyword arguments of the base model, laid out as above
    positions  [Tc] int64, where in the flattened input stands the hidden state that predicts each
    answer token:
               one before it, and for the first token of either answer the last token of the prompt
    targets    [Tc] int64, those tokens: chosen 0, rejected 0, chosen 1, …
    split      2n lengths of those answers, on the host
    lengths    [n, 2] int64, the same as a tensor
    """
    answers = [pair[k] for pair in pairs for k in PARTS[1:]]
    prompts = [pair["prompt"] for pair in pairs for _ in range(2)]
    sizes = [len(p) + len(y) for p, y in zip(prompts, answers, strict=True)]
    if packing == "padded":
        width = max(sizes)
        ids, mask = np.zeros((len(sizes), width), np.int64), np.zeros((len(sizes), width), np.int64)
        for i, (p, y) in enumerate(zip(prompts, answers, strict=True)):
            ids[i, : sizes[i]], mask[i, : sizes[i]] = np.concatenate([p, y]), 1
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": np.arange(width)[None].repeat(len(sizes), 0),
        }
        starts = [i * width for i in range(len(sizes))]
    elif packing == "packed":
        inputs = {
            "input_ids": np.concatenate(
                [x for py in zip(prompts, answers, strict=True) for x in py]
            )[None]
        }
        inputs["position_ids"], inputs["layout"] = packed_layout(sizes)
        starts = np.cumsum([0, *sizes[:-1]])
    else:
        parts = [[pair[k] for k in PARTS] for pair in pairs]
        inputs = {"input_ids": np.concatenate([x for pcr in parts for x in pcr])[None]}
        inputs["position_ids"], inputs["layout"] = prefix_layout(
            [tuple(map(len, pcr)) for pcr in parts]
        )
        # Seen from R, its prompt would begin len(C) later than it does; only the first position of
        # R needs the truth.
        pair_starts = np.cumsum([0, *(sum(map(len, pcr)) for pcr in parts[:-1])])
        starts = [
            s
            for start, (_, c, _) in zip(pair_starts, parts, strict=True)
            for s in (start, start + len(c))
        ]
    positions = [
        s + len(p) - 1 + np.arange(len(y)) for s, p, y in zip(starts, prompts, answers, strict=True)
    ]
    if packing == "prefix":
        for i in range(1, len(positions), 2):
            positions[i][0] = positions[i - 1][0]  # both answers begin behind the same token

    def tensor(x):
        return torch.as_tensor(x, dtype=torch.long)

    batch = {
        "inputs": {k: x if k == "layout" else tensor(x) for k, x in inputs.items()},
        "positions": tensor(np.concatenate(positions)),
        "targets": tensor(np.concatenate(answers)),
        "split": [len(y) for y in answers],
        "lengths": tensor([len(y) for y in answers]).view(-1, 2),
    }
    return to_device(batch, torch.device(device))


def to_device(x, device: torch.device):
    """x with all its tensors on `device`: a tensor, a Layout or a dict of them; anything else stays
    as it is.

    To a GPU through pinned memory: such a copy waits in the GPU's queue, and the program goes on.
    From ordinary memory, the program would wait until the GPU has done all that was asked of it
    before.
    """
    if isinstance(x, dict):
        return {k: to_device(v, device) for k, v in x.items()}
    if isinstance(x, Layout):
        names = ("cu_seqlens_q", "cu_seqlens_k", "kv_index")
        return replace(x, **{name: to_device(getattr(x, name), device) for name in names})
    if not isinstance(x, torch.Tensor):
        return x
    if (
        device.type == "cuda" and torch.cuda.is_available()
    ):  # it is not under FakeTensorMode on a laptop
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def feed(pairs: list[dict], groups: Iterable[list[int]], packing: str, device) -> Iterator[dict]:
    """Yield what `collate` makes of each group of indices into `pairs`, and "rows", [n] int64,
    those indices.

    One group ahead: the next one is built and on its way while a GPU still works on those before.
    An empty group is pair 0, for a rank without pairs, which takes part in the collectives only.
    """
    ready = None
    for group in groups:
        rows = group or [0]
        following = collate([pairs[i] for i in rows], packing, device)
        following["rows"] = to_device(torch.tensor(rows), torch.device(device))
        if ready is not None:
            yield ready
        ready = following
    if ready is not None:
        yield ready
