"""Checkpoints of a training: whole or absent, and read as data: nothing in them is executed.

    save_checkpoint    shards of trained weights and Adam states, written by all ranks together
    load_checkpoint    and back; another number of ranks may resume from them

A checkpoint is a folder step_000012:

    .metadata                    which part of which tensor stands where: a pickle
    __0_0.distcp __1_0.distcp    the parts, from each rank that had any
    sums.json                    sha256 of each of these files

torch.distributed.checkpoint writes all but the last, and would notice neither a flipped bit in a
weight nor a program that somebody has put into a pickle. So each file must have its sum, and only
what a checkpoint needs is unpickled. What is refused ends every rank with the same message.
"""

import io
import json
import pickle
import re
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from records import Stop, remove, whole, write_whole
from stage import barrier, hash_path, ranks

METADATA = ".metadata"
SUMS = "sums.json"
REMEDY = "Remove that folder and run the same command again: training begins at its first step."

# What .metadata is made of, beside numbers, strings and dtypes.
CLASSES = {
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    "torch.Size",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",  # its name in Python 3.13
}


def step_of(folder: Path) -> int:
    """The number of steps that a checkpoint has done, by its name."""
    return int(folder.name.removeprefix("step_"))


def checkpoints(parts: Path) -> list[Path]:
    """All checkpoints, the last one last."""
    found = [path for path in parts.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted(found, key=step_of)


def from_rank_0(value):
    """What `value` is on rank 0, on every rank."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


# ---- saving ------------------------------------------------------------------------------------


def save_checkpoint(parts: Path, policy, optimizer, step: int) -> None:
    """Trained weights and Adam states of all ranks as parts/step_000012, whole or not at all.

    Only the last one is kept. Nothing else needs saving: training draws no random number, and the
    order of the pairs is a function of (seed, epoch). Raises OSError on all ranks where one cannot
    write, and leaves the checkpoint before.
    """
    rank, _ = ranks()
    folder = parts / f"step_{step:06d}"
    # Rank 0 answers for the folder: it renames what is whole, and removes what is not.
    place = whole(folder) if rank == 0 else nullcontext()
    with place as temporary:
        temporary = from_rank_0(temporary)
        write_shards(temporary, policy, optimizer)
        write_sums(temporary)
    if rank == 0:
        for old in checkpoints(parts):
            if old != folder:
                remove(old)
    barrier()


def shards_in_training(policy, optimizer) -> dict[str, dict]:
    """This rank's shards of the weights and Adam states; frozen weights are in --model."""
    weights, adam = get_state_dict(policy, optimizer)
    for name, parameter in policy.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            weights.pop(name, None)  # a tied weight has two names, and may stand there once
    return {"weights": weights, "adam": adam}


def write_shards(folder: Path, policy, optimizer) -> None:
    try:
        dcp.save(shards_in_training(policy, optimizer), storage_writer=Writer(folder))
    except CheckpointException as e:
        cause = cause_of(e)
        if isinstance(cause, OSError) and not cause.filename:
            cause.filename = str(folder)
        raise cause from e


class Writer(dcp.FileSystemWriter):
    """torch's writer. Where the disk is full, it lets the kernel's error out.

    torch.save meets that error, closes its file all the same, and fails again: "unexpected pos".
    """

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except RuntimeError as e:
            cause = os_error_behind(e)
            if cause is None:
                raise
            raise cause from None


def os_error_behind(exception: BaseException | None) -> OSError | None:
    """The OSError during whose handling `exception` was raised."""
    while exception and not isinstance(exception, OSError):
        exception = exception.__context__
    return exception


def write_sums(folder: Path) -> None:
    """Rank 0 writes sums.json, of what all ranks have hashed."""
    rank, _ = ranks()
    # The names are in .metadata. A listing of a network's file system may lag behind.
    names = [METADATA, *files_of(read_metadata(folder))] if rank == 0 else None
    sums = hash_files(folder, from_rank_0(names))
    if rank == 0:
        write_whole(folder / SUMS, json.dumps(sums, indent=1) + "\n")


def hash_files(folder: Path, names: list[str]) -> dict[str, str | None]:
    """sha256 of each file, None where there is none. Each rank reads a share of them."""
    rank, world = ranks()
    mine = {}
    for name in names:
        if writer_of(name) % world == rank:
            mine[name] = hash_path(folder / name) if (folder / name).is_file() else None
    shares = [None] * world
    dist.all_gather_object(shares, mine)
    sums = {}
    for share in shares:
        sums |= share
    return sums


def writer_of(name: str) -> int:
    """The rank that wrote a file and so has it in memory still: 3 for __3_0.distcp."""
    found = re.match(r"__(\d+)_", name)
    return int(found[1]) if found else 0


# ---- loading -----------------------------------------------------------------------------------


def load_checkpoint(parts: Path, policy, optimizer, steps: int) -> int:
    """Load the last checkpoint, whatever number of ranks wrote it.

    steps: of the whole training. Returns the number of steps that are done, 0 without a checkpoint.
    Raises Stop on all ranks where it is damaged, of another model or of another training.
    """
    for group in optimizer.param_groups:
        assert all(isinstance(p, DTensor) for p in group["params"]), "the optimizer has no shards"
    # One rank looks: file systems need not show all of them the same.
    found = from_rank_0(checkpoints(parts))
    if not found:
        return 0
    last = found[-1]
    done = step_of(last)
    if done > steps:
        raise Stop(f"{last}: a checkpoint of step {done}, where training has {steps}. {REMEDY}")
    check_files(last)
    load_shards(last, policy, optimizer)
    return done


def check_files(folder: Path) -> None:
    """Stop where a file is missing, is not what was written, or does not belong there."""
    rank, _ = ranks()
    sums = from_rank_0(read_sums(folder) if rank == 0 else None)
    if METADATA not in sums:
        raise Stop(f"{folder}: damaged: it has no {SUMS} that can be read. {REMEDY}")
    found = hash_files(folder, sorted(sums))
    for name, expected in sums.items():
        if found[name] is None:
            raise Stop(f"{folder}: damaged: {name} is missing. {REMEDY}")
        if found[name] != expected:
            raise Stop(f"{folder}: damaged: {name} is not what was written. {REMEDY}")
    for name in files_of(read_metadata(folder)):
        if name not in sums:
            raise Stop(f"{folder}: {METADATA} asks for {name}, which is not in {SUMS}. {REMEDY}")


def read_sums(folder: Path) -> dict[str, str]:
    """sums.json; {} where it is missing or damaged."""
    try:
        sums = json.loads((folder / SUMS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return sums if isinstance(sums, dict) else {}


def load_shards(folder: Path, policy, optimizer) -> None:
    shards = shards_in_training(policy, optimizer)
    reader, planner = Reader(folder), Planner()
    try:
        dcp.load(shards, storage_reader=reader, planner=planner)
    except CheckpointException as e:
        cause = cause_of(e)
        if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
            raise cause from e  # which says nothing against the checkpoint
        raise Stop(f"{folder}: cannot be loaded ({first_line(cause)}). {REMEDY}") from None
    set_state_dict(
        policy,
        optimizer,
        model_state_dict=shards["weights"],
        optim_state_dict=shards["adam"],
        options=StateDictOptions(strict=False),  # dcp.load has found all of them
    )


def cause_of(failure: CheckpointException) -> BaseException:
    """What went wrong on the first of the ranks that failed. All ranks learn of it."""
    first = min(failure.failures)
    exception, _ = failure.failures[first]
    return exception


def first_line(exception: BaseException) -> str:
    text = f"{type(exception).__name__}: {exception}"
    return text.splitlines()[0][:300]


# ---- pickles -----------------------------------------------------------------------------------


def read_metadata(folder: Path) -> Metadata:
    """The content of .metadata, unpickled without running anything. Stops where it is damaged."""
    path = folder / METADATA
    try:
        with open(path, "rb") as file:
            metadata = MetadataUnpickler(file).load()
        files_of(metadata)
    except Exception as e:  # a pickle can break in any way
        raise Stop(f"{path}: damaged ({first_line(e)}). {REMEDY}") from None
    return metadata


def files_of(metadata: Metadata) -> list[str]:
    """The names of the data files."""
    places = metadata.storage_data.values()
    return sorted({place.relative_path for place in places})


class MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of .metadata and no other: unpickling any other may run a program."""

    def find_class(self, module: str, name: str):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or f"{module}.{name}" in CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


class Reader(dcp.FileSystemReader):
    """torch's reader, with our unpickling. It loads tensors with weights_only=True by itself."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        return read_metadata(Path(self.path))


class Planner(dcp.DefaultLoadPlanner):
    """torch's planner, which would unpickle anything for what is no tensor, like Adam's betas."""

    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)  # a number, a string, a list; or an error
        pickled_by_us = io.BytesIO()
        torch.save(plain, pickled_by_us)
        pickled_by_us.seek(0)
        super().load_bytes(read_item, pickled_by_us)
