"""The trainer: its loss, its data, its division into microbatches and ranks, its restarts, its
exports, its refusals.
"""

import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DbrxConfig

import dpo_train
from conftest import ROOT
from dpo_train import Policy, all_logprobs, dpo_loss, learning_rate, loss_of_pairs
from kernels.attention import ATTENTION
from records import dump
from small_models import LLAMA4, causal_lm
from stage import hash_path
from training import checks, network
from training import plans as planning
from training.batches import PARTS, collate
from training.flags import betas_of_epochs
from training.pairs import few_steps
from training.plans import cost, microbatches, shortest_and_longest


def make_pairs(folder, model, n=24, seed=0, longest=20):
    """n pairs in pairs.jsonl's shape, with the model's own log-probs, as generate.py would leave
    them.
    """
    rng = random.Random(seed)
    model_hash, rows = hash_path(folder), []
    for i in range(n):
        row = {
            "id": f"p{i}",
            "prompt": [{"role": "user", "content": f"question {i}"}],
            "iteration": 1,
        }
        row["prompt_token_ids"] = prompt = [
            rng.randrange(3, 300) for _ in range(rng.randint(3, 12))
        ]
        for k in ("chosen", "rejected"):
            ids = [rng.randrange(6, 300) for _ in range(rng.randint(0, longest))] + [4]
            row[k] = [{"role": "assistant", "content": f"{k} {i}"}]
            row[f"{k}_token_ids"] = ids
            row[f"{k}_logprob"] = plain_logprob(model, prompt, ids).item()
            row[f"{k}_model"] = model_hash
        rows.append(row)
    return rows


def plain_logprob(model, prompt, answer):
    """A hand-written loop in the model's own dtype: one sequence, one token at a time."""
    with torch.set_grad_enabled(model.training):
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        total = 0.0
        for t, token in enumerate(answer):
            total = total + torch.log_softmax(logits[len(prompt) + t - 1].double(), -1)[token]
    return total


def arrays(rows):
    return [
        {k: np.asarray(row[f"{k}_token_ids"], np.int32) for k in ("prompt", "chosen", "rejected")}
        for row in rows
    ]


def write(path, rows):
    path.write_text("".join(map(dump, rows)))
    return path


class Run:
    """A folder with a model and pairs, and the trainer run in this process: run("out", flags…) ->
    printed text.
    """

    def __init__(self, tmp_path, capsys, monkeypatch):
        self.folder, self.capsys, self.monkeypatch = tmp_path, capsys, monkeypatch
        self.model = causal_lm(tmp_path / "model", tie=True)
        self.rows = make_pairs(tmp_path / "model", self.model)
        self.pairs = write(tmp_path / "pairs.jsonl", self.rows)

    def argv(self, output, *flags):
        base = [
            "--model",
            self.folder / "model",
            "--pairs",
            self.pairs,
            "--output",
            self.folder / output,
        ]
        # --learning_rate, --batch_size: small models want larger steps, and tests several of them
        base += ["--learning_rate", "1e-3", "--batch_size", "8", "--warmup_ratio", "0"]
        return [str(x) for x in [*base, *flags]]

    def __call__(self, output, *flags):
        self.monkeypatch.setattr(sys, "argv", ["dpo_train.py", *self.argv(output, *flags)])
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            dpo_train.main()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return self.capsys.readouterr().out

    def fails(self, *flags):
        return self.fails_at("failed", *flags)

    def fails_at(self, output, *flags):
        with pytest.raises(SystemExit) as stop:
            self(output, *flags)
        return str(stop.value)

    def weights(self, output):
        return load_file(self.folder / output / "model.safetensors")

    def log(self, output="*"):
        """The rows of train.jsonl, of `output` or of the policy that was trained last."""
        found = self.folder.glob(f"{output}.train.jsonl")
        latest = max(found, key=lambda path: path.stat().st_mtime_ns)
        return [json.loads(line) for line in open(latest)]


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    return Run(tmp_path, capsys, monkeypatch)


def distance(a, b):
    return max((a[k] - b[k]).abs().max().item() for k in a)


# ---- The loss ----------------------------------------------------------------------------------


def by_hand(l_w, r_w, l_l, r_l, n_w, n_l, beta, kind, e, a, c):
    def s(x):
        return 1 / (1 + math.exp(-x))

    z = beta * ((l_w - r_w) - (l_l - r_l)) + a * (n_w - n_l)
    loss = {
        "sigmoid": -(1 - e) * math.log(s(z)) - e * math.log(s(-z)),
        "robust": (-(1 - e) * math.log(s(z)) + e * math.log(s(-z))) / (1 - 2 * e),
        "hinge": max(0.0, 1 - z),
        "ipo": ((l_w - r_w) / n_w - (l_l - r_l) / n_l - 1 / (2 * beta)) ** 2,
    }[kind]
    return loss - c * l_w / n_w


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "hinge", "ipo"])
@pytest.mark.parametrize(("e", "a", "c"), [(0.0, 0.0, 0.0), (0.2, 0.0, 0.0), (0.1, 0.03, 0.5)])
def test_every_loss_is_its_equation(kind, e, a, c):
    torch.manual_seed(0)
    policy, ref = torch.randn(16, 2).double() * 5 - 20, torch.randn(16, 2).double() * 5 - 20
    lengths = torch.randint(1, 40, (16, 2)).double()
    args = SimpleNamespace(loss_type=kind, label_smoothing=e, length_coef=a, nll_coef=c)
    loss = loss_of_pairs(policy, ref, lengths, 0.3, args)
    for i in range(16):
        (l_w, l_l), (r_w, r_l), (n_w, n_l) = (
            policy[i].tolist(),
            ref[i].tolist(),
            lengths[i].tolist(),
        )
        assert loss[i].item() == pytest.approx(
            by_hand(l_w, r_w, l_l, r_l, n_w, n_l, 0.3, kind, e, a, c), rel=1e-12
        )


