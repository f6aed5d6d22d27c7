"""The branches that only a GPU takes, run without one: shapes, dtypes, devices, arguments.

    bash tools/versions.sh cuda           make an environment with the CUDA build of torch; run this
    python tests/cuda_branches.py         run it in such an environment: a line per case
    python tests/cuda_branches.py score   only the cases whose names begin so

Tensors are torch's fake ones: they say that they are on "cuda", and they have shapes and dtypes,
but no content. Every operation checks its arguments as the real one does and gives a result of the
right shape. So what fails here fails on a GPU: an argument that this torch does not have
(`enable_gqa` in 2.11), a dtype that a product refuses, a tensor left on the CPU. The cases of the
trainer also show that nothing there waits for the device: a fake tensor has no number to wait for.

What this does not show: any number, speed or memory; the Triton kernel (Launch below looks at what
it is given, tests/test_logprob_triton.py interprets and compiles it); random generators on the
device; torch.inference_mode, in which fake tensors do not work; FSDP and NCCL; copies through
pinned memory; reading weights; vLLM. transformers recognises fake tensors and does not ask for
their values, so it builds a padded batch's mask even where it could leave it out. torch's autograd
engine needs a device, so `backward` below does its work and calls the same nodes.
"""

import inspect
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dpo_train
import generate
import score
from kernels import logprob
from kernels.attention import ATTENTION, packed_attention, packed_layout
from kernels.heads import lm_head
from training.batches import collate

