"""What the judge's ring of neighbours loses against a round robin, and why it is shuffled.

    python -m bench.judge_ring --save bench/results/judge_ring.txt

If there are more than five candidates, judge.py compares each with four others only, its neighbours
in a shuffled ring. Here a judge that never errs compares answers whose quality is known: normal
variates of unit variance, with a mean for each source (a policy, a temperature). make_pairs.py's
own ranking then makes one max_min pair per prompt. The columns:

    requests      what one prompt costs, each comparison in both orders
    best, worst   how often the chosen answer is the best of all N, and the rejected one the worst
    apart         how often only the chosen one of the two comes from the better source
    against       how often the chosen answer is in truth worse than the rejected one

Of two sources the second is better by --gap standard deviations. Candidates stand in the order of
their sources, as judge.py joins them; "in file order" is a ring that keeps that order. With 20000
prompts the standard errors are below 0.4 points.
"""

import argparse
import random
import sys
from collections import defaultdict
from itertools import combinations
from pathlib import Path

from arguments import parse
from judge import comparisons
from make_pairs import rank_pairs


def dealt_ring(n: int, prompt: str) -> list[tuple[int, int]]:
    return comparisons(list(range(n)), prompt)


def ring_in_file_order(n: int, prompt: str) -> list[tuple[int, int]]:
    return [(k, (k + step) % n) for k in range(n) for step in (1, 2)]


def round_robin(n: int, prompt: str) -> list[tuple[int, int]]:
    return list(combinations(range(n), 2))


MEETINGS = {
    "dealt ring": dealt_ring,
    "in file order": ring_in_file_order,
    "round robin": round_robin,
}


def win_rates(worth: list[float], pairs: list[tuple[int, int]]) -> list[float]:
    """The scores that judge.py computes from the verdicts of a judge that never errs."""
    points = defaultdict(list)
    for i, j in pairs:
        points[i].append(float(worth[i] > worth[j]))
        points[j].append(float(worth[j] > worth[i]))
    return [sum(points[i]) / len(points[i]) for i in range(len(worth))]


def shares(sources: int, each: int, gap: float, meet, prompts: int) -> dict[str, float]:
    """The table's columns as shares of the prompts; each has `each` answers of every source."""
    n = sources * each
    found = dict.fromkeys(("best", "worst", "apart", "against"), 0)
    for p in range(prompts):
        rng = random.Random(p)
        worth = [rng.gauss(gap * (k // each), 1) for k in range(n)]
        pairs = meet(n, str(p))
        rates = win_rates(worth, pairs)
        ((chosen, rejected),) = rank_pairs(rates, "max_min", 1, rng)
        from_best_source = chosen // each == sources - 1
        from_another = rejected // each < sources - 1
        found["best"] += worth[chosen] == max(worth)
        found["worst"] += worth[rejected] == min(worth)
        found["apart"] += from_best_source and from_another
        found["against"] += worth[chosen] < worth[rejected]
    return {name: count / prompts for name, count in found.items()}


def arguments():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--prompts", type=int, default=20000, help="default 20000")
    p.add_argument("--gap", type=float, default=3.0, help="in standard deviations; default 3")
    p.add_argument("--save", help="write the table into this file, too")
    return p


def line(sources: int, each: int, name: str, gap: float, prompts: int) -> str:
    """One line of the table."""
    n, meet = sources * each, MEETINGS[name]
    requests = 2 * len(meet(n, ""))
    s = shares(sources, each, gap, meet, prompts)
    setting = f"{sources:7} {n:2}  {name:13} {requests:9}"
    apart = f"{s['apart']:6.1%}" if sources > 1 else "     -"
    return f"{setting} {s['best']:6.1%} {s['worst']:6.1%} {apart} {s['against']:7.2%}"


def main():
    args = parse(arguments())
    lines = [" ".join(["python -m bench.judge_ring", *sys.argv[1:]])]
    lines.append("sources  N  meetings       requests   best  worst  apart against")
    for sources, each in ((1, 8), (1, 16), (2, 4), (2, 8)):
        for name in MEETINGS:
            lines.append(line(sources, each, name, args.gap, args.prompts))
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if args.save:
        Path(args.save).write_text(text)


if __name__ == "__main__":
    main()