def test_the_loss_is_four_tensors_and_numbers():
    """The DPO paper's equation 7, written out as in a notebook."""
    policy_chosen, policy_rejected = torch.tensor([-10.0]), torch.tensor([-12.0])
    reference_chosen, reference_rejected = torch.tensor([-11.0]), torch.tensor([-11.5])
    loss = dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1)
    d = (-10 - -11) - (-12 - -11.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.1 * d)), rel=1e-6)
    with pytest.raises(ValueError, match="no loss is called 'dpo'"):
        dpo_loss(*[policy_chosen] * 4, 0.1, "dpo")


def test_pitfalls_16_loss_and_gradient_equal_a_hand_written_fp64_loop(tmp_path):
    """No prompt token is a target, and every answer token is: compared with a loop over single
    tokens, in fp64.
    """
    model = causal_lm(tmp_path / "m", tie=True)
    rows = make_pairs(tmp_path / "m", model, n=6)
    reference = torch.randn(6, 2) - 60
    args = SimpleNamespace(
        loss_type="sigmoid", label_smoothing=None, length_coef=None, nll_coef=0.0
    )

    ours = Policy(
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation=ATTENTION).train()
    )
    batch = collate(arrays(rows), "prefix", "cpu")
    loss = loss_of_pairs(ours(batch), reference, batch["lengths"], 0.1, args).mean()
    loss.backward()

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64).train()
    total = 0.0
    for i, row in enumerate(rows):
        l = [
            plain_logprob(theirs, row["prompt_token_ids"], row[f"{k}_token_ids"])
            for k in ("chosen", "rejected")
        ]
        d = (l[0] - reference[i, 0]) - (l[1] - reference[i, 1])
        total = total - torch.nn.functional.logsigmoid(0.1 * d) / len(rows)
    total.backward()
    assert loss.item() == pytest.approx(total.item(), abs=1e-6)
    expected = dict(theirs.named_parameters())
    for name, p in ours.model.named_parameters():
        error = (p.grad - expected[name].grad).norm() / expected[name].grad.norm().clamp(min=1e-9)
        assert error < 1e-5, name


