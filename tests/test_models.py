"""models.py: a hub name is one commit for a whole run, the model is whole, and its own code never
runs.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dpo_train
import generate
import models
import score
from conftest import ROOT
from records import Stop, dump
from small_models import causal_lm, reward_model
from stage import hash_path
from training import fsdp

POLICY, ENHANCER, REWARD = "fruit/policy", "fruit/enhancer", "fruit/reward"


def publish(cache: Path, name: str, folder: Path, branch: str = "main") -> str:
    """Put `folder` into the cache as the hub's client keeps a download, and return its commit.

    Contents are in blobs/ under their hashes, a commit is a folder of links to them, and a branch
    is a file that names a commit.
    """
    repository = cache / ("models--" + name.replace("/", "--"))
    commit = hashlib.sha1(hash_path(folder).encode()).hexdigest()
    for file in folder.rglob("*"):
        if not file.is_file():
            continue
        blob = repository / "blobs" / hash_path(file)
        link = repository / "snapshots" / commit / file.relative_to(folder)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            shutil.copyfile(file, blob)
            link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    return commit


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache that this process reads; conftest.py has set HF_HUB_OFFLINE."""
    cache = tmp_path / "hf/hub"
    cache.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    models.locate.cache_clear()
    yield cache
    models.locate.cache_clear()


def prompts(path: Path, first: int, last: int) -> Path:
    rows = [
        {"id": f"p{i}", "prompt": [{"role": "user", "content": f"name fruit {i}"}]}
        for i in range(first, last)
    ]
    path.write_text("".join(map(dump, rows)))
    return path


def candidates(path: Path) -> Path:
    answer = {
        "text": "fig",
        "token_ids": [9, 4],
        "logprob": -3.0,
        "finish_reason": "stop",
        "model": "m",
    }
    row = {
        "id": "p0",
        "prompt": [{"role": "user", "content": "a fruit"}],
        "prompt_token_ids": [7, 8],
    }
    path.write_text(dump({**row, "candidates": [answer, {**answer, "token_ids": [10, 4]}]}))
    return path


def pairs(path: Path) -> Path:
    row = {"id": "p0", "prompt": "a fruit: ", "chosen": "fig", "rejected": "wolf"}
    ids = {"prompt_token_ids": [7, 8], "chosen_token_ids": [9, 4], "rejected_token_ids": [10, 4]}
    path.write_text(dump({**row, **ids}))
    return path


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(stage, "--flag", value, …): a stage's main() in this process, on a tiny file."""
    inputs = {
        generate: [
            "--prompts",
            prompts(tmp_path / "prompts.jsonl", 0, 2),
            "--max_new_tokens",
            4,
            "--num_samples",
            2,
        ],
        score: ["--candidates", candidates(tmp_path / "candidates.jsonl")],
        dpo_train: ["--pairs", pairs(tmp_path / "pairs.jsonl")],
    }

    def call(stage, *flags, output="out"):
        arguments = [f"{stage.__name__}.py", *inputs[stage], "--output", tmp_path / output, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        stage.main()

    yield call
    if torch.distributed.is_initialized():  # a refused dpo_train.py leaves its group behind
        torch.distributed.destroy_process_group()


# ---- names and commits -------------------------------------------------------------------------


def test_a_name_is_a_branch_a_tag_or_a_commit(hub, tmp_path):
    """PITFALLS 40: the commit that the client's cache names, for each way to name one."""
    causal_lm(tmp_path / "old", seed=0, template=None)
    causal_lm(tmp_path / "new", seed=1, template=None)
    old = publish(hub, POLICY, tmp_path / "old", branch="v1")
    new = publish(hub, POLICY, tmp_path / "new")
    assert hash_path(POLICY) == hash_path(f"{POLICY}@main") == f"hub:{POLICY}@{new}"
    assert hash_path(f"{POLICY}@v1") == hash_path(f"{POLICY}@{old}") == f"hub:{POLICY}@{old}"
    assert models.pinned(f"{POLICY}@v1") == f"{POLICY}@{old}"

    for name, folder in ((POLICY, "new"), (f"{POLICY}@v1", "old"), (f"{POLICY}@{old}", "old")):
        loaded = models.load_model(AutoModelForCausalLM, name, "auto", "eager").state_dict()
        theirs = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.equal(loaded[key], theirs[key]) for key in theirs), name


