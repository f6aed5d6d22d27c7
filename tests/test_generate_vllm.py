"""generate.py with the real vLLM engine, on the CPU where there is no GPU: the same promises as the hf backend's.

Starting an engine takes half a minute or more, so two runs are made and all tests read them: one that is killed and
resumed on two ranks, and one for the distribution.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

import generate
import records
from conftest import ROOT
from models import causal_lm
from test_generate import CHAT, STOPS, check_answers, chi_square_fits, next_token, write_prompts

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vllm is not installed"),
]
PROMPTS = 160  # two parts and a half


def command(folder, output, *flags, nproc=1, prompts="prompts.jsonl"):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)] if nproc > 1 else []
    paths = ["--model", folder / "policy", "--prompts", folder / prompts, "--output", output]
    # Not compiled, so it starts sooner; 64 at once, so that a part is finished before the last one is even read.
    engine = ["--backend", "vllm", "--engine_args", "enforce_eager=true", "max_num_seqs=64"]
    return [sys.executable, *torchrun, str(ROOT / "generate.py"), *map(str, [*paths, *engine, *flags])]


def descendants(pid: int) -> set[int]:
    """The process and all that it started, from /proc."""
    parents = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(entry)] = int(open(f"/proc/{entry}/stat").read().rpartition(")")[2].split()[1])
        except OSError:
            pass
    family = {pid}
    while more := {p for p, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def gone(pids: set[int], seconds: float) -> bool:
    """All have ended (a zombie has) within the time."""

    def running(pid):
        try:
            return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    end = time.monotonic() + seconds
    while any(map(running, pids)) and time.monotonic() < end:
        time.sleep(0.2)
    return not any(map(running, pids))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    causal_lm(folder / "policy", eos=STOPS)
    return folder


@pytest.fixture(scope="module")
def resumed(folder):
    """candidates.jsonl of a run that was killed with -9 after its first part, and finished by two ranks."""
    write_prompts(folder / "prompts.jsonl", [CHAT[i % 3] for i in range(PROMPTS)])
    flags = ("--max_new_tokens", 16, "--temperature", 0.7, 1.0)
    output, first = folder / "candidates.jsonl", folder / "candidates.jsonl.parts" / "000000.jsonl"
    with open(folder / "log", "w") as log:
        killed = subprocess.Popen(command(folder, output, *flags), stderr=log)
        while not first.exists() and killed.poll() is None:
            time.sleep(0.02)
        family = descendants(killed.pid)
        os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, (folder / "log").read_text()
    assert len(family) > 1 and gone(family, 10), "engine processes outlived the stage"
    before = first.read_bytes().splitlines(keepends=True)[1:]

    done = subprocess.run(command(folder, output, *flags, nproc=2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = output.read_bytes().splitlines(keepends=True)
    assert lines[:64] == before  # what was finished before the kill was kept
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def many(folder):
    """10,000 samples of the same prompt at each of two temperatures, as 50 prompts of 400 samples, and one too long."""
    write_prompts(folder / "many.jsonl", [*[CHAT[0]] * 50, [{"role": "user", "content": "fig " * 50}]])
    output = folder / "many_candidates.jsonl"
    flags = ("--num_samples", 400, "--temperature", 0.7, 1.0, "--max_new_tokens", 2, "--max_prompt_length", 40)
    call = command(folder, output, *flags, prompts="many.jsonl")
    subprocess.run(call, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in open(output)]


def test_resumed_on_two_ranks_nothing_lost_nothing_twice(resumed, folder):
    """PITFALLS 12: killed, then finished by two ranks: all prompts, in order, once, each with its 8 answers."""
    assert [r["id"] for r in resumed] == [f"p{i}" for i in range(PROMPTS)]
    assert all([c["temperature"] for c in r["candidates"]] == [0.7] * 4 + [1.0] * 4 for r in resumed)
    meta = json.loads((folder / "candidates.jsonl.meta.json").read_text())
    assert meta["world_size"] == 2 and meta["counts"]["rows"] == {"in": PROMPTS, "out": PROMPTS, "dropped": {}}
    assert not (folder / "candidates.jsonl.parts").exists()


def test_answers_hold_what_the_policy_wrote(resumed, folder):
    """Law 1: ids, finish reasons and EOS right; log-probs within 1e-3 of transformers in fp32, at any temperature.

    PITFALLS 4, 5, 33. vLLM's own "auto" would compute this fp32 model in bf16, and miss by far more.
    """
    check_answers(resumed, folder / "policy", STOPS, 16, tolerance=1e-3)
    reasons = Counter(c["finish_reason"] for r in resumed for c in r["candidates"])
    assert min(reasons["stop"], reasons["length"]) > 50


def test_samples_differ(resumed):
    """PITFALLS 31: no two of a prompt's samples, and no two prompts of the same text, share their random numbers."""
    for text in range(3):
        same = [r for i, r in enumerate(resumed) if i % 3 == text]
        answers = [tuple(c["token_ids"]) for r in same for c in r["candidates"] if len(c["token_ids"]) > 4]
        assert len(set(answers)) == len(answers) > 100


def test_samples_follow_the_distribution(many, folder):
    """10,000 samples at each temperature against the exact probabilities, for two tokens in a row."""
    prompt = many[0]["prompt_token_ids"]
    for temperature in (0.7, 1.0):
        mine = [c["token_ids"] for r in many for c in r["candidates"] if c["temperature"] == temperature]
        assert len(mine) == 10_000
        first = Counter(ids[0] for ids in mine)
        assert chi_square_fits(first, next_token(folder / "policy", prompt, temperature))
        assert not chi_square_fits(first, next_token(folder / "policy", prompt, 1.7 - temperature))
        common = next(t for t, _ in first.most_common() if t not in STOPS)
        second = Counter(ids[1] for ids in mine if ids[0] == common)
        assert chi_square_fits(second, next_token(folder / "policy", [*prompt, common], temperature))


def test_long_prompts_are_dropped_and_counted(many, folder):
    meta = json.loads((folder / "many_candidates.jsonl.meta.json").read_text())
    assert meta["counts"]["rows"] == {"in": 51, "out": 50, "dropped": {"prompt_too_long": 1}}


def test_engine_arguments_are_checked_before_the_engine_starts(folder, monkeypatch):
    """A misspelt argument, or one that this stage sets itself, is an error that says so."""
    for argument, message in (("max_num_seq=1", "no such argument"), ("dtype=half", "this stage sets it itself")):
        call = command(folder, "o", "--max_new_tokens", 4)[2:]
        monkeypatch.setattr(sys, "argv", ["generate.py", *call, "--engine_args", argument])
        args = generate.arguments()
        with pytest.raises(records.Stop, match=message):
            generate.vllm_settings(args, generate.Policy(args))
