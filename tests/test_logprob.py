"""Law 6: the kernel equals the fp64 reference, forward and backward, for any vocabulary. Here with
the torch rows, which are the specification; test_logprob_triton.py tests the Triton rows in the
same way.
"""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kernels.logprob as kernel
from kernels.device import counted_as_gpu, device_kind
from kernels.logprob import linear_logprob, lm_head, logprob_from_logits

ROOT = Path(__file__).resolve().parent.parent
# of the value, of the gradients; relative, by norm
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-5, 4e-3),
}
HEADS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 5.0},
    "both": {"scale": 2.5, "softcap": 3.0},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Seven rows per chunk, so that a few dozen tokens are many chunks and the last is short."""
    monkeypatch.setitem(kernel.CHUNK, "cpu", 7)


def inputs(T, D, V, dtype=torch.float32, bias=False, seed=0):
    """hidden, weight, bias (or None), targets with 0 and V-1 among them, and g, which differs for
    every token.
    """
    torch.manual_seed(seed)
    hidden, weight = torch.randn(T, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    targets = torch.randint(V, (T,))
    targets[:1], targets[1:2] = V - 1, 0
    b = torch.randn(V, dtype=torch.float64) if bias else None
    leaves = [t if t is None else t.to(dtype).requires_grad_() for t in (hidden, weight, b)]
    return *leaves, targets, torch.randn(T, dtype=torch.float64)


def reference(hidden, weight, bias, targets, g, scale=1.0, softcap=None):
    """Log-probs and gradients in fp64, by autograd through the logits."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    z = leaves[0] @ leaves[1].T  # [T, V]
    if bias is not None:
        z = z + leaves[2]
    z = z * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    logprobs = z.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return logprobs.detach(), torch.autograd.grad(logprobs, leaves, g)


def ours(hidden, weight, bias, targets, g, **options):
    logprobs = linear_logprob(hidden, weight, targets, bias=bias, **options)
    leaves = [t for t in (hidden, weight, bias) if t is not None]
    return logprobs.detach(), torch.autograd.grad(logprobs, leaves, g.to(logprobs.dtype))


def error(a, b):
    """Relative, by norm."""
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-300)).item() if b.numel() else 0.0


def check(case, dtype, **options):
    head = {k: v for k, v in options.items() if k != "stash_bytes"}
    (value, gradients), (value64, gradients64) = ours(*case, **options), reference(*case, **head)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(value, value64) < TOLERANCE[dtype][0]
    for ours_, theirs in zip(gradients, gradients64, strict=True):
        assert ours_.dtype == dtype and error(ours_, theirs) < TOLERANCE[dtype][1]


# ---- values and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_fp64(dtype, bias, head):
    """Law 6, and PITFALLS 33: 5003 is prime. Stash, recompute, and a budget of two chunks and a
    bit.
    """
    case = inputs(37, 24, 5003, dtype, bias)
    for stash_bytes in (None, 0, 16 * 5003 * case[0].element_size()):
        check(case, dtype, stash_bytes=stash_bytes, **HEADS[head])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [0, 1, 3])
def test_real_vocabulary(T, dtype):
    """Qwen's vocabulary; no tokens, one, an odd number. (At D = 8 the BLAS, and so plain torch, is
    off by 5e-5.)
    """
    check(inputs(T, 64, 151936, dtype), dtype)


def test_gradcheck():
    """The derivation itself, numerically, for everything a head may do."""
    hidden, weight, bias, targets, _ = inputs(5, 4, 11, torch.float64, bias=True)
    for stash_bytes, options in product((0, 1 << 20), HEADS.values()):
        options = options | {"stash_bytes": stash_bytes}
        assert torch.autograd.gradcheck(
            lambda h, w, b, o=options: linear_logprob(h, w, targets, bias=b, **o),
            (hidden, weight, bias),
        )


