"""The data contract: the shape of every record, and how files are written.

One JSON object per line, UTF-8. Unknown keys are passed on unchanged.

    prompts.jsonl     {"id": "p000012",                  unique in the file
                       "prompt": [{"role", "content"}],  a conversation (the chat template is
                                                         applied), or a string (raw text); this is
                                                         TRL's prompt-only format
                       "meta": {...}}                    optional; reward functions receive it

    candidates.jsonl  + "prompt_token_ids": [int],       what the policy was given
                        "candidates": [{"text",          decode(token_ids), special tokens skipped
                                        "token_ids",     what the policy wrote; ends in a stop id
                                                         exactly when it stopped
                                        "logprob",       log-prob of token_ids, summed, at
                                                         temperature 1
                                        "finish_reason", "stop" | "length"
                                        "temperature",   it was sampled at
                                        "model"}]        hash of the policy that wrote it

    scored.jsonl      + per candidate "rewards": {name: float} and "reward", their weighted sum

    pairs.jsonl       {"id", "iteration", "prompt",
                       "chosen": [{"role": "assistant", "content"}], "rejected",
                       "score_chosen", "score_rejected",
                       "prompt_token_ids", "chosen_token_ids", "rejected_token_ids",
                       "chosen_logprob", "rejected_logprob", "chosen_index", "rejected_index",
                       "chosen_model", "rejected_model"}: a superset of TRL's preference format

A file has its final name only when it is whole: it is written under a temporary name beside it,
flushed to the disk, and renamed. So the final name is the done marker, and nothing can disagree
with it. stage.py builds on that.
"""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# What a reader of each file may rely on: key -> type, or [shape of each element].
PROMPT = {
    "id": str,
    "prompt": (str, list),
}
CANDIDATE = {
    "text": str,
    "token_ids": list,
    "logprob": (float, int),
    "finish_reason": str,
    "model": str,
}
SCORED_CANDIDATE = CANDIDATE | {
    "reward": (float, int),
    "rewards": dict,
}
CANDIDATES = PROMPT | {"prompt_token_ids": list, "candidates": [CANDIDATE]}
SCORED = PROMPT | {"prompt_token_ids": list, "candidates": [SCORED_CANDIDATE]}


class Stop(SystemExit):
    """Ends the stage with a message for a person: what is wrong, where, what to do. Exit code 1."""

    def __init__(self, message: str):
        super().__init__(f"error: {message}")


# ---- reading -----------------------------------------------------------------------------------


def read_jsonl(path, shape: dict) -> Iterator[dict]:
    """Yield the rows of a JSONL file, one at a time.

    Raises Stop naming file and line for bad JSON, a missing key or a wrong type, and naming the
    file when it is missing or has no row at all.
    """
    if not os.path.isfile(path):
        raise Stop(f"{path}: no such file. Check the path, or run the stage that writes it.")
    number = 0
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise Stop(f"{where}: not JSON ({e}). A line must hold one JSON object.") from None
            check_shape(row, shape, where)
            yield row
    if number == 0:
        raise Stop(f"{path}: the file is empty. A stage with nothing to do is taken for a mistake.")


def count_rows(path, shape: dict) -> int:
    """Check every row, and that ids are unique, before hours are spent on the first ones."""
    line_of: dict[str, int] = {}
    for number, row in enumerate(read_jsonl(path, shape), 1):
        id = row["id"]
        if id in line_of:
            first = line_of[id]
            raise Stop(f'{path}:{number}: id "{id}" was used in line {first}. Ids are unique.')
        line_of[id] = number
    return len(line_of)


def check_shape(row, shape: dict, where: str) -> None:
    """Stop where `row` is not what `shape` promises: key -> type, or [shape of each element]."""
    if not isinstance(row, dict):
        raise Stop(f"{where}: expected a JSON object, found {type(row).__name__}.")
    for key, kind in shape.items():
        if key not in row:
            raise Stop(f'{where}: key "{key}" is missing. records.py documents every shape.')
        elements = kind[0] if isinstance(kind, list) else None
        check_type(row[key], list if elements else kind, f'{where}: key "{key}"')
        if elements:
            for i, element in enumerate(row[key]):
                check_shape(element, elements, f"{where}: {key}[{i}]")
    if "prompt" in shape and isinstance(row["prompt"], list):
        check_turns(row["prompt"], where)


def check_type(value, kind: type | tuple[type, ...], where: str) -> None:
    is_bool = isinstance(value, bool)  # which Python takes for an int
    if isinstance(value, kind) and not is_bool:
        return
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = " or ".join(k.__name__ for k in kinds)
    found = json.dumps(value)[:60]
    raise Stop(f"{where} must be {names}, found {found}.")


