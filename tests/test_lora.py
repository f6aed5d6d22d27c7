"""LoRA: the same numbers as peft's, the same training on any number of ranks and after a restart,
and a merged policy that is the trained one.
"""

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config

import dpo_train
from arguments import parse
from bench import models as zoo
from conftest import ROOT
from dpo_train import all_logprobs
from kernels.attention import ATTENTION
from records import Stop
from small_models import LLAMA4, VOCAB, causal_lm
from test_dpo_train import Run, arrays, distance, make_pairs, plain_logprob, write
from tools import memory
from training import lora, speed
from training.batches import collate
from training.checkpoints import read_metadata
from training.fsdp import layers_of

MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
LORA = ("--lora_rank", "4", "--learning_rate", "1e-2")


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    return Run(tmp_path, capsys, monkeypatch)


def adapter_of(run, output):
    """The saved factors, by their names in the model: …q_proj.lora_A."""
    weights = load_file(run.folder / f"{output}.adapter" / lora.ADAPTER_WEIGHTS)
    short = {}
    for name, weight in weights.items():
        short[name.removeprefix("base_model.model.").removesuffix(".weight")] = weight
    return short


def meta_of(run, output):
    return json.loads((run.folder / f"{output}.meta.json").read_text())


def logprobs_of(model, rows):
    """[n, 2], by a hand-written loop."""
    found = []
    for row in rows:
        for answer in ("chosen", "rejected"):
            ids = row[f"{answer}_token_ids"]
            found.append(plain_logprob(model, row["prompt_token_ids"], ids).item())
    return torch.tensor(found).view(-1, 2)


def look_at_training(run, look):
    """Call look(policy, pairs, plans, args, device) after the last step."""
    train = dpo_train.train

    def train_and_look(policy, data, args, stage, device):
        figures = train(policy, data, args, stage, device)
        look(policy, data.pairs, data.plans, args, device)
        return figures

    run.monkeypatch.setattr(dpo_train, "train", train_and_look)


# ---- against peft ------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_log_probs_and_gradients_are_pefts(tmp_path, stage, ranks):
    """The same factors, neither of them zero, in both layouts: ours in fp32, theirs in fp64."""
    pytest.importorskip("peft")
    for arch in ("llama", "qwen3", "gemma3", "qwen3_moe"):
        more = MOE if arch == "qwen3_moe" else {}
        causal_lm(tmp_path / arch, arch, tie=arch == "gemma3", **more)
    path = os.pathsep.join([str(ROOT), *sys.path])
    done = stage("tests/lora_against_peft.py", tmp_path, nproc=ranks, env={"PYTHONPATH": path})
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(rows) == 4 * 2
    for name, packing, checkpointing, logprobs, gradient in rows:
        case = (name, packing, checkpointing)
        assert logprobs < 1e-6, (*case, logprobs)  # 1.3e-7 at most when this was written
        assert gradient < 2e-6, (*case, gradient)  # and 1.0e-6


def test_the_first_factors_are_drawn_as_pefts(run):
    """A uniform within ±1 / sqrt(in), B zero; another seed or another layer draws other numbers."""
    peft = pytest.importorskip("peft")
    factors = {}
    for seed in (0, 1):
        model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
        args = SimpleNamespace(lora_rank=16, lora_alpha=32.0, lora_targets=None)
        lora.adapt(model, args, torch.float32, "model")
        factors[seed] = lora.first_factors(model, seed)
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(run.folder / "model"),
        peft.LoraConfig(r=16, target_modules="all-linear"),
    )
    for name, parameter in theirs.named_parameters():
        if "lora" not in name:
            continue
        name = name.removeprefix("base_model.model.").removesuffix(".default.weight")
        ours = factors[0].pop(name)
        assert ours.shape == parameter.shape and ours.dtype == torch.float32
        if name.endswith("lora_B"):
            assert not ours.any() and not parameter.any()
            continue
        bound = ours.shape[1] ** -0.5
        for drawn in (ours, parameter.detach()):
            assert 0.95 * bound < drawn.abs().max() <= bound
            assert drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not torch.equal(ours, factors[1][name])
    assert not factors[0]  # peft has adapted the same layers, and no other
    first, second = (factors[1][f"model.layers.{i}.mlp.up_proj.lora_A"] for i in (0, 1))
    assert not torch.equal(first, second)


