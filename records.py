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

    scored.jsonl      + per candidate "rewards": {name: float} and "reward", their weighted sum;
                        with score.py --ref_model "ref_logprobs": {name: float}

    pairs.jsonl       {"id", "iteration", "prompt",
                       "chosen": [{"role": "assistant", "content"}], "rejected",
                       "score_chosen", "score_rejected",
                       "prompt_token_ids", "chosen_token_ids", "rejected_token_ids",
                       "chosen_logprob", "rejected_logprob", "chosen_index", "rejected_index",
                       "chosen_model", "rejected_model"}: a superset of TRL's preference format,
                                                          with the prompt's other keys, but no meta

A file has its final name only when it is whole: it is written under a temporary name beside it,
flushed to the disk, and renamed. So the final name is the done marker, and nothing can disagree
with it. stage.py builds on that.
"""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Stop(SystemExit):
    """Ends the stage with a message for a person: what is wrong, where, what to do. Exit code 1."""

    def __init__(self, message: str):
        super().__init__(f"error: {message}")


# ---- kinds of values ---------------------------------------------------------------------------


class Kind(NamedTuple):
    """What a value may be."""

    name: str  # as a message calls it
    holds: Callable[[object], bool]
    optional: bool = False  # the key may be missing


LARGEST_NUMBER = 1e100  # in absolute value: the report squares rewards, and fp64 ends at 1e308
LARGEST_TOKEN_ID = 2**31 - 1  # the trainer keeps them as int32


def is_text(value) -> bool:
    return isinstance(value, str)


def is_object(value) -> bool:
    return isinstance(value, dict)


def is_list(value) -> bool:
    return isinstance(value, list)


def is_number(value) -> bool:
    """An int or a float; true is neither, and NaN is not within any bounds."""
    return type(value) in (int, float) and -LARGEST_NUMBER <= value <= LARGEST_NUMBER


def is_token_ids(value) -> bool:
    """A list of ints, perhaps an empty one; 6.9 and true are none."""
    if not isinstance(value, list):
        return False
    if not value:
        return True
    return set(map(type, value)) == {int} and 0 <= min(value) and max(value) <= LARGEST_TOKEN_ID


def is_turn(value) -> bool:
    """{"role", "content"}, both text. What a tool was asked or has answered is not rendered."""
    if not is_object(value) or value.get("tool_calls") or value.get("function_call"):
        return False
    return is_text(value.get("role")) and is_text(value.get("content"))


def is_conversation(value) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_turn, value))


def is_text_or_conversation(value) -> bool:
    return is_text(value) or is_conversation(value)


def is_numbers(value) -> bool:
    """Names and their numbers."""
    return is_object(value) and all(map(is_number, value.values()))


def is_texts(value) -> bool:
    """Names and their words, as the settings of a run."""
    return is_object(value) and all(map(is_text, value.values()))


def is_finish_reason(value) -> bool:
    return value in ("stop", "length")


def is_empty(value) -> bool:
    """Not 0 and not false, which are values."""
    return value is None or value in ("", [], {})


def optional(kind: Kind) -> Kind:
    """The key may be missing, and null means the same."""

    def holds(value) -> bool:
        return value is None or kind.holds(value)

    return Kind(f"{kind.name}, or null", holds, optional=True)


def forbidden(reason: str) -> Kind:
    """The key must be missing or empty."""
    return Kind(f"left out ({reason})", is_empty, optional=True)


TEXT = Kind("a string", is_text)
OBJECT = Kind("an object", is_object)
LIST = Kind("a list", is_list)
NUMBER = Kind("a finite number", is_number)
NUMBERS = Kind("an object of finite numbers", is_numbers)
TEXTS = Kind("an object of strings", is_texts)
TOKEN_IDS = Kind("a list of token ids, which are whole numbers from 0", is_token_ids)
FINISH_REASON = Kind('"stop" or "length"', is_finish_reason)
TEXT_OR_CONVERSATION = Kind(
    'a string, or a conversation: a non-empty list of {"role", "content"}, both strings, '
    "without tool calls",
    is_text_or_conversation,
)

# What a reader of each file may rely on: key -> kind, or [shape of each element].
PROMPT = {
    "id": TEXT,
    "prompt": TEXT_OR_CONVERSATION,
    "meta": optional(OBJECT),
    "tools": forbidden("no stage renders tools"),
}
CANDIDATE = {
    "text": TEXT,
    "token_ids": TOKEN_IDS,
    "logprob": NUMBER,
    "finish_reason": FINISH_REASON,
    "model": TEXT,
    "rewards": optional(NUMBERS),
    "reward": optional(NUMBER),
    "ref_logprobs": optional(NUMBERS),
}
SCORED_CANDIDATE = CANDIDATE | {"rewards": NUMBERS, "reward": NUMBER}
CANDIDATES = PROMPT | {"prompt_token_ids": TOKEN_IDS, "candidates": [CANDIDATE]}
SCORED = PROMPT | {"prompt_token_ids": TOKEN_IDS, "candidates": [SCORED_CANDIDATE]}

# Keys that a later stage adds to a row. In prompts.jsonl they would be overwritten there.
ADDED_TO_PAIRS = (
    "iteration",
    "chosen",
    "rejected",
    "score_chosen",
    "score_rejected",
    "chosen_token_ids",
    "rejected_token_ids",
    "chosen_logprob",
    "rejected_logprob",
    "chosen_index",
    "rejected_index",
    "chosen_model",
    "rejected_model",
)
ADDED_LATER = ("prompt_token_ids", "candidates", *ADDED_TO_PAIRS)


def without(keys: tuple[str, ...]) -> dict[str, Kind]:
    """A shape without these keys."""
    reason = "a stage writes its own value under this key: rename yours, or put it into meta"
    return {key: forbidden(reason) for key in keys}


NEW_PROMPT = PROMPT | without(ADDED_LATER)  # a row of prompts.jsonl
TO_PAIR = SCORED | without(ADDED_TO_PAIRS)  # a row that pairs are made of


# ---- reading -----------------------------------------------------------------------------------

DEEPEST = 100  # brackets within brackets; Python's own functions give up at about 1000


def read_jsonl(path, shape: dict | Kind) -> Iterator[dict]:
    """Yield the rows of a JSONL file, one at a time.

    Raises Stop naming file and line for whatever is not one JSON object of this shape, and naming
    the file when it is missing or has no row at all.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise Stop(f"{path}: is not a regular file, which can be read twice. Save it as one.")
    if not os.path.isfile(path):
        raise Stop(f"{path}: no such file. Check the path, or run the stage that writes it.")
    number = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            row = parse_json(line, where, "A line must hold one JSON object")
            check_shape(row, shape, where)
            yield row
    if number == 0:
        raise Stop(f"{path}: the file is empty. A stage with nothing to do is taken for a mistake.")


