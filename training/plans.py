"""Which pairs make a step, and which of them share a microbatch.

A pair is three integer arrays: prompt P, chosen C and rejected R. training/batches.py makes tensors
of those that share a microbatch.
"""

import heapq
import math
import random

import torch

from stage import ranks, seed_of


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
        fits = False
        if bins:
            last = bins[-1]
            longest = last[0]
            size = len(last) + 1
            fits = size * costs[longest] <= budget
        if not fits:
            last = []
            bins.append(last)
        last.append(pair)
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
        loads = [(0, number) for number in range(len(bins))]  # a heap of (tokens, bin)
        for pair in order:
            tokens, lightest = loads[0]
            tokens += costs[pair]
            heapq.heapreplace(loads, (tokens, lightest))
            bins[lightest].append(pair)
        heaviest, _ = max(loads)
        if heaviest <= budget:
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
    costs = {}
    for i in indices:
        costs[i] = cost(pairs[i], args.packing)
    return microbatches(costs, args.tokens_per_batch, world, args.packing)


def plan_all_steps(pairs: list[dict], args) -> list[StepPlan]:
    """The plan of every step of every epoch. It follows from the seed: no checkpoint holds it.

    args: num_train_epochs, batch_size, seed, and those of plan_step.
    """
    plans = []
    for epoch in range(args.num_train_epochs):
        order = list(range(len(pairs)))
        seed = seed_of("dpo_train", args.seed, epoch)
        random.Random(seed).shuffle(order)
        plans += plans_of(pairs, order, args)
    return plans


def plans_of(pairs: list[dict], order: list[int], args) -> list[StepPlan]:
    """These pairs in this order, --batch_size of them in a step."""
    plans = []
    for start in range(0, len(order), args.batch_size):
        end = start + args.batch_size
        plan = plan_step(pairs, order[start:end], args)
        plans.append(plan)
    return plans


def indices_of(plan: StepPlan) -> list[int]:
    """The pairs of a step, of all ranks."""
    indices = []
    for of_rank in plan:
        for microbatch in of_rank:
            indices += microbatch
    return indices


def plan_evaluation(pairs: list[dict], first: int, args) -> list[StepPlan]:
    """The plans of one pass over pairs[first:], as many at a time as in a step of the training."""
    order = list(range(first, len(pairs)))
    return plans_of(pairs, order, args)
