"""Law 4, alone = batched = packed = prefix-shared, forward and gradient; and every way to break it
is an error.
"""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    NemotronConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    T5Config,
)

import kernels.attention as attention
from bench.attention import compare
from kernels.attention import (
    ATTENTION,
    attention_implementation,
    packed_layout,
    packing_refusal,
    prefix_layout,
)
from kernels.device import counted_as_gpu

LENGTHS = [
    (7, 5, 9),
    (1, 1, 3),
    (12, 8, 1),
    (4, 6, 6),
]  # prompt, chosen, rejected: short, shorter, uneven, even
TINY = dict(
    vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
TINY |= dict(
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
FAMILIES = {
    "llama": LlamaConfig(**TINY),
    "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
    "olmo2": Olmo2Config(**TINY),
    "phi3": Phi3Config(**TINY, sliding_window=32),  # a window, but longer than any sequence here
    "mistral": MistralConfig(**TINY, sliding_window=32),
}


def build(config, tied=False):
    torch.manual_seed(0)
    config = copy.deepcopy(
        config
    )  # transformers writes the attention implementation into the config it is given
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    with torch.no_grad():
        for p in model.parameters():
            if (
                p.dim() > 1
            ):  # at the usual 0.02 all attention is nearly uniform, and a wrong key hardly shows
                p.normal_(std=0.3)
    return model


def random_pairs(lengths=LENGTHS, seed=1):
    """-> a list of (prompt, chosen, rejected) token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randint(3, 101, (n,), generator=generator) for n in triple)
        for triple in lengths
    ]


def token_logprobs(logits, ids):
    """log p(ids[t+1] | ids[:t+1]) for logits [T, V] and ids [T] -> [T-1]."""
    return logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


# Four ways to the same log-probs. Each gives one vector: all completion tokens, pair by pair,
# chosen before rejected.


def alone(model, pairs):
    """The specification: one sequence at a time through transformers' eager attention."""
    model.set_attn_implementation("eager")
    out = []
    for prompt, *answers in pairs:
        for answer in answers:
            ids = torch.cat([prompt, answer])
            out.append(
                token_logprobs(model(input_ids=ids[None], use_cache=False).logits[0], ids)[
                    len(prompt) - 1 :
                ]
            )
    return torch.cat(out)


def padded(model, pairs, pad_id=0, extra=0):
    """All sequences as one right-padded batch, the way other trainers run them."""
    model.set_attn_implementation(attention_implementation(model.config))
    rows = [torch.cat([prompt, answer]) for prompt, *answers in pairs for answer in answers]
    length = max(map(len, rows)) + extra
    ids = torch.stack([F.pad(row, (0, length - len(row)), value=pad_id) for row in rows])  # [2B, L]
    mask = torch.stack([torch.arange(length) < len(row) for row in rows]).long()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    starts = [len(prompt) - 1 for prompt, *_ in pairs for _ in range(2)]
    return torch.cat(
        [token_logprobs(logits[i, : len(r)], r)[starts[i] :] for i, r in enumerate(rows)]
    )


def packed(model, pairs):
    """All sequences in one row, the prompt twice."""
    model.set_attn_implementation(ATTENTION)
    rows = [torch.cat([prompt, answer]) for prompt, *answers in pairs for answer in answers]
    position_ids, layout = packed_layout([len(row) for row in rows])
    logits = model(
        input_ids=torch.cat(rows)[None], position_ids=position_ids, use_cache=False, layout=layout
    ).logits
    starts = [len(prompt) - 1 for prompt, *_ in pairs for _ in range(2)]
    pieces = zip(logits[0].split([len(row) for row in rows]), rows, starts, strict=True)
    return torch.cat([token_logprobs(piece, row)[start:] for piece, row, start in pieces])


def shared(model, pairs):
    """All pairs in one row, the prompt once."""
    model.set_attn_implementation(ATTENTION)
    position_ids, layout = prefix_layout([tuple(map(len, pair)) for pair in pairs])
    row = torch.cat([part for pair in pairs for part in pair])
    logits = model(
        input_ids=row[None], position_ids=position_ids, use_cache=False, layout=layout
    ).logits[0]
    out, start = [], 0
    for prompt, chosen, rejected in pairs:
        p, c, r = len(prompt), len(chosen), len(rejected)
        of_prompt, of_chosen, of_rejected = logits[start : start + p + c + r].split([p, c, r])
        for answer, of_answer in ((chosen, of_chosen), (rejected, of_rejected)):
            predicts = torch.cat(
                [of_prompt[-1:], of_answer]
            )  # the prompt's last token predicts both answers' first
            out.append(token_logprobs(predicts, torch.cat([prompt[-1:], answer])))
        start += p + c + r
    return torch.cat(out)


def gradients(model, logprobs):
    """Gradients of a sum in which every token has another weight, so that no two tokens can be
    exchanged unnoticed.
    """
    model.zero_grad()
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_alone_is_batched_is_packed_is_prefix_shared(family, tied, checkpointing):
    """Law 4, PITFALLS 19: the same log-probs and the same gradients to 1e-5, whatever shares the
    row.
    """
    model, pairs = build(FAMILIES[family], tied), random_pairs()
    expected = alone(model, pairs)
    expected_grads = gradients(model, expected)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()  # transformers checkpoints only in training mode
    for way in (padded, packed, shared):
        got = way(model, pairs)
        torch.testing.assert_close(
            got, expected, rtol=0, atol=1e-5, msg=lambda m, way=way: f"{way.__name__}: {m}"
        )
        for name, grad in gradients(model, got).items():
            scale = (
                expected_grads[name].abs().max().clamp(min=1)
            )  # 1e-5 of the largest entry: weights of 0.3 are steep
            error = (grad - expected_grads[name]).abs().max() / scale
            assert error < 1e-5, f"{way.__name__}: gradient of {name} is off by {error:.1e}"


def test_what_follows_a_pair_does_not_change_it():
    """PITFALLS 19: other tokens after it change nothing, bit for bit; another number of them
    changes only the rounding.
    """
    model, pairs = build(FAMILIES["llama"]), random_pairs()
    mine = len(pairs[0][1]) + len(pairs[0][2])
    with torch.no_grad():
        first = shared(model, pairs)[:mine]
        others = shared(model, pairs[:1] + random_pairs(seed=2)[1:])[:mine]
        single = shared(model, pairs[:1])
    assert torch.equal(first, others)
    torch.testing.assert_close(
        first, single, rtol=0, atol=1e-6 * 4
    )  # log-probs are about 4: single precision of that


def test_padding_never_changes_a_log_prob():
    """PITFALLS 20: neither the pad token nor the number of pads."""
    model, pairs = build(FAMILIES["qwen2"]), random_pairs()
    with torch.no_grad():
        expected = padded(model, pairs)
        torch.testing.assert_close(
            padded(model, pairs, pad_id=17, extra=5), expected, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("part", [0, 1, 2], ids=["prompt", "chosen", "rejected"])
def test_only_what_may_look_at_a_token_depends_on_it(part):
    """The mask as the model computes it: change one token and see which outputs of the row change.
    R never sees C.
    """
    p, c, r = 6, 5, 7
    model, (pair,) = build(FAMILIES["llama"]), random_pairs([(p, c, r)])
    position_ids, layout = prefix_layout([(p, c, r)])
    changed = [(0, p, 2), (p, c, 1), (p + c, r, 3)][
        part
    ]  # where the part starts, its length, the token in it
    at = changed[0] + changed[2]
    row = torch.cat(pair)
    other = row.clone()
    other[at] = (row[at] + 1) % 101
    with torch.no_grad():
        a, b = (
            model(
                input_ids=x[None], position_ids=position_ids, use_cache=False, layout=layout
            ).logits[0]
            for x in (row, other)
        )
    moved = (a != b).any(-1)  # [T]
    token = torch.arange(p + c + r)
    same_part = (token >= changed[0]) & (token < changed[0] + changed[1])
    assert torch.equal(moved, (token >= at) & (same_part if part else True))


def test_no_gradient_flows_from_the_rejected_answer_to_the_chosen():
    """PITFALLS 19, in backward: the gradient of R's outputs by C's inputs is exactly zero, and by
    P's it is not.
    """
    p, c, r = 6, 5, 7
    model = build(FAMILIES["llama"])
    position_ids, layout = prefix_layout([(p, c, r)])
    embeds = torch.randn(1, p + c + r, TINY["hidden_size"], requires_grad=True)
    hidden = model.model(
        inputs_embeds=embeds, position_ids=position_ids, use_cache=False, layout=layout
    )[0]
    hidden[:, p + c :].pow(3).sum().backward()
    of_prompt, of_chosen, of_rejected = embeds.grad[0].abs().amax(-1).split([p, c, r])
    assert of_chosen.max() == 0 and of_prompt.min() > 0 and of_rejected.min() > 0


def test_without_a_layout_rows_are_ordinary_sequences():
    model = build(FAMILIES["qwen3"])
    ids = torch.randint(3, 101, (3, 11))
    with torch.no_grad():
        got = model(input_ids=ids, use_cache=False).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(
            got, model(input_ids=ids, use_cache=False).logits, rtol=0, atol=1e-5
        )


# ---- the layout itself -------------------------------------------------------------------------


def dense(layout):
    """The [T, T] mask that a Layout's tensors describe, by the rule of the flash kernel:
    bottom-right aligned.
    """
    tokens = int(layout.cu_seqlens_q[-1])
    index = torch.arange(tokens) if layout.kv_index is None else layout.kv_index
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i in range(len(layout.cu_seqlens_q) - 1):
        rows = torch.arange(*layout.cu_seqlens_q[i : i + 2].tolist())
        keys = index[slice(*layout.cu_seqlens_k[i : i + 2].tolist())]
        for j, row in enumerate(rows):
            mask[row, keys[: len(keys) - len(rows) + j + 1]] = True
    return mask


def test_the_picture_in_the_docstring_is_the_mask():
    rows = re.findall(r"^[ queris]*[PCR]   ([x.](?: {1,2}[x.]){7})", attention.__doc__, re.M)
    picture = torch.tensor([[mark == "x" for mark in row.replace(" ", "")] for row in rows])
    position_ids, layout = prefix_layout([(3, 2, 3)])
    assert torch.equal(dense(layout), picture)
    assert position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]


def test_a_layout_says_the_same_on_the_host_and_on_the_device():
    singles = [5, 1, 9]
    for whole, (position_ids, layout) in (
        (map(sum, LENGTHS), prefix_layout(LENGTHS)),
        (singles, packed_layout(singles)),
    ):
        assert layout.cu_seqlens_q.diff().tolist() == layout.q_lengths
        assert layout.cu_seqlens_k.diff().tolist() == layout.k_lengths
        assert (max(layout.q_lengths), max(layout.k_lengths)) == (
            layout.max_seqlen_q,
            layout.max_seqlen_k,
        )
        assert (
            layout.cu_seqlens_q.dtype == layout.cu_seqlens_k.dtype == torch.int32
        )  # what the flash kernel takes
        assert (
            position_ids.shape == (1, sum(layout.q_lengths)) and position_ids.dtype == torch.int64
        )
        blocks = torch.block_diag(*(torch.ones(n, n, dtype=torch.bool) for n in whole))
        assert not (dense(layout) & ~blocks).any()  # no pair sees another
    with pytest.raises(ValueError, match=r"pair 1 .* \(3, 0, 2\)"):
        prefix_layout([(1, 1, 1), (3, 0, 2)])


# ---- the GPU's branch --------------------------------------------------------------------------


def varlen_of_torch_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """Its signature in torch 2.12 and 2.13, which refuse heads that differ unless they are told to
    expect them.
    """
    assert (query.shape[1] != key.shape[1]) == enable_gqa
    return varlen_as_documented(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size
    )


def varlen_of_torch_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    return varlen_as_documented(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size
    )


def varlen_as_documented(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size):
    """torch.nn.attention.varlen.varlen_attn by its documentation, in plain tensor algebra."""
    assert window_size == (-1, 0)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # [Tk, H, D]
    outs = []
    for i in range(len(cu_q) - 1):
        q_i, k_i, v_i = q[cu_q[i] : cu_q[i + 1]], k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]]
        n, m = len(q_i), len(k_i)
        assert n <= max_q and m <= max_k
        future = torch.arange(m)[None, :] > torch.arange(n)[:, None] + m - n  # bottom-right aligned
        scores = (scale * torch.einsum("nhd,mhd->hnm", q_i, k_i)).masked_fill(future, -torch.inf)
        outs.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v_i))
    return torch.cat(outs)