@pytest.mark.parametrize("needs", list(product([False, True], repeat=3)), ids=str)
def test_every_combination_of_needed_gradients(needs):
    """hidden, weight, bias: what needs no gradient gets none, and what does gets the same. (True,
    False, False) is the frozen head, which keeps no stash.
    """
    hidden, weight, bias, targets, g = inputs(20, 8, 101, bias=True)
    _, expected = reference(hidden, weight, bias, targets, g, scale=0.7)
    leaves = [
        t.detach().requires_grad_(need)
        for t, need in zip((hidden, weight, bias), needs, strict=True)
    ]
    for stash_bytes in (0, 1 << 20):
        logprobs = linear_logprob(
            *leaves[:2], targets, bias=leaves[2], scale=0.7, stash_bytes=stash_bytes
        )
        assert logprobs.requires_grad == any(needs)
        if any(needs):
            logprobs.backward(g.float())
        for leaf, need, theirs in zip(leaves, needs, expected, strict=True):
            assert (leaf.grad is not None) == need
            if need:
                assert error(leaf.grad, theirs) < 1e-5
            leaf.grad = None


def test_stash_equals_recompute_bit_for_bit_in_value():
    """In fp32 the gradients differ by the order of a sum over chunks alone."""
    case = inputs(40, 16, 1003)
    (a, kept), (b, recomputed) = ours(*case), ours(*case, stash_bytes=0)
    assert torch.equal(a, b)
    assert all(error(x, y.double()) < 1e-6 for x, y in zip(kept, recomputed, strict=True))


def test_one_gradient_a_sequence():
    """PITFALLS 34: DPO's g is constant within an answer, and of opposite sign for chosen and
    rejected.
    """
    hidden, weight, _, targets, _ = inputs(30, 16, 503)
    lengths, scales = torch.tensor([4, 11, 1, 14]), torch.tensor([0.5, -0.5, 2.0, -1e-4])
    logprobs = linear_logprob(hidden, weight, targets)
    loss = sum(
        s * part.sum() for s, part in zip(scales, logprobs.split(lengths.tolist()), strict=True)
    )
    got = torch.autograd.grad(loss, [hidden, weight])
    _, expected = reference(
        hidden, weight, None, targets, scales.repeat_interleave(lengths).double()
    )
    assert all(error(a, b) < 1e-5 for a, b in zip(got, expected, strict=True))
    (tail,) = torch.autograd.grad(
        logprobs_tail := linear_logprob(hidden, weight, targets)[16:].sum() * -1e-4, hidden
    )
    assert (
        error(tail[16:], expected[0][16:]) < 1e-5 and logprobs_tail < 1
    )  # small next to large: no shared scale


# ---- extremes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_ten_thousand(dtype):
    """Finite everywhere and equal to fp64, targets likely and hopeless, and far apart by more than
    exp can hold.
    """
    weight = (
        torch.tensor([[1e4, 0.0], [-1e4, 0.0], [0.0, 1.0], [0.0, -1.0], [50.0, 0.0]])
        .to(dtype)
        .requires_grad_()
    )
    hidden = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, 2.0], [1e-3, 1.0], [1.0, 1.0]]).to(dtype)
    hidden = hidden.repeat_interleave(5, 0).requires_grad_()  # [25, 2]
    case = hidden, weight, None, torch.arange(5).repeat(5), torch.linspace(-1, 1, 25).double()
    for stash_bytes in (0, 1 << 20):
        value, gradients = ours(*case, stash_bytes=stash_bytes)
        assert value.isfinite().all() and all(x.isfinite().all() for x in gradients)
        check(case, dtype, stash_bytes=stash_bytes)


def test_hopeless_targets_keep_a_gradient_in_range():
    """Across S = FAR, where the reference point of a row changes, values and gradients stay
    smooth.
    """
    V = 97
    for gap in (20.0, 40.0, 41.5, 42.0, 60.0, 300.0):
        weight = torch.zeros(V, 1).requires_grad_()
        hidden = torch.ones(3, 1).requires_grad_()
        bias = torch.zeros(V)
        bias[5] = gap
        case = (
            hidden,
            weight,
            bias.requires_grad_(),
            torch.tensor([0, 5, 96]),
            torch.tensor([1.0, 1.0, -1.0]).double(),
        )
        check(case, torch.float32)
        case = tuple(t.detach().bfloat16().requires_grad_() for t in case[:3]) + case[3:]
        assert all(x.isfinite().all() for x in ours(*case)[1])


