"""train.jsonl, one row per step, and the dashboard that shows the same numbers."""

import importlib
from pathlib import Path

from records import dump


class TrainLog:
    """path: train.jsonl. done: rows of an interrupted run that are kept; later ones are cut off.

    report_to: "none", "tensorboard", "wandb" or "trackio".
    """

    def __init__(self, path: Path, done: int, report_to: str):
        self.path = path
        rows = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(rows[:done]))

        self.tensorboard = None
        self.tracker = None  # wandb and trackio share their interface
        if report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(path.parent.with_suffix(".tensorboard")))
        elif report_to != "none":
            self.tracker = importlib.import_module(report_to)
            self.tracker.init(project="iterdpo", name=path.parent.stem)

    def write(self, row: dict) -> None:
        with open(self.path, "a") as file:
            file.write(dump(row))
        if self.tensorboard:
            for name, value in row.items():
                self.tensorboard.add_scalar(name, value, row["step"])
            self.tensorboard.flush()
        if self.tracker:
            self.tracker.log(row, step=row["step"])
