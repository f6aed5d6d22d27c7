"""The data contract: the shape of every record, and how files come into being.

One JSON object per line, UTF-8. Unknown keys travel along untouched.

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
from collections.abc import Iterator
from contextlib import contextmanager
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
            "Nothing was written from it; mend its source and run again."
        )
    return value


# ---- writing -----------------------------------------------------------------------------------


def dump(row: dict) -> str:
    """One line of JSONL. NaN and infinity are no JSON: they raise ValueError and do not spread."""
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
