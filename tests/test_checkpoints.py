"""Checkpoints that are damaged, planted, of another training, or too large for the disk.

That training goes on from one as if it had never stopped: test_dpo_train.py.
"""

import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from conftest import ROOT
from records import Stop
from stage import hash_path
from test_dpo_train import Run
from training import fsdp
from training.checkpoints import (
    METADATA,
    SUMS,
    checkpoints,
    load_checkpoint,
    read_metadata,
    save_checkpoint,
)


@pytest.fixture
def ranks_of_one():
    fsdp.start()
    yield
    torch.distributed.destroy_process_group()


pytestmark = pytest.mark.usefixtures("ranks_of_one")


def training(*sizes, steps=1):
    """A sharded network of these sizes, and its optimizer after so many steps."""
    torch.manual_seed(sum(sizes) + steps)
    layers = [torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    policy = torch.nn.Sequential(*layers)
    policy.model = SimpleNamespace(is_gradient_checkpointing=False)
    fsdp.shard(policy, torch.float32, None, False, "cpu", torch.distributed.get_world_size())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    for _ in range(steps):
        policy(torch.ones(2, sizes[0])).sum().backward()
        optimizer.step()
    return policy, optimizer


def numbers(policy, optimizer):
    states = [optimizer.state[p] for p in policy.parameters()]
    moments = [state[name].to_local() for state in states for name in ("exp_avg", "exp_avg_sq")]
    return [p.to_local() for p in policy.parameters()] + moments


@pytest.fixture
def saved(tmp_path):
    """parts/ with the checkpoint of step 12."""
    save_checkpoint(tmp_path / "parts", *training(4, 4), 12)
    return tmp_path / "parts"


def refused(parts, sizes=(4, 4), steps=12):
    """The message, of one line, that names the folder and the remedy."""
    with pytest.raises(Stop) as stop:
        load_checkpoint(parts, *training(*sizes), steps)
    message = str(stop.value)
    assert f"{checkpoints(parts)[-1]}" in message and "Remove that folder" in message
    assert "\n" not in message and message.count("error:") == 1
    return message


def sum_again(folder):
    """What somebody would do who wants his own files to be believed."""
    sums = {name: hash_path(folder / name) for name in json.loads((folder / SUMS).read_text())}
    (folder / SUMS).write_text(json.dumps(sums))


def test_all_numbers_come_back(saved):
    before, after = training(4, 4), training(4, 4, steps=3)
    assert load_checkpoint(saved, *after, 12) == 12
    assert all(map(torch.equal, numbers(*before), numbers(*after)))


def test_the_last_one_is_kept_and_nothing_else(saved):
    (saved / "step_000013.iterdpo-unfinished").mkdir()  # what a kill leaves
    (saved / "step_000013.iterdpo-unfinished/x").write_text("")
    (saved / "step_by_step").mkdir()  # somebody's
    assert checkpoints(saved) == [saved / "step_000012"]
    for step in (13, 1_000_000):
        save_checkpoint(saved, *training(4, 4), step)
        assert [path.name for path in checkpoints(saved)] == [f"step_{step:06d}"]
    assert load_checkpoint(saved, *training(4, 4), 10**6) == 10**6
    assert not list(saved.glob("*.iterdpo-unfinished"))
    folder = saved / "step_1000000"
    assert {path.name for path in folder.iterdir()} == {METADATA, SUMS, "__0_0.distcp"}


def test_without_a_checkpoint_training_begins(tmp_path):
    assert load_checkpoint(tmp_path, *training(4, 4), 12) == 0


# ---- damage ------------------------------------------------------------------------------------


def cut(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def flip(name):
    """One bit in the middle; of a data file, that is within a tensor."""

    def flip_in(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return flip_in


def lose(name):
    return lambda folder: (folder / name).unlink()


def put(name, text):
    return lambda folder: (folder / name).write_text(text)


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def file_instead(folder):
    empty(folder)
    folder.rmdir()
    folder.write_text("")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut(METADATA), ".metadata is not what was written"),
        (flip(METADATA), ".metadata is not what was written"),
        (lose(METADATA), ".metadata is missing"),
        (cut("__0_0.distcp"), "__0_0.distcp is not what was written"),
        (flip("__0_0.distcp"), "__0_0.distcp is not what was written"),
        (lose("__0_0.distcp"), "__0_0.distcp is missing"),
        (lose(SUMS), "no sums.json that can be read"),
        (cut(SUMS), "no sums.json that can be read"),
        (put(SUMS, "[]"), "no sums.json that can be read"),
        (put(SUMS, "{}"), "no sums.json that can be read"),
        (empty, "no sums.json that can be read"),
        (file_instead, "no sums.json that can be read"),
    ],
)
def test_damage_is_named(saved, damage, says):
    damage(saved / "step_000012")
    assert says in refused(saved)


@pytest.mark.parametrize("damage", [cut(METADATA), put(METADATA, ""), put(METADATA, "N.")])
def test_metadata_that_are_none_are_refused_with_a_sum_of_their_own(saved, damage):
    damage(saved / "step_000012")
    sum_again(saved / "step_000012")
    assert ".metadata: damaged (" in refused(saved)


@pytest.mark.parametrize(
    ("sizes", "says"), [((4, 4, 4), "Missing key"), ((4, 8), "mismatch"), ((8, 4), "mismatch")]
)
def test_a_checkpoint_of_another_model_is_refused(saved, sizes, says):
    assert says in refused(saved, sizes)


def test_a_checkpoint_of_a_longer_training_is_refused(saved):
    assert "a checkpoint of step 12, where training has 11" in refused(saved, steps=11)


