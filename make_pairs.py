"""Scored candidates -> preference pairs: the answers that a reward ranked become (chosen,
rejected).

    python make_pairs.py --scored scored.jsonl --output pairs.jsonl

For one prompt with candidates y_1 … y_N, let

    s_i = reward_i - length_penalty * |y_i|          |y_i|: the tokens of the answer

and order the candidates by s. Equal s are put in random order: in the file, candidates are ordered
by source (two policies, two temperatures), and with that order one source would be the chosen one
and the other the rejected one. The strategy says which two form a pair; pair k = 1, 2, … of
--pairs_per_prompt is

    max_min      the k-th best and the k-th worst: the widest margin, as RLHFlow and OpenRLHF do
    max_random   the best and another one, drawn at random ("RLHF Workflow", 2405.07863)
    max_second   the k-th best and the (k+1)-th best: hard pairs, close to the policy's frontier
    random       two drawn at random, the better one chosen: the control, without selection effect

The chosen answer is always the one with the larger s, and score_chosen and score_rejected hold s: a
length penalty that has decided a pair is not undone by looking at the raw reward again.

What makes no pair is counted by reason, and never dropped silently:

    truncated          cut off by the token limit: it would teach the policy to stop anywhere
    identical          the two texts are the same
    tie                the two s are the same
    margin             the two s differ by less than --min_margin
    single_candidate   there is nothing to compare with
    held_out           not for training: its prompt fell to --eval_output

As answers that were cut off make no pair, a penalty on them (score.py --missing_eos_penalty) would
decide nothing: it needs --keep_truncated here, and without that this stage stops. --keep_truncated
without such a penalty only prints a note.

--eval_share 0.05 --eval_output FILE writes the pairs of every twentieth prompt to FILE instead, for
dpo_train.py --eval_pairs. Which prompts these are follows from (seed, iteration, id), so all pairs
of a prompt are on the same side. FILE.meta.json holds the same as that of --output.

Rows stream through, so memory does not grow with the file. A prompt's random choices depend on
(seed, iteration, id) alone: shuffle the rows and the same pairs come out.
"""

import itertools
import math
import os
import random
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from arguments import integer_in, number_in, parse, parser
from records import TO_PAIR, Stop, count_rows, dump, finite, read_jsonl, whole
from stage import Stage, check_apart, hash_path, meta_path_of, read_meta, run, say, seed_of

STRATEGIES = ("max_min", "max_random", "max_second", "random")

# The share of prompts lost to ties and identical answers at which the metadata holds a warning.
# With a third lost, a pair costs 1.5 times as many answers as it could, and the prompts that are
# left, those on which the policy disagrees with itself, are no longer a sample of what was asked.
MANY_LOST = 1 / 3


def arguments():
    p = parser(__doc__)
    add = p.add_argument

    # Files
    add("--scored", required=True, help="scored.jsonl, written by score.py or judge.py")
    add("--output", required=True, help="pairs.jsonl: a superset of TRL's preference format")

    # Which pairs
    add("--strategy", choices=STRATEGIES, default="max_min", help="see above; default: max_min")
    add(
        "--pairs_per_prompt",
        type=integer_in("[1, inf)"),
        default=1,
        help="default 1: a second pair of the same prompt teaches less than one of another",
    )

    # Which answers
    add(
        "--min_margin",
        type=number_in("[0, inf)"),
        default=0.0,
        help="smallest difference in score that makes a pair; default 0: any difference",
    )
    add(
        "--length_penalty",
        type=number_in("(-inf, inf)"),
        default=0.0,
        help="subtracted from the reward per answer token; default 0",
    )
    add(
        "--keep_truncated",
        action="store_true",
        help='let answers with finish_reason "length" take part: with score.py '
        "--missing_eos_penalty, else they are ranked as if they were finished",
    )

    # Which are not for training
    add(
        "--eval_share",
        type=number_in("(0, 1)"),
        help="share of the prompts whose pairs are held out; default: none",
    )
    add("--eval_output", help="file for the pairs of those prompts")

    # Where in the run
    add(
        "--iteration",
        type=integer_in("[0, inf)"),
        default=0,
        help="recorded in each pair, and part of its seed",
    )
    add(
        "--seed",
        type=integer_in("[0, inf)"),
        default=0,
        help="for ties, max_random and random; default 0",
    )
    return p


