"""LoRA (arXiv 2106.09685): train two small factors beside each linear layer, and not its weight.

    y = x W^T + (alpha / r) (x A^T) B^T         A [r, in], B [out, r], r = --lora_rank

W stays as it is, in the dtype of the model's files. A and B are fp32, and only they have gradients
and Adam states. B begins at zero, so the policy begins as the reference, and no second model is
needed. At the end B A is added to W: what is saved is a plain model, which every other stage reads
as it always did. The factors are saved as well, beside it, in peft's format.

In the order of their use:

    settle_arguments    a default, and flags without effect
    freeze, adapt       the network on the meta device: which layers have factors
    first_factors       the values that they begin with
    check_called        factors that no forward pass reads would be trained for nothing
    export              the sum, rounded to the saved dtype, and what the rounding has cost
    save_adapter        the factors alone
"""

import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import models
from records import Stop, remove, whole
from stage import Stage, say, seed_of
from training.fsdp import layers_of, write_folder

# A first --learning_rate. TRL's example of DPO has 5e-7 in full and 5e-6 with LoRA; "LoRA Without
# Regret" (Schulman et al., 2025) found ten times the best rate of full training to be best.
RATE = 5e-6
MOST_ROUNDING = 0.1  # of the update's norm

ADAPTER = ".adapter"  # OUTPUT.adapter/, with these two files, whose names are peft's
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def settle_arguments(args) -> None:
    """Fill in --lora_alpha. Raises Stop where a flag has no effect."""
    if args.lora_rank and args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank
    if args.lora_alpha is not None and not args.lora_rank:
        raise Stop("--lora_alpha has no effect without --lora_rank")
    if args.lora_targets is not None and not args.lora_rank:
        raise Stop("--lora_targets has no effect without --lora_rank")


# ---- the network -------------------------------------------------------------------------------


class LoraLinear(torch.nn.Module):
    """A torch.nn.Linear, frozen, with factors beside it. Its weight keeps its name."""

    def __init__(self, linear: torch.nn.Linear, rank: int, alpha: float, dtype: torch.dtype):
        super().__init__()
        self.weight = linear.weight  # [out, in]
        self.bias = linear.bias  # [out], or None
        outputs, inputs = linear.weight.shape
        factor = {"dtype": dtype, "device": linear.weight.device}
        self.lora_A = torch.nn.Parameter(torch.empty(rank, inputs, **factor))
        self.lora_B = torch.nn.Parameter(torch.empty(outputs, rank, **factor))
        self.scale = alpha / rank
        self.was_called = False  # check_called reads it

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] -> […, out]"""
        self.was_called = True
        small = F.linear(x, self.lora_A) * self.scale  # […, r]
        return F.linear(x, self.weight, self.bias) + F.linear(small, self.lora_B)


def freeze(model, dtype: torch.dtype | None) -> None:
    """No parameter of `model` is trained, so none needs fp32: they get the dtype of its files.

    dtype: from config.json; None: fp32. Buffers keep theirs. They are small, and some are computed
    by the model's code, in fp32.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype or torch.float32)


def adapt(model, args, dtype: torch.dtype, name: str) -> None:
    """Give the chosen linear layers of a frozen model their factors. name: for messages."""
    found = linear_layers(model)
    chosen = choose(found, args.lora_targets, others_with_weights(model), name)
    for path in chosen:
        adapted = LoraLinear(found[path], args.lora_rank, args.lora_alpha, dtype)
        model.set_submodule(path, adapted)


def describe(model, args, name: str) -> None:
    """Say which layers have factors, and which other weights of the decoder layers have none."""
    adapted = adapted_layers(model)
    kinds = ", ".join(last_names(adapted))
    say(f"{name}: LoRA of rank {args.lora_rank} beside {len(adapted)} linear layers: {kinds}")
    others = others_with_weights(model)
    if others:
        say(
            f"{name}: no factors for {', '.join(others)}, which are no torch.nn.Linear (stacked "
            "experts, routers, convolutions): they stay as they are"
        )


