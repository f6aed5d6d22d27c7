"""Hostile inputs and machines, one by one: nothing of the user's is destroyed, nothing is misread
in silence, and what is refused is refused in one line. test_fuzz.py looks for more of the kind.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import dpo_train
import make_pairs
import models
import score
from arguments import parse
from candidates import merge_by_id
from conftest import ROOT
from records import NEW_PROMPT, PROMPT, SCORED, Stop, count_rows, dump, read_jsonl
from small_models import causal_lm
from stage import run
from test_dpo_train import make_pairs as pair_rows_of
from test_fuzz import PROMPTS, candidate, pair_rows, scored_rows
from test_records import fill, new_stage, prompts, write
from training import fsdp
from training.log import TrainLog, lines_of_steps

sys.path.insert(0, str(ROOT / "tools"))
import prepare_prompts


@pytest.fixture
def call(monkeypatch):
    """call(main, *arguments): a stage in this process; SystemExit where it stops."""

    def run_stage(main, *arguments):
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        monkeypatch.setattr(sys, "argv", ["stage.py", *map(str, arguments)])
        try:
            run(main)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    return run_stage


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "model"
    causal_lm(folder, tie=True)
    return folder


def train(call, model, pairs, output, *flags):
    flags = ["--learning_rate", 1e-3, "--batch_size", 8, *flags]
    call(dpo_train.main, "--model", model, "--pairs", pairs, "--output", output, *flags)


# ---- nothing of the user's is destroyed --------------------------------------------------------


def test_pitfalls_45_foreign_files_beside_an_output_survive(tmp_path, call, model):
    """The user's pairs are in a file called train.jsonl, and another policy is trained beside."""
    pairs = write(tmp_path / "train.jsonl", *pair_rows())
    before = pairs.read_bytes()
    train(call, model, pairs, tmp_path / "policy")
    train(call, model, pairs, tmp_path / "second", "--seed", 1)
    assert pairs.read_bytes() == before
    logs = sorted(path.name for path in tmp_path.glob("*.train.jsonl"))
    assert logs == ["policy.train.jsonl", "second.train.jsonl"]


def test_a_users_files_that_look_like_ours_survive(tmp_path):
    path = prompts(tmp_path / "p.jsonl")
    for suffix in (".old", ".tmp"):
        write(tmp_path / f"out.jsonl{suffix}", "precious\n")
    fill(new_stage(tmp_path, seed=1), path)
    fill(new_stage(tmp_path, seed=2, overwrite=True), path)
    for suffix in (".old", ".tmp"):
        assert (tmp_path / f"out.jsonl{suffix}").read_text() == "precious\n"


def test_a_users_folder_called_parts_survives(tmp_path):
    prompts(tmp_path / "p.jsonl")
    (tmp_path / "out.jsonl.parts").mkdir()
    write(tmp_path / "out.jsonl.parts/notes.txt", "precious\n")
    for overwrite in (False, True):
        with pytest.raises(Stop, match="holds notes.txt, but no key.json"):
            new_stage(tmp_path, seed=1, overwrite=overwrite)
    assert (tmp_path / "out.jsonl.parts/notes.txt").exists()


def test_overwrite_replaces_only_what_a_stage_has_made(tmp_path):
    prompts(tmp_path / "p.jsonl")
    write(tmp_path / "out.jsonl", "precious\n")
    with pytest.raises(Stop, match="not made by this stage"):
        new_stage(tmp_path, seed=1, overwrite=True)
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_an_output_that_is_an_input_is_refused(tmp_path, call, model, overwrite):
    scored = write(tmp_path / "s.jsonl", *scored_rows())
    before = scored.read_bytes()
    with pytest.raises(Stop, match="would change the input --scored"):
        call(make_pairs.main, "--scored", scored, "--output", scored, *overwrite)
    with pytest.raises(Stop, match="would change the input --model"):  # within the input
        train(call, model, scored, model / "policy", *overwrite)
    pairs = write(tmp_path / "out/pairs.jsonl", *pair_rows())
    with pytest.raises(Stop, match="would change the input --pairs"):  # around the input
        train(call, model, pairs, tmp_path / "out", *overwrite)
    assert scored.read_bytes() == before and pairs.exists()