# ---- Microbatches ------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["prefix", "padded"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_microbatches_hold_every_pair_once_under_the_budget(packing, world):
    rng = random.Random(world)
    for n in (1, 2, 7, 100):
        costs = {10 * i: rng.randint(10, 400) for i in range(n)}
        bins = microbatches(costs, 1000, world, packing)
        assert (
            len(bins) == world and len({len(b) for b in bins}) == 1
        )  # as many forwards on each rank
        assert sorted(i for rank in bins for bin in rank for i in bin) == sorted(costs)
        for bin in (bin for rank in bins for bin in rank if bin):
            load = (
                len(bin) * max(costs[i] for i in bin)
                if packing == "padded"
                else sum(costs[i] for i in bin)
            )
            assert load <= 1000
        loads = [sum(costs[i] for bin in rank for i in bin) for rank in bins]
        assert (
            n < 100 or packing == "padded" or max(loads) - min(loads) <= 0.05 * sum(loads) / world
        )
    # A pair above the budget gets a microbatch of its own.
    assert [0] in microbatches({0: 5000, 1: 600, 2: 600}, 1000, 1, packing)[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_pitfalls_19_and_20_alone_equals_batched_packed_and_prefix_shared(tmp_path, stage, ranks):
    """Log-probs and gradient through the functions that train; padding never changes a log-prob."""
    archs = ("llama", "qwen2", "qwen3", "olmo2")
    for arch, tie in ((arch, tie) for arch in archs for tie in (True, False)):
        causal_lm(tmp_path / f"{arch}-{tie}", arch, tie=tie)
    done = stage(
        "tests/equivalence.py", tmp_path, nproc=ranks, env={"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert (
        len(rows) == len(archs) * 2 * 2 * 2
    )  # tied and not, two layouts, with and without checkpointing
    for name, packing, checkpointing, logprobs, gradient in rows:
        assert logprobs < 1e-5 and gradient < 1e-5, (
            name,
            packing,
            checkpointing,
            logprobs,
            gradient,
        )


# ---- Whole runs --------------------------------------------------------------------------------


def test_pitfalls_18_the_first_loss_is_ln_2(run):
    out = run("policy")
    assert "policy = reference makes it 0.6931472" in out
    assert run.log()[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.log()[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_pitfalls_22_one_batch_accumulated_batches_and_packings_agree(run):
    """One forward pass, many, padded, recomputed layers: the same losses and weights (1e-5)."""
    flags = ["--learning_rate", "1e-4", "--num_train_epochs", "2"]
    run("whole", *flags)
    log = run.log()
    variants = {
        "cut": ["--tokens_per_batch", "90"],
        "padded": ["--packing", "padded", "--tokens_per_batch", "300", "--gradient_checkpointing"],
    }
    for name, more in variants.items():
        run(name, *flags, *more)
        assert distance(run.weights("whole"), run.weights(name)) < 1e-5, name
        for a, b in zip(log, run.log(), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_pitfalls_22_one_rank_two_ranks_and_hsdp_agree(run, stage):
    """Through torchrun and gloo; 25 pairs by 8 leave a last step of one pair: one rank has none."""
    write(run.pairs, make_pairs(run.folder / "model", run.model, n=25))
    flags = [
        "--learning_rate",
        "1e-4",
        "--tokens_per_batch",
        "60",
    ]  # several microbatches per step and rank
    run("one", *flags)
    log = run.log()
    for name, more in {"two": [], "hsdp": ["--shard_size", "1"]}.items():
        stage("dpo_train.py", *run.argv(name, *flags, *more), nproc=2)
        assert distance(run.weights("one"), run.weights(name)) < 1e-5
        for a, b in zip(log, run.log(), strict=True):
            assert all(
                a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-5)
                for k in a
                if k != "tokens_per_second"
            )


def test_the_policy_learns_the_pairs(run):
    run("policy", "--num_train_epochs", "6", "--lr_scheduler", "constant")
    log = run.log()
    assert log[-1]["loss"] < 0.5 * log[0]["loss"] and log[-1]["rewards/accuracies"] == 1


def plain_training(model, rows, plans, args):
    """DPO as in the paper, the first policy as its reference: one sequence, one step at a time.

    Returns the model's weights afterwards, and the gradient's norm at each step.
    """
    optimizer = torch.optim.AdamW(
        model.train().parameters(), betas=tuple(args.adam_betas), weight_decay=args.weight_decay
    )
    norms = []
    for number, plan in enumerate(plans):
        losses = []
        for i in planning.indices_of(plan):
            margin = 0.0
            for name, sign in (("chosen", 1), ("rejected", -1)):
                ids = rows[i][f"{name}_token_ids"]
                logprob = plain_logprob(model, rows[i]["prompt_token_ids"], ids)
                margin = margin + sign * (logprob - rows[i][f"{name}_logprob"])
            losses.append(-torch.nn.functional.logsigmoid(0.1 * margin))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        norms.append(norm.item())
        optimizer.param_groups[0]["lr"] = learning_rate(number, len(plans), args)
        optimizer.step()
    return model.state_dict(), norms


def test_a_training_is_a_plain_loop_over_its_steps(run):
    """Warm-up, schedule, clipping, weight decay and Adam's means, over two epochs."""
    flags = "--learning_rate 1e-4 --num_train_epochs 2 --warmup_ratio 0.4 --weight_decay 0.5"
    flags += " --max_grad_norm 0.05 --adam_betas 0.8 0.9"
    argv = run.argv("policy", *flags.split())
    args = dpo_train.arguments().parse_args(argv)
    args.packing = "prefix"
    plans = planning.plan_all_steps(arrays(run.rows), args)
    expected, norms = plain_training(run.model, run.rows, plans, args)

    run("policy", *flags.split())
    assert [row["grad_norm"] for row in run.log()] == pytest.approx(norms, rel=1e-3)
    assert min(norms) > 2 * args.max_grad_norm  # so that each step is clipped
    assert distance(run.weights("policy"), expected) < 2e-6  # of updates of 1e-4


def test_the_order_of_the_pairs_is_another_in_each_epoch_and_for_each_seed():
    args = SimpleNamespace(num_train_epochs=2, batch_size=40, tokens_per_batch=10**6)
    args.packing = "prefix"
    pairs = arrays(make_lengths([(3, 2, 2)] * 40))
    orders = []
    for args.seed in (0, 0, 1):
        orders.append([planning.indices_of(plan) for plan in planning.plan_all_steps(pairs, args)])
    assert orders[0] == orders[1]
    different = [*orders[0], *orders[2], list(range(40))]
    assert len({tuple(order) for order in different}) == 5
    assert all(sorted(order) == list(range(40)) for order in different)


def test_pitfalls_23_weights_are_fp32_masters_and_all_of_them_move(run):
    """A bf16 model at 5e-7: nearly no weight changes in bf16, every trained one changes in fp32."""
    causal_lm(run.folder / "model", tie=False, dtype=torch.bfloat16)
    run.model.load_state_dict(
        AutoModelForCausalLM.from_pretrained(run.folder / "model").state_dict(), strict=False
    )
    write(run.pairs, [{k: v for k, v in row.items() if "logprob" not in k} for row in run.rows])
    small = ["--learning_rate", "5e-7"]
    share = {}
    for dtype in ("bf16", "fp32"):
        run(dtype, *small, "--save_dtype", dtype)
        share[dtype] = json.loads((run.folder / f"{dtype}.meta.json").read_text())[
            "changed_weights"
        ]
        assert {v.dtype for v in run.weights(dtype).values()} == {dpo_train.DTYPES[dtype]}
    assert share["bf16"] < 0.1 < 0.5 < share["fp32"]
    before = {k: v.float() for k, v in load_file(run.folder / "model/model.safetensors").items()}
    assert all(
        (v != before[k]).any() for k, v in run.weights("fp32").items()
    )  # root and layers: all are trained


def test_a_plan_keeps_to_the_batch_size_and_to_the_tokens_of_a_forward_pass():
    args = SimpleNamespace(num_train_epochs=1, batch_size=30, tokens_per_batch=70, seed=0)
    args.packing = "prefix"
    plans = planning.plan_all_steps(arrays(make_lengths([(3, 2, 2)] * 40)), args)
    assert [len(planning.indices_of(plan)) for plan in plans] == [30, 10]
    assert [[len(batch) for batch in plan[0]] for plan in plans] == [[10, 10, 10], [10]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_policy_is_saved_in_the_dtype_that_the_model_came_in(run, dtype):
    """--save_dtype auto, the default: the next iteration's generator loads what it has known."""
    causal_lm(run.folder / "model", tie=True, dtype=dtype)
    text = [{k: v for k, v in row.items() if "logprob" not in k} for row in run.rows]
    write(run.pairs, text)
    run("policy")
    assert {weight.dtype for weight in run.weights("policy").values()} == {dtype}
    assert AutoConfig.from_pretrained(run.folder / "policy").dtype == dtype


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2"])
@pytest.mark.parametrize("tie", [True, False])
def test_pitfalls_27_every_architecture_trains_and_is_exported_as_it_was_trained(
    run, arch, tie, monkeypatch
):
    """The exported folder, loaded by transformers, gives the log-probs that the trainer had at the
    end.
    """
    shutil.rmtree(run.folder / "model")
    model = causal_lm(run.folder / "model", arch, tie=tie)
    rows = make_pairs(run.folder / "model", model, n=8)
    write(run.pairs, rows)
    trained = {}
    train = dpo_train.train

    def train_and_look(policy, data, args, stage, device):
        figures = train(policy, data, args, stage, device)
        plans = data.plans[:1]
        trained["logprobs"] = all_logprobs(policy, data.pairs, plans, args.packing, device)
        return figures

    monkeypatch.setattr(dpo_train, "train", train_and_look)
    out = run("policy", "--learning_rate", "1e-3")
    assert ("padded" in out) == (
        arch == "gemma2"
    )  # soft-capped attention cannot be packed, and it says so
    loaded = AutoModelForCausalLM.from_pretrained(
        run.folder / "policy", attn_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "policy")
    assert (
        tokenizer.chat_template
        and loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    )
    assert ("lm_head.weight" in run.weights("policy")) == (not tie)
    for i, row in enumerate(rows):
        for k, name in enumerate(("chosen", "rejected")):
            again = plain_logprob(loaded, row["prompt_token_ids"], row[f"{name}_token_ids"]).item()
            assert again == pytest.approx(trained["logprobs"][i, k].item(), abs=2e-4)
            assert again != pytest.approx(row[f"{name}_logprob"], abs=1e-3)  # and it has moved


def test_pitfalls_26_one_pair_trains_one_step(run):
    write(run.pairs, run.rows[:1])
    run("policy", "--batch_size", "128")
    assert (
        len(run.log()) == 1
        and distance(run.weights("policy"), load_file(run.folder / "model/model.safetensors")) > 0
    )


def test_pitfalls_21_pairs_without_room_or_tokens_are_dropped_and_counted(run):
    run.rows[0]["chosen_token_ids"] = []
    run.rows[1]["rejected_token_ids"] = [7] * 300
    write(run.pairs, run.rows)
    run("policy")
    counts = json.loads((run.folder / "policy.meta.json").read_text())["counts"]["rows"]
    assert counts == {"in": 24, "out": 22, "dropped": {"no_tokens": 1, "too_long": 1}}
    assert all(math.isfinite(v) for row in run.log() for v in row.values())
    run("short", "--max_length", "20")
    counts = json.loads((run.folder / "short.meta.json").read_text())["counts"]["rows"]
    lengths = [[len(row[f"{k}_token_ids"]) for k in PARTS] for row in run.rows[2:]]
    fitting = [p + max(c, r) for p, c, r in lengths if p + max(c, r) <= 20]
    assert counts["out"] == len(fitting) and 0 < len(fitting) < 22
    write(run.pairs, run.rows[:2])
    assert "none of 2 pairs can be trained on: {'no_tokens': 1, 'too_long': 1}" in run.fails()


def test_pitfalls_3_pairs_without_ids_are_rendered_and_a_merged_boundary_is_dropped(run):
    """Other preference data: conversations through the template, and text as it is if the prompt
    stays a prefix.
    """
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")

    def merges(token):  # across the boundary after its first letter
        ids = tokenizer("x " + token[0])["input_ids"]
        return tokenizer("x " + token)["input_ids"][: len(ids)] != ids

    merged = next(
        t for t in sorted(tokenizer.get_vocab()) if len(t) == 2 and t.isascii() and merges(t)
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        },
        {"prompt": "x " + merged[0], "chosen": merged[1], "rejected": "?"},
        {"prompt": "one two", "chosen": "; three", "rejected": "; four"},
    ]
    write(run.pairs, rows)
    out = run("policy")
    assert "3 pairs carry no token ids" in out
    counts = json.loads((run.folder / "policy.meta.json").read_text())["counts"]["rows"]
    assert counts == {"in": 3, "out": 2, "dropped": {"template_not_prefix": 1}}


def test_text_beside_conversations_is_an_error(run):
    """UltraFeedback's published form: a text as prompt, and answers as conversations that repeat
    it.
    """
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    write(run.pairs, [{"prompt": "hi", "chosen": talk, "rejected": talk}])
    assert "pairs.jsonl:1: prompt, chosen and rejected must be all text" in run.fails()


def test_answers_without_a_stop_id_are_trained_and_reported(run):
    """No end is invented; a message says that none is trained."""
    talk = {"prompt": [{"role": "user", "content": "hi"}]}
    talk |= {k: [{"role": "assistant", "content": k}] for k in ("chosen", "rejected")}
    write(run.pairs, [talk])
    assert "no stop id" not in run("with")
    template = run.folder / "model/chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", ""))
    assert "note: in 1 of them the chat template writes no stop id" in run("without")


def test_pitfalls_51_the_training_sees_no_token_behind_the_end_of_a_turn(run):
    """A pair of text alone, and one with the ids of generation, train the same policy."""
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    talk = {"prompt": [{"role": "user", "content": "hi"}]}
    talk |= {k: [{"role": "assistant", "content": k}] for k in ("chosen", "rejected")}
    prompt = tokenizer.apply_chat_template(
        talk["prompt"], add_generation_prompt=True, return_dict=False
    )
    ids = {"prompt_token_ids": prompt}
    for k in ("chosen", "rejected"):
        ids[f"{k}_token_ids"] = [*tokenizer(k).input_ids, tokenizer.eos_token_id]
    write(run.pairs, [talk])
    run("text")
    assert run.log("text")[0]["length/chosen"] == len(ids["chosen_token_ids"])
    write(run.pairs, [talk | ids])
    run("ids")
    assert distance(run.weights("text"), run.weights("ids")) == 0


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].content + messages[0].name }}", "{{ raise_exception('no such role') }}"],
)
def test_a_template_that_raises_names_file_and_line(run, template):
    fine = {"prompt": "a ", "chosen": "b", "rejected": "c"}
    talk = {"prompt": [{"role": "user", "content": "hi"}]}
    talk |= {k: [{"role": "assistant", "content": k}] for k in ("chosen", "rejected")}
    (run.folder / "model/chat_template.jinja").write_text(template)
    write(run.pairs, [fine, talk])
    said = run.fails()
    assert "pairs.jsonl:2: the chat template of" in said and "\n" not in said