def test_within_a_process_a_name_keeps_its_commit(hub, tmp_path):
    """What is hashed first is what is loaded later, whatever was pushed in between."""
    causal_lm(tmp_path / "old", seed=0, template=None)
    causal_lm(tmp_path / "new", seed=1, template=None)
    old = publish(hub, POLICY, tmp_path / "old")
    assert hash_path(POLICY) == f"hub:{POLICY}@{old}"
    publish(hub, POLICY, tmp_path / "new")
    loaded = models.load_model(AutoModelForCausalLM, POLICY, "auto", "eager").state_dict()
    theirs = load_file(tmp_path / "old/model.safetensors")
    assert all(torch.equal(loaded[key], theirs[key]) for key in theirs)


def test_a_folder_with_an_at_sign_is_a_folder(hub, tmp_path, monkeypatch):
    causal_lm(tmp_path / "fruit/policy@v1", template=None)
    monkeypatch.chdir(tmp_path)
    assert models.split("fruit/policy@v1") == ("fruit/policy@v1", None)
    assert models.pinned("fruit/policy@v1") == "fruit/policy@v1"
    assert hash_path("fruit/policy@v1") == hash_path(tmp_path / "fruit/policy@v1")
    assert models.load_config("fruit/policy@v1").vocab_size == 307


@pytest.mark.parametrize(
    "name", ["fruit/nobody", "nobody", "fruit/policy@v9", "fruit/policy@", "a/b/c", "./x", "/x/y"]
)
def test_no_such_model_offline_is_one_clear_line(hub, tmp_path, name, run):
    causal_lm(tmp_path / "model")
    publish(hub, POLICY, tmp_path / "model")
    for call in (hash_path, models.load_config, models.load_tokenizer):
        with pytest.raises(Stop) as stopped:
            call(name)
        message = str(stopped.value)
        assert message.startswith(f"error: {name}: no such file or folder") and "\n" not in message
    with pytest.raises(Stop, match="no such file or folder"):
        run(generate, "--model", name)


def test_two_models_of_one_owner_are_told_apart_by_their_own_names():
    several = [f"{REWARD}@v1", f"{POLICY}@0a1b"]
    assert score.name_models(several, only="rm") == {
        "reward": f"{REWARD}@v1",
        "policy": f"{POLICY}@0a1b",
    }
    assert score.name_models([f"init={POLICY}@v1"], only="ref") == {"init": f"{POLICY}@v1"}


def test_another_commit_under_the_same_name_stops_a_stage(hub, tmp_path, run, capsys):
    """The restart of a stage names both commits."""
    causal_lm(tmp_path / "old", seed=0)
    causal_lm(tmp_path / "new", seed=1)
    old = publish(hub, POLICY, tmp_path / "old")
    run(generate, "--model", POLICY)
    capsys.readouterr()
    run(generate, "--model", f"{POLICY}@{old}")  # the same commit, named in another way
    assert "already done" in capsys.readouterr().out

    new = publish(hub, POLICY, tmp_path / "new")
    models.locate.cache_clear()  # as in a new process
    with pytest.raises(Stop, match=f"--model: was hub:{POLICY}@{old}, is hub:{POLICY}@{new}"):
        run(generate, "--model", POLICY)


