"""FSDP2 for a Hugging Face model: everything about sharding, and nothing about DPO.

    start, leave              join torchrun's ranks, and leave them
    shard                     a layer is whole only while it computes; else each rank has a shard
    reshard                   drop the gathered weights before shards are changed, saved or listed
    load_weights              whole weights, which rank 0 has read, become everyone's shards
    gather_weights, export    whole weights again, on rank 0, and a Hugging Face folder

`policy` is the module that becomes the root, and `policy.model` the Hugging Face model in it.
Whatever reads a weight (the head, say) is called in the root's forward: there the weight is whole
and a plain tensor, elsewhere a shard. Every rank calls these functions, together; `export` is rank
0's alone.
"""

import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

import models
from records import Stop
from stage import barrier, say

# While rank 0 reads or writes a large model from a slow disk, the others wait in a collective.
TIMEOUT = timedelta(hours=2)


def start() -> torch.device:
    """Join torchrun's ranks, or make a group of one, so that no other code treats that case."""
    cuda = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, timeout=TIMEOUT, rank=0, world_size=1, store=store)
    if not cuda:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def leave() -> None:
    """Leave the other ranks."""
    barrier()
    # A thread of gloo may still hold a tensor of the last collective. If it releases the tensor
    # after the interpreter has ended, the process aborts (pytorch/pytorch#179291). This sleep gives
    # it the time to do so before.
    time.sleep(0.1)
    dist.destroy_process_group()


def layers_of(policy) -> list:
    return [m for m in policy.modules() if isinstance(m, GradientCheckpointingLayer)]


# ---- sharding ----------------------------------------------------------------------------------


def shard(policy, dtype, size: int | None, offload: bool, device_type: str, world: int):
    """`policy` as the FSDP root: parameters become shards, layers work in `dtype`.

    A parameter's own dtype may be another: fp32 masters, or frozen weights as the files have them.
    All that have a gradient must share one. Gradients are summed in fp32. size: ranks that share
    one copy of the weights, None for all `world` of them; else each group of so many has a copy,
    and their gradients are added up (HSDP). offload: shards and the optimizer's step in host
    memory.
    """
    options = {
        "mesh": mesh_of(device_type, world, size),
        "mp_policy": MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    stays = stays_gathered(policy, dtype, size or world, offload, device_type)
    if stays:
        options["reshard_after_forward"] = False
        say("there is room: the weights stay gathered from a step's first microbatch to its last")
    for layer in layers_of(policy):
        fully_shard(layer, **options)
    # Embedding, norm and head stay together in the root: they may be tied.
    root = fully_shard(policy, **options)
    root.set_reshard_after_backward(not stays)
    return root


def mesh_of(device_type: str, world: int, size: int | None) -> DeviceMesh:
    """A mesh of all ranks, or of copies of the weights x the `size` neighbours that share one."""
    if size is None:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shards",))
    grid = torch.arange(world).view(-1, size)  # [copies, size]
    # init_device_mesh would make these groups with torch's timeout, 10 minutes with NCCL.
    shards, _ = dist.new_subgroups_by_enumeration(grid.tolist(), timeout=TIMEOUT)
    copies, _ = dist.new_subgroups_by_enumeration(grid.T.tolist(), timeout=TIMEOUT)
    names = ("copies", "shards")
    return DeviceMesh.from_group([copies, shards], device_type, grid, mesh_dim_names=names)


def room_to_stay_gathered(policy, dtype: torch.dtype, offload: bool) -> int:
    """Bytes of a GPU that must be free at the start for all weights to stay gathered in `dtype`.

    The gathered copy may take, with what stands beside it, a quarter of the GPU; or half of it with
    gradient checkpointing, which keeps few activations. Beside it stand 16 bytes per trained weight
    (the fp32 weight, its gradient, Adam's two states) and a frozen weight as it is; nothing with
    offload.
    """
    copy, beside = 0, 0
    for parameter in policy.parameters():
        copy += parameter.numel() * dtype.itemsize
        beside += parameter.numel() * (16 if parameter.requires_grad else parameter.itemsize)
    share = 2 if policy.model.is_gradient_checkpointing else 4
    return share * (copy + (0 if offload else beside))


def stays_gathered(policy, dtype, ranks_per_copy: int, offload: bool, device_type: str) -> bool:
    """Whether the weights stay gathered between microbatches, and are gathered once per step.

    FSDP2 casts and copies every weight for each forward and each backward, even if one rank holds
    all of them and there is nothing to gather. That wastes time if there is memory to keep them.
    """
    if device_type != "cuda" or ranks_per_copy > 1:
        return False
    free, _ = torch.cuda.mem_get_info()
    return room_to_stay_gathered(policy, dtype, offload) <= free


def reshard(policy) -> None:
    """Drop all gathered weights, so that policy.parameters() are the shards again.

    The next forward gathers them again. After a forward without a backward the root is still whole,
    and with stays_gathered everything is.
    """
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # this module's own weights, not its children's


def load_weights(policy, source, more: dict, device, offload: bool) -> None:
    """Give the sharded `policy`, which is on the meta device, memory and the weights of `source`.

    source: the same model, whole, on rank 0; None elsewhere. more: on rank 0, the weights that
    `source` has not, by name: the factors of LoRA.
    """
    model = policy.model
    policy.to_empty(device="cpu" if offload else device)
    model.tie_weights()
    check_tie(model)

    weights = {} if source is None else source.state_dict() | more
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)

    # Rotary frequencies and similar buffers are in no state dict.
    for name, buffer in model.named_buffers():
        if source is not None:
            value = source.get_buffer(name).to(device, buffer.dtype)
        else:
            value = torch.empty_like(buffer, device=device)
        dist.broadcast(value, 0)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, value)


