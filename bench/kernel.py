"""linear_logprob against everything else that takes hidden states to log-probs: time, memory and
error in one table.

    # a GPU in bf16, four models' heads; a CPU in fp32, a small one
    python -m bench.kernel
    # T x D x V
    python -m bench.kernel --shapes 2048x256x32000
    # instead: block sizes of the row kernel, rows of a chunk
    python -m bench.kernel --tune

Every sequence of 256 tokens has another upstream gradient, as in DPO; rows that take one gradient
for all say so. Hidden states lean towards their targets (about -0.4 nats per token), as those of a
trained model do. Times are the best of `--repeats` rounds over all rows, so that a busy moment does
not affect one row alone. Memory is the most that was allocated at once during forward and backward,
without the inputs; it includes both gradients. Errors are of the first 256 tokens against fp64: the
largest of a log-prob in nats, and the larger of dH and dW relative by norm. "x GEMMs" compares with
the three matrix products alone, one call each, which no exact method can beat.
"""

import argparse
import importlib.metadata
import math
import platform
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import kernels.logprob as kernel
from bench.headline import headline
from kernels.logprob import linear_logprob

MODELS = {  # D, V
    "Qwen2.5-0.5B": (896, 151936),
    "Qwen2.5-1.5B": (1536, 151936),
    "Qwen2.5-7B": (3584, 151936),
    "Llama-3-8B": (4096, 128256),
}
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GEMMS = "three GEMMs"
COLUMNS = (
    "forward ms",
    "backward ms",
    "both ms",
    "x GEMMs",
    "TFLOP/s of 6TVD",
    "peak MiB",
    "nats off",
    "gradient off",
)


# ---- the rows: (hidden [T, D], weight [V, D], targets [T]) -> log-probs [T], or their sum ------


def plain(hidden, weight, targets):
    logits = (hidden @ weight.T).float()  # [T, V]
    return -F.cross_entropy(logits, targets, reduction="none")


def trl():
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as columns

    return lambda h, w, y: ChunkedLogProbFunction.apply(h, w, None, y, 1.0, columns, None, 1.0, ())[
        0
    ]


def liger(reduction):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

    if not CUDA:
        raise RuntimeError("its kernels need a GPU")
    return lambda h, w, y: -loss(h, w, y, reduction=reduction, accum_dtype=torch.float32)


def cut(impl):
    from cut_cross_entropy import linear_cross_entropy as loss

    if not CUDA:
        raise RuntimeError("its kernels need a GPU")
    return lambda h, w, y: -loss(h, w, y, reduction="none", impl=impl)


def torch_chunked():
    options = torch.nn.LinearCrossEntropyOptions()  # torch 2.13 and later
    return lambda h, w, y: -F.linear_cross_entropy(h, w, y, reduction="none", options=options)


def compiled():
    if not CUDA:
        raise RuntimeError("left out on a CPU: minutes to compile")
    return torch.compile(plain)


def as_called():
    """Exactly as dpo_train.py's Policy calls it, with every default, for a head without bias, scale
    and soft-cap.
    """
    head = {"bias": None, "scale": 1.0, "softcap": None}
    return lambda h, w, y: linear_logprob(h, targets=y, weight=w, **head)


ROWS = {
    "ours, as the trainer calls it": as_called,
    "ours, stash": lambda: partial(linear_logprob, stash_bytes=1 << 50),
    "ours, recompute": lambda: partial(linear_logprob, stash_bytes=0),
    "ours, frozen weight": lambda: lambda h, w, y: linear_logprob(h, w.detach(), y),
    "plain torch": lambda: plain,
    "torch.compile": compiled,
    "torch linear_cross_entropy, chunked": torch_chunked,
    "TRL chunked log-prob": trl,
    "Liger, per token": lambda: liger("none"),
    "Liger, one g for all": lambda: liger("sum"),
    "cut-cross-entropy": lambda: cut("cce"),
    "cut-cross-entropy, exact": lambda: cut("cce_exact"),
}


# ---- measuring ---------------------------------------------------------------------------------