def test_sure_targets_keep_their_precision():
    """log p of a nearly certain token is -S, tiny. Plain log softmax in fp32 has nothing left of
    it.
    """
    bias = torch.tensor([0.0, 25.0, 3.0]).requires_grad_()
    case = (
        torch.ones(1, 1).requires_grad_(),
        torch.zeros(3, 1),
        bias,
        torch.tensor([1]),
        torch.ones(1).double(),
    )
    exact = -torch.log1p(torch.exp(torch.tensor([-25.0, -22.0]).double()).sum())
    logprob = linear_logprob(*case[:2], case[3], bias=bias)
    assert error(logprob.detach()[0], exact) < 1e-6
    assert logprob_from_logits(bias, torch.tensor(1)) == 0
    (got,) = torch.autograd.grad(logprob, bias)
    assert error(got, reference(*case)[1][2]) < 1e-6


def test_a_log_prob_is_never_positive():
    """PITFALLS 33: phantom logits after an odd vocabulary once made log-probs positive."""
    for V in (1, 2, 63, 64, 65, 127):
        hidden, weight, _, targets, _ = inputs(11, 4, V, torch.bfloat16)
        assert (linear_logprob(hidden * 20, weight, targets) <= 0).all()


def test_ignored_and_impossible_targets():
    """-100 is torch's ignore_index: no log-prob and no gradient. Any other target outside is a
    mistake, and NaN.
    """
    hidden, weight, _, targets, g = inputs(12, 8, 53)
    keep = torch.tensor([True, False, True] * 4)
    for stash_bytes in (0, 1 << 20):
        value, (dh, dw) = ours(
            hidden, weight, None, targets.where(keep, -100), g, stash_bytes=stash_bytes
        )
        only, expected = reference(hidden, weight, None, targets, g * keep)
        assert (value[~keep] == 0).all() and error(value[keep], only[keep]) < 1e-5
        assert (
            (dh[~keep] == 0).all()
            and error(dh, expected[0]) < 1e-5
            and error(dw, expected[1]) < 1e-5
        )
    value = linear_logprob(hidden, weight, targets.where(keep, 53))
    assert value[~keep].isnan().all() and value[keep].isfinite().all()
    assert linear_logprob(hidden, weight, targets.where(keep, -1))[~keep].isnan().all()
    all_ignored = ours(hidden, weight, None, torch.full((12,), -100), g)
    assert all((x == 0).all() for x in (all_ignored[0], *all_ignored[1]))


def test_nan_and_masked_logits():
    """NaN stays NaN, in its own row. A vocabulary entry masked by a bias of -inf has no probability
    and no gradient.
    """
    hidden, weight, _, targets, _ = inputs(9, 4, 31)
    with torch.no_grad():
        hidden[4, 0] = float("nan")
    value = linear_logprob(hidden, weight, targets)
    assert value[4].isnan() and value[torch.arange(9) != 4].isfinite().all()
    hidden, weight, _, targets, g = inputs(9, 4, 31)
    mask = torch.zeros(31)
    mask[7] = -float("inf")
    value, (_, dw, _) = ours(
        hidden, weight, mask.requires_grad_(), targets.where(targets != 7, 8), g
    )
    assert value.isfinite().all() and (dw[7] == 0).all()


# ---- how it is used ----------------------------------------------------------------------------


