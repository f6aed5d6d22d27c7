"""Packed, prefix-shared attention: is it exact on this device, and what does it save?

    python -m bench.attention        # a GPU in bf16 (varlen_attn), else this CPU in fp32 (SDPA)
    python -m bench.attention --device cuda --dtype fp32   # the fallback of fp32 on a GPU (SDPA)

First it prints the error of output and gradients against plain softmax(Q K^T) V in fp64 with the
dense mask, on the same rounded numbers: a causal mask aligned to the wrong corner or a wrong group
of heads would show here. Then it prints milliseconds of forward + backward of one layer's attention
for the same pairs, three ways: [P|C] and [P|R] padded to the longest (right padding needs no mask
under causality: this favours padding), packed without sharing, and packed with the prompt shared.
"""

import argparse
import time
from functools import partial

import torch
import torch.nn.functional as F

from bench.headline import headline
from kernels.attention import packed_attention, packed_layout, prefix_layout

SHAPES = {
    "Qwen2.5-0.5B": (14, 2, 64),
    "Qwen2.5-1.5B": (12, 2, 128),
    "Qwen2.5-7B": (28, 4, 128),
}  # H, Hkv, D
LAYER = (
    torch.nn.Identity()
)  # stands for the layer that calls: the attention function reads only its name


def random_qkv(shape, tokens, device, dtype, batch=1):
    heads, kv_heads, dim = shape
    q, k, v = (
        torch.randn(batch, h, tokens, dim, device=device, dtype=dtype)
        for h in (heads, kv_heads, kv_heads)
    )
    return [x.requires_grad_() for x in (q, k, v)]  # [B, H, T, D], [B, Hkv, T, D]


def compare(lengths, shape, device, dtype) -> dict[str, float]:
    """Largest error of output and gradients, each as a fraction of the largest entry."""
    torch.manual_seed(0)
    _, layout = prefix_layout(lengths, device)
    scale = shape[-1] ** -0.5
    q, k, v = random_qkv(shape, layout.tokens, device, dtype)
    out = packed_attention(LAYER, q, k, v, None, scale, layout=layout)[0]  # [1, T, H, D]
    upstream = torch.randn_like(out)
    got = [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)]

    # Token i may look at token j if both are of one pair, j is not after i, and not (i in R and j
    # in C).
    part = torch.cat([torch.tensor([0] * p + [1] * c + [2] * r) for p, c, r in lengths])  # [T]
    pair = torch.repeat_interleave(
        torch.arange(len(lengths)), torch.tensor([sum(x) for x in lengths])
    )
    i, j = torch.meshgrid(torch.arange(layout.tokens), torch.arange(layout.tokens), indexing="ij")
    may = (pair[i] == pair[j]) & (j <= i) & ~((part[i] == 2) & (part[j] == 1))  # [T, T]
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    group = shape[0] // shape[1]
    scores = scale * q64 @ k64.repeat_interleave(group, 1).mT  # [1, H, T, T]
    weights = scores.masked_fill(~may.to(device), -torch.inf).softmax(-1)
    true = (weights @ v64.repeat_interleave(group, 1)).transpose(1, 2)
    expected = [true.detach(), *torch.autograd.grad(true, (q64, k64, v64), upstream.double())]
    errors = [
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True)
    ]
    return dict(zip(("out", "dq", "dk", "dv"), errors, strict=True))


def step(forward, inputs, upstream):
    torch.autograd.grad(forward(*inputs), inputs, upstream)


def run_packed(layout, q, k, v):
    return packed_attention(LAYER, q, k, v, None, layout=layout)[0]


def milliseconds(run, device, repeats=3) -> float:
    """The fastest of a few: on a machine with other work, the mean would measure that work."""
    best = float("inf")
    for _ in range(repeats + 1):  # the first is the warm-up and never the fastest
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp32"], help="default: bf16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument(
        "--pairs",
        type=int,
        help="in the timed row; default on a GPU 18, dpo_train.py's 16k tokens; 4 on a CPU",
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[
        args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    ]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {name}, {dtype}")

    # UltraFeedback-like: prompts of about 200 tokens, answers of about 350, both with heavy tails.
    torch.manual_seed(0)
    count = args.pairs or (18 if device.type == "cuda" else 4)
    lengths = (
        (torch.randn(count, 3).mul(0.7).exp() * torch.tensor([155.0, 275, 275]))
        .long()
        .clamp(8, 1500)
        .tolist()
    )
    answers = [p + a for p, c, r in lengths for a in (c, r)]
    (_, packed), (_, shared) = packed_layout(answers, device), prefix_layout(lengths, device)
    for name, shape in SHAPES.items():
        errors = compare([(30, 20, 10), (1, 1, 1), (200, 150, 120)], shape, device, dtype)
        print(
            f"\n{name}: H, Hkv, D = {shape}; error",
            ", ".join(f"{what} {e:.1e}" for what, e in errors.items()),
        )
        causal = dict(is_causal=True, enable_gqa=True)
        ways = {
            "padded": (
                len(answers),
                max(answers),
                partial(F.scaled_dot_product_attention, **causal),
            ),
            "packed": (1, packed.tokens, partial(run_packed, packed)),
            "prefix-shared": (1, shared.tokens, partial(run_packed, shared)),
        }
        baseline = None
        for label, (batch, tokens, forward) in ways.items():
            inputs = random_qkv(shape, tokens, device, dtype, batch)
            upstream = torch.randn_like(forward(*inputs))
            ms = milliseconds(partial(step, forward, inputs, upstream), device)
            baseline = baseline or ms
            print(f"  {label:14} {batch * tokens:7} tokens {ms:9.2f} ms  {baseline / ms:5.2f}x")
        print(
            headline(
                f"attention, {name}, prefix-shared against padded", baseline / ms, "times the speed"
            )
        )
        print(
            headline(
                f"attention, {name}, largest error", max(errors.values()), "of the largest entry"
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
