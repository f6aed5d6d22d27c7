"""Does LoRA learn the demo as well as full training, and at which learning rate?

    OMP_NUM_THREADS=1 python -m bench.lora_demo --save bench/results/lora_demo.txt

Each row is a whole loop, `bash iterate.sh`, with its own TRAIN_ARGS. On seed 0 LoRA is run at every
rate of --rates, and the demo's full training beside it. The rate with the best gold there is then
run on the other seeds, each beside full training: those rows did not choose it.

    gold      the game's own truth on held-out prompts, after the last iteration, less that of the
              initial policy; ± one standard error, clustered by prompt
    of full   the same as a share of full training's, of the same seed
    KL init   from the initial policy, nats per answer

The runs stand in runs/lora_demo/.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from arguments import integer_in, number_in, parse

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("runs/lora_demo")
ITERATIONS = 3  # iterate.sh's default
FULL_RATE = 2e-4  # the demo's own


class Loop(NamedTuple):
    seed: int
    rank: int | None  # None: full training
    rate: float
    batch_size: int = 32  # the demo's own

    @property
    def name(self) -> str:
        kind = f"rank_{self.rank}" if self.rank else "full"
        return f"seed_{self.seed}_{kind}_{self.rate:g}"


class Result(NamedTuple):
    gold: float
    error: float
    kl: float  # from the initial policy, nats per answer


def run(loop: Loop) -> Result:
    """The last row of the loop's summary. A loop that is done is not started again."""
    rows = summary_of(loop)
    if len(rows) <= ITERATIONS:
        start(loop)
        rows = summary_of(loop)
    last = rows[-1]
    return Result(last["gold_diff"], last["gold_diff_se"], last["kl/init"])


def summary_of(loop: Loop) -> list[dict]:
    file = ROOT / RUNS / loop.name / "summary.jsonl"
    return [json.loads(line) for line in open(file)] if file.exists() else []


def start(loop: Loop) -> None:
    folder = RUNS / loop.name
    flags = f"--learning_rate {loop.rate:g} --batch_size {loop.batch_size}"
    if loop.rank:
        flags += f" --lora_rank {loop.rank}"
    settings = {"SEED": str(loop.seed), "RUN": str(folder), "TRAIN_ARGS": flags, "NPROC": "1"}
    print(f"{loop.name} …", flush=True)
    log = ROOT / f"{folder}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as out:
        command = ["bash", "iterate.sh"]
        subprocess.run(
            command, cwd=ROOT, env=os.environ | settings, stdout=out, stderr=out, check=True
        )


def line(loop: Loop, result: Result, full: Result) -> str:
    kind = f"LoRA, rank {loop.rank}" if loop.rank else "full"
    gold = f"{result.gold:+.3f}±{result.error:.3f}"
    share = f"{result.gold / full.gold:.2f}"
    return f"{loop.seed:4}  {kind:14} {loop.rate:8g} {gold:>13} {share:>8} {result.kl:8.2f}"


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rank", type=integer_in("[1, inf)"), default=16)
    rates = [5e-4, 1e-3, 2e-3]
    p.add_argument("--rates", type=number_in("(0, 1]"), nargs="+", default=rates)
    p.add_argument("--seeds", type=integer_in("[0, inf)"), nargs="+", default=[0, 1, 2])
    p.add_argument("--save", type=Path, help="write the table here, too")
    args = parse(p)

    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    lines = [
        "python -m bench.lora_demo " + " ".join(sys.argv[1:]),
        f"{', '.join(versions)}, {os.environ.get('OMP_NUM_THREADS', 'all')} thread per process",
        "",
        "seed  training           rate          gold  of full  KL init",
    ]
    print("\n".join(lines), flush=True)

    def show(loop: Loop, result: Result, full: Result) -> None:
        lines.append(line(loop, result, full))
        print(lines[-1], flush=True)
        if args.save:
            args.save.write_text("\n".join(lines) + "\n")

    # the sweep
    first, *others = args.seeds
    loop = Loop(first, None, FULL_RATE)
    full = run(loop)
    show(loop, full, full)
    found = {}
    for rate in args.rates:
        loop = Loop(first, args.rank, rate)
        found[rate] = run(loop)
        show(loop, found[rate], full)
    best = max(found, key=lambda rate: found[rate].gold)

    # other seeds, which have not chosen the rate
    for seed in others:
        loop = Loop(seed, None, FULL_RATE)
        full = run(loop)
        show(loop, full, full)
        loop = Loop(seed, args.rank, best)
        show(loop, run(loop), full)


if __name__ == "__main__":
    main()
