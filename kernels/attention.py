"""Packed, prefix-shared attention for Hugging Face models: the prompt of a preference pair is
computed once.

DPO needs log p(chosen | prompt) and log p(rejected | prompt). Run as two padded sequences, the
prompt is computed twice and every pad costs as much as a token. Here a microbatch of pairs is one
row without padding, [P|C|R][P|C|R]...: for each pair its prompt, chosen and rejected answer. What
one pair's tokens may look at:

                      keys
                 P P P  C C  R R R
             P   x . .  . .  . . .
             P   x x .  . .  . . .       x = looks at, . = does not
             P   x x x  . .  . . .
    queries  C   x x x  x .  . . .       The chosen answer sees the prompt and itself,
             C   x x x  x x  . . .
             R   x x x  . .  x . .       and so does the rejected one. It never sees the chosen,
             R   x x x  . .  x x .       and its positions start at len(P), as if C were not there.
             R   x x x  . .  x x x

So each answer is computed exactly as if it stood alone after its prompt. Only attention has to know
about this: all other layers work token by token. And no new kind of mask is needed, but two causal
ones, one per segment:

    segment 1    q = [P|C]    k = [P|C]     a causal square
    segment 2    q = [R]      k = [P|R]     the last len(R) rows of the causal square of [P|R]

The segments' queries, one after another, are the row itself. Their keys and values are gathered
from it (`kv_index`), the prompt's twice. The gather's backward pass adds the two gradients of each
of the prompt's keys, and sharing needs nothing more.

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation=ATTENTION)
    lengths = [(len(p), len(c), len(r)) for p, c, r in pairs]
    position_ids, layout = prefix_layout(lengths, device)
    inputs = {"input_ids": row, "position_ids": position_ids, "layout": layout}
    hidden = model.model(**inputs, use_cache=False)[0]  # [1, T, D]

transformers has no argument `layout`. It passes through the models' **kwargs to the function
registered below. It is an error, never a silent approximation, if a model drops it on the way, if a
mask is not plainly causal, or if there is padding. With torch >= 2.11 on a GPU all segments are one
call of the flash kernel; otherwise SDPA runs them one at a time.

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

from kernels.device import device_kind

ATTENTION = "iterdpo_packed"  # pass it as attn_implementation


# ---- the row: who looks at whom ----------------------------------------------------------------


@dataclass
class Layout:
    """S segments tile the row of T tokens. Each is causal, and its last query sees all its keys.

    The queries of segment i are q[cu_seqlens_q[i] : cu_seqlens_q[i+1]]; its keys are
    k[kv_index][cu_seqlens_k[i] : cu_seqlens_k[i+1]].
    """

    cu_seqlens_q: torch.Tensor  # [S+1] int32
    cu_seqlens_k: torch.Tensor  # [S+1] int32
    # [Tk] int64: the row's keys in the order of the segments; None: the order of the row
    kv_index: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    tokens: int  # T
    # The same lengths on the host, so that reading them does not wait for a GPU.
    q_lengths: list[int]
    k_lengths: list[int]


def prefix_layout(lengths: list[tuple[int, ...]], device="cpu") -> tuple[torch.Tensor, Layout]:
    """Lengths of each pair's (prompt, chosen, rejected) -> position_ids [1, T] and Layout.

    They are those of the row [P|C|R][P|C|R]... A prompt may have any number of answers:
    (prompt, a, b, c) is [P|A|B|C].
    """
    positions = []  # of the queries, a tensor for each segment
    keys = []  # numbers of tokens of the row, two tensors for each segment: prompt, answer
    q_lengths = []
    k_lengths = []
    start = 0  # of the pair in the row
    for number, (p, *answers) in enumerate(lengths):
        if not answers or min(answers) < 1:
            raise ValueError(
                f"pair {number} of the row has lengths {lengths[number]}: each answer needs a token"
            )
        end = start + p + sum(answers)
        prompt, *parts = torch.arange(start, end).split([p, *answers])
        first_query = 0  # the prompt's queries belong to the first answer's segment
        for part in parts:
            n = p + len(part)
            positions.append(torch.arange(first_query, n))
            keys += [prompt, part]
            q_lengths.append(n - first_query)
            k_lengths.append(n)
            first_query = p
        start = end
    return _layout(positions, torch.cat(keys), q_lengths, k_lengths, device)


def packed_layout(lengths: list[int], device="cpu") -> tuple[torch.Tensor, Layout]:
    """Lengths of unrelated sequences, one after another in a row -> position_ids [1, T], Layout."""
    positions = [torch.arange(n) for n in lengths]
    return _layout(positions, None, list(lengths), list(lengths), device)


def _layout(positions, kv_index, q_lengths, k_lengths, device) -> tuple[torch.Tensor, Layout]:
    position_ids = torch.cat(positions)[None].to(device)  # [1, T]
    layout = Layout(
        cu_seqlens_q=_starts(q_lengths, device),
        cu_seqlens_k=_starts(k_lengths, device),
        kv_index=None if kv_index is None else kv_index.to(device),
        max_seqlen_q=max(q_lengths),
        max_seqlen_k=max(k_lengths),
        tokens=sum(q_lengths),
        q_lengths=q_lengths,
        k_lengths=k_lengths,
    )
    return position_ids, layout


def _starts(lengths: list[int], device) -> torch.Tensor:
    """Where each segment starts, and where the last one ends: [S+1] int32, as varlen_attn wants."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


