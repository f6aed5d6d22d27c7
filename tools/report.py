"""What a run did: summary.jsonl, report.html and curve.png, from the files that its stages wrote.

    python tools/report.py runs/demo

It reads iter_00, iter_01, … as far as they exist. Held-out figures come from
iter_*/eval/scored.jsonl: the same prompts for every policy, several answers each. Answers to one
prompt are alike, so the sample is the prompts, not the answers. With x_p the mean over the answers
to prompt p, of P prompts,

    x         (1/P) sum_p x_p
    x_se      sd(x_p) / sqrt(P)          standard error, clustered by prompt
    x_diff    (1/P) sum_p (x_p - x_p of the initial policy)
              paired; x_diff_se from the sd of these differences
    x_win     (1/P) sum_p P(an answer beats one of the initial policy to the same prompt)
              ties count a half; x_win_se likewise

for x = reward (the weighted sum that was optimised: a proxy), gold (a reward that was only watched;
see --gold), reward/NAME (every other reward by itself) and, where the run's pairs were made with a
length penalty,

    score     reward - length_penalty * tokens of the answer: what has decided the pairs

A judge compares each answer with one of a fixed opponent (judge.py --opponent), so reward/judge is
a win rate already. Neither it nor a sum that it is part of has an x_win.

summary.jsonl has one row per iteration. Its other columns:

    opponent           whom the judge compared with: "the initial policy", "meta.reference", a file
    position_bias      share of these comparisons in which the same place won in both orders, which
                       makes them ties; sampled/position_bias for the judging that made the pairs

    kl/NAME, _se       mean of log pi(y|x) - log ref(y|x), summed over the tokens of an answer: an
                       unbiased estimate of KL(pi || ref) for answers drawn at temperature 1; ref is
                       "init", the first policy (whose own is 0 by definition), or "prev"
    kl/NAME_per_token  the same difference, summed over all answers and divided by all their tokens
    length             tokens per answer
    truncated          share of answers cut off by the token limit
    distinct           different texts / answers
    sampled/…          reward, score, length, truncated, distinct of the answers that pairs were
                       made of
    pairs, counts      pairs made; rows in, out and dropped by reason, per stage
    seconds            per stage, counted from its last start
    training           of each column of train.jsonl: its last value, and its mean over the steps
    evaluation         of each column of its evaluations on held-out pairs: first and last value
    audit              gap between generator and trainer (docs/math.md)
    changed_weights    share of weights that changed
    rounding_error     with LoRA: what rounding the merged weights changed, as a share of the update

and TRL's names, so that dashboards carry over. TRL logs them on training batches; here they are
held-out figures:

    objective/scores            reward
    objective/kl                kl/prev, or kl/init where the run has REF=init
    objective/entropy           mean of -log pi(y|x)
    objective/non_score_reward  -beta objective/kl
    objective/rlhf_reward       objective/scores + objective/non_score_reward
    objective/scores_margin     mean of score_chosen - score_rejected, over the iteration's pairs
    val/contain_eos_token       1 - truncated

No iteration is called the best: choosing one by its held-out figures would bias these figures.

The curves are drawn by report_curves.py, the page is written by report_page.py.
"""

import argparse
import heapq
import math
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # records.py is in the root
from records import (
    NUMBER,
    NUMBERS,
    SCORED,
    TEXT,
    TEXT_OR_CONVERSATION,
    TEXTS,
    Stop,
    dump,
    read_json,
    read_jsonl,
    write_whole,
)
from report_curves import Drawing, draw, panels
from report_page import EXAMPLES, Example, Page, answer_box, html_of, pair_boxes
from stage import ROWS_OF, check_beside, check_output, read_meta, run, seed_of
from training import tracker
from training.log import is_evaluation

PAIR = {
    "id": TEXT,
    "prompt": TEXT_OR_CONVERSATION,
    "chosen": TEXT_OR_CONVERSATION,
    "rejected": TEXT_OR_CONVERSATION,
    "score_chosen": NUMBER,
    "score_rejected": NUMBER,
}

