"""Candidates on their way through the rewards: what score.py and judge.py have in common.

Both read one file of candidates or several, merged by id; show each answer's text to a reward; and
take out the candidates that got none, counted by reason.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from records import Stop, count_rows, read_jsonl

# ---- several files, one row per prompt ---------------------------------------------------------


@dataclass
class Merged:
    total: int  # rows
    rows: Iterator[dict]
    incomplete: int = 0  # rows whose id some of the files lack

    def warn_of_incomplete(self, stage) -> None:
        if self.incomplete:
            stage.warn(
                f"{self.incomplete:,} of {self.total:,} ids are not in all files: their rows have "
                "fewer candidates"
            )


def merge_by_id(paths: list, shape: dict) -> Merged:
    """The rows of one file, or of several joined by id, with all their candidates in one row.

    Only ids and byte offsets are held in memory. A row has the keys of all files; where two files
    have different values, the first file's is kept. Prompts must not differ, in words or in token
    ids.
    """
    check_named_once(paths)
    totals = [count_rows(path, shape) for path in paths]
    if len(paths) == 1:
        return Merged(totals[0], read_jsonl(paths[0], shape))

    places: dict[str, list[tuple[str, int]]] = {}  # id -> its (file, byte) in each file
    for path in paths:
        with open(path, "rb") as file:
            byte = 0
            for line in file:
                row_id = json.loads(line)["id"]
                places.setdefault(row_id, []).append((path, byte))
                byte += len(line)

    incomplete = sum(len(found) < len(paths) for found in places.values())
    return Merged(len(places), merged_rows(paths, places), incomplete)


def check_named_once(paths: list) -> None:
    seen = set()
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise Stop(f"{path}: is given twice, and each of its candidates would count twice.")
        seen.add(real)


def merged_rows(paths: list, places: dict[str, list[tuple[str, int]]]) -> Iterator[dict]:
    """places: id -> its (file, byte) in each file that has it."""
    with ExitStack() as stack:
        files = {path: stack.enter_context(open(path, "rb")) for path in paths}
        for row_id, found in places.items():
            rows = []
            for path, byte in found:
                files[path].seek(byte)
                rows.append(json.loads(files[path].readline()))
            merged, *others = rows
            for row, (path, _) in zip(others, found[1:], strict=True):
                check_same_prompt(merged, row, row_id, found[0][0], path)
                candidates = merged["candidates"] + row["candidates"]
                merged = row | merged | {"candidates": candidates}  # the first file's values win
            yield merged


def check_same_prompt(first: dict, row: dict, row_id: str, first_path: str, path: str) -> None:
    for key in ("prompt", "prompt_token_ids"):
        if first[key] != row[key]:
            raise Stop(
                f'{path}: id "{row_id}": {key} differs from that in {first_path}. Candidates of '
                "different prompts cannot be merged: generate both files from one prompts.jsonl."
            )


# ---- what a reward sees ------------------------------------------------------------------------


@dataclass
class Answer:
    """A candidate on its way through the rewards."""

    row: dict
    index: int  # in the input's row
    candidate: dict
    text: str  # what the rewards see
    source: str  # the file, or files, for messages
    dropped: str | None = None  # why it has no reward

    def __str__(self):
        return f'{self.source}: row id "{self.row["id"]}", candidate {self.index}'


def answers_of(rows: list[dict], strip_reasoning: bool, files: list[str]) -> list[Answer]:
    """All candidates of `rows`, row by row. strip_reasoning: rewards see what follows </think>.

    An answer without </think> is shown whole: not every answer has thoughts. One that was cut off
    while it was thinking looks the same, and is among the truncated, which make no pair.

    files: where the rows came from, for messages.
    """
    source = ", ".join(map(str, files))
    answers = []
    for row in rows:
        check_same_rewards(row, source)
        for index, candidate in enumerate(row["candidates"]):
            text = candidate["text"]
            if strip_reasoning:
                text = text.split("</think>", 1)[-1].lstrip()
            answers.append(Answer(row, index, candidate, text, source))
    return answers


def check_same_rewards(row: dict, source: str) -> None:
    """Candidates of one prompt are ranked by the sums of their rewards: all must have the same."""
    names = [set(candidate.get("rewards") or {}) for candidate in row["candidates"]]
    for k, found in enumerate(names):
        if found != names[0]:
            raise Stop(
                f'{source}: row id "{row["id"]}", candidate {k} has other rewards than candidate '
                f"0: {sorted(found)}, not {sorted(names[0])}. Score all files alike, then merge."
            )


# ---- what got no reward ------------------------------------------------------------------------


def drop_unscored(rows: list[dict], answers: list[Answer]) -> dict[str, dict]:
    """Remove candidates without a reward from their rows, in place. Returns the balances."""
    kept: dict[int, list[dict]] = {id(row): [] for row in rows}  # of each row's object
    dropped: Counter = Counter()
    for answer in answers:
        if answer.dropped:
            dropped[answer.dropped] += 1
        else:
            kept[id(answer.row)].append(answer.candidate)
    for row in rows:
        row["candidates"] = kept[id(row)]
    out = len(answers) - dropped.total()
    return {
        "rows": {"in": len(rows), "out": len(rows), "dropped": {}},
        "candidates": {"in": len(answers), "out": out, "dropped": dropped},
    }