# ---- planted programs --------------------------------------------------------------------------


class Program:
    """Unpickled, it runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def program(tmp_path):
    yield Program(f"touch {tmp_path}/it_ran")
    assert not (tmp_path / "it_ran").exists()


def test_a_program_in_the_metadata_does_not_run(saved, program):
    metadata = read_metadata(saved / "step_000012")
    metadata.planner_data["weights.0.weight"] = program
    (saved / "step_000012" / METADATA).write_bytes(pickle.dumps(metadata))
    sum_again(saved / "step_000012")
    assert "asks for posix.system, which no checkpoint needs" in refused(saved)


@pytest.mark.parametrize("kind", ["betas", "weights"])
def test_a_program_in_a_data_file_does_not_run(saved, program, kind):
    """In the place of a number and of a tensor, with a sum that is right."""
    folder = saved / "step_000012"
    metadata = read_metadata(folder)
    content = bytearray((folder / "__0_0.distcp").read_bytes())
    planted = io.BytesIO()
    torch.save(program, planted)
    for index, place in metadata.storage_data.items():
        is_number = isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
        if is_number == (kind == "betas"):
            place.offset, place.length = len(content), len(planted.getvalue())
    (folder / "__0_0.distcp").write_bytes(content + planted.getvalue())
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    sum_again(folder)
    assert "UnpicklingError" in refused(saved)


def test_a_file_outside_the_checkpoint_is_not_read(saved):
    folder = saved / "step_000012"
    metadata = read_metadata(folder)
    for place in metadata.storage_data.values():
        place.relative_path = "../__0_0.distcp"
    (folder / "__0_0.distcp").rename(saved / "__0_0.distcp")
    (folder / "__0_0.distcp").write_bytes(b"")
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    sum_again(folder)
    assert "asks for ../__0_0.distcp, which is not in sums.json" in refused(saved)


# ---- a full disk -------------------------------------------------------------------------------


def test_a_full_disk_ends_in_the_kernels_own_error_and_leaves_the_checkpoint_before(saved):
    """A limit on the size of files makes write() fail where a full disk does."""
    large = training(256, 256)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large: .*step_000013.iterdpo-unfinished"):
            save_checkpoint(saved, *large, 13)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in saved.iterdir()] == ["step_000012"]
    assert load_checkpoint(saved, *training(4, 4), 12) == 12


def test_a_full_disk_is_said_in_one_line_and_training_goes_on_when_there_is_room(
    tmp_path, capsys, monkeypatch
):
    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    run = Run(tmp_path, capsys, monkeypatch)
    command = [sys.executable, ROOT / "dpo_train.py", *run.argv("policy", "--save_every", "1")]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "step_000001.iterdpo-unfinished: no space left" in done.stderr
    assert not list(tmp_path.glob("policy.parts/step_*"))
    subprocess.run(command, check=True)
    assert (tmp_path / "policy").is_dir()


# ---- two ranks ---------------------------------------------------------------------------------

TWO = """
import os, pickle, resource, shutil, sys
from pathlib import Path

import torch

from records import Stop
from stage import barrier, ranks
from test_checkpoints import cut, flip, lose, numbers, program_in_metadata, training
from training import fsdp
from training.checkpoints import METADATA, load_checkpoint, save_checkpoint

fsdp.start()
rank, world = ranks()
parts = Path(sys.argv[1])

def on_rank_0(do, *arguments):
    if rank == 0:
        do(*arguments)
    barrier()

def tell(what):
    for turn in range(world):
        if turn == rank:
            print(f"rank {rank}: {what}", flush=True)
        barrier()

save_checkpoint(parts, *training(256, 256), 12)
after = training(256, 256, steps=3)
load_checkpoint(parts, *after, 12)
same = all(map(torch.equal, numbers(*training(256, 256)), numbers(*after)))
tell(f"loaded, {'the same' if same else 'different'}")

for damage in (flip("__1_0.distcp"), lose("__0_0.distcp"), cut(METADATA), program_in_metadata):
    whole = parts / "step_000012"
    broken = parts.with_name("broken")
    on_rank_0(shutil.rmtree, broken, True)
    on_rank_0(shutil.copytree, whole, broken / "step_000012")
    on_rank_0(damage, broken / "step_000012")
    try:
        load_checkpoint(broken, *training(256, 256), 12)
    except Stop as e:
        tell(e)

if rank == 1:  # its disk is full, and not that of rank 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
try:
    save_checkpoint(parts, *training(256, 256), 13)
except OSError as e:
    tell(e)
tell(sorted(path.name for path in parts.iterdir()))
fsdp.leave()
"""


def program_in_metadata(folder):
    (folder / METADATA).write_bytes(pickle.dumps(Program("echo it ran")))
    sum_again(folder)


def test_two_ranks_end_alike(tmp_path, stage):
    """The failure of one is the failure of both, with the same words, and nobody waits."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = stage(script, tmp_path / "parts", nproc=2, env=environment, timeout=120)
    said = {"rank 0": [], "rank 1": []}
    for line in done.stdout.splitlines():
        rank, _, words = line.partition(": ")
        said[rank].append(words)
    assert said["rank 0"] == said["rank 1"] and "it ran" not in done.stdout
    expected = [
        "loaded, the same",
        "__1_0.distcp is not what was written",
        "__0_0.distcp is missing",
        ".metadata is not what was written",
        "asks for posix.system",
        "File too large",
        "['step_000012']",
    ]
    for words, found in zip(expected, said["rank 0"], strict=True):
        assert words in found
