"""The Triton row kernel on a machine without a GPU: run by Triton's interpreter against fp64, and
compiled for GPUs.

The interpreter has to be asked for before triton is imported, so the cases run once, in a process
of their own: this file as a script. Its casts to bf16 truncate where a GPU rounds: for a bf16 Q the
bounds are twice test_logprob.py's.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels.logprob as kernel
from kernels.logprob import linear_logprob

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(kernel.triton is None, reason="triton is not installed")

# name: T, D, V, dtype, options, largest relative error of log-probs and of gradients
CASES = {
    "fp32": (19, 16, 5003, "float32", {}, 1e-5, 1e-5),
    "fp32, recomputed": (19, 16, 5003, "float32", {"stash_bytes": 0}, 1e-5, 1e-5),
    "bf16": (19, 16, 5003, "bfloat16", {}, 1e-5, 8e-3),
    "bf16, recomputed": (19, 16, 5003, "bfloat16", {"stash_bytes": 0}, 1e-5, 8e-3),
    "bias": (9, 16, 5003, "float32", {"bias": True}, 1e-5, 1e-5),
    "bias in bf16": (9, 16, 5003, "bfloat16", {"bias": True}, 1e-5, 8e-3),
    "soft-cap": (9, 16, 5003, "float32", {"softcap": 5.0}, 1e-5, 1e-5),
    "scale, soft-cap and bias": (
        9,
        16,
        5003,
        "float32",
        {"softcap": 3.0, "scale": 0.4, "bias": True},
        1e-5,
        1e-5,
    ),
    "one token, Qwen's vocabulary": (1, 64, 151936, "float32", {}, 1e-5, 1e-5),
    "no tokens": (0, 16, 101, "float32", {}, 0, 0),
    "one word": (3, 4, 1, "float32", {}, 0, 0),
    "logits of +-1e4": (10, 2, 101, "float32", {"spread": 4e3}, 1e-5, 1e-5),
    "logits of +-1e4, recomputed, bf16": (
        10,
        2,
        101,
        "bfloat16",
        {"spread": 4e3, "stash_bytes": 0},
        1e-5,
        8e-3,
    ),
    "a frozen weight": (9, 16, 5003, "float32", {"frozen": True}, 1e-5, 1e-5),
}


def run(T, D, V, dtype, options, device="cpu"):
    """Relative errors of log-probs and gradients against fp64."""
    options, dtype = dict(options), getattr(torch, dtype)
    torch.manual_seed(0)
    spread, frozen = options.pop("spread", 1.0), options.pop("frozen", False)
    leaves = [torch.randn(T, D), torch.randn(V, D) * spread] + [torch.randn(V)] * options.pop(
        "bias", False
    )
    leaves = [t.to(device, dtype).requires_grad_() for t in leaves]
    if frozen:
        leaves[1].requires_grad_(False)
    wanted = [t for t in leaves if t.requires_grad]
    targets, g = torch.randint(V, (T,)).to(device), torch.randn(T).to(device)
    targets[:1], targets[1:2] = V - 1, 0

    logprobs = linear_logprob(
        *leaves[:2], targets, bias=leaves[2] if len(leaves) > 2 else None, **options
    )
    gradients = torch.autograd.grad(logprobs, wanted, g)
    with torch.no_grad():
        assert torch.equal(
            linear_logprob(*leaves[:2], targets, bias=(leaves + [None])[2], **options), logprobs
        )

    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    z = (wide[0] @ wide[1].T + (wide[2] if len(wide) > 2 else 0)) * options.get("scale", 1.0)
    if cap := options.get("softcap"):
        z = cap * torch.tanh(z / cap)
    logprobs64 = z.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    gradients64 = torch.autograd.grad(logprobs64, [t for t in wide if t.requires_grad], g.double())
    pairs = [(logprobs, logprobs64), *zip(gradients, gradients64, strict=True)]
    return [
        ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() if a.numel() else 0.0
        for a, b in pairs
    ]


def rows_of(x, targets, q):
    """S, d and Q of the kernel alone, for logits x [C, V] in a buffer whose padding is poison."""
    wide = kernel.matrix(*x.shape, x, x.dtype)
    wide.as_strided((len(x), wide.stride(0)), wide.stride()).fill_(float("nan"))
    wide.copy_(x)
    return kernel.rows_triton(wide, None, targets, q, 1.0, None)


def interpreted() -> dict:
    """Everything the tests below look at, from inside the interpreter."""
    found = {name: run(*case[:5]) for name, case in CASES.items()}

    torch.manual_seed(0)
    x, targets = torch.randn(4, 77) * 3, torch.tensor([0, 76, 5, 5])
    x[2, 5] += 100.0  # sure of it
    x[3, 5] -= 300.0  # hopeless: two passes more
    q, q_torch = (kernel.matrix(4, 77, x, torch.float32) for _ in range(2))
    s, d = rows_of(x, targets, q)
    s_torch, d_torch = kernel.rows_torch(x.clone(), None, targets, q_torch, 1.0, None)
    found["rows"] = [
        (a - b).abs().div(b.abs() + 1e-30).max().item() for a, b in ((s, s_torch), (q, q_torch))
    ]
    found["rows"] += [
        (d - d_torch).abs().max().item(),
        q.sum(1).abs().max().item() / q.abs().max().item(),
    ]
    x[1, 3] = float("nan")
    found["nan"] = rows_of(x, targets, None)[0].isnan().tolist()

    # Rows 2^30 elements apart: int32 offsets would wrap at the third. Memory never touched costs
    # nothing.
    size = (
        2 << 30
    ) + kernel.BLOCK  # the kernel takes all up to the next row for padding, one block at most
    far, q = (
        torch.empty(size, dtype=t).as_strided((3, 77), (1 << 30, 1))
        for t in (torch.float32, torch.bfloat16)
    )
    near = torch.randn(3, 77)
    far.copy_(near)
    s, _ = kernel.rows_triton(far, None, targets[:3], q, 1.0, None)
    found["int64"] = (
        (s.log1p() + near.log_softmax(-1).gather(1, targets[:3, None])[:, 0]).abs().max().item()
    )
    return found


@pytest.fixture(scope="module")
def results():
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, __file__]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_fp64(results, name):
    """Law 6, through linear_logprob with nothing but the rows exchanged, forward and backward."""
    *_, value, gradient = CASES[name]
    errors = results[name]
    assert errors[0] <= value and max(errors[1:]) <= gradient, errors


def test_rows_equal_the_torch_rows(results):
    """The specification and the kernel, S, Q and d; likely, sure and hopeless targets; and Q sums
    to zero in each row. The padding after an odd vocabulary always held NaN (PITFALLS 33).
    """
    s, q, d, balance = results["rows"]
    assert s < 1e-5 and q < 1e-4 and d < 1e-4 and balance < 1e-5


def test_nan_stays_in_its_row(results):
    assert results["nan"] == [False, True, False, False]


def test_row_offsets_are_64_bit(results):
    assert results["int64"] < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name):
    """Law 6 where it is used: the compiled kernel, and cuBLAS with fp32 results on padded rows."""
    *case, value, gradient = CASES[name]
    errors = run(*case, device="cuda")
    assert errors[0] <= value and max(errors[1:]) <= min(gradient, 4e-3), errors


# ---- compiled ahead of time --------------------------------------------------------------------

# 64 registers still fill half a multiprocessor with threads; shared memory is what a reduction over
# warps needs.
VARIANTS = {
    "plain": (False, False, True),
    "bias, soft-cap": (True, True, True),
    "no gradient": (False, False, False),
}


def compile_for(capability: int, variant: str) -> dict:
    """Compile row_kernel as rows_triton launches it (at an odd V) and read the binary's own
    resource figures.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    bias, cap, grad = VARIANTS[variant]
    types = dict.fromkeys(("x", "s_out", "d_out"), "*fp32")
    types |= dict.fromkeys(("bias", "q"), "*bf16")
    types |= dict.fromkeys(("V", "stride"), "i32")
    types |= dict.fromkeys(("scale", "cap", "far"), "fp32")
    types |= {"target": "*i64"}
    constants = dict(BIAS=bias, CAP=cap, GRAD=grad, BLOCK=kernel.BLOCK)
    constants |= ({} if bias else {"bias": None}) | ({} if grad else {"q": None})
    names = kernel.row_kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n == "stride"]
    source = ASTSource(
        fn=kernel.row_kernel,
        signature=signature,
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": kernel.WARPS, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    binary = Path(os.environ.get("TMPDIR", "/tmp")) / f"row_kernel_{os.getpid()}.cubin"
    try:
        binary.write_bytes(built.asm["cubin"])
        usage, code = (
            subprocess.run(
                [tools / "cuobjdump", flag, binary], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    finally:
        binary.unlink(missing_ok=True)
    figures = {
        name.lower(): int(n) for name, n in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)
    }
    figures["shared"] = max(figures["shared"], built.metadata.shared)
    return figures | {"code": code}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_spills(capability, variant):
    """For A100, H100/H200 and B200: no spill, little shared memory, whole blocks of a row at 16
    bytes per access.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("under the interpreter nothing compiles")
    figures = compile_for(capability, variant)
    code = figures.pop("code")
    print(f"sm_{capability} {variant}: {figures}")
    assert figures["stack"] == figures["local"] == 0 and not re.search(r"\b(LDL|STL)\b", code), (
        "register spills"
    )
    assert figures["reg"] <= 64 and figures["shared"] <= 2048
    assert "LDG.E.128" in code and ("STG.E.128" in code) == VARIANTS[variant][2]


if __name__ == "__main__":
    print(json.dumps(interpreted()))
