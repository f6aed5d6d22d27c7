"""One prompt of a demo run, followed through the loop: each file's real row, and a loss by hand.

    bash iterate.sh
    python tools/one_prompt.py --run runs/demo --output docs/one_prompt.md

Every number in the page is read from a file of the run, or computed here from the models of the run
with transformers alone, one plain sequence at a time.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root
import models
from arguments import parse, parser
from records import PROMPT, SCORED, TEXT, TEXTS, Stop, read_json, read_jsonl, write_whole
from stage import read_meta, run
from training.checks import own_logprob


def arguments():
    p = parser(__doc__)
    p.add_argument("--run", default="runs/demo", help="a finished run of the demo")
    p.add_argument("--id", help="of a prompt; default: the first pair of the first iteration")
    p.add_argument("--output", default="docs/one_prompt.md")
    return p


def row_with(path: Path, id: str, shape: dict) -> dict:
    for row in read_jsonl(path, shape):
        if row["id"] == id:
            return row
    raise Stop(f"{path}: holds no row with the id {id}.")


def logprob(folder: str, prompt_ids: list[int], answer_ids: list[int]) -> float:
    """log pi(answer | prompt), summed over the answer's tokens, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = models.load_model(AutoModelForCausalLM, folder, torch.float32, "eager").eval()
    with torch.no_grad():
        return own_logprob(model, np.asarray(prompt_ids), np.asarray(answer_ids)).item()


def block(text: str) -> str:
    return f"```json\n{text}\n```\n"


def shown(row: dict) -> str:
    """A row as JSON, one key per line."""
    lines = [f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in row.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def token_table(tokenizer, ids: list[int]) -> str:
    tokens = [tokenizer.decode([i]).replace("\n", "\\n") for i in ids]
    words = " ".join(f"{token!r}:{i}" for token, i in zip(tokens, ids, strict=True))
    return f"    {words}\n"


def candidate_table(candidates: list[dict]) -> str:
    lines = ["| | text | tokens | logprob | finish_reason | reward |", "|---|---|---|---|---|---|"]
    for index, c in enumerate(candidates):
        numbers = f"{len(c['token_ids'])} | {c['logprob']:.4f} | {c['finish_reason']}"
        text = c["text"].replace("\n", "\\n").replace("|", "\\|")
        lines.append(f"| {index} | {text} | {numbers} | {c['reward']:.4f} |")
    return "\n".join(lines) + "\n"


def loss_by_hand(pair: dict, policies: dict[str, str], beta: float) -> str:
    """d and -log sigmoid(beta d) of the pair, before and after training."""
    prompt_ids = pair["prompt_token_ids"]
    before, after = [], []
    for answer_ids in (pair["chosen_token_ids"], pair["rejected_token_ids"]):
        before.append(logprob(policies["before"], prompt_ids, answer_ids))
        after.append(logprob(policies["after"], prompt_ids, answer_ids))
    d = (after[0] - before[0]) - (after[1] - before[1])
    loss = math.log1p(math.exp(-beta * d))
    stored = f"{pair['chosen_logprob']:.5f} | {pair['rejected_logprob']:.5f}"
    by_hand = f"({after[0]:.5f} - {before[0]:.5f}) - ({after[1]:.5f} - {before[1]:.5f})"
    return f"""\
| | chosen | rejected |
|---|---|---|
| the generator's log-prob, stored in the row | {stored} |
| log ref, computed here by transformers alone | {before[0]:.5f} | {before[1]:.5f} |
| log pi: after the iteration's training | {after[0]:.5f} | {after[1]:.5f} |

The first two rows must agree: dpo_train.py compares them, and stops the run if they do not. The
loss is -log sigmoid(beta d) with

    d = [log pi(chosen) - log ref(chosen)] - [log pi(rejected) - log ref(rejected)]

and beta = {beta:g}. Before the first step pi = ref, so d = 0 and the loss is ln 2 = 0.69315. After
training

    d    = {by_hand} = {d:.5f}
    loss = -log sigmoid({beta:g} * {d:.5f}) = {loss:.5f}
"""


def page(folder: Path, id: str | None) -> str:
    remedy = "Name the folder of a run that iterate.sh has made"
    config = read_json(folder / "config.json", TEXTS, remedy)
    first = folder / "iter_01"
    pairs = read_jsonl(first / "pairs.jsonl", {"id": TEXT})
    pair = next((row for row in pairs if id in (None, row["id"])), None)
    if pair is None:
        raise Stop(f"{first}/pairs.jsonl: holds no pair with the id {id}.")
    beta = beta_of(first / "policy.meta.json")
    prompt = row_with(first / "prompts.jsonl", pair["id"], PROMPT)
    scored = row_with(first / "scored.jsonl", pair["id"], SCORED)
    tokenizer = models.load_tokenizer(config["MODEL"])
    chosen = scored["candidates"][pair["chosen_index"]]
    policies = {"before": config["MODEL"], "after": str(first / "policy")}
    return f"""\
# One prompt, from the first file to its loss

The first iteration of the demo, `bash iterate.sh`, seen through one prompt. Made by

    python tools/one_prompt.py --run runs/demo --output docs/one_prompt.md

## prompts.jsonl: what is asked

{block(shown(prompt))}
## candidates.jsonl: what the policy reads, and what it writes

The chat template turns the conversation into token ids, `prompt_token_ids`:

{token_table(tokenizer, scored["prompt_token_ids"])}
The policy writes {len(scored["candidates"])} answers to it. These are the `token_ids` of answer
{pair["chosen_index"]}, which will be the chosen one. The last is the stop id, which the policy
has written, too:

{token_table(tokenizer, chosen["token_ids"])}
## scored.jsonl: what the reward makes of them

{candidate_table(scored["candidates"])}
`logprob` is log pi(y|x), summed over the answer's tokens, as the generator computed it. A � in a
text is a token that is no whole character: ids are stored, and no text is encoded again.

## pairs.jsonl: best and worst

{block(shown(pair))}
## The loss, by hand

{loss_by_hand(pair, policies, beta)}"""


def beta_of(meta: Path) -> float:
    """Of a training with plain DPO; Stop for another loss, which this page does not explain."""
    arguments = read_meta(meta, "Name another run")["arguments"]
    plain = {"loss_type": "sigmoid", "nll_coef": 0, "label_smoothing": None, "length_coef": None}
    for flag, value in plain.items():
        if arguments[flag] != value:
            raise Stop(f"{meta}: --{flag} {arguments[flag]}: this page explains plain DPO alone.")
    return arguments["beta"][0]


def main():
    args = parse(arguments())
    write_whole(args.output, page(Path(args.run), args.id))


if __name__ == "__main__":
    run(main)