def test_each_model_begins_with_factors_of_its_own():
    """In a loop with one --seed, each iteration's model is another one."""
    args = SimpleNamespace(lora_rank=4, seed=0)
    seeds = {lora.factor_seed(args, model) for model in ("first", "second")}
    args.seed = 1
    assert len(seeds | {lora.factor_seed(args, "first")}) == 3
    assert lora.factor_seed(SimpleNamespace(lora_rank=None), "first") is None


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj"],
        ["mlp.up_proj", "v_proj"],
        ["model.layers.1.self_attn.k_proj"],
        ["o_proj", "down_proj"],
    ],
)
def test_targets_mean_what_they_mean_to_peft(run, targets):
    peft = pytest.importorskip("peft")
    folder = run.folder / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    args = SimpleNamespace(lora_rank=4, lora_alpha=8.0, lora_targets=targets)
    lora.adapt(model, args, torch.float32, "model")
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(target_modules=targets)
    )
    expected = theirs.base_model.targeted_module_names
    assert list(lora.adapted_layers(model)) == expected


# ---- a whole training --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_only_the_factors_are_trained_and_the_first_loss_is_ln_2(run, dtype):
    """Frozen weights have the dtype of the files and stay as they are; Adam has A and B alone."""
    model = causal_lm(run.folder / "model", dtype=dtype)
    write(run.pairs, make_pairs(run.folder / "model", model.float()))
    found = {}

    def look(policy, *_):
        for name, parameter in policy.model.named_parameters():
            kind = "factor" if "lora_" in name else "frozen"
            found.setdefault(kind, set()).add((parameter.dtype, parameter.requires_grad))

    make_optimizer = dpo_train.make_optimizer

    def make_and_count(policy, *others):
        optimizer = make_optimizer(policy, *others)
        found["in Adam"] = sum(len(group["params"]) for group in optimizer.param_groups)
        return optimizer

    run.monkeypatch.setattr(dpo_train, "make_optimizer", make_and_count)
    look_at_training(run, look)
    out = run("policy", *LORA, "--num_train_epochs", "2")
    assert "policy = reference makes it 0.6931472" in out
    assert run.log()[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.log()[-1]["loss"] < 0.6  # of pairs that were trained on once: 0.50 to 0.52
    assert re.search(r"differ by \S+e-0[67] nats", out)  # the audit: what generated is what trains
    assert found["frozen"] == {(dtype, False)} and found["factor"] == {(torch.float32, True)}
    assert found["in Adam"] == 2 * 7 * 2  # A and B of seven layers, in two decoder layers

    before = load_file(run.folder / "model/model.safetensors")
    after = run.weights("policy")
    assert after.keys() == before.keys()
    for name, weight in after.items():
        assert weight.dtype == dtype
        assert torch.equal(weight, before[name]) == ("_proj" not in name), name


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen3_moe"])
def test_what_is_saved_is_what_was_trained_and_peft_loads_the_factors(run, arch):
    """At the end of training, from the merged folder, and from the factors beside the old model."""
    peft = pytest.importorskip("peft")
    shutil.rmtree(run.folder / "model")
    more = MOE if arch == "qwen3_moe" else {}
    model = causal_lm(run.folder / "model", arch, tie=True, **more)
    rows = make_pairs(run.folder / "model", model, n=8)
    write(run.pairs, rows)
    trained = {}

    def look(policy, pairs, plans, args, device):
        trained["logprobs"] = all_logprobs(policy, pairs, plans[:1], args.packing, device)

    look_at_training(run, look)
    out = run("policy", *LORA, "--lora_alpha", "6", "--num_train_epochs", "3")
    assert ("no factors for mlp.experts.down_proj, mlp.experts.gate_up_proj" in out) == bool(more)

    merged = AutoModelForCausalLM.from_pretrained(run.folder / "policy")
    base = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    beside = peft.PeftModel.from_pretrained(base, run.folder / "policy.adapter")
    assert beside.peft_config["default"].base_model_name_or_path == str(run.folder / "model")
    before = logprobs_of(model, rows)
    assert (trained["logprobs"] - before).abs().min() > 1e-3  # each has moved
    for loaded in (merged, beside):
        gap = (logprobs_of(loaded, rows) - trained["logprobs"]).abs().max()
        assert gap < 2e-4


@pytest.mark.vllm
@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vllm is not installed")
def test_vllm_loads_the_merged_policy_and_the_factors(run, stage):
    """Both sample the same answers, and the log-probs are transformers' own of the policy."""
    run("policy", *LORA, "--num_train_epochs", "3")
    path = os.pathsep.join([str(ROOT), *sys.path])
    done = stage("tests/lora_in_vllm.py", run.folder, env={"PYTHONPATH": path})
    merged, beside = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("[[")]
    policy = AutoModelForCausalLM.from_pretrained(run.folder / "policy")
    assert len(merged) == len(run.rows)
    for row, (ids, logprob), (same_ids, same) in zip(run.rows, merged, beside, strict=True):
        assert ids == same_ids and logprob == pytest.approx(same, abs=1e-3)
        prompt = row["prompt_token_ids"]
        assert plain_logprob(policy, prompt, ids).item() == pytest.approx(logprob, abs=1e-3)
        assert plain_logprob(run.model, prompt, ids).item() != pytest.approx(logprob, abs=1e-2)


