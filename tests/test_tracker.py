"""training/tracker.py with the real packages, read with their own readers: one run for a loop, and
no point twice. A package that is not installed is skipped; tests/test_training_log.py stands in.
"""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from records import Stop
from training import tracker
from training.tracker import Tracker, TrainingTracker, show_heldout


def one_process(report_to, folder, calls):
    """What one process of a loop shows, as dpo_train.py and tools/report.py do it."""
    shown = Tracker(report_to, "demo", Path(folder))
    for what, *arguments in calls:
        if what == "training":
            iteration, steps_before, rows = arguments
            for row in rows:
                TrainingTracker(shown, iteration, steps_before).show(row)
        else:
            show_heldout(shown, *arguments)


PROCESS = """
import json, sys
from test_tracker import one_process
report_to, folder, calls = sys.argv[1:]
one_process(report_to, folder, json.loads(calls))
"""


def steps(first, last, **more):
    return [{"step": s, "epoch": s / 4, "loss": 1 / s} | more for s in range(first, last + 1)]


def evaluation(step):
    return {"step": step, "epoch": step / 4, "eval_loss": 0.5}


def heldout(iteration, step):
    row = {"iteration": iteration, "reward": iteration / 2, "objective/kl": 0.25, "counts": {}}
    text = {"prompt": "user: <b>name</b>\n# a fruit", "completion": "plum", "rewards": "1.0"}
    return ["heldout", row, step, [text]]


# Two iterations of 4 and 3 steps. The second training is killed behind its second step, and resumed
# from a checkpoint of the first; the second report is made twice.
LOOP = [
    [heldout(0, 0)],
    [["training", 1, 0, [evaluation(0), *steps(1, 4), evaluation(4)]]],
    [heldout(0, 0), heldout(1, 4)],
    [["training", 2, 4, [evaluation(0), *steps(1, 2)]]],
    [["training", 2, 4, [*steps(2, 3), evaluation(3)]]],
    [heldout(0, 0), heldout(1, 4), heldout(2, 7)],
    [heldout(0, 0), heldout(1, 4), heldout(2, 7)],
]
POINTS = {
    "loss": [(1, 1), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4), (5, 1), (6, 1 / 2), (7, 1 / 3)],
    "eval_loss": [(0, 0.5), (4, 0.5), (4, 0.5), (7, 0.5)],
    "summary/reward": [(0, 0), (4, 0.5), (7, 1)],
    "objective/kl": [(0, 0.25), (4, 0.25), (7, 0.25)],
}


def in_processes(report_to, folder, **env):
    for calls in LOOP:
        command = [sys.executable, "-c", PROCESS, report_to, folder, json.dumps(calls)]
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", **env}
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr


def close(found):
    """Both lists of points are the same; tensorboard keeps fp32."""
    for name, points in POINTS.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        values = [value for _, value in found[name]]
        assert values == pytest.approx([value for _, value in points]), name


def test_tensorboard_has_one_run_for_the_loop(tmp_path):
    pytest.importorskip("tensorboard")
    for calls in LOOP:
        one_process("tensorboard", tmp_path, calls)
    events = read_tensorboard(tmp_path, "demo")
    found = {}
    for name in POINTS:
        found[name] = [(event.step, event.value) for event in events.Scalars(name)]
    close(found)
    texts = events.Tensors("completions/text_summary")
    assert [event.step for event in texts] == [0, 4, 7]
    assert b"    user: <b>name</b>\n    # a fruit" in texts[0].tensor_proto.string_val[0]


