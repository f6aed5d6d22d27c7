"""The reference's log-probs on the disk: an interrupted run that is resumed reads them again.

The trained weights of its checkpoint are not the reference any more.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from records import Stop, remove, whole
from stage import ranks, say
from training.checkpoints import from_rank_0


def load_reference(file: Path, pair_count: int) -> torch.Tensor | None:
    """[n, 2] fp32, on all ranks; None if there are none."""
    rank, _ = ranks()
    # Only rank 0 looks: a shared file system may not show all ranks the same.
    return from_rank_0(read_reference(file, pair_count) if rank == 0 else None)


def read_reference(file: Path, pair_count: int) -> torch.Tensor | None:
    """None if there is no such file, or a damaged one: an .npz file holds a checksum."""
    if not file.exists():
        return None
    try:
        with np.load(file) as content:
            logprobs = content["logprobs"]
        if logprobs.shape != (pair_count, 2) or logprobs.dtype != np.float32:
            raise ValueError(f"it holds {logprobs.dtype} {logprobs.shape}")
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as e:
        say(f"{file}: is damaged ({e}); the reference is computed again")
        remove(file)
        return None
    return torch.from_numpy(logprobs)


def keep_reference(file: Path, reference: torch.Tensor, pairs: list[dict]) -> None:
    """Rank 0 writes it, unless it was read from there. Raises Stop where it is not finite.

    reference: [n, 2] fp32, on the CPU.
    """
    broken = ~reference.isfinite().all(1)  # [n]
    if broken.any():
        rows = broken.nonzero().flatten().tolist()
        bad = [pairs[row]["id"] for row in rows[:8]]
        raise Stop(f"the reference's log-probs are not finite for the pairs {bad}")
    rank, _ = ranks()
    if rank == 0 and not file.exists():
        with whole(file) as temporary, open(temporary, "wb") as out:
            np.savez(out, logprobs=reference.numpy())
