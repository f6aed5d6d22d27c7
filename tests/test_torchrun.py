"""tools/torchrun.py: what a rank says stands last, and its exit code is kept. Two real ranks."""

import os
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from conftest import ROOT
from records import Stop
from tools import torchrun

# Rank 1 does what the first argument says, and rank 0 waits for it.
RANKS = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
from records import Stop
from stage import barrier, ranks, run

def main():
    rank, _ = ranks()
    what = sys.argv[1]
    if what == "wait":
        print("waiting", rank, flush=True)
        time.sleep(60)
    if rank == 1 and what.isdecimal():
        sys.exit(int(what))
    dist.init_process_group("gloo")
    barrier()
    if rank == 1 and what == "stop":
        raise Stop("x.jsonl: no such file.")
    barrier()

run(main)
"""

OURS = [ROOT / "tools/torchrun.py"]
THEIRS = ["-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "ranks.py"
    path.write_text(RANKS)
    return path


def start(launcher, *words):
    flags = ["--standalone", "--nproc_per_node", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {k: v for k, v in os.environ.items() if k != "LOGLEVEL"}
    return subprocess.Popen(
        [sys.executable, *launcher, *flags, *words], env=environment, cwd=ROOT, **pipes
    )


def ended(process) -> tuple[int, str]:
    """The exit code, and what was said."""
    _, said = process.communicate(timeout=120)
    return process.returncode, said


def test_the_message_of_a_rank_is_all_that_is_said(script):
    """Rank 0 is in a collective, which fails when rank 1 has ended."""
    assert ended(start(OURS, script, "stop")) == (1, "error: x.jsonl: no such file.\n")


def test_the_exit_code_is_that_of_the_rank(script):
    assert ended(start(OURS, script, "75")) == (75, "")


def test_a_rank_that_was_killed_is_named(capsys):
    killed = ProcessFailure(local_rank=1, pid=2, exitcode=-signal.SIGKILL, error_file="")
    with pytest.raises(SystemExit) as end:
        torchrun.leave_as(ChildFailedError("x.py", {1: killed}))
    assert end.value.code == 128 + signal.SIGKILL
    said = capsys.readouterr().err
    assert said == "error: rank 1 was killed (SIGKILL). The system does so when memory runs out.\n"


def test_sigterm_ends_all_ranks(script):
    process = start(OURS, script, "wait")
    waiting = sorted(process.stdout.readline() for _ in range(2))
    assert waiting == ["waiting 0\n", "waiting 1\n"]
    began = time.monotonic()
    process.terminate()
    assert ended(process) == (128 + signal.SIGTERM, "")
    assert time.monotonic() - began < 30  # until torchrun would kill them


@pytest.mark.parametrize("flags", ["-rf", "--nnodes x", "--nosuch", "--rdzv_backend nosuch"])
def test_a_mistake_in_the_arguments_is_one_sentence(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["torchrun.py", *flags.split(), "x.py"])
    monkeypatch.setenv("LOGLEVEL", "WARNING")  # else it would switch off the logs of this process
    with pytest.raises(Stop, match="^error: torchrun: .*. Correct NPROC or TORCHRUN_ARGS"):
        torchrun.main()


def test_torchrun_itself_ends_with_the_message(script):
    """There it stands in a table, below a traceback of torchrun's."""
    code, said = ended(start(THEIRS, script, "stop"))
    assert code == 1 and said.count("error: x.jsonl: no such file.\n") == 2
    assert said.splitlines()[-2].endswith(": error: x.jsonl: no such file.")