def test_two_outputs_are_not_one_file(tmp_path, call):
    data = write(tmp_path / "d.jsonl", *PROMPTS)
    arguments = ["--dataset", data, "--output", tmp_path / "x", "--heldout", 1]
    with pytest.raises(Stop, match="get in each other.s way"):
        call(prepare_prompts.main, *arguments, "--heldout_output", tmp_path / "." / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("output", ["", "/", ".", "..", "x" * 250])
def test_an_output_that_is_no_name_is_refused(tmp_path, call, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    scored = write(tmp_path / "s.jsonl", *scored_rows())
    with pytest.raises(Stop, match="--output"):
        call(make_pairs.main, "--scored", scored, "--output", output)
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]


# ---- nothing is misread in silence -------------------------------------------------------------


@pytest.mark.parametrize("ids", [[6.9], [True], ["7"], [-1], [2**31], [None], 7, "7"])
def test_pitfalls_47_token_ids_are_whole_numbers(tmp_path, ids):
    row = scored_rows()[0]
    row["candidates"][1]["token_ids"] = ids
    with pytest.raises(Stop, match=r's.jsonl:1: candidates\[1\]: key "token_ids" must be a list'):
        count_rows(write(tmp_path / "s.jsonl", row), SCORED)


@pytest.mark.parametrize(
    "content", [None, 7, [{"type": "text", "text": "hi"}], {"text": "hi"}, True]
)
def test_the_content_of_a_turn_is_text(tmp_path, content):
    row = {"id": "a", "prompt": [{"role": "user", "content": content}]}
    with pytest.raises(Stop, match='p.jsonl:1: key "prompt" must be a string, or a conversation'):
        count_rows(write(tmp_path / "p.jsonl", row), PROMPT)


@pytest.mark.parametrize("where", ["row", "turn"])
def test_tools_are_refused_and_not_dropped(tmp_path, call, where):
    turn = {"role": "user", "content": "what is the time?"}
    row = {"id": "a", "prompt": [turn]}
    if where == "row":
        row["tools"] = [{"name": "clock"}]
    else:
        turn["tool_calls"] = [{"name": "clock"}]
    path = write(tmp_path / "p.jsonl", row)
    with pytest.raises(Stop, match="p.jsonl:1: .*tool"):
        count_rows(path, PROMPT)
    with pytest.raises(Stop, match="p.jsonl: row 1.*tool"):
        call(prepare_prompts.main, "--dataset", path, "--output", tmp_path / "out.jsonl")


@pytest.mark.parametrize("damage", ["a row removed", "a row doubled", "a byte flipped", "cut off"])
def test_pitfalls_50_a_damaged_part_is_done_again(tmp_path, damage):
    path = prompts(tmp_path / "p.jsonl")
    fill(new_stage(tmp_path, seed=1), path, stop_after=2)
    part = tmp_path / "out.jsonl.parts/000001.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    if damage == "a row removed":
        lines.pop()
    elif damage == "a row doubled":
        lines.append(lines[-1])
    elif damage == "a byte flipped":
        lines[5] = lines[5].replace(b"question", b"quEstion")
    else:
        lines[-1] = lines[-1][:9]
    part.write_bytes(b"".join(lines))
    fill(new_stage(tmp_path, seed=1), path)
    assert (tmp_path / "out.jsonl").read_bytes() == path.read_bytes()


def test_a_part_damaged_after_the_start_is_never_joined(tmp_path):
    path = prompts(tmp_path / "p.jsonl")
    stage = new_stage(tmp_path, seed=1)
    fill(stage, path, stop_after=2)
    for index, rows in stage.todo(read_jsonl(path, PROMPT)):
        stage.write_part(index, rows, {"rows": {"in": 1, "out": 1, "dropped": {}}})
    (tmp_path / "out.jsonl.parts/000000.jsonl").write_text("")
    with pytest.raises(Stop, match="000000.jsonl: is damaged"):
        stage.join(150)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", ["out.jsonl.meta.json", "out.jsonl.parts/key.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"key": 7}'])
def test_a_damaged_record_of_a_run_is_named(tmp_path, name, content):
    path = prompts(tmp_path / "p.jsonl")
    fill(new_stage(tmp_path, seed=1), path, stop_after=None if "meta" in name else 1)
    (tmp_path / name).write_text(content)
    with pytest.raises(Stop, match=f"{name}.* Remove "):
        new_stage(tmp_path, seed=1)


def test_a_meta_file_that_was_changed_by_hand_is_named(tmp_path):
    path = prompts(tmp_path / "p.jsonl")
    fill(new_stage(tmp_path, seed=1), path)
    meta = tmp_path / "out.jsonl.meta.json"
    meta.write_text(meta.read_text().replace('"seed": 1', '"seed": 2'))
    with pytest.raises(Stop, match="meta.json: is damaged: it is not what the stage wrote"):
        new_stage(tmp_path, seed=2)


def test_merged_rows_have_the_keys_of_all_files(tmp_path):
    first, second = scored_rows()[:1], scored_rows()[:1]
    first[0]["note"] = "first"
    second[0] |= {"note": "second", "source": "kept"}
    files = [write(tmp_path / "1.jsonl", *first), write(tmp_path / "2.jsonl", *second)]
    (merged,) = merge_by_id(files, SCORED).rows
    assert (merged["note"], merged["source"]) == ("first", "kept")
    assert len(merged["candidates"]) == 6