def test_vllm_is_told_the_commit_and_to_run_no_code(hub, tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    causal_lm(tmp_path / "model")
    commit = publish(hub, POLICY, tmp_path / "model")
    flags = [
        "--backend",
        "vllm",
        "--model",
        POLICY,
        "--prompts",
        "p",
        "--output",
        "o",
        "--max_new_tokens",
        "4",
    ]
    monkeypatch.setattr(sys, "argv", ["generate.py", *flags])
    args = generate.read_arguments()
    settings = generate.vllm_settings(args, generate.Policy(args))
    assert (settings["model"], settings["revision"], settings["trust_remote_code"]) == (
        POLICY,
        commit,
        False,
    )
    for own in ("trust_remote_code=true", "revision=main"):
        args.engine_args = [own]
        with pytest.raises(Stop, match="this stage sets it itself"):
            generate.vllm_settings(args, generate.Policy(args))


def test_vllm_gets_the_name_and_the_commit_apart(hub, tmp_path, monkeypatch):
    """What the engine itself is started with: vLLM does not support name@revision."""
    vllm = pytest.importorskip("vllm")
    causal_lm(tmp_path / "model")
    commit = publish(hub, POLICY, tmp_path / "model")
    paths = ["--model", POLICY + "@main", "--prompts", "p", "--output", "o"]
    argv = ["generate.py", *paths, "--backend", "vllm", "--max_new_tokens", "4"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(vllm, "EngineArgs", lambda **given: given)
    started = []
    monkeypatch.setattr(
        vllm.LLMEngine, "from_engine_args", lambda given, usage_context: started.append(given)
    )
    args = generate.read_arguments()
    generate.vllm_engine(args, generate.Policy(args))
    assert (started[0]["model"], started[0]["revision"]) == (POLICY, commit)


# ---- the loop, by name -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Policy, enhancer and reward model on the hub's cache, and two iterations with nothing but
    their names.
    """
    folder = tmp_path_factory.mktemp("world")
    causal_lm(folder / "policy", tie=True)
    causal_lm(folder / "enhancer", seed=1)
    reward_model(folder / "reward")
    cache = folder / "hf/hub"
    commits = {
        name: publish(cache, name, folder / name.split("/")[1])
        for name in (POLICY, ENHANCER, REWARD)
    }
    settings = {
        "PYTHON": sys.executable,
        "HF_HOME": folder / "hf",
        "HF_HUB_CACHE": cache,
        "HF_HUB_OFFLINE": 1,
        "MODEL": POLICY,
        "ENHANCER": ENHANCER,
        "REWARD_MODEL": REWARD,
        "REF": "init",
        "ITERS": 2,
        "PROMPTS": prompts(folder / "prompts.jsonl", 0, 8),
        "HELDOUT": prompts(folder / "heldout.jsonl", 8, 10),
        "RUN": folder / "run",
        "PROMPTS_PER_ITER": 4,
        "NUM_SAMPLES": 2,
        "EVAL_SAMPLES": 1,
        "NPROC": 1,
        "KEEP": "last",
        "GENERATE_ARGS": "--max_new_tokens 6 --backend hf",
        "PAIRS_ARGS": "--keep_truncated",
        "TRAIN_ARGS": "--learning_rate 1e-3 --batch_size 4",
    }

    def iterate(*command, **more):
        environment = os.environ | {name: str(value) for name, value in (settings | more).items()}
        command = command or ["bash", ROOT / "iterate.sh"]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = iterate()
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, commits, iterate


def meta(run: Path, output: str) -> dict:
    return json.loads((run / f"{output}.meta.json").read_text())["inputs"]


def test_pitfalls_40_the_whole_loop_by_hub_names(world):
    """Two iterations end, and each thing that was made says which commits it was made with."""
    folder, commits, _ = world
    run = folder / "run"
    policy, enhancer, reward = (
        f"hub:{name}@{commits[name]}" for name in (POLICY, ENHANCER, REWARD)
    )
    trained = hash_path(run / "iter_02/policy")
    assert meta(run, "iter_00/eval/candidates.jsonl")["model"] == policy
    assert meta(run, "iter_01/candidates.jsonl")["model"] == policy
    assert meta(run, "iter_02/enhancer.jsonl")["model"] == enhancer
    assert meta(run, "iter_02/scored.jsonl")["reward_model"] == [reward]
    assert meta(run, "iter_01/policy")["model"] == policy
    assert meta(run, "iter_02/policy")["ref_model"] == policy
    assert meta(run, "iter_02/eval/candidates.jsonl")["model"] == trained
    assert meta(run, "iter_02/eval/scored.jsonl")["ref_model"][0] == policy
    # The audit knew the hub model's answers for its own.
    audit = json.loads((run / "iter_01/policy.meta.json").read_text())["audit"]
    assert audit["answers"] > 0 and audit["mean"] < 1e-3
    wrote = {
        c["model"]
        for line in open(run / "iter_01/scored.jsonl")
        for c in json.loads(line)["candidates"]
    }
    assert wrote == {policy, enhancer}
    # The report, of both references and all iterations.
    rows = [json.loads(line) for line in open(run / "summary.jsonl")]
    assert len(rows) == 3 and "kl/init" in rows[2]
    assert commits[POLICY] in (run / "report.html").read_text()


def test_what_is_trained_from_a_hub_model_is_a_plain_folder(world):
    folder, _, _ = world
    files = list((folder / "run/iter_02/policy").iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        f.name for f in files
    }
    assert all(f.is_file() and not f.is_symlink() for f in files)
    assert not (folder / "run/iter_01/policy").exists()  # KEEP=last


def test_a_changed_commit_is_noticed_at_a_restart_of_the_loop(world):
    """PITFALLS 49, too: the refused restart does not change the record of the run, and what the
    message says works.
    """
    folder, commits, iterate = world
    config = folder / "run/config.json"
    before = config.read_text()
    causal_lm(folder / "pushed", seed=2)
    new = publish(folder / "hf/hub", POLICY, folder / "pushed")
    old = commits[POLICY]
    try:
        refused = iterate()
        assert refused.returncode == 1
        assert (
            f"MODEL was {POLICY}@{old} when this run began, and is {POLICY}@{new} now"
            in refused.stdout
        )
        assert f"MODEL={POLICY}@{old}" in refused.stdout
        assert config.read_text() == before

        # With the commit that the message names, the run resumes.
        pinned = {
            "ENHANCER": f"{ENHANCER}@{commits[ENHANCER]}",
            "REWARD_MODEL": f"{REWARD}@{commits[REWARD]}",
        }
        names = ["MODEL", "REWARD_MODEL", "ENHANCER", "RUN", "HELDOUT"]
        start = [sys.executable, ROOT / "tools/start_run.py", *names]
        assert iterate(*start, MODEL=f"{POLICY}@{new}", **pinned).returncode == 1
        assert iterate(*start, MODEL=f"{POLICY}@{old}", **pinned).returncode == 0
    finally:
        publish(folder / "hf/hub", POLICY, folder / "policy")


def test_the_loop_with_a_name_that_is_not_there_ends_in_one_line(world, tmp_path):
    _, _, iterate = world
    refused = iterate(MODEL="fruit/nobody", RUN=tmp_path / "run")
    assert refused.returncode != 0
    assert refused.stderr.startswith("error: fruit/nobody: no such file or folder")
    assert "Traceback" not in refused.stderr and len(refused.stderr.splitlines()) == 1


# ---- code that comes with a model --------------------------------------------------------------


def plant(folder: Path, marker: Path) -> None:
    """A tokenizer that only a Python file beside it can build; importing that file creates
    `marker`.
    """
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast\n"
    (folder / "planted.py").write_text(code + "class Planted(PreTrainedTokenizerFast): pass\n")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {
        "tokenizer_class": "Planted",
        "auto_map": {"AutoTokenizer": ["planted.Planted", "planted.Planted"]},
    }
    path.write_text(json.dumps(settings))


@pytest.fixture
def says_yes(monkeypatch):
    """A person who answers every question with yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")


def test_no_stage_runs_a_tokenizers_code(tmp_path, run, says_yes):
    marker = tmp_path / "it ran"
    causal_lm(tmp_path / "policy")
    reward_model(tmp_path / "reward")
    plant(tmp_path / "policy", marker)
    plant(tmp_path / "reward", marker)
    for stage, flags in (
        (generate, ["--model", tmp_path / "policy"]),
        (score, ["--reward_model", tmp_path / "reward"]),
        (dpo_train, ["--model", tmp_path / "policy"]),
    ):
        with pytest.raises(
            Stop, match="tokenizer needs code that came with it, which is not run here"
        ):
            run(stage, *flags, output=stage.__name__)
        assert not marker.exists(), stage.__name__


def test_no_stage_runs_a_models_code(tmp_path, run, says_yes):
    """An architecture that only the files beside the weights know."""
    marker = tmp_path / "it ran"
    causal_lm(tmp_path / "model")
    (tmp_path / "model/planted.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    path = tmp_path / "model/config.json"
    own = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"model_type": "planted", "auto_map": own})
    )
    for stage, flags in (
        (generate, ["--model", tmp_path / "model"]),
        (score, ["--reward_model", tmp_path / "model"]),
        (dpo_train, ["--model", tmp_path / "model"]),
    ):
        with pytest.raises(
            Stop, match="config.json needs code that came with it, which is not run here"
        ):
            run(stage, *flags, output=stage.__name__)
        assert not marker.exists(), stage.__name__


