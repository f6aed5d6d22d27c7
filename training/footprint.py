"""What a training step costs, before and after it ran: useful flops, and bytes of GPU memory.

    flops(weights, config, lengths)     of forward and backward; over the GPU's peak they are the MFU
    figures(policy, …)                  a run's speed, memory and MFU, for its metadata
    predict(policy, gathered, …)        what it would need on a GPU: dpo_train.py --dry_run, on a laptop

Flops are the useful ones: each prompt once, no padding, nothing recomputed. For pairs of p + c + r
tokens, L layers of N weights in all, H heads of d, a vocabulary of V and hidden states of D:

    6 N (p + c + r)      2 flops a weight and token, three times: forward, and backward to inputs and to weights
    6 V D (c + r)        the head, which sees nothing but answers
    12 L H d a           a: (query, key) pairs that the causal mask leaves; a sliding window is not looked at

Bytes are not estimated but counted. The model is built with its real shapes, one microbatch runs
forward and backward on tensors without content (FakeTensorMode), and `Live` adds up what every
operation allocates and what becomes free.
"""

import resource
import weakref

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import attention, logprob
from training.batches import collate, cost
from training.fsdp import layers_of, room_to_stay_gathered

PEAK = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
}  # data sheets: dense bf16 flop/s, SXM