def test_a_rows_own_keys_are_never_overwritten(tmp_path, call):
    """A preference data set, used as prompts, has a "chosen" already."""
    scored = write(tmp_path / "s.jsonl", scored_rows()[0] | {"chosen": "the user's own"})
    with pytest.raises(Stop, match='s.jsonl:1: key "chosen" must be left out .*rename yours'):
        call(make_pairs.main, "--scored", scored, "--output", tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("content", ["{", '{"eos_token_id": "x"}', '{"eos_token_id": [2, 6.9]}'])
def test_a_damaged_generation_config_does_not_count_as_absent(tmp_path, call, content):
    causal_lm(tmp_path / "model", tie=True)
    (tmp_path / "model/generation_config.json").write_text(content)
    pairs = write(tmp_path / "pairs.jsonl", *pair_rows())
    with pytest.raises(Stop, match="model: (its generation_config.json|eos_token_id)"):
        train(call, tmp_path / "model", pairs, tmp_path / "policy")


@pytest.mark.parametrize(
    "damage", ["a row removed", "a row doubled", "a digit", "a byte", "emptied", "lost", "a folder"]
)
@pytest.mark.parametrize("name", ["train.jsonl", "train.sums"])
def test_a_damaged_log_is_not_resumed_and_the_remedy_works(tmp_path, name, damage):
    """--overwrite would be none: the parts of a run with the same settings are kept."""
    log = TrainLog(tmp_path / "policy.parts/train.jsonl", 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 0.5})
    assert len(lines_of_steps(log.path, 2)) == 2

    path = log.path.with_name(name)
    lines = path.read_bytes().splitlines(keepends=True)
    path.unlink()
    if damage == "a row removed":
        path.write_bytes(lines[0] + lines[2])
    elif damage == "a row doubled":
        path.write_bytes(lines[0] + b"".join(lines))
    elif damage == "a digit":
        path.write_bytes(lines[0] + lines[1].translate(bytes.maketrans(b"56", b"65")))
    elif damage == "a byte":
        path.write_bytes(lines[0] + b"\xff" + lines[1])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "a folder":
        path.mkdir()
    with pytest.raises(Stop, match="[01] of the 2 steps.* remove .*policy.parts to begin again"):
        TrainLog(log.path, 2)


# ---- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["min_margin", "length_penalty"])
@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "1_0", "x", ""])
def test_numbers_are_finite(tmp_path, call, flag, value):
    scored = write(tmp_path / "s.jsonl", *scored_rows())
    with pytest.raises(Stop, match=f"--{flag}: '{value}' is not a number in"):
        call(make_pairs.main, "--scored", scored, "--output", tmp_path / "p", f"--{flag}={value}")


@pytest.mark.parametrize(
    "flags",
    [
        "--learning_rate nan",
        "--learning_rate=-1e-6",
        "--beta 0",
        "--beta 0.1 0 --loss_type ipo",
        "--beta nan",
        "--label_smoothing 0.5",
        "--warmup_ratio 2",
        "--max_grad_norm nan",
        "--adam_betas 0.9 1",
        "--nll_coef inf",
        "--seed 08x",
    ],
)
def test_the_trainer_takes_no_number_that_makes_no_sense(tmp_path, call, model, flags):
    pairs = write(tmp_path / "pairs.jsonl", *pair_rows())
    with pytest.raises(Stop, match="is not a (whole )?number in|trains nothing|target is"):
        train(call, model, pairs, tmp_path / "policy", *flags.split())


