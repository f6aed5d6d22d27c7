"""Held-out pairs: make_pairs.py holds them out, dpo_train.py --eval_pairs evaluates on them."""

import json
import math
import signal
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import dpo_train
import make_pairs
from records import dump
from test_dpo_train import Run, plain_logprob, write
from test_dpo_train import make_pairs as pairs_of
from training.log import is_evaluation


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    return Run(tmp_path, capsys, monkeypatch)


@pytest.fixture
def held_out(run):
    """Pairs beside those of `run`, which trains 24 by 8: three steps."""
    rows = pairs_of(run.folder / "model", run.model, n=10, seed=1)
    for row in rows:
        row["id"] = "held out " + row["id"]
    return write(run.folder / "held_out.jsonl", rows)


def evaluations(run, output="*"):
    return [row for row in run.log(output) if is_evaluation(row)]


def with_prompt(row, token_ids):
    """The same answers to another prompt, for which nobody has computed their log-probs."""
    row = {key: value for key, value in row.items() if not key.endswith("_logprob")}
    return row | {"prompt_token_ids": token_ids}


def without_speed(rows):
    return [row | {"tokens_per_second": 0} for row in rows]


def test_before_training_the_loss_is_ln_2_and_training_lowers_it(run):
    """The held-out pairs are the trained ones with a token more in each prompt."""
    rows = [with_prompt(row, [*row["prompt_token_ids"], 7]) for row in run.rows]
    path = write(run.folder / "same.jsonl", rows)
    run("policy", "--eval_pairs", path, "--num_train_epochs", "4", "--lr_scheduler", "constant")
    first, last = evaluations(run)
    assert first["step"] == 0 and last["step"] == 12 and last["epoch"] == 4
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["eval_rewards/chosen"] == first["eval_rewards/margins"] == 0
    assert last["eval_loss"] < 0.5 * first["eval_loss"] and last["eval_rewards/accuracies"] == 1
    margin = last["eval_rewards/chosen"] - last["eval_rewards/rejected"]
    assert last["eval_rewards/margins"] == pytest.approx(margin, abs=1e-5) and margin > 0


def test_after_training_the_numbers_are_those_of_a_plain_loop(run, held_out):
    """The saved policy's own log-probs, one token at a time, against those of --model."""
    run("policy", "--eval_pairs", held_out, "--beta", "0.3")
    policy = AutoModelForCausalLM.from_pretrained(run.folder / "policy")
    losses, chosen, rejected, accuracies = [], [], [], []
    for row in map(json.loads, open(held_out)):
        rewards = []
        for name in ("chosen", "rejected"):
            prompt, answer = row["prompt_token_ids"], row[f"{name}_token_ids"]
            after = plain_logprob(policy, prompt, answer)
            rewards.append(0.3 * (after - plain_logprob(run.model, prompt, answer)).item())
        chosen.append(rewards[0])
        rejected.append(rewards[1])
        losses.append(math.log1p(math.exp(rewards[1] - rewards[0])))
        accuracies.append(rewards[0] > rewards[1])
    last = evaluations(run)[-1]
    expected = {"loss": losses, "rewards/chosen": chosen, "rewards/rejected": rejected}
    expected["rewards/accuracies"] = accuracies
    for name, values in expected.items():
        mean = sum(values) / len(values)
        assert last[f"eval_{name}"] == pytest.approx(mean, abs=1e-4), name


def test_an_evaluation_changes_no_weight_and_stands_behind_its_step(run, held_out):
    """Every second step of six, and after the last."""
    flags = ["--num_train_epochs", "2"]
    run("without", *flags)
    run("with", *flags, "--eval_pairs", held_out, "--eval_every", "2")
    a, b = (run.folder / name / "model.safetensors" for name in ("without", "with"))
    assert a.read_bytes() == b.read_bytes()
    steps = [row for row in run.log("with") if not is_evaluation(row)]
    assert without_speed(steps) == without_speed(run.log("without"))
    order = [(row["step"], is_evaluation(row)) for row in run.log("with")]
    evaluated = [(step, True) for step in (0, 2, 4, 6)]
    assert order == sorted(evaluated + [(step, False) for step in range(1, 7)])
    assert [row["epoch"] for row in evaluations(run, "with")] == [0, 2 / 3, 4 / 3, 2]


