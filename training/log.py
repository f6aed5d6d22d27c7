"""train.jsonl, one row per step, and the dashboard that shows the same numbers."""

import importlib
from itertools import islice
from pathlib import Path

from records import NUMBERS, Stop, dump, read_jsonl


class TrainLog:
    """path: train.jsonl. steps_done: by an interrupted run; its rows of later steps are cut off.

    report_to: "none", "tensorboard", "wandb" or "trackio".
    """

    def __init__(self, path: Path, steps_done: int, report_to: str):
        self.path = path
        rows = rows_of_steps(path, steps_done)
        path.write_text("".join(rows))

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


def rows_of_steps(path: Path, steps: int) -> list[str]:
    """The lines of the first `steps` steps. Raises Stop where some are lost or damaged."""
    if steps == 0:
        return []
    rows = [dump(row) for row in islice(read_jsonl(path, NUMBERS), steps)]
    if len(rows) < steps:
        raise Stop(
            f"{path}: holds {len(rows)} of the {steps} steps that the checkpoint beside it has "
            "done. Restore it, or begin again with --overwrite."
        )
    return rows