# What the stages of an iteration write, in the order of the loop.
OUTPUTS = [
    "prompts.jsonl",
    "candidates.jsonl",
    "enhancer.jsonl",
    "scored.unjudged.jsonl",  # where judge.py adds its reward to those of score.py
    "scored.jsonl",
    "pairs.jsonl",
    "policy",
    "eval/candidates.jsonl",
    "eval/scored.unjudged.jsonl",
    "eval/scored.jsonl",
]
SCORING = ("scored.unjudged", "scored", "eval/scored.unjudged", "eval/scored")  # stages

# The settings under which policies must be evaluated alike.
SAMPLING = (
    "num_samples",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_new_tokens",
    "seed",
)
# Of those, what answers that estimate KL are drawn with.
UNSHAPED = {"temperature": ("1.0", "[1.0]"), "top_p": ("1.0",), "top_k": ("0",), "min_p": ("0.0",)}

JUDGE = "reward/judge"  # the judge's win rate, as a figure
INITIAL = "the initial policy"  # as the judge's opponent

WIDTH = 120  # columns of what is printed
LEAST_NEEDED = ("win", "distinct", "cut", "time")  # not printed where the width does not suffice
EXTREMES = 5  # strongest and weakest pairs on the page

NO_OPPONENT = (
    "the held-out answers were judged against each other, so their mean win rate is one half "
    "by construction. Evaluate again with judge.py --opponent, as iterate.sh does."
)
OFFLINE = (
    "WRITER=init: the initial policy wrote the answers of every iteration. "
    "This is an offline control, no online run."
)
NO_GOLD = (
    "There is no gold reward: the curve is the proxy that was optimised, "
    "and over-optimisation raises it, too."
)

Measures = dict[str, list[float]]  # of the answers to one prompt: name -> one value per answer


@dataclass
class Iteration:
    """What one folder iter_NN holds; what it does not hold yet is empty."""

    folder: Path
    metas: dict[str, dict]  # stage -> its X.meta.json; a stage is called after its output
    heldout: dict[str, Measures]  # prompt id -> what was measured of the answers to it
    steps: list[dict]  # the rows of train.jsonl, one per step
    evaluations: list[dict]  # and those of --eval_pairs

    @property
    def number(self) -> int:
        return iteration_number(self.folder)


@dataclass(frozen=True)
class Rewards:
    """What the answers of a run were rewarded for."""

    gold: str | None = None  # name of the reward that was only watched
    optimised: frozenset[str] = frozenset()  # names of those with a weight
    judged: bool = False  # whether held-out answers have a judge's reward
    length_penalty: float = 0.0  # of the latest pairs; 0: there is no score beside the reward

    @property
    def by_judge_alone(self) -> bool:
        return self.optimised == {"judge"}

    @property
    def judge_figure(self) -> str | None:
        """The name of the judge's win rate among the figures."""
        if not self.judged:
            return None
        return "gold" if self.gold == "judge" else JUDGE

    @property
    def win_rates(self) -> set[str]:
        """The figures that are a judge's win rate, or sums with it."""
        if not self.judged:
            return set()
        sums = {"reward", "score"} if "judge" in self.optimised else set()
        return sums | {self.judge_figure}


@dataclass
class Run:
    """A run, as far as it got, without its texts."""

    folder: Path
    config: dict  # config.json
    rewards: Rewards
    iterations: list[Iteration]
    rows: list[dict]  # of summary.jsonl, one per iteration
    legend: list[str]  # how to read the table
    warnings: list[str]  # what a reader must know about the comparison

    @property
    def gold(self) -> str | None:
        return self.rewards.gold


# ---- reading -----------------------------------------------------------------------------------


def read_run(folder: Path, asked: str | None = None) -> Run:
    """Everything but the texts. `asked` is the name given as --gold."""
    config = {}
    if (folder / "config.json").exists():
        remedy = "Run iterate.sh again with the settings of this run: it writes the file anew"
        config = read_json(folder / "config.json", TEXTS, remedy)
    folders = iteration_folders(folder)
    for iteration in folders:
        check_files(iteration)
    rewards = Rewards(
        gold=choose_gold(asked, folders),
        optimised=frozenset(optimised_rewards(folders)),
        judged="judge" in heldout_rewards(folders),
        length_penalty=latest_length_penalty(folders),
    )

    iterations = [read_iteration(f, rewards) for f in folders]
    warnings = compare_settings(iterations) + warnings_of_stages(iterations)
    if config.get("WRITER") == "init":
        warnings = [OFFLINE, *warnings]

    initial = iterations[0] if folders[0].name == "iter_00" else None
    reference = config.get("REF", "prev")
    rows = [summarise(iteration, initial, rewards, reference) for iteration in iterations]

    if not rewards.gold and any("reward" in row for row in rows):
        warnings = [NO_GOLD, *warnings]
    return Run(folder, config, rewards, iterations, rows, legend(rows, rewards), warnings)


