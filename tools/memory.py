"""The memory of one rank in training on a GPU, computed on a machine that needs none.

    python tools/memory.py --model Qwen/Qwen2.5-7B-Instruct --gradient_checkpointing --world_size 8
    python tools/memory.py --model Qwen/Qwen2.5-7B-Instruct --gradient_checkpointing --lora_rank 16

This needs only the model's config.json: no weights, no pairs, no GPU. The other flags are
dpo_train.py's.

Bytes are counted, not estimated. The model is built with its real shapes; one microbatch runs
forward and backward on tensors without content (FakeTensorMode); and `Live` adds up what every
operation allocates and what is freed. docs/scaling.md explains the rows.
"""

import sys
import weakref
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root
import dpo_train
import models
from arguments import integer_in, parse, parser
from kernels.device import counted_as_gpu
from kernels.logprob import backbone
from records import Stop
from stage import run, say
from training import flags, lora, network
from training.batches import collate
from training.fsdp import layers_of, room_to_stay_gathered
from training.plans import cost

# UltraFeedback's proportions: a prompt of 200 tokens and two answers of 350.
PROMPT, ANSWER = 200, 350


def arguments():
    p = parser(__doc__)
    p.add_argument("--model", required=True, help="a folder or a hub name[@revision]")
    p.add_argument(
        "--world_size", type=integer_in("[1, inf)"), default=1, help="number of GPUs; default 1"
    )
    flags.add_lora(p.add_argument)
    flags.add_memory_and_speed(p.add_argument)
    return p


