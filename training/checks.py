"""The trainer's checks before its first update. Each stops the run, for each means that it would
train something else.

    check_repeat        two forward passes of the same pair agree: nothing random is left on
    check_causal        no log-prob depends on the tokens behind it
    check_model         this trainer's log-probs of a short pair are those of transformers' own attention and logits
    audit               the generator's log-probs of its answers are those of this trainer
    check_first_loss    while the policy is its own reference, the loss is that of d = 0

A pair is a dict of "id", token ids as arrays under the names in PARTS, and what the generator said
of (chosen, rejected): "logprobs", their log-probs, and "models", the hashes of the policies that
wrote them.
"""

import re

import numpy as np
import torch
from transformers import PreTrainedConfig

from kernels.logprob import logprob_from_logits
from records import Stop
from stage import say
from training.batches import PARTS

ANSWERS = PARTS[1:]


# --------------------------------------------------------------------------------------------------
# Randomness: dropout of values, of layers (OPT), of paths; noise in a router (PhiMoE, Mixtral)


def random_fields(config) -> dict[str, float]:
    """The fields of a transformers config that make training random, its sub-configs' included.

    All whose name speaks of dropping, jitter or noise, and whose value is a number above zero:
    {"router_jitter_noise": 0.01, "ffn_config.moe_jitter_eps": 0.1}.
    """
    found = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            for inner, number in random_fields(value).items():
                found[f"{name}.{inner}"] = number
        elif re.search("drop|jitter|noise", name) and is_positive_number(value):
            found[name] = value
    return found