def test_resumed_equals_uninterrupted_bit_for_bit(run, held_out):
    """Stopped behind a step that is evaluated, killed behind a checkpoint, and then the end."""
    flags = ["--num_train_epochs", "4", "--save_every", "3"]
    flags += ["--eval_pairs", held_out, "--eval_every", "2"]
    run("whole", *flags)
    training_step, numbers = dpo_train.training_step, []

    def disturbed(*arguments):
        numbers.append(1)
        if len(numbers) == 4:  # in step 4, which is evaluated
            signal.raise_signal(signal.SIGTERM)
        if len(numbers) == 8:  # steps 5, 6 and the evaluation of 6 are in the log
            raise KeyboardInterrupt
        return training_step(*arguments)

    run.monkeypatch.setattr(dpo_train, "training_step", disturbed)
    with pytest.raises(SystemExit):
        run("broken", *flags)
    assert "saved after step 4 of 12" in run.capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        run("broken", *flags)
    run("broken", *flags)
    a, b = (run.folder / name / "model.safetensors" for name in ("whole", "broken"))
    assert a.read_bytes() == b.read_bytes()
    assert without_speed(run.log("whole")) == without_speed(run.log("broken"))


@pytest.mark.parametrize("when", ["the last step", "the last evaluation"])
def test_a_signal_at_the_very_end_leaves_a_checkpoint(run, held_out, when):
    """Whoever sent it may kill the process within seconds, and the export may take minutes."""
    flags = ["--eval_pairs", held_out]
    run("whole", *flags)
    name = "training_step" if when == "the last step" else "evaluate"
    function, calls = getattr(dpo_train, name), []

    def disturbed(*arguments):
        calls.append(1)
        if len(calls) == (3 if name == "training_step" else 2):
            signal.raise_signal(signal.SIGTERM)
        return function(*arguments)

    run.monkeypatch.setattr(dpo_train, name, disturbed)
    with pytest.raises(SystemExit) as end:
        run("broken", *flags)
    assert end.value.code == dpo_train.INTERRUPTED
    assert "saved after step 3 of 3" in run.capsys.readouterr().out
    run("broken", *flags)
    assert without_speed(run.log("whole")) == without_speed(run.log("broken"))
    a, b = (run.folder / name / "model.safetensors" for name in ("whole", "broken"))
    assert a.read_bytes() == b.read_bytes()