@pytest.mark.parametrize(
    "varlen", [varlen_of_torch_2_11, varlen_of_torch_2_12], ids=["2.11", "2.12"]
)
def test_pitfalls_52_both_branches_compute_the_same_by_any_signature(monkeypatch, varlen):
    """What we pass to the flash kernel means the same as what we pass to SDPA: forward, and the
    gradient through the gather. PITFALLS 52: with and without enable_gqa in torch's varlen_attn.
    """
    monkeypatch.setattr(attention, "varlen_attn", varlen)
    monkeypatch.setattr(attention, "VARLEN_ASKS_FOR_GQA", attention.asks_for_gqa(varlen))
    _, layout = prefix_layout(LENGTHS)
    tokens = sum(layout.q_lengths)
    q, k, v = (torch.randn(1, heads, tokens, 16, requires_grad=True) for heads in (4, 2, 2))
    results = []
    for flash in (False, True):
        monkeypatch.setattr(attention, "_flash_takes", lambda q, v, flash=flash: flash)
        out, _ = attention.packed_attention(
            torch.nn.Identity(), q, k, v, None, 0.3, layout=layout
        )  # [1, T, H, D]
        results.append([out, *torch.autograd.grad(out.pow(3).sum(), (q, k, v))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_gpu_branch_traces_without_a_gpu():
    """The real varlen_attn takes our arguments, forward and backward, and nothing asks the device
    for a number: fake tensors have shapes and no data.
    """
    _, layout = prefix_layout([(30, 20, 10), (5, 6, 7)])
    tokens = sum(layout.q_lengths)
    with FakeTensorMode(allow_non_fake_inputs=True), counted_as_gpu():
        q, k, v = (
            torch.empty(1, h, tokens, 64, dtype=torch.bfloat16, requires_grad=True)
            for h in (8, 2, 2)
        )
        out, _ = attention.packed_attention(
            torch.nn.Identity(), q, k, v, None, 0.125, layout=layout
        )
        out.sum().backward()
    assert out.shape == (1, tokens, 8, 64) and "varlen" in out.grad_fn.next_functions[0][0].name()
    assert all(x.grad.shape == x.shape for x in (q, k, v))


@pytest.mark.parametrize("shape", [(8, 8, 64), (8, 2, 64), (14, 2, 64), (28, 4, 128)], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_attention_is_softmax_under_the_dense_mask(device, shape):
    """Alignment, grouped heads and gradients against fp64: the flash kernel in bf16 on a GPU, else
    SDPA in fp32.
    """
    dtype, bound = (torch.bfloat16, 2e-2) if device == "cuda" else (torch.float32, 1e-5)
    for name, error in compare(
        [(30, 20, 10), (1, 1, 1), (70, 50, 60)], shape, torch.device(device), dtype
    ).items():
        assert error < bound, (
            f"{name}: off by {error:.1e} of its largest entry, {dtype} allows {bound}"
        )


# ---- what packing cannot do --------------------------------------------------------------------


# transformers 5: a rotary embedding for each type of layer
PER_LAYER_TYPE = {
    "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(), "soft-caps"),
        (Gemma3TextConfig(sliding_window=512), "window of 512"),
        (AutoConfig.for_model("gemma3"), "text-only"),
        (MistralConfig(sliding_window=1000), "window of 1000"),
        (Phi3Config(sliding_window=1000), "window of 1000"),
        (
            Qwen2Config(use_sliding_window=True, sliding_window=1000, max_window_layers=2),
            "window of 1000",
        ),
        (BloomConfig(), "ALiBi"),
        (MptConfig(), "ALiBi"),
        (MambaConfig(), "recurrent"),
        (Qwen3NextConfig(), "recurrent"),
        (Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]), "conv"),
        (GptOssConfig(), "sinks"),
        (NemotronConfig(), "does not hand the layout"),
        (T5Config(), "text-only"),
        (
            LlamaConfig(
                max_position_embeddings=512, rope_parameters={"rope_type": "dynamic", "factor": 2.0}
            ),
            "rotary",
        ),
        (
            Gemma3TextConfig(max_position_embeddings=512, rope_parameters=PER_LAYER_TYPE),
            "dynamic rotary",
        ),
    ],
    ids=lambda x: x.model_type if hasattr(x, "model_type") else None,
)
def test_models_that_packing_would_change_are_refused(config, reason):
    assert reason in packing_refusal(config, 1024)


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_models_that_packing_does_not_change_are_accepted(config):
    assert packing_refusal(config, 32) is None
    assert ("window of 32" in (packing_refusal(config, 33) or "")) == (
        config.model_type in ("phi3", "mistral")
    )


