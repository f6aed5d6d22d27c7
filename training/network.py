"""The network that is trained: how its batches are laid out, and what must be switched off in it.

Policy, reference and generator must be the same function. So nothing random may be left on: dropout
of values, of layers (OPT), of paths, or noise in a router (PhiMoE, Mixtral).
"""

import re

from transformers import AutoModelForCausalLM, PreTrainedConfig

from kernels.attention import (
    ATTENTION,
    attention_implementation,
    causal_lm_refusal,
    packing_refusal,
)
from kernels.logprob import lm_head
from records import Stop
from stage import say
from training.fsdp import layers_of


def choose_packing(packing: str, config, longest: int, name: str) -> str:
    """ "prefix" or "padded", for sequences of up to `longest` tokens. packing: "auto", or a choice.

    Raises Stop where the model cannot be trained, or not in the way that was chosen.
    """
    refusal = causal_lm_refusal(config)
    if refusal:
        raise Stop(f"{name}: {refusal}.")
    refusal = packing_refusal(config, longest)
    if refusal and packing == "prefix":
        raise Stop(f"--packing prefix: {name}: {refusal}. Use --packing padded.")
    if packing != "auto":
        return packing
    if refusal:
        say(f"{name}: {refusal}, so batches are padded")
        return "padded"
    return "prefix"


def build_model(config, dtype, packing: str, gradient_checkpointing: bool, name: str):
    """The model that `config` describes, without its weights, on torch's default device."""
    switch_off_dropout(config)
    attention = attention_implementation(config) if packing == "padded" else ATTENTION
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    try:
        lm_head(model)
    except ValueError as e:
        raise Stop(f"{name}: cannot be trained: {e}.") from None

    # Evaluation mode, in training too. Zeros in the config would not do: PhiMoE's router draws its
    # experts in training mode. Recurrent models stay in training mode: in evaluation, RWKV divides
    # its weights in place and xLSTM computes no gradient for long rows. None of them has jitter,
    # and checks.check_repeat watches.
    model.train(model._is_stateful)

    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # A layer is recomputed only if it is in training mode. That is set for the layer alone, and
        # not for the modules in it.
        for layer in layers_of(model):
            layer.training = True
    return model


# ---- what makes a forward pass random ----------------------------------------------------------


def random_fields(config) -> dict[str, float]:
    """The fields of a transformers config that make training random, those of sub-configs included.

    These are all whose name contains drop, jitter or noise, and whose value is a number above zero:
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
    """True does not count: drop_last_layer=True, for example, is part of a model's shape."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def switch_off_dropout(config) -> None:
    """Set every dropout field that random_fields finds to zero, in place.

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


def names_and_values(fields: dict[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in fields.items())
