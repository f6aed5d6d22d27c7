"""What tensorboard, wandb and trackio are shown: one run for a whole loop.

Several processes write to that run, one after another: dpo_train.py shows each row of train.jsonl,
and tools/report.py the held-out figures and some answers after each evaluation. They share

    the name    --run_name, which iterate.sh sets to the name of RUN
    a folder    --logging_dir, which iterate.sh sets to RUN/tracker. It holds the tracker's own
                files, and TRACKER.json: the run's id, and the place of the last row that was sent
    an axis     the global step: the steps of the iterations before, and the step in this one. An
                iteration's held-out figures stand at its last step, those of iteration 0 at 0

A stage that is resumed or repeated computes rows that were sent already. Each row has a place in
the loop, and one that is not behind the last row sent is not sent again; the place is written down
before the row is sent. So a kill may lose a point, and nothing doubles one. What each tracker does:

    tensorboard  each process adds a file of events to LOGGING_DIR/RUN_NAME, which is one run
    wandb        each process resumes the run with the id; the axis is the metric "global_step",
                 as wandb's own step only counts calls. Offline (WANDB_MODE=offline), each process
                 leaves a folder of that run under LOGGING_DIR/wandb, for `wandb sync`
    trackio      each process resumes the latest run of that name; its data stand in TRACKIO_DIR

--overwrite of a training that has a tracker's folder of its own begins another run there. In a
loop's run, what was shown stays. A tracker that is named in the middle of a loop begins there.
"""

import importlib
import importlib.util
import json
import uuid
from pathlib import Path
from textwrap import indent

from records import TEXT, Kind, Stop, is_token_ids, read_json, write_whole

TRACKERS = ("none", "tensorboard", "wandb", "trackio")
PROJECT = "iterdpo"
STATE = {"id": TEXT, "sent": Kind("a list of whole numbers", is_token_ids)}

Table = list[dict[str, str | float]]  # rows with the same keys


def check_installed(report_to: str, setting: str = "--report_to") -> None:
    """Stop where the package is missing. A folder of that name is found, too, but has no origin."""
    if report_to == "none":
        return
    spec = importlib.util.find_spec(report_to)
    if spec is None or spec.origin is None:
        raise Stop(f"{setting} {report_to}: no such package. Install it, or leave the setting out")


def check_arguments(args) -> None:
    """args: report_to, run_name, logging_dir, and in training steps_before."""
    if args.report_to == "none":
        for name in ("run_name", "logging_dir", "steps_before"):
            if getattr(args, name, None):
                raise Stop(f"--{name} has no effect without --report_to")
    if args.run_name and "/" in args.run_name:
        raise Stop(f"--run_name {args.run_name}: a name has no slash in it")
    check_installed(args.report_to)


# ---- which rows --------------------------------------------------------------------------------


class Tracker:
    """A run in a tracker, which this process begins or resumes.

    anew: begin another run, whatever was sent.
    """

    def __init__(self, report_to: str, run_name: str, folder: Path, anew=False):
        self.path = folder / f"{report_to}.json"
        folder.mkdir(parents=True, exist_ok=True)
        resumed = self.path.exists() and not anew
        if resumed:
            remedy = "Remove it to begin another run in the tracker"
            self.state = read_json(self.path, STATE, remedy)
        else:
            self.state = {"id": uuid.uuid4().hex[:8], "sent": []}
        try:
            self.client = CLIENTS[report_to](run_name, self.state["id"], folder, resumed)
        except Exception as e:  # no login, no network: a message of the package says so
            raise Stop(f"--report_to {report_to}: {type(e).__name__}: {e}") from e
        self.write_state()

    def write_state(self) -> None:
        write_whole(self.path, json.dumps(self.state))

    def send(
        self, place: list[int], step: int, row: dict[str, float], table: Table | None = None
    ) -> None:
        """place: of the row in the loop; places are compared as lists are. step: on the axis."""
        if place <= self.state["sent"]:
            return
        self.state["sent"] = place
        self.write_state()
        self.client.log(row, step)
        if table:
            self.client.log_table("completions", table, step)