def iteration_folders(run_dir: Path) -> list[Path]:
    """iter_00, iter_01, … in the order of their numbers."""
    named = run_dir.glob("iter_*")
    folders = [folder for folder in named if folder.name.removeprefix("iter_").isdecimal()]
    if not folders:
        raise Stop(
            f"{run_dir}: there is no iter_00 here. Give the folder of a run, such as runs/demo."
        )
    return sorted(folders, key=iteration_number)


def iteration_number(folder: Path) -> int:
    return int(folder.name.removeprefix("iter_"))


def read_iteration(folder: Path, rewards: Rewards) -> Iteration:
    heldout = {}
    scored = folder / "eval/scored.jsonl"
    if scored.exists():
        heldout = {row["id"]: measure(row, rewards) for row in read_jsonl(scored, SCORED)}

    log = folder / "policy.train.jsonl"
    rows = list(read_jsonl(log, NUMBERS)) if log.exists() else []
    steps = [row for row in rows if not is_evaluation(row)]
    evaluations = [row for row in rows if is_evaluation(row)]
    return Iteration(folder, read_metas(folder), heldout, steps, evaluations)


def read_metas(folder: Path) -> dict[str, dict]:
    """stage -> its X.meta.json, in the order of the loop; a stage is called after its output."""
    metas = {}
    for output in OUTPUTS:
        path = folder / f"{output}.meta.json"
        if path.exists():
            remedy = f"Remove it and {folder.name}/{output} to make both again"
            metas[output.removesuffix(".jsonl")] = read_meta(path, remedy)
    return metas


def check_files(folder: Path) -> None:
    """Stop where a file that is read here is no longer what its stage wrote, and say what to do."""
    metas = read_metas(folder)
    for stage in ("scored", "pairs", "eval/scored"):
        output = folder / f"{stage}.jsonl"
        if stage in metas and output.exists():
            check_output(output, metas[stage])
    if "policy" in metas:
        check_beside(folder / "policy", metas["policy"])  # the log; the weights are not read


def choose_gold(asked: str | None, folders: list[Path]) -> str | None:
    """The reward that was only watched, if there is one: no stage of the run gave it a weight."""
    optimised = optimised_rewards(folders)
    names = heldout_rewards(folders)
    if asked and asked not in names:
        known = ", ".join(sorted(names))
        raise Stop(f"--gold {asked}: held-out answers have no reward of this name, only {known}.")
    if asked in optimised:
        raise Stop(
            f"--gold {asked}: this reward has a weight in what was optimised, "
            "so it cannot check it."
        )
    if asked:
        return asked
    return "gold" if "gold" in names - optimised else None


def optimised_rewards(folders: list[Path]) -> set[str]:
    """The rewards to which some stage of the run gave a weight."""
    names = set()
    for folder in folders:
        metas = read_metas(folder)
        for stage in SCORING:
            if stage in metas:
                weights = reward_weights(metas[stage]["arguments"])
                names.update(name for name, weight in weights.items() if weight)
    return names


def reward_weights(arguments: dict) -> dict[str, float]:
    """The weight of each reward that score.py or judge.py wrote, from the stage's arguments."""
    if "judge_weight" in arguments:
        return {"judge": arguments["judge_weight"]}
    return dict(zip(arguments["rewards"], arguments["reward_weights"], strict=True))


def heldout_rewards(folders: list[Path]) -> set[str]:
    """The names of the rewards that held-out answers have, taken from the first such answer."""
    for folder in folders:
        path = folder / "eval/scored.jsonl"
        if not path.exists():
            continue
        for row in read_jsonl(path, SCORED):
            for candidate in row["candidates"]:
                return set(candidate["rewards"])
        return set()
    return set()


