"""Take one iteration's prompts from the file of all prompts.

    python tools/take_prompts.py --prompts prompts.jsonl --heldout heldout.jsonl \\
        --output iter_02/prompts.jsonl --iteration 2 --num_prompts 1000

All prompts are shuffled once per pass, the passes are laid end to end, and iteration k takes the
k-th slice of --num_prompts: no prompt is seen twice before every prompt was seen once. When they
run out, the next pass begins with a new shuffle, and a message says so. An iteration that lies
across two passes never holds a prompt twice: what it has from the end of one pass goes to the end
of the next.

A prompt that is also held out would turn the evaluation into a memory test, so every row is
compared with the held-out ones, by id and by content, before anything is written.

The slice depends on (seed, iteration, num_prompts, number of lines) alone. Line numbers are
shuffled, not rows, so memory holds ids and no text. Lines are copied unchanged, in the order of the
file.
"""

import hashlib
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # records.py is in the root
from arguments import integer_in, parse, parser
from records import NEW_PROMPT, Stop, read_jsonl, remove, whole
from stage import Stage, run, seed_of


def arguments():
    p = parser(__doc__)
    add = p.add_argument
    add("--prompts", required=True, help="prompts.jsonl: all training prompts")
    add("--heldout", required=True, help="heldout.jsonl: prompts that must never be trained on")
    add("--output", required=True, help="prompts.jsonl of this iteration")
    add("--iteration", type=integer_in("[1, inf)"), required=True, help="1, 2, …")
    add(
        "--num_prompts",
        type=integer_in("[1, inf)"),
        help="prompts per iteration; default: all of them, every time",
    )
    add("--seed", type=integer_in("[0, inf)"), default=0, help="seed of the shuffles; default 0")
    return p


# ---- which prompts -----------------------------------------------------------------------------


def take(total: int, n: int, iteration: int, seed: int) -> list[int]:
    """The line indices of iteration k: positions (k-1)n … kn-1 of the passes laid end to end.

    total: lines in the file; n: lines per iteration, at most total.
    """
    first, last = (iteration - 1) * n, iteration * n
    passes = (last - 1) // total + 1
    taken: list[int] = []
    # the end of the pass before, which shares an iteration with the start of this one
    across: set[int] = set()
    for number in range(passes):
        order = list(range(total))
        random.Random(seed_of("take_prompts", seed, number)).shuffle(order)
        late = [i for i in order if i in across]
        order = [i for i in order if i not in across] + late

        # what this pass holds of the iteration
        start = number * total
        taken += order[max(0, first - start) : max(0, last - start)]

        # what it shares with the next pass
        end = start + total
        shared = end % n
        across = set(order[total - shared :])
    return taken


def new_pass(total: int, n: int, iteration: int) -> int | None:
    """The number of the pass that begins within this iteration, from 2; None where none begins."""
    last = iteration * n - 1  # position of the iteration's last prompt
    begins = last % total < n
    if last >= total and begins:
        return last // total + 1
    return None


# ---- no held-out prompt among them -------------------------------------------------------------


def content_key(prompt: str | list[dict]) -> bytes:
    """What makes two prompts the same: roles and words.

    Spacing makes no difference, and a string is the same as one user turn.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    words = []
    for turn in turns:
        content = " ".join(str(turn["content"]).split())
        words.append([turn["role"], content])
    return hashlib.sha256(json.dumps(words).encode()).digest()[:16]


def check(prompts: str, heldout: str) -> int:
    """The number of prompts, after a check that ids are unique.

    Stops at the first prompt that has the id of another, or the id or content of a held-out one.
    """
    place_of_id: dict[str, str] = {}
    place_of_content: dict[bytes, str] = {}
    for number, row in enumerate(read_jsonl(heldout, NEW_PROMPT), 1):
        place = f"{heldout}:{number}"
        place_of_id[row["id"]] = place
        place_of_content[content_key(row["prompt"])] = place

    line_of: dict[str, int] = {}
    for number, row in enumerate(read_jsonl(prompts, NEW_PROMPT), 1):
        id = row["id"]
        where = f'{prompts}:{number}: id "{id}"'
        if id in line_of:
            raise Stop(f"{where} was used in line {line_of[id]}. Ids are unique.")
        line_of[id] = number
        if id in place_of_id:
            stop_at_heldout(where, "id", place_of_id[id])
        content = content_key(row["prompt"])
        if content in place_of_content:
            stop_at_heldout(where, "content", place_of_content[content])
    return len(line_of)


def stop_at_heldout(where: str, what: str, place: str) -> None:
    raise Stop(
        f"{where} has the same {what} as {place}, which is held out. Training on it would spoil "
        "the evaluation: remove one of them, or split the prompts with tools/prepare_prompts.py."
    )


# ---- the stage ---------------------------------------------------------------------------------


def main():
    args = parse(arguments())
    stage = Stage(args, {"prompts": args.prompts, "heldout": args.heldout}, args.output)
    if stage.done:
        return
    # There are no parts. Without their folder, a run after a corrected row is not compared with
    # this one.
    remove(stage.parts)

    # how many
    total = check(args.prompts, args.heldout)
    n = args.num_prompts or total
    if n > total:
        print(
            f"{args.prompts} holds {total:,} prompts, fewer than --num_prompts {n:,}: "
            "all are taken, once"
        )
        n = total
    elif args.num_prompts:
        again = new_pass(total, n, args.iteration)
        if again:
            print(
                f"{args.prompts}: the {total:,} prompts ran out: "
                f"pass {again} begins, with a new shuffle"
            )

    # copy their lines
    wanted = set(take(total, n, args.iteration, args.seed))
    with whole(args.output) as temporary:
        with (
            open(args.prompts, encoding="utf-8", newline="\n") as file,
            open(temporary, "w", encoding="utf-8") as out,
        ):
            for index, line in enumerate(file):
                if index in wanted:
                    out.write(line.rstrip("\n") + "\n")
        waiting = total - len(wanted)
        stage.count("rows", total, len(wanted), {"other iterations": waiting})
        stage.write_meta()
    stage.clean()


if __name__ == "__main__":
    run(main)
