"""From preference pairs to the tensors of a forward pass.

A pair is three integer arrays: prompt P, chosen C and rejected R. There are two ways to lay n pairs
out for a forward pass:

    prefix   input_ids [1, T]     [P|C|R][P|C|R]…   no padding, each prompt once: T is the sum of
                                                    p + c + r
    padded   input_ids [2n, L]    [P|C], [P|R], …   one row per sequence, padded on the right, for
                                                    models whose attention cannot be packed

With UltraFeedback's mean lengths (p 200, c and r 350) a pair takes 900 tokens, or 1100 and what is
lost to padding.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch

from kernels.attention import Layout, prefix_layout
from training.plans import lengths_of

PARTS = ("prompt", "chosen", "rejected")


# ---- the tensors of a microbatch ---------------------------------------------------------------


def collate(pairs: list[dict], packing: str, device="cpu") -> dict:
    """The tensors of one forward pass. With n pairs of Tc answer tokens in all:

    inputs     keyword arguments of the base model, laid out as above
    positions  [Tc] int64: the place, in the flattened input, of the hidden state that predicts each
               answer token. That is one before it; for the first token of either answer it is the
               last token of the prompt
    targets    [Tc] int64, those tokens: chosen 0, rejected 0, chosen 1, …
    split      the 2n lengths of those answers, on the host
    lengths    [n, 2] int64, the same as a tensor
    """
    if packing == "prefix":
        inputs, positions = prefix_rows(pairs)
    else:
        inputs, positions = padded_rows(pairs)
    answers = []
    for pair in pairs:
        answers += [pair["chosen"], pair["rejected"]]
    split = [len(answer) for answer in answers]
    batch = {
        "inputs": inputs,
        "positions": torch.from_numpy(np.concatenate(positions)),
        "targets": torch.from_numpy(np.concatenate(answers)).long(),
        "split": split,
        "lengths": torch.tensor(split).view(-1, 2),
    }
    return to_device(batch, torch.device(device))


def prefix_rows(pairs: list[dict]) -> tuple[dict, list[np.ndarray]]:
    """One row [P|C|R][P|C|R]…: inputs, and the positions of each answer, chosen 0, rejected 0, …"""
    tokens = []
    positions = []
    start = 0  # of the pair, in the row
    for pair in pairs:
        p, c, r = lengths_of(pair)
        tokens += [pair["prompt"], pair["chosen"], pair["rejected"]]
        end_of_prompt = start + p - 1
        start_of_rejected = start + p + c
        positions.append(end_of_prompt + np.arange(c))
        positions.append(np.concatenate([[end_of_prompt], start_of_rejected + np.arange(r - 1)]))
        start += p + c + r

    lengths = [lengths_of(pair) for pair in pairs]
    position_ids, layout = prefix_layout(lengths)
    input_ids = torch.from_numpy(np.concatenate(tokens)).long()[None]  # [1, T]
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "layout": layout}
    return inputs, positions


def padded_rows(pairs: list[dict]) -> tuple[dict, list[np.ndarray]]:
    """2n rows [P|C], [P|R], …, padded on the right: inputs, and the positions of each answer."""
    sequences = []
    ends_of_prompts = []
    for pair in pairs:
        for answer in (pair["chosen"], pair["rejected"]):
            sequences.append(np.concatenate([pair["prompt"], answer]))
            ends_of_prompts.append(len(pair["prompt"]) - 1)
    width = max(len(sequence) for sequence in sequences)

    input_ids = np.zeros((len(sequences), width), np.int64)  # [2n, L]
    mask = np.zeros((len(sequences), width), np.int64)  # [2n, L]
    positions = []
    for row, sequence in enumerate(sequences):
        length = len(sequence)
        input_ids[row, :length] = sequence
        mask[row, :length] = 1
        in_row = np.arange(ends_of_prompts[row], length - 1)
        positions.append(row * width + in_row)

    position_ids = torch.arange(width)[None].repeat(len(sequences), 1)  # [2n, L]
    inputs = {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(mask),
        "position_ids": position_ids,
    }
    return inputs, positions


# ---- to the device -----------------------------------------------------------------------------


def to_device(x, device: torch.device):
    """x with all its tensors on `device`. x: a tensor, a Layout, a dict of them, or anything else.

    Copies to a GPU start from pinned memory: such a copy is queued on the GPU, and the program
    continues. With ordinary memory, the program would wait until the GPU has finished all earlier
    work.
    """
    if isinstance(x, dict):
        return {name: to_device(value, device) for name, value in x.items()}
    if isinstance(x, Layout):
        return replace(
            x,
            cu_seqlens_q=to_device(x.cu_seqlens_q, device),
            cu_seqlens_k=to_device(x.cu_seqlens_k, device),
            kv_index=to_device(x.kv_index, device),
        )
    if not isinstance(x, torch.Tensor):
        return x
    is_a_real_gpu = device.type == "cuda" and torch.cuda.is_available()  # not FakeTensorMode's
    if is_a_real_gpu:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def feed(pairs: list[dict], groups: Iterable[list[int]], packing: str, device) -> Iterator[dict]:
    """Yield the batch of each group of indices into `pairs`: what `collate` makes of it, and

    rows     [n] int64, the indices
    weights  [n] fp32: 1, or 0 for a stand-in. An empty group is pair 0 with weight 0, for a rank
             that has no pairs left and takes part in the collectives only

    A GPU works on a batch while its caller is here again already, and builds the next one.
    """
    device = torch.device(device)
    for group in groups:
        rows = group or [0]
        weight = 1.0 if group else 0.0
        batch = collate([pairs[i] for i in rows], packing, device)
        batch["rows"] = to_device(torch.tensor(rows), device)
        batch["weights"] = to_device(torch.full((len(rows),), weight), device)
        yield batch