def is_evaluation(row: dict) -> bool:
    """Whether a row of train.jsonl is one of an evaluation, and not of a step."""
    return "eval_loss" in row


class TrainingTracker:
    """The rows of train.jsonl, in iteration `iteration` of a loop."""

    def __init__(self, tracker: Tracker, iteration: int, steps_before: int):
        self.tracker = tracker
        self.iteration = iteration
        self.steps_before = steps_before

    def show(self, row: dict[str, float]) -> None:
        follows_its_step = int(is_evaluation(row))
        place = [self.iteration, 0, row["step"], follows_its_step]
        step = self.steps_before + row["step"]
        figures = {name: value for name, value in row.items() if name != "step"}
        self.tracker.send(place, step, figures)


def of_training(args, output: Path, steps_done: int) -> TrainingTracker | None:
    """The tracker that --report_to names; None for "none"."""
    if args.report_to == "none":
        return None
    own = output.with_name(output.name + ".tracker")
    folder = Path(args.logging_dir) if args.logging_dir else own
    anew = args.overwrite and steps_done == 0 and folder == own
    tracker = Tracker(args.report_to, args.run_name or output.name, folder, anew)
    return TrainingTracker(tracker, args.iteration, args.steps_before)


def show_heldout(tracker: Tracker, row: dict, step: int, completions: Table) -> None:
    """A row of summary.jsonl, behind its iteration's training.

    TRL's names stay as they are, for dashboards that know them; the others go under summary/.
    """
    figures = {}
    for name, value in row.items():
        if isinstance(value, (int, float)):
            is_trls = name.startswith(("objective/", "val/"))
            shown_as = name if is_trls else f"summary/{name}"
            figures[shown_as] = value
    tracker.send([row["iteration"], 1], step, figures, completions)


# ---- how each tracker is told ------------------------------------------------------------------


class TensorBoard:
    def __init__(self, run_name: str, id: str, folder: Path, resumed: bool):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step 0 hides the points of an earlier run in this folder
        purge_step = None if resumed else 0
        log_dir = str(folder / run_name)
        self.writer = SummaryWriter(log_dir, purge_step=purge_step)

    def log(self, row: dict[str, float], step: int) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_table(self, name: str, table: Table, step: int) -> None:
        text = []
        for row in table:
            for key, value in row.items():
                text.append(f"**{key}**\n")
                text.append(indent(str(value), "    "))  # a code block: no mark-up takes effect
                text.append("")
            text.append("---\n")
        self.writer.add_text(name, "\n".join(text), step)
        self.writer.flush()


class Wandb:
    def __init__(self, run_name: str, id: str, folder: Path, resumed: bool):
        self.wandb = importlib.import_module("wandb")
        self.run = self.wandb.init(
            project=PROJECT,
            name=run_name,
            id=id,
            resume="allow",
            dir=str(folder),
        )
        self.run.define_metric("global_step")
        self.run.define_metric("*", step_metric="global_step")

    def log(self, row: dict[str, float], step: int) -> None:
        self.run.log({**row, "global_step": step})

    def log_table(self, name: str, table: Table, step: int) -> None:
        columns = list(table[0])
        lines = [list(row.values()) for row in table]
        content = self.wandb.Table(columns=columns, data=lines)
        self.run.log({name: content, "global_step": step})


class Trackio:
    def __init__(self, run_name: str, id: str, folder: Path, resumed: bool):
        self.trackio = importlib.import_module("trackio")
        # "never": a run of the same name that is not ours is left alone
        resume = "allow" if resumed else "never"
        self.run = self.trackio.init(project=PROJECT, name=run_name, resume=resume)

    def log(self, row: dict[str, float], step: int) -> None:
        self.run.log(row, step=step)

    def log_table(self, name: str, table: Table, step: int) -> None:
        content = self.trackio.Table(data=table)
        self.run.log({name: content}, step=step)


CLIENTS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