def test_layout_does_not_matter():
    """Transposed, strided, expanded and misaligned inputs, and a gradient that is one number
    expanded (from sum()).
    """
    hidden, weight, _, targets, _ = inputs(23, 12, 211)
    expected = torch.autograd.grad(linear_logprob(hidden, weight, targets).sum(), [hidden, weight])
    wide = torch.randn(23, 40)
    wide[:, 3:27:2] = hidden.detach()
    flat = torch.cat([targets[:1], targets])
    strided = torch.stack([targets, targets], 1)[:, 0]
    for h, w, y in [
        (hidden.detach().T.contiguous().T, weight.detach().T.contiguous().T, strided),
        (
            wide[:, 3:27:2],
            torch.cat([torch.zeros(1), weight.detach().flatten()])[1:].view(211, 12),
            flat[1:],
        ),
    ]:
        h, w = h.requires_grad_(), w.requires_grad_()
        got = torch.autograd.grad(linear_logprob(h, w, y).sum(), [h, w])
        assert all(error(a, b.double()) < 1e-6 for a, b in zip(got, expected, strict=True))
    one = hidden[:1].detach().expand(23, 12).requires_grad_()
    (got,) = torch.autograd.grad(linear_logprob(one, weight.detach(), targets).sum(), one)
    assert error(got, reference(one, weight, None, targets, torch.ones(23).double())[1][0]) < 1e-5
    assert torch.equal(
        linear_logprob(hidden, weight, targets.int()), linear_logprob(hidden, weight, targets)
    )


def test_same_bits_twice():
    """Deterministic on the CPU, so an interrupted run can equal an uninterrupted one (law 7)."""
    case = inputs(50, 16, 1003, torch.bfloat16, bias=True)
    (a, first), (b, second) = ours(*case, softcap=5.0), ours(*case, softcap=5.0)
    assert torch.equal(a, b) and all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_alone_equals_batched():
    """Law 4: a token's log-prob, and its row of dH, depend on no other token."""
    hidden, weight, _, targets, g = inputs(20, 16, 503)
    together, (dh, _) = ours(hidden, weight, None, targets, g)
    for i in range(0, 20, 6):
        row = slice(i, i + 1)
        alone, (dh1, _) = ours(
            hidden[row].detach().requires_grad_(), weight, None, targets[row], g[row]
        )
        assert error(alone, together[row].double()) < 1e-6 and error(dh1, dh[row].double()) < 1e-5


def saved_bytes(run) -> int:
    """Bytes autograd holds between forward and backward."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(storages.values())


def test_memory_is_what_was_promised():
    """PITFALLS 24. Kept: Q as far as the budget reaches, in the inputs' dtype; with a frozen weight
    one [T, D]; else nothing of size V beside the weight.
    """
    T, D, V = 70, 8, 1024
    hidden, weight, _, targets, _ = inputs(T, D, V, torch.bfloat16)
    small = 4 * T * D + 2 * V * D + 32 * T
    assert (
        2 * T * V
        <= saved_bytes(lambda: linear_logprob(hidden, weight, targets))
        <= 2 * T * V + small
    )
    budget = 2 * V * 30  # rows; whole chunks of 7: 28
    partial = saved_bytes(lambda: linear_logprob(hidden, weight, targets, stash_bytes=budget))
    assert 2 * 28 * V <= partial <= 2 * 28 * V + small
    assert saved_bytes(lambda: linear_logprob(hidden, weight, targets, stash_bytes=0)) <= small
    assert (
        saved_bytes(lambda: linear_logprob(hidden, weight.detach(), targets)) <= small + 4 * T * D
    )
    with torch.no_grad():
        assert saved_bytes(lambda: linear_logprob(hidden, weight, targets)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_memory_held_before_does_not_matter(dtype, monkeypatch):
    """Every uninitialised tensor is NaN, also where a row of Q is padded (a processor with AMX
    reads that in bf16).
    """
    case, empty = inputs(37, 24, 5003, dtype), torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan"))
    )
    for options in ({}, {"stash_bytes": 0}, {"stash_bytes": 16 * 5003 * case[0].element_size()}):
        _, gradients = ours(*case, **options)
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("rows", [3, 67, 70])
def test_rows_that_fit_are_all_kept(rows):
    """Also where the last chunk of 7 is not whole; one row less in the budget, and whole chunks are
    kept.
    """
    V, hidden, weight, _, targets, _ = 1024, *inputs(rows, 8, 1024, torch.bfloat16)

    def saved(budget):
        return saved_bytes(lambda: linear_logprob(hidden, weight, targets, stash_bytes=budget))

    everything, row = saved(1 << 40), 2 * V
    assert saved(rows * row) == everything
    whole_chunks = (rows - 1) // 7 * 7
    assert saved(rows * row - 1) == everything - (rows - whole_chunks) * row


@pytest.mark.parametrize(("device", "gib"), [("cuda", 8), ("cpu", 4)])
def test_the_default_stash_goes_by_the_device(monkeypatch, device, gib):
    """16k tokens of Qwen's vocabulary are 4.6 GiB: they fit a GPU's default."""
    assert kernel.STASH_BYTES[device] == gib << 30
    asked = []
    monkeypatch.setattr(
        kernel.LinearLogprob, "apply", lambda *arguments: asked.append(arguments[-2])
    )
    with FakeTensorMode():
        hidden, weight, targets = (
            torch.empty(s, device=device) for s in ((16, 8), (101, 8), (16,))
        )
        linear_logprob(hidden, weight, targets.long())
        linear_logprob(hidden, weight, targets.long(), stash_bytes=5)
    assert asked == [gib << 30, 5]


class Casts(TorchDispatchMode):
    """Sizes of the tensors that a change of dtype makes."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("budget", "kept"), [(None, 5000), (3000, 2048), (0, 0)])