# ---- which two answers form a pair -------------------------------------------------------------


def rank_pairs(
    scores: list[float], strategy: str, k: int, rng: random.Random
) -> list[tuple[int, int]]:
    """Up to k pairs of indices (winner, loser) with scores[winner] >= scores[loser].

    rng orders equal scores. By position, the first of two sources would always come first.
    """
    best_first = list(range(len(scores)))
    rng.shuffle(best_first)
    best_first.sort(key=lambda i: scores[i], reverse=True)  # stable: ties stay shuffled

    if strategy == "max_min":
        worst_first = best_first[::-1]
        half = len(best_first) // 2
        return list(zip(best_first[:half], worst_first[:half], strict=True))[:k]

    if strategy == "max_random":
        best, *others = best_first
        losers = rng.sample(others, min(k, len(others)))
        return [(best, loser) for loser in losers]

    if strategy == "max_second":
        return list(itertools.pairwise(best_first))[:k]

    if strategy == "random":
        pairs = list(itertools.combinations(best_first, 2))
        return rng.sample(pairs, min(k, len(pairs)))

    raise ValueError(f"no strategy is called {strategy!r}")


# ---- the pairs of one prompt -------------------------------------------------------------------


class Ranked(NamedTuple):
    index: int  # in the row's candidates
    candidate: dict
    score: float  # s_i above


def usable_answers(row: dict, args, where: str) -> list[Ranked]:
    """The candidates that may take part in a pair, with their scores."""
    answers = []
    for index, candidate in enumerate(row["candidates"]):
        length = len(candidate["token_ids"])
        score = finite(
            candidate["reward"] - args.length_penalty * length,
            f'{where}: id "{row["id"]}", candidate {index}, score',
        )
        if candidate["finish_reason"] == "stop" or args.keep_truncated:
            answers.append(Ranked(index, candidate, score))
    return answers


def refusal(chosen: Ranked, rejected: Ranked, min_margin: float) -> str | None:
    """Why these two make no pair; None where they make one."""
    if chosen.candidate["text"] == rejected.candidate["text"]:
        return "identical"
    if chosen.score == rejected.score:
        return "tie"
    margin = chosen.score - rejected.score
    if margin < min_margin and not math.isclose(margin, min_margin):  # 0.3 - 0.1 is not quite 0.2
        return "margin"
    return None


def make_pairs(row: dict, answers: list[Ranked], args) -> tuple[list[dict], Counter]:
    """The pairs of one scored row, and how many were refused, by reason."""
    pairs: list[dict] = []
    refused: Counter = Counter()
    if not answers:
        return pairs, refused

    rng = random.Random(seed_of("make_pairs", args.seed, args.iteration, row["id"]))
    scores = [answer.score for answer in answers]
    for winner, loser in rank_pairs(scores, args.strategy, args.pairs_per_prompt, rng):
        chosen, rejected = answers[winner], answers[loser]
        reason = refusal(chosen, rejected, args.min_margin)
        if reason:
            refused[reason] += 1
        else:
            pairs.append(pair_of(row, chosen, rejected, args.iteration))
    return pairs, refused


def pair_of(row: dict, chosen: Ranked, rejected: Ranked, iteration: int) -> dict:
    """One line of pairs.jsonl."""
    travels_along = {k: v for k, v in row.items() if k not in ("candidates", "meta")}
    return {
        **travels_along,
        "iteration": iteration,
        "chosen": completion(row["prompt"], chosen.candidate["text"]),
        "rejected": completion(row["prompt"], rejected.candidate["text"]),
        "score_chosen": chosen.score,
        "score_rejected": rejected.score,
        "chosen_token_ids": chosen.candidate["token_ids"],
        "rejected_token_ids": rejected.candidate["token_ids"],
        "chosen_logprob": chosen.candidate["logprob"],
        "rejected_logprob": rejected.candidate["logprob"],
        "chosen_index": chosen.index,
        "rejected_index": rejected.index,
        "chosen_model": chosen.candidate["model"],
        "rejected_model": rejected.candidate["model"],
    }