def linear_layers(model) -> dict[str, torch.nn.Linear]:
    """Every torch.nn.Linear in the decoder layers, by its name in the model.

    A class derived from it is another function (Llama 4's router returns two tensors): none of it.
    Layers for pictures or sound are none of the decoder's.
    """
    layers = layers_of(model.get_decoder())
    within = {id(module) for layer in layers for module in layer.modules()}
    found = {}
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and id(module) in within:
            found[name] = module
    return found


def others_with_weights(model) -> list[str]:
    """Matrices in the decoder layers that belong to no linear layer: ["mlp.experts.down_proj"].

    Their names within a layer, each once.
    """
    names = set()
    for layer in layers_of(model.get_decoder()):
        for path, module in layer.named_modules():
            if type(module) in (torch.nn.Linear, LoraLinear):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    names.add(without_indices(f"{path}.{name}".lstrip(".")))
    return sorted(names)


def without_indices(name: str) -> str:
    """ "mlp.experts.3.w1" -> "mlp.experts.*.w1" """
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def last_names(paths) -> list[str]:
    """["model.layers.0.mlp.up_proj", …] -> ["up_proj", …], each once."""
    return sorted({path.rpartition(".")[2] for path in paths})


def is_named(path: str, target: str) -> bool:
    """As peft reads target_modules: the whole name, or its last parts."""
    return path == target or path.endswith("." + target)


def is_one_of(path: str, targets: list[str]) -> bool:
    return any(is_named(path, target) for target in targets)


def choose(found, targets: list[str] | None, others: list[str], name: str) -> list[str]:
    """The layers that --lora_targets names, all where it is None.

    found: names of the linear layers. others: of the other weights. Raises Stop where a target is
    none of the linear layers, and where there are none.
    """
    if not found:
        held = ", ".join(others) or "no layer that it knows"
        raise Stop(
            f"{name}: LoRA found no torch.nn.Linear in the decoder layers, but {held}. Train it "
            "without --lora_rank."
        )
    for target in targets or []:
        if any(is_named(path, target) for path in found):
            continue
        for other in others:
            if target in other.split("."):
                raise Stop(
                    f"--lora_targets {target}: {name} has {other}, which is no torch.nn.Linear, "
                    "and gets no factors here. Leave it out: it stays as it is."
                )
        raise Stop(
            f"--lora_targets {target}: {name} has no such linear layer in its decoder layers. It "
            f"has {', '.join(last_names(found))}."
        )
    if targets is None:
        return list(found)
    return [path for path in found if is_one_of(path, targets)]


# ---- the factors -------------------------------------------------------------------------------


def factor_seed(args, model_hash: str) -> int | None:
    """The seed of the first factors; None for full training.

    The model of each iteration of a loop is another one, and so are its factors. The same A every
    time would add one more update within the same r directions.
    """
    return seed_of("factors", args.seed, model_hash) if args.lora_rank else None


def first_factors(model, seed: int) -> dict[str, Tensor]:
    """A and B of every adapted layer, by their names in the model, fp32 on the CPU.

    A is uniform in ±1 / sqrt(in), as peft and torch.nn.Linear begin (Kaiming's rule with a =
    sqrt(5)), and B is zero. A layer's A depends on the seed and on its name alone.
    """
    factors = {}
    for name, layer in adapted_layers(model).items():
        generator = torch.Generator().manual_seed(seed_of("lora", seed, name))
        bound = 1 / math.sqrt(layer.lora_A.shape[1])
        a = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator)
        factors[f"{name}.lora_A"] = a  # [r, in]
        factors[f"{name}.lora_B"] = torch.zeros(layer.lora_B.shape)  # [out, r]
    return factors