# ---- weights -----------------------------------------------------------------------------------


def spoil(folder: Path, key: str, weight: torch.Tensor | None) -> None:
    """Put `weight` in the place of another, or of none."""
    weights = load_file(folder / "model.safetensors")
    weights.pop(key)
    if weight is not None:
        weights[key] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


LOST = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("weight", [None, torch.zeros(3, 5)], ids=["missing", "of another shape"])
def test_a_model_that_is_not_whole_is_refused_everywhere(tmp_path, run, weight):
    for folder, make in (("policy", causal_lm), ("reward", reward_model)):
        make(tmp_path / folder)
        spoil(tmp_path / folder, LOST, weight)
    causal_lm(tmp_path / "whole")
    reward_model(tmp_path / "judge")
    commands = [
        (generate, "--model", tmp_path / "policy", "--backend", "hf"),
        (score, "--reward_model", tmp_path / "reward"),
        (score, "--reward_model", tmp_path / "judge", "--ref_model", tmp_path / "policy"),
        (dpo_train, "--model", tmp_path / "policy"),
        (dpo_train, "--model", tmp_path / "whole", "--ref_model", tmp_path / "policy"),
    ]
    for number, (stage, *flags) in enumerate(commands):
        with pytest.raises(Stop, match=f"hold no weights for {LOST}"):
            run(stage, *flags, output=f"out{number}")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    weights = {
        key: value.clone() for key, value in load_file(tmp_path / "whole/model.safetensors").items()
    }
    with pytest.raises(Stop, match=f"hold no weights for {LOST}"):  # what the export would be like
        fsdp.export(weights, str(tmp_path / "policy"), None, None, tmp_path / "exported")