def completion(prompt: str | list[dict], text: str) -> str | list[dict]:
    """In TRL's formats a conversation is answered by a list of messages, a string by a string."""
    if isinstance(prompt, str):
        return text
    return [{"role": "assistant", "content": text}]


def why_no_pair(row: dict, answers: list[Ranked], refused: Counter) -> str:
    """The one reason under which a row without a pair is counted."""
    if refused:
        return next(iter(refused))  # of its first pair
    some_truncated = len(answers) < len(row["candidates"])
    if some_truncated and len(row["candidates"]) > 1:
        return "truncated"
    return "single_candidate"


# ---- held-out pairs ----------------------------------------------------------------------------


def is_held_out(id: str, args) -> bool:
    """Whether the pairs of this prompt go to --eval_output."""
    if args.eval_share is None:
        return False
    drawn = seed_of("held-out pairs", args.seed, args.iteration, id)  # 63 bits
    return drawn < args.eval_share * 2**63


def check_eval_output(args) -> None:
    """--eval_share and --eval_output come together, and overwrite nothing but what they wrote."""
    if (args.eval_share is None) != (args.eval_output is None):
        raise Stop("--eval_share and --eval_output come together, or not at all")
    if args.eval_output is None:
        return
    check_apart("--eval_output", args.eval_output, "--output", args.output)
    check_apart("--eval_output", args.eval_output, "--scored", args.scored)
    if os.path.exists(args.eval_output) and not is_of_this_output(args):
        raise Stop(
            f"{args.eval_output}: exists, and was not made together with {args.output}: this stage "
            "does not touch it. Move it away, or use another --eval_output."
        )


def is_of_this_output(args) -> bool:
    """Whether --eval_output was written with --output, by its metadata. Both may have moved."""
    path = meta_path_of(args.eval_output)
    if not path.exists():
        return False
    made_by = read_meta(path, f"Remove it and {args.eval_output}")["arguments"]
    if not made_by.get("eval_output"):
        return False
    return way_to_output(**made_by) == way_to_output(**vars(args))


def way_to_output(eval_output: str, output: str, **_) -> str:
    return os.path.relpath(output, os.path.dirname(eval_output) or ".")


def check_kept_eval_output(args, stage: Stage) -> None:
    """Stop where the output is done, and the held-out pairs beside it are gone or damaged."""
    if args.eval_output is None:
        return
    written = read_meta(stage.meta_path, f"Remove it and {args.output}").get("eval_output_sha256")
    if not os.path.exists(args.eval_output):
        raise Stop(
            f"{args.eval_output}: no such file, though {args.output} is done. Give the name "
            "that was given then, or --overwrite to make both again."
        )
    if hash_path(args.eval_output) != written:
        raise Stop(
            f"{args.eval_output}: is not what was written together with {args.output}: it was "
            "damaged or edited. Restore it, or --overwrite makes both again."
        )


def check_share(args, pairs: "Balance") -> None:
    """Stop where the share is too small for so few prompts, or leaves nothing to train on."""
    if args.eval_share is None:
        return
    held_out = pairs.dropped["held_out"]
    if not held_out or not pairs.out:
        raise Stop(
            f"--eval_share {args.eval_share:g}: {held_out:,} pairs are held out, and {pairs.out:,} "
            "are left to train on; both must be some. Choose another share, or take more prompts."
        )


# ---- the stage ---------------------------------------------------------------------------------


class Balance:
    """What went in, what came out, and what was dropped, by reason."""

    def __init__(self):
        self.total = 0
        self.out = 0
        self.dropped: Counter = Counter()


def write_pairs(args, path, eval_path) -> dict[str, Balance]:
    """Write the pairs of all rows, one row at a time: to `path`, or to `eval_path` if held out."""
    rows, candidates, pairs = Balance(), Balance(), Balance()
    with open(path, "w", encoding="utf-8") as out, open(eval_path, "w", encoding="utf-8") as held:
        for number, row in enumerate(read_jsonl(args.scored, TO_PAIR), 1):
            answers = usable_answers(row, args, f"{args.scored}:{number}")
            made, refused = make_pairs(row, answers, args)
            held_out = is_held_out(row["id"], args)
            for pair in made:
                (held if held_out else out).write(dump(pair))

            # count candidates, pairs and rows
            candidates.total += len(row["candidates"])
            candidates.out += len(answers)
            candidates.dropped["truncated"] += len(row["candidates"]) - len(answers)
            pairs.total += len(made) + refused.total()
            pairs.dropped.update(refused)
            rows.total += 1
            if made and held_out:
                pairs.dropped["held_out"] += len(made)
                rows.dropped["held_out"] += 1
            elif made:
                pairs.out += len(made)
                rows.out += 1
            else:
                rows.dropped[why_no_pair(row, answers, refused)] += 1
    return {"rows": rows, "candidates": candidates, "pairs": pairs}