class Live(TorchDispatchMode):
    """Bytes of the tensors made while it is on that are still alive: `now`, and the `peak`.

    others: tensors that are not counted.
    """

    def __init__(self, others):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in others)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf.untyped_storage())
        return result

    def see(self, storage) -> None:
        if storage in self.known:  # of a view, or of a result in place
            return
        self.known.add(storage)
        self.add(storage.nbytes())
        weakref.finalize(storage, self.add, -storage.nbytes())

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def example_pairs(tokens: int, packing: str) -> list[dict]:
    """Pairs of UltraFeedback's proportions that fill a microbatch of `tokens` tokens."""
    n = max(1, tokens // (PROMPT + 2 * ANSWER))
    whole = {"prompt": range(PROMPT), "chosen": range(ANSWER), "rejected": range(ANSWER)}
    scale = tokens / n / cost(whole, packing)
    p, a = max(1, int(scale * PROMPT)), max(1, int(scale * ANSWER))
    ids = np.zeros(max(p, a), np.int32)
    pair = {"prompt": ids[:p], "chosen": ids[:a], "rejected": ids[:a]}
    return [pair] * n


def forget_gradient(parameter) -> None:
    """FSDP takes a layer's gradient as soon as it exists."""
    parameter.grad = None


def count_activations(make_policy, pairs: list[dict], packing: str) -> tuple[int, int, int]:
    """Bytes in use after the layers, how many more after the log-probs, and more at the peak.

    make_policy: a function that makes the policy whole, in the dtype of the products.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), counted_as_gpu():
        policy = make_policy()
        batch = collate(pairs, packing, "cpu")
        for layer in layers_of(policy):
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(forget_gradient)
        with Live(policy.parameters()) as live:
            behind_layers = []
            backbone(policy.model).register_forward_hook(lambda *_: behind_layers.append(live.now))
            logprobs = policy(batch)
            behind_logprobs = live.now
            logprobs.sum().backward()
    layers = behind_layers[0]
    return layers, behind_logprobs - layers, live.peak - behind_logprobs


def predict(policy, make_policy, tokens: int, packing: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of rank 0, which has the largest shards, on a GPU; one row per purpose.

    policy: the FSDP root on the meta device, as it is trained. make_policy: makes it whole, in
    `dtype`. tokens: of the microbatch.
    """
    layers = layers_of(policy)
    in_layers = [count(layer, trained=False) for layer in layers]
    trained_in_layers = [count(layer, trained=True) for layer in layers]
    total = count(policy, trained=False)
    share, frozen_bytes = shares(policy)
    pairs = example_pairs(tokens, packing)
    activations, logprobs, working = count_activations(make_policy, pairs, packing)
    size = dtype.itemsize
    kept = f"{len(pairs)} pairs of {cost(pairs[0], packing):,} tokens"

    trained, head = "weights", ", and the head's gradient"
    rows = {}
    if frozen_bytes:
        trained, head = "factors", ""
        stored = policy.model.get_input_embeddings().weight.dtype
        rows[f"frozen weights, {stored}, this rank's share"] = frozen_bytes
    return rows | {
        f"{trained}, fp32, this rank's share": 4 * share,
        "Adam's two states, fp32, the same share": 8 * share,
        "gradients, fp32, the same share": 4 * share,
        "embedding, norm and head, gathered": size * (total - sum(in_layers)),
        "a layer and the next, gathered": 2 * size * max(in_layers),
        "a layer's gradient, and in fp32 to be reduced": (size + 4) * max(trained_in_layers),
        f"activations that {kept} keep": activations,
        "what their log-probs keep": logprobs,
        f"working memory{head}": working,
    }


def count(module, trained: bool) -> int:
    """The number of weights of all ranks, or of those in training."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def shares(policy) -> tuple[int, int]:
    """This rank's: the number of weights in training, and the bytes of those that are frozen."""
    trained, frozen_bytes = 0, 0
    for parameter in policy.parameters():
        size = parameter.to_local().numel()
        if parameter.requires_grad:
            trained += size
        else:
            frozen_bytes += size * parameter.itemsize
    return trained, frozen_bytes


def table(rows: dict[str, int], offload: bool) -> str:
    """predict()'s rows in GiB, and their sum. offload: shares in host memory are not summed."""
    lines = []
    total = 0
    for row, size in rows.items():
        in_host_memory = offload and row.endswith("share")
        if in_host_memory:
            row += " (host memory)"
        else:
            total += size
        lines.append(f"{size / 2**30:10.2f}  {row}")
    lines.append(f"{total / 2**30:10.2f}  sum on the GPU")
    return "\n".join(lines)


def staying_gathered(rows: dict[str, int], policy, dtype: torch.dtype, offload: bool) -> str:
    """The line for a rank that shares its weights with no other rank: what they take if they stay
    gathered.

    rows: predict()'s, whose sum has two layers gathered at a time.
    """
    weights = sum(p.numel() for p in policy.parameters())
    already = sum(size for row, size in rows.items() if row.endswith("gathered"))
    more = dtype.itemsize * weights - already
    room = room_to_stay_gathered(policy, dtype, offload)
    where = f"on a GPU with {room / 2**30:.1f} GiB free at the start"
    return f"{more / 2**30:10.2f}  more {where}: all weights stay gathered within a step"


def rows_of(args) -> tuple[dict[str, int], object]:
    """predict()'s rows for these arguments, and the sharded policy on the meta device."""
    if args.world_size < 1:
        raise Stop("--world_size must be at least 1")
    flags.check_shard_size(args.shard_size, args.world_size)
    if args.dtype == "auto":
        args.dtype = "bf16"  # as on a GPU
    lora.settle_arguments(args)
    dtype = dpo_train.DTYPES[args.dtype]
    config = models.load_config(args.model)
    args.packing = network.choose_packing(args.packing, config, PROMPT + ANSWER, args.model)

    # Collectives that do nothing: shapes are all that is needed.
    dist.init_process_group("fake", rank=0, world_size=args.world_size)
    with_factors = args.lora_rank is not None
    policy = dpo_train.build_policy(args.model, config, args, with_factors, "cpu", args.world_size)

    def make_policy():
        return dpo_train.unsharded_policy(args.model, config, args, with_factors, dtype)

    rows = predict(policy, make_policy, args.tokens_per_batch, args.packing, dtype)
    return rows, policy


def main():
    args = parse(arguments())
    rows, policy = rows_of(args)
    lines = table(rows, args.cpu_offload)
    if (args.shard_size or args.world_size) == 1:
        dtype = dpo_train.DTYPES[args.dtype]
        lines += "\n" + staying_gathered(rows, policy, dtype, args.cpu_offload)
    say(f"{args.model}, rank 0 of {args.world_size}, {args.dtype}, GiB:\n{lines}")


if __name__ == "__main__":
    run(main)
