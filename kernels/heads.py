"""The heads of real models: what transformers does between the last hidden state and the logits.

linear_logprob computes log-probs from hidden states [T, D] with a weight, a bias, a scale and a
soft-cap:

    hidden = backbone(model)(input_ids)[0]                               # [1, T, D]
    logprobs = linear_logprob(hidden[0], targets=targets, **lm_head(model))  # [T]

A head that these four do not express is refused by name.
"""

import re

import torch

# What transformers multiplies the logits with, by the beginning of the model type. The config's
# field cannot be read without this table: "logits_scaling" multiplies in one model and divides in
# another.
SCALES = {
    "cohere": lambda config: config.logit_scale or 1.0,  # Cohere Compass may have None
    "granite": lambda config: 1 / config.logits_scaling,
    "hyperclovax": lambda config: config.logits_scaling,
    # MiniCPM 3 divides the hidden states, which is the same thing.
    "minicpm3": lambda config: 1 / config.logits_scaling,
    "inkling": lambda config: 1 / config.logits_mup_width_multiplier,
    "falcon_h1": lambda config: config.lm_head_multiplier,
}
# Fields that hold a soft-cap of the logits.
CAPS = (
    "final_logit_softcapping",  # Gemma
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
)
# Fields of a config that may change the logits: logit_scale, logits_scaling, lm_head_multiplier,
# final_logit_softcapping, unpadded_vocab_size, …
CHANGES_LOGITS = re.compile(r"logit.*(scal|cap|mult)|(head|output)_mult|unpadded_vocab")
# But not these: attention scores and a router's are called logits, too, and "init" is about the
# weights' first values.
OF_OTHER_LOGITS = re.compile(r"att|router|init")


def backbone(model) -> torch.nn.Module:
    """The part of a causal language model whose last hidden state the head reads, or ValueError.

    That is model.base_model, with few exceptions: the text models of Llama 4 and Mllama look for
    it under a name that they do not have, and base_model is then the model itself, head included.
    """
    inner = model.base_model
    if inner is model:
        inner = getattr(model, "model", None)
    if inner is None:
        name = type(model).__name__
        raise ValueError(f"{name}: it has no base model that can be told from its head")
    return inner


def lm_head(model) -> dict:
    """weight, bias, scale and softcap of a model for linear_logprob, or ValueError.

    They belong to the output of `backbone(model)`, and are read from the model and its config. The
    caller has to check that nothing else happens to the logits: on a short sequence, against
    logprob_from_logits of the model's own logits.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if not _is_plain_linear(head):
        found = type(head).__name__
        raise ValueError(
            f"{name}: its head is {found}, not a plain torch.nn.Linear; merge or replace it"
        )

    others = _others_with_weights(model, head)
    if others:
        names = ", ".join(others)
        raise ValueError(
            f"{name}: {names} has weights too and may stand between base model and head"
        )

    scale_of = _scale_function(config.model_type)
    fields = _fields_that_change_logits(config)
    unknown = [f"{field}={value}" for field, value in fields.items() if field not in CAPS]
    if unknown and scale_of is None:
        found = ", ".join(unknown)
        raise ValueError(
            f"{name}: its config has {found}, unknown to lm_head for {config.model_type}"
        )

    caps = [fields[field] for field in CAPS if field in fields]
    return {
        "weight": head.weight,
        "bias": head.bias,
        "scale": scale_of(config) if scale_of else 1.0,
        "softcap": caps[0] if caps else None,
    }


def _is_plain_linear(head) -> bool:
    if not isinstance(head, torch.nn.Linear):
        return False
    return head.weight.is_floating_point() and head.weight.ndim == 2  # else it is quantised


def _others_with_weights(model, head) -> list[str]:
    """Names of the parts that are neither base model nor head, and have weights."""
    inner = backbone(model)
    names = []
    for name, part in model.named_children():
        if part is inner or part is head:
            continue
        if list(part.parameters()):
            names.append(name)
    return names


def _scale_function(model_type: str):
    """What gives the scale for this type of model; None where SCALES has nothing."""
    for family, scale_of in SCALES.items():
        if model_type.startswith(family):
            return scale_of
    return None


def _fields_that_change_logits(config) -> dict:
    """The config's fields that may change the logits, by their names; None and 1 change nothing."""
    fields = {}
    for field, value in vars(config).items():
        by_name = CHANGES_LOGITS.search(field) and not OF_OTHER_LOGITS.search(field)
        if by_name and value not in (None, 1):
            fields[field] = value
    return fields
