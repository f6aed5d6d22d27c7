"""pairs.jsonl -> the pairs that are trained on, as token ids.

A pair is a dict:

    "id"                              of the prompt, or file and line where the row has none
    "prompt", "chosen", "rejected"    int32 arrays of token ids, a tenth of a list's memory
    "logprobs"                        what the generator computed for (chosen, rejected), or None
    "models"                          hashes of the policies that wrote (chosen, rejected), or None
    "where"                           file:line, for messages

The generator's token ids are taken as they are. A row without any may come from any preference data
set: it is rendered once, with the chat template of the model that is trained (chat.py).
"""

import math
from collections import Counter

import numpy as np

import chat
import models
from kernels.attention import positions
from records import (
    NUMBER,
    TEXT_OR_CONVERSATION,
    TOKEN_IDS,
    Stop,
    forbidden,
    optional,
    read_jsonl,
)
from stage import ROWS_OF, Stage, add_counts, say

# What a row must hold: text, or turns. Token ids are optional.
PREFERENCE = {
    "prompt": TEXT_OR_CONVERSATION,
    "chosen": TEXT_OR_CONVERSATION,
    "rejected": TEXT_OR_CONVERSATION,
    "prompt_token_ids": optional(TOKEN_IDS),
    "chosen_token_ids": optional(TOKEN_IDS),
    "rejected_token_ids": optional(TOKEN_IDS),
    "chosen_logprob": optional(NUMBER),
    "rejected_logprob": optional(NUMBER),
    "tools": forbidden("no stage renders tools"),
}
TOKEN_ID_KEYS = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")


def load_pairs(args, tokenizer, config, stage: Stage) -> list[dict]:
    """The pairs of args.pairs.

    What cannot be trained on is counted by reason, in stage.counts: over all rows, and where there
    are several files, over the rows of each.

    args: pairs, model, max_length, and for a warning batch_size and num_train_epochs. Raises Stop
    for bad rows, and where no pair is left.
    """
    pairs = read_pairs(args.pairs, "rows", Reader(args, tokenizer, config), stage)
    steps = math.ceil(len(pairs) / args.batch_size) * args.num_train_epochs
    warning = few_steps(len(pairs), steps, args.batch_size)
    if warning:
        stage.warn(warning)
    return pairs


def load_held_out(args, tokenizer, config, stage: Stage, trained: list[dict]) -> list[dict]:
    """The pairs of args.eval_pairs; none where it is not given. Raises Stop for one of `trained`.

    Two pairs are the same if all of their tokens are, whichever answer is the chosen one.
    """
    if not args.eval_pairs:
        return []
    held_out = read_pairs(args.eval_pairs, "eval_rows", Reader(args, tokenizer, config), stage)
    trained_at = {identity(pair): pair["where"] for pair in trained}
    for pair in held_out:
        if identity(pair) in trained_at:
            raise Stop(
                f"{pair['where']}: the same pair is trained on, in {trained_at[identity(pair)]}: "
                "it would tell nothing about held-out pairs. Remove it from one of the two files."
            )
    return held_out


def identity(pair: dict) -> tuple[bytes, ...]:
    answers = sorted([pair["chosen"].tobytes(), pair["rejected"].tobytes()])
    return pair["prompt"].tobytes(), *answers


def read_pairs(paths: list[str], name: str, reader: "Reader", stage: Stage) -> list[dict]:
    """name: of the rows, in stage.counts."""
    pairs = []
    of_files: dict[str, dict] = {}  # a file that is given twice counts twice
    for path in paths:
        pairs_before, dropped_before = len(pairs), reader.dropped.copy()
        for line, row in enumerate(read_jsonl(path, PREFERENCE), 1):
            pair = reader.read(row, f"{path}:{line}")
            if pair is not None:
                pairs.append(pair)
        read = len(pairs) - pairs_before
        dropped = reader.dropped - dropped_before
        balance = {"in": read + dropped.total(), "out": read, "dropped": dropped}
        add_counts(of_files, {f"{ROWS_OF}{path}": balance})
    reader.say_what_was_rendered()

    total = len(pairs) + reader.dropped.total()
    if not pairs:
        files = ", ".join(paths)
        reasons = dict(reader.dropped)
        raise Stop(f"{files}: none of {total:,} pairs can be trained on: {reasons}")
    stage.count(name, total, len(pairs), reader.dropped)
    if len(of_files) > 1:
        for what, count in of_files.items():
            stage.count(what, count["in"], count["out"], count["dropped"])
    return pairs


