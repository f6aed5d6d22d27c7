"""What must hold before the first update. A check that fails stops the run: it would train wrongly.

    check_repeat        two forward passes of the same pair agree: nothing random is left on
    check_causal        no log-prob depends on the tokens after it
    check_model         our log-probs of a short pair are those of transformers' own logits
    audit               the generator's log-probs of its answers are those of this trainer
    check_first_loss    while the policy is its own reference, the loss is that of equal log-probs

Pairs are those of training/pairs.py. Log-probs are [2] or [n, 2], of (chosen, rejected), summed
over an answer's tokens.
"""

from typing import NamedTuple

import numpy as np
import torch

from kernels.logprob import logprob_from_logits
from records import Stop
from stage import say
from training.network import names_and_values


def gap_per_token(a: torch.Tensor, b: torch.Tensor, pair: dict) -> float:
    """The larger of the two answers' |a - b|, per token."""
    lengths = torch.tensor([len(pair["chosen"]), len(pair["rejected"])])
    return ((a - b).abs() / lengths).max().item()


# ---- the forward pass --------------------------------------------------------------------------


def check_repeat(first, second, pair: dict, device_type: str, fields: dict, where: str) -> None:
    """first, second: [2], log-probs of a pair by the same model, one forward pass after the other.

    On a CPU they are equal, bit for bit: the same sums in the same order. On a GPU, too, unless a
    kernel adds with atomics, whose order varies (a mixture of experts may add its experts' outputs
    this way). That is only rounding: its mean over an answer is far below what dropout changes.

    fields: from network.random_fields, to name the suspects.
    """
    tolerance = 0.0 if device_type == "cpu" else 1e-3  # nats per token
    gap = gap_per_token(first, second, pair)
    if not gap <= tolerance:
        suspects = names_and_values(fields) or "no field of the config, so the model's own code"
        raise Stop(
            f"{where}: two forward passes of the same pair ({pair['id']}) differ by {gap:.2g} nats "
            f"per token: randomness is left on: {suspects}. Policy and reference must be the same "
            "function: set it to 0 in config.json, or train another model."
        )
    say(f"{where}: two forward passes of the longest pair agree ({gap:.0e} nats per token)")


@torch.no_grad()
def own_logprobs(model, pair: dict) -> torch.Tensor:
    """[2], from the model's own logits, one plain sequence at a time."""
    return torch.stack(
        [
            own_logprob(model, pair["prompt"], pair["chosen"]),
            own_logprob(model, pair["prompt"], pair["rejected"]),
        ]
    )


def own_logprob(model, prompt: np.ndarray, answer: np.ndarray) -> torch.Tensor:
    ids = row_of(prompt, answer)  # [1, L]
    logits = model(input_ids=ids, use_cache=False).logits[0]  # [L, V]
    predicting = logits[len(prompt) - 1 : -1]  # [|answer|, V]: the state before a token predicts it
    return logprob_from_logits(predicting, ids[0, len(prompt) :]).sum()


def row_of(prompt: np.ndarray, answer: np.ndarray) -> torch.Tensor:
    """[1, L] int64"""
    return torch.from_numpy(np.concatenate([prompt, answer])).long()[None]