def test_the_sum_is_formed_in_fp32_and_its_rounding_is_reported(run):
    """Bit for bit by hand, in bf16 and in fp32; a bf16 model loses much of a small update."""
    causal_lm(run.folder / "model", dtype=torch.bfloat16)
    write(run.pairs, [{k: v for k, v in row.items() if "logprob" not in k} for row in run.rows])
    before = load_file(run.folder / "model/model.safetensors")
    for saved in ("bf16", "fp32"):
        out = run(saved, "--lora_rank", "4", "--lora_alpha", "12", "--save_dtype", saved)
        dtype = dpo_train.DTYPES[saved]
        factors, after = adapter_of(run, saved), run.weights(saved)
        changed, adapted, squared_error, squared_update = 0, 0, 0.0, 0.0
        for name in lora.layers_with_factors(factors):
            weight = before[f"{name}.weight"].float()
            update = 12 / 4 * (factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"])
            found = after.pop(f"{name}.weight")
            assert torch.equal(found, (weight + update).to(dtype)), name
            changed += (found.float() != weight).sum().item()
            adapted += weight.numel()
            squared_error += (found.double() - (weight + update).double()).square().sum().item()
            squared_update += update.double().square().sum().item()
        for name, weight in after.items():
            assert torch.equal(weight, before[name].to(dtype)), name
        assert AutoConfig.from_pretrained(run.folder / saved).dtype == dtype

        meta = meta_of(run, saved)
        total = sum(weight.numel() for weight in before.values())
        error = (squared_error / squared_update) ** 0.5
        assert meta["changed_weights"] == pytest.approx(changed / total)
        assert meta["changed_adapted_weights"] == pytest.approx(changed / adapted)
        assert meta["rounding_error"] == pytest.approx(error, rel=1e-3)
        is_large = saved == "bf16"
        assert (error > lora.MOST_ROUNDING) == is_large
        assert ("--save_dtype fp32 keeps all of it" in out) == is_large == bool(meta["warnings"])


def test_one_rank_two_ranks_copies_and_recomputed_layers_agree(run, stage):
    """bf16 weights beside fp32 factors in the groups of FSDP; 25 pairs by 8, so a rank has none."""
    model = causal_lm(run.folder / "model", tie=True, dtype=torch.bfloat16).float()
    write(run.pairs, make_pairs(run.folder / "model", model, n=25))
    flags = [*LORA, "--learning_rate", "1e-3", "--tokens_per_batch", "60"]
    run("one", *flags)
    log = run.log()
    variants = {
        "two": ["--gradient_checkpointing"],
        "hsdp": ["--shard_size", "1", "--packing", "padded"],
    }
    for name, more in variants.items():
        stage("dpo_train.py", *run.argv(name, *flags, *more), nproc=2)
        assert distance(adapter_of(run, "one"), adapter_of(run, name)) < 1e-5
        for a, b in zip(log, run.log(), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_bf16_products_and_weights_that_stay_gathered(run):
    """As on a GPU: bf16 weights are not cast, fp32 factors are, and the losses are the same."""
    causal_lm(run.folder / "model", tie=True, dtype=torch.bfloat16)
    text = [{k: v for k, v in row.items() if "logprob" not in k} for row in run.rows]
    write(run.pairs, text)
    flags = [*LORA, "--dtype", "bf16", "--tokens_per_batch", "90"]
    assert "policy = reference makes it 0.6931472" in run("let_go", *flags)
    log = run.log()
    run.monkeypatch.setattr(dpo_train.fsdp, "stays_gathered", lambda *_: True)
    assert "stay gathered" in run("kept", *flags)
    assert distance(adapter_of(run, "let_go"), adapter_of(run, "kept")) == 0
    assert [row["loss"] for row in log] == [row["loss"] for row in run.log()]
    for name, factor in adapter_of(run, "kept").items():
        assert factor.any(), name


def test_another_reference_has_no_factors(run):
    """REF=init: the first loss is that of a full training with the same reference."""
    causal_lm(run.folder / "init", tie=True, seed=5, dtype=torch.bfloat16)
    flags = ["--ref_model", run.folder / "init", "--batch_size", "24"]
    run("full", *flags)
    expected = run.log("full")[0]["loss"]
    out = run("policy", *LORA, *flags)
    assert run.log("policy")[0]["loss"] == pytest.approx(expected, abs=1e-6)
    assert out.count("LoRA of rank") == 1 and abs(expected - math.log(2)) > 0.01


def test_an_interrupted_training_goes_on_from_its_factors(run):
    """SIGTERM in the third step of six; the checkpoint has no frozen weight; the same bytes."""
    flags = [*LORA, "--num_train_epochs", "2"]
    run("whole", *flags)
    steps = []
    training_step = dpo_train.training_step

    def interrupted_in_the_third(*arguments):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGTERM)
        return training_step(*arguments)

    run.monkeypatch.setattr(dpo_train, "training_step", interrupted_in_the_third)
    with pytest.raises(SystemExit) as stop:
        run("broken", *flags)
    assert stop.value.code == dpo_train.INTERRUPTED
    (folder,) = (run.folder / "broken.parts").glob("step_*")
    entries = read_metadata(folder).state_dict_metadata
    held = {name for name, entry in entries.items() if hasattr(entry, "size") and entry.size}
    assert held and all("lora_" in name for name in held)
    assert any(name.startswith("weights.") for name in held)
    assert any(name.startswith("adam.") for name in held)

    assert "resuming after step" in run("broken", *flags)
    assert len(steps) == 6
    for name in ("model.safetensors", f"../{{}}.adapter/{lora.ADAPTER_WEIGHTS}"):
        files = [run.folder / output / name.format(output) for output in ("whole", "broken")]
        assert files[0].resolve().read_bytes() == files[1].resolve().read_bytes()


# ---- which layers, and what is refused ---------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--lora_alpha 4", "--lora_alpha has no effect without --lora_rank"),
        ("--lora_targets q_proj", "--lora_targets has no effect without --lora_rank"),
        ("--lora_rank 0", "is not a whole number in"),
        ("--lora_rank 4 --lora_alpha 0", "is not a number in"),
        (
            "--lora_rank 4 --lora_targets q_proj query",
            "has no such linear layer in its decoder layers. It has down_proj, gate_proj, k_proj, "
            "o_proj, q_proj, up_proj, v_proj.",
        ),
        ("--lora_rank 4 --lora_targets lm_head", "--lora_targets lm_head: "),
    ],
)
def test_pitfalls_25_lora_flags_without_effect_are_errors(run, flags, says):
    assert says in run.fails(*flags.split())


