"""What tools/memory.py predicts is what two ranks allocate; the flops behind MFU are what torch
counts.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from arguments import parse
from conftest import ROOT
from dpo_train import Policy
from kernels.attention import ATTENTION
from records import dump
from small_models import causal_lm, config
from tools import memory
from training import speed
from training.batches import collate
from training.fsdp import layers_of

# What FSDP holds on rank 0: within a forward, between two microbatches, and after a step.
MEASURE = """
import json, numpy as np, torch, dpo_train
from training.batches import collate

args = dpo_train.parse(dpo_train.arguments())
args.packing = "prefix"
dpo_train.lora.settle_arguments(args)
device, found = dpo_train.fsdp.start(), {}
size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
pair = {k: np.arange(9, dtype=np.int32) for k in ("prompt", "chosen", "rejected")} | {"id": "a"}
seed = dpo_train.lora.factor_seed(args, "model")
policy = dpo_train.load_policy(args.model, args, device, [pair], seed)
layers = dpo_train.fsdp.layers_of(policy)
within = {p for layer in layers for p in layer.parameters()}
root = [n for n, p in policy.named_parameters() if p not in within]
seen = lambda *_: found.update(
    layer=size(layers[0].parameters()),
    root=size(p for n, p in policy.named_parameters() if n in root),
)
layers[0].mlp.register_forward_hook(seen)
optimizer = dpo_train.make_optimizer(policy, args, device)
for last in (False, True):
    policy.set_requires_all_reduce(last)
    policy(collate([pair], "prefix", device)).sum().backward()
    if not last:
        groups = [m._get_fsdp_state()._fsdp_param_group for m in (policy, *layers)]
        assert all(p.unsharded_accumulated_grad is None for g in groups for p in g.fsdp_params)