def adapted_layers(model) -> dict[str, LoraLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


def check_called(model, name: str) -> None:
    """Stop where factors had no part in the forward pass that was just made.

    A model's code may take a layer's weight and multiply by itself (Mamba's dt_proj). Of experts in
    a list, some may have had no token, so one of each kind is enough.
    """
    called, others = set(), set()
    for path, layer in adapted_layers(model).items():
        kinds = called if layer.was_called else others
        kinds.add(without_indices(path))
    never = sorted(others - called)
    if never:
        remedy = f"--lora_targets {' '.join(last_names(called))}"
        raise Stop(
            f"{name}: its code does not call the layer {', '.join(never)} on text, so factors "
            f"there would have no effect. Name others: {remedy}"
        )


# ---- the end -----------------------------------------------------------------------------------


def export(
    factors: dict, args, dtype: torch.dtype | None, tokenizer, folder: Path
) -> dict[str, float]:
    """Write the model with (alpha / r) B A added to its weights, in `dtype` (None: its files').

    factors: lora_A [r, in] and lora_B [out, r] by their names in the model, fp32. A weight's sum is
    formed in fp32, and rounded once. Raises Stop where one is not finite. Returns, for the metadata

    changed_weights          the share of all weights that differ from the model's when saved
    changed_adapted_weights  the same of the weights with factors
    rounding_error           |saved - exact| / |exact - before|, Frobenius norms over those weights
    """
    scale = args.lora_alpha / args.lora_rank
    result = models.load_model(AutoModelForCausalLM, args.model, "auto", "eager")
    total = sum(p.numel() for p in result.parameters())  # a tied weight once
    adapted, changed = 0, 0
    squared_error, squared_update = 0.0, 0.0
    for name in layers_with_factors(factors):
        layer = result.get_submodule(name)
        before = layer.weight.detach()  # [out, in]
        a, b = factors[f"{name}.lora_A"], factors[f"{name}.lora_B"]
        update = scale * (b @ a)  # [out, in]
        exact = before.float() + update
        saved = exact.to(dtype or before.dtype)
        if not saved.isfinite().all():
            raise Stop(
                f"{folder.name}: not saved: after training {name}.weight is not finite in "
                f"{saved.dtype}. Begin again (--overwrite) with a lower --learning_rate."
            )
        adapted += before.numel()
        changed += (saved != before.to(saved.dtype)).sum().item()
        squared_error += (saved.float() - exact).double().square().sum().item()
        squared_update += update.double().square().sum().item()
        layer.weight.data = saved

    if dtype:
        for parameter in result.parameters():  # the others; a buffer keeps its own dtype
            parameter.data = parameter.data.to(dtype)
    write_folder(result, tokenizer, folder)
    error = math.sqrt(squared_error / squared_update) if squared_update else 0.0
    return {
        "changed_weights": changed / total,
        "changed_adapted_weights": changed / adapted,
        "rounding_error": error,
    }


def layers_with_factors(factors: dict) -> list[str]:
    return [name.removesuffix(".lora_A") for name in factors if name.endswith(".lora_A")]


def warn_of_rounding(exported: dict[str, float], stage: Stage) -> None:
    """A bf16 number has 8 bits: much of a small update may be lost in the sum."""
    error = exported["rounding_error"]
    if error > MOST_ROUNDING:
        stage.warn(
            f"rounding W + (alpha / r) B A to the saved dtype changes the update by {error:.0%} of "
            "its norm, so the saved policy is not quite the trained one; --save_dtype fp32 keeps "
            "all of it"
        )


def save_adapter(factors: dict, args, folder: Path) -> None:
    """The factors alone, as `folder`, in peft's format: peft and vLLM load it beside --model."""
    weights = {}
    for name in layers_with_factors(factors):
        for factor in ("lora_A", "lora_B"):
            weight = factors[f"{name}.{factor}"].contiguous()
            weights[f"base_model.model.{name}.{factor}.weight"] = weight
    model, commit = models.locate(args.model)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "revision": commit,
        "r": args.lora_rank,
        "lora_alpha": args.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": layers_with_factors(factors),
        "inference_mode": True,
    }
    remove(folder)  # of an earlier run: check_place has looked
    with whole(folder) as temporary:
        temporary.mkdir()
        save_file(weights, temporary / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (temporary / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def check_place(args, stage: Stage) -> None:
    """Stop where something that is no adapter has the name of ours."""
    folder = stage.beside(ADAPTER)
    if not args.lora_rank or stage.rank > 0 or not folder.exists():
        return
    found = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
    if not {ADAPTER_CONFIG, ADAPTER_WEIGHTS}.issuperset(found):
        raise Stop(
            f"{folder}: is no adapter of an earlier run, and is not touched. Move it away, or use "
            "another --output."
        )
