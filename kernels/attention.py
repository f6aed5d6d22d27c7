"""Packed, prefix-shared attention for Hugging Face models: the prompt of a preference pair is computed once.

DPO needs log p(chosen | prompt) and log p(rejected | prompt). Run as two padded sequences, the prompt is computed
twice and every pad token costs as much as a real one. Here a whole microbatch of pairs is one row of tokens without
padding, [P|C|R][P|C|R]..., and the mask of one pair is

              keys   P P P  C C  R R R
    queries P        x . .  . .  . . .
            P        x x .  . .  . . .      x = may look, . = may not
            P        x x x  . .  . . .
            C        x x x  x .  . . .      The chosen answer sees the prompt and itself,
            C        x x x  x x  . . .
            R        x x x  . .  x . .      and so does the rejected one: never the chosen.
            R        x x x  . .  x x .
            R        x x x  . .  x x x

Positions restart: R continues from len(P), as if C were not there. So each answer is computed exactly as it would be
alone behind its prompt, and only attention has to know: every other layer works on tokens one by one.

That mask is two ordinary causal ones. Cut the queries into segments and give each the keys that belong to it:

    segment 1    q = [P|C]    k = [P|C]     the causal square
    segment 2    q = [R]      k = [P|R]     the last len(R) rows of the causal square of [P|R]

The queries of the segments in turn are the row itself; their keys are gathered (`kv_index`), the prompt's twice. In the
backward pass the two gradients of a prompt key are added, which is what sharing means.

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation=ATTENTION)
    position_ids, layout = prefix_layout([(len(p), len(c), len(r)) for p, c, r in pairs], device)
    hidden = model.model(input_ids=row, position_ids=position_ids, use_cache=False, layout=layout)[0]    # [1, T, D]

`layout` is no argument that transformers knows: it rides through its **kwargs down to the function registered below.
On a GPU one `varlen_attn` call (torch >= 2.11, the flash kernel, causal masks aligned to the bottom right) does all
segments; elsewhere SDPA does one at a time.

Prefix sharing for preference pairs: Wang and Hegde, "Accelerating Direct Preference Optimization with Prefix Sharing",
arXiv:2410.20305, there with FlexAttention.
"""

import inspect
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface

ATTENTION = "iterdpo_packed"  # the attn_implementation under which transformers finds `packed_attention`


@dataclass
class Layout:
    """Which queries look at which keys. Segment i owns q[cu_seqlens_q[i]:cu_seqlens_q[i+1]] and the same of k."""

    cu_seqlens_q: torch.Tensor  # [S+1] int32, where each segment's queries start in the row
    cu_seqlens_k: torch.Tensor  # [S+1] int32, where its keys start among the gathered keys
    kv_index: torch.Tensor | None  # [Tk] int64, the row's keys in the order of the segments; None: as they stand
    max_seqlen_q: int
    max_seqlen_k: int
    q_lengths: list[int]  # the same lengths on the host: a GPU is never asked for them
    k_lengths: list[int]


def _layout(positions, kv_index, q_lengths: list[int], k_lengths: list[int], device) -> tuple[torch.Tensor, Layout]:
    """Python lists in, tensors on `device` out: position_ids [1, T] and the Layout."""

    def starts(lengths):
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)

    position_ids = torch.cat(positions)[None].to(device, non_blocking=True)  # [1, T]
    if kv_index is not None:
        kv_index = torch.cat(kv_index).to(device, non_blocking=True)  # [Tk]
    return position_ids, Layout(
        starts(q_lengths), starts(k_lengths), kv_index, max(q_lengths), max(k_lengths), q_lengths, k_lengths
    )


def prefix_layout(lengths: list[tuple[int, int, int]], device="cpu") -> tuple[torch.Tensor, Layout]:
    """(prompt, chosen, rejected) lengths of each pair -> position_ids [1, T] and Layout of the row [P|C|R][P|C|R]..."""
    positions, kv_index, q_lengths, k_lengths, start = [], [], [], [], 0
    for p, c, r in lengths:
        pc, pcr = start + p + c, start + p + c + r
        positions += [torch.arange(p + c), torch.arange(p, p + r)]
        kv_index += [torch.arange(start, pc), torch.arange(start, start + p), torch.arange(pc, pcr)]
        q_lengths += [p + c, r]
        k_lengths += [p + c, p + r]
        start = pcr
    return _layout(positions, kv_index, q_lengths, k_lengths, device)


def packed_layout(lengths: list[int], device="cpu") -> tuple[torch.Tensor, Layout]:
    """Lengths of independent sequences -> position_ids [1, T] and Layout of the row that holds them one after another."""
    return _layout([torch.arange(n) for n in lengths], None, list(lengths), list(lengths), device)


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout: Layout | None = None, **kwargs
):
    """The function transformers calls in every layer. query [1, H, T, D], key and value [1, Hkv, T, D] -> [1, T, H, D]."""
    gqa = query.shape[1] != key.shape[1]
    if layout is None:
        if query.shape[2] != key.shape[2]:
            raise ValueError(f"{ATTENTION} attention has no key-value cache: pass use_cache=False")
        out = F.scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=True, enable_gqa=gqa)
        return out.transpose(1, 2), None  # [B, T, H, D]

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # token-major: [T, H, D], [T, Hkv, D]
    if layout.kv_index is not None:
        k, v = k.index_select(0, layout.kv_index), v.index_select(0, layout.kv_index)  # [Tk, Hkv, D]
    outs = []
    for q_i, k_i, v_i in zip(
        q.split(layout.q_lengths), k.split(layout.k_lengths), v.split(layout.k_lengths), strict=True
    ):
        n, m = len(q_i), len(k_i)
        mask = None if n == m else torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        out = F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q_i, k_i, v_i)),  # [1, H, n, D], [1, Hkv, m, D]
            attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa,
        )
        outs.append(out.transpose(1, 2))  # [1, n, H, D]
    return torch.cat(outs, dim=1), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def packing_refusal(config, max_length: int) -> str | None:
    """None when packing is exact for this model at lengths up to `max_length`, else the reason in words."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model is None or not model._supports_attention_backend or not model._supports_sdpa:
        return f"{config.model_type} does not hand its attention to a registered function"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{config.model_type} takes no position_ids"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention is soft-capped"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < max_length:
        return f"its sliding window of {window} tokens is shorter than {max_length}"
    return None


def attention_implementation(config) -> str:
    """What a padded run must use: "eager" where HF's SDPA would drop part of the model's attention, else "sdpa"."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