def test_counted_as_gpu_takes_the_path_of_a_gpu(dtype, budget, kept):
    """Its default keeps 5000 rows of a small vocabulary, and a budget of 3000 one whole chunk. Only
    a CPU casts the weight for a product.
    """
    T, D, V = 5000, 16, 20011
    stash_bytes = None if budget is None else budget * V * dtype.itemsize
    with FakeTensorMode(), counted_as_gpu(), Casts() as casts:
        hidden = torch.empty(T, D, dtype=dtype, requires_grad=True)
        weight = torch.empty(V, D, dtype=dtype, requires_grad=True)
        targets = torch.empty(T, dtype=torch.long)
        logprobs = linear_logprob(hidden, weight, targets, stash_bytes=stash_bytes)
        plan = logprobs.grad_fn.plan
        casts_in_forward = list(casts.sizes)
        logprobs.sum().backward()
    assert (plan.chunk, plan.kept) == (2048, kept)
    assert plan.rows_function is kernel.rows_allocated and not plan.in_place
    assert V * D not in casts_in_forward
    assert logprobs.dtype == torch.float32
    assert weight.grad.shape == weight.shape and weight.grad.dtype == dtype


def test_counted_as_gpu_ends_with_its_block():
    x = torch.empty(1)
    with counted_as_gpu():
        with counted_as_gpu():
            assert device_kind(x) == "cuda"
        assert device_kind(x) == "cuda"
    assert device_kind(x) == "cpu"
    with pytest.raises(KeyError), counted_as_gpu():
        raise KeyError
    assert device_kind(x) == "cpu"


def test_under_checkpointing_and_accumulated_with_a_tied_head():
    """The same tensor embeds and predicts, the body is recomputed, and two microbatches add up to
    one batch.
    """
    torch.manual_seed(0)
    ids = torch.randint(211, (2, 12))

    def run(use_checkpoint, parts, own):
        torch.manual_seed(1)
        embedding, body = torch.nn.Embedding(211, 16), torch.nn.Linear(16, 16)

        def logprobs(rows):
            hidden = torch.tanh(body(embedding(rows[:, :-1]))).flatten(0, 1)
            targets = rows[:, 1:].flatten()
            if own:
                return logprob_from_logits(hidden @ embedding.weight.T, targets)
            return linear_logprob(hidden, embedding.weight, targets)

        for rows in ids.chunk(parts):
            out = (
                checkpoint(logprobs, rows, use_reentrant=False)
                if use_checkpoint
                else logprobs(rows)
            )
            out.sum().backward()
        return embedding.weight.grad, body.weight.grad

    expected = run(False, 1, own=True)
    for use_checkpoint, parts in product([False, True], [1, 2]):
        for a, b in zip(run(use_checkpoint, parts, own=False), expected, strict=True):
            assert error(a, b.double()) < 1e-5


