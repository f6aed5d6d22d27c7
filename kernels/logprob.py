"""linear_logprob: log-probs of the tokens that were written, straight from hidden states, never
holding the logits.

    x = h W^T + b                        [T, V] logits as the head gives them
    z = softcap(scale x)                 softcap(u) = cap tanh(u / cap); most models have neither
    l = z_y - log sum_v exp(z_v)         [T] fp32, y the target

At T = 16384 and V = 151936 the logits are 10 GB in fp32, and autograd would hold them three times.
Their gradient is

    dl / dx_v = scale slope_v (1[v = y] - p_v)           p = softmax(z), slope_v = 1 - (z_v / cap)^2 (1 without a cap)

and with the upstream gradient g [T] the gradients of hidden states and weight are two products with
that matrix:

    dH = g . (J W)        dW = J^T (g . H)               J = dl/dx [T, V], "." scales rows

g stands outside both: a factor per row commutes with either product, and sits on the small T x D
side. So J can be built in the forward pass, while the logits are at hand and before any loss is
known, and backward is two plain GEMMs: three in all, 6 T V D flops, the least there is.
(Recomputing the logits in backward costs a fourth.)

The same trick once more makes the row kernel a single pass. Measure logits from the target's, c =
z_y:

    S = sum_{v != y} exp(z_v - c)        l = -log(1 + S)         p_v = exp(z_v - c) / (1 + S)

    J = -r . Q       Q_v = slope_v exp(z_v - c)  (v != y)     Q_y = -slope_y S       r = scale / (1 + S)

No maximum, no second pass to normalise: Q is written while S is being summed, S is put in its place
at y when the row is done, and the row's factor r joins g. Nothing cancels either: 1 - p_y is S / (1
+ S), and l keeps its relative precision down to l = -0. Where the target is hopeless (S > 2^60, l <
-41 nats) c is the row's maximum instead, and

    l = d - log(exp(d) + S)      r = scale / (exp(d) + S)        d = z_y - c; d = 0 is the case above

Q is kept ("the stash") in the dtype of the inputs, 2 T V bytes in bf16, as far as `stash_bytes`
reaches; rows beyond are recomputed in backward, in chunks. Nothing is kept under no_grad. A frozen
weight needs no stash: Q W [T, D] is formed in the forward pass, two GEMMs in all. docs/kernel.md:
bytes, roofline, what others do, what did not help.
"""

import math
import os
import re

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU needs none: rows_torch below is the same in torch
    triton = None

# Rows of logits at a time. GPU: 2048 x 151936 in fp32 is 1.2 GB, and reading W again for each chunk
# (2 V D bytes for 2 C V D flops) is far above the machine's balance of about 200 flops a byte. CPU:
# where its GEMMs reach full speed.
CHUNK = {"cuda": 2048, "cpu": 256}
# How much of Q is kept; rows beyond cost 4/3 the work. GPU: 16k tokens of Qwen's 151936 words in
# bf16 are 4.6 GiB, a fifth of what autograd would hold. CPU: its memory is everybody's, and its
# batches are small.
STASH_BYTES = {"cuda": 8 << 30, "cpu": 4 << 30}
# 8 elements a thread: 32 registers, so that a multiprocessor is full of threads with loads in
# flight, and no spills.
BLOCK, WARPS = 2048, 8
FAR = (
    2.0**60
)  # S beyond this: measure from the maximum. Leaves bf16 and fp32 (max 2^128) room to sum products in.


# ---- rows: logits in, Q, S and d out. Once for Triton, once for torch; all else is shared ------