def test_a_resumed_run_computes_no_reference_again(run, held_out):
    """It is kept with that of the trained pairs, and a checkpoint's weights are not --model's."""
    flags = ["--eval_pairs", held_out, "--save_every", "1"]
    run("whole", *flags)
    train, passes = dpo_train.train, []
    all_logprobs = dpo_train.all_logprobs

    def counting(policy, pairs, *others):
        if len(pairs) > 1:
            passes.append(len(pairs))
        return all_logprobs(policy, pairs, *others)

    def killed(*_):
        raise KeyboardInterrupt

    run.monkeypatch.setattr(dpo_train, "all_logprobs", counting)
    run.monkeypatch.setattr(dpo_train, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run("broken", *flags)
    assert passes == [34]
    run.monkeypatch.setattr(dpo_train, "train", train)
    run("broken", *flags)
    assert passes == [34] * 3  # the second and the third are the evaluations
    assert without_speed(run.log("whole")) == without_speed(run.log("broken"))


def test_two_ranks_evaluate_as_one(run, held_out, stage):
    flags = ["--learning_rate", "1e-4", "--tokens_per_batch", "60", "--eval_every", "1"]
    flags += ["--eval_pairs", held_out]
    run("one", *flags)
    stage("dpo_train.py", *run.argv("two", *flags), nproc=2)
    assert len(evaluations(run, "two")) == 4
    for a, b in zip(run.log("one"), run.log("two"), strict=True):
        a.pop("tokens_per_second", None)
        assert {name: b[name] for name in a} == pytest.approx(a, rel=1e-4, abs=1e-5)


def test_another_reference_is_the_held_out_pairs_reference_too(run, held_out):
    run("other")
    run("policy", "--ref_model", run.folder / "other", "--eval_pairs", held_out)
    first, *_ = evaluations(run)
    assert abs(first["eval_rewards/chosen"]) > 1e-4


def test_a_pair_that_is_also_trained_on_is_refused_with_its_place(run, held_out):
    rows = [json.loads(line) for line in open(held_out)]
    write(held_out, [*rows[:3], run.rows[5], *rows[3:]])
    said = run.fails("--eval_pairs", held_out)
    assert "held_out.jsonl:4: the same pair is trained on, in" in said and "pairs.jsonl:6" in said
    # Other answers to a trained prompt are another pair.
    write(held_out, [{**row, "id": run.rows[0]["id"]} for row in rows])
    run("policy", "--eval_pairs", held_out)


@pytest.mark.parametrize("id", ["another", 0, None, ["a"]], ids=str)
def test_a_pair_is_known_by_its_tokens_and_not_by_its_id(run, held_out, id):
    """Ids of other files mean other prompts: 0, 1, … are everywhere. Some have none."""
    write(held_out, [row | {"id": id} for row in run.rows[7:9]])
    assert "pairs.jsonl:8" in run.fails("--eval_pairs", held_out)
    write(held_out, [with_prompt(row, [5, 5, 5, 7]) for row in run.rows[:3]])
    run("policy", "--eval_pairs", held_out)


def test_pairs_that_cannot_be_evaluated_are_counted(run, held_out):
    run("policy", "--eval_pairs", held_out, "--max_length", "20")
    meta = json.loads((run.folder / "policy.meta.json").read_text())
    balance = meta["counts"]["eval_rows"]
    assert balance["in"] == 10 and balance["dropped"] == {"too_long": 10 - balance["out"]}
    assert 0 < balance["out"] < 10


def test_other_held_out_pairs_are_another_run(run, held_out):
    run("policy", "--eval_pairs", held_out)
    write(held_out, list(map(json.loads, open(held_out)))[:5])
    assert "--eval_pairs: content changed" in run.fails_at("policy", "--eval_pairs", held_out)


def test_log_probs_that_are_not_finite_stop_the_training(run, held_out):
    evaluate = dpo_train.evaluate

    def broken(policy, pairs, steps_done, *others):
        if steps_done:
            with torch.no_grad():
                for weight in policy.parameters():
                    weight.mul_(math.nan)
        evaluate(policy, pairs, steps_done, *others)

    run.monkeypatch.setattr(dpo_train, "evaluate", broken)
    assert "step 3: log-probs of held-out pairs are not finite" in run.fails(
        "--eval_pairs", held_out
    )


# ---- make_pairs.py holds them out --------------------------------------------------------------


def scored_rows(prompts):
    rows = []
    for i in range(prompts):
        candidates = []
        for k in range(4):
            candidate = {"text": f"answer {k}", "token_ids": [5 + k], "logprob": -1.0}
            candidate |= {"finish_reason": "stop", "temperature": 1.0, "model": "m"}
            candidates.append(candidate | {"rewards": {"rm": float(k)}, "reward": float(k)})
        row = {"id": f"p{i}", "prompt": f"question {i}", "prompt_token_ids": [1, 2]}
        rows.append(row | {"candidates": candidates})
    return rows


@pytest.fixture
def pair(tmp_path, monkeypatch, capsys):
    """pair(flags…) -> (pairs, held-out pairs, metadata); fails(flags…) -> the message."""
    (tmp_path / "scored.jsonl").write_text("".join(map(dump, scored_rows(200))))
    output, held = tmp_path / "pairs.jsonl", tmp_path / "held_out.jsonl"

    def call(*flags, share="0.1"):
        argv = ["--scored", tmp_path / "scored.jsonl", "--output", output, "--overwrite"]
        if share:
            argv += ["--eval_share", share, "--eval_output", held]
        monkeypatch.setattr(sys, "argv", ["make_pairs.py", *map(str, [*argv, *flags])])
        make_pairs.main()
        trained = [json.loads(line) for line in open(output)]
        held_out = [json.loads(line) for line in open(held)] if share else []
        return trained, held_out, json.loads((tmp_path / "pairs.jsonl.meta.json").read_text())

    call.folder = tmp_path
    return call


def test_all_pairs_of_a_prompt_are_on_one_side_and_all_are_counted(pair):
    everything, _, _ = pair("--pairs_per_prompt", "2", share=None)
    trained, held_out, meta = pair("--pairs_per_prompt", "2")
    assert not {row["id"] for row in trained} & {row["id"] for row in held_out}
    assert sorted(map(dump, trained + held_out)) == sorted(map(dump, everything))
    prompts = len({row["id"] for row in held_out})
    assert 8 <= prompts <= 34 and len(held_out) == 2 * prompts
    dropped = {"held_out": 2 * prompts}
    assert meta["counts"]["pairs"] == {"in": 400, "out": 400 - 2 * prompts, "dropped": dropped}
    assert meta["counts"]["rows"]["dropped"] == {"held_out": prompts}
    assert (pair.folder / "held_out.jsonl.meta.json").exists()


def test_which_are_held_out_follows_from_seed_iteration_and_id(pair):
    def ids(*flags):
        return [row["id"] for row in pair(*flags)[1]]

    first = ids()
    lines = (pair.folder / "scored.jsonl").read_text().splitlines(keepends=True)
    (pair.folder / "scored.jsonl").write_text("".join(reversed(lines)))
    assert ids() == first[::-1]
    assert ids("--iteration", "1") != first[::-1] != ids("--seed", "1")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--eval_share", "0.1"], "--eval_share and --eval_output come together"),
        (["--eval_output", "x"], "--eval_share and --eval_output come together"),
        (["--eval_share", "1", "--eval_output", "x"], "is not a number in (0, 1)"),
    ],
)
def test_flags_without_effect_are_refused(pair, flags, says):
    with pytest.raises(SystemExit) as stop:
        pair(*flags, share=None)
    assert says in str(stop.value)