def latest_length_penalty(folders: list[Path]) -> float:
    """The --length_penalty of the latest pairs; one for all rows, so that they can be compared."""
    latest = 0.0
    for folder in folders:
        metas = read_metas(folder)
        if "pairs" in metas:
            latest = metas["pairs"]["arguments"].get("length_penalty", 0.0)
    return latest


def measure(row: dict, rewards: Rewards) -> Measures:
    """All that is measured of the answers to one prompt; empty where no answer has a score."""
    values: Measures = defaultdict(list)
    answers = row["candidates"]
    for candidate in answers:
        length = len(candidate["token_ids"])
        values["reward"].append(candidate["reward"])
        if rewards.length_penalty:
            values["score"].append(candidate["reward"] - rewards.length_penalty * length)
        for name, reward in candidate["rewards"].items():
            key = "gold" if name == rewards.gold else f"reward/{name}"
            values[key].append(reward)
        for name, ref_logprob in candidate.get("ref_logprobs", {}).items():
            values[f"kl/{name}"].append(candidate["logprob"] - ref_logprob)
        values["objective/entropy"].append(-candidate["logprob"])
        values["length"].append(length)
        values["truncated"].append(candidate["finish_reason"] == "length")
    if answers:
        texts = {candidate["text"] for candidate in answers}
        values["distinct"] = [len(texts) / len(answers)]  # one value per prompt
    return values


def compare_settings(iterations: list[Iteration]) -> list[str]:
    """Stop unless every policy answered the same prompts; return how their sampling differs."""
    warnings = []
    first_ids = None  # of the first policy that was evaluated, in this file:
    first_file = None
    seen: dict[str, dict[str, str]] = defaultdict(dict)  # setting -> {value: its first folder}
    for iteration in iterations:
        name = iteration.folder.name

        # the same prompts?
        if iteration.heldout:
            ids = iteration.heldout.keys()
            if first_ids is None:
                first_ids = ids
                first_file = iteration.folder / "eval/scored.jsonl"
            if ids != first_ids:
                raise Stop(
                    f"{iteration.folder}/eval/scored.jsonl: these are not the held-out prompts of "
                    f'{first_file}; id "{min(ids ^ first_ids)}", for example, is only in one of '
                    "the two. Evaluate this policy again."
                )

        # an answer to each?
        silent = sum(not measures for measures in iteration.heldout.values())
        if silent:
            warnings.append(
                f"{name}: {silent} held-out prompts have no scored answer; the others are compared."
            )

        # sampled, judged and paired alike?
        if is_judged_among_itself(iteration.metas):
            warnings.append(f"{name}: {NO_OPPONENT}")
        for setting, value in settings_of(iteration.metas).items():
            seen[setting].setdefault(value, name)
    return warnings + unlike_settings(seen)


def settings_of(metas: dict[str, dict]) -> dict[str, str]:
    """What the figures of an iteration depend on, as far as it was recorded: name -> value."""
    sampling = metas.get("eval/candidates", {}).get("arguments", {})
    settings = {name: str(sampling[name]) for name in SAMPLING if name in sampling}
    opponent = opponent_identity(metas)
    if opponent:
        settings["opponent"] = opponent[:14]  # of a hash; "meta.reference" is not longer
    pairing = metas.get("pairs", {}).get("arguments", {})
    if "length_penalty" in pairing:
        settings["length_penalty"] = str(pairing["length_penalty"])
    return settings


def is_judged_among_itself(metas: dict[str, dict]) -> bool:
    """Whether the held-out answers were compared with each other, for want of an opponent."""
    arguments = metas.get("eval/scored", {}).get("arguments", {})
    return "judge_weight" in arguments and not arguments.get("opponent")


def opponent_identity(metas: dict[str, dict]) -> str | None:
    """Whom the judge compared held-out answers with: the hash of a file, or "meta.reference"."""
    judging = metas.get("eval/scored", {})
    of_file = judging.get("inputs", {}).get("opponent")
    return of_file or judging.get("arguments", {}).get("opponent")


