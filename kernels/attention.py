"""Packed, prefix-shared attention for Hugging Face models: the prompt of a preference pair is
computed once.

DPO needs log p(chosen | prompt) and log p(rejected | prompt). Run as two padded sequences, the
prompt is computed twice and every pad costs as much as a token. Here a microbatch of pairs is one
row without padding, [P|C|R][P|C|R]..., each pair its prompt, chosen and rejected answer. What one
pair's tokens may look at:

                      keys
                 P P P  C C  R R R
             P   x . .  . .  . . .
             P   x x .  . .  . . .       x = looks at, . = does not
             P   x x x  . .  . . .
    queries  C   x x x  x .  . . .       The chosen answer sees the prompt and itself,
             C   x x x  x x  . . .
             R   x x x  . .  x . .       and so does the rejected one. It never sees the chosen,
             R   x x x  . .  x x .       and its positions go on from len(P), as if C were not there.
             R   x x x  . .  x x x

So each answer is computed exactly as if it stood alone behind its prompt, and of all layers only
attention has to know: the others work token by token. The mask is no new kind of mask either, but
two causal ones, a segment each:

    segment 1    q = [P|C]    k = [P|C]     a causal square
    segment 2    q = [R]      k = [P|R]     the last len(R) rows of the causal square of [P|R]

The segments' queries, one after another, are the row itself. Their keys and values are gathered
from it (`kv_index`), the prompt's twice; the gather's backward pass adds the two gradients of a
prompt's key, and that is all of sharing.

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation=ATTENTION)
    position_ids, layout = prefix_layout([(len(p), len(c), len(r)) for p, c, r in pairs], device)
    hidden = model.model(input_ids=row, position_ids=position_ids, use_cache=False, layout=layout)[0]  # [1, T, D]

`layout` is no argument transformers knows. It rides through the models' **kwargs to the function
registered below; a model that drops it on the way, masks that are not plainly causal and padding
are errors, never a silent approximation. With torch >= 2.11 on a GPU all segments are one call of
the flash kernel; otherwise SDPA runs them one at a time.

Prefix sharing for pairs: Wang and Hegde, "Accelerating Direct Preference Optimization with Prefix
Sharing", arXiv:2410.20305. They build the mask with FlexAttention; two segments need no compiler
and run on a CPU too.
"""

import inspect
import sys
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch.nn.attention.varlen import varlen_attn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface

ATTENTION = "iterdpo_packed"  # pass it as attn_implementation


def asks_for_gqa(varlen) -> bool:
    """torch 2.12 and later must be told that query heads share key heads; 2.11 has no such word."""
    return "enable_gqa" in inspect.signature(varlen).parameters


VARLEN_ASKS_FOR_GQA = asks_for_gqa(varlen_attn)


# ---- the row: who looks at whom ----------------------------------------------------------------


@dataclass
class Layout:
    """S segments tile the row of T tokens. Segment i's queries end where its keys end: causal,
    bottom-right aligned.
    """

    cu_seqlens_q: (
        torch.Tensor
    )  # [S+1] int32: segment i's queries are q[cu_seqlens_q[i] : cu_seqlens_q[i+1]]
    cu_seqlens_k: (
        torch.Tensor
    )  # [S+1] int32: its keys are k[kv_index][cu_seqlens_k[i] : cu_seqlens_k[i+1]]
    kv_index: (
        torch.Tensor | None
    )  # [Tk] int64: the row's keys in the order of the segments; None: as they stand
    max_seqlen_q: int
    max_seqlen_k: int
    tokens: int  # T
    q_lengths: list[
        int
    ]  # the same lengths on the host, so that no one ever waits for a GPU to learn them
    k_lengths: list[int]


def prefix_layout(lengths: list[tuple[int, ...]], device="cpu") -> tuple[torch.Tensor, Layout]:
    """(prompt, chosen, rejected) lengths of each pair -> position_ids [1, T] and Layout of the row
    [P|C|R][P|C|R]...

    A prompt may have any number of answers: (prompt, a, b, c) is [P|A|B|C].
    """
    positions, kv_index, q_lengths, k_lengths, start = [], [], [], [], 0
    for i, (p, *answers) in enumerate(lengths):
        if not answers or min(answers) < 1:
            raise ValueError(
                f"pair {i} of the row has lengths {lengths[i]}: each answer needs a token"
            )
        # The token numbers in the row.
        prompt, *parts = torch.arange(start, start + p + sum(answers)).split([p, *answers])
        positions += [torch.arange(p + answers[0]), *(torch.arange(p, p + n) for n in answers[1:])]
        kv_index += [tokens for part in parts for tokens in (prompt, part)]
        q_lengths += [p + answers[0], *answers[1:]]
        k_lengths += [p + n for n in answers]
        start += p + sum(answers)
    return _layout(positions, torch.cat(kv_index), q_lengths, k_lengths, device)


