"""Turn a data set into prompts.jsonl, and hold some of it out for the evaluation.

    python tools/prepare_prompts.py --dataset HuggingFaceH4/ultrafeedback_binarized --split train_prefs \\
        --as_conversation --output prompts.jsonl --heldout_output heldout.jsonl
    python tools/prepare_prompts.py --dataset chats.jsonl --field messages --output prompts.jsonl

--dataset is a file (.parquet, .jsonl, .json), a folder of them, or the name of a data set on the
Hugging Face hub (needs the package `datasets`). A row's prompt is its `prompt` or `messages`, or
what --field names: a string, or a conversation [{"role", "content"}], whose trailing assistant
turns are the answer and are cut off.

Every row that does not come out is counted under a name: "empty" (nothing to answer: no text, or no
turns but the system's and assistant's), "duplicate" (roles and words of an earlier row; spacing
does not matter), "over the maximum", and, for either output, what went to the other one.

Which prompts are held out is decided by a hash of (seed, content): the two files share no id and no
content, and shuffling the data set changes the order of the lines but not the split. Memory holds a
hash of each prompt and no text.
"""

import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # records.py stands in the root
from records import Stop, dump, read_jsonl, remove, whole
from stage import Stage, parse, parser, run, seed_of
from take_prompts import content_key

SUFFIXES = (".parquet", ".jsonl", ".json")


def arguments():
    p = parser(__doc__)
    # Where the rows come from
    p.add_argument(
        "--dataset", required=True, help="a file, a folder, or a data set's name on the hub"
    )
    p.add_argument(
        "--split",
        help='of a hub data set or a folder ("SPLIT.jsonl", "SPLIT-*.parquet"); default: train',
    )
    p.add_argument("--config", help="of a hub data set that has several")
    p.add_argument(
        "--revision", help="of a hub data set: a commit, so that the same rows come back next year"
    )
    # What a prompt is
    p.add_argument("--field", help="key that holds the prompt; default: prompt, or else messages")
    p.add_argument(
        "--new_ids",
        action="store_true",
        help='make ids from content even for rows that have an "id"',
    )
    p.add_argument(
        "--as_conversation",
        action="store_true",
        help="a string becomes one user turn: chat models need it",
    )
    p.add_argument("--system", help="system turn put before each conversation that has none")
    p.add_argument(
        "--meta",
        nargs="+",
        default=[],
        metavar="KEY",
        help='keys kept under "meta", for reward functions',
    )
    # Which prompts go where
    p.add_argument("--output", required=True, help="prompts.jsonl: what is trained on")
    p.add_argument("--heldout_output", help="heldout.jsonl: what is only evaluated on")
    p.add_argument(
        "--heldout",
        type=int,
        help="prompts held out; default 200: a standard error of 1/14 of the reward's standard deviation",
    )
    p.add_argument(
        "--max_prompts",
        type=int,
        help="at most so many training prompts, drawn at random; default: all",
    )
    p.add_argument("--seed", type=int, default=0, help="of the split and of the draw; default 0")
    return p


def find_files(args) -> list[Path]:
    """The files that --dataset names on this machine; none: it is a name on the hub."""
    path, split = Path(args.dataset), args.split or "train"
    if not path.exists():
        if (
            path.suffix in SUFFIXES
            or args.dataset.startswith((".", "/"))
            or args.dataset.count("/") > 1
        ):
            raise Stop(f"{path}: no such file or folder.")
        return []
    idle = [
        f
        for f in ("config", "revision", *(["split"] if path.is_file() else []))
        if getattr(args, f)
    ]
    if idle:
        raise Stop(
            f"--{idle[0]} has no effect here: {path} is on this machine, and rows of a file are all read."
        )
    every = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES)
    name = re.compile(re.escape(split) + r"([-.].*)?")
    files = [f for f in every if path.is_file() or name.fullmatch(f.stem) or f.parent.name == split]
    if not files or files[0].suffix not in SUFFIXES:
        raise Stop(
            f"{path}: expected {' or '.join(SUFFIXES)}, and in a folder {split}.*, {split}-*.* or {split}/*.*"
        )
    return files


def file_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, row) for each row of one file; `where` names the place in messages."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise Stop(
                f"{path}: reading parquet needs the package pyarrow: pip install pyarrow"
            ) from None
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    else:
        with open(path, encoding="utf-8") as file:
            if (
                file.read(4096).lstrip().startswith("[")
            ):  # one array; often a .json file holds JSON lines instead
                file.seek(0)
                try:
                    rows = json.load(file)
                except json.JSONDecodeError as e:
                    raise Stop(f"{path}: not JSON ({e}).") from None
            else:
                rows = read_jsonl(path, {})
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))


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