def warnings_of_stages(iterations: list[Iteration]) -> list[str]:
    """What the stages said and the run went on with, as pairs that are too few."""
    warnings = []
    for iteration in iterations:
        for stage, meta in iteration.metas.items():
            for message in meta.get("warnings", []):
                warnings.append(f"{iteration.folder.name}, {stage}: {message}.")
        if "policy" in iteration.metas and not iteration.steps:
            warnings.append(
                f"{iteration.folder.name}: policy.train.jsonl is gone, and with it what training "
                "has logged."
            )
    return warnings


def unlike_settings(seen: dict[str, dict[str, str]]) -> list[str]:
    """A warning for each setting that has several values, and one if KL is not estimated."""
    warnings = []
    for setting, values in seen.items():
        if len(values) > 1:
            different = ", ".join(f"{value} from {first}" for value, first in values.items())
            what = "The policies were not evaluated alike"
            if setting == "length_penalty":
                what = "Not all pairs were made by one score, which is that of the latest here"
            warnings.append(f"{what}: {setting} was {different}.")
    shaped = [name for name, plain in UNSHAPED.items() if seen.get(name, {}).keys() - set(plain)]
    if shaped:
        warnings.append(
            "Held-out answers were not drawn at temperature 1, top_p 1, top_k 0 and min_p 0, "
            "so the KL columns do not estimate KL."
        )
    return warnings


# ---- figures -----------------------------------------------------------------------------------


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
        margins = [score_margin(pair) for pair in read_jsonl(folder / "pairs.jsonl", PAIR)]
        row["pairs"] = len(margins)
        row["objective/scores_margin"] = fmean(margins)

    # all stages, and training
    row["counts"] = {stage: meta["counts"] for stage, meta in metas.items() if meta.get("counts")}
    row["seconds"] = {s: meta["seconds"] for s, meta in metas.items() if meta.get("seconds")}
    if steps:
        row["steps"] = len(steps)
        row["training"] = training_figures(steps)
    if iteration.evaluations:
        row["evaluation"] = evaluation_figures(iteration.evaluations)
    if "policy" in metas:
        row |= policy_figures(metas["policy"], row, reference)
    return {key: value for key, value in row.items() if value is not None and value != {}}


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
    answers = sum(len(measures["reward"]) for measures in answered.values())
    row = {"prompts": len(answered), "answers": answers}
    for x in names_of(answered.values()):
        known = {id: measures for id, measures in answered.items() if x in measures}
        means = [fmean(measures[x]) for measures in known.values()]
        row[x], row[f"{x}_se"] = mean_and_error(means)

        if x.startswith("kl/"):
            total = sum(sum(measures[x]) for measures in known.values())
            tokens = sum(sum(measures["length"]) for measures in known.values())
            row[f"{x}_per_token"] = total / tokens

        is_reward = x in ("score", "gold") or x.startswith("reward")
        compared = [id for id in known if initial and x in initial[id]]
        if is_reward and compared:
            differences = [fmean(now[id][x]) - fmean(initial[id][x]) for id in compared]
            row[f"{x}_diff"], row[f"{x}_diff_se"] = mean_and_error(differences)
        if is_reward and compared and x not in win_rates:
            wins = [win_rate(now[id][x], initial[id][x]) for id in compared]
            row[f"{x}_win"], row[f"{x}_win_se"] = mean_and_error(wins)
    return row


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


# ---- the table ---------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of the table that depends on the rewards of the run."""

    heading: str
    key: str  # of the figure
    shown: Callable[[dict, str], str]  # the figure as text


def table(rows: list[dict], rewards: Rewards) -> list[list[str]]:
    """The short table, headings first; everything else is in summary.jsonl."""
    columns = reward_columns(rows, rewards)
    head = ["iter"]
    head += [column.heading for column in columns]
    head += ["KL init", "KL prev", "tokens", "cut", "distinct", "pairs", "time"]
    return [head] + [table_line(row, columns) for row in rows]


