"""Sharding and feeding: weights that stay gathered, the timeout of HSDP's groups, microbatches one
ahead.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

import dpo_train
from conftest import ROOT
from kernels.attention import Layout
from test_dpo_train import Run
from training import batches, fsdp, speed


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    return Run(tmp_path, capsys, monkeypatch)


# ---- weights that stay gathered ----------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--gradient_checkpointing"]], ids=["", "checkpointing"])
def test_weights_that_stay_gathered_change_no_bit_and_are_gathered_once_a_step(
    run, monkeypatch, more
):
    """Three steps of several microbatches in bf16, as on a GPU: the fp32 masters move, so a stale
    copy would show.
    """
    gathered = {"weights": 0}
    init_unsharded_param = FSDPParam.init_unsharded_param
    train = dpo_train.train

    def count(param):
        gathered["weights"] += 1
        init_unsharded_param(param)

    def train_and_count(policy, data, *others):
        gathered["weights"] = 0
        figures = train(policy, data, *others)
        gathered["of a step"] = gathered["weights"] / len(data.plans)
        gathered["microbatches"] = sum(len(step[0]) for step in data.plans)
        gathered["parameters"] = len(list(policy.parameters()))
        return figures

    monkeypatch.setattr(FSDPParam, "init_unsharded_param", count)
    monkeypatch.setattr(dpo_train, "train", train_and_count)
    flags = [
        "--dtype",
        "bf16",
        "--tokens_per_batch",
        "90",
        "--save_dtype",
        "fp32",
        "--max_logprob_gap",
        "1",
        *more,
    ]
    run("let_go", *flags)
    log, let_go = run.log(), gathered["of a step"]
    monkeypatch.setattr(fsdp, "stays_gathered", lambda *_: True)
    assert "stay gathered" in run("kept", *flags)

    assert gathered["microbatches"] >= 3 * len(log) > 3  # else there is nothing to save
    assert gathered["of a step"] == gathered["parameters"] < let_go / 4
    for name, weight in run.weights("let_go").items():
        assert torch.equal(weight, run.weights("kept")[name]), name
    for a, b in zip(log, run.log(), strict=True):
        assert {**a, "tokens_per_second": 0} == {**b, "tokens_per_second": 0}


@pytest.mark.parametrize(
    ("free", "checkpointing", "ranks_per_copy", "dtype", "offload", "stays"),
    [
        (36_000, True, 1, torch.bfloat16, False, True),  # 2 (4 + 8 + 4 + 2) bytes per weight
        (35_999, True, 1, torch.bfloat16, False, False),
        (36_000, True, 2, torch.bfloat16, False, False),  # there is another rank to gather from
        (39_999, True, 1, torch.float32, False, False),
        (4_000, True, 1, torch.bfloat16, True, True),  # all else is in host memory
        (72_000, False, 1, torch.bfloat16, False, True),  # every layer keeps its activations
        (71_999, False, 1, torch.bfloat16, False, False),
    ],
)
def test_weights_stay_gathered_where_there_is_room(
    monkeypatch, free, checkpointing, ranks_per_copy, dtype, offload, stays
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 10**6))
    policy = torch.nn.Linear(10, 100, bias=False, device="meta")
    policy.model = SimpleNamespace(is_gradient_checkpointing=checkpointing)
    assert fsdp.stays_gathered(policy, dtype, ranks_per_copy, offload, "cuda") == stays
    assert not fsdp.stays_gathered(policy, dtype, ranks_per_copy, offload, "cpu")


# ---- HSDP's groups -----------------------------------------------------------------------------

WAIT = """
import time
from datetime import timedelta
import torch
from training import fsdp

fsdp.start()  # rank 1 comes eight seconds late to a collective of the copies, which wait for two
fsdp.TIMEOUT = timedelta(seconds=2)
policy = torch.nn.Linear(4, 4, device="meta")
fsdp.shard(policy, torch.float32, 1, False, "cpu", 2)
mesh = next(policy.parameters()).device_mesh
assert mesh.mesh_dim_names == ("copies", "shards") and mesh.shape == (2, 1)
rank, began = torch.distributed.get_rank(), time.time()
if rank == 1:
    time.sleep(8)
try:
    torch.distributed.all_reduce(torch.ones(1), group=mesh.get_group("copies"))
    said = "waited"
except RuntimeError:
    said = f"gave up after {time.time() - began:.0f}"