# ---- the attention function, called by transformers in every layer -----------------------------


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout=None, **kwargs
):
    """query [B, H, T, D], key and value [B, Hkv, T, D] -> [B, T, H, D], and None for the weights.

    With a layout B is 1. Without one, each row is one sequence.
    """
    _check(module, query, key, attention_mask, dropout, layout, kwargs)
    # grouped-query attention: H / Hkv query heads share a key head
    gqa = query.shape[1] != key.shape[1]
    if layout is None:
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=gqa
        )
        return out.transpose(1, 2), None  # [B, T, H, D]

    # tokens first, without the batch dimension
    q = query[0].transpose(0, 1)  # [T, H, D]
    k = key[0].transpose(0, 1)  # [T, Hkv, D]
    v = value[0].transpose(0, 1)  # [T, Hkv, D]

    # With two answers a prompt's key is gathered twice, so its gradient is a sum of two: the same
    # in any order, bit for bit, on a GPU too.
    if layout.kv_index is not None:
        k = k.index_select(0, layout.kv_index)  # [Tk, Hkv, D]
        v = v.index_select(0, layout.kv_index)  # [Tk, Hkv, D]

    attend = _all_at_once if _flash_takes(q, v) else _one_at_a_time
    out = attend(q, k, v, layout, scaling, gqa)  # [T, H, D]
    return out[None], None


