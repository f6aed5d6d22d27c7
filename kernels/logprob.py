"""linear_logprob: log-probs of the tokens that were written, straight from hidden states, never
holding the logits of more than one chunk of rows.

    x = h W^T + b                        [T, V] logits as the head gives them
    z = softcap(scale x)                 softcap(u) = cap tanh(u / cap); most models have neither
    l = z_y - log sum_v exp(z_v)         [T] fp32, y the target

At T = 16384 and V = 151936 the logits are 10 GB in fp32, and autograd would hold them three times.
docs/kernel.md derives what is done instead; the code uses its letters:

    g    [T]       dLoss/dl, which is known in backward only
    J    [T, V]    dl/dx, known in forward already:  dH = g . (J W),  dW = J^T (g . H),  db = J^T g
    c    per row   what logits are measured from: z_y, or the row's maximum if y is hopeless
    S, d [T]       S = sum_{v != y} exp(z_v - c),  d = z_y - c;  l = d - log(exp(d) + S)
    Q    [T, V]    slope_v exp(z_v - c), and -slope_y S in the target's column, where
                   slope = 1, or with a soft-cap 1 - tanh(u / cap)^2
    r    [T]       scale / (exp(d) + S);  then J = -r . Q

"." scales rows. So forward makes Q, S and d in one pass over the logits, and backward is two matrix
products. Q is kept ("the stash") for as many rows as `stash_bytes` holds; for the others backward
makes it again. A frozen weight needs no stash: Q W [T, D] is formed in forward.

The file in order: Q, S and d of some rows of logits, once in Triton and once in torch; the three
matrix products; the autograd function; and linear_logprob, which checks what it is given.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.device import counting, device_kind

# Callers take these two from here as well.
from kernels.heads import backbone as backbone
from kernels.heads import lm_head as lm_head

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU needs none: rows_torch below is the same in torch
    triton = None

# C, the rows of logits at a time. GPU: 2048 x 151936 in fp32 is 1.2 GB. Each chunk reads W once,
# which is C flops per byte: far above the 200 or so below which memory would be the limit. CPU:
# where its GEMMs reach full speed.
CHUNK = {"cuda": 2048, "cpu": 256}
# Bytes of Q that are kept; rows beyond cost 4/3 the work. GPU: 16k tokens of Qwen's 151936 words in
# bf16 are 4.6 GiB, a sixth of what autograd would hold. CPU: other programs need its memory, and
# its batches are small.
STASH_BYTES = {"cuda": 8 << 30, "cpu": 4 << 30}
# 8 elements per thread: 32 registers on Hopper, so that a multiprocessor is full of threads with
# loads in flight, and no spills.
BLOCK, WARPS = 2048, 8
# An S beyond this is measured from the row's maximum instead. It leaves bf16 and fp32 (maximum
# 2^128) room to sum products in.
FAR = 2.0**60


# ---- rows in Triton: logits in; Q, S and d out -------------------------------------------------

if triton:

    @triton.jit
    def load_z(x, bias, v, V, stride, scale, cap, BIAS: tl.constexpr, CAP: tl.constexpr):
        """z and slope = dz/dx / scale in the columns v, a scalar or [BLOCK]; z is -inf from V on.

        x: the row, of V columns and padding up to `stride`.
        """
        # Masked by the stride and not by V: then whatever V is, a load is 16 bytes wide.
        z = tl.load(x + v, mask=v < stride, other=0.0)
        if BIAS:
            z += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)
        z *= scale
        slope = 1.0
        if CAP:
            # tanh(u) = 2 sigmoid(2 u) - 1, and its slope 1 - tanh(u)^2
            sigmoid = 1 / (1 + tl.exp(-2 * z / cap))
            z = cap * (2 * sigmoid - 1)
            slope = 4 * sigmoid * (1 - sigmoid)
        z = tl.where(v < V, z, -float("inf"))
        return z, slope

    @triton.jit
    def maximum(
        x, bias, V, stride, scale, cap, BIAS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr
    ):
        """The largest z of the row."""
        top = tl.full([BLOCK], -float("inf"), tl.float32)  # [BLOCK], one for each lane
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)  # [BLOCK]
            z, _ = load_z(x, bias, v, V, stride, scale, cap, BIAS, CAP)
            top = tl.maximum(top, z)
        return tl.max(top, axis=0)  # [BLOCK] -> scalar

    @triton.jit
    def one_pass(
        x,
        bias,
        q,
        y,
        c,
        V,
        stride,
        scale,
        cap,
        BIAS: tl.constexpr,
        CAP: tl.constexpr,
        GRAD: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """S of the row, measured from c. With GRAD its Q goes to q, but 0 to column y."""
        # a sum for each lane: within the loop no thread waits for another
        total = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)  # [BLOCK]
            z, slope = load_z(x, bias, v, V, stride, scale, cap, BIAS, CAP)
            e = tl.where(v == y, 0.0, tl.exp(z - c))  # [BLOCK]; 0 from V on
            total += e
            if GRAD:
                tl.store(q + v, (e * slope).to(q.dtype.element_ty), mask=v < stride)
        return tl.sum(total, axis=0)  # [BLOCK] -> scalar

    @triton.jit
    def row_kernel(
        x,  # [C, V] fp32: logits
        bias,  # [V], or None
        target,  # [C]
        q,  # [C, V] in the dtype of the inputs, Q goes here; or None
        s_out,  # [C] fp32
        d_out,  # [C] fp32
        V,
        stride,  # from one row of x, and of q, to the next: V and padding
        scale,
        cap,
        far,
        BIAS: tl.constexpr,
        CAP: tl.constexpr,
        GRAD: tl.constexpr,  # whether Q is wanted
        BLOCK: tl.constexpr,
    ):
        """One program per row: it reads 4 V bytes and writes 2 V of Q in bf16 if GRAD."""
        # where the row starts, in int64: 16384 rows of 151936 are past int32
        row = tl.program_id(0).to(tl.int64)
        x += row * stride
        if GRAD:
            q += row * stride

        # the target, in int32: no vocabulary is past that, and every column is compared with it
        y = tl.load(target + row).to(tl.int32)
        z_y, slope_y = load_z(x, bias, y, V, stride, scale, cap, BIAS, CAP)

        # one pass, measured from the target
        c = z_y
        S = one_pass(x, bias, q, y, c, V, stride, scale, cap, BIAS, CAP, GRAD, BLOCK)

        # a hopeless target: two passes more. Not "S >= far": NaN must come here, and stay NaN
        if not (S < far):
            c = maximum(x, bias, V, stride, scale, cap, BIAS, CAP, BLOCK)
            S = one_pass(x, bias, q, y, c, V, stride, scale, cap, BIAS, CAP, GRAD, BLOCK)

        # the target's own column
        if GRAD:
            tl.debug_barrier()  # the thread that wrote 0 there may be another one
            q_y = (-S * slope_y).to(q.dtype.element_ty)
            tl.store(q + y, q_y)

        tl.store(s_out + row, S)
        tl.store(d_out + row, z_y - c)


def rows_triton(x, bias, target, q, scale, cap):
    """As rows_torch, but x stays as it is. x and q are two matrices, both made by matrix()."""
    C, V = x.shape
    S, d = x.new_empty(2, C).unbind()  # [C], [C]
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be x's
        row_kernel[(C,)](
            x,
            bias,
            target,
            q,
            S,
            d,
            V,
            x.stride(0),
            scale,
            cap or 1.0,
            FAR,
            BIAS=bias is not None,
            CAP=cap is not None,
            GRAD=q is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return S, d


def rows_allocated(x, bias, target, q, scale, cap):
    """What rows_triton allocates and nothing else: for tensors without content, see device.py."""
    S, d = x.new_empty(2, len(x)).unbind()  # [C], [C]
    return S, d


# ---- rows in torch, the specification ----------------------------------------------------------


def rows_torch(x, bias, target, q, scale, cap):
    """Logits x [C, V], bias [V] or None, target [C] -> S [C], d [C]. x is overwritten.

    Q is written to q [C, V], which may be x itself, and is None where no Q is wanted.
    """
    C = len(x)
    S, d = x.new_empty(2, C).unbind()  # [C], [C]
    # 16 rows stay in a CPU's cache from one line to the next
    few = 16 if device_kind(x) == "cpu" else C
    for lo in range(0, C, few):
        rows = slice(lo, lo + few)
        z = x[rows]  # [16, V], a view: from here on everything happens in place
        y = target[rows, None]  # [16, 1]

        # from x to z
        if bias is not None:
            z += bias
        if scale != 1:
            z *= scale
        if cap is not None:
            z.div_(cap).tanh_()
            slope = 1 - z * z  # [16, V]
            z *= cap

        # c: the maximum is cheap here, and tells a hopeless target before S is known
        z_y = z.gather(1, y)  # [16, 1]
        top = z.amax(1, keepdim=True)  # [16, 1]
        c = torch.where(top - z_y < math.log(FAR), z_y, top)  # [16, 1]

        # S and d
        e = z.sub_(c).exp_().scatter_(1, y, 0.0)  # [16, V], 0 in the target's column
        total = e.sum(1, keepdim=True)  # [16, 1]
        S[rows] = total[:, 0]
        d[rows] = (z_y - c)[:, 0]

        # Q, which so far is 0 in the target's column
        if q is None:
            continue
        e.scatter_(1, y, -total)
        if cap is not None:
            e *= slope
        if q is not x:
            q[rows] = e
    return S, d


# ---- three matrix products, results in fp32 from bf16 ------------------------------------------


def matrix(rows: int, V: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised [rows, V] on the device of `like`.

    Each row starts at a multiple of 64 elements, so that GEMMs and the row kernel run at full speed
    for any V.
    """
    padded = (V + 63) // 64 * 64
    wide = torch.empty(rows, padded, dtype=dtype, device=like.device)
    if device_kind(like) == "cpu":
        # oneDNN's bf16 products (AMX) read past V, times zero: what lies there must not be NaN
        wide[:, V:] = 0
    return wide[:, :V]


