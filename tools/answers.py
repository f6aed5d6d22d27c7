"""A policy's answers as AlpacaEval reads them: one JSON list of instruction, output, generator and
dataset.

    python tools/answers.py --candidates runs/NAME/iter_03/eval/scored.jsonl --generator NAME \\
        --output model_outputs.json

For its own instructions, let the policy answer these first (generate.py --num_samples 1). The
answer to a prompt is the first that was sampled, and not the best: the others would be a choice
that a user of the policy cannot make.

AlpacaEval joins the answers of two models by their instruction. Left out and counted:

    no_answer          the row has no candidate
    several_turns      AlpacaEval knows one instruction; a system turn before it is left out
    same_instruction   as an earlier row, with another system turn, say: each would meet each
"""

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # records.py is in the root
from arguments import parse, parser
from records import CANDIDATES, Stop, read_jsonl, whole
from stage import Stage, run


def arguments():
    p = parser(__doc__)
    add = p.add_argument
    add("--candidates", required=True, help="candidates.jsonl or scored.jsonl")
    add("--generator", required=True, help="the policy's name in AlpacaEval's tables")
    add("--dataset", default="heldout", help="name of these prompts; default: heldout")
    add("--output", required=True, help="model_outputs.json")
    return p


def instruction_of(prompt: str | list[dict]) -> str | None:
    """What the user asked; None for a conversation of several turns."""
    if isinstance(prompt, str):
        return prompt
    turns = prompt[1:] if prompt[0]["role"] == "system" else prompt
    if len(turns) != 1 or turns[0]["role"] != "user":
        return None
    return turns[0]["content"]


def answers(args) -> tuple[list[dict], Counter]:
    """The list, and what was left out, by reason."""
    found: dict[str, dict] = {}  # instruction -> its answer
    dropped: Counter = Counter()
    for row in read_jsonl(args.candidates, CANDIDATES):
        instruction = instruction_of(row["prompt"])
        if instruction is None:
            dropped["several_turns"] += 1
        elif not row["candidates"]:
            dropped["no_answer"] += 1
        elif instruction in found:
            dropped["same_instruction"] += 1
        else:
            found[instruction] = {
                "dataset": args.dataset,
                "instruction": instruction,
                "output": row["candidates"][0]["text"],
                "generator": args.generator,
            }
    return list(found.values()), dropped


def main():
    args = parse(arguments())
    stage = Stage(args, {"candidates": args.candidates}, args.output)
    if stage.done:
        return
    found, dropped = answers(args)
    if not found:
        raise Stop(f"{args.candidates}: no row has an answer to show: {dict(dropped)}.")
    with whole(args.output) as temporary:
        temporary.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", "utf-8")
        stage.count("rows", len(found) + dropped.total(), len(found), dropped)
        stage.write_meta()
    stage.clean()


if __name__ == "__main__":
    run(main)
