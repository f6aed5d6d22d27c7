"""Take one iteration's prompts from the file of all of them.

    python tools/take_prompts.py --prompts prompts.jsonl --heldout heldout.jsonl --output iter_02/prompts.jsonl \\
        --iteration 2 --num_prompts 1000

All prompts are shuffled once a pass, the passes are laid end to end, and iteration k takes the k-th
--num_prompts of that row: no prompt is seen twice before every one was seen once. When they run
out, the next pass begins with a new shuffle, and that is said. An iteration that lies across two
passes never holds a prompt twice: what it has from the end of one pass goes to the end of the next.

A prompt that is also held out would turn the evaluation into a memory test, so every row is
compared with the held-out ones, by id and by content, before anything is written.

The slice depends on (seed, iteration, num_prompts, number of lines) alone. Line numbers are
shuffled, not rows, so memory holds ids and no text. Lines are copied as they stand, in the order of
the file.
"""

import hashlib
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # records.py stands in the root
from records import PROMPT, Stop, read_jsonl, remove, whole
from stage import Stage, parse, parser, run, seed_of


def arguments():
    p = parser(__doc__)
    p.add_argument("--prompts", required=True, help="prompts.jsonl: all training prompts")
    p.add_argument(
        "--heldout", required=True, help="heldout.jsonl: prompts that must never be trained on"
    )
    p.add_argument("--output", required=True, help="prompts.jsonl of this iteration")
    p.add_argument("--iteration", type=int, required=True, help="1, 2, …")
    p.add_argument(
        "--num_prompts", type=int, help="prompts an iteration; default: all of them, every time"
    )
    p.add_argument("--seed", type=int, default=0, help="of the shuffles; default 0")
    return p


def content_key(prompt) -> bytes:
    """What makes two prompts the same: roles and words. Spacing does not, nor string against one
    user turn.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    words = [[t["role"], " ".join(str(t["content"]).split())] for t in turns]
    return hashlib.sha256(json.dumps(words).encode()).digest()[:16]


def take(total: int, n: int, iteration: int, seed: int) -> list[int]:
    """The line indices of iteration k: positions (k-1)n … kn-1 of the passes laid end to end; n <=
    total.
    """
    first, last = (iteration - 1) * n, iteration * n
    taken: list[int] = []
    across: set[int] = (
        set()
    )  # the end of the pass before, which shares an iteration with the start of this one
    for p in range((last - 1) // total + 1):
        order = list(range(total))
        random.Random(seed_of("take_prompts", seed, p)).shuffle(order)
        order.sort(
            key=across.__contains__
        )  # stable: moves those to the end and leaves the rest as it is
        taken += order[max(0, first - p * total) : max(0, last - p * total)]
        across = set(order[total - (p + 1) * total % n :])
    return taken


def check(prompts: str, heldout: str) -> int:
    """The number of prompts; Stop at the first that has the id or the content of another or of a
    held-out one.
    """
    ids, contents = {}, {}
    for number, row in enumerate(read_jsonl(heldout, PROMPT), 1):
        ids[row["id"]] = contents[content_key(row["prompt"])] = f"{heldout}:{number}"
    seen: dict[str, int] = {}
    for number, row in enumerate(read_jsonl(prompts, PROMPT), 1):
        where = f'{prompts}:{number}: id "{row["id"]}"'
        if seen.setdefault(row["id"], number) != number:
            raise Stop(f"{where} was used in line {seen[row['id']]}. Ids are unique.")
        for what, other in (
            ("id", ids.get(row["id"])),
            ("content", contents.get(content_key(row["prompt"]))),
        ):
            if other:
                raise Stop(
                    f"{where} has the same {what} as {other}, which is held out. Training on it would spoil the "
                    "evaluation: remove one of them, or split the prompts with tools/prepare_prompts.py."
                )
    return len(seen)


def main():
    args = parse(arguments())
    if args.iteration < 1 or (args.num_prompts is not None and args.num_prompts < 1):
        raise Stop("--iteration and --num_prompts count from 1")
    stage = Stage(args, {"prompts": args.prompts, "heldout": args.heldout}, args.output)
    if stage.done:
        return
    remove(
        stage.parts
    )  # there are none: after a mended row the next run is not held against this one
    total = check(args.prompts, args.heldout)

    n = args.num_prompts or total
    if n > total:
        print(
            f"{args.prompts} holds {total:,} prompts, fewer than --num_prompts {n:,}: all are taken, once"
        )
        n = total
    elif args.num_prompts and args.iteration * n > total and (args.iteration * n - 1) % total < n:
        again = (args.iteration * n - 1) // total + 1
        print(
            f"{args.prompts}: the {total:,} prompts ran out: pass {again} begins, with a new shuffle"
        )

    wanted = set(take(total, n, args.iteration, args.seed))
    with whole(args.output) as temporary:
        with (
            open(args.prompts, encoding="utf-8") as file,
            open(temporary, "w", encoding="utf-8") as out,
        ):
            out.writelines(line.rstrip("\n") + "\n" for i, line in enumerate(file) if i in wanted)
        stage.count("rows", total, len(wanted), {"other iterations": total - len(wanted)})
        stage.write_meta()
    stage.clean()


if __name__ == "__main__":
    run(main)
