"""Hostile input files for every stage and tool. The rule, which knows no exception:

    accepted    exit code 0, and rows in = rows out + named drops
    refused     one message that names the damaged file, an exit code, and no output

    python -m pytest tests/test_fuzz.py                                   a few inputs of each
    python -m pytest tests/test_fuzz.py --fuzz 10000 --hypothesis-seed 1  many, and others

With --fuzz the outcomes are counted and printed. A finding is shown with the input that led to it.
"""

import json
import shutil
import sys
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings

import dpo_train
import generate
import judge
import make_pairs
import score
import stage
from conftest import ROOT
from damage import damaged, damaged_bytes, damaged_json
from records import dump, remove
from small_models import causal_lm, reward_model
from test_judge import Server
from test_report import small_run

sys.path.insert(0, str(ROOT / "tools"))
import prepare_prompts
import report
import take_prompts

FEW = 25  # inputs of each kind, without --fuzz


# ---- the rule ----------------------------------------------------------------------------------


class Broken(AssertionError):
    """The rule was broken, in words."""


def run_once(main, argv: list, path: Path) -> str:
    """Run a stage in this process, on the damaged file `path`: "accepted" or "refused"."""
    sys.argv = list(map(str, argv))
    try:
        stage.run(main)
    except SystemExit as end:
        message = str(end.code)
        if not message.startswith("error: "):
            raise Broken(f"ended with {message!r}") from None
        if str(path) not in message:
            raise Broken(f"the message does not name {path}: {message}") from None
        return "refused"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return "accepted"


def check_balance(output: Path, rows_in: int) -> None:
    counts = json.loads(Path(f"{output}.meta.json").read_text())["counts"]
    for what, count in counts.items():
        if count["in"] != count["out"] + sum(count["dropped"].values()):
            raise Broken(f"{what}: {count}")
    if counts["rows"]["in"] != rows_in:
        raise Broken(f"{rows_in} rows in the file, {counts['rows']['in']} counted")