optimizer.step()
trained = [p for p in policy.parameters() if p.requires_grad]
found["weights"] = size(p.to_local() for p in trained)
found["frozen"] = size(p.to_local() for p in policy.parameters() if not p.requires_grad)
assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)
found["gradients"] = size(p.grad.to_local() for p in trained)
states = [s[k].to_local() for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
found["adam"] = size(states)
if torch.distributed.get_rank() == 0:
    print(json.dumps(found))
dpo_train.fsdp.leave()
"""

# A whole run; prints how much the resident memory of rank 0 rises above what it was before a model
# was loaded.
RESIDENT = """
import json, re, dpo_train
def status(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
def train(*args):
    # The peak starts anew: loading is not what is predicted.
    open("/proc/self/clear_refs", "w").write("5")
    figures = original(*args)
    if dpo_train.ranks()[0] == 0:
        print(json.dumps({"resident": status("VmHWM") - before}))
    return figures
original, dpo_train.train, before = dpo_train.train, train, status("VmRSS")
dpo_train.main()
"""


def two_ranks(folder, code, *arguments):
    """Run code with torchrun; the JSON that rank 0 printed last."""
    (folder / "code.py").write_text(code)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command += [str(folder / "code.py"), *map(str, arguments)]
    # Freed memory goes back to the system at once, so that the resident size is what is in use.
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


@pytest.fixture
def predict():
    """predict(flags…) -> bytes of the dry run's rows, in order, under short names."""

    def call(*flags):
        args = parse(memory.arguments(), [str(x) for x in flags])
        rows, _ = memory.rows_of(args)
        torch.distributed.destroy_process_group()
        names = "weights adam gradients root layers reduce activations logprobs working".split()
        if args.lora_rank:
            names.insert(0, "frozen")
        return dict(zip(names, rows.values(), strict=True))

    return call


@pytest.mark.parametrize("tie", [True, False])
def test_two_ranks_hold_exactly_the_bytes_predicted(tmp_path, predict, tie):
    """Shards (of a vocabulary of 307, so uneven ones) and what is gathered; in between gradients
    stay shards.
    """
    causal_lm(tmp_path / "m", "qwen2", tie=tie)
    flags = ["--model", tmp_path / "m", "--dtype", "bf16"]
    found = two_ranks(tmp_path, MEASURE, *flags, "--pairs", "none", "--output", "none")
    said = predict(*flags, "--world_size", 2)
    assert {k: said[k] for k in ("weights", "adam", "gradients", "root")} == {
        k: found[k] for k in ("weights", "adam", "gradients", "root")
    }
    assert said["layers"] == 2 * found["layer"]  # one at work and the next on its way


def test_frozen_weights_and_factors_take_the_bytes_predicted(tmp_path, predict):
    """Two ranks: bf16 weights as in the files; gradients and Adam's states of the factors alone."""
    causal_lm(tmp_path / "m", "qwen2", tie=True, dtype=torch.bfloat16)
    flags = ["--model", tmp_path / "m", "--dtype", "bf16", "--lora_rank", 3]
    found = two_ranks(tmp_path, MEASURE, *flags, "--pairs", "none", "--output", "none")
    said = predict(*flags, "--world_size", 2)
    for name in ("frozen", "weights", "adam", "gradients", "root"):
        assert said[name] == found[name], name
    assert said["layers"] == 2 * found["layer"]
    in_fp32 = sum(4 * p.numel() for p in causal_lm(tmp_path / "n", "qwen2", tie=True).parameters())
    assert 0.24 < said["frozen"] / in_fp32 < 0.27  # half of the weights, at half of the bytes
    assert said["adam"] == 2 * said["weights"] < 0.1 * in_fp32


def test_activations_are_those_of_the_equations(tmp_path, predict):
    """A recomputed layer keeps its input and nothing else, a log-prob its row of Q and its hidden
    state.
    """
    flags = ["--tokens_per_batch", 1800, "--world_size", 1, "--dtype", "bf16"]
    said = {}
    for layers, *more in ((2, "--gradient_checkpointing"), (4, "--gradient_checkpointing"), (4,)):
        config("qwen2", num_hidden_layers=layers, max_position_embeddings=2048).save_pretrained(
            tmp_path
        )
        said[layers, bool(more)] = predict("--model", tmp_path, *flags, *more)
    assert said[4, True]["activations"] - said[2, True]["activations"] == 2 * 1800 * 64 * 2
    assert said[4, False]["activations"] > 4 * said[4, True]["activations"]
    answers, row = 1400, 320  # of 2 pairs of 200 + 350 + 350; V = 307, in 16-byte loads 320
    kept = (
        answers * (row + 64) - 1800 * 64
    )  # from here on nobody holds the last hidden states of all tokens
    assert said[4, True]["logprobs"] == pytest.approx(2 * kept, rel=0.03)


def test_peak_memory_of_two_ranks_is_near_the_prediction(tmp_path, predict):
    """25M parameters: half of the states, activations and all, against the resident memory of rank
    0 in a real run.

    A CPU's attention kernels and gloo's buffers differ from a GPU's, so this is a bound and not an
    equality.
    """
    shape = dict(
        hidden_size=512,
        intermediate_size=2048,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
    )
    causal_lm(tmp_path / "m", "llama", num_hidden_layers=6, max_position_embeddings=2048, **shape)
    ids = {f"{k}_token_ids": [5] * n for k, n in dict(prompt=200, chosen=350, rejected=350).items()}
    row = {"prompt": "x", "chosen": "x", "rejected": "x"} | ids
    (tmp_path / "pairs.jsonl").write_text("".join(dump({"id": str(i)} | row) for i in range(4)))
    flags = ["--model", tmp_path / "m", "--tokens_per_batch", 900, "--dtype", "fp32"]
    said = predict(*flags, "--world_size", 2)
    needed = sum(said.values())
    files = ["--pairs", tmp_path / "pairs.jsonl", "--output", tmp_path / "o", "--batch_size", 2]
    found = two_ranks(tmp_path, RESIDENT, *flags, *files)["resident"]
    print(f"predicted {needed / 2**20:.0f} MiB, resident {found / 2**20:.0f} MiB")
    assert 0.8 < found / needed < 1.2  # 536 MiB, predicted 571, when this was written


def test_a_dry_run_needs_a_config_only_and_adds_up(tmp_path, stage):
    config("llama").save_pretrained(tmp_path)
    flags = [
        "--model",
        tmp_path,
        "--tokens_per_batch",
        200_000,
        "--world_size",
        8,
        "--shard_size",
        4,
    ]
    lines = stage("tools/memory.py", *flags, "--cpu_offload").stdout.splitlines()
    assert "rank 0 of 8, bf16" in lines[0]
    sizes = {line[12:]: float(line[:10]) for line in lines[1:]}
    host = [name for name in sizes if "(host memory)" in name]
    assert len(host) == 3
    *rows, total = (size for name, size in sizes.items() if name not in host)
    assert total == pytest.approx(sum(rows), abs=0.005 * len(rows) + 0.005) and total > 0.1


def test_a_dry_run_knows_the_gpus_stash(tmp_path, predict):
    """5.9 GiB of Q, with the words of a real vocabulary: more than a CPU would keep, all of it kept
    on a GPU.
    """
    config("qwen2", vocab_size=151936, max_position_embeddings=2048).save_pretrained(tmp_path)
    said = predict("--model", tmp_path, "--tokens_per_batch", 27000, "--dtype", "bf16")
    answers = 30 * 700
    assert said["logprobs"] == pytest.approx(2 * answers * 151936, rel=0.01)


def test_a_dry_run_of_one_rank_says_what_gathered_weights_take(tmp_path, stage):
    """Above the sum, which has two layers at a time; and of a rank that shares its weights,
    nothing.
    """
    config("llama", hidden_size=1024, num_hidden_layers=8, intermediate_size=4096).save_pretrained(
        tmp_path
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config("llama").from_pretrained(tmp_path))
    weights, layer = (
        sum(p.numel() for p in m.parameters()) for m in (model, model.model.layers[0])
    )
    flags = ["--model", tmp_path, "--tokens_per_batch", 900]
    for more, factor, beside in (("--cpu_offload", 4, 0), ("--gradient_checkpointing", 2, 16)):
        *_, last = stage("tools/memory.py", *flags, more).stdout.splitlines()
        said = float(last[:10]), float(last.split("with")[1].split()[0])
        assert "stay gathered" in last
        assert said[0] == pytest.approx(2 * 6 * layer / 2**30, abs=0.006)
        assert said[1] == pytest.approx(factor * weights * (2 + beside) / 2**30, abs=0.06)
    assert "stay gathered" not in stage("tools/memory.py", *flags, "--world_size", 2).stdout


def test_ranks_that_cannot_share_are_refused(tmp_path, stage):
    config("llama").save_pretrained(tmp_path)
    flags = ["--model", tmp_path, "--world_size", "8", "--shard_size", "3"]
    done = stage("tools/memory.py", *flags, check=False)
    assert done.returncode == 1 and "does not divide the 8 ranks" in done.stderr


# ---- the flops behind MFU ----------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "olmo2"])
def test_model_flops_are_what_torch_counts(tmp_path, arch, tie):
    """All matrix products of a real forward and backward; of attention, what the causal mask
    leaves.
    """
    causal_lm(tmp_path, arch, tie=tie)
    policy = Policy(
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=ATTENTION).train()
    )
    pairs = [
        {
            k: np.full(n, 7, np.int32)
            for k, n in zip(("prompt", "chosen", "rejected"), x, strict=True)
        }
        for x in ((5, 9, 3), (1, 1, 14))
    ]
    with FlopCounterMode(display=False) as counter:
        policy(collate(pairs, "prefix", "cpu")).sum().backward()
    counts = counter.get_flop_counts()  # module -> operation -> flops
    products = sum(n for op, n in counts["Global"].items() if "attention" not in str(op))
    # Older versions of transformers make the rotary angles with a matrix product.
    rotary = [module for module in counts if module.endswith("rotary_emb")]
    products -= sum(sum(counts[module].values()) for module in rotary)

    # Attention one query at a time: every key that is counted is one that is seen. Backward is
    # twice the forward.
    c = policy.model.config
    q = torch.randn(1, c.num_attention_heads, 1, c.head_dim, device="meta")
    with FlopCounterMode(display=False) as counter:
        for pair in pairs:
            p, y, n = (len(pair[k]) for k in ("prompt", "chosen", "rejected"))
            for keys in [*range(1, p + y + 1), *range(p + 1, p + n + 1)]:
                k = torch.randn(1, c.num_attention_heads, keys, c.head_dim, device="meta")
                scaled_dot_product_attention(q, k, k)
    looking = 3 * c.num_hidden_layers * counter.get_total_flops()
    lengths = [tuple(map(len, pair.values())) for pair in pairs]
    weights = speed.matmul_weights(layers_of(policy), c)
    assert speed.flops(weights, c, lengths) == products + looking


def test_an_expert_that_a_token_does_not_see_is_no_flop(tmp_path):
    c = config("qwen3_moe", num_experts=4, num_experts_per_tok=1, moe_intermediate_size=32)
    with torch.device("meta"):
        policy = Policy(AutoModelForCausalLM.from_config(c))
    experts = 3 * 64 * 32 * c.num_hidden_layers  # gate, up and down of one
    every = sum(p.numel() for n, p in policy.named_parameters() if p.ndim > 1 and ".layers." in n)
    assert speed.matmul_weights(layers_of(policy), c) == every - 3 * experts