def reward_columns(rows: list[dict], rewards: Rewards) -> list[Column]:
    """Of each reward itself, its difference to the initial policy and how often it beats that.

    A judge's figure is a win rate itself. Where it is one over the initial policy, both others
    would repeat it.
    """
    known = names_of(rows)
    names = [JUDGE, "score"] if rewards.by_judge_alone else ["reward", "score", JUDGE]
    names = [x for x in (*names, "gold") if x in known or x == "reward"]
    opponents = {row["opponent"] for row in rows if "opponent" in row}

    columns = []
    for x in names:
        columns.append(Column("win rate" if x == JUDGE else x, x, with_error))
        is_judge = x == rewards.judge_figure
        if not is_judge or opponents != {INITIAL}:
            columns.append(Column("vs init", f"{x}_diff", difference))
        if x not in rewards.win_rates:
            columns.append(Column("win", f"{x}_win", percent))
        if is_judge:
            columns.append(Column("bias", "position_bias", percent))
    return columns


def table_line(row: dict, columns: list[Column]) -> list[str]:
    line = [str(row["iteration"])]
    for column in columns:
        line.append(column.shown(row, column.key))
    line.append(number(row, "kl/init", digits=2))
    line.append(number(row, "kl/prev", digits=2))
    line.append(number(row, "length", digits=1))
    line.append(percent(row, "truncated"))
    line.append(percent(row, "distinct"))
    line.append(f"{row['pairs']:,}" if "pairs" in row else "-")
    line.append(duration(sum(row.get("seconds", {}).values())))
    return line


def decimals(value: float, most: int) -> int:
    """Fewer decimals for larger numbers: the table must fit."""
    if abs(value) < 10:
        return most
    if abs(value) < 100:
        return min(most, 2)
    return 1


def number(row: dict, key: str, digits: int) -> str:
    """A figure; "-" where there is none."""
    if key not in row:
        return "-"
    return f"{row[key]:.{decimals(row[key], digits)}f}"


def with_error(row: dict, key: str, sign: str = "") -> str:
    """A figure, with its standard error where there is one; "-" where there is none."""
    if key not in row:
        return "-"
    digits = decimals(row[key], 3)
    figure = f"{row[key]:{sign}.{digits}f}"
    if f"{key}_se" in row:
        figure += f"±{row[f'{key}_se']:.{digits}f}"
    return figure


def difference(row: dict, key: str) -> str:
    return with_error(row, key, sign="+")


def percent(row: dict, key: str) -> str:
    return f"{row[key]:.0%}" if key in row else "-"


def duration(seconds: float) -> str:
    """99s, 12m05s, 3h20m."""
    s = round(seconds)
    if s < 100:
        return f"{s}s"
    if s < 6000:
        return f"{s // 60}m{s % 60:02}s"
    return f"{s // 3600}h{s % 3600 // 60:02}m"


def plain(lines: list[list[str]]) -> str:
    """The table as text, its columns right-aligned; what does not fit is on the page alone."""
    for heading in LEAST_NEEDED:
        if sum(widths_of(lines)) + len(lines[0]) - 1 > WIDTH:
            lines = without_column(lines, heading)
    widths = widths_of(lines)
    gap = "  " if sum(widths) + 2 * len(widths) <= WIDTH else " "
    text = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        text.append(gap.join(cells))
    return "\n".join(text)