def packed_layout(lengths: list[int], device="cpu") -> tuple[torch.Tensor, Layout]:
    """Lengths of unrelated sequences -> position_ids [1, T] and Layout of the row that holds one
    after another.
    """
    return _layout([torch.arange(n) for n in lengths], None, list(lengths), list(lengths), device)


def _layout(positions, kv_index, q_lengths, k_lengths, device):
    def starts(lengths):
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    kv_index = None if kv_index is None else kv_index.to(device)
    sizes = (max(q_lengths), max(k_lengths), sum(q_lengths), q_lengths, k_lengths)
    return torch.cat(positions)[None].to(device), Layout(
        starts(q_lengths), starts(k_lengths), kv_index, *sizes
    )


# ---- the attention function, called by transformers in every layer -----------------------------


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout=None, **kwargs
):
    """query [1, H, T, D], key and value [1, Hkv, T, D] -> [1, T, H, D]. Without a layout: B rows,
    one sequence each.
    """
    _check(module, query, key, attention_mask, dropout, layout, kwargs)
    gqa = (
        query.shape[1] != key.shape[1]
    )  # grouped-query attention: H / Hkv query heads share a key head
    if layout is None:
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=gqa
        )
        return out.transpose(1, 2), None  # [B, T, H, D]

    q, k, v = (
        x[0].transpose(0, 1) for x in (query, key, value)
    )  # tokens first: [T, H, D], [T, Hkv, D]
    if layout.kv_index is not None:
        # A key is gathered at most twice, so its gradient is a sum of two: the same in any order,
        # on a GPU too.
        k, v = (
            k.index_select(0, layout.kv_index),
            v.index_select(0, layout.kv_index),
        )  # [Tk, Hkv, D]

    if _flash_takes(q, v):
        # window_size (-1, 0) is causal, and causal is aligned to the bottom right: query i of n
        # sees keys up to m-n+i.
        told = {"enable_gqa": gqa} if VARLEN_ASKS_FOR_GQA else {}
        out = varlen_attn(
            q, k, v, layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_seqlen_q, layout.max_seqlen_k,
            scale=scaling, window_size=(-1, 0), **told,
        )  # fmt: skip
        return out[None], None  # [1, T, H, D]

    # split() and not slices: the backward pass of n slices of a row writes n rows of zeros, that of
    # split() one.
    segments = zip(
        q.split(layout.q_lengths), k.split(layout.k_lengths), v.split(layout.k_lengths), strict=True
    )
    outs = []
    for q_i, k_i, v_i in segments:
        n, m = len(q_i), len(k_i)
        # SDPA's is_causal is aligned to the top left: right for a square, wrong for [R] against
        # [P|R].
        mask = None if n == m else torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        q_i, k_i, v_i = (
            x.transpose(0, 1)[None] for x in (q_i, k_i, v_i)
        )  # [1, H, n, D], [1, Hkv, m, D]
        out = F.scaled_dot_product_attention(
            q_i, k_i, v_i, mask, 0.0, mask is None, scale=scaling, enable_gqa=gqa
        )
        outs.append(out.transpose(1, 2))  # [1, n, H, D]
    return torch.cat(outs, dim=1), None


def _flash_takes(q, v) -> bool:
    d = q.shape[-1]
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and d == v.shape[-1]
        and d % 8 == 0
        and d <= 256
    )


def packed_mask(attention_mask=None, allow_is_causal_skip=True, **kwargs):
    """What transformers calls once a forward pass for the mask. We need none, but here one sees
    what kind of row it is.

    None for ordinary rows. Where something asks for more than causality, which is what transformers
    does on seeing position_ids that restart, an empty tensor: it reaches every layer, so one that
    is not given the layout is noticed.
    """
    if attention_mask is not None:
        raise ValueError(
            f"{ATTENTION} attention takes no attention_mask, not even of ones: its rows hold no padding. Leave it out, "
            f'or load the model with attn_implementation="sdpa" to run padded'
        )
    return None if allow_is_causal_skip else torch.empty(0, dtype=torch.bool)