def test_the_dry_run_refuses_the_same_flags(run):
    flags = ["--model", str(run.folder / "model"), "--lora_alpha", "8"]
    with pytest.raises(Stop, match="--lora_alpha has no effect without --lora_rank"):
        memory.rows_of(parse(memory.arguments(), flags))


@pytest.mark.parametrize("target", ["experts", "gate_up_proj"])
def test_stacked_experts_are_refused_by_name(run, target):
    causal_lm(run.folder / "model", "qwen3_moe", **MOE)
    said = run.fails("--lora_rank", "4", "--lora_targets", "q_proj", target)
    assert f"--lora_targets {target}: " in said
    assert "mlp.experts.gate_up_proj" in said or "mlp.experts.down_proj" in said


def small_network(arch, **more):
    config = AutoConfig.for_model(arch, vocab_size=VOCAB, **more)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_layers_that_are_no_linear_are_refused_by_name():
    """GPT-2 has Conv1D, whose weight is transposed."""
    args = SimpleNamespace(lora_rank=4, lora_alpha=8.0, lora_targets=None)
    with pytest.raises(Stop, match=r"gpt: LoRA found no torch.nn.Linear .* attn.c_attn.weight"):
        lora.adapt(small_network("gpt2", n_layer=1, n_embd=24), args, torch.float32, "gpt")


def test_a_class_derived_from_linear_gets_no_factors(tmp_path):
    """Llama 4's router is one, and returns two tensors."""
    model = causal_lm(tmp_path / "m", "llama4_text", **LLAMA4)
    args = SimpleNamespace(lora_rank=4, lora_alpha=8.0, lora_targets=None)
    lora.adapt(model, args, torch.float32, "m")
    assert not [name for name in lora.adapted_layers(model) if name.endswith("router")]
    assert "feed_forward.router.weight" in lora.others_with_weights(model)


