"""Turn a data set into prompts.jsonl, and hold some of it out for the evaluation.

    python tools/prepare_prompts.py --dataset HuggingFaceH4/ultrafeedback_binarized \\
        --split train_prefs --as_conversation --output prompts.jsonl --heldout_output heldout.jsonl
    python tools/prepare_prompts.py --dataset chats.jsonl --field messages --output prompts.jsonl

--dataset is a file (.parquet, .jsonl, .json), a folder of them, or the name of a data set on the
Hugging Face hub (needs the package `datasets`). A row's prompt is its `prompt` or `messages`, or
what --field names: a string, or a conversation [{"role", "content"}], whose trailing assistant
turns are the answer and are cut off.

Every row that does not come out is counted by reason:

    empty               nothing to answer: no text, or only turns of the system and the assistant
    duplicate           the same roles and words as an earlier row; spacing does not matter
    over the maximum    more than --max_prompts
    held out, training  what went to the other file

Which prompts are held out is decided by a hash of (seed, content): the two files share no id and no
content, and shuffling the data set changes the order of the lines but not the split. Memory holds a
hash of each prompt and no text.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # records.py is in the root
from arguments import integer_in, parse, parser
from records import Stop, dump, is_conversation, parse_json, read_jsonl, remove, whole
from stage import Stage, check_apart, run, seed_of
from take_prompts import content_key

SUFFIXES = (".parquet", ".jsonl", ".json")
Row = tuple[str, dict]  # its place, as messages name it, and what it holds


def arguments():
    p = parser(__doc__)
    add = p.add_argument

    # Where the rows come from
    add("--dataset", required=True, help="a file, a folder, or a data set's name on the hub")
    add(
        "--split",
        help='of a hub data set or a folder ("SPLIT.jsonl", "SPLIT-*.parquet"); default: train',
    )
    add("--config", help="of a hub data set that has several")
    add(
        "--revision",
        help="of a hub data set: a commit, so that the same rows come back next year",
    )

    # What a prompt is
    add("--field", help="key that holds the prompt; default: prompt, or else messages")
    add(
        "--new_ids",
        action="store_true",
        help='make ids from content even for rows that have an "id"',
    )
    add(
        "--as_conversation",
        action="store_true",
        help="a string becomes one user turn: chat models need it",
    )
    add("--system", help="system turn put before each conversation that has none")
    add(
        "--meta",
        nargs="+",
        default=[],
        metavar="KEY",
        help='keys kept under "meta", for reward functions',
    )

    # Which prompts go where
    add("--output", required=True, help="prompts.jsonl: what is trained on")
    add("--heldout_output", help="heldout.jsonl: what is only evaluated on")
    add(
        "--heldout",
        type=integer_in("[1, inf)"),
        help="prompts held out; default 200: "
        "a standard error of 1/14 of the reward's standard deviation",
    )
    add(
        "--max_prompts",
        type=integer_in("[1, inf)"),
        help="at most this many training prompts, drawn at random; default: all",
    )
    add(
        "--seed",
        type=integer_in("[0, inf)"),
        default=0,
        help="seed of the split and of the draw; default 0",
    )
    return p


# ---- reading -----------------------------------------------------------------------------------


def find_files(args) -> list[Path]:
    """The files that --dataset names on this machine; none if it is a name on the hub."""
    path = Path(args.dataset)
    if not path.exists():
        is_no_hub_name = args.dataset.startswith((".", "/")) or args.dataset.count("/") > 1
        if is_no_hub_name or path.suffix in SUFFIXES:
            raise Stop(f"{path}: no such file or folder.")
        return []

    # flags that only the hub, or only a folder, can follow
    idle = {"config": args.config, "revision": args.revision}
    if path.is_file():
        idle["split"] = args.split
    for flag, value in idle.items():
        if value:
            raise Stop(
                f"--{flag} has no effect here: {path} is on this machine, "
                "and rows of a file are all read."
            )

    split = args.split or "train"
    files = [path] if path.is_file() else files_of_split(path, split)
    if not files or files[0].suffix not in SUFFIXES:
        raise Stop(
            f"{path}: expected {' or '.join(SUFFIXES)}, "
            f"and in a folder {split}.*, {split}-*.* or {split}/*.*"
        )
    return files


def files_of_split(folder: Path, split: str) -> list[Path]:
    """SPLIT.jsonl, SPLIT-00000-of-00002.parquet, SPLIT/anything.json; in order."""
    name = re.compile(re.escape(split) + r"([-.].*)?")
    files = []
    for parent, _, names in os.walk(folder, followlinks=True):
        for path in (Path(parent, name_here) for name_here in names):
            in_split = name.fullmatch(path.stem) or path.parent.name == split
            if in_split and not path.name.startswith("."):
                check_suffix(path)
                files.append(path)
    return sorted(files)


def check_suffix(path: Path) -> None:
    """Stop at a file of the split that cannot be read: its rows would be missing without a word."""
    if path.suffix not in SUFFIXES:
        raise Stop(
            f"{path}: is a file of this split, and not one of {', '.join(SUFFIXES)}. Unpack it, or "
            "move it away."
        )


def read_rows(args, files: list[Path], hub) -> Iterator[Row]:
    """All rows: of the files, or of the hub's data set."""
    for path in files:
        rows = parquet_rows(path) if path.suffix == ".parquet" else json_rows(path)
        for number, row in enumerate(rows, 1):
            yield f"{path}: row {number}", row
    if hub is not None:
        for number, row in enumerate(hub, 1):
            yield f"{args.dataset}: row {number}", row


