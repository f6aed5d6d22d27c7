"""The figures of an iteration, a row of summary.jsonl. report.py says what each of them is."""

import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from statistics import fmean, stdev

from records import NUMBER, SCORED, TEXT, TEXT_OR_CONVERSATION, read_jsonl
from report_run import Iteration, Measures, Rewards, measure, opponent_identity

PAIR = {
    "id": TEXT,
    "prompt": TEXT_OR_CONVERSATION,
    "chosen": TEXT_OR_CONVERSATION,
    "rejected": TEXT_OR_CONVERSATION,
    "score_chosen": NUMBER,
    "score_rejected": NUMBER,
}

INITIAL = "the initial policy"  # as the judge's opponent


def summarise(
    iteration: Iteration, initial: Iteration | None, rewards: Rewards, reference: str
) -> dict:
    """A row of summary.jsonl; a key is missing while the file that it comes from is missing.

    initial: the initial policy's iteration. reference: "init" or "prev".
    """
    folder, metas, steps = iteration.folder, iteration.metas, iteration.steps
    row = {"iteration": iteration.number}

    # held-out answers
    if any(iteration.heldout.values()):
        compared = initial.heldout if initial and initial is not iteration else {}
        row |= heldout_figures(iteration.heldout, compared, rewards.win_rates)
        row |= judge_figures(metas, initial)
        row["objective/scores"] = row["reward"]
        row["val/contain_eos_token"] = 1 - row["truncated"]
        if iteration.number == 0:
            row.setdefault("kl/init", 0.0)  # by definition

    # the answers that pairs were made of, and the pairs
    if (folder / "scored.jsonl").exists():
        row |= sampled_figures(folder / "scored.jsonl", rewards)
        row["sampled/position_bias"] = position_bias(metas.get("scored", {}))
    if (folder / "pairs.jsonl").exists():
        pairs = read_jsonl(folder / "pairs.jsonl", PAIR)
        margins = [score_margin(pair) for pair in pairs]
        row["pairs"] = len(margins)
        row["objective/scores_margin"] = fmean(margins)

    # all stages, and training
    row["counts"] = of_each_stage(metas, "counts")
    row["seconds"] = of_each_stage(metas, "seconds")
    if steps:
        row["steps"] = len(steps)
        row["training"] = training_figures(steps)
    if iteration.evaluations:
        row["evaluation"] = evaluation_figures(iteration.evaluations)
    if "policy" in metas:
        row |= policy_figures(metas["policy"], row, reference)
    return {key: value for key, value in row.items() if value is not None and value != {}}