def test_a_weight_that_is_used_without_its_layer_is_refused(run):
    """Some models multiply by themselves, as a fused kernel does."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self, x):
        gated = self.act_fn(self.gate_proj(x)) * torch.nn.functional.linear(x, self.up_proj.weight)
        return self.down_proj(gated)

    run.monkeypatch.setattr(LlamaMLP, "forward", forward)
    said = run.fails("--lora_rank", "4")
    assert "does not call the layer model.layers.*.mlp.up_proj on text" in said
    named = said.split("Name others: ")[1].split()
    assert named == ["--lora_targets", *"down_proj gate_proj k_proj o_proj q_proj v_proj".split()]
    assert "LoRA of rank 4 beside 12 linear" in run("policy", *LORA, *named)


def test_layers_for_pictures_get_no_factors():
    """Gemma 3 has a tower of them, with projections of the same names."""
    config = Gemma3Config(**zoo.small_fields(Gemma3Config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    args = SimpleNamespace(lora_rank=4, lora_alpha=8.0, lora_targets=None)
    lora.adapt(model, args, torch.float32, "gemma")
    adapted = list(lora.adapted_layers(model))
    assert adapted and all("language_model" in name for name in adapted)
    towers = [name for name, _ in model.named_modules() if name.endswith("vision_tower")]
    assert towers


def test_a_rate_of_full_training_gets_a_message(run):
    text = "LoRA wants five to ten times as much: begin with 5e-06"
    assert text in run("low", "--lora_rank", "4", "--learning_rate", "5e-7")
    assert "LoRA wants" not in run("high", "--lora_rank", "4", "--learning_rate", "5e-6")
    assert "LoRA wants" not in run("full", "--learning_rate", "5e-7")


# ---- the files beside the policy ---------------------------------------------------------------


def test_the_adapter_is_part_of_the_output(run):
    """Done, damaged, made again, and gone with a run that has none."""
    run("policy", *LORA)
    assert "already done" in run("policy", *LORA)
    adapter = run.folder / "policy.adapter"
    assert {path.name for path in adapter.iterdir()} == {lora.ADAPTER_CONFIG, lora.ADAPTER_WEIGHTS}
    assert lora.ADAPTER in meta_of(run, "policy")["beside"]
    (adapter / lora.ADAPTER_CONFIG).write_text("{}")
    assert "policy.adapter: is not what the stage wrote" in run.fails_at("policy", *LORA)
    run("policy", *LORA, "--seed", "1", "--overwrite")
    assert "already done" in run("policy", *LORA, "--seed", "1")
    run("policy", "--overwrite")
    assert not adapter.exists() and "already done" in run("policy")


def test_pitfalls_45_a_folder_of_the_users_is_not_replaced_by_an_adapter(run):
    mine = run.folder / "policy.adapter"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    assert "policy.adapter: is no adapter of an earlier run" in run.fails_at("policy", *LORA)
    run("policy")
    assert (mine / "notes.txt").read_text() == "mine"


# ---- flops -------------------------------------------------------------------------------------


def test_flops_of_frozen_weights_are_what_torch_counts(run):
    """All matrix products; those back to the embedding, which nobody needs, are counted by us."""
    args = SimpleNamespace(lora_rank=4, lora_alpha=8.0, lora_targets=None)
    model = AutoModelForCausalLM.from_pretrained(
        run.folder / "model", attn_implementation=ATTENTION
    )
    lora.freeze(model, torch.float32)
    lora.adapt(model, args, torch.float32, "model")
    for layer in lora.adapted_layers(model).values():
        torch.nn.init.zeros_(layer.lora_A)
        torch.nn.init.zeros_(layer.lora_B)
    policy = dpo_train.Policy(model)
    pairs = arrays(run.rows[:2])
    with FlopCounterMode(display=False) as counter:
        policy(collate(pairs, "prefix", "cpu")).sum().backward()
    counted = 0
    for operation, flops in counter.get_flop_counts()["Global"].items():
        if "attention" not in str(operation):
            counted += flops

    lengths = []
    for pair in pairs:
        lengths.append((len(pair["prompt"]), len(pair["chosen"]), len(pair["rejected"])))
    tokens = sum(map(sum, lengths))
    attention = layers_of(policy)[0].self_attn
    never = 0
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        never += 2 * tokens * (layer.weight.numel() + layer.lora_A.numel())
    weights = speed.matmul_weights(layers_of(policy), model.config)
    without_attention = AutoConfig.from_pretrained(run.folder / "model", num_hidden_layers=0)
    work = speed.flops(weights, without_attention, lengths, frozen_head=True)
    assert work == pytest.approx(counted + never)
