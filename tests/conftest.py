"""What every test file shares: stages are run as a user runs them, as processes with arguments and
exit codes.
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


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    import torch

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
