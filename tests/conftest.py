"""What all test files share: stages run as a user runs them, as processes with arguments and exit
codes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Two processes of two threads each on two cores run ten times slower than two of one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


# --quick: every stage once, in less than two minutes on two cores. A file, or a test of one.
QUICK = (
    "test_house.py",
    "test_records.py",
    "test_chat.py",
    "test_make_pairs.py",
    "test_generate.py::test_answers_hold_what_the_policy_wrote",
    "test_score.py::test_one_bos_and_the_reward_models_own_template",
    "test_judge.py::test_win_rates_over_all_pairs_in_both_orders",
    "test_dpo_train.py::test_every_loss_is_its_equation",
    "test_dpo_train.py::test_pitfalls_16",
    "test_dpo_train.py::test_pitfalls_18",
    "test_logprob.py::test_equals_fp64",
    "test_iterate.py::test_one_command_leaves_everything_a_reader_looks_for",
)


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run the tests that take minutes")
    parser.addoption(
        "--fuzz", type=int, default=0, help="hostile inputs of each kind; test_fuzz.py"
    )
    parser.addoption("--quick", action="store_true", help="run every stage once, and little else")


def is_quick(nodeid: str) -> bool:
    """nodeid: tests/test_x.py::test_y[parameters]"""
    name = nodeid.removeprefix("tests/")
    return any(name.startswith(quick) for quick in QUICK)


def pytest_collection_modifyitems(config, items):
    import torch

    if config.getoption("--quick"):
        items[:] = [item for item in items if is_quick(item.nodeid)]
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if "slow" in item.keywords and not config.getoption("--runslow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: --runslow"))


@pytest.fixture(scope="session")
def stage():
    """stage("make_pairs.py", "--scored", path, …) -> CompletedProcess; `nproc=2` goes through
    torchrun.
    """

    def call(script, *arguments, nproc=1, check=True, env=None, timeout=300):
        launcher = [sys.executable]
        if nproc > 1:
            launcher += [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                str(nproc),
            ]
        command = [*launcher, str(ROOT / script), *map(str, arguments)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            timeout=timeout,
        )
        if check and done.returncode:
            raise AssertionError(
                f"{' '.join(command)}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
            )
        return done

    return call
