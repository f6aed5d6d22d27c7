"""The branches that only a GPU takes, without one: tests/cuda_branches.py says what this shows.

It needs the CUDA build of torch, which a machine without a GPU can install but rarely has:
`bash tools/versions.sh cuda` makes such an environment. On other machines, tests/test_attention.py
(varlen_attn by each signature) and tests/test_logprob_triton.py protect those branches.
"""

import pytest
import torch

import cuda_branches
from kernels import logprob


@pytest.mark.skipif(
    not torch.backends.cuda.is_built(),
    reason="torch is built without CUDA: bash tools/versions.sh cuda",
)
def test_pitfalls_52_every_cuda_branch_runs_on_fake_tensors(stage):
    """PITFALLS 52: an argument that only some versions of torch have.

    On torch 2.11 this fails where `enable_gqa` is always passed to varlen_attn, as it once was:
    "TypeError: varlen_attn() got an unexpected keyword argument 'enable_gqa'".
    """
    done = stage("tests/cuda_branches.py", timeout=1800)
    shown = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert shown == [name for name, _ in cuda_branches.cases()]


@pytest.mark.skipif(logprob.triton is None, reason="needs triton")
def test_what_stands_for_the_triton_kernel_has_its_arguments(monkeypatch):
    """Everywhere, so that a change of the kernel's arguments is not first seen in a CUDA build."""
    launch = cuda_branches.Launch("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # then the CPU takes rows_triton, too
    monkeypatch.setattr(logprob, "row_kernel", launch)
    hidden = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(31, 8, requires_grad=True)
    bias = torch.randn(31)
    logprob.linear_logprob(
        hidden, weight, torch.arange(5), bias=bias, stash_bytes=0
    ).sum().backward()
    assert launch.launched == 2  # forward, and again in backward, as nothing was kept
