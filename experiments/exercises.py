"""Run the exercises of docs/exercises.md, and write into that page what they gave.

    python -m experiments.exercises

Runs every command of the page as it stands there; a run that is done ends at once. The last row of
each run goes into bench/results/exercises.txt, and into the page where it says
<!-- figures: NAMES OF RUNS -->.
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
            if done.returncode and line != lines[-1]:
                sys.exit(done.stdout + done.stderr)
    return done.stderr.strip().splitlines()[-1]


def last_row(run: Path) -> str:
    """A line under HEADING."""
    (*_, row) = read_jsonl(run / "summary.jsonl", {"iteration": NUMBER})
    gold, error = figure(row, "gold")
    pairs = sum(each.get("pairs", 0) for each in read_jsonl(run / "summary.jsonl", {}))
    return (
        f"{run.name:14} {row['iteration']:10}  {gold:.3f}±{error:.3f} {row['reward']:7.3f} "
        f"{row['kl/init']:6.2f} {row['length']:7.1f} {row['distinct']:9.0%} {pairs:6,}"
    )


def figure(row: dict, name: str) -> tuple[float, float]:
    """A held-out figure and its standard error."""
    return row[name], row[f"{name}_se"]


def results(lines: list[str], message: str) -> dict[str, str]:
    """name of a run -> its line."""
    found = {"demo": last_row(ROOT / "runs/demo")}
    for line in lines:
        named = re.search(r"RUN=(\S+)", line)
        if named:
            run = ROOT / named[1]
            found[run.name] = last_row(run)
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
