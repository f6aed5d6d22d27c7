"""generate.py with the real vLLM engine, on the CPU where there is no GPU: the same promises as the
hf backend's.

Starting an engine takes half a minute, so it is done four times, and two at once: most tests share
one engine, while a run of its own is killed and then finished by two ranks.
"""

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import generate
import records
from bench.kill_stages import family
from conftest import ROOT
from small_models import causal_lm
from test_generate import (
    CHAT,
    STOPS,
    TRUNCATIONS,
    check_answers,
    check_truncated,
    chi_square_fits,
    flags_of,
    next_token,
    write_prompts,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vllm is not installed"),
]
PROMPTS = 160  # two parts and a half


def command(folder, output, *flags, nproc=1, prompts="prompts.jsonl"):
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
        if nproc > 1
        else []
    )
    paths = ["--model", folder / "policy", "--prompts", folder / prompts, "--output", output]
    # Not compiled, so it starts sooner; 64 at once, so that a part is finished before the last one
    # is even read.
    engine = [
        "--backend",
        "vllm",
        "--engine_args",
        "enforce_eager=true",
        "max_num_seqs=64",
        "max_model_len=256",
    ]
    return [
        sys.executable,
        *torchrun,
        str(ROOT / "generate.py"),
        *map(str, [*paths, *engine, *flags]),
    ]


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


FLAGS = ("--max_new_tokens", 16, "--temperature", 0.7, 1.0)