def test_autocast_changes_nothing():
    case = inputs(9, 8, 101)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_logprob(*case[:2], case[3])
    assert torch.equal(inside, linear_logprob(*case[:2], case[3]))


def test_mixed_dtypes_are_promoted():
    """fp32 weights under bf16 hidden states: every gradient in its own dtype."""
    hidden, weight, _, targets, g = inputs(9, 8, 101)
    hidden = hidden.detach().bfloat16().requires_grad_()
    value, (dh, dw) = ours(hidden, weight, None, targets, g)
    value64, expected = reference(hidden, weight, None, targets, g)
    assert (
        error(value, value64) < 1e-6
        and dh.dtype == torch.bfloat16
        and error(dw, expected[1]) < 1e-5
    )


def test_errors_say_what_to_do():
    hidden, weight, _, targets, _ = inputs(5, 8, 11)
    with pytest.raises(ValueError, match=r"hidden \[T, D\].*got \[\[1, 5, 8\]"):
        linear_logprob(hidden[None], weight, targets)
    with pytest.raises(ValueError, match="targets"):
        linear_logprob(hidden, weight, targets[:4])
    with pytest.raises(ValueError, match="integer"):
        linear_logprob(hidden, weight, targets.float())
    with pytest.raises(ValueError, match="fp16"):
        linear_logprob(hidden.half(), weight.half(), targets)
    assert linear_logprob(hidden.detach().half(), weight.detach().half(), targets).isfinite().all()


