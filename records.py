"""The data contract: the shape of every record, and how files come into being.

One JSON object a line, UTF-8. Unknown keys travel along untouched.

    prompts.jsonl     {"id": "p000012",                  unique in the file
                       "prompt": [{"role", "content"}],  a conversation (the chat template is applied),
                                                         or a string (raw text); TRL's prompt-only format
                       "meta": {...}}                    optional; reward functions receive it
    candidates.jsonl  + "prompt_token_ids": [int],       what the policy was given
                        "candidates": [{"text",          decode(token_ids), special tokens skipped
                                        "token_ids",     what the policy wrote; ends in EOS iff it stopped
                                        "logprob",       log-prob of token_ids, summed, at temperature 1
                                        "finish_reason", "stop" | "length"
                                        "temperature",   it was sampled at
                                        "model"}]        hash of the policy that wrote it
    scored.jsonl      + per candidate "rewards": {name: float} and "reward": float, their weighted sum
    pairs.jsonl       {"id", "iteration", "prompt", "chosen": [{"role": "assistant", "content"}], "rejected",
                       "score_chosen", "score_rejected", "prompt_token_ids", "chosen_token_ids",
                       "rejected_token_ids", "chosen_logprob", "rejected_logprob", "chosen_index",
                       "rejected_index", "chosen_model", "rejected_model"}: TRL's preference format and more

A file has its final name only when it is whole: it is written under a temporary name beside it, flushed to the disk,
and renamed. So the final name is the done marker, and nothing can disagree with it. stage.py builds on that.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a reader of each file may rely on: key -> type, or [shape of each element].
PROMPT = {"id": str, "prompt": (str, list)}
CANDIDATE = {"text": str, "token_ids": list, "logprob": (float, int), "finish_reason": str, "model": str}
CANDIDATES = PROMPT | {"prompt_token_ids": list, "candidates": [CANDIDATE]}
SCORED = CANDIDATES | {"candidates": [CANDIDATE | {"reward": (float, int), "rewards": dict}]}


class Stop(SystemExit):
    """Ends the stage with a message for a person: what is wrong, where, and what to do. Exit code 1."""

    def __init__(self, message: str):
        super().__init__(f"error: {message}")


# ----------------------------------------------------------------------------------------------------
# Reading and writing


def read_jsonl(path, shape: dict) -> Iterator[dict]:
    """Yield the rows of a JSONL file, one at a time.

    Raises Stop naming file and line for bad JSON, a missing key or a wrong type, and naming the file when it is
    missing or has no row at all.
    """
    if not os.path.isfile(path):
        raise Stop(f"{path}: no such file. Check the path, or run the stage that writes it.")
    number = 0
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise Stop(f"{path}:{number}: not JSON ({e}). Each line must hold one JSON object.") from None
            _check(row, shape, f"{path}:{number}")
            yield row
    if number == 0:
        raise Stop(f"{path}: the file is empty. A stage with nothing to do is treated as a mistake.")


def count_rows(path, shape: dict) -> int:
    """Check every row, and that ids are unique, before hours are spent on the first ones."""
    seen: dict[str, int] = {}
    for number, row in enumerate(read_jsonl(path, shape), 1):
        if seen.setdefault(row["id"], number) != number:
            raise Stop(f'{path}:{number}: id "{row["id"]}" was used in line {seen[row["id"]]}. Ids are unique.')
    return len(seen)


def _check(row, shape: dict, where: str) -> None:
    if not isinstance(row, dict):
        raise Stop(f"{where}: expected a JSON object, found {type(row).__name__}.")
    for key, kind in shape.items():
        if key not in row:
            raise Stop(f'{where}: key "{key}" is missing. records.py documents the shape of each file.')
        expected = list if isinstance(kind, list) else kind
        if not isinstance(row[key], expected) or isinstance(row[key], bool):
            names = " or ".join(t.__name__ for t in (expected if isinstance(expected, tuple) else (expected,)))
            raise Stop(f'{where}: key "{key}" must be {names}, found {json.dumps(row[key])[:60]}.')
        if isinstance(kind, list):
            for i, element in enumerate(row[key]):
                _check(element, kind[0], f"{where}: {key}[{i}]")
    if "prompt" in shape and isinstance(row["prompt"], list):
        turns = row["prompt"]
        if not turns or not all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in turns):
            raise Stop(f'{where}: a conversation is a non-empty list of {{"role", "content"}}.')


def dump(row: dict) -> str:
    """One line of JSONL. NaN and infinity are no JSON: they raise ValueError here instead of spreading."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def whole(path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to the disk and rename it, file or folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    remove(temporary)
    try:
        yield temporary
    except BaseException:
        remove(temporary)
        raise
    for file in sorted(temporary.rglob("*")) if temporary.is_dir() else [temporary]:
        if file.is_file():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must survive a power cut, too
    os.fsync(folder)
    os.close(folder)


def write_whole(path, text: str) -> None:
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(path) -> None:
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def finite(value: float, where: str) -> float:
    """`value`, or Stop naming the place: a NaN that slips into a ranking poisons every later stage."""
    if not math.isfinite(value):
        raise Stop(f"{where}: the value is {value}. Nothing was written from it; mend its source and run again.")
    return value
