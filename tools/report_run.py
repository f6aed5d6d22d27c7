"""What the files of a run hold, and whether its policies can be compared.

Every policy must have answered the same held-out prompts. Where they were sampled, judged or paired
by different settings, the report says so.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from records import NUMBERS, SCORED, Stop, read_jsonl
from stage import check_beside, check_output, read_meta
from training.log import is_evaluation

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

NO_OPPONENT = (
    "the held-out answers were judged against each other, so their mean win rate is one half "
    "by construction. Evaluate again with judge.py --opponent, as iterate.sh does."
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


# ---- reading -----------------------------------------------------------------------------------


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


def rewards_of(folders: list[Path], asked: str | None) -> Rewards:
    """What was optimised, and what was only watched. `asked` is the name given as --gold."""
    return Rewards(
        gold=choose_gold(asked, folders),
        optimised=frozenset(optimised_rewards(folders)),
        judged="judge" in heldout_rewards(folders),
        length_penalty=latest_length_penalty(folders),
    )


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


# ---- were the policies evaluated alike? --------------------------------------------------------


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