def read_json(path, shape: dict | Kind, remedy: str) -> dict:
    """The object in a JSON file. Raises Stop, which ends in `remedy`, where there is none.

    remedy: what to do about a damaged file, a sentence without its full stop.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as e:
        raise Stop(f"{path}: cannot be read ({e.strerror}). {remedy}.") from None
    row = parse_json(content, str(path), f"The file is damaged. {remedy}")
    check_shape(row, shape, str(path), f" The file is damaged. {remedy}.")
    return row


def parse_json(content: bytes, where: str, remedy: str):
    """The JSON value in `content`. Raises Stop for all that a later stage could not write again."""
    try:
        text = content.decode("utf-8-sig")  # a mark at its beginning, as Windows' editors write it
    except UnicodeDecodeError as e:
        raise Stop(
            f"{where}: not UTF-8 ({e.reason} at byte {e.start}). Convert the file to UTF-8, and "
            "unpack it first where it is compressed."
        ) from None
    if not text.strip():
        raise Stop(f"{where}: is blank. {remedy}.")
    try:
        value = DECODER.decode(text)
        deep = text.count("[") + text.count("{") > DEEPEST and is_deeper(value, DEEPEST)
    except RecursionError:
        deep = True
    except ValueError as e:  # JSONDecodeError, or what finite_float, refuse_constant or int() raise
        raise Stop(f"{where}: not JSON ({e}). {remedy}.") from None
    if deep:
        raise Stop(f"{where}: more than {DEEPEST} brackets within brackets. {remedy}.")
    if "\\ud" in text.lower() and has_lone_surrogate(value):
        raise Stop(f"{where}: half a surrogate pair (\\ud800 to \\udfff) is no text. Remove it.")
    return value


def finite_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:20]} is beyond the largest float")
    return value


def refuse_constant(name: str):
    raise ValueError(f"{name} is no number")


def without_repeats(pairs: list[tuple[str, object]]) -> dict:
    """Of a key that stands twice, one reader would take the first value, and another the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f'key "{key}" stands there twice')
    return found


