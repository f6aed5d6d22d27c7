"""The log of a training, and what a dashboard is sent: the same rows, each of them once."""

import json
import sys
from types import SimpleNamespace

import pytest

from records import dump
from small_models import causal_lm
from training.log import TrainLog
from training.tracker import Tracker, TrainingTracker

# wandb and trackio are no requirements, and want an account or a server. Here each is a module that
# writes down how it is called, found as the real one would be. tests/test_tracker.py has the real
# ones, where they are installed.
TRACKER = """
import json, os

def write_down(*call):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(call) + "\\n")

class Run:
    def define_metric(self, name, step_metric=None):
        write_down("define_metric", name, step_metric)

    def log(self, row, step=None):
        write_down("log", row, step)

def init(**settings):
    write_down("init", settings)
    return Run()
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
    begun = [settings for what, settings, *_ in calls if what == "init"]
    assert [(run["project"], run["name"]) for run in begun] == [("iterdpo", "policy")]
    expected = []
    for row in rows:
        step = row.pop("step")
        if tracker == "wandb":  # whose own step only counts calls
            expected.append(["log", {**row, "global_step": step}, None])
        else:
            expected.append(["log", row, step])
    assert [call for call in calls if call[0] == "log"] == expected and len(rows) == 3


def test_tensorboard_is_sent_every_number_and_at_once(tmp_path, monkeypatch):
    """Flushed after each row: a dashboard shows the step that has just ended."""
    shown, waiting = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            self.folder = folder

        def add_scalar(self, name, value, step):
            waiting.append((name, value, step))

        def flush(self):
            shown.extend(waiting)
            waiting.clear()

    # torch's own module cannot be imported where the package tensorboard is missing
    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    shown_run = Tracker("tensorboard", "policy", tmp_path)
    assert shown_run.client.writer.folder == str(tmp_path / "policy")
    log = TrainLog(tmp_path / "train.jsonl", 0, TrainingTracker(shown_run, 1, 10))
    for step in (1, 2):
        log.write({"step": step, "epoch": step, "loss": 0.5 / step})
        assert shown[-2:] == [("epoch", step, 10 + step), ("loss", 0.5 / step, 10 + step)]
    assert len(shown) == 4


def test_rows_after_the_checkpoint_are_cut_off(tmp_path):
    """Steps that a kill has undone are done again, and stand in the log once."""
    path = tmp_path / "train.jsonl"
    log = TrainLog(path, 0)
    for step in (1, 2, 3):
        log.write({"step": step})
    path.write_text(path.read_text() + '{"st')
    log = TrainLog(path, 2)
    log.write({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_an_evaluation_is_no_step_and_is_done_again_behind_the_checkpoint(tmp_path):
    path = tmp_path / "train.jsonl"
    written = [("eval_loss", 0), ("loss", 1), ("eval_loss", 1), ("loss", 2), ("eval_loss", 2)]
    rows = [{"step": step, name: 0.5} for name, step in written]
    for steps, kept in ((2, 4), (1, 2), (0, 0)):
        log = TrainLog(path, 0)
        for row in rows:
            log.write(row)
        TrainLog(path, steps)
        assert path.read_text() == "".join(map(dump, rows[:kept]))
        with pytest.raises(SystemExit, match=f"holds {steps} of the 3 steps"):
            TrainLog(path, 3)
