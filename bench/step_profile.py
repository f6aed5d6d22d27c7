"""Where the time of one optimizer step goes: GPU kernels by kind, and the time without any kernel.

    python -m bench.step_profile --shape Qwen2.5-1.5B            a GPU
    python -m bench.step_profile --shape Qwen2.5-1.5B --compile  with torch.compile of the layers

The second step of dpo_train.py's own main() runs under torch.profiler. On a CPU torch's operations
are counted instead of kernels.
"""

import argparse
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from arguments import parse
from bench.headline import headline
from bench.train import SHAPES, Meter, build_model, build_pairs, draw_lengths, run_ours

# The first that is found in a kernel's name, or in that of one of torch's operations on a CPU, is
# its kind.
KINDS = {
    "row kernel": r"row_kernel",
    "compiled layers": r"triton_",
    "communication": r"nccl",
    "attention": r"flash|fmha|attention|softmax",
    "matrix product": r"gemm|nvjet|cutlass|xmma|cublas|\bmm\b|addmm|bmm|::linear",
    "optimizer": r"multi_tensor|adam|foreach",
    "copy and cast": r"memcpy|memset|copy|::_?to\b|cat|::clone|::contiguous|fill|zero",
    "reduction": r"reduce|sum|mean|norm",
    "elementwise": r"elementwise|::mul|::add|::div|::silu|::neg|::pow|::exp|::sub",
    "gather and scatter": r"index|embedding|gather|scatter|sort",
}


def kind_of(name: str) -> str:
    for kind, pattern in KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


class Profiler(Meter):
    """Takes the place of the clock: profiles the second step."""

    def __init__(self):
        super().__init__()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
        self.profile = profile(activities=activities)

    def begin(self) -> None:
        super().begin()
        if self.steps == 1:
            self.profile.start()
            self.began_ms = time.perf_counter() * 1e3

    def end(self) -> None:
        super().end()
        if self.steps == 2:
            self.ms = time.perf_counter() * 1e3 - self.began_ms
            self.profile.stop()


def table(events, ms: float, cuda: bool) -> list[str]:
    """Lines: milliseconds, share of the step and calls of each kind, then the ten slowest. events:
    key_averages().
    """
    kinds, calls = Counter(), Counter()
    slowest = []
    for event in events:
        if event.is_user_annotation or (cuda and event.device_type != DeviceType.CUDA):
            # a named region, which holds kernels that are counted themselves, or the call of a
            # kernel
            continue
        own_ms = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3
        kinds[kind_of(event.key)] += own_ms
        calls[kind_of(event.key)] += event.count
        slowest.append((own_ms, event.count, event.key))
    lines = [f"{'kind':24} {'ms':>9} {'share':>6} {'calls':>7}"]
    for kind, own_ms in kinds.most_common():
        lines.append(f"{kind:24} {own_ms:9.1f} {own_ms / ms:6.1%} {calls[kind]:7}")
    idle = ms - sum(kinds.values())
    lines.append(
        f"{'none of them' if not cuda else 'the GPU waits':24} {idle:9.1f} {idle / ms:6.1%}"
    )
    lines += ["", "the slowest:"]
    for own_ms, count, name in sorted(slowest, reverse=True)[:10]:
        lines.append(f"{own_ms:9.1f} ms {count:6} calls  {kind_of(name):20} {name[:110]}")
    lines += ["", headline("step under the profiler", ms, "ms")]
    for kind, own_ms in kinds.most_common(4):
        lines.append(headline(f"of it {kind}", 100 * own_ms / ms, "%"))
    lines.append(headline("of it idle", 100 * idle / ms, "%"))
    return lines


def main():
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--shape", choices=SHAPES, default="Qwen2.5-1.5B" if cuda else "small")
    p.add_argument("--pairs", type=int, default=64 if cuda else 4, help="of the step; 64, CPU 4")
    p.add_argument(
        "--scale", type=float, default=1.0 if cuda else 0.25, help="of the lengths; 1, CPU 0.25"
    )
    p.add_argument("--tokens_per_batch", type=int, default=16384 if cuda else 768)
    p.add_argument("--gradient_checkpointing", action="store_true")
    p.add_argument("--compile", action="store_true", help="torch.compile of the layers")
    args = parse(p)
    profiler = Profiler()
    with tempfile.TemporaryDirectory() as name:
        model, pairs = Path(name) / "model", Path(name) / "pairs.jsonl"
        build_model(model, args.shape, torch.bfloat16 if cuda else torch.float32)
        build_pairs(
            pairs,
            draw_lengths(args.pairs, args.scale),
            AutoConfig.from_pretrained(model).vocab_size,
        )
        task = {
            "model": str(model),
            "pairs": str(pairs),
            "count": args.pairs,
            "steps": 2,
            "packing": "prefix",
            "tokens_per_batch": args.tokens_per_batch,
            "ours_args": [],
            "dtype": "bf16" if cuda else "fp32",
            "beta": 0.1,
            "learning_rate": 1e-5,
            "checkpointing": args.gradient_checkpointing,
            "compile": args.compile,
        }
        run_ours(task, Path(name), profiler)
    print(f"{args.shape}, {args.pairs} pairs, torch {torch.__version__}", "compiled" * args.compile)
    print("\n".join(table(profiler.profile.key_averages(), profiler.ms, cuda)))


if __name__ == "__main__":
    main()