CUDA = torch.device("cuda")
LAYERS = 2
# Qwen2.5-0.5B except for its depth: 14 query heads share 2 key heads, head and embedding are tied.
CONFIG = dict(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=LAYERS,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    pad_token_id=0,
    eos_token_id=2,
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


# ---- what replaces the device ------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts operations by name.

    With `answers` it invents the values that a program would wait for: every number is 1, every
    condition true, and every mask selects everything.
    """

    def __init__(self, answers: bool):
        super().__init__()
        self.answers, self.count = answers, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        if func is torch.ops.aten.addmm.dtype_out and torch.__version__ < (2, 13):
            return addmm_of_older_torch(*args, **kwargs)
        if self.answers:
            if func is torch.ops.aten._local_scalar_dense.default:
                return 1.0 if args[0].is_floating_point() else 1
            if func is torch.ops.aten.nonzero.default:
                return places(args[0])
            if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
                args = (args[0], all_of_masks(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


def addmm_of_older_torch(acc, a, b, out_dtype, *, out):
    """torch 2.11 and 2.12 take the dtype for beta when they work out the shape; devices do not."""
    product = torch.mm(a, b, out_dtype=out_dtype)
    assert acc.shape == product.shape == out.shape and acc.dtype == out_dtype == out.dtype
    return out


def places(mask: torch.Tensor) -> torch.Tensor:
    """mask.nonzero() of a mask that is true everywhere, [numel, ndim]."""
    return torch.empty(mask.numel(), mask.ndim, dtype=torch.long, device=mask.device)


def all_of_masks(indices: list) -> list:
    """`indices` of a tensor, with the places of all elements instead of each mask."""
    result = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            result += places(index).unbind(1)  # a [numel] for each dimension of the mask
        else:
            result.append(index)
    return result


class Launch:
    """Replaces the Triton kernel: checks its arguments, and what it would read and write."""

    def __init__(self, device: str):
        self.device, self.launched = device, 0
        self.signature = inspect.signature(logprob.row_kernel.fn)

    def __getitem__(self, grid):
        return partial(self.launch, grid)

    def launch(self, grid, *args, num_warps, **kwargs):
        given = self.signature.bind(*args, **kwargs).arguments
        x, bias, target, q, s, d, V, stride, *_ = given.values()
        rows = len(x)
        assert grid == (rows,)
        assert x.shape == (rows, V) and x.stride() == (stride, 1)
        assert x.dtype == s.dtype == d.dtype == torch.float32
        assert target.shape == s.shape == d.shape == (rows,)
        assert given["GRAD"] == (q is not None) and given["BIAS"] == (bias is not None)
        if given["GRAD"]:
            assert q.shape == x.shape and q.stride() == x.stride()
        for tensor in (x, bias, target, q, s, d):
            assert tensor is None or tensor.device.type == self.device
        self.launched += 1


class NoGenerator:
    """Replaces torch.Generator("cuda"), which needs the device; fake tensors draw nothing."""

    def __init__(self, device):
        assert torch.device(device).type == "cuda"

    def manual_seed(self, seed: int) -> None:
        return None


@contextmanager
def fake_device(answers=False):
    """New tensors are fake, and nothing asks the driver. Yields the Operations of the block."""
    launch = Launch("cuda")
    with (
        patch.object(logprob, "row_kernel", launch),
        patch.object(torch.cuda, "device_of", lambda _: nullcontext()),
        patch.object(torch, "Generator", NoGenerator),
        # Checkpointing computes a layer again once per run of the engine, known by this number.
        patch.object(torch._C, "_current_graph_task_id", lambda: 1),
        FakeTensorMode(),
        Operations(answers) as operations,
    ):
        yield operations
    operations.count["row_kernel"] = launch.launched


@torch.no_grad()
def backward(output: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
    """{leaf: its gradient} of output.sum(), node by node as torch's engine does it."""
    # node -> which output of it -> gradient
    grads = {output.grad_fn: {output.output_nr: torch.ones_like(output)}}
    found = {}
    for node in reversed(in_order(output.grad_fn)):
        given = grads.pop(node, None)
        if given is None:  # nothing that the loss depends on
            continue
        if hasattr(node, "variable"):  # a leaf
            found[node.variable] = given[0]
            continue
        inputs = []
        for i, meta in enumerate(node._input_metadata):
            gradient = given.get(i)
            if gradient is None:  # the loss does not depend on this output
                gradient = torch.zeros(meta.shape, dtype=meta.dtype, device=CUDA)
            inputs.append(gradient)
        for (below, i), gradient in zip(edges(node), call(node, inputs), strict=True):
            if gradient is None:
                continue
            assert gradient.is_cuda, node.name()
            meta = below._input_metadata[i]
            # What was broadcast or promoted in the forward is undone here, as in the engine.
            gradient = gradient.sum_to_size(meta.shape).to(meta.dtype)
            sums = grads.setdefault(below, {})
            sums[i] = sums[i] + gradient if i in sums else gradient
    return found


def edges(node) -> list:
    """(node, which of its outputs) that gradients of `node` go to."""
    return [edge for edge in node.next_functions if edge[0] is not None]


def call(node, inputs: list) -> list:
    """The gradients that `node` hands on, one for each of edges(node)."""
    if callable(node):
        results = node(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        needed = [edge[0] is not None for edge in node.next_functions]
    else:  # a Function written in Python has a result for each argument, tensor or not
        results = node.apply(*inputs)
        needed = node.needs_input_grad  # torch's own Functions add one None after those
    return [gradient for gradient, need in zip(results, needed, strict=False) if need]


def in_order(root) -> list:
    """The nodes of the graph above `root`, each after all nodes that it passes gradients to."""
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(below, False) for below, _ in edges(node)]
    return order


def check_gradients(found: dict, parameters) -> None:
    for p in parameters:
        assert found[p].shape == p.shape and found[p].dtype == p.dtype and found[p].is_cuda


# ---- the cases ---------------------------------------------------------------------------------


def network(kind, dtype: str, attention: str):
    """A Qwen2 of `kind` in `dtype`, on the fake device."""
    config = Qwen2Config(**CONFIG, num_labels=1)
    with CUDA:
        return kind.from_config(config, dtype=DTYPES[dtype], attn_implementation=attention)


def trainer(packing: str, dtype: str, mode: str) -> str:
    """dpo_train.Policy: the policy with gradients, also checkpointed, and the reference without."""
    pairs = [pair_of(200, 350, 340), pair_of(1, 1, 7), pair_of(64, 128, 128)]
    attention = "sdpa" if packing == "padded" else ATTENTION
    with fake_device() as operations:
        model = network(AutoModelForCausalLM, dtype, attention).train()
        if mode == "checkpointing":
            options = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        policy = dpo_train.Policy(model)
        batch = collate(pairs, packing, CUDA)
        with torch.set_grad_enabled(mode != "reference"):
            logprobs = policy(batch)  # [n, 2]
        assert logprobs.shape == (len(pairs), 2) and logprobs.is_cuda
        assert logprobs.dtype == torch.float32
        if mode != "reference":
            check_gradients(backward(logprobs), policy.parameters())
    forwards = 2 if mode == "checkpointing" else 1
    flash = check_flash(operations, forwards if dtype == "bf16" and packing != "padded" else 0)
    assert operations.count["row_kernel"] > 0
    assert (operations.count["aten.mm.dtype_out"] > 0) == (dtype == "bf16")
    return f"{sum(operations.count.values())} operations, {flash} of them varlen_attn"


def pair_of(prompt: int, chosen: int, rejected: int) -> dict:
    """A pair with this many tokens."""
    sizes = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {name: np.ones(size, np.int32) for name, size in sizes.items()}


def check_flash(operations: Operations, forwards: int) -> int:
    """How often varlen_attn was called, which must be once per layer and forward pass."""
    calls = operations.count["torch_attn._varlen_attn.default"]
    assert calls == LAYERS * forwards, f"{calls} calls of varlen_attn, not {LAYERS * forwards}"
    return calls


def scorer(kind: str, dtype: str) -> str:
    """score.py's packed batches: answers to a prompt share it."""
    prompts = {"one": ([5] * 40, [[6] * 3, [7] * 90, [8] * 17]), "two": ([9] * 12, [[6] * 18])}
    sequences = [
        score.TokenSequence(name, (*prompt, *answer), len(prompt))
        for name, (prompt, answers) in prompts.items()
        for answer in answers
    ]
    # `checked`, or it would compare with a sequence alone, for which transformers takes another
    # path with fake tensors than with real ones. `attention_alone` covers the path of real ones.
    common = dict(path="model", max_length=4096, tokens_per_batch=16384, packs=True, checked=True)
    common["tolerance"] = score.TOLERANCE[dtype]
    with fake_device(answers=True) as operations, torch.no_grad():
        if kind == "reference":
            model = network(AutoModelForCausalLM, dtype, ATTENTION).eval()
            vocabulary = CONFIG["vocab_size"]
            scored = score.Reference(
                network=model, head=lm_head(model), vocabulary=vocabulary, **common
            )
        else:
            model = network(AutoModelForSequenceClassification, dtype, ATTENTION).eval()
            # its last product in fp32, as load_reward_model makes it
            model.score = torch.nn.Linear(CONFIG["hidden_size"], 1, bias=False, device=CUDA)
            model.score.register_forward_pre_hook(score.inputs_to_fp32)
            scored = score.RewardModel(network=model, tokenizer=None, template_kwargs={}, **common)
        model.config.use_cache = False
        score_without_inference_mode = score.Model.score_sequences.__wrapped__
        values = score_without_inference_mode(scored, sequences)
    assert list(values) == sequences and all(isinstance(v, float) for v in values.values())
    flash = check_flash(operations, 1 if dtype == "bf16" else 0)
    return f"{sum(operations.count.values())} operations, {flash} of them varlen_attn"


def attention_alone(rows: str, dtype: str) -> str:
    """Packed attention by itself, in the two ways that the cases above do not cover.

    alone: rows without a layout, as score.py computes a sequence that it compares a batch with.
    packed: sequences that share nothing, in one row.
    """
    with fake_device() as operations:
        layout, batch = None, 2
        if rows == "packed":
            _, layout = packed_layout([100, 200], CUDA)
            batch = 1
        query = torch.empty(batch, 14, 300, 64, dtype=DTYPES[dtype], device=CUDA)
        key = torch.empty(batch, 2, 300, 64, dtype=DTYPES[dtype], device=CUDA)
        out, _ = packed_attention(torch.nn.Identity(), query, key, key, None, 0.125, layout=layout)
    assert out.shape == (batch, 300, 14, 64) and out.dtype == DTYPES[dtype] and out.is_cuda
    return f"{sum(operations.count.values())} operations"


def sampler(dtype: str) -> str:
    """generate.py --backend hf: prompts, decoding, rows that leave, log-probs at the end."""
    args = SimpleNamespace(
        num_samples=4, temperature=[1.0, 0.0], top_p=0.9, top_k=50, min_p=0.01, max_new_tokens=6
    )
    policy = SimpleNamespace(stop_ids=[2])
    prompts = [[5] * 30, [5] * 7]
    with fake_device(answers=True) as operations, torch.no_grad():
        model = network(AutoModelForCausalLM, dtype, "sdpa").eval()
        answers = generate.hf_batch(args, policy, model, prompts, [0, 1])
    assert [len(a) for a in answers] == [4, 4]
    assert operations.count["row_kernel"] > 0
    return f"{sum(operations.count.values())} operations"


def kernel(dtype: str, stash: str, head: str) -> str:
    """linear_logprob at 16k tokens of Qwen.

    stash: of how many rows Q is kept. head: "plain", "extras" (bias, scale and cap), or "frozen".
    """
    T, D, V = 16384, CONFIG["hidden_size"], CONFIG["vocab_size"]
    stash_bytes = {
        "all kept": T * V * 4,
        "partly kept": 4 << 30,
        "nothing kept": 0,
        "no gradients": 0,
    }[stash]
    extras = {"softcap": 30.0, "scale": 0.5} if head == "extras" else {}
    with fake_device() as operations:
        hidden = torch.empty(T, D, dtype=DTYPES[dtype], device=CUDA, requires_grad=True)
        weight = torch.empty(V, D, dtype=DTYPES[dtype], device=CUDA, requires_grad=head != "frozen")
        leaves = [hidden, weight]
        if head == "extras":
            extras["bias"] = torch.empty(V, dtype=DTYPES[dtype], device=CUDA, requires_grad=True)
            leaves.append(extras["bias"])
        targets = torch.empty(T, dtype=torch.long, device=CUDA)
        with torch.set_grad_enabled(stash != "no gradients"):
            logprobs = logprob.linear_logprob(  # [T]
                hidden, weight, targets, stash_bytes=stash_bytes, **extras
            )
        assert logprobs.shape == (T,) and logprobs.dtype == torch.float32
        if stash != "no gradients":
            check_gradients(backward(logprobs), [leaf for leaf in leaves if leaf.requires_grad])
    return f"{operations.count['row_kernel']} launches of the row kernel"


def cases():
    """(name, function) of each."""
    packings = ("prefix", "padded")
    modes = ("gradients", "checkpointing", "reference")
    for packing, dtype, mode in product(packings, DTYPES, modes):
        yield f"trainer {packing} {dtype} {mode}", partial(trainer, packing, dtype, mode)
    for kind, dtype in product(("reward model", "reference"), DTYPES):
        yield f"score {kind} {dtype}", partial(scorer, kind, dtype)
    for rows, dtype in product(("alone", "packed"), DTYPES):
        yield f"attention {rows} {dtype}", partial(attention_alone, rows, dtype)
    for dtype in DTYPES:
        yield f"generate hf {dtype}", partial(sampler, dtype)
    stashes = ("all kept", "partly kept", "nothing kept", "no gradients")
    for dtype, stash, head in product(DTYPES, stashes, ("plain", "extras", "frozen")):
        yield f"kernel {dtype} {stash} {head}", partial(kernel, dtype, stash, head)


if __name__ == "__main__":
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""  # only cases whose name begins like this
    for name, case in cases():
        if not name.startswith(wanted):
            continue
        print(f"{name}: {case()}", flush=True)
