"""The branches that only a GPU takes, without one: tests/cuda_branches.py says what this shows.

It needs the CUDA build of torch, which a machine without a GPU can install but rarely has:
`bash tools/versions.sh cuda` makes such an environment. What protects those branches everywhere
stands in tests/test_attention.py (varlen_attn by each signature) and tests/test_logprob_triton.py.
"""

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(),
    reason="torch is built without CUDA: bash tools/versions.sh cuda",
)


def test_pitfalls_52_every_cuda_branch_runs_on_fake_tensors(stage):
    """PITFALLS 52: an argument that only some versions of torch have.

    On torch 2.11 this fails where `enable_gqa` is always passed to varlen_attn, as it once was:
    "TypeError: varlen_attn() got an unexpected keyword argument 'enable_gqa'".
    """
    from cuda_branches import cases

    done = stage("tests/cuda_branches.py", timeout=1800)
    shown = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert shown == [name for name, _ in cases()]
