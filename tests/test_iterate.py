"""The loop: iterate.sh on a small random model and a python reward, killed, stopped, resumed,
refused.
"""

import fcntl
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from bench.all_settings import ByUrl, Served
from bench.warm_python import WarmPython
from conftest import ROOT
from records import dump
from small_models import causal_lm, tokenizer
from stage import hash_path
from test_judge import Server
from tools import one_prompt

REWARD = (
    "def reward(prompt, response, meta):\n    return response.count('e') - 0.01 * len(response)\n"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, a reward, prompts: what a user brings."""
    folder = tmp_path_factory.mktemp("world")
    causal_lm(folder / "model", tie=True)
    (folder / "reward.py").write_text(REWARD)
    rows = [
        {"id": f"p{i}", "prompt": [{"role": "user", "content": f"name fruit {i}"}]}
        for i in range(60)
    ]
    (folder / "prompts.jsonl").write_text("".join(map(dump, rows[:52])))
    (folder / "heldout.jsonl").write_text("".join(map(dump, rows[52:])))
    with WarmPython(folder):  # stages start in 0.1 s and not in 3
        yield folder


@pytest.fixture(scope="module")
def judge(world, tmp_path_factory):
    """Settings for a tiny chat model that was taught to say "Verdict: A" to everything: position
    bias at its worst. Held-out answers meet that of a user's file.
    """
    folder = tmp_path_factory.mktemp("judge")
    (folder / "prompt.txt").write_text("<{prompt}> A: <{answer_a}> B: <{answer_b}> Which?")
    model, tok, rng = (
        causal_lm(folder / "model", max_position_embeddings=512),
        tokenizer(folder / "model"),
        random.Random(0),
    )
    reply = tok("Verdict: A")["input_ids"] + [tok.eos_token_id]
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for _ in range(80):
        words = [
            "".join(chr(rng.randint(32, 126)) for _ in range(rng.randint(1, 40))) for _ in range(3)
        ]
        ask = [{"role": "user", "content": "<{}> A: <{}> B: <{}> Which?".format(*words)}]
        prompt = tok.apply_chat_template(ask, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        labels = torch.tensor([[-100] * len(prompt) + reply])
        model(torch.tensor([prompt + reply]), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    heldout = map(json.loads, (world / "heldout.jsonl").read_text().splitlines())
    theirs = [row | {"candidates": [{"text": "a plum"}]} for row in heldout]
    (folder / "opponent.jsonl").write_text("".join(map(dump, theirs)))
    return {
        "ITERS": 0,
        "REWARD_FN": "",
        "JUDGE": folder / "model",
        "OPPONENT": folder / "opponent.jsonl",
        "JUDGE_SERVER_ARGS": "--enforce-eager",
        "JUDGE_ARGS": f"--judge_prompt {folder}/prompt.txt --judge_max_tokens 30",
    }


def settings(world, run, **more):
    given = {
        "PYTHON": sys.executable,
        "MODEL": world / "model",
        "REWARD_FN": f"{world}/reward.py:reward",
        "PROMPTS": world / "prompts.jsonl",
        "HELDOUT": world / "heldout.jsonl",
        "RUN": run,
        "ITERS": 1,
        "PROMPTS_PER_ITER": 40,
        "NUM_SAMPLES": 4,
        "EVAL_SAMPLES": 2,
        "NPROC": 1,
        "GENERATE_ARGS": "--max_new_tokens 12 --backend hf",
        "PAIRS_ARGS": "--keep_truncated",
        "TRAIN_ARGS": "--learning_rate 1e-3 --batch_size 2 --save_every 4",
    }
    leaks = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "VLLM_",
    )  # VLLM_: from tests with an engine in this process
    clean = {k: v for k, v in os.environ.items() if not k.startswith(leaks)}
    return clean | {k: str(v) for k, v in (given | more).items()}


def iterate(world, run, timeout=600, cwd=None, **more):
    """The loop, with a python that has imported everything already, unless `more` names another."""
    python = {"PYTHON": world / "warm_python"}
    return subprocess.run(
        ["bash", ROOT / "iterate.sh"],
        cwd=cwd,
        env=settings(world, run, **(python | more)),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """One undisturbed iteration."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = iterate(world, run)
    assert done.returncode == 0, done.stdout + done.stderr
    return run, done.stdout


RESULTS = (
    "pairs.jsonl",
    "policy/model.safetensors",
    "candidates.jsonl",
    "scored.jsonl",
    "eval/scored.jsonl",
)


def results(run):
    return {name: hash_path(run / "iter_01" / name) for name in RESULTS}


def test_one_command_leaves_everything_a_reader_looks_for(world, whole):
    run, printed = whole
    names = [
        *RESULTS,
        "prompts.jsonl",
        "policy.train.jsonl",
        "policy/config.json",
        "policy/tokenizer.json",
        "logs/train.log",
    ]
    for name in names:
        assert (run / "iter_01" / name).exists(), name
    for name in (
        "config.json",
        "heldout.jsonl",
        "summary.jsonl",
        "report.html",
        "curve.png",
        "iter_00/eval/scored.jsonl",
    ):
        assert (run / name).exists(), name
    assert "--learning_rate 1e-3" in json.loads((run / "config.json").read_text())["TRAIN_ARGS"]
    assert len((run / "summary.jsonl").read_text().splitlines()) == 2
    assert not list(run.rglob("*.parts")) and not list(run.rglob("*.iterdpo-*"))
    meta = json.loads((run / "iter_01/policy.meta.json").read_text())
    assert (
        meta["audit"]["answers"] == 80 and meta["audit"]["mean"] < 1e-4
    )  # law 2: what was sampled is what is trained
    assert meta["inputs"]["pairs"] == [hash_path(run / "iter_01/pairs.jsonl")]


def test_the_page_of_one_prompt_is_not_stale(whole):
    """docs/one_prompt.md has the headings and keys that a run gives now, and its loss is the one
    that its own numbers give.
    """
    run, _ = whole
    today = one_prompt.page(run, None)
    page = (ROOT / "docs/one_prompt.md").read_text()
    headings = r"^(?:#+ .*|\| \| .*|\| (?:the|log).*?\|)"
    assert re.findall(headings, page, re.M) == re.findall(headings, today, re.M)
    pair, pair_today = (text.split("```json")[-1] for text in (page, today))
    assert re.findall(r'^  "\w+"', pair, re.M) == re.findall(r'^  "\w+"', pair_today, re.M)

    number = r"(-?\d+\.\d+)"
    rows = re.findall(rf"^\| (?:the generator|log).*\| {number} \| {number} \|$", page, re.M)
    stored, ref, policy = [tuple(map(float, row)) for row in rows]
    assert stored == pytest.approx(ref, abs=1e-4)
    d = (policy[0] - ref[0]) - (policy[1] - ref[1])
    loss = float(re.search(rf"loss = .* = {number}", page)[1])
    assert loss == pytest.approx(-math.log(1 / (1 + math.exp(-0.1 * d))), abs=1e-4)


def test_rows_in_are_rows_out_and_named_drops_at_every_stage(whole):
    """PITFALLS 12."""
    run, _ = whole
    metas = list(run.rglob("*.meta.json"))
    assert len(metas) >= 8
    for meta in metas:
        for what, c in json.loads(meta.read_text())["counts"].items():
            assert c["in"] == c["out"] + sum(c["dropped"].values()), (meta, what)


def test_law_1_what_was_sampled_is_what_is_scored_is_what_is_trained(world, whole):
    """PITFALLS 2, 4: the generator's ids reach the pairs unchanged; EOS ends them exactly where the
    model stopped.
    """
    run, _ = whole
    candidates = {r["id"]: r for r in map(json.loads, open(run / "iter_01/candidates.jsonl"))}
    pairs = [json.loads(line) for line in open(run / "iter_01/pairs.jsonl")]
    assert len(pairs) == 40
    for pair in pairs:
        source = candidates[pair["id"]]
        assert pair["prompt_token_ids"] == source["prompt_token_ids"]
        for k in ("chosen", "rejected"):
            written = source["candidates"][pair[f"{k}_index"]]
            assert (
                pair[f"{k}_token_ids"] == written["token_ids"]
                and pair[k][0]["content"] == written["text"]
            )
            assert (written["token_ids"][-1] == 4) == (written["finish_reason"] == "stop")
            assert written["model"] == hash_path(world / "model")


def test_the_printed_commands_can_be_run_by_hand(whole):
    """Each is done, says so, and exits with 0: the exact strings that a reader would copy."""
    _, printed = whole
    commands = [line[2:] for line in printed.splitlines() if line.startswith("+ ")]
    assert len(commands) >= 11
    (pairs,) = [c for c in commands if "make_pairs.py" in c]
    done = subprocess.run(pairs, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "already done" in done.stdout


def kill_at_random(world, run, kills, expected):
    """Start the loop, kill -9 its whole process group at a random moment, repeat, and finally let
    it end.

    The result is compared when it ends. If it ends before its moment, it starts again, so that
    kills fall on all stages.
    """
    rng = random.Random(time.time())
    while True:
        process = subprocess.Popen(
            ["bash", ROOT / "iterate.sh"],
            env=settings(world, run, PYTHON=world / "warm_python"),
            process_group=0,  # of the same session, or a fork could not join it
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            errors = process.communicate(timeout=rng.uniform(0.2, 8) if kills else 600)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills -= 1
            continue
        assert process.returncode == 0, errors
        assert results(run) == expected
        if not kills:
            return
        shutil.rmtree(run)


def test_pitfalls_36_killed_at_random_moments_the_end_is_the_same_to_the_byte(
    world, whole, tmp_path
):
    kill_at_random(world, tmp_path / "run", 5, results(whole[0]))


@pytest.mark.slow
def test_twenty_kills(world, whole, tmp_path):
    kill_at_random(world, tmp_path / "run", 50, results(whole[0]))


def test_pitfalls_13_a_changed_setting_stops_the_loop_and_is_named(world, whole):
    run, _ = whole
    done = iterate(world, run, SEED=1)
    assert (
        done.returncode == 1
        and "--seed: was 0, is 1" in done.stdout
        and "iter_00/logs/generate.log" in done.stderr
    )
    assert results(run)
    recorded = json.loads((run / "config.json").read_text())
    assert recorded["SEED"] == "0"  # the settings of a refused restart are not the run's


def test_pitfalls_35_a_failing_stage_stops_the_loop_and_names_its_log(world, tmp_path):
    (tmp_path / "bad.py").write_text(
        "def reward(prompt, response, meta):\n    return float('nan')\n"
    )
    done = iterate(world, tmp_path / "run", REWARD_FN=f"{tmp_path}/bad.py:reward")
    log = tmp_path / "run/iter_00/logs/score.log"
    assert done.returncode == 1 and str(log) in done.stderr and "nan" in log.read_text()
    assert not (tmp_path / "run/iter_01").exists()
    # With the cause corrected, the same command resumes.
    (tmp_path / "bad.py").write_text(REWARD)
    assert (
        iterate(world, tmp_path / "run", REWARD_FN=f"{tmp_path}/bad.py:reward", ITERS=0).returncode
        == 0
    )


def test_two_loops_never_share_a_run(world, tmp_path):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = iterate(world, tmp_path)
    assert done.returncode == 1 and "another loop is at work" in done.stderr


def test_a_stage_that_was_just_killed_may_take_a_moment_to_go(world, tmp_path):
    holder = subprocess.Popen(["flock", tmp_path / ".lock", "sleep", "2"])
    while subprocess.run(["flock", "--nonblock", tmp_path / ".lock", "true"]).returncode == 0:
        time.sleep(0.01)
    done = iterate(world, tmp_path, PROMPTS=tmp_path / "none.jsonl")  # what comes after the lock
    assert "another loop" not in done.stderr and "none.jsonl" in done.stdout + done.stderr
    holder.wait()


def alive(session):
    """Processes of the session that still run, without those that have ended but are not reaped
    yet (state Z).
    """
    stats = [
        path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")
    ]
    return [
        s for s in stats if int(s[3]) == session and s[0] != "Z"
    ]  # state, parent, group, session, …


def all_gone(session, seconds):
    """What is ending may take a moment."""
    deadline = time.time() + seconds
    while alive(session):
        assert time.time() < deadline
        time.sleep(0.1)


def without_parent(command, **env):
    """(who is its parent when it begins, what it says) of a command whose parent has ended."""
    script = f"(sleep 0.3; cut -d ' ' -f 4 /proc/$BASHPID/stat; exec {command}) &"
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | env, capture_output=True, text=True, timeout=60
    )
    parent, _, printed = done.stdout.partition("\n")
    return parent, printed + done.stderr


def test_a_rank_that_torchrun_has_left_alone_before_it_began_does_nothing(tmp_path):
    """Killed while its ranks import torch, torchrun can send them no signal. They would write at
    the same time as those of the next start.
    """
    command = f"{sys.executable} {ROOT}/make_pairs.py --scored {tmp_path}/s --output {tmp_path}/p"
    parent, said = without_parent(command, TORCHELASTIC_RUN_ID="none")
    if parent != "1":
        pytest.skip("not init but another process takes orphans over here")
    assert said.strip().endswith("was killed. Nothing was done.")
    _, said = without_parent(command)  # by hand, a stage may go on in the background
    assert "no such file" in said.lower()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_stop_it_cleanly_and_it_goes_on(world, tmp_path, sent):
    """Sent to the script alone; it passes the signal on, waits, and leaves no child running."""
    process = subprocess.Popen(
        ["bash", ROOT / "iterate.sh"],
        env=settings(world, tmp_path / "run", ITERS=0),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not list((tmp_path / "run").glob("iter_00/logs/generate.log")):
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(sent)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and "the same command resumes from here" in printed
    all_gone(process.pid, 5)
    assert iterate(world, tmp_path / "run", ITERS=0).returncode == 0


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_leaves_training_its_last_words(world, tmp_path, sent):
    """As a terminal's Ctrl-C does it: the process that keeps the log gets the signal, too, and must
    not end first.
    """
    more = {"TRAIN_ARGS": "--learning_rate 1e-4 --batch_size 1 --num_train_epochs 50"}
    process = subprocess.Popen(
        ["bash", ROOT / "iterate.sh"],
        env=settings(world, tmp_path / "run", **more),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    rows = tmp_path / "run/iter_01/policy.parts/train.jsonl"
    while process.poll() is None and not (rows.exists() and rows.read_text().count("\n") > 3):
        time.sleep(0.05)
    os.killpg(process.pid, sent)
    assert process.wait(60) == 75
    assert list(rows.parent.glob("step_*"))
    assert "the same command resumes" in (tmp_path / "run/iter_01/logs/train.log").read_text()


@pytest.mark.slow
def test_two_machines_are_one_loop(world, whole, tmp_path):
    """Two loops with a shared RUN that meet through torchrun, here on one machine: the same answers
    and pairs. One of them removes the policy that nothing needs any more.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    meet = f"--nnodes 2 --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{port}"
    machines = []
    for node in (0, 1):
        more = {"TORCHRUN_ARGS": meet, "NODE_RANK": node, "ITERS": 2, "KEEP": "last"}
        more = settings(world, tmp_path / "run", **more)
        log = open(tmp_path / f"node{node}.log", "w")
        machines.append(
            subprocess.Popen(["bash", ROOT / "iterate.sh"], env=more, stdout=log, stderr=log)
        )
    for node, machine in enumerate(machines):
        assert machine.wait(300) == 0, (tmp_path / f"node{node}.log").read_text()[-3000:]
    for name in ("iter_01/candidates.jsonl", "iter_01/scored.jsonl", "iter_01/pairs.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (whole[0] / name).read_bytes(), name
    meta = json.loads((tmp_path / "run/iter_02/policy.meta.json").read_text())
    assert meta["world_size"] == 2
    assert not (tmp_path / "run/iter_01/policy").exists()


def test_a_policy_that_is_needed_again_is_not_removed(world, tmp_path):
    done = iterate(world, tmp_path / "run", ENHANCER="prev", KEEP="last")
    assert done.returncode == 1 and "ENHANCER=prev needs KEEP=all" in done.stderr


def test_progress_under_a_judge_is_seen(world, tmp_path):
    """The whole loop with a judge that counts letters: one half before training, more after it."""

    def more_letters(a, b):
        if a.count("e") == b.count("e"):
            return "Verdict: TIE"
        return "Verdict: A" if a.count("e") > b.count("e") else "Verdict: B"

    server = Server(more_letters)
    run = tmp_path / "run"
    more = {"REWARD_FN": "", "JUDGE": "m", "JUDGE_URL": server.url}
    more["TRAIN_ARGS"] = "--learning_rate 3e-3 --batch_size 2"
    done = iterate(world, run, **more)
    server.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = map(json.loads, (run / "summary.jsonl").read_text().splitlines())
    assert (before["reward/judge"], before["reward/judge_se"]) == (0.5, 0.0)
    assert after["reward/judge"] > 0.5 + 2 * after["reward/judge_se"]
    assert before["opponent"] == after["opponent"] == "the initial policy"
    assert after["position_bias"] == 0.0 and "reward_win" not in after

    # The win rate, by the definition
    texts = {}
    for k in (0, 1):
        rows = map(json.loads, open(run / f"iter_0{k}/eval/candidates.jsonl"))
        texts[k] = [one["text"].count("e") for row in rows for one in row["candidates"]]
    wins = [(a > b) + (a == b) / 2 for a, b in zip(texts[1], texts[0], strict=True)]
    assert after["reward/judge"] == pytest.approx(sum(wins) / len(wins))


@pytest.mark.vllm
def test_a_judge_is_served_while_it_is_needed_and_no_longer(world, judge, tmp_path):
    """The real vLLM server; then the same command again, which starts none."""
    process = subprocess.Popen(
        ["bash", ROOT / "iterate.sh"],
        env=settings(world, tmp_path / "run", **judge),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == 0, printed
    all_gone(process.pid, 5)
    counts = json.loads((tmp_path / "run/iter_00/eval/scored.jsonl.meta.json").read_text())[
        "counts"
    ]
    different = counts["judge_pairs"]["in"]
    assert different == 16  # 8 prompts, 2 answers each, and each meets its opponent
    assert counts["judge_replies"] == {"in": 2 * different, "out": 2 * different, "dropped": {}}
    assert counts["judge_pairs"]["dropped"] == {"first_shown_won_twice": different}
    scored = [json.loads(line) for line in open(tmp_path / "run/iter_00/eval/scored.jsonl")]
    assert {c["rewards"]["judge"] for row in scored for c in row["candidates"]} == {0.5}
    assert json.loads((tmp_path / "run/config.json").read_text())["JUDGE"] == str(judge["JUDGE"])
    again = iterate(world, tmp_path / "run", **judge)
    assert again.returncode == 0 and "api_server" in printed and "api_server" not in again.stdout


@pytest.mark.vllm
@pytest.mark.parametrize(
    "sent", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_no_server_outlives_a_loop_that_is_stopped_while_it_starts(world, judge, tmp_path, sent):
    process = subprocess.Popen(
        ["bash", ROOT / "iterate.sh"],
        env=settings(world, tmp_path / "run", **judge),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = tmp_path / "run/iter_00/logs/judge_server.log"
    while not log.exists() or "Initializing" not in log.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    assert len(alive(process.pid)) > 3
    process.send_signal(sent)
    assert process.wait(60) == (75 if sent == signal.SIGTERM else -sent)
    all_gone(process.pid, 30 if sent == signal.SIGKILL else 5)


@pytest.mark.vllm
def test_a_judge_that_cannot_be_served_stops_the_loop_and_names_its_log(world, judge, tmp_path):
    done = iterate(world, tmp_path / "run", **judge | {"JUDGE_SERVER_ARGS": "--no-such-argument"})
    log = tmp_path / "run/iter_00/logs/judge_server.log"
    assert (
        done.returncode == 1 and str(log) in done.stderr and "no-such-argument" in log.read_text()
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"REF": "first"}, 'REF is "prev" or "init"'),
        ({"KEEP": "some"}, 'KEEP is "all" or "last"'),
        ({"REPORT_TO": "mlflow"}, 'REPORT_TO is "none", "tensorboard", "wandb" or "trackio"'),
        ({"EVAL_PAIRS_SHARE": "5"}, "EVAL_PAIRS_SHARE is a share between 0 and 1"),
        ({"EVAL_PAIRS_SHARE": ".0"}, "EVAL_PAIRS_SHARE is a share between 0 and 1"),
        ({"EVAL_PAIRS_SHARE": "0.1", "HISTORY": 1}, "EVAL_PAIRS_SHARE needs HISTORY=0"),
        ({"HELDOUT": ""}, "held-out prompts"),
        ({"REWARD_FN": ""}, "no reward"),
        ({"JUDGE_SERVER_ARGS": "--enforce-eager"}, "no effect without JUDGE"),
        ({"JUDGE_ARGS": "--judge_weight 2"}, "no effect without JUDGE"),
        ({"OPPONENT": "meta.reference"}, "no effect without JUDGE"),
        ({"JUDGE": "m", "OPPONENT": "none.jsonl"}, "none.jsonl: no such file"),
        ({"JUDGE": "m", "JUDGE_ARGS": "--opponent a.jsonl"}, "set OPPONENT"),
        (
            {"JUDGE": "m", "JUDGE_SERVER_ARGS": "-x", "JUDGE_URL": "http://localhost:1/v1"},
            "runs already",
        ),
        ({"JUDGE": "m", "JUDGE_URL": "http://me:secret@host/v1"}, "key would end up in logs"),
        ({"JUDGE": "m", "JUDGE_URL": "http://host/v1?key=secret"}, "key would end up in logs"),
        ({"JUDGE": "m", "JUDGE_SERVER_ARGS": "--api-key secret"}, "key would end up in logs"),
        ({"JUDGE": "m", "JUDGE_ARGS": "--api_key=secret"}, "key would end up in logs"),
        ({"HELDOUT": "none.jsonl"}, "HELDOUT: none.jsonl: no such file"),
        ({"PROMPTS": "none"}, "PROMPTS: none: no such file"),
        ({"PYTHON": "/no/such/python"}, "/no/such/python"),
        (
            {"SCORE_ARGS": "--missing_eos_penalty 1", "PAIRS_ARGS": "--min_margin 0.1"},
            "Give PAIRS_ARGS=--keep_truncated",
        ),
        (
            {"SCORE_ARGS": "--missing_eos_penalty 1", "REWARD_FN": "", "JUDGE": "m"},
            "no effect with JUDGE alone",
        ),
        ({"EXTRA_PAIRS": "none.jsonl"}, "EXTRA_PAIRS: none.jsonl: no such file"),
        ({"EXTRA_PAIRS_ITERS": "all"}, "no effect without EXTRA_PAIRS"),
        ({"WRITER": "prev"}, 'WRITER is "policy" or "init", not "prev"'),
        ({"EXTRA_PAIRS_ITERS": "last"}, 'EXTRA_PAIRS_ITERS is "first" or "all"'),
        (
            {"SCORE_ARGS": "--missing-eos-penalty=1", "PAIRS_ARGS": ""},
            "Give PAIRS_ARGS=--keep_truncated",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(world, tmp_path, more, says):
    done = iterate(world, tmp_path / "run", **more)
    assert done.returncode != 0 and says in done.stdout + done.stderr


def test_a_mistake_in_torchruns_arguments_ends_in_two_lines(world, tmp_path):
    """One of the launcher's, and one of the loop's that names the stage."""
    done = iterate(world, tmp_path / "run", TORCHRUN_ARGS="-rf")
    assert done.returncode == 1
    (message,) = re.findall("^error: .*", done.stdout, re.M)
    assert message.startswith("error: torchrun: f does not match")
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.startswith("iterate.sh: generate.py failed with exit code 1. Its output")


@pytest.mark.parametrize("keep", ["--keep_truncated", "--min_margin 0.1 --keep-truncated"])
def test_a_penalty_on_answers_that_take_part_is_accepted(world, tmp_path, keep):
    more = {"SCORE_ARGS": "--missing_eos_penalty 1", "PAIRS_ARGS": keep}
    done = iterate(world, tmp_path / "run", PYTHON="/no/such/python", **more)
    assert "keep_truncated" not in done.stderr and "+ /no/such/python" in done.stdout


NUMBERS = (
    "ITERS HISTORY SEED NODE_RANK NUM_SAMPLES EVAL_SAMPLES NPROC GENERATE_NPROC PROMPTS_PER_ITER"
)


@pytest.mark.parametrize("name", NUMBERS.split())
@pytest.mark.parametrize("value", ["08", "1e3", "-1", "99999999999", "a[$(touch was_run)0]"])
def test_only_whole_numbers_reach_the_shells_arithmetic(world, tmp_path, name, value):
    """It would take 08 for a mistake and 1e3 for nothing, and run what stands in the brackets."""
    done = iterate(world, tmp_path / "run", cwd=tmp_path, **{name: value})
    assert done.returncode == 1
    (message,) = done.stderr.splitlines()
    assert message.startswith(f"iterate.sh: {name} must be a whole number, at least ")
    assert not list(tmp_path.iterdir()) and not (ROOT / "was_run").exists()


def test_pitfalls_15_heldout_prompts_that_are_trained_on_stop_the_run(world, tmp_path):
    stolen = json.loads((world / "prompts.jsonl").read_text().splitlines()[3])
    (tmp_path / "heldout.jsonl").write_text(dump({**stolen, "id": "another id"}))
    done = iterate(world, tmp_path / "run", HELDOUT=tmp_path / "heldout.jsonl")
    assert (
        done.returncode == 1
        and "p3" in done.stdout
        and not (tmp_path / "run/iter_01/policy").exists()
    )


def test_ref_init_history_enhancer_and_keep_last(world, tmp_path):
    """The settings that change what is compared with what, in one run; then the command again."""
    more = {
        "ITERS": 2,
        "REF": "init",
        "HISTORY": 1,
        "ENHANCER": "init",
        "KEEP": "last",
        "PROMPTS_PER_ITER": 16,
    }
    done = iterate(world, tmp_path / "run", **more)
    assert done.returncode == 0, done.stdout + done.stderr
    meta = json.loads((tmp_path / "run/iter_02/policy.meta.json").read_text())
    assert (
        meta["inputs"]["ref_model"] == hash_path(world / "model")
        and len(meta["inputs"]["pairs"]) == 2
    )
    assert meta["audit"]["answers"] > 0
    scored = [json.loads(line) for line in open(tmp_path / "run/iter_02/scored.jsonl")]
    assert all(
        len(row["candidates"]) == 8 and len({c["model"] for c in row["candidates"]}) == 2
        for row in scored
    )
    evaluated = json.loads((tmp_path / "run/iter_02/eval/scored.jsonl").read_text().splitlines()[0])
    assert evaluated["candidates"][0]["ref_logprobs"].keys() == {"init", "prev"}
    assert (
        not (tmp_path / "run/iter_01/policy").exists()
        and (tmp_path / "run/iter_02/policy").exists()
    )
    again = iterate(world, tmp_path / "run", **more)
    assert again.returncode == 0 and "iter_02: done" in again.stdout


def test_held_out_pairs_and_a_tracker_in_a_run(world, whole, stage, tmp_path):
    """The commands that EVAL_PAIRS_SHARE and REPORT_TO give, from the answers of a run on. The
    report is made twice: no point stands there twice.
    """
    pytest.importorskip("tensorboard")
    from test_tracker import read_tensorboard

    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    folder = run / "iter_01"
    for path in [*folder.glob("pairs.*"), *folder.glob("policy.*")]:
        path.unlink()
    shutil.rmtree(folder / "policy")
    hold_out = ["--eval_share", "0.2", "--eval_output", folder / "eval_pairs.jsonl"]
    files = ["--scored", folder / "scored.jsonl", "--output", folder / "pairs.jsonl"]
    stage("make_pairs.py", *files, *hold_out, "--keep_truncated", "--iteration", "1")
    tracker = ["--report_to", "tensorboard", "--run_name", "demo", "--logging_dir", run / "tracker"]
    files = ["--model", world / "model", "--pairs", folder / "pairs.jsonl"]
    files += ["--eval_pairs", folder / "eval_pairs.jsonl", "--output", folder / "policy"]
    flags = ["--learning_rate", "1e-3", "--batch_size", "8", "--beta", "0.3", "0.2"]
    flags += ["--iteration", "1", "--steps_before", "0"]
    stage("dpo_train.py", *files, *flags, *tracker)
    for _ in range(2):
        stage("tools/report.py", run, *tracker)

    steps = [json.loads(line) for line in open(folder / "policy.train.jsonl")][1:-1]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    row = json.loads((run / "summary.jsonl").read_text().splitlines()[1])
    assert row["steps"] == len(steps) and row["beta"] == 0.3
    assert row["evaluation"]["eval_loss"]["first"] == pytest.approx(math.log(2), abs=1e-5)
    page = (run / "report.html").read_text()
    assert "Implicit rewards of training pairs" in page
    assert "Implicit rewards of held-out pairs" in page

    events = read_tensorboard(run / "tracker", "demo")
    shown = {name: events.Scalars(name) for name in ("loss", "eval_loss", "summary/beta")}
    at = {name: [event.step for event in points] for name, points in shown.items()}
    assert at["loss"] == list(range(1, len(steps) + 1))
    assert at["eval_loss"] == [0, len(steps)]
    # the initial policy's report came after the training here: its place is before what was sent
    assert at["summary/beta"] == [len(steps)]
    texts = events.Tensors("completions/text_summary")
    assert [event.step for event in texts] == [len(steps)]


# ---- What the loop asks of whom ----------------------------------------------------------------
#
# Which policy, which reference, which prompts: a wrong one trains and evaluates without an error.

# Stands for python, as these lines are the driver's alone: it writes each command down, fails where
# an input is missing, and makes the output. What begins a run needs no model, and runs for real.
RECORDER = """#!{python}
import json, os, sys
from pathlib import Path

words = sys.argv[1:]
scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
at = scripts[words[scripts[0]] == "tools/torchrun.py"]
launcher, script, words = words[:at], words[at], words[at + 1 :]
if script == "tools/start_run.py":
    os.execv(sys.executable, [sys.executable, script, *words])

flags = {{}}
for word in words:
    if word.startswith("--"):
        values = flags.setdefault(word, [])
    elif flags:
        values.append(word)
inputs = ("model", "ref_model", "prompts", "candidates", "scored", "pairs", "opponent")
for flag in [f"--{{name}}" for name in inputs]:
    for value in flags.get(flag, []):
        if value == "meta.reference":
            continue
        path = value.partition("=")[2] or value
        assert os.path.exists(path), f"{{script}} {{flag}} {{path}}: not there"

with open("{log}", "a") as log:
    log.write(json.dumps([script, flags, launcher]) + "\\n")
for output in map(Path, flags.get("--output", [])):
    output.parent.mkdir(parents=True, exist_ok=True)
    output.mkdir() if script == "dpo_train.py" else output.touch()
    if script == "dpo_train.py":  # two steps, between two evaluations
        rows = ({{"eval_loss": 1}}, {{"loss": 1}}, {{"loss": 1}}, {{"eval_loss": 1}})
        Path(f"{{output}}.train.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""


class Command(NamedTuple):
    script: str
    flags: dict[str, list[str]]  # "MODEL" and paths within the run, for short
    launcher: list[str]  # what starts the script, where it is several processes


@pytest.fixture
def asked(world, tmp_path):
    """asked("dpo_train.py", ITERS=3, …) -> the commands of that stage, in order."""

    def run(script, **more):
        log, recorder = tmp_path / "commands.jsonl", tmp_path / "recorder"
        recorder.write_text(RECORDER.format(python=sys.executable, log=log))
        recorder.chmod(0o755)
        done = iterate(world, tmp_path / "run", PYTHON=recorder, **more)
        assert done.returncode == 0, done.stdout + done.stderr
        text = log.read_text()
        text = text.replace(f"{tmp_path}/run/", "").replace(f"{world}/model", "MODEL")
        commands = [Command(*json.loads(line)) for line in text.splitlines()]
        return [command for command in commands if command.script == script]

    return run


def each(commands, flag):
    """Of each command the values of this flag, None where it has none."""
    return [command.flags.get(flag) for command in commands]


def test_each_iteration_trains_the_policy_of_the_one_before_which_is_its_reference(asked):
    """REF=prev, the default: without --ref_model the reference is the policy that is trained."""
    trainings = asked("dpo_train.py", ITERS=3)
    assert each(trainings, "--output") == [[f"iter_0{i}/policy"] for i in (1, 2, 3)]
    assert each(trainings, "--model") == [["MODEL"], ["iter_01/policy"], ["iter_02/policy"]]
    assert each(trainings, "--pairs") == [[f"iter_0{i}/pairs.jsonl"] for i in (1, 2, 3)]
    assert each(trainings, "--ref_model") == [None] * 3


def test_ref_init_is_the_first_policy_in_every_iteration(asked):
    assert each(asked("dpo_train.py", ITERS=2, REF="init"), "--ref_model") == [["MODEL"]] * 2


def test_the_answers_are_those_of_the_policy_that_is_trained_next(asked):
    """Online: on this iteration's prompts, and with random numbers of its own."""
    answers = [c for c in asked("generate.py", ITERS=2) if "--iteration" in c.flags]
    assert each(answers, "--model") == [["MODEL"], ["iter_01/policy"]]
    assert each(answers, "--prompts") == [["iter_01/prompts.jsonl"], ["iter_02/prompts.jsonl"]]
    assert each(answers, "--iteration") == [["1"], ["2"]]


def test_offline_the_first_policy_writes_the_answers_of_every_iteration(asked):
    """WRITER=init, the offline control: nothing but the writer differs from an online run."""
    answers = [c for c in asked("generate.py", ITERS=3, WRITER="init") if "--iteration" in c.flags]
    assert each(answers, "--model") == [["MODEL"]] * 3
    assert each(answers, "--prompts") == [[f"iter_0{i}/prompts.jsonl"] for i in (1, 2, 3)]
    assert each(answers, "--iteration") == [["1"], ["2"], ["3"]]


def test_offline_the_policy_that_is_trained_is_still_the_one_before(asked):
    trainings = asked("dpo_train.py", ITERS=3, WRITER="init")
    assert each(trainings, "--model") == [["MODEL"], ["iter_01/policy"], ["iter_02/policy"]]


def test_an_offline_run_says_what_it_is_and_its_audit_compares_what_it_can(world, tmp_path):
    """With REF=init the reference has written the answers, so its log-probs are compared."""
    run = tmp_path / "run"
    done = iterate(world, run, ITERS=2, WRITER="init", REF="init", NUM_SAMPLES=3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRITER=init: the initial policy wrote the answers of every iteration" in done.stdout
    assert "offline control" in (run / "report.html").read_text()

    initial = hash_path(world / "model")
    pairs = list(map(json.loads, (run / "iter_02/pairs.jsonl").read_text().splitlines()))
    assert {pair["chosen_model"] for pair in pairs} == {initial}
    audit = json.loads((run / "iter_02/policy.meta.json").read_text())["audit"]
    assert audit["answers"] == 2 * len(pairs) and audit["mean"] < 1e-4


def test_every_policy_is_evaluated_on_the_same_heldout_prompts_and_seed(asked):
    evaluated = [c for c in asked("generate.py", ITERS=2) if "--iteration" not in c.flags]
    assert each(evaluated, "--model") == [["MODEL"], ["iter_01/policy"], ["iter_02/policy"]]
    assert each(evaluated, "--prompts") == [["heldout.jsonl"]] * 3
    assert each(evaluated, "--seed") == [["0"]] * 3


def test_training_may_sample_otherwise_and_evaluation_does_not(asked):
    """Of repeated flags the last one counts: EVAL_ARGS are the last."""
    shaped = "--max_new_tokens 9 --temperature 0.7 1.3 --top_p 0.9 --top_k 20 --min_p 0.1"
    sampled = asked("generate.py", ITERS=1, GENERATE_ARGS=shaped)
    evaluated = [c for c in sampled if "--iteration" not in c.flags]
    (trained_on,) = [c for c in sampled if "--iteration" in c.flags]
    last = {"--temperature": "1", "--top_p": "1", "--top_k": "0", "--min_p": "0"}
    assert len(evaluated) == 2
    for command in evaluated:
        assert {flag: command.flags[flag][-1] for flag in last} == last
    assert each(sampled, "--max_new_tokens") == [["9"]] * 3
    assert trained_on.flags["--temperature"] == ["0.7", "1.3"]
    assert trained_on.flags["--top_p"] == ["0.9"]


def test_eval_args_have_the_last_word_in_evaluation_and_none_in_training(asked):
    sampled = asked("generate.py", ITERS=1, EVAL_ARGS="--temperature 0.5 --max_new_tokens 99")
    evaluated = [c for c in sampled if "--iteration" not in c.flags]
    assert each(evaluated, "--temperature") == [["1", "0.5"]] * 2
    assert each(evaluated, "--max_new_tokens") == [["12", "99"]] * 2
    (trained_on,) = [c for c in sampled if "--iteration" in c.flags]
    assert "--temperature" not in trained_on.flags
    assert trained_on.flags["--max_new_tokens"] == ["12"]


@pytest.mark.parametrize("opponent", ["", "meta.reference", "a file"])
def test_a_judge_compares_heldout_answers_with_one_opponent_in_every_iteration(
    asked, world, opponent
):
    """By default the initial policy. The answers that pairs are made of meet each other."""
    served = {"JUDGE": "m", "JUDGE_URL": "http://localhost:1/v1"}
    if opponent == "a file":
        opponent = world / "heldout.jsonl"
    judged = asked("judge.py", ITERS=2, **served, OPPONENT=opponent)
    theirs = [str(opponent or "iter_00/eval/candidates.jsonl")]
    of_output = {
        command.flags["--output"][0]: command.flags.get("--opponent") for command in judged
    }
    assert of_output == {
        "iter_00/eval/scored.jsonl": theirs,
        "iter_01/scored.jsonl": None,
        "iter_01/eval/scored.jsonl": theirs,
        "iter_02/scored.jsonl": None,
        "iter_02/eval/scored.jsonl": theirs,
    }


def test_the_distance_is_from_the_first_policy_and_from_the_one_before(asked):
    scored = [c for c in asked("score.py", ITERS=2) if "--ref_model" in c.flags]
    assert each(scored, "--output") == [[f"iter_0{i}/eval/scored.jsonl"] for i in (1, 2)]
    assert each(scored, "--ref_model") == [
        ["init=MODEL", "prev=MODEL"],
        ["init=MODEL", "prev=iter_01/policy"],
    ]


def test_what_only_watches_scores_the_heldout_answers_with_weight_0(asked, world):
    gold = f"{world}/reward.py:reward"
    scored = asked("score.py", ITERS=1, GOLD_FN=gold)
    first, answers, last = each(scored, "--reward_fn")
    assert first == last == [gold, f"gold={gold}"] and answers == [gold]
    assert each(scored, "--reward_weights") == [["gold=0"], None, ["gold=0"]]


def test_the_second_policy_is_the_one_before_the_policy(asked):
    """ENHANCER=prev: the first policy until there is another; its own random numbers, too."""
    answers = [
        c for c in asked("generate.py", ITERS=3, ENHANCER="prev") if "--iteration" in c.flags
    ]
    policies, enhancers = answers[0::2], answers[1::2]
    assert each(policies, "--model") == [["MODEL"], ["iter_01/policy"], ["iter_02/policy"]]
    assert each(enhancers, "--model") == [["MODEL"], ["MODEL"], ["iter_01/policy"]]
    assert each(enhancers, "--prompts") == each(policies, "--prompts")
    assert each(enhancers, "--seed") == [["1"]] * 3 and each(policies, "--seed") == [["0"]] * 3


def test_history_adds_the_pairs_of_so_many_earlier_iterations(asked):
    assert each(asked("dpo_train.py", ITERS=3, HISTORY=1), "--pairs") == [
        ["iter_01/pairs.jsonl"],
        ["iter_02/pairs.jsonl", "iter_01/pairs.jsonl"],
        ["iter_03/pairs.jsonl", "iter_02/pairs.jsonl"],
    ]


@pytest.mark.parametrize("when", ["first", "all"])
def test_pairs_of_other_origin_stand_beside_the_fresh_ones(asked, tmp_path, when):
    """EXTRA_PAIRS: in the first iteration alone, or in all."""
    extra = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    for path in extra:
        Path(path).touch()
    more = {"EXTRA_PAIRS": " ".join(extra), "EXTRA_PAIRS_ITERS": when, "HISTORY": 1}
    first, second = each(asked("dpo_train.py", ITERS=2, **more), "--pairs")
    assert first == ["iter_01/pairs.jsonl", *extra]
    assert second[:2] == ["iter_02/pairs.jsonl", "iter_01/pairs.jsonl"]
    assert len(second) == (4 if when == "all" else 2)


def test_a_relative_path_among_pairs_of_other_origin_is_the_callers(world, tmp_path):
    (tmp_path / "here.jsonl").touch()
    more = {"EXTRA_PAIRS": f"here.jsonl {tmp_path}/here.jsonl", "PYTHON": "/no/such/python"}
    done = iterate(world, tmp_path / "run", cwd=tmp_path, **more)
    assert "EXTRA_PAIRS" not in done.stderr and "+ /no/such/python" in done.stdout


def test_a_run_trains_on_pairs_of_other_origin_and_its_report_says_so(world, tmp_path):
    """Rows without token ids beside fresh ones, one of them too long: counted by file. The first
    loss is ln 2, as the reference of either kind is the policy itself.
    """
    turns = [{"role": "user", "content": "name two trees"}]
    row = {"prompt": turns, "chosen": [{"role": "assistant", "content": "oak, elm"}]}
    rows = [row | {"rejected": [{"role": "assistant", "content": f"plum {i}"}]} for i in range(3)]
    rows.append(row | {"rejected": [{"role": "assistant", "content": "plum " * 500}]})
    (tmp_path / "offline.jsonl").write_text("".join(map(dump, rows)))
    more = {"EXTRA_PAIRS": tmp_path / "offline.jsonl", "PROMPTS_PER_ITER": 16}
    done = iterate(world, tmp_path / "run", **more)
    assert done.returncode == 0, done.stdout + done.stderr

    folder = tmp_path / "run/iter_01"
    counts = json.loads((folder / "policy.meta.json").read_text())["counts"]
    fresh = counts[f"rows of {folder}/pairs.jsonl"]
    assert counts[f"rows of {tmp_path}/offline.jsonl"] == {
        "in": 4,
        "out": 3,
        "dropped": {"too_long": 1},
    }
    assert counts["rows"] == {"in": fresh["in"] + 4, "out": fresh["out"] + 3} | {
        "dropped": {"too_long": 1}
    }
    losses = [json.loads(line)["loss"] for line in open(folder / "policy.train.jsonl")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    says = f"Iteration 1 was trained on {fresh['out']} of iter_01/pairs.jsonl, 3 of "
    assert says in done.stdout and says in (tmp_path / "run/report.html").read_text()
    assert "1 rows of" in done.stdout and "policy: 1 rows too_long" not in done.stdout
    assert json.loads((tmp_path / "run/config.json").read_text())["EXTRA_PAIRS"]


def test_a_star_among_arguments_is_no_pattern_of_files(asked):
    commands = asked("generate.py", ITERS=1, GENERATE_ARGS="--engine_args * $HOME $(true)")
    assert each(commands, "--engine_args") == [["*", "$HOME", "$(true)"]] * len(commands)


def test_relative_paths_mean_the_folder_of_the_caller(asked, world, tmp_path):
    """And not that of iterate.sh, which goes there."""
    for name in ("prompts.jsonl", "heldout.jsonl", "reward.py"):
        shutil.copy(world / name, tmp_path / name)
    paths = {"PROMPTS": "prompts.jsonl", "HELDOUT": "./heldout.jsonl", "RUN": "run"}
    more = {"cwd": tmp_path, "REWARD_FN": "reward.py:reward", **paths}
    (taken,) = asked("tools/take_prompts.py", ITERS=1, **more)
    assert taken.flags["--prompts"] == [f"{tmp_path}/prompts.jsonl"]
    assert taken.flags["--output"] == ["iter_01/prompts.jsonl"]
    assert (tmp_path / "run/heldout.jsonl").exists() and not (ROOT / "run").exists()


def test_an_opponents_relative_path_means_the_folder_of_the_caller(asked, world, tmp_path):
    shutil.copy(world / "heldout.jsonl", tmp_path / "theirs.jsonl")
    more = {"cwd": tmp_path, "JUDGE": "m", "JUDGE_URL": "http://localhost:1/v1"}
    judged = asked("judge.py", ITERS=0, OPPONENT="theirs.jsonl", **more)
    assert each(judged, "--opponent") == [[f"{tmp_path}/theirs.jsonl"]]


def test_held_out_pairs_are_those_of_the_iteration(asked):
    pairs = asked("make_pairs.py", ITERS=2, EVAL_PAIRS_SHARE="0.25")
    assert each(pairs, "--eval_share") == [["0.25"]] * 2
    assert each(pairs, "--eval_output") == [[f"iter_0{i}/eval_pairs.jsonl"] for i in (1, 2)]


def test_training_is_evaluated_on_the_held_out_pairs(asked):
    trainings = asked("dpo_train.py", ITERS=2, EVAL_PAIRS_SHARE="0.25")
    assert each(trainings, "--eval_pairs") == [[f"iter_0{i}/eval_pairs.jsonl"] for i in (1, 2)]


def test_each_training_knows_its_iteration_and_no_tracker_by_default(asked):
    """The iteration chooses the --beta."""
    trainings = asked("dpo_train.py", ITERS=3)
    assert each(trainings, "--iteration") == [["1"], ["2"], ["3"]]
    for flag in ("--report_to", "--run_name", "--logging_dir", "--steps_before", "--eval_pairs"):
        assert each(trainings, flag) == [None] * 3


@pytest.mark.parametrize("keep", ["all", "last"])
def test_report_to_is_one_run_on_one_axis_of_steps(asked, keep):
    pytest.importorskip("tensorboard")
    trainings = asked("dpo_train.py", ITERS=3, REPORT_TO="tensorboard", KEEP=keep)
    assert each(trainings, "--steps_before") == [["0"], ["2"], ["4"]]
    for flag, value in (("report_to", "tensorboard"), ("run_name", "run")):
        assert each(trainings, f"--{flag}") == [[value]] * 3
    assert each(trainings, "--logging_dir") == [["tracker"]] * 3


def test_steps_are_not_counted_in_a_log_that_is_gone(tmp_path):
    """The shell would calculate with nothing."""
    lines = f'set -euo pipefail; . tools/environment.sh; . tools/loop.sh; RUN="{tmp_path}"'
    command = ["bash", "-c", f"{lines}; steps_before 2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    log = tmp_path / "iter_01/policy.train.jsonl"
    assert done.stderr.startswith(f"iterate.sh: {log}: is gone, and REPORT_TO needs")
    assert done.stderr.count("\n") == 1

    log.parent.mkdir()
    log.write_text(dump({"step": 1, "loss": 1}) + dump({"step": 1, "eval_loss": 1}))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1\n"


def test_report_to_reaches_the_report(asked):
    pytest.importorskip("tensorboard")
    reports = asked("tools/report.py", ITERS=1, REPORT_TO="tensorboard")
    assert each(reports, "--report_to") == [["tensorboard"]] * 2
    assert each(reports, "--run_name") == [["run"]] * 2
    assert each(reports, "--logging_dir") == [["tracker"]] * 2


def test_keep_last_removes_a_policy_when_the_next_is_evaluated(asked, tmp_path):
    """No command misses its model, and none of ours removes the model that the user brought."""
    asked("dpo_train.py", ITERS=3, KEEP="last")
    assert [path.parent.name for path in tmp_path.glob("run/iter_*/policy")] == ["iter_03"]


def test_each_iteration_has_its_own_slice_of_the_prompts(asked):
    taken = asked("tools/take_prompts.py", ITERS=2)
    assert each(taken, "--iteration") == [["1"], ["2"]]
    assert each(taken, "--num_prompts") == [["40"]] * 2
    assert each(taken, "--heldout") == [["heldout.jsonl"]] * 2


@pytest.mark.parametrize(
    ("script", "setting", "flag"),
    [
        ("generate.py", "GENERATE_ARGS", "--batch_size"),
        ("score.py", "SCORE_ARGS", "--tokens_per_batch"),
        ("make_pairs.py", "PAIRS_ARGS", "--min_margin"),
        ("dpo_train.py", "TRAIN_ARGS", "--beta"),
    ],
)
def test_the_settings_of_a_stage_and_the_seed_reach_it(asked, script, setting, flag):
    commands = asked(script, SEED=7, **{setting: f"{flag} 3"})
    assert commands and each(commands, flag) == [["3"]] * len(commands)
    if script != "score.py":  # which draws nothing
        assert each(commands, "--seed") == [["7"]] * len(commands)


@pytest.mark.parametrize(("script", "processes"), [("generate.py", "2"), ("dpo_train.py", "3")])
def test_a_stage_runs_in_as_many_processes_as_was_said(asked, script, processes):
    for command in asked(script, NPROC=3, GENERATE_NPROC=2):
        at = command.launcher.index("--nproc_per_node")
        assert command.launcher[at + 1] == processes and "--standalone" in command.launcher


def test_the_bench_of_all_settings_has_every_setting(tmp_path):
    """And none with its default, but the number of iterations."""
    script = (ROOT / "iterate.sh").read_text()
    default_of = dict(re.findall(r"^setting ([A-Z_]+) *([^#\s]*)", script, re.M))
    runs = [kind(tmp_path, python="python") for kind in (Served, ByUrl)]
    runs[1].url = "http://localhost:1/v1"
    for name, default in default_of.items():
        values = {str(run.given().get(name, "")) for run in runs}
        assert values - {""} - ({default} if name != "ITERS" else set()), name