def _check(module, query, key, attention_mask, dropout, layout, kwargs):
    """Raise rather than compute something else than the model means: the net below
    packing_refusal().
    """
    tokens = query.shape[2]
    longest = tokens if layout is None else layout.max_seqlen_k
    window = kwargs.get("sliding_window") or longest
    # soft-capped scores, attention sinks, ALiBi and its relatives
    extras = [
        name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None
    ]
    if attention_mask is not None and attention_mask.numel():
        fault = "the model brings a mask of its own, which would be ignored: run it padded"
    elif layout is None and attention_mask is not None:
        fault = (
            "position_ids restart, so the row holds several sequences, but no layout arrived here. Pass layout= to the "
            "model; if you did, the model does not hand its **kwargs down to its attention: run it padded"
        )
    elif layout is not None and (query.shape[0] != 1 or layout.tokens != tokens):
        fault = f"the layout is for 1 row of {layout.tokens} tokens, the input is {query.shape[0]} x {tokens}"
    elif key.shape[2] != tokens:
        fault = "there are cached keys, which packing knows nothing of: pass use_cache=False"
    elif dropout:
        fault = "attention dropout is on, and DPO compares log-probs: set attention_dropout=0 in the model's config"
    elif not kwargs.get("is_causal", True) or not getattr(module, "is_causal", True):
        fault = "this attention is not causal"
    elif window < longest:
        fault = f"its sliding window of {window} tokens is shorter than the longest sequence, {longest}: run it padded"
    elif extras:
        fault = f"it uses {', '.join(extras)}, which packing does not implement: run it padded"
    else:
        return
    raise ValueError(f"{type(module).__name__}, layer {getattr(module, 'layer_idx', '?')}: {fault}")


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, packed_mask)


# ---- which models ------------------------------------------------------------------------------


def positions(config) -> int:
    """Tokens that the model can read; sys.maxsize where its config sets no limit (XLNet's is -1)."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if limit and limit > 0 else sys.maxsize


def causal_lm_refusal(config) -> str | None:
    """None for a decoder-only language model that transformers itself implements, else why it is
    none.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder:
        return None
    return (
        f"{config.model_type} is no decoder-only language model of transformers' own. "
        "Others cannot be trained here, and remote code is not run"
    )


# As of transformers 5.19. Others would stop in _check.
WITHOUT_LAYOUT = {"doge", "moshi", "nemotron"}
if Version(transformers.__version__) < Version("5.18"):
    WITHOUT_LAYOUT.add("opt")  # it makes a mask of ones where it is given none


def packing_refusal(config, max_length: int) -> str | None:
    """None where packing is exact for sequences (prompt + answer) of up to max_length tokens, else
    why it is not.
    """
    kind, model = config.model_type, MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model is None or config.is_encoder_decoder or config.get_text_config() is not config:
        return f"{kind} is not a text-only decoder that transformers itself implements"
    if model._is_stateful:
        return f"{kind} is recurrent: its state would run on from one sequence into the next"
    layer_types = set(
        getattr(config, "layer_types", None) or ["sliding_attention"]
    )  # Mistral has no list: all slide
    if odd := layer_types - {"full_attention", "sliding_attention"}:
        return f"{kind} has layers that are no plain attention: {', '.join(sorted(odd))}"
    if not model._supports_attention_backend:
        return f"{kind} computes attention in code of its own (models with ALiBi do)"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{kind} takes no position_ids, so positions cannot restart"
    if kind in WITHOUT_LAYOUT:
        return f"{kind} does not hand the layout to its attention, or adds a mask of its own"
    if _soft_capped(config):
        return f"{kind} soft-caps its attention scores, which neither SDPA nor varlen_attn can do"
    if not model._supports_sdpa:
        return f"{kind} has attention that is no plain softmax (attention sinks, for one)"
    if getattr(config, "use_bidirectional_attention", None):
        return f"{kind} is set to bidirectional attention"
    window = getattr(config, "sliding_window", None)
    if window and window < max_length and "sliding_attention" in layer_types:
        return f"its sliding window of {window} tokens is shorter than the longest sequence allowed, {max_length}"
    for rope in _ropes(config):
        own_limit = getattr(config, "max_position_embeddings", max_length)
        limit = rope.get("original_max_position_embeddings") or own_limit
        if rope.get("rope_type") in ("dynamic", "longrope") and max_length > limit:
            kind = rope["rope_type"]
            return (
                f"its {kind} rotary embedding changes for the whole batch when one sequence in it is "
                f"longer than {limit} tokens. Padded log-probs depend on the batch then, too: better "
                "keep max_length within it"
            )
    return None


def _ropes(config) -> list[dict]:
    """The settings of each rotary embedding: one for all layers, or (Gemma 3) one per layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [settings for settings in rope.values() if isinstance(settings, dict)]
    return nested or [rope]


def _soft_capped(config) -> bool:
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def attention_implementation(config) -> str:
    """For a padded run: "sdpa", or "eager" where HF's SDPA would leave part of the attention out
    without a word.
    """
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "eager" if model is None or not model._supports_sdpa or _soft_capped(config) else "sdpa"
