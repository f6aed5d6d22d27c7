"""From preference pairs to the tensors of a forward pass: which pairs share a microbatch, and how.

A pair is three integer arrays: prompt P, chosen C and rejected R. There are two ways to lay n pairs
out for a forward pass:

    prefix   input_ids [1, T]     [P|C|R][P|C|R]…   no padding, each prompt once: T is the sum of
                                                    p + c + r
    padded   input_ids [2n, L]    [P|C], [P|R], …   one row per sequence, padded on the right, for
                                                    models whose attention cannot be packed

With UltraFeedback's mean lengths (p 200, c and r 350) a pair takes 900 tokens, or 1100 and what is
lost to padding.
"""

import heapq
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch

from kernels.attention import Layout, prefix_layout
from stage import ranks, seed_of

PARTS = ("prompt", "chosen", "rejected")


def lengths_of(pair: dict) -> tuple[int, int, int]:
    """(p, c, r): the tokens of prompt, chosen and rejected."""
    return len(pair["prompt"]), len(pair["chosen"]), len(pair["rejected"])


def answer_lengths(pairs: list[dict], indices: list[int]) -> torch.Tensor:
    """[n, 2]: |y| of the (chosen, rejected) answers of these pairs."""
    lengths = []
    for i in indices:
        _, c, r = lengths_of(pairs[i])
        lengths.append((c, r))
    return torch.tensor(lengths)


# ---- which pairs share a microbatch ------------------------------------------------------------


def cost(pair: dict, packing: str) -> int:
    """Tokens that a pair adds to a forward pass; padded: if no pair in the same batch is longer."""
    p, c, r = lengths_of(pair)
    if packing == "prefix":
        return p + c + r
    return 2 * (p + max(c, r))


def shortest_and_longest(pairs: list[dict], packing: str, budget: int) -> tuple[dict, dict]:
    """The cheapest pair, and the most expensive that fits into `budget` tokens, else the cheapest.

    Both are for checks. The longest shows most, and training runs microbatches of its size anyway.
    """
    by_cost = sorted(pairs, key=lambda pair: cost(pair, packing))
    shortest = by_cost[0]
    fitting = [pair for pair in by_cost if cost(pair, packing) <= budget]
    longest = max(fitting, key=lambda pair: cost(pair, packing), default=shortest)
    return shortest, longest


def microbatches(
    costs: dict[int, int], budget: int, world: int, packing: str
) -> list[list[list[int]]]:
    """Cut the pairs of a step into microbatches of at most `budget` tokens.

    costs: pair -> its tokens in a forward pass (`cost`); any number may name a pair.
    Returns [rank][microbatch] -> pairs. A microbatch may be empty: FSDP's collectives need the same
    number of forward passes on every rank. A pair above the budget gets a microbatch of its own.
    """
    longest_first = sorted(costs, key=lambda pair: -costs[pair])
    if packing == "padded":
        bins = bins_of_like_length(longest_first, costs, budget)
        missing = -len(bins) % world
        bins += [[] for _ in range(missing)]
    else:
        bins = bins_of_like_weight(longest_first, costs, budget, world)
    return [bins[rank::world] for rank in range(world)]


def bins_of_like_length(order: list[int], costs: dict[int, int], budget: int) -> list[list[int]]:
    """Cut `order`, longest first, into bins. Each pair costs as much as the longest in its bin."""
    bins: list[list[int]] = []
    for pair in order:
        fits = bool(bins) and (len(bins[-1]) + 1) * costs[bins[-1][0]] <= budget
        if not fits:
            bins.append([])
        bins[-1].append(pair)
    return bins


def bins_of_like_weight(
    order: list[int], costs: dict[int, int], budget: int, world: int
) -> list[list[int]]:
    """As few bins as will do, a multiple of `world`, so that no rank waits for another.

    The longest pair first, each into the lightest bin: Graham's LPT rule, within 4/3 of the best.
    """
    budget = max(budget, costs[order[0]])
    least = math.ceil(sum(costs.values()) / budget / world)
    for per_rank in range(least, len(order) + 1):
        bins: list[list[int]] = [[] for _ in range(per_rank * world)]
        loads = [(0, b) for b in range(len(bins))]  # a heap of (tokens, bin)
        for pair in order:
            load, lightest = loads[0]
            heapq.heapreplace(loads, (load + costs[pair], lightest))
            bins[lightest].append(pair)
        if max(loads)[0] <= budget:
            break
    return bins


# ---- which pairs make a step -------------------------------------------------------------------

# A step's pairs, as indices into all pairs: [rank][microbatch][pair]. All ranks have the same
# number of microbatches, and one may be empty.
StepPlan = list[list[list[int]]]


def plan_step(pairs: list[dict], indices: list[int], args) -> StepPlan:
    """Share the pairs of one step among the ranks.

    args: packing, tokens_per_batch.
    """
    _, world = ranks()
    costs = {i: cost(pairs[i], args.packing) for i in indices}
    return microbatches(costs, args.tokens_per_batch, world, args.packing)


def plan_all_steps(pairs: list[dict], args) -> list[StepPlan]:
    """The plan of every step of every epoch. It follows from the seed: no checkpoint holds it.

    args: num_train_epochs, batch_size, seed, and those of plan_step.
    """
    plans = []
    for epoch in range(args.num_train_epochs):
        order = list(range(len(pairs)))
        random.Random(seed_of("dpo_train", args.seed, epoch)).shuffle(order)
        for start in range(0, len(order), args.batch_size):
            indices = order[start : start + args.batch_size]
            plans.append(plan_step(pairs, indices, args))
    return plans