def fuzz(request, name: str, valid: bytes, strategy, once, files: int = 1) -> None:
    """Call once(bytes) -> outcome on many inputs, and fail with all that broke the rule.

    valid: the input before it is damaged. Were it refused, all others would be for the same reason.
    files: how many tests share the number of --fuzz, one for each file that a tool reads.
    """
    assert once(valid) == "accepted", f"{name}: the input is refused though nothing is damaged"
    many = request.config.getoption("--fuzz") // files
    outcomes: Counter = Counter()
    findings: dict[str, bytes] = {}  # what went wrong -> the shortest input

    def check(content: bytes) -> None:
        try:
            outcomes[once(content)] += 1
        except Exception as error:
            outcomes["broken"] += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"
            what = what[:300] if isinstance(error, Broken) else what.partition(": ")[0]
            if what not in findings or len(content) < len(findings[what]):
                findings[what] = content

    options = settings(
        max_examples=many or max(5, FEW // files),
        derandomize=not many,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    options(given(strategy)(check))()
    if many:
        with request.getfixturevalue("capsys").disabled():
            print(f"\n{name}: {outcomes.total():,} inputs: {dict(outcomes)}", flush=True)
    shown = "\n".join(f"{what}\n    {content[:2000]!r}" for what, content in findings.items())
    assert not findings, f"{name}: {len(findings)} findings\n{shown}"


# ---- valid rows --------------------------------------------------------------------------------

PROMPTS = [
    {"id": "p0", "prompt": "name a fruit"},
    {"id": "p1", "prompt": [{"role": "user", "content": "and two?"}], "meta": {"truth": 2}},
    {
        "id": "p2",
        "prompt": [{"role": "system", "content": "short"}, {"role": "user", "content": "three?"}],
    },
]


def candidate(text: str, ids: list[int], reward: float, finish_reason: str = "stop") -> dict:
    return {
        "text": text,
        "token_ids": ids,
        "logprob": -3.5,
        "finish_reason": finish_reason,
        "temperature": 1.0,
        "model": "m",
        "rewards": {"rm": reward},
        "reward": reward,
    }


def scored_rows() -> list[dict]:
    rows = []
    for row in PROMPTS:
        candidates = [
            candidate("plum", [80, 81, 4], 1.0),
            candidate("fig", [90, 4], 0.5),
            candidate("pear pear", [91, 92], -0.25, "length"),
        ]
        rows.append(row | {"prompt_token_ids": [3, 70, 71], "candidates": candidates})
    return rows


def pair_rows() -> list[dict]:
    with_ids = {
        "id": "p0",
        "iteration": 1,
        "prompt": "name a fruit",
        "chosen": "plum",
        "rejected": "fig",
        "score_chosen": 1.0,
        "score_rejected": 0.5,
        "prompt_token_ids": [3, 70, 71],
        "chosen_token_ids": [80, 81, 4],
        "rejected_token_ids": [90, 4],
        "chosen_logprob": -9.0,
        "rejected_logprob": -8.0,
        "chosen_model": "another",
        "rejected_model": "another",
    }
    turns = [{"role": "user", "content": "and two?"}]
    answers = [{"role": "assistant", "content": text} for text in ("plum, fig", "none")]
    foreign = {"prompt": turns, "chosen": answers[:1], "rejected": answers[1:]}
    return [with_ids, foreign, with_ids | {"id": "p2"}]


def jsonl(rows: list[dict]) -> bytes:
    return "".join(map(dump, rows)).encode()


# ---- the stages --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models, a reward function and a judge's server."""
    folder = tmp_path_factory.mktemp("fuzz")
    causal_lm(folder / "model", tie=True)
    reward_model(folder / "rm")
    (folder / "length.py").write_text(
        "def length(prompt, response, meta):\n    return len(response)\n"
    )
    server = Server(lambda a, b: f"Verdict: {'A' if len(a) > len(b) else 'B'}")
    return SimpleNamespace(folder=folder, model=folder / "model", url=server.url)


def lines(content: bytes) -> int:
    return content.count(b"\n") + (not content.endswith(b"\n"))


def of_a_file(tmp_path, main, flag: str, *arguments, rows_in: int | None = None):
    """once(bytes): the stage on a file of these bytes, given by --flag.

    rows_in: of another file that the stage counts; default: the lines of this one.
    """
    path, output = tmp_path / "in.jsonl", tmp_path / "out"
    argv = ["stage.py", f"--{flag}", path, "--output", output, *arguments]

    def once(content: bytes) -> str:
        for left in tmp_path.glob("out*"):
            remove(left)
        path.write_bytes(content)
        outcome = run_once(main, argv, path)
        if outcome == "accepted":
            check_balance(output, rows_in or lines(content))
        elif output.exists():
            raise Broken("refused, and there is an output")
        return outcome

    return once


def test_make_pairs(request, tmp_path):
    once = of_a_file(tmp_path, make_pairs.main, "scored", "--length_penalty", 0.01)
    fuzz(request, "make_pairs", jsonl(scored_rows()), damaged(scored_rows()), once)


def test_generate(request, tmp_path, world):
    flags = ["--model", world.model, "--num_samples", 2, "--max_new_tokens", 3, "--backend", "hf"]
    once = of_a_file(tmp_path, generate.main, "prompts", *flags)
    fuzz(request, "generate", jsonl(PROMPTS), damaged(PROMPTS), once)


def test_score(request, tmp_path, world):
    flags = ["--reward_model", f"mine={world.folder / 'rm'}", "--ref_model", world.model]
    flags += ["--reward_fn", f"{world.folder / 'length.py'}:length"]
    once = of_a_file(tmp_path, score.main, "candidates", *flags)
    fuzz(request, "score", jsonl(scored_rows()), damaged(scored_rows()), once)


def test_judge(request, tmp_path, world):
    flags = ["--judge_url", world.url, "--judge_model", "m"]
    once = of_a_file(tmp_path, judge.main, "candidates", *flags)
    fuzz(request, "judge", jsonl(scored_rows()), damaged(scored_rows()), once)


def test_judges_cache(request, tmp_path, world):
    """A damaged file of replies, which another run has left beside the output."""
    (tmp_path / "in.jsonl").write_text("".join(map(dump, scored_rows())))
    path, output = tmp_path / "out.judge.0.jsonl", tmp_path / "out"
    argv = ["judge.py", "--candidates", tmp_path / "in.jsonl", "--output", output]
    argv += ["--judge_url", world.url, "--judge_model", "m"]

    def once(content: bytes) -> str:
        for left in tmp_path.glob("out*"):
            remove(left)
        path.write_bytes(content)
        outcome = run_once(judge.main, argv, path)
        if outcome == "accepted":
            check_balance(output, len(PROMPTS))
        return outcome

    replies = [{"key": f"{k:064x}", "reply": "Verdict: A"} for k in range(3)]
    fuzz(request, "judge's cache", jsonl(replies), damaged(replies), once)


def test_judges_opponent(request, tmp_path, world):
    """A damaged file of answers that the candidates are compared with."""
    (tmp_path / "ours.jsonl").write_text("".join(map(dump, scored_rows())))
    flags = ["--judge_url", world.url, "--judge_model", "m"]
    flags += ["--candidates", tmp_path / "ours.jsonl"]
    once = of_a_file(tmp_path, judge.main, "opponent", *flags, rows_in=len(PROMPTS))
    fuzz(request, "judge's opponent", jsonl(scored_rows()), damaged(scored_rows()), once)


def test_dpo_train(request, tmp_path, world):
    flags = ["--model", world.model, "--learning_rate", 1e-3, "--dtype", "fp32"]
    once = of_a_file(tmp_path, dpo_train.main, "pairs", *flags)
    fuzz(request, "dpo_train", jsonl(pair_rows()), damaged(pair_rows()), once)


# ---- the tools ---------------------------------------------------------------------------------


def test_take_prompts(request, tmp_path):
    (tmp_path / "heldout.jsonl").write_text(dump({"id": "h", "prompt": "held out"}))
    flags = ["--heldout", tmp_path / "heldout.jsonl", "--iteration", 1, "--num_prompts", 2]
    once = of_a_file(tmp_path, take_prompts.main, "prompts", *flags)
    fuzz(request, "take_prompts", jsonl(PROMPTS), damaged(PROMPTS), once)


def test_prepare_prompts(request, tmp_path):
    once = of_a_file(tmp_path, prepare_prompts.main, "dataset", "--meta", "id")
    fuzz(request, "prepare_prompts", jsonl(PROMPTS), damaged(PROMPTS), once)


def test_prepare_prompts_from_an_array(request, tmp_path):
    path, output = tmp_path / "in.json", tmp_path / "out"

    def once(content: bytes) -> str:
        for left in tmp_path.glob("out*"):
            remove(left)
        path.write_bytes(content)
        argv = ["prepare_prompts.py", "--dataset", path, "--output", output]
        return run_once(prepare_prompts.main, argv, path)

    valid = json.dumps(PROMPTS).encode()
    fuzz(request, "prepare_prompts, an array", valid, damaged_json(PROMPTS), once)


RUN_FILES = [
    "config.json",
    "iter_01/pairs.jsonl",
    "iter_01/scored.jsonl",
    "iter_01/policy.train.jsonl",
    "iter_01/policy.meta.json",
    "iter_01/eval/scored.jsonl",
    "iter_01/eval/scored.jsonl.meta.json",
    "iter_00/eval/scored.jsonl",
    "iter_00/eval/candidates.jsonl.meta.json",
]


@pytest.mark.parametrize("name", RUN_FILES)
def test_report(request, tmp_path, name):
    whole = small_run(tmp_path / "whole")
    (whole / "config.json").write_text(json.dumps({"MODEL": "m", "REF": "prev"}))
    run = tmp_path / "run"
    text = (whole / name).read_text()
    if name.endswith("l"):
        strategy = damaged([json.loads(line) for line in text.splitlines()])
    else:
        strategy = damaged_json(json.loads(text))

    def once(content: bytes) -> str:
        remove(run)
        shutil.copytree(whole, run)
        (run / name).write_bytes(content)
        outcome = run_once(report.main, ["report.py", run], run / name)
        if outcome == "refused" and (run / "report.html").exists():
            raise Broken("refused, and there is a report")
        return outcome

    fuzz(request, f"report, {name}", text.encode(), strategy, once, len(RUN_FILES))


# ---- models ------------------------------------------------------------------------------------

MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
]


@pytest.mark.parametrize("name", MODEL_FILES)
def test_model(request, tmp_path, world, name):
    """A damaged file of a model, in the three stages that load one, by turns."""
    (tmp_path / "prompts.jsonl").write_text("".join(map(dump, PROMPTS)))
    (tmp_path / "scored.jsonl").write_text("".join(map(dump, scored_rows())))
    (tmp_path / "pairs.jsonl").write_text("".join(map(dump, pair_rows())))
    model = tmp_path / "model"
    short = ["--num_samples", 2, "--max_new_tokens", 3, "--backend", "hf"]
    stages = [
        (generate.main, ["--model", model, "--prompts", tmp_path / "prompts.jsonl", *short]),
        (score.main, ["--ref_model", model, "--candidates", tmp_path / "scored.jsonl"]),
        (dpo_train.main, ["--model", model, "--pairs", tmp_path / "pairs.jsonl"]),
    ]
    whole = (world.model / name).read_bytes()
    is_json = name.endswith(".json")
    strategy = damaged_json(json.loads(whole)) if is_json else damaged_bytes(whole)
    shutil.copytree(world.model, model)

    def once(content: bytes) -> str:
        for left in tmp_path.glob("out*"):
            remove(left)
        (model / name).write_bytes(content)
        main, flags = stages[len(content) % 3]
        return run_once(main, ["stage.py", *flags, "--output", tmp_path / "out"], model)

    fuzz(request, f"models, {name}", whole, strategy, once, len(MODEL_FILES))