if triton:

    @triton.jit
    def load_z(x, bias, v, V, stride, scale, cap, BIAS: tl.constexpr, CAP: tl.constexpr):
        """z and slope at column v, or columns v [BLOCK]; z is -inf from V on."""
        z = tl.load(
            x + v, mask=v < stride, other=0.0
        )  # V to stride is padding: any V loads 16 bytes at a time
        if BIAS:
            z += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)
        z *= scale
        slope = 1.0
        if CAP:
            sigmoid = 1 / (1 + tl.exp(-2 * z / cap))  # tanh(u) = 2 sigmoid(2u) - 1
            z = cap * (2 * sigmoid - 1)
            slope = 4 * sigmoid * (1 - sigmoid)  # 1 - tanh(u)^2
        return tl.where(v < V, z, -float("inf")), slope

    @triton.jit
    def one_pass(x, bias, q, y, c, V, stride, scale, cap, BIAS: tl.constexpr, CAP: tl.constexpr, GRAD: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
        """Write Q relative to c, with 0 at y; return S."""
        total = tl.zeros(
            [BLOCK], tl.float32
        )  # [BLOCK]: a sum for each lane, so nothing in the loop waits for others
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)  # [BLOCK]
            z, slope = load_z(x, bias, v, V, stride, scale, cap, BIAS, CAP)
            e = tl.where(v == y, 0.0, tl.exp(z - c))  # 0 beyond V
            total += e
            if GRAD:
                tl.store(q + v, (e * slope).to(q.dtype.element_ty), mask=v < stride)
        return tl.sum(total, axis=0)  # [BLOCK] -> scalar

    @triton.jit
    def row_kernel(x, bias, target, q, s_out, d_out, V, stride, scale, cap, far,
                   BIAS: tl.constexpr, CAP: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        """One program a row of V logits: reads 4 V bytes and writes 2 V (Q in bf16), or nothing
        without GRAD.
        """
        row = tl.program_id(0).to(tl.int64)  # 16384 rows of 151936 are past int32
        x += row * stride
        if GRAD:
            q += row * stride
        y = tl.load(target + row).to(
            tl.int32
        )  # no vocabulary is past int32, and each v is compared with it
        zy, slope = load_z(x, bias, y, V, stride, scale, cap, BIAS, CAP)
        c = zy
        s = one_pass(x, bias, q, y, c, V, stride, scale, cap, BIAS, CAP, GRAD, BLOCK)
        if not (
            s < far
        ):  # two passes more: the maximum, and again. Written so that NaN comes here, and stays NaN
            top = tl.full([BLOCK], -float("inf"), tl.float32)  # [BLOCK]
            for start in range(0, V, BLOCK):
                z, _ = load_z(
                    x, bias, start + tl.arange(0, BLOCK), V, stride, scale, cap, BIAS, CAP
                )
                top = tl.maximum(top, z)
            c = tl.max(top, axis=0)
            s = one_pass(x, bias, q, y, c, V, stride, scale, cap, BIAS, CAP, GRAD, BLOCK)
        if GRAD:
            tl.debug_barrier()  # the thread that wrote 0 at y may be another one
            tl.store(q + y, (-s * slope).to(q.dtype.element_ty))
        tl.store(s_out + row, s)
        tl.store(d_out + row, zy - c)


def rows_triton(x, bias, target, q, scale, cap):
    """As rows_torch, but x stays as it is, and x and q are two matrices, both from matrix()."""
    s, d = x.new_empty(2, len(x)).unbind()  # [C], [C]
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be x's
        row_kernel[(len(x),)](
            x, bias, target, q, s, d, x.shape[1], x.stride(0), scale, cap or 1.0, FAR,
            BIAS=bias is not None, CAP=cap is not None, GRAD=q is not None, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return s, d


def rows_torch(x, bias, target, q, scale, cap):
    """x [C, V] logits (overwritten), bias [V], target [C] -> S [C], d [C], and Q [C, V] into q
    (None, or x itself).
    """
    s, d = x.new_empty(2, len(x)).unbind()  # [C], [C]
    few = len(x) if x.is_cuda else 16  # 16 rows stay in a CPU's cache from one line to the next
    for i in range(0, len(x), few):
        z, y = x[i : i + few], target[i : i + few, None]  # [16, V], [16, 1]
        if bias is not None:
            z += bias
        if scale != 1:
            z *= scale
        if cap is not None:
            z.div_(cap).tanh_()
            slope = 1 - z * z  # [16, V]
            z *= cap
        zy, top = z.gather(1, y), z.amax(1, keepdim=True)  # [16, 1], [16, 1]
        c = torch.where(
            top - zy < math.log(FAR), zy, top
        )  # S is not known yet, but the maximum is cheap here
        e = z.sub_(c).exp_().scatter_(1, y, 0.0)
        total = e.sum(1, keepdim=True)  # [16, 1]
        s[i : i + few], d[i : i + few] = total[:, 0], (zy - c)[:, 0]
        if q is not None:
            e.scatter_(1, y, -total)
            if cap is not None:
                e *= slope
            if q is not x:
                q[i : i + few] = e
    return s, d


# ---- three matrix products, results in fp32 from bf16 ------------------------------------------


def matrix(rows: int, V: int, like: torch.Tensor, dtype) -> torch.Tensor:
    """Uninitialised [rows, V]; a row starts at a multiple of 64, so that no V costs a GEMM or the
    kernel its pace.
    """
    wide = torch.empty(rows, (V + 63) // 64 * 64, dtype=dtype, device=like.device)
    if (
        not like.is_cuda
    ):  # oneDNN's bf16 products (AMX) read past V, times zero: what lies there must not be NaN
        wide[:, V:] = 0
    return wide[:, :V]


def logits_(h, weight, out):
    """out [C, V] = h [C, D] @ weight [V, D]^T. bf16 ones would be off by 0.01 nats a token, so out
    is fp32.
    """
    if out.dtype == h.dtype:
        torch.mm(h, weight.T, out=out)
    elif h.is_cuda:
        torch.mm(h, weight.T, out_dtype=out.dtype, out=out)
    else:  # no such GEMM on a CPU
        torch.mm(h.to(out.dtype), weight.T.to(out.dtype), out=out)


def product(a, b):
    """a @ b, on a GPU in fp32: a factor per row is still to come, so this spares one rounding of
    two.
    """
    return (
        torch.mm(a, b, out_dtype=torch.float32)
        if a.is_cuda and a.dtype == torch.bfloat16
        else a @ b
    )


def add_product_(acc, a, b):
    """acc += a @ b, acc in fp32."""
    if acc.dtype == a.dtype:
        acc.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(acc, a, b, out_dtype=acc.dtype, out=acc)
    else:
        acc += a @ b


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, cap, stash_bytes, train):
        (T, _), V = hidden.shape, len(weight)
        need_h, need_w, need_b = (train and need for need in ctx.needs_input_grad[:3])
        frozen = need_h and not (need_w or need_b)  # only Q W is wanted: form it here and keep no Q
        exact = torch.promote_types(
            hidden.dtype, torch.float32
        )  # of logits and results: fp32, or fp64 for fp64
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        rows = (
            rows_triton
            if triton and exact == torch.float32 and (hidden.is_cuda or interpreted)
            else rows_torch
        )
        in_place = rows is rows_torch and hidden.dtype == exact  # Q over the logits

        chunk = CHUNK.get(hidden.device.type, 256)
        kept = 0  # rows whose Q is kept: all where they fit, else whole chunks
        if need_w or need_b:
            fit = stash_bytes // (V * hidden.element_size())
            kept = T if T <= fit else fit // chunk * chunk
        stash = matrix(kept, V, hidden, hidden.dtype)  # [kept, V]
        logits = matrix(min(T, chunk), V, hidden, exact)  # [C, V], used again for every chunk
        q_chunk = (
            logits if in_place else matrix(len(logits) if frozen else 0, V, hidden, hidden.dtype)
        )  # [C, V]
        qw = torch.empty(hidden.shape if frozen else 0, dtype=exact, device=hidden.device)  # [T, D]
        s, d = torch.empty(2, T, dtype=exact, device=hidden.device).unbind()  # [T], [T]

        inside = (targets >= 0) & (targets < V)  # [T]
        target = torch.where(inside, targets, 0)  # [T]
        for lo in range(0, T, chunk):
            hi = min(lo + chunk, T)
            q = stash[lo:hi] if hi <= kept else q_chunk[: hi - lo] if frozen else None  # [C, V]
            x = q if in_place and q is not None else logits[: hi - lo]  # [C, V]
            logits_(hidden[lo:hi], weight, out=x)
            s[lo:hi], d[lo:hi] = rows(x, bias, target[lo:hi], q, scale, cap)
            if frozen:
                qw[lo:hi] = product(q, weight)  # [C, V] @ [V, D] -> [C, D]

        total = d.exp() + s  # [T]
        logprob = torch.where(d == 0, -torch.log1p(s), d - total.log())  # [T]
        outside = torch.where(targets == -100, 0.0, float("nan")).to(
            exact
        )  # torch's ignore_index, or a mistake
        r = torch.where(inside, scale / total, outside)  # [T]
        ctx.save_for_backward(hidden, weight, bias, target, r, stash, qw)
        ctx.settings = scale, cap, rows, in_place, chunk, frozen, (need_h, need_w, need_b)
        return torch.where(inside, logprob, outside)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        hidden, weight, bias, target, r, stash, qw = ctx.saved_tensors
        scale, cap, rows, in_place, chunk, frozen, (need_h, need_w, need_b) = ctx.settings
        T, V, kept = len(hidden), len(weight), len(stash)
        k = -(g * r)[:, None]  # [T, 1]: what a row of Q is multiplied with
        if frozen:
            return (qw * k).to(hidden.dtype), *[None] * 7  # [T, D]

        spans = [(lo, min(lo + chunk, T)) for lo in range(kept, T, chunk)]  # to be recomputed
        q_chunk = matrix(min(T - kept, chunk), V, hidden, hidden.dtype)  # [C, V]
        logits = q_chunk if in_place else matrix(len(q_chunk), V, hidden, r.dtype)  # [C, V]
        if kept:
            spans.insert(
                0, (0, kept)
            )  # all kept rows at once: larger GEMMs, and dW is rounded once
        dh = torch.empty_like(hidden) if need_h else None  # [T, D]
        dw = (
            torch.zeros_like(weight, dtype=r.dtype) if need_w and len(spans) != 1 else None
        )  # [V, D]
        db = torch.zeros_like(bias, dtype=r.dtype) if need_b else None  # [V]
        for lo, hi in spans:
            if hi <= kept:
                q = stash
            else:
                x, q = logits[: hi - lo], q_chunk[: hi - lo]  # [C, V], [C, V]
                logits_(hidden[lo:hi], weight, out=x)
                rows(x, bias, target[lo:hi], x if in_place else q, scale, cap)
            if need_h:
                dh[lo:hi] = product(q, weight) * k[lo:hi]  # [C, V] @ [V, D] -> [C, D]
            kh = (hidden[lo:hi] * k[lo:hi]).to(q.dtype)  # [C, D]: g on the small side
            if need_w and dw is None:
                dw = q.T @ kh  # [V, T] @ [T, D] -> [V, D]
            elif need_w:
                add_product_(dw, q.T, kh)  # [V, C] @ [C, D] -> [V, D]
            if need_b:  # rare and small: summed in fp32, a chunk at a time as it takes a copy
                for q_part, k_part in zip(q.split(chunk), k[lo:hi, 0].split(chunk), strict=True):
                    db.addmv_(q_part.T.to(db.dtype), k_part)  # [V, C] @ [C] -> [V]
        return (
            dh,
            dw.to(weight.dtype) if need_w else None,
            db.to(bias.dtype) if need_b else None,
            *[None] * 5,
        )


def linear_logprob(
    hidden, weight, targets, *, bias=None, scale=1.0, softcap=None, stash_bytes=None
):
    """log softmax(softcap(scale (hidden weight^T + bias))) at the targets, [T] fp32 (fp64 for fp64
    inputs).

    hidden [T, D], weight [V, D], targets [T] integers, bias [V]. A target of -100 is ignored (0, no
    gradient); any other outside 0..V-1 gives NaN, as a GPU cannot raise without being waited for.
    Mixed dtypes are promoted. stash_bytes: memory for Q, kept from forward to backward; None:
    STASH_BYTES of the device.
    """
    if (
        hidden.ndim != 2
        or weight.ndim != 2
        or hidden.shape[1] != weight.shape[1]
        or targets.shape != hidden.shape[:1]
    ):
        shapes = [list(t.shape) for t in (hidden, weight, targets)]
        raise ValueError(
            f"linear_logprob takes hidden [T, D], weight [V, D], targets [T]; got {shapes}"
        )
    if targets.is_floating_point():
        raise ValueError(f"linear_logprob takes integer targets, not {targets.dtype}")
    if type(weight).__name__ == "DTensor":
        raise ValueError(
            "linear_logprob got a sharded weight: call it in the FSDP root's forward, where it is whole"
        )
    train = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, bias)
    )
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if dtype == torch.float16 and train:
        raise ValueError(
            "linear_logprob cannot train in fp16, Q does not fit its range: use bf16 or fp32"
        )
    if stash_bytes is None:
        stash_bytes = STASH_BYTES.get(hidden.device.type, STASH_BYTES["cpu"])
    with torch.autocast(
        hidden.device.type, enabled=False
    ):  # the dtypes here are chosen, not casual
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


