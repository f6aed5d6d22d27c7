"""train.jsonl: one row per step, and one per evaluation on held-out pairs (--eval_pairs).

    {"step": 0, "epoch": 0.0, "eval_loss": 0.693, "eval_rewards/chosen": 0.0, …}    before training
    {"step": 1, "epoch": 0.25, "loss": 0.693, "rewards/chosen": 0.0, …}
    …

An evaluation stands behind the step that it follows, and has keys that begin with "eval_", as in
the logs of Hugging Face's trainers. A tracker (tracker.py) shows the same rows.
"""

from pathlib import Path

from records import NUMBERS, Stop, dump, read_jsonl, writing
from training.tracker import TrainingTracker


def is_evaluation(row: dict) -> bool:
    return "eval_loss" in row


class TrainLog:
    """path: train.jsonl. steps_done: by an interrupted run; what comes after them is cut off."""

    def __init__(self, path: Path, steps_done: int, tracker: TrainingTracker | None = None):
        self.path = path
        self.tracker = tracker
        rows = rows_of_steps(path, steps_done)
        with writing(path):
            path.write_text("".join(rows))

    def write(self, row: dict) -> None:
        with writing(self.path), open(self.path, "a") as file:
            file.write(dump(row))
        if self.tracker:
            self.tracker.show(row)


def rows_of_steps(path: Path, steps: int) -> list[str]:
    """The lines up to the last of `steps` steps. Raises Stop where some are lost or damaged.

    The evaluation behind that step is done again: a kill may have come before it.
    """
    if steps == 0:
        return []
    is_lost = not path.is_file() or path.stat().st_size == 0
    logged = [] if is_lost else read_jsonl(path, NUMBERS)
    rows = []
    found = 0
    for row in logged:
        rows.append(dump(row))
        found += not is_evaluation(row)
        if found == steps:
            return rows
    raise Stop(
        f"{path}: holds {found} of the {steps} steps that the checkpoint beside it has "
        f"done. Restore it, or remove {path.parent} to begin again."
    )