def read_tensorboard(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.io_wrapper import GetLogdirSubdirectories

    (run,) = GetLogdirSubdirectories(str(folder))
    assert Path(run).name == name
    events = EventAccumulator(run, size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def test_wandb_resumes_one_run(tmp_path):
    """Offline: each process leaves a folder of the run, and `wandb sync` takes them in order."""
    pytest.importorskip("wandb")
    in_processes("wandb", tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    found = {name: [] for name in [*POINTS, "completions"]}
    ids = set()
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "run":
                ids.add((record.run.project, record.run.display_name, record.run.run_id))
            row = history_of(record)
            if "completions/_type" in row:
                row["completions"] = row["completions/_type"]
            for name in found.keys() & row.keys():
                found[name].append((row["global_step"], row[name]))
    ((project, name, id),) = ids
    assert (project, name) == ("iterdpo", "demo")
    assert id == json.loads((tmp_path / "wandb.json").read_text())["id"]
    close(found)
    assert [step for step, _ in found["completions"]] == [0, 4, 7]
    tables = [json.loads(p.read_text()) for p in tmp_path.rglob("completions*.table.json")]
    assert tables[0]["columns"] == ["prompt", "completion", "rewards"]
    assert tables[0]["data"][0][1] == "plum"


def wandb_records(path):
    """The records of a .wandb file: a log in LevelDB's format behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    at, record = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768  # in this block
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            parsed = wandb_internal_pb2.Record()
            parsed.ParseFromString(record)
            yield parsed
            record = b""


def history_of(record) -> dict:
    if record.WhichOneof("record_type") != "history":
        return {}
    items = record.history.item
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


READ_TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage
runs = SQLiteStorage.get_runs("iterdpo")
print(json.dumps([runs, SQLiteStorage.get_logs("iterdpo", "demo")]))
"""


def test_trackio_resumes_one_run(tmp_path):
    pytest.importorskip("trackio")
    env = {"TRACKIO_DIR": str(tmp_path / "data")}
    in_processes("trackio", tmp_path, **env)
    read = [sys.executable, "-c", READ_TRACKIO]
    done = subprocess.run(
        read, env={**os.environ, **env}, capture_output=True, text=True, check=True
    )
    runs, logs = json.loads(done.stdout.splitlines()[-1])
    assert runs == ["demo"]
    found = {}
    for name in [*POINTS, "completions"]:
        found[name] = [(row["step"], row[name]) for row in logs if name in row]
    close(found)
    assert [step for step, _ in found["completions"]] == [0, 4, 7]
    assert found["completions"][0][1]["_value"][0]["completion"] == "plum"


# ---- what is sent at all -----------------------------------------------------------------------


class Client:
    """Takes the place of a package: what counts here is decided before it is called."""

    def __init__(self, run_name, id, folder, resumed):
        self.id, self.resumed, self.rows = id, resumed, []

    def log(self, row, step):
        self.rows.append((step, row))


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setitem(tracker.CLIENTS, "wandb", Client)


def test_the_place_is_written_down_before_the_row_is_sent(tmp_path, client):
    """So a kill between the two loses a point, and none is sent twice."""
    shown = Tracker("wandb", "demo", tmp_path)
    shown.client.log = None  # ends like a kill
    with pytest.raises(TypeError):
        shown.send([1, 0, 1, 0], 1, {"loss": 1.0})
    again = Tracker("wandb", "demo", tmp_path)
    assert again.client.resumed and again.client.id == shown.client.id
    again.send([1, 0, 1, 0], 1, {"loss": 1.0})
    again.send([1, 0, 2, 0], 2, {"loss": 0.5})
    assert again.client.rows == [(2, {"loss": 0.5})]


def test_overwrite_begins_another_run_in_a_folder_of_its_own_alone(tmp_path, client):
    output = tmp_path / "policy"

    def begun(overwrite, steps_done, logging_dir=None):
        args = {"report_to": "wandb", "run_name": None, "logging_dir": logging_dir}
        args |= {"iteration": 1, "steps_before": 0, "overwrite": overwrite}
        shown = tracker.of_training(type("Args", (), args), output, steps_done)
        return shown.tracker.client.id

    first = begun(False, 0)
    assert begun(False, 3) == first == begun(True, 3)  # resumed
    assert begun(True, 0) != first
    shared = begun(False, 0, tmp_path / "shared")
    assert begun(True, 0, tmp_path / "shared") == shared


def test_a_package_that_is_missing_is_named_and_a_folder_is_none(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wandb").mkdir()  # what wandb leaves in the folder that it runs in
    if importlib.util.find_spec("wandb").origin is not None:
        pytest.skip("wandb is installed")
    with pytest.raises(Stop, match="REPORT_TO wandb: no such package"):
        tracker.check_installed("wandb", "REPORT_TO")


def test_a_tracker_that_does_not_start_ends_in_one_line(tmp_path, monkeypatch):
    def no_login(*_):
        raise RuntimeError("no API key configured")

    monkeypatch.setitem(tracker.CLIENTS, "wandb", no_login)
    with pytest.raises(Stop, match="--report_to wandb: RuntimeError: no API key configured"):
        Tracker("wandb", "demo", tmp_path)
    assert not (tmp_path / "wandb.json").exists()


def test_a_damaged_state_is_named(tmp_path, client):
    Tracker("wandb", "demo", tmp_path)
    (tmp_path / "wandb.json").write_text('{"id": "x"}')
    with pytest.raises(Stop, match="wandb.json.*Remove it to begin another run"):
        Tracker("wandb", "demo", tmp_path)