def parquet_rows(path: Path) -> Iterator[dict]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise Stop(
            f"{path}: reading parquet needs the package pyarrow: pip install pyarrow"
        ) from None
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as e:
        raise Stop(f"{path}: cannot be read as parquet ({e}). Download or save it again.") from None


def json_rows(path: Path) -> Iterable[dict]:
    """The rows of one JSON array, or of JSON lines, which a .json file often holds instead."""
    with open(path, "rb") as file:
        is_array = file.read(4096).lstrip().startswith(b"[")
    if not is_array:
        return read_jsonl(path, {})
    return parse_json(path.read_bytes(), str(path), "The file must hold one JSON array")


def open_hub(name: str, config: str | None, split: str, revision: str | None):
    """A data set of the hub: downloaded once, then mapped into memory from the cache."""
    try:
        import datasets
    except ImportError:
        raise Stop(
            f"{name}: no file or folder here, and the hub needs the package: pip install datasets"
        ) from None
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError) as e:
        raise Stop(f"{name}, split {split}: the hub did not give this data set. {e}") from None


# ---- one row -----------------------------------------------------------------------------------


def field_of(row: dict, asked: str | None) -> str:
    """The key under which a row holds its prompt. `asked` is --field."""
    if asked:
        return asked
    return "prompt" if "prompt" in row else "messages"


def given_prompt(row, args, where: str) -> str | list | None:
    """What the row holds as its prompt, unchanged."""
    if not isinstance(row, dict):
        raise Stop(f"{where}: expected a JSON object, found {type(row).__name__}.")
    if row.get("tools"):
        raise Stop(f'{where}: has "tools", which no stage renders. Leave such rows out.')
    field = field_of(row, args.field)
    if field not in row:
        keys = ", ".join(row)
        raise Stop(
            f'{where}: no key "{field}"; name the prompt\'s with --field. The row has: {keys}.'
        )
    return row[field]


def to_prompt(row: dict, args, where: str) -> str | list[dict] | None:
    """The row's prompt in the contract's shape; None when there is nothing to answer."""
    prompt = given_prompt(row, args, where)
    if prompt is None:
        return None
    if isinstance(prompt, str) and not args.as_conversation:
        return prompt if prompt.strip() else None
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]

    turns = to_turns(prompt, f'{where}: "{field_of(row, args.field)}"')
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or turns[-1]["role"] == "system" or not turns[-1]["content"].strip():
        return None
    if args.system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": args.system})
    return turns


def to_turns(conversation, where: str) -> list[dict]:
    """Copies of the turns with role and content alone."""
    if conversation == []:
        return []
    if not is_conversation(conversation):
        found = str(conversation)[:80]
        raise Stop(
            f'{where} must be text or a list of {{"role", "content"}} with text in both and '
            f"without tool calls, found {found}."
        )
    return [{"role": turn["role"], "content": turn["content"]} for turn in conversation]


def to_record(row: dict, prompt: str | list[dict], args, where: str) -> dict:
    """A row of prompts.jsonl."""
    if args.new_ids or row.get("id") is None:
        id = "p" + content_key(prompt).hex()[:16]
    else:
        id = str(row["id"])
    record = {"id": id, "prompt": prompt}
    if args.meta:
        record["meta"] = {}
    for key in args.meta:
        if key not in row:
            keys = ", ".join(row)
            raise Stop(f'{where}: no key "{key}", which --meta names. The row has: {keys}.')
        if key == "meta" and isinstance(row[key], dict):  # as in a file that this tool has written
            record["meta"] |= row[key]
        else:
            record["meta"][key] = row[key]
    return record


