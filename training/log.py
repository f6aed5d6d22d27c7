"""train.jsonl: one row per step, and one per evaluation on held-out pairs (--eval_pairs).

    {"step": 0, "epoch": 0.0, "eval_loss": 0.693, "eval_rewards/chosen": 0.0, …}    before training
    {"step": 1, "epoch": 0.25, "loss": 0.693, "rewards/chosen": 0.0, …}
    …

An evaluation stands behind the step that it follows, and has keys that begin with "eval_", as in
the logs of Hugging Face's trainers. A tracker (tracker.py) shows the same rows.

Beside it train.sums has one line per row: the sha256 of all rows up to this one. So a log that was
damaged on the disk is not resumed.
"""

import hashlib
import json
from pathlib import Path

from records import Stop, dump, write_whole, writing
from stage import Stage
from training.tracker import TrainingTracker, is_evaluation, of_training


def open_log(stage: Stage, steps_done: int, args) -> "TrainLog | None":
    """Rank 0 writes the log, from the step that the checkpoint has come to."""
    if stage.rank > 0:
        return None
    shown = of_training(args, stage.output, steps_done)
    return TrainLog(stage.parts / "train.jsonl", steps_done, shown)


def row_of_step(done: int, steps_per_epoch: int, step, settings, tokens: int, seconds: float):
    """The row of a Step and its StepSettings (dpo_train.py). done: its number, from 1."""
    return {
        "step": done,
        "epoch": done / steps_per_epoch,
        **step.metrics,
        "grad_norm": step.grad_norm,
        "learning_rate": settings.learning_rate,
        "beta": settings.beta,
        "pairs": settings.pair_count,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
    }


def show(bar, metrics: dict[str, float], tokens_per_second: float) -> None:
    """Move the progress bar by one step."""
    loss = f"{metrics['loss']:.4f}"
    accuracy = f"{metrics['rewards/accuracies']:.2f}"
    bar.set_postfix(loss=loss, acc=accuracy, tok_s=f"{tokens_per_second:.0f}", refresh=False)
    bar.update()


class TrainLog:
    """path: train.jsonl. steps_done: the steps that an interrupted run's checkpoint holds; rows
    behind them are cut off.
    """

    def __init__(self, path: Path, steps_done: int, tracker: TrainingTracker | None = None):
        self.path = path
        self.sums = sums_of(path)
        self.tracker = tracker
        self.hash = hashlib.sha256()  # of all rows so far
        lines = lines_of_steps(path, steps_done)
        sums = [self.next_sum(line) for line in lines]
        write_whole(self.path, "".join(lines))
        write_whole(self.sums, "".join(sums))

    def write(self, row: dict) -> None:
        line = dump(row)
        append(self.path, line)
        append(self.sums, self.next_sum(line))
        if self.tracker:
            self.tracker.show(row)

    def next_sum(self, line: str) -> str:
        self.hash.update(line.encode())
        return f"{self.hash.hexdigest()}\n"


def sums_of(path: Path) -> Path:
    """train.jsonl -> train.sums"""
    return path.with_suffix(".sums")


def append(path: Path, line: str) -> None:
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(line)


def lines_of_steps(path: Path, steps: int) -> list[str]:
    """The lines up to the last of `steps` steps. Raises Stop where some are lost or damaged.

    The evaluation behind that step is done again: a kill may have come before it.
    """
    if steps == 0:
        return []
    kept = []
    found = 0  # steps
    hash = hashlib.sha256()
    for line, expected in zip(read_lines(path), read_lines(sums_of(path)), strict=False):
        hash.update(line)
        if f"{hash.hexdigest()}\n".encode() != expected:
            break
        kept.append(line.decode())
        row = json.loads(line)
        found += not is_evaluation(row)
        if found == steps:
            return kept
    raise Stop(
        f"{path}: holds {found} of the {steps} steps that the checkpoint beside it has done; what "
        f"follows is lost or damaged. Restore it, or remove {path.parent} to begin again."
    )


def read_lines(path: Path) -> list[bytes]:
    """The lines of a file; none where there is no file."""
    return path.read_bytes().splitlines(keepends=True) if path.is_file() else []
