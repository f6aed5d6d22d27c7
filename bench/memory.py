"""Peak memory of a training step beside what tools/memory.py predicts, and the seconds it takes.

    python -m bench.memory --shape Qwen2.5-7B --gradient_checkpointing --tokens_per_batch 4096
    python -m bench.memory --shape Qwen2.5-1.5B --cpu_offload            weights in host memory

The first command needs a GPU of 141 GB.

The prediction is for a GPU and bf16. This file also runs on a CPU, but there the two numbers are
unrelated.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig

from arguments import parse
from bench.headline import headline
from bench.train import ROOT, SHAPES, build_model, build_pairs, draw_lengths, measure


def predicted_gib(model: Path, flags: list[str]) -> float:
    """What the dry run, which is printed, predicts for this machine."""
    command = [sys.executable, "tools/memory.py", "--model", str(model), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1]
        raise SystemExit(f"{done.stderr}\nthe dry run failed: {why}")
    free = torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 0.0
    return sum_for(done.stdout, free)


def sum_for(table: str, free: float) -> float:
    """GiB that the dry run's table predicts if `free` GiB are free at the start.

    Weights that stay gathered have their own line below the sum.
    """
    total = float(re.search(r"([\d.]+)  sum on the GPU", table)[1])
    gathered = re.search(r"([\d.]+)  more on a GPU with ([\d.]+) GiB free", table)
    if gathered and free >= float(gathered[2]):
        total += float(gathered[1])
    return total


def main():
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--shape", choices=SHAPES, default="Qwen2.5-1.5B" if cuda else "small")
    p.add_argument("--pairs", type=int, default=16, help="of one optimizer step; default 16")
    p.add_argument(
        "--scale", type=float, default=1.0 if cuda else 0.25, help="of the lengths; 1, CPU 0.25"
    )
    p.add_argument(
        "--steps",
        type=int,
        default=3,
        help="steps of the run, the first of them not timed; default 3",
    )
    p.add_argument("--tokens_per_batch", type=int, default=16384 if cuda else 768)
    p.add_argument("--gradient_checkpointing", action="store_true")
    p.add_argument("--cpu_offload", action="store_true")
    args = parse(p)
    offload = ["--cpu_offload"] * args.cpu_offload
    flags = ["--tokens_per_batch", str(args.tokens_per_batch), *offload]
    flags += ["--gradient_checkpointing"] * args.gradient_checkpointing
    with tempfile.TemporaryDirectory() as name:
        model, pairs = Path(name) / "model", Path(name) / "pairs.jsonl"
        build_model(model, args.shape, torch.bfloat16 if cuda else torch.float32)
        predicted = predicted_gib(model, flags)
        build_pairs(
            pairs,
            draw_lengths(args.pairs, args.scale),
            AutoConfig.from_pretrained(model).vocab_size,
        )
        result = measure(
            {
                "name": args.shape,
                "side": "ours",
                "model": str(model),
                "pairs": str(pairs),
                "count": args.pairs,
                "steps": args.steps,
                "dtype": "bf16" if cuda else "fp32",
                "beta": 0.1,
                "learning_rate": 1e-5,
                "packing": "prefix",
                "tokens_per_batch": args.tokens_per_batch,
                "checkpointing": args.gradient_checkpointing,
                "compile": False,
                "ours_args": offload,
            }
        )
    if "failed" in result:
        raise SystemExit(f"{args.shape}: {result['failed']}; the dry run says {predicted} GiB")
    name = " ".join([args.shape, *flags])
    print(headline(f"peak, {name}", result["peak"] / 2**30, "GiB", predicted))
    print(headline(name, statistics.median(result["seconds"]), "s/step"))


if __name__ == "__main__":
    main()