@torch.no_grad()
def check_causal(model, pair: dict, dtype: str, where: str) -> None:
    """No logit depends on the tokens after it. model: transformers' own.

    BERT, XLM or XLNet look both ways unless their config says otherwise: the policy would see the
    answer it predicts.
    """
    ids = row_of(pair["prompt"], pair["chosen"])  # [1, L]
    half = max(1, ids.shape[1] // 2)
    with_the_rest = model(input_ids=ids, use_cache=False).logits[0, :half]  # [L / 2, V]
    alone = model(input_ids=ids[:, :half], use_cache=False).logits[0]  # [L / 2, V]
    difference = with_the_rest.float().log_softmax(-1) - alone.float().log_softmax(-1)
    gap = difference.abs().mean().item()
    tolerance = 1e-4 if dtype == "fp32" else 0.1
    if not gap <= tolerance:
        raise Stop(
            f"{where}: the log-probs of a token depend on those after it, by {gap:.2g} nats on "
            "average: it is no causal language model as its config.json has it (is_decoder, "
            "causal, attn_type), and cannot be trained."
        )


def check_model(logprobs: torch.Tensor, model, pair: dict, dtype: str, where: str) -> None:
    """An architecture whose head or attention we get wrong is refused here.

    logprobs: [2] of the sharded, packed and fused model. model: transformers' own, with the same
    weights.
    """
    gap = gap_per_token(logprobs, own_logprobs(model, pair), pair)
    # fp32: only the order of sums differs. bf16: 8 bits per number, and few tokens to average over.
    tolerance = 1e-4 if dtype == "fp32" else 0.25
    if not gap <= tolerance:
        raise Stop(
            f"{where}: log-probs of this trainer and of transformers differ by {gap:.2g} nats per "
            f"token on pair {pair['id']}: its head or attention is one that dpo_train.py cannot "
            "express, so it would train wrongly."
        )
    say(f"{where}: log-probs equal transformers' own to {gap:.0e} nats per token")


# ---- generator and trainer ---------------------------------------------------------------------


class Gap(NamedTuple):
    nats: float  # |difference| / sqrt(tokens of the answer)
    id: str  # of the pair
    answer: str  # "chosen" or "rejected"


def audit(
    pairs: list[dict], logprobs: torch.Tensor, model_hash: str, dtype: str, tolerance: float | None
) -> dict:
    """Compare the generator's log-prob of each answer that this very model wrote with ours.

    logprobs: [n, 2] of the model as loaded: the policy, or its reference. An answer's gap is
    |difference| / sqrt(its tokens): rounding errors add up like a random walk, so they make the
    same gap at any length, while the gap of a mistake grows with the length. In bf16, 0.03 was seen
    in 24 layers of random weights, and 0.3 between two iterations' policies (docs/math.md).

    Returns figures for the metadata; raises Stop where the mean gap is past the tolerance.
    """
    if tolerance is None:
        # bf16: no GPU has measured it yet. vLLM computes logits in bf16, so long answers of a
        # healthy run may pass 0.05; stale weights gave 0.3.
        tolerance = 1e-3 if dtype == "fp32" else 0.1
    gaps = audit_gaps(pairs, logprobs, model_hash)
    if not gaps:
        say("audit: neither policy nor reference wrote any of these answers: nothing to compare")
        return {"answers": 0}

    mean = sum(gap.nats for gap in gaps) / len(gaps)
    worst = max(gaps)
    seen = f"by {mean:.1e} nats / sqrt(token), {worst.nats:.1e} at most ({len(gaps):,} answers)"
    say(f"audit: generator and trainer differ {seen}")
    if not mean <= tolerance:
        raise Stop(
            f"generator and trainer disagree about the same answers, {seen}; the tolerance is "
            f"{tolerance:g}, the worst is the {worst.answer} one of {worst.id}. Look for another "
            "chat template, a doubled BOS, other weights than those that generated, wrong position "
            "ids. --max_logprob_gap raises the tolerance."
        )
    return {"answers": len(gaps), "mean": mean, "max": worst.nats, "tolerance": tolerance}


def audit_gaps(pairs: list[dict], logprobs: torch.Tensor, model_hash: str) -> list[Gap]:
    gaps = []
    for pair, ours in zip(pairs, logprobs.tolist(), strict=True):
        for k, answer in enumerate(("chosen", "rejected")):
            theirs = pair["logprobs"][k]
            if pair["models"][k] != model_hash or theirs is None:
                continue
            nats = abs(theirs - ours[k]) / len(pair[answer]) ** 0.5
            gaps.append(Gap(nats, str(pair["id"]), answer))
    return gaps


# ---- the first step ----------------------------------------------------------------------------


def check_first_loss(loss: float, expected: float, dtype: str) -> None:
    """expected: the mean loss while policy = reference; ln 2 for the sigmoid loss."""
    say(f"first step: loss {loss:.7f}; policy = reference makes it {expected:.7f}")
    tolerance = 1e-4 if dtype == "fp32" else 2e-2
    if not abs(loss - expected) <= tolerance * max(1, abs(expected)):
        raise Stop(
            "policy and reference are the same model, but the first loss says otherwise: dropout, "
            "precision or masking differs between the two passes"
        )