def check_penalty(args) -> None:
    """Stop where the rewards hold a penalty that can decide nothing; say where one is missing.

    A scored file without metadata is not of this project, and says nothing about penalties.
    """
    penalties = missing_eos_penalties(args.scored)
    if any(penalties) and not args.keep_truncated:
        raise Stop(
            f"{args.scored}: was scored with --missing_eos_penalty {max(penalties):g}, which has "
            "no effect: answers that were cut off take part in no pair. Give --keep_truncated, or "
            "score again without the penalty."
        )
    if penalties and not any(penalties) and args.keep_truncated and args.length_penalty <= 0:
        say(
            "note: --keep_truncated without a penalty: answers that were cut off are ranked as if "
            "they were finished. score.py --missing_eos_penalty takes something from them"
        )


def missing_eos_penalties(scored: str) -> list[float]:
    """What score.py recorded for this file, or for those whose rewards judge.py has added to."""
    path = meta_path_of(scored)
    if not path.exists():
        return []
    recorded = read_meta(path, f"Remove it and {Path(scored).name} to make both again")["arguments"]
    if "missing_eos_penalty" in recorded:
        return [recorded["missing_eos_penalty"]]
    penalties = []
    for source in recorded.get("candidates", []):
        penalties += missing_eos_penalties(source)
    return penalties


def warn_of_lost_prompts(stage: Stage, rows: Balance) -> None:
    """Say what to do where many prompts were lost to answers that are too much alike."""
    tied, identical = rows.dropped["tie"], rows.dropped["identical"]
    share = (tied + identical) / rows.total
    if share >= MANY_LOST:
        stage.warn(
            f"{share:.0%} of the prompts made no pair, as their best and worst answers tie "
            f"({tied:,}) or are identical ({identical:,}). Raise --temperature or --num_samples of "
            "generate.py, or use a reward that tells more answers apart"
        )


def stop_without_pairs(scored: str, rows: Balance) -> None:
    reasons = [f"  {n:>8,}  {reason}" for reason, n in rows.dropped.items()]
    why = "\n".join(reasons)
    raise Stop(
        f"{scored}: no pair could be made from {rows.total:,} prompts:\n{why}\n"
        "Ties and identical answers: raise --temperature or --num_samples of generate.py. "
        "Truncated answers: raise its --max_new_tokens. Margin: lower --min_margin."
    )


def main():
    args = parse(arguments())
    check_eval_output(args)
    stage = Stage(args, {"scored": args.scored}, args.output, free=("eval_output",))
    if stage.done:
        check_kept_eval_output(args, stage)
        return
    count_rows(args.scored, TO_PAIR)
    check_penalty(args)

    # The held-out pairs get their name first: the other file says that the stage is done.
    held_out = whole(args.eval_output) if args.eval_output else nullcontext(os.devnull)
    with whole(args.output) as temporary, held_out as eval_temporary:
        balances = write_pairs(args, temporary, eval_temporary)
        for what, balance in balances.items():
            stage.count(what, balance.total, balance.out, balance.dropped)
        if not balances["pairs"].out and not balances["pairs"].dropped["held_out"]:
            stop_without_pairs(args.scored, balances["rows"])
        check_share(args, balances["pairs"])
        warn_of_lost_prompts(stage, balances["rows"])
        if args.eval_output:
            stage.write_meta(eval_output_sha256=hash_path(eval_temporary))
            shutil.copyfile(stage.meta_path, meta_path_of(args.eval_output))
        else:
            stage.write_meta()
    stage.clean()


if __name__ == "__main__":
    run(main)