def test_a_soft_capped_model_runs_padded_with_eager_attention():
    """transformers' SDPA drops Gemma 2's soft cap without a message; if this ever fails, "sdpa" has
    become right.
    """
    config = Gemma2Config(**TINY, head_dim=8, attn_logit_softcapping=1.0)
    assert attention_implementation(config) == "eager"
    assert attention_implementation(LlamaConfig()) == "sdpa"
    assert attention_implementation(BloomConfig()) == "eager"
    model, pairs = build(config), random_pairs()
    with torch.no_grad():
        torch.testing.assert_close(padded(model, pairs), alone(model, pairs), rtol=0, atol=1e-5)
        with_cap = model(input_ids=pairs[0][2][None], use_cache=False).logits
        model.set_attn_implementation("sdpa")
        assert (
            model(input_ids=pairs[0][2][None], use_cache=False).logits - with_cap
        ).abs().max() > 1e-3


def test_what_would_be_wrong_in_silence_is_an_error():
    """PITFALLS 19, 20: a lost layout, padding, a cache, a short window, dropout."""
    position_ids, layout = prefix_layout([(4, 3, 2)])
    ids = torch.randint(3, 101, (1, 9))
    row = dict(input_ids=ids, position_ids=position_ids, use_cache=False)
    model = build(FAMILIES["mistral"])
    with pytest.raises(ValueError, match="MistralAttention, layer 0: .* no layout"):
        model(**row)
    with pytest.raises(
        ValueError, match="hand its .*kwargs down"
    ):  # a model that drops **kwargs on the way
        build(NemotronConfig(**TINY))(**row, layout=layout)
    for mask in (torch.ones(1, 9), torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0, 0]])):
        with pytest.raises(ValueError, match="takes no attention_mask"):
            model(**row, attention_mask=mask, layout=layout)
    with pytest.raises(ValueError, match="mask of its own"):
        model(**row, attention_mask=torch.zeros(1, 1, 9, 9), layout=layout)
    with pytest.raises(ValueError, match="1 row of 9 tokens, the input is 1 x 8"):
        model(
            input_ids=ids[:, :8], position_ids=position_ids[:, :8], use_cache=False, layout=layout
        )
    with pytest.raises(ValueError, match="sliding window of 32 .* 40"):
        model(input_ids=torch.ones(1, 40, dtype=torch.long), use_cache=False)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="use_cache=False"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    noisy = build(LlamaConfig(**TINY, attention_dropout=0.1)).train()
    with pytest.raises(ValueError, match="dropout"):
        noisy(**row, layout=layout)
    with pytest.raises(ValueError, match="softcap"):
        build(Gemma2Config(**TINY, head_dim=8))(**row, layout=layout)