def logits_(h: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out [C, V] = h [C, D] @ weight [V, D]^T, in fp32: in bf16 a log-prob is off by 0.01 nats."""
    if out.dtype == h.dtype:
        torch.mm(h, weight.T, out=out)
    elif device_kind(h) == "cuda":
        torch.mm(h, weight.T, out_dtype=out.dtype, out=out)
    else:  # no such GEMM on a CPU
        torch.mm(h.to(out.dtype), weight.T.to(out.dtype), out=out)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, on a GPU in fp32: a factor per row follows, so this saves one rounding."""
    if device_kind(a) == "cuda" and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def add_product_(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """acc += a @ b, acc in fp32."""
    if acc.dtype == a.dtype:
        acc.addmm_(a, b)
    elif counting():
        pass  # nothing is allocated, and fake tensors cannot do the next line before torch 2.13
    elif device_kind(a) == "cuda":
        torch.addmm(acc, a, b, out_dtype=acc.dtype, out=acc)
    else:
        acc += a @ b


# ---- what a call does: settled before the first product ----------------------------------------


@dataclass(frozen=True)
class Plan:
    scale: float
    cap: float | None
    need_h: bool  # which gradients are wanted: of hidden states, weight, bias
    need_w: bool
    need_b: bool
    frozen: bool  # only dH is wanted: Q W is kept, and no Q
    exact: torch.dtype  # of logits and results: fp32, or fp64 for fp64
    rows_function: Callable  # makes Q, S and d: rows_triton, rows_torch or rows_allocated
    in_place: bool  # Q is written over the logits
    chunk: int  # C: rows of logits at a time
    kept: int  # rows whose Q is kept: 0..kept-1


def make_plan(hidden, weight, scale, cap, stash_bytes: int, needs: list[bool]) -> Plan:
    """needs: whether hidden, weight and bias want a gradient."""
    need_h, need_w, need_b = needs
    exact = torch.promote_types(hidden.dtype, torch.float32)
    rows_function = choose_rows_function(hidden, exact)
    chunk = CHUNK[device_kind(hidden)]

    kept = 0
    if need_w or need_b:
        row_bytes = len(weight) * hidden.element_size()
        kept = rows_kept(len(hidden), stash_bytes // row_bytes, chunk)
    return Plan(
        scale=scale,
        cap=cap,
        need_h=need_h,
        need_w=need_w,
        need_b=need_b,
        frozen=need_h and not (need_w or need_b),
        exact=exact,
        rows_function=rows_function,
        # The Triton kernel must not: it could not start a hopeless row again.
        in_place=rows_function is rows_torch and hidden.dtype == exact,
        chunk=chunk,
        kept=kept,
    )


def choose_rows_function(hidden: torch.Tensor, exact: torch.dtype) -> Callable:
    if exact != torch.float32:  # the Triton kernel knows no fp64
        return rows_torch
    if counting():
        return rows_allocated
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own way to run on a CPU
    if triton and (hidden.is_cuda or interpreted):
        return rows_triton
    return rows_torch


def rows_kept(T: int, fit: int, chunk: int) -> int:
    """How many of T rows of Q are kept where `fit` rows have room: all, or else whole chunks."""
    if T <= fit:
        return T
    return fit // chunk * chunk


# ---- forward and backward ----------------------------------------------------------------------


class LinearLogprob(torch.autograd.Function):
    """hidden [T, D], weight [V, D], bias [V] or None, targets [T] -> log-probs [T]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, cap, stash_bytes, train):
        needs = [train and need for need in ctx.needs_input_grad[:3]]
        plan = make_plan(hidden, weight, scale, cap, stash_bytes, needs)

        # a target outside is torch's ignore_index, or a mistake: 0 takes its place for now
        inside = (targets >= 0) & (targets < len(weight))  # [T]
        target = torch.where(inside, targets, 0)  # [T]
        S, d, stash, qw = forward_rows(plan, hidden, weight, bias, target)

        # the log-probs, and the factor that will join g
        total = d.exp() + S  # [T]
        logprobs = torch.where(d == 0, -torch.log1p(S), d - total.log())  # [T]
        r = plan.scale / total  # [T]

        # where the target is outside
        outside = torch.where(targets == -100, 0.0, float("nan")).to(plan.exact)  # [T]
        logprobs = torch.where(inside, logprobs, outside)
        r = torch.where(inside, r, outside)

        ctx.save_for_backward(hidden, weight, bias, target, r, stash, qw)
        ctx.plan = plan
        return logprobs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        plan = ctx.plan
        hidden, weight, bias, target, r, stash, qw = ctx.saved_tensors
        k = -(g * r)[:, None]  # [T, 1]: g . J = k . Q

        dw = db = None
        if plan.frozen:
            dh = (k * qw).to(hidden.dtype)  # [T, D]
        else:
            dh, dw, db = backward_rows(plan, hidden, weight, bias, target, stash, k)
        return dh, dw, db, None, None, None, None, None


def chunks(first: int, last: int, chunk: int) -> list[tuple[int, int]]:
    """The rows first..last-1 as (lo, hi), each rows lo..hi-1: `chunk` of them, the last fewer."""
    return [(lo, min(lo + chunk, last)) for lo in range(first, last, chunk)]


def chunk_buffers(plan: Plan, rows: int, V: int, hidden, q_rows: int):
    """Logits [rows, V] and Q [q_rows, V], which every chunk uses again; or one matrix for both."""
    logits = matrix(rows, V, hidden, plan.exact)
    if plan.in_place:
        return logits, logits
    return logits, matrix(q_rows, V, hidden, hidden.dtype)


def one_chunk(plan: Plan, hidden, weight, bias, target, logits, q):
    """hidden [C, D], target [C] -> S [C], d [C]. Q [C, V] is written to q, unless it is None.

    logits: the buffer to work in, [C, V]. Q takes its place where the plan says so.
    """
    if plan.in_place and q is not None:
        logits = q
    logits_(hidden, weight, out=logits)
    return plan.rows_function(logits, bias, target, q, plan.scale, plan.cap)


def forward_rows(plan: Plan, hidden, weight, bias, target):
    """S [T], d [T], Q [kept, V] of the rows that are kept; and Q W [T, D] for a frozen weight."""
    T, V = len(hidden), len(weight)
    S, d = torch.empty(2, T, dtype=plan.exact, device=hidden.device).unbind()  # [T], [T]
    stash = matrix(plan.kept, V, hidden, hidden.dtype)  # [kept, V]
    qw_shape = hidden.shape if plan.frozen else 0
    qw = torch.empty(qw_shape, dtype=plan.exact, device=hidden.device)  # [T, D]
    C = min(T, plan.chunk)
    logits, q_chunk = chunk_buffers(plan, C, V, hidden, q_rows=C if plan.frozen else 0)

    for lo, hi in chunks(0, T, plan.chunk):
        n = hi - lo
        # where Q of this chunk goes
        q = None
        if hi <= plan.kept:
            q = stash[lo:hi]  # [C, V]
        elif plan.frozen:
            q = q_chunk[:n]  # [C, V]

        h, y = hidden[lo:hi], target[lo:hi]  # [C, D], [C]
        S[lo:hi], d[lo:hi] = one_chunk(plan, h, weight, bias, y, logits[:n], q)
        if plan.frozen:
            qw[lo:hi] = product(q, weight)  # [C, V] @ [V, D] -> [C, D]
    return S, d, stash, qw


def backward_rows(plan: Plan, hidden, weight, bias, target, stash, k):
    """dH [T, D], dW [V, D] and db [V], from g . J = k . Q. None for what is not wanted."""
    T, V = len(hidden), len(weight)
    C = min(T - plan.kept, plan.chunk)
    logits, q_chunk = chunk_buffers(plan, C, V, hidden, q_rows=C)  # [C, V], [C, V]

    # All kept rows at once: larger GEMMs, and dW is rounded once. The others chunk by chunk.
    spans = [(0, plan.kept)] if plan.kept else []
    spans += chunks(plan.kept, T, plan.chunk)
    only_one = len(spans) == 1

    dh = torch.empty_like(hidden) if plan.need_h else None  # [T, D]
    dw = None  # [V, D]
    if plan.need_w and not only_one:  # a sum over spans, in fp32
        dw = torch.zeros_like(weight, dtype=plan.exact)
    db = torch.zeros_like(bias, dtype=plan.exact) if plan.need_b else None  # [V]

    for lo, hi in spans:
        h, k_span = hidden[lo:hi], k[lo:hi]  # [C, D], [C, 1]; C is `kept` for the kept rows
        if hi <= plan.kept:
            q = stash  # [C, V]
        else:
            n = hi - lo
            q = q_chunk[:n]  # [C, V]
            one_chunk(plan, h, weight, bias, target[lo:hi], logits[:n], q)

        if plan.need_h:
            dh[lo:hi] = product(q, weight) * k_span  # [C, V] @ [V, D] -> [C, D]
        if plan.need_w:
            kh = (h * k_span).to(q.dtype)  # [C, D]: g on the small side
            if only_one:
                dw = q.T @ kh  # [V, C] @ [C, D] -> [V, D]
            else:
                add_product_(dw, q.T, kh)
        if plan.need_b:
            add_bias_gradient_(db, q, k_span, plan.chunk)

    if plan.need_w:
        dw = dw.to(weight.dtype)
    if plan.need_b:
        db = db.to(bias.dtype)
    return dh, dw, db


def add_bias_gradient_(db: torch.Tensor, q: torch.Tensor, k: torch.Tensor, chunk: int) -> None:
    """db [V] += Q^T k, for Q [n, V] and k [n, 1].

    It is rare and small, so it is summed in fp32, which takes a copy of Q: one chunk at a time.
    """
    for q_part, k_part in zip(q.split(chunk), k[:, 0].split(chunk), strict=True):
        db.addmv_(q_part.T.to(db.dtype), k_part)  # [V, C] @ [C] -> [V]


# ---- what callers use --------------------------------------------------------------------------


def linear_logprob(
    hidden: torch.Tensor,  # [T, D]
    weight: torch.Tensor,  # [V, D]
    targets: torch.Tensor,  # [T], integers
    *,
    bias: torch.Tensor | None = None,  # [V]
    scale: float = 1.0,
    softcap: float | None = None,
    stash_bytes: int | None = None,
) -> torch.Tensor:
    """log softmax(softcap(scale (hidden weight^T + bias))) at the targets, [T] in fp32.

    In fp64 for fp64 inputs; mixed dtypes are promoted. A target of -100 is ignored (0, and no
    gradient); any other outside 0..V-1 gives NaN, because raising would mean waiting for the GPU.
    stash_bytes: memory for Q, kept from forward to backward; None: STASH_BYTES of the device.
    """
    check_inputs(hidden, weight, targets)
    leaves = [t for t in (hidden, weight, bias) if t is not None]
    train = torch.is_grad_enabled() and any(t.requires_grad for t in leaves)
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if train and dtype == torch.float16:
        raise ValueError(
            "linear_logprob cannot train in fp16, Q does not fit its range: use bf16 or fp32"
        )
    if stash_bytes is None:
        stash_bytes = STASH_BYTES[device_kind(hidden)]
    with torch.autocast(hidden.device.type, enabled=False):  # it would choose other dtypes
        return LinearLogprob.apply(
            hidden.to(dtype),
            weight.to(dtype),
            bias,
            targets,
            float(scale),
            softcap or None,
            int(stash_bytes),
            train,
        )


def check_inputs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    """Raise ValueError if these cannot be inputs of linear_logprob."""
    fit_together = (
        hidden.ndim == 2
        and weight.ndim == 2
        and hidden.shape[1] == weight.shape[1]
        and targets.shape == hidden.shape[:1]
    )
    if not fit_together:
        shapes = [list(t.shape) for t in (hidden, weight, targets)]
        raise ValueError(
            f"linear_logprob takes hidden [T, D], weight [V, D], targets [T]; got {shapes}"
        )
    if targets.is_floating_point():
        raise ValueError(f"linear_logprob takes integer targets, not {targets.dtype}")
    if type(weight).__name__ == "DTensor":
        raise ValueError(
            "linear_logprob got a sharded weight: call it in the FSDP root's forward, "
            "where it is whole"
        )


def logprob_from_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The specification: logits [..., V], targets [...] -> [...] fp32.

    For checks against a model's own logits.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return exact.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