def peak_flops(device) -> float | None:
    """Dense bf16 flop/s of this GPU; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for gpu, flops in PEAK.items() if gpu in name), None)


def peak_memory(device) -> dict[str, int]:
    """Bytes: of tensors on a GPU, and of what the allocator took for them; of the whole process
    without one.
    """
    if device.type == "cuda":
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def matmul_weights(layers, config) -> float:
    """N: weights of `layers` that a token is multiplied with. Experts are stacked, [E, …], and a
    token sees a few.
    """
    used = getattr(config.get_text_config(), "num_experts_per_tok", None)
    weights = [p for layer in layers for p in layer.parameters() if p.ndim > 1]
    return sum(p.numel() * (used / len(p) if used and p.ndim == 3 else 1) for p in weights)


def attention_width(config) -> int:
    """Heads times their size, summed over the layers. AttributeError where `config` does not say."""
    layers = getattr(config, "per_layer_config", None)  # Gemma 4's layers differ
    width = 0
    for layer in layers or [config] * config.num_hidden_layers:
        heads = layer.num_attention_heads
        width += heads * (getattr(layer, "head_dim", None) or layer.hidden_size // heads)
    return width


def flops(weights: float, config, lengths: list[tuple[int, int, int]]) -> float | None:
    """Useful flops of forward and backward over pairs of (prompt, chosen, rejected) tokens;
    weights: N.

    None where the config does not tell the sizes that this needs: recurrent models, and some with
    words of their own.
    """
    c = config.get_text_config()
    try:
        width, head = attention_width(c), c.vocab_size * c.hidden_size
    except AttributeError:
        return None
    total = 0.0
    for p, y, n in lengths:
        looks = (p + y) * (p + y + 1) / 2 + n * p + n * (n + 1) / 2
        total += 6 * weights * (p + y + n) + 6 * head * (y + n)
        total += 12 * width * looks
    return total


def figures(
    policy, done: list[tuple[int, int, int]], seconds: float, device, dtype: str, world: int
) -> dict:
    """What the steps of this process did: `done` are the (prompt, chosen, rejected) tokens of all
    ranks' pairs.
    """
    result = {"tokens_since_start": sum(map(sum, done)), "seconds_since_start": round(seconds, 2)}
    result |= peak_memory(device)
    if seconds:  # a run that was killed after its last step has none left
        weights = matmul_weights(layers_of(policy), policy.model.config)
        work = flops(weights, policy.model.config, done)
        if work is not None:
            result["model_flops_per_second"] = work / seconds
            if dtype == "bf16" and (peak := peak_flops(device)):
                result["mfu"] = work / seconds / (peak * world)
    return result


class Live(TorchDispatchMode):
    """Bytes of the tensors made while it is on that are still alive: `now`, and the `peak`.
    `others`: not counted.
    """

    def __init__(self, others):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet(t.untyped_storage() for t in others)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for storage in (
            t.untyped_storage() for t in tree_leaves(result) if isinstance(t, torch.Tensor)
        ):
            if storage not in self.known:  # a view or a result in place is nothing new
                self.known.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def predict(policy, gathered, tokens: int, packing: str) -> dict[str, int]:
    """Bytes of rank 0, which has the largest shards, on a GPU; docs/scaling.md explains the rows.

    policy: the FSDP root on the meta device, in fp32. gathered: a function that makes the same one
    whole, in the dtype of the products. tokens, packing: of the microbatch, whose pairs have
    UltraFeedback's proportions, 200 + 350 + 350. For a process that ends with it: code for a CPU is
    made to allocate as that for a GPU does.
    """
    attention._flash_takes = lambda q, v: True
    logprob.rows_torch = lambda x, *_: x.new_empty(2, len(x)).unbind()
    logprob.CHUNK = {"cpu": logprob.CHUNK["cuda"]}
    logprob.STASH_BYTES = {"cpu": logprob.STASH_BYTES["cuda"]}
    n, sizes = max(1, tokens // 900), {"prompt": 4, "chosen": 7, "rejected": 7}
    unit = tokens / n / cost({k: range(size) for k, size in sizes.items()}, packing)
    pair = {k: np.zeros(max(1, int(unit * size)), np.int32) for k, size in sizes.items()}
    share = sum(p.to_local().numel() for p in policy.parameters())
    total = sum(p.numel() for p in policy.parameters())
    layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(policy)]
    marks = []  # bytes alive behind the base model, and behind the log-probs
    with FakeTensorMode(allow_non_fake_inputs=True):
        whole, batch = gathered(), collate([pair] * n, packing, "cpu")
        size = next(whole.parameters()).element_size()
        for p in (p for layer in layers_of(whole) for p in layer.parameters()):
            p.register_post_accumulate_grad_hook(
                lambda p: setattr(p, "grad", None)
            )  # FSDP takes a layer's at once
        with Live(whole.parameters()) as live:
            logprob.backbone(whole.model).register_forward_hook(lambda *_: marks.append(live.now))
            logprobs = whole(batch)
            marks.append(live.now)
            logprobs.sum().backward()
    return {
        "weights, fp32, this rank's share": 4 * share,
        "Adam's two states, fp32, the same share": 8 * share,
        "gradients, fp32, the same share": 4 * share,
        "embedding, norm and head, gathered": size * (total - sum(layers)),
        "a layer and the next, gathered": 2 * size * max(layers),
        "a layer's gradient, and in fp32 to be reduced": (size + 4) * max(layers),
        f"activations that {n} pairs of {cost(pair, packing):,} tokens keep": marks[0],
        "what their log-probs keep": marks[1] - marks[0],
        "working memory, and the head's gradient": live.peak - marks[1],
    }


def table(rows: dict[str, int], offload: bool) -> str:
    """Lines of predict()'s rows in GiB, and their sum; with `offload` the shares are in host memory
    and not summed.
    """
    host = [row for row in rows if offload and row.endswith("share")]
    lines = [
        f"{size / 2**30:10.2f}  {row}{' (host memory)' if row in host else ''}"
        for row, size in rows.items()
    ]
    total = sum(size for row, size in rows.items() if row not in host)
    return "\n".join([*lines, f"{total / 2**30:10.2f}  sum on the GPU"])


def staying_gathered(rows: dict[str, int], policy, dtype: torch.dtype, offload: bool) -> str:
    """The line below the table for a rank that shares its weights with nobody: what they take if
    they stay gathered.

    rows: predict()'s, whose sum has two layers gathered at a time; policy, dtype: as there.
    """
    weights = sum(p.numel() for p in policy.parameters())
    already = sum(size for row, size in rows.items() if row.endswith("gathered"))
    more = dtype.itemsize * weights - already
    room = room_to_stay_gathered(weights, dtype, offload)
    where = f"on a GPU with {room / 2**30:.1f} GiB free at the start"
    return f"{more / 2**30:10.2f}  more {where}: all weights stay gathered within a step"
