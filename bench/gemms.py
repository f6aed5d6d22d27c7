"""The machine's peak rates, and the log-prob kernel's three matrix products, each by itself.

    python -m bench.gemms               a GPU in bf16, four models' heads
    python -m bench.gemms --shapes 256x64x1009 --square 256 --copy_gib 0.01            a CPU

The peaks: a square product of random numbers (zeros run faster), and a copy that reads and writes
each byte once. The products are called as kernels/logprob.py calls them: logits one chunk at a time
with an fp32 result, dH and dW over all rows. Beside each is the name of the kernel that took most
of its time. Times are medians.
"""

import argparse
import statistics

import torch
from torch.profiler import ProfilerActivity, profile

import kernels.logprob as kernel
from bench.headline import HEADS, headline
from bench.kernel import CUDA, DEVICE, DTYPES, clock, milliseconds, versions


def median_ms(run, repeats: int) -> float:
    """Median milliseconds of run(), after two that are not timed."""
    times = []
    for _ in range(repeats + 2):
        start = clock()
        run()
        times.append(milliseconds(start, clock()))
    return statistics.median(times[2:])


def slowest_kernel(run) -> str:
    """The name of the GPU kernel, or on a CPU of torch's operation, that takes most of the time of
    run().
    """
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if CUDA else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        run()
        if CUDA:
            torch.cuda.synchronize()
    field = "self_device_time_total" if CUDA else "self_cpu_time_total"
    slowest = max(recorded.key_averages(), key=lambda event: getattr(event, field))
    return slowest.key


def ceilings(square: int, copy_gib: float, dtype, repeats: int) -> list[str]:
    a = torch.randn(square, square, device=DEVICE).to(dtype)
    b = torch.randn(square, square, device=DEVICE).to(dtype)
    product_ms = median_ms(lambda: a @ b, repeats)
    source = torch.empty(int(copy_gib * 2**30), dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), repeats)
    return [
        headline("peak GEMM", 2 * square**3 / product_ms / 1e9, "TFLOP/s"),
        headline("memory bandwidth", 2 * source.nbytes / copy_ms / 1e6, "GB/s"),
    ]


def three_products(T: int, D: int, V: int, dtype, repeats: int) -> list[str]:
    """Lines of one shape: milliseconds, TFLOP/s and kernel of logits, dH and dW."""
    torch.manual_seed(0)
    hidden = torch.randn(T, D, device=DEVICE).to(dtype)  # [T, D]
    weight = (torch.randn(V, D, device=DEVICE) / D**0.5).to(dtype)  # [V, D]
    chunk = min(T, kernel.CHUNK[DEVICE])
    logits = kernel.matrix(chunk, V, hidden, torch.float32)  # [C, V]
    q = kernel.matrix(T, V, hidden, dtype)  # [T, V]
    q.normal_()

    def forward():
        for lo in range(0, T, chunk):
            rows = hidden[lo : lo + chunk]
            kernel.logits_(rows, weight, out=logits[: len(rows)])

    def hidden_gradient():
        return kernel.product(q, weight)  # [T, V] @ [V, D] -> [T, D]

    def weight_gradient():
        return q.T @ hidden  # [V, T] @ [T, D] -> [V, D]

    lines = []
    total = 0.0
    for name, run in (("logits", forward), ("dH", hidden_gradient), ("dW", weight_gradient)):
        ms = median_ms(run, repeats)
        total += ms
        speed = 2 * T * D * V / ms / 1e9
        lines.append(f"  {name:6} {ms:9.2f} ms {speed:7.1f} TFLOP/s  {slowest_kernel(run)[:150]}")
    lines.append(f"  all    {total:9.2f} ms {6 * T * D * V / total / 1e9:7.1f} TFLOP/s")
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=HEADS,
        help="TxDxV; default: four models' heads, 16384 tokens",
    )
    parser.add_argument(
        "--square", type=int, default=8192, help="side of the matrices of the ceiling; default 8192"
    )
    parser.add_argument(
        "--copy_gib",
        type=float,
        default=4.0,
        help="GiB that are copied; default 4, beyond any cache",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if CUDA else "fp32")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of each; default 10")
    args = parser.parse_args()
    dtype = DTYPES[args.dtype]
    print(f"{versions()}, {args.dtype}")
    print("\n".join(ceilings(args.square, args.copy_gib, dtype, args.repeats)), flush=True)
    for shape in args.shapes:
        sizes = map(int, shape.split("x"))
        print(f"\nT x D x V = {shape}")
        print("\n".join(three_products(*sizes, dtype, args.repeats)), flush=True)


if __name__ == "__main__":
    main()