# ---- The reference and the audit ---------------------------------------------------------------


def test_pitfalls_17_the_reference_of_an_interrupted_run_is_used_and_checked(run):
    """It stays with the run's parts. A damaged one is noticed; one of other weights is refused."""
    run("undisturbed")
    full_passes = []
    all_logprobs = dpo_train.all_logprobs

    def counting(policy, pairs, *others):
        if len(pairs) == len(run.rows):
            full_passes.append(1)
        return all_logprobs(policy, pairs, *others)

    def killed(*_):
        raise KeyboardInterrupt

    run.monkeypatch.setattr(dpo_train, "all_logprobs", counting)
    file = run.folder / "policy.parts" / "reference.npz"
    with run.monkeypatch.context() as m:
        m.setattr(dpo_train, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            run("policy")
        right = file.read_bytes()
        assert len(full_passes) == 1
        middle = len(right) // 2
        flipped = bytes([right[middle] ^ 64])
        for wrong in (
            right[:middle] + flipped + right[middle + 1 :],
            right[:-8],
            b"junk",
            b"",
        ):
            file.write_bytes(wrong)
            with pytest.raises(KeyboardInterrupt):
                run("policy")
            assert "is damaged" in run.capsys.readouterr().out
            assert file.read_bytes() == right
        assert len(full_passes) == 5

    run("policy")  # resumed: not computed again, and the same weights
    assert len(full_passes) == 5
    assert distance(run.weights("undisturbed"), run.weights("policy")) == 0

    with run.monkeypatch.context() as m:
        m.setattr(dpo_train, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            run("other")
    causal_lm(run.folder / "model", tie=True, seed=1)  # other weights under the same path
    assert "--model: content changed" in run.fails_at("other")


def test_another_reference_is_loaded_used_and_gone(run):
    """REF=init: r comes from --ref_model, so the first loss is that of another model, equal to a
    hand-written one.
    """
    init = causal_lm(run.folder / "init", tie=True, seed=5)
    out = run("policy", "--ref_model", run.folder / "init", "--batch_size", "24", "--dtype", "fp32")
    d = [
        (
            row["chosen_logprob"]
            - plain_logprob(init, row["prompt_token_ids"], row["chosen_token_ids"])
        )
        - (
            row["rejected_logprob"]
            - plain_logprob(init, row["prompt_token_ids"], row["rejected_token_ids"])
        )
        for row in run.rows
    ]
    expected = -torch.nn.functional.logsigmoid(0.1 * torch.stack(d)).mean().item()
    assert run.log()[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert "step 0" not in out and "audit: generator and trainer differ by" in out


def test_pitfalls_28_the_audit_stops_where_the_reference_wrote_something_else(run):
    """An offline loop trains a policy that wrote none of the answers: its reference did."""
    causal_lm(run.folder / "init", tie=True, seed=5)
    writer = hash_path(run.folder / "init")
    rows = [{**r, "chosen_model": writer, "rejected_model": writer} for r in run.rows]
    pairs = write(run.folder / "theirs.jsonl", rows)
    reference = ("--ref_model", run.folder / "init")
    message = run.fails_at("policy", "--pairs", pairs, *reference)
    assert "generator and trainer disagree" in message


def test_the_same_weights_under_another_name_are_no_second_model(run):
    shutil.copytree(run.folder / "model", run.folder / "copy")
    assert "policy = reference makes it 0.6931472" in run(
        "policy", "--ref_model", run.folder / "copy"
    )


def test_history_is_trained_on_and_not_audited(run):
    """Pairs of an earlier policy: their reference is this run's, and the audit is of this policy's
    answers only.
    """
    old = write(
        run.folder / "old.jsonl",
        [{**r, "chosen_model": "x", "rejected_model": "x"} for r in run.rows[:10]],
    )
    out = run("policy", "--pairs", run.pairs, old)
    assert "(48 answers)" in out and sum(row["pairs"] for row in run.log()) == 34


def test_pitfalls_28_the_audit_passes_on_the_right_model_and_stops_on_another(run):
    assert "audit: generator and trainer differ by" in run("policy")
    audit = json.loads((run.folder / "policy.meta.json").read_text())["audit"]
    assert audit["answers"] == 48 and audit["mean"] < 1e-5 and audit["max"] < 1e-4

    # Stale weights: the hash says this model, the numbers say another.
    causal_lm(run.folder / "model", tie=True, seed=1)
    now = hash_path(run.folder / "model")
    write(run.pairs, [{**row, "chosen_model": now, "rejected_model": now} for row in run.rows])
    assert "generator and trainer disagree" in run.fails()


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 0.1)])
def test_pitfalls_28_the_audit_lets_rounding_pass_and_stops_stale_weights(dtype, tolerance):
    """In bf16, long answers of a healthy run may be 0.05 apart; stale weights made 0.3."""
    answer = {"chosen": [1] * 100, "rejected": [1] * 100, "models": ["m", "m"], "id": "a"}
    for share in (0.8, 1.2):
        gap = share * tolerance * 100**0.5  # nats, of an answer of 100 tokens
        pair = answer | {"logprobs": [-50.0, -60.0]}
        ours = torch.tensor([[-50.0 + gap, -60.0 - gap]])
        if share < 1:
            assert checks.audit([pair], ours, "m", dtype, None)["tolerance"] == tolerance
        else:
            with pytest.raises(SystemExit, match=f"the tolerance is {tolerance:g}"):
                checks.audit([pair], ours, "m", dtype, None)
            own = 2 * tolerance  # --max_logprob_gap
            assert checks.audit([pair], ours, "m", dtype, own)["tolerance"] == own