def indices_of(plan: StepPlan) -> list[int]:
    """The pairs of a step, of all ranks."""
    return [i for share in plan for batch in share for i in batch]


def plan_evaluation(pairs: list[dict], first: int, args) -> list[StepPlan]:
    """The plans of one pass over pairs[first:], as many at a time as in a step of the training."""
    plans = []
    for start in range(first, len(pairs), args.batch_size):
        end = min(start + args.batch_size, len(pairs))
        plans.append(plan_step(pairs, list(range(start, end)), args))
    return plans


# ---- the tensors of a microbatch ---------------------------------------------------------------


def collate(pairs: list[dict], packing: str, device="cpu") -> dict:
    """The tensors of one forward pass. With n pairs of Tc answer tokens in all:

    inputs     keyword arguments of the base model, laid out as above
    positions  [Tc] int64: the place, in the flattened input, of the hidden state that predicts each
               answer token. That is one before it; for the first token of either answer it is the
               last token of the prompt
    targets    [Tc] int64, those tokens: chosen 0, rejected 0, chosen 1, …
    split      the 2n lengths of those answers, on the host
    lengths    [n, 2] int64, the same as a tensor
    """
    if packing == "prefix":
        inputs, positions = prefix_rows(pairs)
    else:
        inputs, positions = padded_rows(pairs)
    answers = []
    for pair in pairs:
        answers += [pair["chosen"], pair["rejected"]]
    split = [len(answer) for answer in answers]
    batch = {
        "inputs": inputs,
        "positions": torch.from_numpy(np.concatenate(positions)),
        "targets": torch.from_numpy(np.concatenate(answers)).long(),
        "split": split,
        "lengths": torch.tensor(split).view(-1, 2),
    }
    return to_device(batch, torch.device(device))


def prefix_rows(pairs: list[dict]) -> tuple[dict, list[np.ndarray]]:
    """One row [P|C|R][P|C|R]…: inputs, and the positions of each answer, chosen 0, rejected 0, …"""
    tokens = []
    positions = []
    start = 0  # of the pair, in the row
    for pair in pairs:
        p, c, r = lengths_of(pair)
        tokens += [pair["prompt"], pair["chosen"], pair["rejected"]]
        end_of_prompt = start + p - 1
        start_of_rejected = start + p + c
        positions.append(end_of_prompt + np.arange(c))
        positions.append(np.concatenate([[end_of_prompt], start_of_rejected + np.arange(r - 1)]))
        start += p + c + r

    lengths = [lengths_of(pair) for pair in pairs]
    position_ids, layout = prefix_layout(lengths)
    input_ids = torch.from_numpy(np.concatenate(tokens)).long()[None]  # [1, T]
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "layout": layout}
    return inputs, positions


def padded_rows(pairs: list[dict]) -> tuple[dict, list[np.ndarray]]:
    """2n rows [P|C], [P|R], …, padded on the right: inputs, and the positions of each answer."""
    sequences = []
    ends_of_prompts = []
    for pair in pairs:
        for answer in (pair["chosen"], pair["rejected"]):
            sequences.append(np.concatenate([pair["prompt"], answer]))
            ends_of_prompts.append(len(pair["prompt"]) - 1)
    width = max(len(sequence) for sequence in sequences)

    input_ids = np.zeros((len(sequences), width), np.int64)  # [2n, L]
    mask = np.zeros((len(sequences), width), np.int64)  # [2n, L]
    positions = []
    for row, sequence in enumerate(sequences):
        length = len(sequence)
        input_ids[row, :length] = sequence
        mask[row, :length] = 1
        in_row = np.arange(ends_of_prompts[row], length - 1)
        positions.append(row * width + in_row)

    position_ids = torch.arange(width)[None].repeat(len(sequences), 1)  # [2n, L]
    inputs = {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(mask),
        "position_ids": position_ids,
    }
    return inputs, positions


# ---- to the device -----------------------------------------------------------------------------


def to_device(x, device: torch.device):
    """x with all its tensors on `device`. x: a tensor, a Layout, a dict of them, or anything else.

    Copies to a GPU start from pinned memory: such a copy is queued on the GPU, and the program
    continues. With ordinary memory, the program would wait until the GPU has finished all earlier
    work.
    """
    if isinstance(x, dict):
        return {name: to_device(value, device) for name, value in x.items()}
    if isinstance(x, Layout):
        return replace(
            x,
            cu_seqlens_q=to_device(x.cu_seqlens_q, device),
            cu_seqlens_k=to_device(x.cu_seqlens_k, device),
            kv_index=to_device(x.kv_index, device),
        )
    if not isinstance(x, torch.Tensor):
        return x
    is_a_real_gpu = device.type == "cuda" and torch.cuda.is_available()  # not FakeTensorMode's
    if is_a_real_gpu:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def feed(pairs: list[dict], groups: Iterable[list[int]], packing: str, device) -> Iterator[dict]:
    """Yield the batch of each group of indices into `pairs`: what `collate` makes of it, and

    rows     [n] int64, the indices
    weights  [n] fp32: 1, or 0 for a stand-in. An empty group is pair 0 with weight 0, for a rank
             that has no pairs left and takes part in the collectives only

    A GPU works on a batch while its caller is here again already, and builds the next one.
    """
    device = torch.device(device)
    for group in groups:
        rows = group or [0]
        weight = 1.0 if group else 0.0
        batch = collate([pairs[i] for i in rows], packing, device)
        batch["rows"] = to_device(torch.tensor(rows), device)
        batch["weights"] = to_device(torch.full((len(rows),), weight), device)
        yield batch
