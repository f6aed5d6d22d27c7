"""Make preference pairs from scored candidates: the answers a reward ranked become (chosen, rejected).

    python make_pairs.py --scored scored.jsonl --output pairs.jsonl

For one prompt with candidates y_1 … y_N, let

    s_i = reward_i - length_penalty * |y_i|                                |y_i|: completion tokens

and order them by s. Equal s stand in random order: the order in the file is that of the sources
(two policies, two temperatures), and would make one the chosen and the other the rejected. The
strategy says which two meet; pair k = 0, 1, … of --pairs_per_prompt is

    max_min      the k-th best against the k-th worst     widest margin; RLHFlow's and OpenRLHF's choice
    max_random   the best against the k-th of the rest in random order    "RLHF Workflow" (arXiv 2405.07863)
    max_second   the k-th best against the (k+1)-th       hard pairs, close to the policy's frontier
    random       two drawn at random, the better chosen   no selection effect; the control

The chosen answer is always the one with the larger s (and s is what score_chosen and score_rejected hold): a
length penalty that has decided a pair is not undone by looking at the raw reward again.

What makes no pair is counted by name, never dropped in silence: "truncated" (an answer cut off by the token
limit teaches the policy to stop anywhere, so such answers do not take part), "identical" (the same text),
"tie" (the same s), "margin" (s differs by less than --min_margin), "single_candidate".

Rows stream through, so memory does not grow with the file. A prompt's random choices depend on (seed,
iteration, id) alone: shuffle the rows and the same pairs come out.
"""

import itertools
import random
from collections import Counter

from records import SCORED, Stop, count_rows, dump, finite, read_jsonl, whole
from stage import Stage, parse, parser, run, seed_of

STRATEGIES = ("max_min", "max_random", "max_second", "random")


def arguments():
    p = parser(__doc__)
    # Files
    p.add_argument("--scored", required=True, help="scored.jsonl, written by score.py")
    p.add_argument("--output", required=True, help="pairs.jsonl: a superset of TRL's preference format")
    # Which pairs
    p.add_argument("--strategy", choices=STRATEGIES, default="max_min", help="default: max_min")
    p.add_argument("--pairs_per_prompt", type=int, default=1, help="default 1: one update per prompt and sample")
    # Which answers
    p.add_argument("--min_margin", type=float, default=0.0, help="least difference in score; default 0: any")
    p.add_argument("--length_penalty", type=float, default=0.0, help="reward per completion token; default 0")
    p.add_argument("--keep_truncated", action="store_true", help='let answers with finish_reason "length" take part')
    # Where in the run
    p.add_argument("--iteration", type=int, default=0, help="recorded in each pair, and part of its seed")
    p.add_argument("--seed", type=int, default=0, help="of ties, max_random and random; default 0")
    return p


def rank_pairs(scores: list[float], strategy: str, k: int, rng: random.Random) -> list[tuple[int, int]]:
    """Up to k (winner, loser) index pairs, scores[winner] >= scores[loser]; ties go at random."""
    order = list(range(len(scores)))
    rng.shuffle(order)
    # Best first. The sort is stable, so equal scores stay in their shuffled order.
    order.sort(key=scores.__getitem__, reverse=True)
    if strategy == "max_min":
        return [(order[i], order[-1 - i]) for i in range(min(k, len(order) // 2))]
    if strategy == "max_random":
        return [(order[0], i) for i in rng.sample(order[1:], min(k, len(order) - 1))]
    if strategy == "max_second":
        return list(itertools.islice(itertools.pairwise(order), k))
    pairs = list(itertools.combinations(order, 2))
    return rng.sample(pairs, min(k, len(pairs)))


def make_pairs(row: dict, args, balance: dict[str, Counter], where: str) -> list[dict]:
    """The pairs of one scored row. `balance` counts what went in, came out and was dropped, by reason."""
    answers, dropped = [], Counter()
    for index, c in enumerate(row["candidates"]):
        finite(c["reward"], f'{where}: id "{row["id"]}", candidate {index}, reward')
        if c["finish_reason"] == "stop" or args.keep_truncated:
            score = c["reward"] - args.length_penalty * len(c["token_ids"])
            answers.append((index, c, score))
        else:
            dropped["truncated"] += 1
    balance["candidates"].update({"in": len(row["candidates"]), "out": len(answers)}, **dropped)

    rng = random.Random(seed_of("make_pairs", args.seed, args.iteration, row["id"]))
    pairs, refused = [], Counter()
    for w, l in rank_pairs([s for _, _, s in answers], args.strategy, args.pairs_per_prompt, rng) if answers else []:
        (wi, chosen, score_w), (li, rejected, score_l) = answers[w], answers[l]
        if chosen["text"] == rejected["text"]:
            refused["identical"] += 1
        elif score_w == score_l:
            refused["tie"] += 1
        elif score_w - score_l < args.min_margin:
            refused["margin"] += 1
        else:
            pairs.append(
                {
                    **{k: v for k, v in row.items() if k not in ("candidates", "meta")},
                    "iteration": args.iteration,
                    "chosen": completion(row["prompt"], chosen["text"]),
                    "rejected": completion(row["prompt"], rejected["text"]),
                    "score_chosen": score_w,
                    "score_rejected": score_l,
                    "chosen_token_ids": chosen["token_ids"],
                    "rejected_token_ids": rejected["token_ids"],
                    "chosen_logprob": chosen["logprob"],
                    "rejected_logprob": rejected["logprob"],
                    "chosen_index": wi,
                    "rejected_index": li,
                    "chosen_model": chosen["model"],
                    "rejected_model": rejected["model"],
                }
            )
    balance["pairs"].update({"in": len(pairs) + refused.total(), "out": len(pairs)}, **refused)

    # A row without a pair is dropped under one name: the first reason that a pair of it was refused for.
    balance["rows"]["in"] += 1
    if pairs:
        balance["rows"]["out"] += 1
    else:
        reason = next(iter(refused), "truncated" if len(row["candidates"]) > 1 and dropped else "single_candidate")
        balance["rows"][reason] += 1
    return pairs


def completion(prompt, text: str):
    """In TRL's formats a conversation is answered by a list of messages, a string by a string."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def main():
    args = parse(arguments())
    if args.pairs_per_prompt < 1:
        raise Stop("--pairs_per_prompt must be at least 1")
    stage = Stage(args, {"scored": args.scored}, args.output)
    if stage.done:
        return
    count_rows(args.scored, SCORED)

    balance = {"rows": Counter(), "candidates": Counter(), "pairs": Counter()}
    with whole(args.output) as temporary:
        with open(temporary, "w", encoding="utf-8") as out:
            for number, row in enumerate(read_jsonl(args.scored, SCORED), 1):
                out.writelines(map(dump, make_pairs(row, args, balance, f"{args.scored}:{number}")))
        for what, counter in balance.items():
            stage.count(what, counter.pop("in", 0), counter.pop("out", 0), counter)
        if not stage.counts["pairs"]["out"]:
            why = "\n".join(f"  {n:>8,}  {reason}" for reason, n in stage.counts["rows"]["dropped"].items())
            raise Stop(
                f"{args.scored}: not one pair came of {stage.counts['rows']['in']:,} prompts:\n{why}\n"
                "Ties and identical answers: raise --temperature or --num_samples of generate.py. Truncated "
                "answers: raise its --max_new_tokens. Margin: lower --min_margin."
            )
        stage.write_meta()
    stage.clean()


if __name__ == "__main__":
    run(main)
