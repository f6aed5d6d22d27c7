"""Hugging Face's package `kernels` may be installed beside ours of the same name, as in a user's
own environment.

transformers imports it if it finds a version that it knows. Here a stand-in comes after the
repository on Python's path, as site-packages does: the repository's folder hides it, and
kernels-0.dist-info tells transformers so.
"""

import os
import subprocess
import sys

import pytest
from transformers.utils.import_utils import KERNELS_MIN_VERSION

import small_models
from conftest import ROOT
from records import dump

# What transformers takes from the package when it is imported, doing nothing.
STAND_IN = """
CUDAProperties = Device = KernelizeFallback = object
LayerRepository = LocalLayerRepository = Mode = ROCMProperties = object


def decorate(*_, **__):
    return lambda thing: thing


register_kernel_mapping = replace_kernel_forward_from_hub = use_kernel_mapping = decorate
get_kernel = kernelize = decorate
use_kernel_forward_from_hub = use_kernelized_func = use_kernel_func_from_hub = decorate
"""

OF_THE_PATH = """
import kernels
import transformers.modeling_utils
from transformers.utils import is_kernels_available

print(is_kernels_available(), kernels.__file__)
"""

EVERYTHING = """
import importlib, multiprocessing, sys

for name in sys.argv[1:]:
    importlib.import_module(name)

# a process that is spawned, as vLLM's engine is, looks along the same path
child = multiprocessing.get_context("spawn").Process(
    target=importlib.import_module, args=("transformers.modeling_utils",)
)
child.start()
child.join()
assert child.exitcode == 0

from kernels.logprob import linear_logprob
print(linear_logprob.__code__.co_filename)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment in which the stand-in is installed."""
    site = tmp_path_factory.mktemp("site")
    (site / "kernels").mkdir()
    (site / "kernels/__init__.py").write_text(STAND_IN)
    metadata = site / f"kernels-{KERNELS_MIN_VERSION}.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    # Some versions of transformers ask Python which distribution the folder belongs to.
    metadata.with_name("top_level.txt").write_text("kernels\n")
    return {"PYTHONPATH": str(site)}


def run(code, *arguments, cwd, env):
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_elsewhere_transformers_takes_the_stand_in(installed, tmp_path):
    """Without this, the tests below could not fail."""
    found, file = run(OF_THE_PATH, cwd=tmp_path, env=installed).split()
    assert found == "True"
    assert file == f"{installed['PYTHONPATH']}/kernels/__init__.py"


def test_pitfalls_53_every_file_of_ours_imports_ours(installed):
    files = list(ROOT.glob("*.py"))
    for folder in ("kernels", "training", "demo", "bench"):
        files += ROOT.glob(f"{folder}/*.py")
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    assert {"generate", "score", "dpo_train", "bench.train", "demo.build"} <= set(names)
    assert run(EVERYTHING, *names, cwd=ROOT, env=installed).strip() == str(
        ROOT / "kernels/logprob.py"
    )


def test_pitfalls_53_every_stage_runs(installed, stage, tmp_path):
    small_models.causal_lm(tmp_path / "policy")
    small_models.reward_model(tmp_path / "reward")
    prompts = [
        {"id": f"p{i}", "prompt": [{"role": "user", "content": f"name {i} fruits"}]}
        for i in range(4)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(map(dump, prompts)))
    policy, reward, trained = tmp_path / "policy", tmp_path / "reward", tmp_path / "trained"
    candidates, scored, pairs = (
        tmp_path / f"{name}.jsonl" for name in ("candidates", "scored", "pairs")
    )
    sampling = "--backend hf --num_samples 4 --max_new_tokens 8".split()
    commands = [
        [
            "generate.py",
            "--model",
            policy,
            "--prompts",
            tmp_path / "prompts.jsonl",
            "--output",
            candidates,
            *sampling,
        ],
        ["score.py", "--reward_model", reward, "--candidates", candidates, "--output", scored],
        ["make_pairs.py", "--scored", scored, "--output", pairs, "--keep_truncated"],
        ["dpo_train.py", "--model", policy, "--pairs", pairs, "--output", trained],
    ]
    for command in commands:
        stage(*command, env=installed)
    assert (trained / "model.safetensors").exists()