def to_prompt(row, args, where: str, seen: Counter) -> str | list[dict] | None:
    """The row's prompt in the contract's shape; None when there is nothing to answer."""
    if not isinstance(row, dict):
        raise Stop(f"{where}: expected a JSON object, found {type(row).__name__}.")
    field = args.field or ("prompt" if "prompt" in row else "messages")
    if field not in row:
        raise Stop(
            f'{where}: no key "{field}"; name the prompt\'s with --field. The row has: {", ".join(row)}.'
        )
    prompt = row[field]
    if prompt is None:
        return None
    if isinstance(prompt, str):
        seen["strings"] += 1
        if not args.as_conversation:
            return prompt if prompt.strip() else None
        prompt = [{"role": "user", "content": prompt}]
    seen["conversations"] += 1
    try:
        turns = [{"role": t["role"], "content": t["content"]} for t in prompt]
        if not all(isinstance(v, str) for t in turns for v in t.values()):
            raise TypeError
    except (TypeError, KeyError):
        raise Stop(
            f'{where}: "{field}" must be text or a list of {{"role", "content"}} with text in both, '
            f"found {str(prompt)[:80]}."
        ) from None
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or turns[-1]["role"] == "system" or not turns[-1]["content"].strip():
        return None
    if args.system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": args.system})
    return turns


def to_row(row: dict, prompt, args, where: str) -> dict:
    """A row of prompts.jsonl."""
    made = "p" + content_key(prompt).hex()[:16]
    record = {
        "id": made if args.new_ids or row.get("id") is None else str(row["id"]),
        "prompt": prompt,
    }
    for key in args.meta:
        if key not in row:
            raise Stop(
                f'{where}: no key "{key}", which --meta names. The row has: {", ".join(row)}.'
            )
        whole_meta = key == "meta" and isinstance(
            row[key], dict
        )  # a file that this tool, say, has written
        record.setdefault("meta", {}).update(row[key] if whole_meta else {key: row[key]})
    return record


def sort_out(rows, args) -> list[str]:
    """What becomes of each row: "training", "held out", or the reason why it is dropped."""
    fates: list[str] = []
    first: dict[bytes, int] = {}  # content -> the row that holds it first
    seen: Counter = Counter()
    for number, (where, row) in enumerate(rows):
        prompt = to_prompt(row, args, where, seen)
        fates.append("empty" if prompt is None else "training")
        if prompt is not None and first.setdefault(content_key(prompt), number) != number:
            fates[-1] = "duplicate"
    if args.as_conversation and not seen["strings"]:
        raise Stop("--as_conversation has no effect: every prompt is a conversation already.")
    if args.system and not seen["conversations"]:
        raise Stop("--system has no effect: every prompt is a string. Pass --as_conversation, too.")
    if len(first) <= args.heldout:
        raise Stop(
            f"{args.dataset}: {len(first):,} different prompts, {args.heldout:,} of them to hold out: none are left "
            "to train on. Lower --heldout."
        )
    order = sorted(first, key=lambda content: seed_of("prepare_prompts", args.seed, content))
    for content in order[: args.heldout]:
        fates[first[content]] = "held out"
    if args.max_prompts is not None:
        for content in order[args.heldout + args.max_prompts :]:
            fates[first[content]] = "over the maximum"
    return fates


def write(stage: Stage, rows, fates: list[str], fate: str, args) -> None:
    """Write the rows of one fate, in the order they came in."""
    ids: dict[str, str] = {}
    with whole(stage.output) as temporary:
        with open(temporary, "w", encoding="utf-8") as out:
            for (where, row), f in zip(rows, fates, strict=True):
                if f not in ("training", "held out"):
                    continue
                record = to_row(row, to_prompt(row, args, where, Counter()), args, where)
                if ids.setdefault(record["id"], where) != where:
                    raise Stop(
                        f'{where}: id "{record["id"]}" was used for another prompt, at {ids[record["id"]]}. '
                        "Pass --new_ids to make every id from the content."
                    )
                if f == fate:
                    try:
                        out.write(dump(record))
                    except (ValueError, TypeError) as e:
                        raise Stop(
                            f"{where}: --meta {' '.join(args.meta)}: no JSON can be made of it ({e})."
                        ) from None
        balance = Counter(fates)
        stage.count("rows", balance.total(), balance.pop(fate), balance)
        stage.write_meta()
    stage.clean()


def settle(args, files: list[Path], output: str) -> Stage | None:
    """The stage that writes this output; None where that is done."""
    inputs = {"dataset": files} if files else {}
    stage = Stage(args, inputs, output, free=("heldout_output",))
    if stage.done:
        return None
    remove(
        stage.parts
    )  # there are none: after a mended row the next run is not held against this one
    return stage


def main():
    args = parse(arguments())
    if args.heldout is not None and not args.heldout_output:
        raise Stop(
            "--heldout has no effect without --heldout_output, the file that the held-out prompts go to."
        )
    if args.heldout is None:
        args.heldout = 200 if args.heldout_output else 0
    if args.heldout < bool(args.heldout_output) or (args.max_prompts or 1) < 1:
        raise Stop("--heldout and --max_prompts must be at least 1.")

    files = find_files(args)
    # The held-out prompts first: whoever finds the training prompts finds them, too.
    outputs = [("held out", args.heldout_output), ("training", args.output)]
    stages = [(fate, settle(args, files, output)) for fate, output in outputs if output]
    if not any(stage for _, stage in stages):
        return
    hub = (
        None if files else open_hub(args.dataset, args.config, args.split or "train", args.revision)
    )

    def rows() -> Iterator[tuple[str, dict]]:
        for file in files:
            yield from file_rows(file)
        if hub is not None:
            yield from ((f"{args.dataset}: row {number}", row) for number, row in enumerate(hub, 1))

    fates = sort_out(rows(), args)
    for fate, stage in stages:
        if stage:
            write(stage, rows(), fates, fate, args)


if __name__ == "__main__":
    run(main)