def test_pitfalls_18_a_policy_that_is_not_its_reference_is_stopped_at_the_first_loss(run):
    """Weights that move between the reference's pass and the first step, which none may do."""
    train = dpo_train.train

    def moved(policy, *others):
        with torch.no_grad():
            for weight in policy.parameters():
                weight.mul_(1.05)
        return train(policy, *others)

    run.monkeypatch.setattr(dpo_train, "train", moved)
    assert "the first loss says otherwise" in run.fails()


def test_pitfalls_1_the_audit_sees_a_doubled_bos(run):
    write(
        run.pairs, [{**row, "prompt_token_ids": [1, *row["prompt_token_ids"]]} for row in run.rows]
    )
    assert "doubled BOS" in run.fails()


def test_a_head_we_cannot_express_is_refused(run):
    """A model whose logits are not what its config says: the probe compares with transformers' own
    logits.
    """
    original = dpo_train.lm_head
    run.monkeypatch.setattr(dpo_train, "lm_head", lambda model: {**original(model), "scale": 1.1})
    assert "log-probs of this trainer and of transformers differ" in run.fails()


# Each is random in training mode: values, layers, and experts that are dropped, jittered or drawn.
RANDOM = {
    "llama": {"attention_dropout": 0.5},
    "opt": {"layerdrop": 0.5, "dropout": 0.1, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "mixtral": {"router_jitter_noise": 0.2, "num_local_experts": 4},
    "phimoe": {"router_jitter_noise": 0.01, "num_local_experts": 4},
    "biogpt": {"hidden_dropout_prob": 0.3, "layerdrop": 0.2},
}
RECOMPUTED = ("opt", "phimoe")  # a layer that drops something itself, and one whose parts draw


@pytest.mark.parametrize(
    ("arch", "checkpointing"),
    [(arch, False) for arch in RANDOM] + [(arch, True) for arch in RECOMPUTED],
)
def test_pitfalls_44_nothing_random_is_left_on(run, arch, checkpointing):
    """Two runs with another --ref_model write the same losses, and say what they switched off."""
    for name, seed in (("model", 0), ("init", 5)):
        causal_lm(run.folder / name, arch, seed=seed, **RANDOM[arch])
    text = [{k: v for k, v in row.items() if "logprob" not in k} for row in run.rows]
    write(run.pairs, text)
    flags = ["--ref_model", run.folder / "init"] + ["--gradient_checkpointing"] * checkpointing
    losses = []
    for name in ("a", "b"):
        out = run(name, *flags)
        losses.append([row["loss"] for row in run.log(name)])
    assert losses[0] == losses[1]
    for field, value in RANDOM[arch].items():
        if "drop" in field or "jitter" in field:
            assert f"{field}={value:g}" in out


def test_random_fields_are_found_in_sub_configs_and_dropout_is_zeroed():
    config = DbrxConfig(
        resid_pdrop=0.1, attn_config={"attn_pdrop": 0.2}, ffn_config={"moe_jitter_eps": 0.3}
    )
    config.drop_last_layer = True  # part of the shape, not a probability
    nested = {"attn_config.attn_pdrop": 0.2, "ffn_config.moe_jitter_eps": 0.3}
    assert network.random_fields(config) == {"resid_pdrop": 0.1, **nested}
    network.switch_off_dropout(config)
    assert network.random_fields(config) == {"ffn_config.moe_jitter_eps": 0.3}
    assert config.drop_last_layer is True


def test_pitfalls_44_what_is_left_on_is_named(run):
    """PhiMoE draws experts in training mode whatever the config says: the check sees it."""
    causal_lm(run.folder / "model", "phimoe", num_local_experts=4)
    own = network.build_model

    def training(*arguments):
        return own(*arguments).train()

    run.monkeypatch.setattr(network, "build_model", training)
    said = run.fails()
    assert "two forward passes of the same pair" in said and "nats per token" in said
    assert "randomness is left on: router_jitter_noise=0.01" in said


def test_the_check_takes_the_longest_pair_that_fits():
    pairs = arrays(make_lengths([(3, 2, 2), (9, 4, 7), (30, 9, 9)]))
    for budget, longest in ((100, 2), (47, 1), (5, 0)):
        found = shortest_and_longest(pairs, "prefix", budget)
        assert found[0] is pairs[0] and found[1] is pairs[longest]


def make_lengths(lengths):
    names = ("prompt", "chosen", "rejected")
    return [{f"{k}_token_ids": [7] * n for k, n in zip(names, row, strict=True)} for row in lengths]


def test_recomputed_layers_are_the_same_function_and_recomputed(run):
    """--gradient_checkpointing works in evaluation mode: each layer runs again in backward."""
    config = AutoConfig.from_pretrained(run.folder / "model")
    model = network.build_model(config, torch.float32, "padded", True, "model")
    calls = []
    for layer in dpo_train.fsdp.layers_of(model):
        # At its beginning: recomputation stops as soon as backward has what it needs.
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model(input_ids=torch.arange(9)[None], use_cache=False).logits.sum().backward()
    assert len(calls) == 2 * config.num_hidden_layers


def test_llama4s_text_model_trains(run):
    """Its base_model is the whole model, head included."""
    causal_lm(run.folder / "model", "llama4_text", **LLAMA4)
    write(run.pairs, [{k: v for k, v in row.items() if "logprob" not in k} for row in run.rows])
    assert "loss 0.6931472" in run("policy")


def test_a_head_that_we_cannot_express_is_refused_by_name(run):
    causal_lm(run.folder / "model", logits_multiplier=3.0)
    said = run.fails()
    assert "model: cannot be trained: LlamaForCausalLM: its config has logits_multiplier" in said


# ---- Restarts ----------------------------------------------------------------------------------


def steps_done(folder):
    path = folder / "train.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def interrupt(run, argv, sent, after):
    """Start the trainer as a process, send it a signal after its k-th step, and wait. Returns its
    exit code.
    """
    process = subprocess.Popen(
        [sys.executable, ROOT / "dpo_train.py", *argv], stdout=subprocess.PIPE, text=True
    )
    parts = run.folder / "broken.parts"
    while process.poll() is None and steps_done(parts) < after:
        time.sleep(0.002)
    process.send_signal(sent)
    process.communicate()
    return process.returncode


def test_pitfalls_29_interrupted_equals_uninterrupted_bit_for_bit(run, stage):
    """SIGTERM and Ctrl-C (which save), kill -9 (which does not), a torn log, and then the end: the
    same bytes.
    """
    flags = ["--batch_size", "1", "--num_train_epochs", "4", "--save_every", "10"]
    run("whole", *flags)
    log = run.log()
    argv = run.argv("broken", *flags)
    assert interrupt(run, argv, signal.SIGTERM, after=5) == dpo_train.INTERRUPTED
    (saved,) = (run.folder / "broken.parts").glob("step_*")
    assert 5 <= int(saved.name[-6:]) < 96
    assert (
        interrupt(run, argv, signal.SIGKILL, after=steps_done(run.folder / "broken.parts") + 15)
        == -signal.SIGKILL
    )
    assert interrupt(
        run, argv, signal.SIGINT, after=steps_done(run.folder / "broken.parts") + 3
    ) in (0, 75)
    assert "resuming after step" in run("broken", *flags)
    a, b = run.folder / "whole/model.safetensors", run.folder / "broken/model.safetensors"
    assert a.read_bytes() == b.read_bytes()
    again = run.log("broken")
    assert [{**r, "tokens_per_second": 0} for r in log] == [
        {**r, "tokens_per_second": 0} for r in again
    ]
    assert not (run.folder / "broken.parts").exists()


def test_an_interrupted_training_goes_on_after_its_checkpoint_with_adams_states(run):
    """SIGTERM in the third step of six; then the steps that are left, and the same bytes."""
    flags = ["--num_train_epochs", "2", "--lr_scheduler", "constant"]
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
    assert len(steps) == 3
    run("broken", *flags)
    assert len(steps) == 6
    assert distance(run.weights("whole"), run.weights("broken")) == 0


def test_save_every_bounds_what_a_kill_costs(run):
    """Killed in the sixth step of six: the last checkpoint is of the fourth, and no other stays."""
    flags = ["--num_train_epochs", "2", "--save_every", "2"]
    steps = []
    training_step = dpo_train.training_step

    def killed_in_the_sixth(*arguments):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return training_step(*arguments)

    run.monkeypatch.setattr(dpo_train, "training_step", killed_in_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        run("policy", *flags)
    assert [path.name for path in (run.folder / "policy.parts").glob("step_*")] == ["step_000004"]
    assert "resuming after step 4" in run("policy", *flags)
    assert [row["step"] for row in run.log()] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_one_rank_goes_on_with_two(run, stage):
    flags = ["--learning_rate", "1e-4", "--batch_size", "2", "--save_every", "4"]
    run("whole", *flags)
    assert (
        interrupt(run, run.argv("broken", *flags), signal.SIGTERM, after=5) == dpo_train.INTERRUPTED
    )
    done = stage("dpo_train.py", *run.argv("broken", *flags), nproc=2)
    assert "resuming after step" in done.stdout
    assert distance(run.weights("whole"), run.weights("broken")) < 1e-5


def test_pitfalls_13_a_changed_setting_stops_a_finished_and_an_unfinished_training(run):
    flags = ["--batch_size", "1", "--save_every", "2"]
    interrupt(run, run.argv("broken", *flags), signal.SIGTERM, after=3)
    with pytest.raises(SystemExit, match=r"--beta: was \[0.1\], is \[0.2\]"):
        run("broken", *flags, "--beta", "0.2")


# ---- Settings and refusals ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            "--loss_type hinge --label_smoothing 0.1",
            "--label_smoothing has no effect with --loss_type hinge",
        ),
        ("--loss_type robust", "--loss_type robust needs --label_smoothing"),
        ("--loss_type ipo --length_coef 0.1", "--length_coef has no effect with --loss_type ipo"),
        ("--eval_every 2", "--eval_every has no effect without --eval_pairs"),
        ("--run_name mine", "--run_name has no effect without --report_to"),
        ("--steps_before 3", "--steps_before has no effect without --report_to"),
        ("--cpu_offload", "--cpu_offload has no effect without a GPU"),
        ("--shard_size 2", "has no effect with one rank"),
        ("--batch_size 0", "is not a whole number in"),
        ("--report_to trackio", "--report_to trackio"),
        ("--pairs none.jsonl", "none.jsonl: no such file"),
        ("--model nowhere/at/all", "nowhere/at/all: no such file or folder"),
    ],
)
def test_pitfalls_25_a_flag_without_effect_is_an_error(run, flags, says):
    assert says in run.fails(*flags.split())


