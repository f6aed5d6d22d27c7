"""The log of a training, and what a dashboard is sent: the same rows, each of them once."""

import json
import sys
from types import SimpleNamespace

import pytest

from records import dump
from small_models import causal_lm
from training.log import TrainLog

# wandb and trackio are no requirements, and want an account or a server. Here each is a module that
# writes down how it is called, found as the real one would be.
TRACKER = """
import json, os

def write_down(*call):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(call) + "\\n")

def init(project, name):
    write_down("init", project, name)

def log(row, step):
    write_down("log", row, step)
"""


def pairs_of_text(count):
    rows = []
    for i in range(count):
        row = {"prompt": [{"role": "user", "content": f"question {i}"}]}
        for name in ("chosen", "rejected"):
            row[name] = [{"role": "assistant", "content": f"{name} {i}"}]
        rows.append(row)
    return rows


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_is_sent_every_row_of_the_log(stage, tmp_path, tracker):
    causal_lm(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(map(dump, pairs_of_text(6))))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / f"{tracker}.py").write_text(TRACKER)
    env = {"PYTHONPATH": str(tmp_path / "site"), "CALLS": str(tmp_path / "calls.jsonl")}
    paths = ["--model", tmp_path / "model", "--pairs", tmp_path / "pairs.jsonl"]
    paths += ["--output", tmp_path / "out" / "policy"]
    flags = ["--batch_size", "2", "--learning_rate", "1e-3", "--report_to", tracker]
    stage("dpo_train.py", *paths, *flags, env=env)

    (log,) = (tmp_path / "out").glob("*train.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert calls[0] == ["init", "iterdpo", "policy"]
    assert calls[1:] == [["log", row, row["step"]] for row in rows] and len(rows) == 3


def test_tensorboard_is_sent_every_number_and_at_once(tmp_path, monkeypatch):
    """Flushed after each row: a dashboard shows the step that has just ended."""
    shown, waiting = [], []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            waiting.append((name, value, step))

        def flush(self):
            shown.extend(waiting)
            waiting.clear()

    # torch's own module cannot be imported where the package tensorboard is missing
    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    (tmp_path / "policy.parts").mkdir()
    log = TrainLog(tmp_path / "policy.parts" / "train.jsonl", 0, "tensorboard")
    assert log.tensorboard.folder == str(tmp_path / "policy.tensorboard")
    for step in (1, 2):
        log.write({"step": step, "loss": 0.5 / step})
        assert shown[-2:] == [("step", step, step), ("loss", 0.5 / step, step)]
    assert len(shown) == 4


def test_rows_after_the_checkpoint_are_cut_off(tmp_path):
    """Steps that a kill has undone are done again, and stand in the log once."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(dump({"step": step}) for step in (1, 2, 3)) + '{"st')
    log = TrainLog(path, 2, "none")
    log.write({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