def logprob_from_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The specification: logits [..., V], targets [...] -> [...] fp32. For checks against a model's
    own logits.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return exact.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


# ---- heads of real models ----------------------------------------------------------------------

# What transformers does to the logits, by model type. A field's name does not tell which way it
# goes.
SCALES = {
    "cohere": lambda c: c.logit_scale or 1.0,  # Cohere Compass may have None
    "granite": lambda c: 1 / c.logits_scaling,
    "hyperclovax": lambda c: c.logits_scaling,
    "minicpm3": lambda c: 1 / c.logits_scaling,  # on the hidden states there: the same thing
    "falcon_h1": lambda c: c.lm_head_multiplier,
}
CAPS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
)  # Gemma, RecurrentGemma, xLSTM


def backbone(model):
    """The part of a transformers causal LM whose last hidden state the head reads, or ValueError.

    That is model.base_model, with few exceptions: Llama 4's text model and Mllama's look for theirs
    under a name that they do not have, and base_model is then the model itself, head included.
    """
    inner = model.base_model
    if inner is model:
        inner = getattr(model, "model", None)
    if inner is None:
        raise ValueError(
            f"{type(model).__name__}: it has no base model that can be told from its head"
        )
    return inner


def lm_head(model) -> dict:
    """weight, bias, scale and softcap of a transformers causal LM for linear_logprob, or a
    ValueError.

    They belong to the output of `backbone(model)`. All is read from the model and its config; that
    nothing else happens to the logits is for the caller to check, on a short sequence, with
    logprob_from_logits of the model's own.
    """
    name, head, config = (
        type(model).__name__,
        model.get_output_embeddings(),
        model.config.get_text_config(),
    )
    if not (
        isinstance(head, torch.nn.Linear)
        and head.weight.is_floating_point()
        and head.weight.ndim == 2
    ):
        raise ValueError(
            f"{name}: its head is {type(head).__name__}, not a plain torch.nn.Linear; merge or replace it"
        )
    others = [n for n, m in model.named_children() if m is not backbone(model) and m is not head]
    others = [n for n in others if next(getattr(model, n).parameters(), None) is not None]
    if others:
        raise ValueError(
            f"{name}: {', '.join(others)} has weights too and may stand between base model and head"
        )
    family = next((f for f in SCALES if config.model_type.startswith(f)), None)
    pattern = "^(?!.*(att|router|init)).*(logit.*(scal|cap|mult)|(head|output)_mult|unpadded_vocab)"
    fields = {k: v for k, v in vars(config).items() if re.search(pattern, k) and v not in (None, 1)}
    unknown = [f"{k}={v}" for k, v in fields.items() if k not in CAPS and not family]
    if unknown:
        raise ValueError(
            f"{name}: its config has {', '.join(unknown)}, unknown to lm_head for {config.model_type}"
        )
    return {
        "weight": head.weight,
        "bias": head.bias,
        "scale": SCALES[family](config) if family else 1.0,
        "softcap": next((fields[k] for k in CAPS if k in fields), None),
    }