def kill_and_resume(folder):
    """candidates.jsonl, by a run that is killed with -9 after its first part, and finished by two
    ranks.
    """
    output, first = folder / "candidates.jsonl", folder / "candidates.jsonl.parts" / "000000.jsonl"
    with open(folder / "log", "w") as log:
        killed = subprocess.Popen(command(folder, output, *FLAGS), stderr=log)
        while not first.exists() and killed.poll() is None:
            time.sleep(0.02)
        engine = family(killed.pid)
        os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, (folder / "log").read_text()
    assert len(engine) > 1 and gone(engine, 10), "engine processes outlived the stage"
    before = first.read_bytes().splitlines(keepends=True)[2:]

    done = subprocess.run(command(folder, output, *FLAGS, nproc=2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = output.read_bytes().splitlines(keepends=True)
    assert lines[:64] == before  # what was finished before the kill was kept
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def background(folder):
    """The killed run resumes while the tests of the shared engine run: four engines start, and no
    test waits for all four.
    """
    write_prompts(folder / "prompts.jsonl", [CHAT[i % 3] for i in range(PROMPTS)])
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(kill_and_resume, folder)


@pytest.fixture(scope="module")
def resumed(background):
    return background.result()


@pytest.fixture(scope="module")
def run(folder, background):
    """run("name", prompts, *flags) -> rows of name.jsonl: the whole stage, in this process, on one
    engine for all.
    """
    started = []

    def engine(args, policy, start=generate.vllm_engine):
        if not started:
            started.append(start(args, policy))
            started[0].engine_core.shutdown, end = (
                lambda timeout: None,
                started[0].engine_core.shutdown,
            )
            started.append(end)
        return started[0]

    def call(name, prompts, *flags):
        write_prompts(folder / f"{name}_prompts.jsonl", prompts)
        argv = command(folder, folder / f"{name}.jsonl", *flags, prompts=f"{name}_prompts.jsonl")[
            1:
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", argv)
            patch.setattr(generate, "vllm_engine", engine)
            generate.main()
        return [json.loads(line) for line in open(folder / f"{name}.jsonl")]

    yield call
    started[1](timeout=20)


@pytest.fixture(scope="module")
def many(run):
    """10,000 samples of the same prompt at each of two temperatures, as 50 prompts of 400 samples,
    and one too long.
    """
    prompts = [*[CHAT[0]] * 50, [{"role": "user", "content": "fig " * 50}]]
    flags = (
        "--num_samples",
        400,
        "--temperature",
        0.7,
        1.0,
        "--max_new_tokens",
        2,
        "--max_prompt_length",
        40,
    )
    return run("many", prompts, *flags)


# ---- one engine for all ------------------------------------------------------------------------


def test_samples_follow_the_distribution(many, folder):
    """10,000 samples at each temperature against the exact probabilities, two tokens in a row."""
    prompt = many[0]["prompt_token_ids"]
    for temperature in (0.7, 1.0):
        mine = [
            c["token_ids"] for r in many for c in r["candidates"] if c["temperature"] == temperature
        ]
        assert len(mine) == 10_000
        first = Counter(ids[0] for ids in mine)
        assert chi_square_fits(first, next_token(folder / "policy", prompt, temperature))
        assert not chi_square_fits(first, next_token(folder / "policy", prompt, 1.7 - temperature))
        common = next(t for t, _ in first.most_common() if t not in STOPS)
        second = Counter(ids[1] for ids in mine if ids[0] == common)
        assert chi_square_fits(
            second, next_token(folder / "policy", [*prompt, common], temperature)
        )


def test_long_prompts_are_dropped_and_counted(many, folder):
    meta = json.loads((folder / "many.jsonl.meta.json").read_text())
    assert meta["counts"]["rows"] == {"in": 51, "out": 50, "dropped": {"prompt_too_long": 1}}


@pytest.mark.parametrize("number", range(len(TRUNCATIONS)))
def test_truncated_samples_follow_the_distribution(run, folder, number):
    flags = ("--num_samples", 200, "--max_new_tokens", 2, *flags_of(TRUNCATIONS[number]))
    check_truncated(
        run(f"truncated_{number}", [CHAT[0]] * 26, *flags), folder / "policy", TRUNCATIONS[number]
    )


def test_temperature_zero_is_greedy(run, folder):
    (row,) = run(
        "greedy", CHAT[:1], "--temperature", 0, 1.0, "--num_samples", 2, "--max_new_tokens", 6
    )
    ids, model = (
        list(row["prompt_token_ids"]),
        AutoModelForCausalLM.from_pretrained(folder / "policy"),
    )
    for token in row["candidates"][0]["token_ids"]:
        assert token == model(torch.tensor([ids])).logits[0, -1].argmax()
        ids.append(token)


def test_seeds(run):
    """PITFALLS 31: the same prompt under two seeds and two iterations: no answer comes twice."""
    seen, flags = [], ("--max_new_tokens", 16, "--num_samples", 4)
    for seed, iteration in itertools.product((0, 1), (0, 1)):
        rows = run(
            f"seed_{seed}_{iteration}",
            [CHAT[0]] * 8,
            *flags,
            "--seed",
            seed,
            "--iteration",
            iteration,
        )
        seen += [
            tuple(c["token_ids"]) for r in rows for c in r["candidates"] if len(c["token_ids"]) > 4
        ]
    assert len(set(seen)) == len(seen) > 64


# ---- a run that is killed ----------------------------------------------------------------------


def test_resumed_on_two_ranks_nothing_lost_nothing_twice(resumed, folder):
    """PITFALLS 12: killed, then finished by two ranks: all prompts, in order, once, each with its 8
    answers.
    """
    assert [r["id"] for r in resumed] == [f"p{i}" for i in range(PROMPTS)]
    assert all(
        [c["temperature"] for c in r["candidates"]] == [0.7] * 4 + [1.0] * 4 for r in resumed
    )
    meta = json.loads((folder / "candidates.jsonl.meta.json").read_text())
    assert meta["world_size"] == 2 and meta["counts"]["rows"] == {
        "in": PROMPTS,
        "out": PROMPTS,
        "dropped": {},
    }
    assert not (folder / "candidates.jsonl.parts").exists()


def test_answers_hold_what_the_policy_wrote(resumed, folder):
    """Law 1: ids, finish reasons and EOS right; log-probs within 1e-3 of transformers in fp32, at
    any temperature.

    PITFALLS 4, 5, 33. vLLM's own "auto" would compute this fp32 model in bf16, and miss by far
    more.
    """
    check_answers(resumed, folder / "policy", STOPS, 16, tolerance=1e-3)
    reasons = Counter(c["finish_reason"] for r in resumed for c in r["candidates"])
    assert min(reasons["stop"], reasons["length"]) > 50


def test_samples_differ(resumed):
    """PITFALLS 31: no two of a prompt's samples, and no two prompts of the same text, share their
    random numbers.
    """
    for text in range(3):
        same = [r for i, r in enumerate(resumed) if i % 3 == text]
        answers = [
            tuple(c["token_ids"]) for r in same for c in r["candidates"] if len(c["token_ids"]) > 4
        ]
        assert len(set(answers)) == len(answers) > 100


def test_the_same_run_again(run, resumed, folder):
    """One engine that has answered others before, against two that took over from a killed one.

    vLLM's documentation promises equality for one schedule only. On a CPU more holds: every row of
    a batch is computed as if it were alone, so the file is the same, bit for bit. On a GPU rounding
    depends on the batch.
    """
    rows = run("again", [CHAT[i % 3] for i in range(PROMPTS)], *FLAGS)
    if torch.cuda.is_available():
        ids = [[c["token_ids"] for r in file for c in r["candidates"]] for file in (rows, resumed)]
        assert sum(a == b for a, b in zip(*ids, strict=True)) > 0.5 * len(ids[0])
    else:
        assert (folder / "again.jsonl").read_bytes() == (folder / "candidates.jsonl").read_bytes()


# ---- no engine ---------------------------------------------------------------------------------


def test_engine_arguments_are_checked_before_the_engine_starts(folder, monkeypatch):
    """A misspelt argument, or one that this stage sets itself, is an error that says so."""
    for argument, message in (
        ("max_num_seq=1", "no such argument"),
        ("dtype=half", "this stage sets it itself"),
    ):
        call = command(folder, "o", "--max_new_tokens", 4)[2:]
        monkeypatch.setattr(sys, "argv", ["generate.py", *call, "--engine_args", argument])
        args = generate.read_arguments()
        with pytest.raises(records.Stop, match=message):
            generate.vllm_settings(args, generate.Policy(args))


def engine_config(folder, prompt_length, monkeypatch):
    """vLLM's whole configuration, by its own code, for the engine that generate.py would start."""
    from vllm import LLMEngine

    write_prompts(folder / "prompts.jsonl", ["a" * prompt_length])
    paths = [
        "--model",
        folder / "policy",
        "--prompts",
        folder / "prompts.jsonl",
        "--output",
        folder / "o",
    ]
    argv = ["generate.py", *paths, "--backend", "vllm", "--max_new_tokens", 16]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))

    def configure(engine_args, usage_context):
        return engine_args.create_engine_config(usage_context)

    monkeypatch.setattr(LLMEngine, "from_engine_args", configure)
    args = generate.read_arguments()
    policy = generate.Policy(args)
    policy.check_prompts(args.prompts)
    return generate.vllm_engine(args, policy)


def test_every_iteration_finds_what_vllm_compiled_in_the_first(tmp_path, monkeypatch):
    """Other folders, weights and prompt lengths: the key of vLLM's compile cache stays. Another
    model's is another.
    """
    here = os.getcwd()
    keys = []
    for iteration, prompt_length, hidden_size in ((1, 30, 64), (2, 70, 64), (3, 30, 128)):
        folder = tmp_path / f"iter_{iteration:02d}"
        shape = {"hidden_size": hidden_size, "max_position_embeddings": 2048}
        causal_lm(folder / "policy", seed=iteration, **shape)
        config = engine_config(folder, prompt_length, monkeypatch)
        assert config.model_config.max_model_len == 1024
        keys.append(config.compute_hash())
    assert keys[0] == keys[1] != keys[2]
    assert os.getcwd() == here


@pytest.mark.parametrize(
    ("longest", "context", "length"), [(1008, 4096, 1024), (1009, 4096, 2048), (1009, 1100, 1100)]
)
def test_the_engine_s_length_is_rounded_up_but_never_beyond_the_context(longest, context, length):
    policy = SimpleNamespace(longest=longest, context=context)
    assert generate.engine_length(policy, max_new_tokens=16) == length


@pytest.mark.parametrize(
    ("asked", "overrides"),
    [
        ([], {"head_dtype": "float32"}),
        (['hf_overrides={"head_dtype":"model"}'], {"head_dtype": "model"}),
        (['hf_overrides={"rope_theta":1e6}'], {"head_dtype": "float32", "rope_theta": 1e6}),
    ],
)
def test_on_a_gpu_logits_are_fp32_unless_the_user_says_otherwise(
    folder, monkeypatch, asked, overrides
):
    call = command(folder, "o", "--max_new_tokens", 4)[2:]
    engine = call.index("max_model_len=256") + 1
    monkeypatch.setattr(sys, "argv", ["generate.py", *call[:engine], *asked, *call[engine:]])
    args = generate.read_arguments()
    policy = generate.Policy(args)
    for device, expected in (
        (True, overrides),
        (False, {k: v for k, v in overrides.items() if asked and k in asked[0]}),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda device=device: device)
        assert generate.vllm_settings(args, policy)["hf_overrides"] == expected


def test_overrides_that_are_no_json_object_are_refused():
    with pytest.raises(records.Stop, match="give a JSON object"):
        generate.merge_overrides({}, "head_dtype")


@pytest.mark.parametrize("head, dtype", [("float32", torch.float32), ("model", torch.bfloat16)])
def test_vllm_reads_the_head_s_dtype(folder, head, dtype):
    """Its own property, by which it chooses the product that gives the logits."""
    from vllm import EngineArgs

    settings = {
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "hf_overrides": {"head_dtype": head},
    }
    config = EngineArgs(model=str(folder / "policy"), **settings).create_model_config()
    assert config.head_dtype == dtype


@pytest.mark.parametrize(
    ("visible", "count", "rank", "each", "own"),
    [
        (None, 4, 1, 2, "2,3"),
        ("3,1", 2, 1, 1, "1"),
        ("0,-1,1", 1, 0, 1, "0"),
        ("GPU-aaaa,GPU-bbbb", 2, 1, 1, "GPU-bbbb"),
        ("MIG-cccc,MIG-dddd", 1, 0, 1, "MIG-cccc"),
    ],
)
def test_each_engine_gets_its_share_of_the_visible_gpus(
    monkeypatch, visible, count, rank, each, own
):
    pretend_gpus(monkeypatch, visible, count, rank, ranks=count // each)
    generate.vllm_environment(SimpleNamespace(tensor_parallel_size=each))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own


def test_an_engine_wider_than_what_a_process_sees_is_refused(monkeypatch):
    """Two MIG devices are visible, and CUDA shows a process one of them."""
    pretend_gpus(monkeypatch, "MIG-cccc,MIG-dddd", count=1, rank=0, ranks=1)
    with pytest.raises(
        records.Stop, match="--tensor_parallel_size 2 takes 2 GPUs, and this process sees 1"
    ):
        generate.vllm_environment(SimpleNamespace(tensor_parallel_size=2))


def pretend_gpus(monkeypatch, visible, count, rank, ranks):
    """torch finds `count` GPUs, and torchrun started this process as one of `ranks` ranks."""
    for name in (
        "VLLM_WORKER_MULTIPROC_METHOD",
        "VLLM_LOGGING_LEVEL",
        "VLLM_NO_USAGE_STATS",
        "CUDA_VISIBLE_DEVICES",
    ):
        monkeypatch.setenv(name, "")  # so that what the stage sets is undone after the test
        monkeypatch.delenv(name)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
