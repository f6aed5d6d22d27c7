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

report_run.py reads the run, report_figures.py computes the figures, report_table.py shows them,
report_curves.py draws the curves, report_page.py writes the page.
"""

import argparse
import heapq
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # records.py is in the root
from records import SCORED, TEXTS, dump, read_json, read_jsonl, write_whole
from report_curves import Drawing, draw, panels
from report_figures import PAIR, score_margin, summarise
from report_page import EXAMPLES, Example, Page, answer_box, html_of, pair_boxes
from report_run import (
    Iteration,
    Rewards,
    check_files,
    compare_settings,
    iteration_folders,
    read_iteration,
    rewards_of,
    warnings_of_stages,
)
from report_table import WIDTH, drops, every_figure, legend, plain, sources_of_pairs, table
from stage import run, seed_of
from training import tracker

EXTREMES = 5  # strongest and weakest pairs on the page

OFFLINE = (
    "WRITER=init: the initial policy wrote the answers of every iteration. "
    "This is an offline control, no online run."
)
NO_GOLD = (
    "There is no gold reward: the curve is the proxy that was optimised, "
    "and over-optimisation raises it, too."
)


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


def read_run(folder: Path, asked: str | None = None) -> Run:
    """Everything but the texts. `asked` is the name given as --gold."""
    config = {}
    if (folder / "config.json").exists():
        remedy = "Run iterate.sh again with the settings of this run: it writes the file anew"
        config = read_json(folder / "config.json", TEXTS, remedy)
    folders = iteration_folders(folder)
    for iteration in folders:
        check_files(iteration)
    rewards = rewards_of(folders, asked)
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