def test_neither_side_may_be_empty(pair):
    for share in ("0.000001", "0.999999"):
        with pytest.raises(SystemExit, match="pairs are held out, and"):
            pair(share=share)
    assert not (pair.folder / "pairs.jsonl").exists()
    assert not (pair.folder / "held_out.jsonl").exists()


def test_no_foreign_file_is_overwritten(pair):
    held_out = pair.folder / "held_out.jsonl"
    held_out.write_text("mine")
    with pytest.raises(SystemExit, match="was not made together with"):
        pair()
    for taken in ("scored.jsonl", "pairs.jsonl"):
        flags = ["--eval_share", "0.1", "--eval_output", pair.folder / taken]
        with pytest.raises(SystemExit, match="Name another file"):
            pair(*flags, share=None)
    assert held_out.read_text() == "mine"


def test_a_file_that_is_gone_is_named(pair, monkeypatch):
    pair()
    (pair.folder / "held_out.jsonl").unlink()
    argv = [word for word in sys.argv if word != "--overwrite"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="no such file, though .* is done"):
        make_pairs.main()


def test_held_out_pairs_that_were_cut_are_not_taken_for_whole(pair, monkeypatch):
    pair()
    held_out = pair.folder / "held_out.jsonl"
    held_out.write_text(held_out.read_text().partition("\n")[0] + "\n")
    monkeypatch.setattr(sys, "argv", [word for word in sys.argv if word != "--overwrite"])
    with pytest.raises(SystemExit, match="was damaged or edited"):
        make_pairs.main()


def test_held_out_pairs_replace_no_file_of_another_stage(pair, monkeypatch):
    """Nor those of another output, nor what a stage removes when it is done."""
    pair()
    scored = pair.folder / "scored.jsonl"
    for name in ("held_out.jsonl", "pairs.jsonl.parts/held_out.jsonl", "scored.jsonl.meta.json"):
        argv = ["make_pairs.py", "--scored", scored, "--output", pair.folder / "others.jsonl"]
        if name.startswith("pairs"):
            argv[-1] = pair.folder / "pairs.jsonl"
        argv += ["--eval_share", "0.3", "--eval_output", pair.folder / name, "--overwrite"]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        with pytest.raises(SystemExit, match="get in each other's way|was not made together"):
            make_pairs.main()