def test_packing_that_would_be_wrong_is_refused(run):
    causal_lm(run.folder / "model", "gemma2", tie=True)
    assert "soft-caps its attention" in run.fails("--packing", "prefix")


@pytest.mark.parametrize(
    "flags",
    [
        "--loss_type ipo",
        "--loss_type hinge",
        "--loss_type robust --label_smoothing 0.1",
        "--nll_coef 0.2 --length_coef 0.01",
        "--beta 0.1 0.5 --num_train_epochs 2",
    ],
)
def test_every_loss_trains_and_passes_its_own_step_0_check(run, flags):
    out = run("policy", *flags.split())
    assert "policy = reference makes it" in out and all(math.isfinite(r["loss"]) for r in run.log())
    if "--beta" in flags:
        assert [r["beta"] for r in run.log()] == [0.1] * 3 + [0.5] * 3


@pytest.mark.parametrize(
    ("flags", "betas"),
    [
        ("--beta 0.1 0.2 0.3 --iteration 1", [0.1]),
        ("--beta 0.1 0.2 0.3 --iteration 3", [0.3]),
        ("--beta 0.1 0.2 0.3 --iteration 9", [0.3]),
        ("--beta 0.1 0.2 0.3 --iteration 2 --num_train_epochs 2", [0.3, 0.3]),
        ("--beta 0.1 0.2 0.3 --iteration 1 --num_train_epochs 2", [0.1, 0.2]),
        ("--beta 0.1 --iteration 7 --num_train_epochs 2", [0.1, 0.1]),
    ],
)
def test_beta_is_a_list_over_the_epochs_of_all_iterations(flags, betas):
    """As in TRL's online DPO; the last value holds for all later epochs."""
    files = ["--model", "m", "--pairs", "p", "--output", "o"]
    args = dpo_train.arguments().parse_args([*files, *flags.split()])
    assert betas_of_epochs(args) == betas