if rank == 0:
    print(said)
fsdp.leave()
"""


def test_groups_of_hsdp_have_our_timeout(tmp_path):
    (tmp_path / "wait.py").write_text(WAIT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(tmp_path / "wait.py")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.split("gave up after ")
    assert len(said) == 2 and int(said[1].split()[0]) in (2, 3), done.stdout


# ---- microbatches to the device ----------------------------------------------------------------

PAIRS = [
    {k: np.arange(5, 5 + n + i, dtype=np.int32) for n, k in enumerate(batches.PARTS, 2)}
    for i in range(5)
]
GROUPS = [[0, 1], [], [4], [3, 2]]


def tensors(x):
    """Every tensor in x, in order."""
    if isinstance(x, dict):
        return [t for v in x.values() for t in tensors(v)]
    if isinstance(x, Layout):
        return tensors(vars(x))
    return [x] if isinstance(x, torch.Tensor) else []


@pytest.mark.parametrize("packing", ["prefix", "padded"])
def test_microbatches_arrive_in_order_and_one_at_a_time(monkeypatch, packing):
    built, collate = [], batches.collate
    monkeypatch.setattr(
        batches, "collate", lambda pairs, *others: built.append(pairs) or collate(pairs, *others)
    )
    for k, batch in enumerate(batches.feed(PAIRS, GROUPS, packing, "cpu")):
        rows = GROUPS[k] or [0]  # a rank without a pair still computes one
        assert len(built) == k + 1
        assert batch["rows"].tolist() == rows
        expected = collate([PAIRS[i] for i in rows], packing)
        assert batch["weights"].tolist() == [float(bool(GROUPS[k]))] * len(rows)
        found = {k: v for k, v in batch.items() if k not in ("rows", "weights")}
        assert found["split"] == expected["split"] and found.keys() == expected.keys()
        assert all(map(torch.equal, tensors(found), tensors(expected)))
    assert k == len(GROUPS) - 1
    assert list(batches.feed(PAIRS, [], packing, "cpu")) == []


@pytest.mark.parametrize("packing", ["prefix", "padded"])
def test_all_of_a_microbatch_is_on_the_device(packing):
    """Of the layout, too; a tensor left behind would be copied in every layer."""
    found = tensors(batches.collate(PAIRS, packing, "meta"))
    assert {t.device.type for t in found} == {"meta"}
    assert [t.shape for t in found] == [t.shape for t in tensors(batches.collate(PAIRS, packing))]


@pytest.mark.gpu
@pytest.mark.parametrize("packing", ["prefix", "padded"])
def test_a_microbatch_reaches_a_gpu_unchanged_and_without_waiting(packing):
    torch.cuda.set_sync_debug_mode("error")  # a copy that waits for the GPU raises
    try:
        found = list(batches.feed(PAIRS, GROUPS, packing, torch.device("cuda")))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for there, here in zip(found, batches.feed(PAIRS, GROUPS, packing, "cpu"), strict=True):
        assert all(
            torch.equal(a.cpu(), b) for a, b in zip(tensors(there), tensors(here), strict=True)
        )


# ---- the allocator -----------------------------------------------------------------------------

ASK = """
import os, sys
sys.modules["torch"] = None  # imported from here on: ImportError
try:
    import {stage}
except ImportError:
    print(os.environ["PYTORCH_ALLOC_CONF"], os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
"""


@pytest.mark.parametrize("stage", ["dpo_train", "score"])
@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ({}, "expandable_segments:True None"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64 None"),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
            "max_split_size_mb:64 max_split_size_mb:64",
        ),
    ],
    ids=["default", "user", "user, old name"],
)
def test_the_allocator_is_told_before_torch_is_imported(stage, user, expected):
    environment = (
        {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k}
        | user
        | {"PYTHONPATH": str(ROOT)}
    )
    command = [sys.executable, "-c", ASK.format(stage=stage)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout.strip() == expected, done.stderr


def test_reserved_memory_is_recorded_beside_allocated(monkeypatch, run):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7)
    assert speed.peak_memory(torch.device("cuda")) == {
        "peak_memory_bytes": 5,
        "peak_reserved_bytes": 7,
    }
    run("policy")
    figures = json.loads(Path(run.folder / "policy.meta.json").read_text())["train"]
    assert (
        figures["peak_memory_bytes"] > 2**20 and "peak_reserved_bytes" not in figures
    )  # no allocator on a CPU