def test_pitfalls_48_weights_that_are_not_finite_are_not_saved(tmp_path, model):
    weights = models.load_model(
        dpo_train.AutoModelForCausalLM, str(model), torch.float32, "eager"
    ).state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].clone()
    weights[name][3, 5] = float("nan")
    with pytest.raises(Stop, match=f"not saved: after training {name} is not finite"):
        fsdp.export(weights, str(model), None, models.load_tokenizer(str(model)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_clock_that_stands_still_divides_nothing_by_zero(tmp_path, call, model, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    train(call, model, write(tmp_path / "pairs.jsonl", *pair_rows()), tmp_path / "policy")
    (tmp_path / "f.py").write_text("def f(prompt, response, meta):\n    return 1\n")
    scored = write(tmp_path / "s.jsonl", *scored_rows())
    flags = ["--reward_fn", f"{tmp_path / 'f.py'}:f", "--output", tmp_path / "out.jsonl"]
    call(score.main, "--candidates", scored, *flags)


# ---- rewards, logs, the disk, the terminal -----------------------------------------------------


@pytest.mark.parametrize("code", ["import sys; sys.exit(0)", "raise SystemExit"])
@pytest.mark.parametrize("when", ["on import", "on a call"])
def test_a_reward_function_that_exits_is_an_error(tmp_path, call, code, when):
    body = f"{code}\n" if when == "on import" else ""
    body += f"def f(prompt, response, meta):\n    {code.replace('; ', chr(10) + '    ')}\n"
    (tmp_path / "f.py").write_text(body)
    scored = write(tmp_path / "s.jsonl", *scored_rows())
    flags = ["--reward_fn", f"{tmp_path / 'f.py'}:f", "--output", tmp_path / "out.jsonl"]
    with pytest.raises(Stop, match=r"f.py:f.* called exit"):
        call(score.main, "--candidates", scored, *flags)
    assert not (tmp_path / "out.jsonl").exists()


def test_ids_that_a_reference_does_not_know_are_named(tmp_path, call, model):
    row = scored_rows()[0] | {"candidates": [candidate("plum", [80, 307], 1.0)]}
    flags = ["--ref_model", model, "--output", tmp_path / "out.jsonl"]
    with pytest.raises(Stop, match='id "p0", candidate 0: a token id beyond the 307'):
        call(score.main, "--candidates", write(tmp_path / "s.jsonl", row), *flags)


def test_a_full_disk_during_the_export_is_one_line(tmp_path, model):
    """safetensors makes an error of its own of the kernel's; a limit on the size of files stands
    for the full disk.
    """
    pairs = write(tmp_path / "pairs.jsonl", *pair_rows())
    command = [sys.executable, ROOT / "dpo_train.py", "--model", model, "--pairs", pairs]
    command += ["--output", tmp_path / "policy", "--learning_rate", "1e-3"]

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 1, done.stderr
    assert f"error: {tmp_path}/policy: no space left" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "policy").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "policy/model.safetensors").exists()


def test_a_terminal_that_is_not_utf8_shows_escapes(tmp_path):
    folder = tmp_path / "größe"
    scored = write(folder / "s.jsonl", *scored_rows())
    command = [sys.executable, ROOT / "make_pairs.py", "--scored", scored]
    command += ["--output", folder / "pairs.jsonl"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"gr\\xf6\\xdfe" in done.stdout and json.loads(dump(scored_rows()[0]))


def test_rows_of_pairs_made_elsewhere_are_trained(tmp_path, call, model):
    """The rule has two sides: what is right is accepted."""
    loaded = models.load_model(dpo_train.AutoModelForCausalLM, str(model), torch.float32, "eager")
    rows = pair_rows_of(model, loaded)
    train(call, model, write(tmp_path / "pairs.jsonl", *rows), tmp_path / "policy")
    assert (tmp_path / "policy/model.safetensors").exists()


# ---- found by an attacker ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"id": "a", "prompt": "first", "prompt": "second"}', 'key "prompt" stands there twice'),
        ('{"id": "a", "prompt": "x", "iteration": 0}', "iteration"),
        ('{"id": "a", "prompt": "x", "chosen_index": false}', "chosen_index"),
        ("   ", "is blank"),
    ],
)
def test_a_row_that_two_readers_would_read_in_two_ways_is_refused(tmp_path, line, says):
    path = tmp_path / "p.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(Stop, match=f"p.jsonl:1.*{says}"):
        list(read_jsonl(path, NEW_PROMPT))


def test_a_mark_of_utf8_at_the_beginning_is_no_fault(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "a", "prompt": "x"}\n')
    assert list(read_jsonl(path, NEW_PROMPT)) == [{"id": "a", "prompt": "x"}]


def test_an_empty_word_is_no_flag_that_was_left_out():
    """As "$UNSET" gives it: training would have taken the policy as its own reference."""
    command = ["--model", "m", "--pairs", "p", "--output", "o", "--ref_model", ""]
    with pytest.raises(Stop, match="--ref_model is given an empty word"):
        parse(dpo_train.arguments(), command)


def test_a_folder_that_is_no_run_is_not_written_into(tmp_path):
    """Its config.json may be a model's: to obey "remove it" would destroy that."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    environment = os.environ | {"RUN": str(tmp_path / "model"), "ITERS": "0"}
    done = subprocess.run(
        ["bash", ROOT / "iterate.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "is no run, and holds" in done.stderr
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "setting",
    [
        {"GENERATE_ARGS": "--engine_args hf_token=hf_secret"},
        {"JUDGE": "m", "JUDGE_SERVER_ARGS": "--hf-token hf_secret"},
    ],
)
def test_a_token_in_a_setting_is_refused_before_it_is_written(tmp_path, setting):
    environment = os.environ | {"RUN": str(tmp_path / "run"), "ITERS": "0"} | setting
    done = subprocess.run(
        ["bash", ROOT / "iterate.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "put it into HF_TOKEN" in done.stderr
    assert not (tmp_path / "run").exists()
