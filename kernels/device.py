"""Which of two paths the code takes: that of a GPU, or that of a CPU.

Both compute the same numbers, but allocate different memory. A dry run counts what a GPU would
allocate, on a machine that has none, so it asks for the GPU's path:

    with FakeTensorMode(), counted_as_gpu():
        loss = model(batch)     # tensors have shapes and no content
        loss.backward()

Code that chooses between the two paths asks `device_kind(tensor)`, and not the tensor itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_counting = False


@contextmanager
def counted_as_gpu() -> Iterator[None]:
    """Within it tensors take a GPU's path: chunk, stash, row kernel, products, attention.

    Only for tensors without content: the row kernel is not run, but what it would allocate is
    allocated.
    """
    global _counting
    before = _counting
    _counting = True
    try:
        yield
    finally:
        _counting = before


def counting() -> bool:
    """Whether counted_as_gpu() is on, so that GPU kernels must allocate only."""
    return _counting


def device_kind(tensor: torch.Tensor) -> str:
    """ "cuda" or "cpu": the path that `tensor` takes. Any other device takes that of a CPU."""
    if _counting or tensor.is_cuda:
        return "cuda"
    return "cpu"