def inputs(T, D, V, dtype):
    """hidden, weight, targets, and g, one number per sequence of 256 tokens."""
    torch.manual_seed(0)
    weight = torch.randn(V, D, device=DEVICE) / math.sqrt(D)  # rows of length 1
    targets = torch.randint(V, (T,), device=DEVICE)
    hidden = 2 * torch.randn(T, D, device=DEVICE)  # logits N(0, 2^2)
    hidden += (math.log(V) + 3) * weight[targets]  # but the target's
    g = torch.randn(-(-T // 256), device=DEVICE).repeat_interleave(256)[:T]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, g


def clock():
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(a, b):
    return 1e3 * (b - a) if not CUDA else (b.synchronize(), a.elapsed_time(b))[1]


def step(f, hidden, weight, targets, g):
    """Forward and backward once -> their milliseconds."""
    hidden.grad = weight.grad = None
    start = clock()
    out = f(hidden, weight, targets)
    middle = clock()
    out.backward(g if out.ndim else torch.ones_like(out))
    end = clock()
    return milliseconds(start, middle), milliseconds(middle, end)


def gemms(hidden, weight, q):
    """The three products of forward and backward, and nothing else."""
    with torch.no_grad():
        start = clock()
        torch.mm(hidden, weight.T, out=q)
        middle = clock()
        q @ weight, q.T @ hidden
        end = clock()
    return milliseconds(start, middle), milliseconds(middle, end)


def peak_bytes(run):
    """The most that `run` had allocated at any moment."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    live = peak = 0
    for (
        event
    ) in profile.profiler.kineto_results.events():  # every allocation (+) and release (-), in order
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def errors(f, hidden, weight, targets, g):
    """Largest error of a log-prob in nats, larger relative error of the two gradients, over the
    first 256 tokens.
    """
    leaves = [hidden[:256].detach().requires_grad_(), weight.detach().requires_grad_()]
    out = f(*leaves, targets[:256])
    if not out.ndim:
        return None, None
    got = torch.autograd.grad(out, leaves, g[:256], allow_unused=True)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = (wide[0] @ wide[1].T).log_softmax(-1).gather(1, targets[:256, None])[:, 0]
    expected = torch.autograd.grad(exact, wide, g[:256].double())
    relative = [
        ((a - b).norm() / b.norm()).item()
        for a, b in zip(got, expected, strict=True)
        if a is not None
    ]
    return (out - exact).abs().max().item(), max(relative)


def row_kernel_alone(hidden, weight, targets):
    """Milliseconds for all T rows, and GB/s of reading the logits and writing Q."""
    rows = kernel.rows_triton if CUDA else kernel.rows_torch
    C, V = min(len(hidden), kernel.CHUNK[DEVICE]), len(weight)
    x, q = kernel.matrix(C, V, hidden, torch.float32), kernel.matrix(C, V, hidden, hidden.dtype)
    with torch.no_grad():
        best = math.inf
        for _ in range(5):
            kernel.logits_(hidden[:C], weight, out=x)
            start = clock()
            rows(x, None, targets[:C], q, 1.0, None)
            best = min(best, milliseconds(start, clock()))
    return best * len(hidden) / C, C * V * (4 + q.element_size()) / best / 1e6


def table(T, D, V, dtype, repeats, wanted):
    case = hidden, weight, targets, g = inputs(T, D, V, dtype)
    functions, times, lines = {}, {}, []
    for name, make in ROWS.items():
        try:
            if wanted in name:
                functions[name] = make()
                step(functions[name], *case)  # warm up, compile
        # a peer that is not installed, does not run here or runs out of memory: its row says so
        except Exception as e:
            functions.pop(name, None)
            lines.append(
                f"| {name} | {type(e).__name__}: {' '.join(str(e).split())[:90]} |" + " |" * 7
            )
            hidden.grad = weight.grad = None
    q = torch.empty(T, V, dtype=dtype, device=DEVICE)
    gemms(hidden, weight, q)
    for _ in range(repeats):
        for name, f in functions.items():
            times.setdefault(name, []).append(step(f, *case))
        times.setdefault(GEMMS, []).append(gemms(hidden, weight, q))
    del q
    hidden.grad = weight.grad = None
    best = {name: min(runs, key=sum) for name, runs in times.items()}
    flops = 6 * T * V * D
    found = [f"{times_of(GEMMS, best, flops)} | | |"]
    for name, f in functions.items():
        memory = peak_bytes(lambda f=f: step(f, *case)) / 2**20
        hidden.grad = weight.grad = None
        nats, relative = errors(f, *case)
        tail = "one g for all | " if nats is None else f"{nats:.1e} | {relative:.1e} "
        found.append(f"{times_of(name, best, flops)} {memory:.0f} | {tail}|")
    ms, bandwidth = row_kernel_alone(hidden, weight, targets)
    found.append(f"| our row kernel alone | {ms:.1f} | | | | {bandwidth:.3g} GB/s | | | |")
    head = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    return "\n".join(head + found + lines + ["", *headlines(f"{T}x{D}x{V}", best, bandwidth)])


def times_of(name: str, best: dict, flops: int) -> str:
    """The first cells of a row: its times, beside the GEMMs' and as a speed."""
    forward_ms, backward_ms = best[name]
    both = forward_ms + backward_ms
    times = f"{forward_ms:.1f} | {backward_ms:.1f} | {both:.1f}"
    return f"| {name} | {times} | {both / sum(best[GEMMS]):.2f} | {flops / both / 1e9:.3g} |"


def headlines(shape: str, best: dict, bandwidth: float) -> list[str]:
    """The GEMMs, our rows and the row kernel: what bench/gpu.sh shows of this table."""
    lines = []
    for name, (forward_ms, backward_ms) in best.items():
        if name == GEMMS or name.startswith("ours"):
            lines.append(headline(f"{name}, {shape}", forward_ms + backward_ms, "ms"))
    return [*lines, headline(f"row kernel, {shape}", bandwidth, "GB/s")]


def tune(T, D, V, dtype, repeats):
    """The constants of kernels/logprob.py, measured: lines to choose from."""
    hidden, weight, targets, g = inputs(T, D, V, dtype)
    lines, defaults = [], (kernel.BLOCK, kernel.WARPS)
    speeds, times = {}, {}  # what was tried -> GB/s, milliseconds
    if CUDA:
        for block in (1024, 2048, 4096, 8192):
            for warps in (4, 8, 16):
                kernel.BLOCK, kernel.WARPS = block, warps
                bandwidth = row_kernel_alone(hidden, weight, targets)[1]
                lines.append(f"| BLOCK {block}, WARPS {warps} | {bandwidth:.0f} GB/s |")
                speeds[f"BLOCK {block}, WARPS {warps}"] = bandwidth
        kernel.BLOCK, kernel.WARPS = defaults
    for chunk in (512, 1024, 2048, 4096, 8192) if CUDA else (32, 64, 128, 256, 512, 1024):
        kernel.CHUNK[DEVICE] = chunk
        f = partial(linear_logprob, stash_bytes=1 << 50)
        best = min(sum(step(f, hidden, weight, targets, g)) for _ in range(repeats + 1))
        lines.append(f"| CHUNK {chunk} | {best:.1f} ms |")
        times[f"CHUNK {chunk}"] = best
    lines.append("")
    if speeds:
        fastest = max(speeds, key=speeds.get)
        lines.append(
            headline(f"fastest row kernel, {T}x{D}x{V}, {fastest}", speeds[fastest], "GB/s")
        )
    fastest = min(times, key=times.get)
    lines.append(headline(f"fastest, {T}x{D}x{V}, {fastest}", times[fastest], "ms"))
    return "\n".join(["| | |", "|---|---|", *lines])


def versions():
    names = ["torch", "triton", "trl", "liger-kernel", "cut-cross-entropy"]
    found = [f"python {platform.python_version()}"]
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    if CUDA:
        return ", ".join(found) + f", on {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    processor = next(
        (x.split(":")[1].strip() for x in info.splitlines() if "model name" in x),
        platform.machine(),
    )
    return ", ".join(found) + f", on {processor}, threads used: {torch.get_num_threads()}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", help="TxDxV; default: four models, three T; on a CPU 2048x256x32000"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16" if CUDA else "fp32", help="of hidden and weight"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=10 if CUDA else 3,
        help="rounds over all rows; the best counts",
    )
    parser.add_argument(
        "--rows", default="", help="only rows whose name contains this, beside the GEMMs"
    )
    parser.add_argument(
        "--tune", action="store_true", help="measure block and chunk sizes instead of the table"
    )
    parser.add_argument(
        "--save", help="also write it to this file, such as bench/results/kernel-cpu.md"
    )
    args = parser.parse_args()
    if args.tune and args.rows:
        parser.error("--rows has no effect on --tune")

    named = {f"{m}, T={T}": (T, *MODELS[m]) for m in MODELS for T in (4096, 16384, 32768)}
    shapes = {
        s: tuple(map(int, s.split("x")))
        for s in args.shapes or ([] if CUDA else ["2048x256x32000"])
    } or named
    printed = [versions()]
    print(printed[0], flush=True)
    for name, shape in shapes.items():
        title = f"\n### {name} ({args.dtype}: T, D, V = {', '.join(map(str, shape))})\n"
        if args.tune:
            text = tune(*shape, DTYPES[args.dtype], args.repeats)
        else:
            text = table(*shape, DTYPES[args.dtype], args.repeats, args.rows)
        printed.append(f"{title}\n{text}")
        print(printed[-1], flush=True)
    if args.save:
        Path(args.save).parent.mkdir(parents=True, exist_ok=True)
        Path(args.save).write_text("\n".join(printed) + "\n")


if __name__ == "__main__":
    main()
