"""Does the reward hold where the policy goes? How often it orders two answers as gold does.

    python tools/agreement.py runs/online_offline/demo/online runs/online_offline/strong/online

Takes folders of runs that differ in the seed alone. In each iteration, all pairs of held-out
answers to one prompt are compared that differ in gold: the figure is the share of them in which the
reward prefers the answer that gold prefers, a tie being half. So 0.5 is a coin, and 1 is the truth.
Mean over the runs, ± one standard error.
"""

import argparse
import sys
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # records.py is in the root
from compare import cell, runs_within
from records import SCORED, Stop, read_jsonl
from report_table import plain
from stage import run


def agreement(scored: Path) -> float | None:
    """The share of pairs that reward and gold order alike; None where gold tells none apart."""
    points = []
    for row in read_jsonl(scored, SCORED):
        for one, other in combinations(row["candidates"], 2):
            if "gold" not in one["rewards"] or "gold" not in other["rewards"]:
                raise Stop(f"{scored}: has no gold. Run iterate.sh with a GOLD_FN.")
            gold = one["rewards"]["gold"] - other["rewards"]["gold"]
            reward = one["reward"] - other["reward"]
            if gold == 0:
                continue
            same_order = (reward > 0) == (gold > 0)
            points.append(0.5 if reward == 0 else float(same_order))
    return sum(points) / len(points) if points else None


def line_of(folder: Path) -> dict[str, str]:
    """heading -> cell"""
    runs = runs_within(folder)
    line = {"arm": f"{folder.parent.name}/{folder.name}", "seeds": str(len(runs))}
    for name in sorted({path.name for folder in runs for path in folder.glob("iter_*")}):
        files = [path / name / "eval/scored.jsonl" for path in runs]
        shares = [agreement(file) for file in files if file.exists()]
        known = [share for share in shares if share is not None]
        line[name] = cell(known, len(runs))
    return line


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folders", nargs="+", type=Path, help="of the runs of an arm")
    lines = [line_of(folder) for folder in p.parse_args().folders]
    headings = list(max(lines, key=len))
    cells = [[line.get(heading, "-") for heading in headings] for line in lines]
    print(plain([headings, *cells]))


if __name__ == "__main__":
    run(main)