# ---- what becomes of each row ------------------------------------------------------------------


def sort_out(rows: Iterator[Row], args) -> list[str]:
    """What becomes of each row: "training", "held out", or the reason why it is dropped."""
    fates: list[str] = []
    first: dict[bytes, int] = {}  # content -> the row that holds it first
    strings = conversations = False  # was there one?
    for number, (where, row) in enumerate(rows):
        given = given_prompt(row, args, where)
        is_string = isinstance(given, str)
        if is_string:
            strings = True
        if given is not None and (args.as_conversation or not is_string):
            conversations = True

        prompt = to_prompt(row, args, where)
        if prompt is None:
            fates.append("empty")
            continue
        content = content_key(prompt)
        if content in first:
            fates.append("duplicate")
            continue
        first[content] = number
        fates.append("training")

    if args.as_conversation and not strings:
        raise Stop("--as_conversation has no effect: every prompt is a conversation already.")
    if args.system and not conversations:
        raise Stop("--system has no effect: every prompt is a string. Pass --as_conversation, too.")
    if len(first) <= args.heldout:
        raise Stop(
            f"{args.dataset}: {len(first):,} different prompts, {args.heldout:,} of them "
            "to hold out: none are left to train on. Lower --heldout."
        )

    # draw the held-out prompts, and the training prompts where there is a maximum
    drawn = sorted(first, key=lambda content: seed_of("prepare_prompts", args.seed, content))
    for content in drawn[: args.heldout]:
        fates[first[content]] = "held out"
    if args.max_prompts is not None:
        kept = args.heldout + args.max_prompts
        for content in drawn[kept:]:
            fates[first[content]] = "over the maximum"
    return fates


# ---- the stage ---------------------------------------------------------------------------------


def write(stage: Stage, rows: Iterator[Row], fates: list[str], wanted: str, args) -> None:
    """Write the rows of one fate, in the order they came in."""
    place_of: dict[str, str] = {}  # id -> the row that has it, in either file
    with whole(stage.output) as temporary:
        with open(temporary, "w", encoding="utf-8") as out:
            for (where, row), fate in zip(rows, fates, strict=True):
                if fate not in ("training", "held out"):
                    continue
                prompt = to_prompt(row, args, where)
                record = to_record(row, prompt, args, where)
                id = record["id"]
                if id in place_of:
                    raise Stop(
                        f'{where}: id "{id}" was used for another prompt, at {place_of[id]}. '
                        "Pass --new_ids to make every id from the content."
                    )
                place_of[id] = where
                if fate == wanted:
                    out.write(to_line(record, args, where))

        dropped = Counter(fates)
        written = dropped.pop(wanted)
        stage.count("rows", len(fates), written, dropped)
        stage.write_meta()
    stage.clean()


def to_line(record: dict, args, where: str) -> str:
    try:
        line = dump(record)
        line.encode()
        return line
    except (ValueError, TypeError) as e:
        names = " ".join(args.meta)
        raise Stop(f"{where}: --meta {names}: no JSON can be made of it ({e}).") from None


def check_arguments(args) -> None:
    """Stop at flags that contradict each other; fill in the default of --heldout."""
    if args.heldout is not None and not args.heldout_output:
        raise Stop(
            "--heldout has no effect without --heldout_output, "
            "the file that the held-out prompts go to."
        )
    if args.heldout is None:
        args.heldout = 200 if args.heldout_output else 0
    if args.heldout_output:
        check_apart("--output", args.output, "--heldout_output", args.heldout_output)


def main():
    args = parse(arguments())
    check_arguments(args)
    files = find_files(args)

    # The held-out prompts first, so that they exist once the training prompts do.
    outputs = {"held out": args.heldout_output, "training": args.output}
    inputs = {"dataset": files} if files else {}
    stages = {}
    for fate, output in outputs.items():
        if not output:
            continue
        stage = Stage(args, inputs, output, free=("heldout_output",))
        if not stage.done:
            stages[fate] = stage
            # There are no parts. Without their folder, a run after a corrected row is not compared
            # with this one.
            remove(stage.parts)
    if not stages:
        return

    hub = None
    if not files:
        hub = open_hub(args.dataset, args.config, args.split or "train", args.revision)
    fates = sort_out(read_rows(args, files, hub), args)
    for fate, stage in stages.items():
        write(stage, read_rows(args, files, hub), fates, fate, args)


if __name__ == "__main__":
    run(main)
