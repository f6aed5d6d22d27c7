"""Write pairs.jsonl in another trainer's format.

    python tools/export_pairs.py --pairs runs/NAME/iter_01/pairs.jsonl --format llamafactory \\
        --output exported

TRL needs no export: pairs.jsonl is a superset of its preference format.

llamafactory: LLaMA-Factory's preference data in sharegpt form, whose `chosen` is one message where
ours is a list of one. The output is a folder for its `dataset_dir`, and its `dataset` is iterdpo:

    pairs.json          [{"conversations": [{"from": "human", "value"}, …],
                          "chosen": {"from": "gpt", "value"}, "rejected": {"from": "gpt", "value"}}]
    dataset_info.json   which names the file, its form and its columns

It wants turns that alternate, from the user's to the user's, after at most one system turn. It
would skip others with a warning; here they are left out and counted, by reason:

    text_prompt          raw text: LLaMA-Factory would put a chat template around it
    several_messages     an answer that is not one message of the assistant
    turns_out_of_order   a prompt whose turns do not alternate, or do not end with the user's

Several files become one. Token ids, scores and log-probs are not part of the format.
"""

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # records.py is in the root
from arguments import parse, parser
from records import TEXT_OR_CONVERSATION, Stop, forbidden, read_jsonl, whole, write_whole
from stage import Stage, run

PAIR = {
    "prompt": TEXT_OR_CONVERSATION,
    "chosen": TEXT_OR_CONVERSATION,
    "rejected": TEXT_OR_CONVERSATION,
    "tools": forbidden("it is not exported"),
}

NAME = "iterdpo"  # of the data set
DATASET_INFO = {
    NAME: {
        "file_name": "pairs.json",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    }
}
FROM = {"system": "system", "user": "human", "assistant": "gpt"}  # role -> LLaMA-Factory's tag


def arguments():
    p = parser(__doc__)
    add = p.add_argument
    add("--pairs", nargs="+", required=True, help="pairs.jsonl; several become one data set")
    add("--format", choices=("llamafactory",), required=True, help="see above")
    add("--output", required=True, help="folder of the data set")
    return p


def message(turn: dict) -> dict:
    return {"from": FROM[turn["role"]], "value": turn["content"]}


def why_not(row: dict) -> str | None:
    """Why LLaMA-Factory could not read this pair; None where it can."""
    if isinstance(row["prompt"], str):
        return "text_prompt"
    for answer in (row["chosen"], row["rejected"]):
        is_one_message = isinstance(answer, list) and len(answer) == 1
        if not is_one_message or answer[0]["role"] != "assistant":
            return "several_messages"
    roles = [turn["role"] for turn in row["prompt"]]
    if roles[0] == "system":
        roles = roles[1:]
    alternating = ["user", "assistant"] * len(roles)
    ends_with_user = len(roles) % 2 == 1
    if not ends_with_user or roles != alternating[: len(roles)]:
        return "turns_out_of_order"
    return None


def exported(row: dict) -> dict:
    return {
        "conversations": [message(turn) for turn in row["prompt"]],
        "chosen": message(row["chosen"][0]),
        "rejected": message(row["rejected"][0]),
    }


def write_pairs(sources: list[str], path: Path) -> tuple[int, Counter]:
    """Write the pairs as one JSON list, a line each. -> how many; what was left out, by reason"""
    written, dropped = 0, Counter()
    with open(path, "w", encoding="utf-8") as out:
        out.write("[")
        for source in sources:
            for row in read_jsonl(source, PAIR):
                reason = why_not(row)
                if reason:
                    dropped[reason] += 1
                    continue
                out.write("\n" if written == 0 else ",\n")
                out.write(json.dumps(exported(row), ensure_ascii=False))
                written += 1
        out.write("\n]\n")
    return written, dropped


def main():
    args = parse(arguments())
    stage = Stage(args, {"pairs": args.pairs}, args.output)
    if stage.done:
        return
    with whole(args.output) as folder:
        folder.mkdir()
        written, dropped = write_pairs(args.pairs, folder / "pairs.json")
        if not written:
            files = ", ".join(args.pairs)
            raise Stop(
                f"{files}: none of {dropped.total():,} pairs can be exported: {dict(dropped)}."
            )
        write_whole(folder / "dataset_info.json", json.dumps(DATASET_INFO, indent=2) + "\n")
        stage.count("rows", written + dropped.total(), written, dropped)
        stage.write_meta()
    stage.clean()


if __name__ == "__main__":
    run(main)