def check_turns(turns: list, where: str) -> None:
    """Stop where a conversation is not a non-empty list of {"role", "content"}."""
    well_formed = [isinstance(t, dict) and {"role", "content"} <= t.keys() for t in turns]
    if not turns or not all(well_formed):
        raise Stop(f'{where}: a conversation is a non-empty list of {{"role", "content"}}.')


def finite(value: float, where: str) -> float:
    """`value`, or Stop naming the place: a NaN in a ranking would poison every later stage."""
    if not math.isfinite(value):
        raise Stop(
            f"{where}: the value is {value}. "
            "Nothing was written from it; correct its source and run again."
        )
    return value


# ---- candidates on their way through the rewards -----------------------------------------------


@dataclass
class Merged:
    total: int  # rows
    rows: Iterator[dict]
    counts: dict[str, dict]  # ids that all files have, and ids that some lack


def merge_by_id(paths: list, shape: dict) -> Merged:
    """The rows of one file, or of several joined by id, with all their candidates in one row.

    Only ids and byte offsets are held in memory. Where files disagree, the first file's keys win;
    but prompts must agree, in words and in token ids.
    """
    totals = [count_rows(path, shape) for path in paths]
    if len(paths) == 1:
        return Merged(totals[0], read_jsonl(paths[0], shape), {})

    places: dict[str, list[tuple[str, int]]] = {}  # id -> its (file, byte) in each file
    for path in paths:
        with open(path, "rb") as file:
            byte = 0
            for line in file:
                id = json.loads(line)["id"]
                places.setdefault(id, []).append((path, byte))
                byte += len(line)

    in_all = [found for found in places.values() if len(found) == len(paths)]
    in_some = len(places) - len(in_all)
    dropped = {"kept_though_in_some_files_only": in_some} if in_some else {}
    balance = {"in": len(places), "out": len(in_all), "dropped": dropped}
    return Merged(len(places), _merged_rows(paths, places), {"ids": balance})


def _merged_rows(paths: list, places: dict[str, list[tuple[str, int]]]) -> Iterator[dict]:
    files = {path: open(path, "rb") for path in paths}
    for id, found in places.items():
        merged = None
        for path, byte in found:
            files[path].seek(byte)
            row = json.loads(files[path].readline())
            if merged is None:
                merged = row
                continue
            for key in ("prompt", "prompt_token_ids"):
                if merged[key] != row[key]:
                    first_path, _ = found[0]
                    raise Stop(
                        f'{path}: id "{id}": {key} differs from that in {first_path}. Candidates '
                        "of different prompts cannot be merged: generate both files from one "
                        "prompts.jsonl."
                    )
            merged = merged | {"candidates": merged["candidates"] + row["candidates"]}
        yield merged


@dataclass
class Answer:
    """A candidate on its way through the rewards."""

    row: dict
    index: int  # in the input's row
    candidate: dict
    text: str  # what the rewards see
    dropped: str | None = None  # why it has no reward

    def __str__(self):
        return f'row id "{self.row["id"]}", candidate {self.index}'


def answers_of(rows: list[dict], strip_reasoning: bool) -> list[Answer]:
    """All candidates of `rows`, row by row. strip_reasoning: rewards see what follows </think>."""
    answers = []
    for row in rows:
        for index, candidate in enumerate(row["candidates"]):
            text = candidate["text"]
            if strip_reasoning:
                text = text.split("</think>", 1)[-1].lstrip()
            answers.append(Answer(row, index, candidate, text))
    return answers


def drop_unscored(rows: list[dict], answers: list[Answer]) -> dict[str, dict]:
    """Remove candidates without a reward from their rows, in place. Returns the balances."""
    kept: dict[int, list[dict]] = {id(row): [] for row in rows}
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


# ---- writing -----------------------------------------------------------------------------------


def dump(row: dict) -> str:
    """One line of JSONL. NaN and infinity are not JSON: they raise ValueError and do not spread."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def whole(path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, for a file or a folder.

    On success it is flushed to the disk and renamed to `path`; on failure it is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    remove(temporary)
    try:
        yield temporary
    except BaseException:
        remove(temporary)
        raise
    content = sorted(temporary.rglob("*")) if temporary.is_dir() else [temporary]
    for file in content:
        if file.is_file():
            flush(file)
    os.replace(temporary, path)
    flush(path.parent)  # the rename itself must survive a power cut, too


def flush(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_whole(path, text: str) -> None:
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(path) -> None:
    """Remove a file or a folder, if it is there."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