def _flash_takes(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether varlen_attn has a kernel for q [T, H, D] and v [Tk, Hkv, Dv]."""
    D = q.shape[-1]
    return (
        device_kind(q) == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and v.shape[-1] == D
        and D % 8 == 0
        and D <= 256
    )


def asks_for_gqa(varlen) -> bool:
    """torch 2.12 and later must be told that query heads share key heads; 2.11 finds out itself."""
    return "enable_gqa" in inspect.signature(varlen).parameters


VARLEN_ASKS_FOR_GQA = asks_for_gqa(varlen_attn)


def _all_at_once(q, k, v, layout: Layout, scaling: float | None, gqa: bool) -> torch.Tensor:
    """q [T, H, D], k and v [Tk, Hkv, D] -> [T, H, D], all segments in one flash kernel."""
    told = {"enable_gqa": gqa} if VARLEN_ASKS_FOR_GQA else {}
    return varlen_attn(
        q,
        k,
        v,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        scale=scaling,
        # Causal, and aligned to the bottom right: query i of n sees m keys up to m-n+i.
        window_size=(-1, 0),
        **told,
    )


def _one_at_a_time(q, k, v, layout: Layout, scaling: float | None, gqa: bool) -> torch.Tensor:
    """As _all_at_once, with one call of SDPA for each segment."""
    # split(), not slices: the backward of n slices writes n rows of zeros, that of split() one.
    queries = q.split(layout.q_lengths)
    keys = k.split(layout.k_lengths)
    values = v.split(layout.k_lengths)
    outs = []
    for q_i, k_i, v_i in zip(queries, keys, values, strict=True):
        n, m = len(q_i), len(k_i)
        # SDPA's is_causal is aligned to the top left: right for a square, wrong for [R] and [P|R].
        mask = None
        if n != m:
            mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)  # [n, m]
        out = F.scaled_dot_product_attention(
            q_i.transpose(0, 1)[None],  # [1, H, n, D]
            k_i.transpose(0, 1)[None],  # [1, Hkv, m, D]
            v_i.transpose(0, 1)[None],  # [1, Hkv, m, D]
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=gqa,
        )
        outs.append(out[0].transpose(0, 1))  # [n, H, D]
    return torch.cat(outs)


def packed_mask(attention_mask=None, allow_is_causal_skip=True, **kwargs):
    """What transformers calls once per forward pass to make the mask.

    We need no mask, but this call shows what kind of row it is. Ordinary rows get None. Where more
    than causality is asked for, which transformers does when position_ids restart, the row gets an
    empty tensor. It reaches every layer, so a layer that is not given the layout is noticed.
    """
    if attention_mask is not None:
        raise ValueError(
            f"{ATTENTION} attention takes no attention_mask, not even of ones: its rows hold no "
            'padding. Leave it out, or load the model with attn_implementation="sdpa" to run padded'
        )
    if allow_is_causal_skip:
        return None
    return torch.empty(0, dtype=torch.bool)


def _check(module, query, key, attention_mask, dropout, layout, kwargs) -> None:
    """Raise, rather than compute something other than the model does.

    This catches what packing_refusal() lets through.
    """
    longest = query.shape[2] if layout is None else layout.max_seqlen_k
    fault = _fault_of_row(query, key, attention_mask, layout)
    fault = fault or _fault_of_layer(module, longest, dropout, kwargs)
    if fault:
        layer = getattr(module, "layer_idx", "?")
        raise ValueError(f"{type(module).__name__}, layer {layer}: {fault}")


def _fault_of_row(query, key, attention_mask, layout) -> str | None:
    """What is wrong with what this layer is given; None if nothing is."""
    rows, _, tokens, _ = query.shape
    if attention_mask is not None and attention_mask.numel():
        return "the model brings a mask of its own, which would be ignored: run it padded"
    if attention_mask is not None and layout is None:  # the empty one, from packed_mask
        return (
            "position_ids restart, so the row holds several sequences, but no layout arrived here. "
            "Pass layout= to the model; if you did, the model does not hand its **kwargs down to "
            "its attention: run it padded"
        )
    if layout is not None and (rows != 1 or layout.tokens != tokens):
        return f"the layout is for 1 row of {layout.tokens} tokens, the input is {rows} x {tokens}"
    if key.shape[2] != tokens:
        return "there are cached keys, which packing knows nothing of: pass use_cache=False"
    return None


def _fault_of_layer(module, longest: int, dropout: float, kwargs: dict) -> str | None:
    """What this layer does that packing does not; None if nothing."""
    if dropout:
        return (
            "attention dropout is on, and DPO compares log-probs: "
            "set attention_dropout=0 in the model's config"
        )
    if not kwargs.get("is_causal", True) or not getattr(module, "is_causal", True):
        return "this attention is not causal"
    window = kwargs.get("sliding_window") or longest
    if window < longest:
        return (
            f"its sliding window of {window} tokens is shorter than the longest sequence, "
            f"{longest}: run it padded"
        )
    # soft-capped scores; attention sinks; ALiBi and its relatives
    extras = ("softcap", "s_aux", "position_bias")
    used = [name for name in extras if kwargs.get(name) is not None]
    if used:
        return f"it uses {', '.join(used)}, which packing does not implement: run it padded"
    return None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, packed_mask)


# ---- which models ------------------------------------------------------------------------------


# RoBERTa and what was made of it count positions from pad_token_id + 1.
COUNT_FROM_PAD = {
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "luke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}


def positions(config) -> int:
    """Tokens that the model can read; sys.maxsize where its config sets no limit (XLNet's: -1)."""
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not limit or limit < 0:
        return sys.maxsize
    if config.model_type in COUNT_FROM_PAD:
        return limit - config.pad_token_id - 1  # 512 of 514
    return limit


def causal_lm_refusal(config) -> str | None:
    """None for a decoder-only language model that transformers itself implements, or why not."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder:
        return None
    return (
        f"{config.model_type} is no decoder-only language model of transformers' own. "
        "Others cannot be trained here, and remote code is not run"
    )


def attention_implementation(config) -> str:
    """For a padded run: "sdpa", or "eager" where transformers' SDPA leaves part of it out."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model is None or not model._supports_sdpa or _soft_capped(config):
        return "eager"
    return "sdpa"


# These do not hand the layout to their attention, or bring a mask of their own, and no attribute of
# theirs shows it. As of transformers 5.19.
WITHOUT_LAYOUT = {"doge", "moshi", "nemotron"}
if Version(transformers.__version__) < Version("5.18"):
    WITHOUT_LAYOUT.add("opt")  # it makes a mask of ones where it is given none


def packing_refusal(config, max_length: int) -> str | None:
    """None where packing is exact for sequences of up to max_length tokens, or why it is not.

    A sequence is a prompt and an answer. Each rule names models that it refuses, as of transformers
    5.19. A model that a rule should refuse, but none does, stops in _check at its first forward
    pass.
    """
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model is None or config.is_encoder_decoder or config.get_text_config() is not config:
        # T5, BART, Whisper; models with images, such as Gemma 3 from 4B on; remote code
        return f"{config.model_type} is not a text-only decoder that transformers itself implements"
    return (
        _refuses_the_model(config, model)
        or _refuses_the_window(config, max_length)
        or _refuses_the_positions(config, max_length)
    )


def _refuses_the_model(config, model) -> str | None:
    """What packing cannot do at any length, one rule after another. model: the class."""
    kind = config.model_type

    # Mamba, RWKV, RecurrentGemma, Qwen3-Next, Jamba, Zamba
    if model._is_stateful:
        return f"{kind} is recurrent: its state would run on from one sequence into the next"

    # LFM2 (convolutions), MiniMax (linear attention), Llama 4 (chunks), DeepSeek 3.2 (an index)
    odd = _layer_types(config) - {"full_attention", "sliding_attention"}
    if odd:
        return f"{kind} has layers that are no plain attention: {', '.join(sorted(odd))}"

    # Bloom, MPT and Falcon (ALiBi), GPT-J, GPT-Neo, StableLM, XLNet
    if not model._supports_attention_backend:
        return f"{kind} computes attention in code of its own (models with ALiBi do)"

    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{kind} takes no position_ids, so positions cannot restart"

    if kind in WITHOUT_LAYOUT:
        return f"{kind} does not hand the layout to its attention, or adds a mask of its own"

    # Gemma 2, VaultGemma
    if _soft_capped(config):
        return f"{kind} soft-caps its attention scores, which neither SDPA nor varlen_attn can do"

    # GPT-OSS, MiMo V2
    if not model._supports_sdpa:
        return f"{kind} has attention that is no plain softmax (attention sinks, for one)"

    # Gemma 4, where its config says so
    if getattr(config, "use_bidirectional_attention", None):
        return f"{kind} is set to bidirectional attention"
    return None


def _refuses_the_window(config, max_length: int) -> str | None:
    """A window that no sequence fills changes nothing: Mistral and Phi-3 depend on max_length."""
    window = getattr(config, "sliding_window", None)
    if not window or window >= max_length or "sliding_attention" not in _layer_types(config):
        return None
    return (
        f"its sliding window of {window} tokens is shorter than the longest sequence allowed, "
        f"{max_length}"
    )


def _refuses_the_positions(config, max_length: int) -> str | None:
    """Rotary embeddings that change with the longest sequence of the batch (Phi-3 with 128k)."""
    for rope in _ropes(config):
        own_limit = getattr(config, "max_position_embeddings", max_length)
        limit = rope.get("original_max_position_embeddings") or own_limit
        kind = rope.get("rope_type")
        if kind in ("dynamic", "longrope") and max_length > limit:
            return (
                f"its {kind} rotary embedding changes for the whole batch when one sequence in it "
                f"is longer than {limit} tokens. Padded log-probs depend on the batch then, too: "
                "better keep max_length within it"
            )
    return None


def _layer_types(config) -> set[str]:
    """What kinds of layers there are. A config without a list (Mistral's) means: all slide."""
    return set(getattr(config, "layer_types", None) or ["sliding_attention"])


def _ropes(config) -> list[dict]:
    """The settings of each rotary embedding: one for all layers, or (Gemma 3) per layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [settings for settings in rope.values() if isinstance(settings, dict)]
    return nested or [rope]


def _soft_capped(config) -> bool:
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))