def few_steps(pair_count: int, steps: int, batch_size: int) -> str | None:
    """The warning where so few steps cannot teach much; None where there are enough.

    steps: of all epochs. With one or two, the learning rate has hardly a schedule, and AdamW has
    hardly an average: its first update is the gradient's sign.
    """
    made = "1 step is made" if steps == 1 else f"{steps} steps are made"
    remedy = "Use more prompts per iteration, or a smaller --batch_size"
    if pair_count < batch_size:
        return (
            f"the {pair_count:,} pairs are fewer than one batch (--batch_size {batch_size:,}): "
            f"{made}. {remedy}"
        )
    if steps <= 2:
        return f"only {made} of {pair_count:,} pairs (--batch_size {batch_size:,}). {remedy}"
    return None


class Reader:
    """Turns rows into pairs, and counts what it drops."""

    def __init__(self, args, tokenizer, config):
        self.model = args.model
        self.tokenizer = tokenizer
        generation_config = models.load_generation_config(args.model, config)
        self.stop_ids, _ = chat.find_stop_ids(tokenizer, generation_config, {})
        self.max_length = args.max_length or positions(config)
        self.vocab_size = config.get_text_config().vocab_size
        self.dropped: Counter = Counter()
        self.rendered = 0  # pairs that came without token ids
        self.endless = 0  # of those, the pairs with an answer that holds no stop id

    def read(self, row: dict, where: str) -> dict | None:
        """The pair of a row; None where it is dropped."""
        token_ids = [row.get(key) for key in TOKEN_ID_KEYS]
        if token_ids == [None, None, None]:
            token_ids = self.render(row, where)
        elif None in token_ids:
            together = "prompt_, chosen_ and rejected_token_ids come together, or not at all"
            raise Stop(f"{where}: {together}")
        reason = self.reason_to_drop(token_ids)
        if reason:
            self.dropped[reason] += 1
            return None

        prompt_ids, chosen_ids, rejected_ids = token_ids
        self.check_vocabulary([*prompt_ids, *chosen_ids, *rejected_ids], where)
        return {
            "id": row.get("id", where),
            "prompt": np.asarray(prompt_ids, dtype=np.int32),
            "chosen": np.asarray(chosen_ids, dtype=np.int32),
            "rejected": np.asarray(rejected_ids, dtype=np.int32),
            "logprobs": [row.get("chosen_logprob"), row.get("rejected_logprob")],
            "models": [row.get("chosen_model"), row.get("rejected_model")],
            "where": where,
        }

    def render(self, row: dict, where: str) -> list[list[int]] | None:
        self.rendered += 1
        token_ids = chat.encode_pair(self.tokenizer, row, where, self.stop_ids)
        if token_ids is None:
            return None
        _, chosen_ids, rejected_ids = token_ids
        both_end = chat.ends(chosen_ids, self.stop_ids) and chat.ends(rejected_ids, self.stop_ids)
        if not both_end:
            self.endless += 1
        return token_ids

    def reason_to_drop(self, token_ids: list[list[int]] | None) -> str | None:
        """The reason why these cannot be trained on; None where they can."""
        if token_ids is None:
            return "template_not_prefix"
        prompt_ids, chosen_ids, rejected_ids = token_ids
        if not (prompt_ids and chosen_ids and rejected_ids):
            return "no_tokens"
        if len(prompt_ids) + max(len(chosen_ids), len(rejected_ids)) > self.max_length:
            return "too_long"
        return None

    def check_vocabulary(self, ids: list[int], where: str) -> None:
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            known = f"0 … {self.vocab_size - 1}"
            raise Stop(f"{where}: a token id outside {known}: another model's tokenizer?")

    def say_what_was_rendered(self) -> None:
        if self.rendered:
            say(
                f"{self.rendered:,} pairs carry no token ids: "
                f"rendered with the tokenizer and chat template of {self.model}"
            )
        if self.endless:
            say(
                f"note: in {self.endless:,} of them the chat template writes no stop id after an "
                "answer, so training does not teach where to end "
                f"(stop ids: {self.stop_ids})"
            )