def test_a_beta_of_0_in_this_iteration_trains_nothing_whatever_the_others_are(run):
    said = run.fails("--beta", "0.1", "0", "--iteration", "2")
    assert "--beta 0 trains nothing" in said
    run("policy", "--beta", "0.1", "0", "--iteration", "1")


def test_a_reference_that_reads_fewer_tokens_is_refused_with_its_limit(run):
    causal_lm(run.folder / "short", tie=True, max_position_embeddings=16)
    longest = max(
        len(row["prompt_token_ids"])
        + max(len(row["chosen_token_ids"]), len(row["rejected_token_ids"]))
        for row in run.rows
    )
    said = run.fails("--ref_model", run.folder / "short")
    assert f"reads 16 tokens, and the longest prompt with its answer has {longest}" in said
    run("policy", "--ref_model", run.folder / "short", "--max_length", "16")


def test_two_iterations_with_one_beta_are_the_same_training(run):
    """--iteration says which beta, and nothing else: only the beta in use tells two runs apart."""
    run("policy", "--iteration", "1")
    assert "already done" in run("policy", "--iteration", "2", "--beta", "0.1", "0.1")
    assert "--beta: was [0.1], is [0.2]" in run.fails_at(
        "policy", "--iteration", "2", "--beta", "0.1", "0.2"
    )
    run("second", "--iteration", "2", "--beta", "0.1", "0.2")
    assert {row["beta"] for row in run.log("second")} == {0.2}
    meta = json.loads((run.folder / "second.meta.json").read_text())
    assert meta["arguments"]["beta"] == [0.2]