def of_each_stage(metas: dict[str, dict], key: str) -> dict:
    """What the stages have recorded under this key; stages without it are left out."""
    return {stage: meta[key] for stage, meta in metas.items() if meta.get(key)}


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard error of independent values, one per prompt or per run."""
    if len(values) == 1:
        return fmean(values), None
    return fmean(values), stdev(values) / math.sqrt(len(values))


def win_rate(now: list[float], then: list[float]) -> float:
    """The chance that one of the answers `now` beats one of those `then`.

    A tie, which rounding may hide, is half a win.
    """
    wins = []
    for a in now:
        for b in then:
            if math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-5):
                wins.append(0.5)
            else:
                wins.append(float(a > b))
    return fmean(wins)


def heldout_figures(
    now: dict[str, Measures], initial: dict[str, Measures], win_rates: Collection[str] = ()
) -> dict:
    """x, x_se, … of one policy, and x_diff and x_win if there is an initial one to compare with.

    win_rates: names of figures that get no x_win, since they compare answers already.
    """
    answered = {id: measures for id, measures in now.items() if measures}
    row = {"prompts": len(answered)}
    row["answers"] = sum(len(measures["reward"]) for measures in answered.values())
    for x in names_of(answered.values()):
        measured = {id: measures for id, measures in answered.items() if x in measures}
        means = [fmean(measures[x]) for measures in measured.values()]
        row[x], row[f"{x}_se"] = mean_and_error(means)
        if x.startswith("kl/"):
            row[f"{x}_per_token"] = mean_per_token(x, measured)
        is_reward = x in ("score", "gold") or x.startswith("reward")
        if is_reward and initial:
            row |= compared_figures(x, measured, initial, has_win=x not in win_rates)
    return row


def mean_per_token(x: str, measured: dict[str, Measures]) -> float:
    """The sum of x over all answers, divided by all their tokens."""
    total = 0.0
    tokens = 0
    for measures in measured.values():
        total += sum(measures[x])
        tokens += sum(measures["length"])
    return total / tokens


def compared_figures(
    x: str, measured: dict[str, Measures], initial: dict[str, Measures], has_win: bool
) -> dict:
    """x_diff and x_win over the prompts that the initial policy has answered, too."""
    differences = []
    wins = []
    for id, measures in measured.items():
        if x not in initial[id]:
            continue
        ours = measures[x]
        theirs = initial[id][x]
        differences.append(fmean(ours) - fmean(theirs))
        if has_win:
            wins.append(win_rate(ours, theirs))

    figures = {}
    if differences:
        figures[f"{x}_diff"], figures[f"{x}_diff_se"] = mean_and_error(differences)
    if wins:
        figures[f"{x}_win"], figures[f"{x}_win_se"] = mean_and_error(wins)
    return figures


def judge_figures(metas: dict[str, dict], initial: Iteration | None) -> dict:
    """Whom the judge compared the held-out answers with, and how often a place has won."""
    judging = metas.get("eval/scored", {})
    opponent = judging.get("arguments", {}).get("opponent")
    if opponent and initial and opponent_identity(metas) == answers_hash(initial):
        opponent = INITIAL
    return {"opponent": opponent, "position_bias": position_bias(judging)}


def answers_hash(iteration: Iteration) -> str | None:
    """The hash of its held-out answers, eval/candidates.jsonl, as the first stage that read them
    has recorded it.
    """
    for stage in ("eval/scored.unjudged", "eval/scored"):
        hashes = iteration.metas.get(stage, {}).get("inputs", {}).get("candidates")
        if hashes:
            return hashes[0]
    return None


def position_bias(judging: dict) -> float | None:
    """The share of comparisons in which the same place won in both orders.

    judging: metadata of judge.py. None where nothing was compared.
    """
    pairs = judging.get("counts", {}).get("judge_pairs")
    if not pairs or not pairs["in"]:
        return None
    return sum(pairs["dropped"].values()) / pairs["in"]


def names_of(rows) -> list[str]:
    """The keys of all dicts, each once, in the order in which they are met."""
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row)
    return list(names)


def sampled_figures(path: Path, rewards: Rewards) -> dict:
    """Means over the answers that pairs are made of, in one pass over the file."""
    sums: Counter = Counter()
    counts: Counter = Counter()
    for row in read_jsonl(path, SCORED):
        for name, values in measure(row, rewards).items():
            sums[name] += sum(values)
            counts[name] += len(values)
    names = ("reward", "score", "length", "truncated", "distinct")
    return {f"sampled/{name}": sums[name] / counts[name] for name in names if counts[name]}


def score_margin(pair: dict) -> float:
    return pair["score_chosen"] - pair["score_rejected"]


def training_figures(steps: list[dict]) -> dict[str, dict]:
    """Of each column of train.jsonl that is a number: its last value, its mean over the steps."""
    last = steps[-1]
    figures = {}
    for name, value in last.items():
        if isinstance(value, (int, float)) and name not in ("step", "epoch"):
            values = [step[name] for step in steps if name in step]
            figures[name] = {"last": value, "mean": fmean(values)}
    return figures


def evaluation_figures(evaluations: list[dict]) -> dict[str, dict]:
    """Of each eval_ column: its value before training and after it."""
    first, last = evaluations[0], evaluations[-1]
    names = [name for name in first if name.startswith("eval_") and name in last]
    return {name: {"first": first[name], "last": last[name]} for name in names}


def policy_figures(meta: dict, row: dict, reference: str) -> dict:
    """What the trainer recorded, and the objective's figures, which need its beta."""
    recorded = ("audit", "changed_weights", "rounding_error")
    figures = {key: meta[key] for key in recorded if key in meta}
    beta = meta["arguments"]["beta"][-1]
    figures["beta"] = beta
    if f"kl/{reference}" in row:
        kl = row[f"kl/{reference}"]
        figures["objective/kl"] = kl
        figures["objective/non_score_reward"] = -beta * kl
        figures["objective/rlhf_reward"] = row["objective/scores"] - beta * kl
    return figures