# What Python's parser takes unless it is told otherwise: NaN, Infinity, and keys that repeat.
DECODER = json.JSONDecoder(
    parse_float=finite_float, parse_constant=refuse_constant, object_pairs_hook=without_repeats
)


def is_deeper(value, most: int) -> bool:
    """Whether objects and lists stand more than `most` deep within one another."""
    if not isinstance(value, (dict, list)):
        return False
    if most == 0:
        return True
    inside = value.values() if isinstance(value, dict) else value
    return any(is_deeper(element, most - 1) for element in inside)


def has_lone_surrogate(value) -> bool:
    """Whether some text in it cannot be written as UTF-8."""
    try:
        dump(value).encode()
    except UnicodeEncodeError:
        return True
    return False


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


def check_shape(value, shape: dict | Kind, where: str, remedy: str = "") -> None:
    """Stop where `value` is not what `shape` promises. remedy: added to the message."""
    if isinstance(shape, Kind):
        check_kind(value, shape, where, remedy)
        return
    check_kind(value, OBJECT, where, remedy)
    check_no_key_is_missing(value, shape, where, remedy)
    for key, kind in shape.items():
        there = f'{where}: key "{key}"'
        if isinstance(kind, list):
            check_kind(value[key], LIST, there, remedy)
            for i, element in enumerate(value[key]):
                check_shape(element, kind[0], f"{where}: {key}[{i}]", remedy)
        elif key in value:
            check_kind(value[key], kind, there, remedy)


def check_no_key_is_missing(value: dict, shape: dict, where: str, remedy: str) -> None:
    needed = [key for key, kind in shape.items() if isinstance(kind, list) or not kind.optional]
    missing = [f'"{key}"' for key in needed if key not in value]
    if missing:
        advice = remedy or " records.py documents every shape."
        is_missing = "is missing" if len(missing) == 1 else "are missing"
        raise Stop(f"{where}: key {', '.join(missing)} {is_missing}.{advice}")


def check_kind(value, kind: Kind, where: str, remedy: str = "") -> None:
    if not kind.holds(value):
        found = json.dumps(value)
        if len(found) > 60:
            found = found[:60] + "…"
        raise Stop(f"{where} must be {kind.name}; found {found}.{remedy}")


def finite(value: float, where: str) -> float:
    """`value`, or Stop naming the place: a NaN in a ranking would poison every later stage."""
    if not is_number(value):
        raise Stop(
            f"{where}: the value is {value}; it must be finite, and at most {LARGEST_NUMBER:g} in "
            "size. Nothing was written from it; correct its source and run again."
        )
    return value


# ---- writing -----------------------------------------------------------------------------------


def dump(row: dict) -> str:
    """One line of JSONL. NaN and infinity are not JSON: they raise ValueError and do not spread."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


WRITING = "writing "  # begins the note that `writing` adds to an error
UNFINISHED = ".iterdpo-unfinished"  # no file of a user has this ending: one that has may be removed


@contextmanager
def whole(path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, for a file or a folder.

    On success it is flushed to the disk and renamed to `path`; on failure it is removed.
    """
    path = Path(path)
    temporary = path.with_name(path.name + UNFINISHED)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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


@contextmanager
def writing(path) -> Iterator[None]:
    """Add a note with the file's name to an error: that of a full disk names no file."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{WRITING}{path}")
        raise


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