def test_a_run_without_flags_has_the_settings_that_the_help_names(run, monkeypatch):
    """128 pairs a step at 5e-7, one epoch at beta 0.1, as OpenRLHF: 130 pairs are two steps."""
    write(run.pairs, make_pairs(run.folder / "model", run.model, n=130, longest=3))
    argv = run.argv("policy")
    monkeypatch.setattr(run, "argv", lambda *_: argv[: argv.index("--learning_rate")])
    run("policy")
    steps = run.log()
    assert [row["pairs"] for row in steps] == [128, 2]
    assert [row["learning_rate"] for row in steps] == [5e-7, 5e-7]  # one is warm-up, one the top
    assert [row["beta"] for row in steps] == [0.1, 0.1]
    args = dpo_train.arguments().parse_args(argv[: argv.index("--learning_rate")])
    assert (args.max_grad_norm, args.weight_decay, args.adam_betas) == (1.0, 0.0, [0.9, 0.95])
    assert (args.warmup_ratio, args.lr_scheduler, args.loss_type) == (0.03, "cosine", "sigmoid")


def test_pitfalls_39_a_small_batch_at_the_default_rate_gets_a_message(run):
    assert "the rate was tuned for 128 pairs per step" in run(
        "policy", "--learning_rate", "5e-7", "--batch_size", "32"
    )


@pytest.mark.parametrize(
    ("pairs", "steps", "batch_size", "says"),
    [
        (5, 1, 8, "the 5 pairs are fewer than one batch (--batch_size 8): 1 step is made"),
        (5, 3, 8, "fewer than one batch (--batch_size 8): 3 steps are made"),  # of three epochs
        (8, 1, 8, "only 1 step is made of 8 pairs (--batch_size 8)"),
        (9, 2, 8, "only 2 steps are made of 9 pairs"),
        (17, 3, 8, None),
    ],
)
def test_a_warning_where_the_pairs_make_so_few_steps(pairs, steps, batch_size, says):
    warning = few_steps(pairs, steps, batch_size)
    assert warning is None if says is None else says in warning


def test_too_few_pairs_are_said_and_recorded(run):
    """24 pairs, in one batch of 24 and in six of 4."""

    def warnings(name):
        return json.loads((run.folder / f"{name}.meta.json").read_text())["warnings"]

    printed = run("few", "--batch_size", "24")
    assert warnings("few") == [few_steps(24, 1, 24)]
    assert f"warning: {warnings('few')[0]}." in printed
    run("twice", "--batch_size", "24", "--num_train_epochs", "2")
    assert warnings("twice") == [few_steps(24, 2, 24)]
    assert "warning" not in run("enough", "--batch_size", "4") and warnings("enough") == []


def test_pitfalls_38_the_share_of_fallen_chosen_logprobs_is_reported(run):
    run("policy")
    assert (
        all(0 <= row["logps/chosen_fell"] <= 1 for row in run.log())
        and run.log()[0]["logps/chosen_fell"] == 0
    )


def test_nan_stops_with_the_step_and_the_pairs(run):
    """Weights that overflow: no update happens, the pairs are named, and no policy is written."""
    assert "not finite" in run.fails("--learning_rate", "1", "--weight_decay", "1e30")
    assert not (run.folder / "failed").exists()


def test_another_tokenizers_ids_are_refused(run):
    write(run.pairs, [{**row, "chosen_token_ids": [400]} for row in run.rows])
    assert "pairs.jsonl:1: a token id outside 0 … 306" in run.fails()


def test_the_schedule():
    args = SimpleNamespace(learning_rate=1.0, warmup_ratio=0.1, lr_scheduler="cosine")
    rates = [learning_rate(s, 100, args) for s in range(100)]
    assert (
        rates[0] == pytest.approx(0.1)
        and rates[9] == rates[10] == 1.0
        and rates[99] == pytest.approx(0.1)
    )
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, 1, args) == 1.0
    args.lr_scheduler = "constant"
    assert learning_rate(50, 100, args) == learning_rate(99, 100, args) == 1.0


def test_cost_is_what_collate_lays_out():
    pair = {"prompt": np.arange(5), "chosen": np.arange(3), "rejected": np.arange(7)}
    for packing in ("prefix", "padded"):
        assert collate([pair], packing, "cpu")["inputs"]["input_ids"].numel() == cost(pair, packing)