def test_tied_weights_stand_once_and_are_not_missing(tmp_path):
    """PITFALLS 27."""
    saved = causal_lm(tmp_path / "tied", tie=True)
    assert "lm_head.weight" not in load_file(tmp_path / "tied/model.safetensors")
    loaded = models.load_model(AutoModelForCausalLM, str(tmp_path / "tied"), "auto", "eager")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, saved.lm_head.weight)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_broken_file_is_one_message(tmp_path, run, name):
    causal_lm(tmp_path / "model")
    (tmp_path / "model" / name).write_text("{")
    with pytest.raises(
        Stop, match=r"model: its [\w.]+ cannot be loaded \(.*see that all are there"
    ) as stopped:
        run(generate, "--model", tmp_path / "model")
    assert "\n" not in str(stopped.value)


def test_a_hub_that_fails_is_no_missing_generation_config(hub, tmp_path, monkeypatch):
    """The ids that end an answer may stand nowhere else: Qwen2.5 would lose one of its two."""
    causal_lm(tmp_path / "m")
    (tmp_path / "m/generation_config.json").unlink()
    commit = publish(hub, "org/m", tmp_path / "m")
    config = models.load_config(f"org/m@{commit}")
    assert models.load_generation_config(f"org/m@{commit}", config).eos_token_id is not None

    def fails(*_, **__):
        raise OSError("There was a specific connection error: 503") from ConnectionError("503")

    monkeypatch.setattr(models, "cached_file", fails)
    with pytest.raises(Stop, match="generation_config.json cannot be loaded .*503"):
        models.load_generation_config(f"org/m@{commit}", config)
