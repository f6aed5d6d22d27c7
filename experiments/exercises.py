"""Run the exercises of docs/exercises.md, and write into that page what they gave.

    python -m experiments.exercises

Runs every command of the page as it stands there; a run that is done ends at once. The last row of
each run (of `long`, every row) goes into bench/results/exercises.txt, and into the page where it
says <!-- figures: NAMES OF RUNS -->.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.warm_python import ROOT, WarmPython
from records import NUMBER, read_jsonl, write_whole

PAGE = ROOT / "docs/exercises.md"
RESULTS = ROOT / "bench/results/exercises.txt"
AUDIT = "audit"  # the last exercise: no run, but a message
WHOLE = ("long",)  # runs of which every iteration is shown

HEADING = "run            iterations         gold  reward     KL  tokens  distinct  pairs"
# A marker, and the block behind it.
MARKER = re.compile(r"<!-- figures: (.+) -->\n(?:\n```\n(?:.+\n)+```\n)?")


def commands(page: str) -> list[str]:
    """Every command of the page, in one line each."""
    one_line_each = page.replace("\\\n", " ")
    return [line.strip() for line in one_line_each.splitlines() if line.startswith("    ")]


def run_all(lines: list[str]) -> str:
    """Run them one after the other; what the last one, which must fail, printed at its end."""
    with tempfile.TemporaryDirectory() as folder, WarmPython(Path(folder)) as warm:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"PYTHON": str(warm.path), "PATH": path}
        for line in ["bash iterate.sh", *lines]:
            print(f"\n$ {line}", flush=True)
            done = subprocess.run(
                ["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True
            )
            must_fail = line == lines[-1]
            if must_fail != bool(done.returncode):
                sys.exit(f"{line}\nended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stderr.strip().splitlines()[-1]


def lines_of(run: Path) -> str:
    """A run's lines under HEADING: one, of the last iteration, unless it is shown whole."""
    rows = list(read_jsonl(run / "summary.jsonl", {"iteration": NUMBER}))
    pairs = 0
    lines = []
    for row in rows:
        pairs += row.get("pairs", 0)  # up to this iteration
        gold, error = figure(row, "gold")
        lines.append(
            f"{run.name:14} {row['iteration']:10}  {gold:.3f}±{error:.3f} {row['reward']:7.3f} "
            f"{row.get('kl/init', 0):6.2f} {row['length']:7.1f} {row['distinct']:9.0%} {pairs:6,}"
        )
    return "\n".join(lines if run.name in WHOLE else lines[-1:])


def figure(row: dict, name: str) -> tuple[float, float]:
    """A held-out figure and its standard error."""
    return row[name], row[f"{name}_se"]


def results(lines: list[str], message: str) -> dict[str, str]:
    """name of a run -> its lines."""
    found = {"demo": lines_of(ROOT / "runs/demo")}
    for line in lines:
        named = re.search(r"RUN=(\S+)", line)
        if named:
            run = ROOT / named[1]
            found[run.name] = lines_of(run)
    found[AUDIT] = message
    return found


def with_figures(page: str, found: dict[str, str]) -> str:
    """The page with a block behind every marker: the demo's line, and those of its runs.

    A marker whose runs have not been made stays without a block.
    """

    def block(marker: re.Match) -> str:
        names = marker[1].split()
        if not found.keys() >= set(names):
            return f"<!-- figures: {marker[1]} -->\n"
        if names == [AUDIT]:
            shown = [found[AUDIT]]
        else:
            shown = [HEADING, *(found[name] for name in dict.fromkeys(["demo", *names]))]
        text = "\n".join(shown)
        return f"<!-- figures: {marker[1]} -->\n\n```\n{text}\n```\n"

    return MARKER.sub(block, page)


def main() -> None:
    page = PAGE.read_text()
    lines = commands(page)
    message = run_all(lines)
    found = results(lines, message)
    table = "\n".join([HEADING, *found.values()])
    write_whole(RESULTS, f"$ python -m experiments.exercises\n{table}\n")
    write_whole(PAGE, with_figures(page, found))
    print(table)


if __name__ == "__main__":
    main()