class Toy(torch.nn.Module):
    """A tied model whose log-probs are computed in the root's forward, as in the trainer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body = torch.nn.Embedding(211, 16), torch.nn.Linear(16, 16)

    def forward(self, ids):
        hidden = torch.tanh(self.body(self.embedding(ids[:, :-1]))).flatten(0, 1)
        return linear_logprob(hidden, self.embedding.weight, ids[:, 1:].flatten())


BATCHES = torch.randint(211, (4, 2, 9), generator=torch.Generator().manual_seed(1))


def two_ranks(rank, folder):
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for dtype in (torch.float32, torch.bfloat16):
        model, policy = Toy(), MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        fully_shard(model.body, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        for i, batch in enumerate(BATCHES[rank::2]):  # two microbatches each, reduced once
            model.set_requires_gradient_sync(i == 1)
            (model(batch) * 2).sum().backward()  # FSDP averages over the two ranks
        gradients = [p.grad.full_tensor() for p in model.parameters()]
        if rank == 0:
            torch.save(gradients, f"{folder}/{dtype}.pt")
    with pytest.raises(ValueError, match="sharded"):
        linear_logprob(torch.zeros(1, 16), model.embedding.weight, torch.zeros(1, dtype=torch.long))
    # Not the interpreter's usual exit: a thread of gloo that still holds a tensor of the last
    # collective would wait for the GIL of an interpreter that has ended, and abort the process
    # (pytorch/pytorch#179291), as 5 of 30 runs did.
    os._exit(0)


def test_sharded_and_accumulated(tmp_path):
    """Law 5: the tied weight's gradient over two ranks and two microbatches each is that of one
    process. With fp32 to 1e-6, with bf16 parameters as far as those allow. Outside the root's
    forward the sharded weight is refused.
    """
    torch.multiprocessing.spawn(two_ranks, (str(tmp_path),), nprocs=2)
    model = Toy()
    for batch in BATCHES:
        model(batch).sum().backward()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.02)):
        for got, p in zip(torch.load(tmp_path / f"{dtype}.pt"), model.parameters(), strict=True):
            assert error(got, p.grad.double()) < tolerance


# ---- heads of real models ----------------------------------------------------------------------

ARCHITECTURES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "hyperclovax": {"logits_scaling": 3.0},
    "minicpm3": {
        "dim_model_base": 16,
        "head_dim": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "num_key_value_heads": 4,
    },
    "nanochat": {"final_logit_softcapping": 2.0},
    "recurrent_gemma": {"logits_soft_cap": 2.0, "lru_width": 48},
    "xlstm": {"embedding_dim": 48, "num_heads": 4, "output_logit_soft_cap": 2.0},
    "phi": {},  # bias
    "gptj": {"rotary_dim": 8},  # bias
    "gpt2": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 48},
}


def model_of(arch, **overrides):
    from transformers import AutoModelForCausalLM

    from small_models import (
        config,
    )  # not at the top: the two ranks above import this file, and need no transformers

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config(arch, **{"hidden_size": 48, "initializer_range": 0.2} | overrides)
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:  # biases start at zero, where a forgotten one is not seen
                p += torch.randn_like(p) * 0.1
    return model.eval()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_lm_head_gives_the_models_own_log_probs(arch):
    """Law 10: bias, scale and soft-cap as the model itself applies them, which its config alone
    does not tell.
    """
    model = model_of(arch, **ARCHITECTURES[arch])
    ids = torch.randint(3, 300, (1, 14))
    with torch.no_grad():
        own = logprob_from_logits(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:])
        hidden = model.base_model(ids, use_cache=False)[0][0, :-1]  # [T, D]
        assert torch.allclose(
            linear_logprob(hidden, targets=ids[0, 1:], **lm_head(model)), own, atol=2e-6
        )
        bare = linear_logprob(hidden, model.get_output_embeddings().weight, ids[0, 1:])
    special = {"llama", "qwen2", "gpt2", "opt"}
    assert (
        arch in special or (bare - own).abs().max() > 1e-3
    )  # the test would see a factor left out


def test_lm_head_refuses_what_it_cannot_express():
    with pytest.raises(ValueError, match="BertLMHeadModel: cls has weights too"):
        lm_head(model_of("bert", is_decoder=True))
    with pytest.raises(ValueError, match="logit_scale=0.5, unknown to lm_head for mpt"):
        lm_head(model_of("mpt", d_model=48, n_heads=4, n_layers=1, logit_scale=0.5))
    model = model_of("llama")
    model.config.final_logit_mult = 3.0
    with pytest.raises(ValueError, match="final_logit_mult=3.0"):
        lm_head(model)
    model.set_output_embeddings(torch.nn.Sequential(model.lm_head))
    with pytest.raises(ValueError, match="Sequential, not a plain"):
        lm_head(model)


# ---- the file and its page ---------------------------------------------------------------------


def test_needs_no_triton():
    """A CPU machine without Triton imports it and gets the torch rows."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from kernels.logprob import linear_logprob, triton
assert triton is None
print(linear_logprob(torch.ones(2, 3), torch.eye(3), torch.tensor([0, 2])).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("[-1.0986")


def test_the_page_s_ten_lines_run():
    """docs/kernel.md: every python block runs as pasted, in order."""
    blocks = (ROOT / "docs/kernel.md").read_text().split("```python\n")[1:]
    assert blocks
    scope = {}
    for block in blocks:
        exec(block.split("```")[0], scope)


def test_bench_runs_on_a_cpu(tmp_path):
    """One command, one table, at a small size; a peer that is not installed says so in its row."""
    command = [sys.executable, "-m", "bench.kernel", "--shapes", "64x16x211", "--repeats", "1"]
    command += ["--save", tmp_path / "t.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "t.md").read_text()
    assert "ours, stash" in table and "three GEMMs" in table and "torch " in table
    assert table.strip() in done.stdout
