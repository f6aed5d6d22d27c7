"""Disturb the loop in every way that a user or a machine might, and see that it ends well.

    OMP_NUM_THREADS=1 python -m bench.chaos settings     hostile values of every setting
    OMP_NUM_THREADS=1 python -m bench.chaos damage       damaged files, then the same command again
    OMP_NUM_THREADS=1 python -m bench.chaos disk         a disk that is full again and again
    OMP_NUM_THREADS=1 python -m bench.chaos loops        two loops at once on one run
    OMP_NUM_THREADS=1 python -m bench.chaos kills        kill -9 at random moments of all stages

Two iterations of a small random model with a Python reward. The rule for each case: the loop ends
with success and with the bytes of an undisturbed run (rows, scores, pairs, weights, evaluations),
or it stops with exactly one message, without a traceback or an error of the shell. Nothing of the
user's is changed, and no process is left. When the damage is undone, or what the message says is
done, the same command ends with the same bytes. One line per case, and a summary; exit code 1 where
the rule was broken.

The stages run in forks of a process that has imported torch (bench/warm_python.py), which makes a
start ten times as fast; --cold runs every stage in a python of its own. --only TEXT … runs the
cases whose names hold one of these texts. --demo: kills, on the demo with its defaults.
"""

import argparse
import importlib.metadata
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from arguments import integer_in, parse
from bench import chaos_damage, chaos_disk, chaos_kills, chaos_settings
from bench.chaos_world import World
from bench.warm_python import WarmPython


class Report:
    """One line per case, and the counts for the summary."""

    def __init__(self, only: list[str], save: Path | None):
        self.only = only
        self.save = save
        self.lines: list[str] = []
        self.cases = 0
        self.findings = 0
        self.outcomes: dict[str, int] = {}
        self.began = time.monotonic()

    def wants(self, name: str) -> bool:
        return any(text in name for text in self.only)

    def say(self, line: str) -> None:
        line = line.encode("unicode_escape").decode()
        print(line, flush=True)
        self.lines.append(line)

    def case(self, name: str, outcome: str, said: str, faults: list[str]) -> None:
        """outcome: what happened, in a word or two; the summary counts these."""
        self.cases += 1
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self.say(f"{'FOUND' if faults else 'ok   '} {name}: {outcome}. {said[:200]}")
        for fault in faults:
            self.findings += 1
            self.say(f"      -> {fault[:300]}")

    def end(self, command: str) -> None:
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(self.outcomes.items()))
        seconds = time.monotonic() - self.began
        self.say(f"{self.cases} cases: {counts}. {self.findings} findings. {seconds:.0f} s")
        if self.save:
            self.save.parent.mkdir(parents=True, exist_ok=True)
            self.save.write_text("\n".join([f"$ {command}", *self.lines]) + "\n")


COMMANDS = {
    "settings": chaos_settings.disturb,
    "damage": chaos_damage.disturb,
    "disk": chaos_disk.disturb,
    "loops": chaos_kills.two_loops,
    "kills": chaos_kills.disturb,
}


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=COMMANDS)
    p.add_argument("--seed", type=integer_in("[0, inf)"), default=0)
    p.add_argument("--only", nargs="+", default=[""], help="cases whose names hold one of these")
    p.add_argument("--kills", type=integer_in("[1, inf)"), default=100)
    p.add_argument("--demo", action="store_true", help="kills: the demo, with its defaults")
    p.add_argument("--cold", action="store_true", help="a python of its own for every stage")
    p.add_argument("--folder", type=Path, help="work here, and leave everything; default: /tmp")
    p.add_argument("--save", type=Path, help="write what is printed there, too")
    return p


def main() -> None:
    args = parse(arguments())
    if args.what == "disk":
        chaos_disk.enter_namespace()
    report = Report(args.only, args.save)
    with ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        warm = str(stack.enter_context(WarmPython(folder.resolve())).path)
        world = World(folder.resolve(), warm, sys.executable if args.cold else warm)
        names = ("torch", "transformers")
        versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
        report.say(f"{args.what}, seed {args.seed}; {versions}, CPU")
        COMMANDS[args.what](world, report, random.Random(args.seed), args)
    report.end(" ".join(["python -m bench.chaos", *sys.argv[1:]]))
    sys.exit(1 if report.findings else 0)


if __name__ == "__main__":
    main()
