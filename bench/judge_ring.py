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
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from arguments import parse
from judge import comparisons
from make_pairs import rank_pairs


def dealt_ring(n: int, prompt: str) -> list[tuple[int, int]]:
    return comparisons(list(range(n)), prompt)


def ring_in_file_order(n: int, prompt: str) -> list[tuple[int, int]]:
    neighbours = []
    for k in range(n):
        neighbours.append((k, (k + 1) % n))
        neighbours.append((k, (k + 2) % n))
    return neighbours


def round_robin(n: int, prompt: str) -> list[tuple[int, int]]:
    return list(combinations(range(n), 2))


COLUMNS = ("best", "worst", "apart", "against")
SETTINGS = ((1, 8), (1, 16), (2, 4), (2, 8))  # sources, answers of each
MEETINGS = {
    "dealt ring": dealt_ring,
    "in file order": ring_in_file_order,
    "round robin": round_robin,
}


def win_rates(worth: list[float], pairs: list[tuple[int, int]]) -> list[float]:
    """The scores that judge.py computes from the verdicts of a judge that never errs."""
    points = defaultdict(list)
    for i, j in pairs:
        first_wins = worth[i] > worth[j]
        points[i].append(float(first_wins))
        points[j].append(float(not first_wins))
    return [fmean(points[i]) for i in range(len(worth))]


class Prompts(NamedTuple):
    """Prompts whose answers come from several sources."""

    count: int
    sources: int
    each: int  # answers of each source to a prompt
    gap: float  # of the means of two sources, in standard deviations

    @property
    def answers(self) -> int:
        """N, to one prompt."""
        return self.sources * self.each

    def source_of(self, answer: int) -> int:
        return answer // self.each

    def draw(self, rng: random.Random) -> list[float]:
        """What each answer to one prompt is worth."""
        means = [self.gap * self.source_of(k) for k in range(self.answers)]
        return [rng.gauss(mean, 1) for mean in means]


def shares(prompts: Prompts, meet: Callable) -> dict[str, float]:
    """The table's columns, as shares of the prompts."""
    best_source = prompts.sources - 1
    found = Counter()
    for number in range(prompts.count):
        rng = random.Random(number)
        worth = prompts.draw(rng)
        pairs = meet(prompts.answers, str(number))
        rates = win_rates(worth, pairs)
        ((chosen, rejected),) = rank_pairs(rates, "max_min", 1, rng)

        from_best_source = prompts.source_of(chosen) == best_source
        from_another = prompts.source_of(rejected) < best_source
        found["best"] += worth[chosen] == max(worth)
        found["worst"] += worth[rejected] == min(worth)
        found["apart"] += from_best_source and from_another
        found["against"] += worth[chosen] < worth[rejected]
    return {name: found[name] / prompts.count for name in COLUMNS}


def arguments():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--prompts", type=int, default=20000, help="default 20000")
    p.add_argument("--gap", type=float, default=3.0, help="in standard deviations; default 3")
    p.add_argument("--save", help="write the table into this file, too")
    return p


def line(prompts: Prompts, name: str) -> str:
    """One line of the table."""
    meet = MEETINGS[name]
    both_orders = 2 * len(meet(prompts.answers, ""))
    share = shares(prompts, meet)
    cells = [
        f"{prompts.sources:7}",
        f"{prompts.answers:2} ",
        f"{name:13}",
        f"{both_orders:9}",
        f"{share['best']:6.1%}",
        f"{share['worst']:6.1%}",
        f"{share['apart']:6.1%}" if prompts.sources > 1 else "     -",
        f"{share['against']:7.2%}",
    ]
    return " ".join(cells)


def main():
    args = parse(arguments())
    lines = [" ".join(["python -m bench.judge_ring", *sys.argv[1:]])]
    lines.append("sources  N  meetings       requests   best  worst  apart against")
    for sources, each in SETTINGS:
        prompts = Prompts(args.prompts, sources, each, args.gap)
        for name in MEETINGS:
            lines.append(line(prompts, name))
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if args.save:
        Path(args.save).write_text(text)


if __name__ == "__main__":
    main()
