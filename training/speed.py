"""What a run of the trainer did: useful flops per second, the share of the GPU's peak, memory.

Flops are the useful ones: each prompt once, no padding, nothing recomputed. For pairs of p + c + r
tokens, L layers of N weights in all, H heads of size d, a vocabulary of V and hidden states of D:

    6 N (p + c + r)     2 flops per weight and token, three times: forward, and backward to the
                        inputs and to the weights
    6 V D (c + r)       the head, which sees nothing but answers
    12 L H d a          a: (query, key) pairs that the causal mask leaves; windows are ignored

A frozen weight, the head's too, has no gradient: 4 in place of 6.
"""

import resource

import torch

from training.fsdp import layers_of

FROZEN = 4 / 6  # flops of a frozen weight per flops of a trained one

# Dense bf16 flop/s, SXM cards, from the data sheets.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device) -> float | None:
    """Dense bf16 flop/s of this GPU; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for gpu, flops_per_second in PEAK.items():
        if gpu in name:
            return flops_per_second
    return None


def peak_memory(device) -> dict[str, int]:
    """Bytes: of tensors on a GPU, and of what the allocator took for them; else of the process."""
    if device.type == "cuda":
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_memory_bytes": kilobytes * 1024}


def matmul_weights(layers, config) -> float:
    """N: the weights of `layers` that each token is multiplied with.

    Experts are stacked, [E, …], and each token sees num_experts_per_tok of them. A frozen weight
    counts two thirds.
    """
    experts_per_token = getattr(config.get_text_config(), "num_experts_per_tok", None)
    total = 0.0
    for layer in layers:
        for parameter in layer.parameters():
            if parameter.ndim < 2:
                continue
            share = 1.0
            if experts_per_token and parameter.ndim == 3:
                share = experts_per_token / len(parameter)
            if not parameter.requires_grad:
                share *= FROZEN
            total += parameter.numel() * share
    return total


def attention_width(config) -> int:
    """L H d, summed over the layers. AttributeError where `config` does not say."""
    layers = getattr(config, "per_layer_config", None)  # Gemma 4's layers differ
    if not layers:
        layers = [config] * config.num_hidden_layers
    width = 0
    for layer in layers:
        heads = layer.num_attention_heads
        size = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        width += heads * size
    return width


def flops(
    weights: float, config, lengths: list[tuple[int, int, int]], frozen_head: bool = False
) -> float | None:
    """Useful flops of forward and backward over pairs of (p, c, r) tokens. weights: N.

    None if the config does not tell the sizes that this needs: recurrent models, and some that name
    them differently.
    """
    text_config = config.get_text_config()
    try:
        width = attention_width(text_config)
        head = text_config.vocab_size * text_config.hidden_size
    except AttributeError:
        return None
    if frozen_head:
        head *= FROZEN
    total = 0.0
    for p, c, r in lengths:
        chosen_looks = (p + c) * (p + c + 1) / 2  # at the prompt and itself
        rejected_looks = r * p + r * (r + 1) / 2
        total += 6 * weights * (p + c + r)
        total += 6 * head * (c + r)
        total += 12 * width * (chosen_looks + rejected_looks)
    return total


def figures(
    policy, lengths: list[tuple[int, int, int]], seconds: float, device, dtype: str, world: int
) -> dict:
    """For the metadata: what the steps of this process did.

    lengths: (p, c, r) of the pairs of all ranks. seconds: of the steps.
    """
    tokens = sum(p + c + r for p, c, r in lengths)
    result = {"tokens_since_start": tokens, "seconds_since_start": round(seconds, 2)}
    result |= peak_memory(device)
    if not seconds:  # a run that was killed after its last step has none left
        return result

    model = policy.model
    weights = matmul_weights(layers_of(policy), model.config)
    frozen_head = not model.get_output_embeddings().weight.requires_grad
    work = flops(weights, model.config, lengths, frozen_head)
    if work is None:
        return result
    result["model_flops_per_second"] = work / seconds
    peak = peak_flops(device)
    if dtype == "bf16" and peak:
        result["mfu"] = work / seconds / (peak * world)
    return result