def widths_of(lines: list[list[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def without_column(lines: list[list[str]], heading: str) -> list[list[str]]:
    columns = zip(*lines, strict=True)
    kept = [column for column in columns if column[0] != heading]
    return [list(line) for line in zip(*kept, strict=True)]


def drops(row: dict) -> list[str]:
    """["iteration 1, pairs: 12 rows tie", …], without prompts that wait for another iteration."""
    lines = []
    for stage, balances in row.get("counts", {}).items():
        if stage == "prompts":
            continue
        for what, balance in balances.items():
            if what == "rows" and any(other.startswith(ROWS_OF) for other in balances):
                continue  # its files are named one by one
            for reason, n in balance["dropped"].items():
                lines.append(f"iteration {row['iteration']}, {stage}: {n:,} {what} {reason}")
    return lines


def legend(rows: list[dict], rewards: Rewards) -> list[str]:
    """How to read the table: what its columns are."""
    evaluated = [row for row in rows if "reward" in row]
    if not evaluated:
        return ["Nothing has been evaluated yet."]
    last = evaluated[-1]
    first = (
        f"{last['prompts']:,} held-out prompts, {last['answers']:,} answers. "
        "± is one standard error, clustered by prompt"
    )
    headings = {column.heading for column in reward_columns(rows, rewards)}
    compared = [heading for heading in ("vs init", "win") if heading in headings]
    if compared:
        compare = "compare" if len(compared) > 1 else "compares"
        first += f"; {' and '.join(compared)} {compare} with the initial policy's answers to the "
        first += "same prompts"
    lines = [f"{first}."]

    proxy = "win rate" if rewards.by_judge_alone else "reward"
    if "opponent" in last:
        figure = "gold" if rewards.judge_figure == "gold" else "win rate"
        lines.append(
            f"{figure} is how often the judge prefers an answer to that of {last['opponent']} to "
            "the same prompt, a tie being half a win; bias is the share of these comparisons in "
            "which the same place won in both orders, which makes them ties."
        )
    if "score" in last:
        penalty = f"{rewards.length_penalty:g}"
        lines.append(f"score is {proxy} - {penalty} per token: what has decided the pairs.")
    if rewards.gold:
        lines.append(
            f"{proxy} is the proxy that was optimised; "
            f'gold (the reward "{rewards.gold}") was only watched.'
        )
    return lines


def sources_of_pairs(rows: list[dict]) -> list[str]:
    """Where an iteration was trained on several files: how many pairs came from which."""
    lines = []
    for row in rows:
        sources = []
        for what, balance in row.get("counts", {}).get("policy", {}).items():
            if what.startswith(ROWS_OF):
                path = Path(what.removeprefix(ROWS_OF))
                sources.append(f"{balance['out']:,} of {path.parent.name}/{path.name}")
        if sources:
            lines.append(f"Iteration {row['iteration']} was trained on {', '.join(sources)}.")
    return lines


def every_figure(rows: list[dict]) -> list[list[str]]:
    """summary.jsonl transposed: one line per figure, one column per iteration."""
    flat = [flatten(row) for row in rows]
    lines = []
    for key in names_of(flat):
        line = [key]
        for row in flat:
            value = row.get(key, "")
            line.append(f"{value:.6g}" if isinstance(value, float) else str(value))
        lines.append(line)
    return lines


def flatten(row: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a: b": 1}, however deep."""
    flat = {}
    for key, value in row.items():
        name = prefix + key
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}: ")
        else:
            flat[name] = value
    return flat


# ---- what the page shows -----------------------------------------------------------------------


def heldout_examples(folders: list[Path]) -> list[Example]:
    """Some held-out prompts, and the first answer of each of these policies.

    The prompts are drawn by a hash of their ids, not picked.
    """
    answered: dict[str, dict[str, dict]] = {}  # policy -> {prompt id: its row}
    for folder in folders:
        rows = read_jsonl(folder / "eval/scored.jsonl", SCORED)
        answered[folder.name] = {row["id"]: row for row in rows if row["candidates"]}

    common = set.intersection(*map(set, answered.values()))
    drawn = sorted(common, key=lambda id: seed_of("report", id))[:EXAMPLES]
    examples = []
    for id in drawn:
        boxes = []
        for policy, rows in answered.items():
            prompt = rows[id]["prompt"]  # the same for all
            boxes.append(answer_box(policy, rows[id]["candidates"][0]))
        examples.append(Example(prompt, boxes))
    return examples


def extreme_pairs(path: Path) -> dict[str, list[Example]]:
    """The pairs with the widest and with the narrowest margin."""
    extremes = {
        "Strongest": heapq.nlargest(EXTREMES, read_jsonl(path, PAIR), key=score_margin),
        "Weakest": heapq.nsmallest(EXTREMES, read_jsonl(path, PAIR), key=score_margin),
    }
    examples = {}
    for kind, pairs in extremes.items():
        examples[kind] = [Example(p["prompt"], pair_boxes(p, score_margin(p))) for p in pairs]
    return examples


def versions(iterations: list[Iteration]) -> dict[str, list[str]]:
    """package -> the versions that were used, in order; "git" is this project's commit."""
    found: dict[str, list[str]] = {}
    for iteration in iterations:
        for meta in iteration.metas.values():
            packages = dict(meta.get("versions", {}))
            git = meta.get("git") or {}
            if git.get("commit"):
                changes = ", with local changes" if git["dirty"] else ""
                packages["git"] = git["commit"] + changes
            for package, version in packages.items():
                known = found.setdefault(package, [])
                if version not in known:
                    known.append(version)
    return found


def page_of(run: Run, curves: list[Drawing]) -> Page:
    """All of it."""
    folders = [iteration.folder for iteration in run.iterations]
    evaluated = [folder for folder in folders if (folder / "eval/scored.jsonl").exists()]
    first_and_last = evaluated if len(evaluated) < 3 else [evaluated[0], evaluated[-1]]
    paired = [folder for folder in folders if (folder / "pairs.jsonl").exists()]
    dropped = []
    for row in run.rows:
        dropped += drops(row)
    return Page(
        title=run.folder.resolve().name,
        model=str(run.config.get("MODEL", "a policy")),
        table=table(run.rows, run.rewards),
        legend=run.legend,
        warnings=run.warnings,
        curves=curves,
        examples=heldout_examples(first_and_last) if evaluated else None,
        pairs_from=paired[-1].name if paired else "",
        pairs=extreme_pairs(paired[-1] / "pairs.jsonl") if paired else {},
        sources=sources_of_pairs(run.rows),
        dropped=dropped,
        figures=every_figure(run.rows),
        config=run.config,
        versions=versions(run.iterations),
    )


# ---- what a tracker is shown -------------------------------------------------------------------

COMPLETIONS = 4  # of EXAMPLES


def show_in_tracker(report: Run, args) -> None:
    """The figures of each evaluated iteration, and some answers, behind its training steps."""
    shown = tracker.Tracker(
        args.report_to,
        args.run_name or args.run.resolve().name,
        args.logging_dir or args.run / "tracker",
    )
    step = 0
    for iteration, row in zip(report.iterations, report.rows, strict=True):
        step += len(iteration.steps)
        if "reward" in row:
            tracker.show_heldout(shown, row, step, completions(iteration.folder))


def completions(folder: Path) -> tracker.Table:
    """The page's first examples as plain text, in TRL's columns."""
    table = []
    for example in heldout_examples([folder])[:COMPLETIONS]:
        (box,) = example.boxes
        words = {"prompt": plain_text(example.prompt), "completion": plain_text(box.text)}
        table.append(words | {"rewards": box.facts})
    return table


def plain_text(text: str | list[dict]) -> str:
    if isinstance(text, str):
        return text
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in text)


# ---- the report --------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", type=Path, help="folder of the run, runs/NAME")
    p.add_argument(
        "--gold",
        help='name of the reward that was only watched; default: "gold", if it was not optimised',
    )
    p.add_argument(
        "--report_to",
        choices=tracker.TRACKERS,
        default="none",
        help="show figures and some answers there, too; training/tracker.py says how",
    )
    p.add_argument("--run_name", help="of the run there; default: the name of the folder")
    p.add_argument("--logging_dir", type=Path, help="for the tracker's files; default: RUN/tracker")
    return p


def main():
    args = arguments().parse_args()
    tracker.check_arguments(args)
    report = read_run(args.run, args.gold)

    # the figures
    write_whole(args.run / "summary.jsonl", "".join(map(dump, report.rows)))
    print(plain(table(report.rows, report.rewards)))
    dropped = [f"dropped in {line}" for line in drops(report.rows[-1])]
    for text in dropped + report.legend + sources_of_pairs(report.rows) + report.warnings:
        print(textwrap.fill(text, WIDTH))

    # the curves
    steps = [iteration.steps for iteration in report.iterations]
    evaluations = [iteration.evaluations for iteration in report.iterations]
    by_judge_alone = report.rewards.by_judge_alone
    drawn = panels(report.rows, steps, evaluations, report.gold, by_judge_alone)
    curves = draw(drawn, args.run / "curve.png") if drawn else []

    # the page
    write_whole(args.run / "report.html", html_of(page_of(report, curves)))
    print(f"more, and the answers themselves, in {args.run / 'report.html'}")
    if args.report_to != "none":
        show_in_tracker(report, args)


if __name__ == "__main__":
    run(main)