def is_positive_number(value) -> bool:
    """True is none: drop_last_layer=True, say, is part of a model's shape."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def switch_off_dropout(config) -> None:
    """Set to zero, in place, whatever random_fields finds that drops something.

    The policy runs in evaluation mode, which switches off all of them. But a layer that is to be
    recomputed (--gradient_checkpointing) is itself in training mode, and recurrent models are, too.
    Jitter and noise keep their values: no layer adds them itself, and PhiMoE's router reads its
    jitter in evaluation, too, to ignore experts that score too far below the best.
    """
    for path in random_fields(config):
        *parents, name = path.split(".")
        owner = config
        for parent in parents:
            owner = getattr(owner, parent)
        if "drop" in name:
            setattr(owner, name, 0.0)


def listed(fields: dict[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in fields.items())


def check_repeat(first, second, pair: dict, device_type: str, fields: dict, where: str) -> None:
    """first, second: [2], log-probs of a pair by the same model, one forward pass after the other.

    On a CPU they are equal, bit for bit: the same sums in the same order. On a GPU, too, unless a
    kernel adds with atomics, which come in any order (a mixture of experts may add its experts'
    outputs so). That is rounding, and its mean over an answer far below what dropout does.

    fields: of random_fields, to name the suspects.
    """
    tolerance = 0.0 if device_type == "cpu" else 1e-3  # nats per token
    sizes = torch.tensor([len(pair[k]) for k in ANSWERS])
    gap = ((first - second).abs() / sizes).max().item()
    if not gap <= tolerance:
        suspects = listed(fields) or "none of the config's fields, so the model's own code"
        raise Stop(
            f"{where}: two forward passes of the same pair ({pair['id']}) differ by {gap:.2g} nats "
            f"per token: randomness is left on: {suspects}. Policy and reference must be the same "
            "function: set it to 0 in config.json, or train another model."
        )
    say(f"{where}: two forward passes of the longest pair agree ({gap:.0e} nats per token)")


# --------------------------------------------------------------------------------------------------
# Right log-probs


@torch.no_grad()
def own_logprobs(model, pair: dict) -> torch.Tensor:
    """[2], log-probs of chosen and rejected from the model's own logits, one plain sequence at a
    time.
    """
    result = []
    for answer in (pair[k] for k in ANSWERS):
        ids = torch.tensor(np.concatenate([pair["prompt"], answer]), dtype=torch.long)[
            None
        ]  # [1, L]
        logits = model(input_ids=ids, use_cache=False).logits[
            0, -len(answer) - 1 : -1
        ]  # [|answer|, V]
        result.append(logprob_from_logits(logits, ids[0, -len(answer) :]).sum())
    return torch.stack(result)


@torch.no_grad()
def check_causal(model, pair: dict, dtype: str, where: str) -> None:
    """No logit of the chosen answer depends on what is written behind it. model: transformers' own.

    BERT, XLM or XLNet look both ways unless their config says otherwise: the policy would see the
    answer it predicts.
    """
    ids = torch.tensor(np.concatenate([pair["prompt"], pair["chosen"]]), dtype=torch.long)[
        None
    ]  # [1, L]
    known = max(1, ids.shape[1] // 2)
    whole = model(input_ids=ids, use_cache=False).logits[0, :known]  # [L / 2, V]
    alone = model(input_ids=ids[:, :known], use_cache=False).logits[0]  # [L / 2, V]
    gap = (whole.float().log_softmax(-1) - alone.float().log_softmax(-1)).abs().mean().item()
    if not gap <= (1e-4 if dtype == "fp32" else 0.1):
        raise Stop(
            f"{where}: the log-probs of a token depend on those behind it, by {gap:.2g} nats on average: it is no "
            "causal language model as its config.json has it (is_decoder, causal, attn_type), and cannot be trained."
        )


def check_model(logprobs: torch.Tensor, model, pair: dict, dtype: str, where: str) -> None:
    """logprobs: [2] of the sharded, packed and fused model; model: transformers' own, with the same
    weights.

    An architecture whose head or attention we get wrong is refused here.
    """
    sizes = torch.tensor([len(pair[k]) for k in ANSWERS])
    gap = ((logprobs - own_logprobs(model, pair)).abs() / sizes).max().item()
    if not gap <= (
        1e-4 if dtype == "fp32" else 0.25
    ):  # fp32: the order of sums; bf16: 8 bits, and a few tokens only
        raise Stop(
            f"{where}: log-probs of this trainer and of transformers differ by {gap:.2g} nats a token on pair "
            f"{pair['id']}: its head or attention is one that dpo_train.py cannot express, so it would train wrongly."
        )
    say(f"{where}: log-probs equal transformers' own to {gap:.0e} nats a token")


def audit(
    pairs: list[dict], logprobs: torch.Tensor, model_hash: str, dtype: str, tolerance: float | None
) -> dict:
    """Compare the generator's log-prob of each answer that this very policy wrote with ours; stop
    past the tolerance.

    logprobs: [n, 2] of the policy as loaded. An answer's gap is |difference| / sqrt(its tokens):
    rounding errors add up like a random walk, so they make the same gap at any length; a mistake's
    grows with it. In bf16, 0.03 was seen in 24 layers of random weights, 0.3 between two
    iterations' policies (docs/math.md).
    """
    if tolerance is None:
        # bf16: no GPU has measured it yet. vLLM computes logits in bf16, so long answers of a
        # healthy run may pass 0.05; stale weights gave 0.3.
        tolerance = 1e-3 if dtype == "fp32" else 0.1
    gaps = [
        (
            abs(pair["logprobs"][k] - logprobs[i, k].item()) / len(pair[name]) ** 0.5,
            str(pair["id"]),
            name,
        )
        for i, pair in enumerate(pairs)
        for k, name in enumerate(ANSWERS)
        if pair["models"][k] == model_hash and pair["logprobs"][k] is not None
    ]
    if not gaps:
        say(
            "audit: none of these answers was written by this model, so there is nothing to compare"
        )
        return {"answers": 0}
    mean, (worst, id, name) = sum(g[0] for g in gaps) / len(gaps), max(gaps)
    seen = f"by {mean:.1e} nats / sqrt(token), {worst:.1e} at most ({len(gaps):,} answers)"
    say(f"audit: generator and trainer differ {seen}")
    if not mean <= tolerance:
        raise Stop(
            f"generator and trainer disagree about the same answers, {seen}; the tolerance is {tolerance:g}, the worst "
            f"is the {name} one of {id}. Look for another chat template, a doubled BOS, other weights than those that "
            "generated, wrong position ids. --max_logprob_gap raises the tolerance."
        )
    return {"answers": len(gaps), "mean": mean, "max": worst, "tolerance": tolerance}


def check_first_loss(loss: float, expected: float, dtype: str) -> None:
    """expected: the mean loss of policy = reference, ln 2 for sigmoid."""
    say(f"step 0: loss {loss:.7f}; policy = reference makes it {expected:.7f}")
    if not abs(loss - expected) <= (1e-4 if dtype == "fp32" else 2e-2) * max(1, abs(expected)):
        raise Stop(
            "policy and reference are the same model, but the first loss says otherwise: dropout, precision or masking "
            "differs between the two passes"
        )