def check_tie(model) -> None:
    """Stop if a weight that is used in two places would become two weights."""
    name = type(model).__name__
    if getattr(model.config, "tie_word_embeddings", False):  # Inkling's config has no such field
        if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
            raise Stop(
                f"{name}: cannot be trained: its config ties head and embedding, its code does not."
            )
    shared = shared_weight(model)
    if shared:
        raise Stop(
            f"{name}: cannot be trained: {shared[0]} and {shared[1]} are one weight, and FSDP "
            "shards each layer for itself."
        )


def shared_weight(model) -> tuple[str, str] | None:
    """Two names of one weight within the layers, where layers share any, as Zamba's do."""
    inside = {id(p) for layer in layers_of(model) for p in layer.parameters()}
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in names:
            return names[id(parameter)], name
        if id(parameter) in inside:
            names[id(parameter)] = name
    return None


# ---- the end -----------------------------------------------------------------------------------


def gather_weights(policy) -> dict[str, torch.Tensor]:
    """All weights in training, whole, in fp32 and host memory, on rank 0; {} elsewhere."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(policy.model, options=options)


def export(weights: dict, model: str, dtype, tokenizer, folder: Path) -> dict[str, float]:
    """Write `weights` in `dtype` (None: that of `model`) as a folder like `model`.

    Returns changed_weights, for the metadata: the share of them that differ from those of `model`.
    """
    # The model is loaded again, because it knows how to save itself. It computes nothing, so any
    # attention will do.
    result = models.load_model(AutoModelForCausalLM, model, dtype or "auto", "eager")
    total, changed = 0, 0
    for name, before in result.named_parameters():  # a tied weight once
        total += before.numel()
        if name not in weights:  # frozen by the model's own code, as AFMoE's biases of routers
            continue
        after = weights[name].to(before.dtype)
        if not after.isfinite().all():
            raise Stop(
                f"{folder.name}: not saved: after training {name} is not finite in {after.dtype}. "
                "Begin again (--overwrite) with a lower --learning_rate, or with --save_dtype fp32."
            )
        changed += (after != before).sum().item()
    result.load_state_dict(result.state_dict() | weights)
    write_folder(result, tokenizer, folder)
    return {"changed_weights": changed / total}


def write_folder(model, tokenizer, folder: Path) -> None:
    """A Hugging Face folder."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        # Some hub models set temperature but not do_sample, which transformers reads and will not
        # write.
        model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
