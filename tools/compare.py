"""Compare runs: seeds of the same settings are averaged, different settings stand side by side.

    python tools/compare.py runs/a_0 runs/a_1 runs/b_0 runs/b_1 --output runs/a_and_b
    python tools/compare.py runs/online_offline/truth runs/online_offline/demo --output both
    python tools/compare.py bench/results/online_offline.jsonl --output again

A path is a run of iterate.sh; or a folder that holds runs, however deep, which are then a
comparison of their own; or rows that this tool has written before. It writes

    OUTPUT.html     tables and curves, in a page that loads nothing from the network
    OUTPUT.png      the curves
    OUTPUT.jsonl    one row per run and iteration, with the figures named in FIGURES

Runs whose settings differ in nothing but the seed are one arm. (A setting may name the run's seed,
as MODEL=demo/build/seed_3/policy does where SEED=3; that is no difference.) An arm is called after
the folder of its runs if no other arm has runs there, else after the settings that tell arms apart.

With x_s the figure of seed s, of S seeds,

    x             (1/S) sum_s x_s
    its error     sd(x_s) / sqrt(S): one standard error, over seeds. A 95 % interval reaches t of
                  them to each side: t = 4.30 for 3 seeds, 2.26 for 10
    difference    (1/S) sum_s (x_s - b_s), b the baseline, over the seeds that both arms have

The difference is paired: the same seed means the same prompts and, in the demo, the same initial
policy and reward model. The baseline is the arm named by --baseline, or the first.

What is compared is gold, the reward that was only watched; without one, the reward that was
optimised, which over-optimisation raises, too.
"""

import argparse
import os
import re
import sys
import textwrap
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # records.py is in the root
from compare_curves import Curve, Panel, Point, draw
from records import NUMBER, TEXT, TEXTS, Stop, dump, optional, read_json, read_jsonl, write_whole
from report_curves import Drawing
from report_figures import mean_and_error
from report_page import document, escape, figures, grid, paragraphs
from report_table import WIDTH, plain
from stage import run

# Of a row of summary.jsonl, as report.py defines them.
FIGURES = ("gold", "reward", "reward_diff", "kl/init", "length", "distinct", "pairs", "steps")
FIGURES += ("sampled_tokens", "accuracy", "chosen_fell")  # made here, in figures_of

ROW = {"comparison": TEXT, "arm": TEXT, "seed": NUMBER, "iteration": NUMBER, "reward": NUMBER}
ROW = {name: optional(NUMBER) for name in FIGURES} | ROW

# Settings that have no influence on what a run results in, apart from rounding.
WITHOUT_INFLUENCE = ("RUN", "KEEP", "REPORT_TO", "NPROC", "GENERATE_NPROC", "TORCHRUN_ARGS")

LEGEND = "Means over seeds; ± is one standard error over seeds. tools/compare.py defines the rest."

Table = list[list[str]]  # headings first


@dataclass
class Arm:
    """The runs of the same settings."""

    name: str
    runs: dict[int, list[dict]]  # seed -> its rows, one per iteration, with FIGURES

    def values(self, figure: str, iteration: int) -> dict[int, float]:
        """seed -> the figure; without the seeds that have not come so far."""
        values = {}
        for seed, rows in self.runs.items():
            for row in rows:
                if row["iteration"] == iteration and row.get(figure) is not None:
                    values[seed] = row[figure]
        return values

    def values_of_all(self, figure: str, iteration: int) -> list[float]:
        """The figure of every seed; none where one has not come so far: a mean would jump there."""
        values = self.values(figure, iteration)
        return list(values.values()) if len(values) == len(self.runs) else []

    def best(self, figure: str) -> dict[int, float]:
        """seed -> the highest figure of its iterations."""
        best = {}
        for seed, rows in self.runs.items():
            values = [row[figure] for row in rows if row.get(figure) is not None]
            if values:
                best[seed] = max(values)
        return best

    def totals(self, figure: str, iterations: list[int]) -> list[float]:
        """The figure of each seed that has it in all these iterations, summed over them."""
        by_iteration = [self.values(figure, iteration) for iteration in iterations]
        totals = []
        for seed in self.runs:
            if all(seed in values for values in by_iteration):
                totals.append(sum(values[seed] for values in by_iteration))
        return totals

    def rows(self) -> list[dict]:
        return [row for rows in self.runs.values() for row in rows]


@dataclass
class Comparison:
    """Arms that are shown side by side."""

    name: str  # empty where the runs were named one by one
    arms: list[Arm]  # the first is the baseline

    def baseline(self) -> Arm:
        return self.arms[0]

    def rows(self) -> list[dict]:
        return [row for arm in self.arms for row in arm.rows()]

    def iterations(self) -> list[int]:
        return sorted({row["iteration"] for row in self.rows()})

    def figure(self) -> str:
        """What is compared. Raises Stop where some arms have a gold and others have none."""
        with_gold = [arm.name for arm in self.arms if any("gold" in row for row in arm.rows())]
        if not with_gold:
            return "reward"
        without = [arm.name for arm in self.arms if arm.name not in with_gold]
        if without:
            raise Stop(
                f"{', '.join(without)}: has no gold, and {', '.join(with_gold)} has: they cannot "
                "be compared. Run iterate.sh with the same GOLD_FN."
            )
        return "gold"

    def optimises_gold(self) -> bool:
        return all(row.get("gold") == row["reward"] for row in self.rows())


# ---- reading -----------------------------------------------------------------------------------


def read_paths(paths: list[Path]) -> list[Comparison]:
    """All that the paths name, in their order; each comparison with a name of its own."""
    comparisons = []
    single = [path for path in paths if is_run(path)]
    if single:
        comparisons.append(read_runs("", single))
    for path in paths:
        if path.is_file():
            comparisons += read_rows(path)
        elif not is_run(path):
            comparisons.append(read_runs(path.name, runs_within(path)))
    names: Counter = Counter()
    for comparison in comparisons:
        names[comparison.name] += 1
        if names[comparison.name] > 1:
            comparison.name += f" ({names[comparison.name]})"
    return comparisons


def is_run(path: Path) -> bool:
    return (path / "config.json").is_file() and (path / "summary.jsonl").is_file()


def runs_within(folder: Path) -> list[Path]:
    places = [*folder.rglob("summary.jsonl"), *folder.rglob(".lock")]  # the loop makes this first
    found = []
    for path in sorted({place.parent for place in places}):
        if is_run(path):
            found.append(path)
        else:  # a run that crashed must not be missing in silence
            print(f"left out: {path} has no summary.jsonl", file=sys.stderr)
    if not found:
        raise Stop(f"{folder}: there is no run here, with a summary.jsonl. Give folders of runs.")
    return found


def read_rows(path: Path) -> list[Comparison]:
    """What an earlier comparison has written."""
    names: dict[str, dict[str, Arm]] = defaultdict(dict)  # comparison -> name of an arm -> arm
    for row in read_jsonl(path, ROW):
        arms = names[row["comparison"]]
        arm = arms.setdefault(row["arm"], Arm(row["arm"], {}))
        rows = arm.runs.setdefault(row["seed"], [])
        if any(other["iteration"] == row["iteration"] for other in rows):
            raise Stop(
                f"{path}: iteration {row['iteration']} of seed {row['seed']}, arm "
                f'"{row["arm"]}", comparison "{row["comparison"]}" stands there twice. Leave one '
                "out."
            )
        rows.append(row)
    return [Comparison(name, list(arms.values())) for name, arms in names.items()]


class Found(NamedTuple):
    """A run before it is known which arm it belongs to."""

    folder: Path
    seed: int
    settings: dict[str, str]


def read_runs(comparison: str, folders: list[Path]) -> Comparison:
    found = [read_config(folder) for folder in folders]
    say_what_counts_as_equal(found)
    names = names_of_arms(found)
    arms: dict[str, Arm] = {}
    for one, name in zip(found, names, strict=True):
        arm = arms.setdefault(name, Arm(name, {}))
        if one.seed in arm.runs:
            raise Stop(
                f"{one.folder}: another of these runs has the same settings and the seed "
                f"{one.seed}. Leave one of them out."
            )
        arm.runs[one.seed] = read_figures(one.folder)
    return Comparison(comparison, list(arms.values()))


def read_config(folder: Path) -> Found:
    path = folder / "config.json"
    settings = read_json(path, TEXTS, "Run iterate.sh again with the settings of this run")
    seed = settings.pop("SEED", "")
    if not seed.isdecimal():
        raise Stop(f"{path}: it has no SEED. Give the folders of runs of iterate.sh.")
    for name in WITHOUT_INFLUENCE:
        settings.pop(name, None)
    settings = {name: without_seed(value, seed) for name, value in settings.items()}
    return Found(folder, int(seed), settings)


def without_seed(value: str, seed: str) -> str:
    """demo/build/seed_3/policy becomes demo/build/seed_SEED/policy, for the seed 3."""
    return re.sub(rf"_{seed}\b", "_SEED", value)


def say_what_counts_as_equal(found: list[Found]) -> None:
    """llama_2 with the seed 2 and llama_3 with the seed 3 would count as equal, too."""
    for name in sorted({name for one in found for name in one.settings}):
        values = {one.settings.get(name, "") for one in found}
        for value in sorted(value for value in values if "_SEED" in value):
            print(f"of one arm, though it differs between seeds: {name}={value}", file=sys.stderr)


def names_of_arms(found: list[Found]) -> list[str]:
    """The name of each run's arm."""
    folders = [one.folder.resolve().parent for one in found]
    settings = [tuple(one.settings.items()) for one in found]
    combinations = set(zip(folders, settings, strict=True))
    each_has_its_folder = len(combinations) == len(set(folders)) == len(set(settings))
    if each_has_its_folder and len(combinations) > 1:
        top = Path(os.path.commonpath(folders))
        return [str(folder.relative_to(top)) for folder in folders]

    different = settings_that_differ(found)
    names = []
    for one in found:
        words = [f"{name}={one.settings.get(name, '')}" for name in different]
        names.append(" ".join(words) or "all runs")
    return names


def settings_that_differ(found: list[Found]) -> list[str]:
    names = sorted({name for one in found for name in one.settings})
    different = []
    for name in names:
        values = {one.settings.get(name, "") for one in found}
        if len(values) > 1:
            different.append(name)
    return different


def read_figures(folder: Path) -> list[dict]:
    """The rows of summary.jsonl whose policy has been evaluated, reduced to FIGURES."""
    shape = {"iteration": NUMBER}
    rows = [figures_of(row) for row in read_jsonl(folder / "summary.jsonl", shape)]
    return [row for row in rows if "reward" in row]


def figures_of(row: dict) -> dict:
    row = dict(row)
    if "reward/gold" in row:  # it was optimised, so it is no column of its own
        row["gold"] = row["reward/gold"]
    if "sampled/length" in row:
        answers = row["counts"]["scored"]["candidates"]["out"]
        row["sampled_tokens"] = round(answers * row["sampled/length"])
    if "training" in row:
        row["chosen_fell"] = row["training"]["logps/chosen_fell"]["mean"]
        if row.get("beta"):  # else there is no implicit reward
            row["accuracy"] = row["training"]["rewards/accuracies"]["mean"]
    if row["iteration"] == 0 and "reward" in row:
        row["reward_diff"] = 0.0  # of the initial policy to itself
    kept = {name: row[name] for name in FIGURES if name in row}
    return {"iteration": row["iteration"], **kept}


# ---- tables ------------------------------------------------------------------------------------


def table_of_means(comparison: Comparison, figure: str) -> Table:
    """A line per arm, a column per iteration."""
    lines = [heading(comparison)]
    for arm in comparison.arms:
        seeds = len(arm.runs)
        cells = []
        for iteration in comparison.iterations():
            values = list(arm.values(figure, iteration).values())
            cells.append(cell(values, seeds))
        lines.append([arm.name, str(seeds), *cells])
    return lines


def table_of_ranges(comparison: Comparison, figure: str) -> Table:
    """Median [least, most]: of few seeds, one that went far decides the mean."""
    lines = [heading(comparison)]
    for arm in comparison.arms:
        cells = []
        for iteration in comparison.iterations():
            values = list(arm.values(figure, iteration).values())
            cells.append(range_of(values, ".2f"))
        lines.append([arm.name, str(len(arm.runs)), *cells])
    return lines


def range_of(values: list[float], style: str) -> str:
    """Median [least, most], or "-"."""
    if not values:
        return "-"
    shown = [format(value, style) for value in (median(values), min(values), max(values))]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def table_of_last_and_best(comparison: Comparison) -> Table:
    """The difference to the baseline, paired by seed, after the last iteration, and where every run
    is stopped at its own best one.

    The best one is chosen by the figure itself, which nobody has who trains a real model.
    """
    figure = comparison.figure()
    last = comparison.iterations()[-1]
    baseline, *others = comparison.arms
    best_of_baseline = baseline.best(figure)
    lines = [["arm", "seeds", "last", "median [least, most]", "best", "above : below"]]
    for arm in others:
        at_last = paired(arm, baseline, figure, last)
        best = arm.best(figure)
        at_best = [best[seed] - best_of_baseline[seed] for seed in best if seed in best_of_baseline]
        line = [arm.name, str(len(at_best)), cell(at_last, len(at_best), sign="+")]
        line += [range_of(at_last, "+.3f"), cell(at_best, len(at_best), sign="+"), sides(at_best)]
        lines.append(line)
    return lines


def sides(values: list[float]) -> str:
    """How many are above zero, and how many below."""
    above = sum(value > 0 for value in values)
    below = sum(value < 0 for value in values)
    return f"{above} : {below}" if values else "-"


def table_of_differences(comparison: Comparison) -> Table:
    """The same for the difference to the baseline, over the seeds that both have."""
    figure = comparison.figure()
    baseline, *others = comparison.arms
    lines = [heading(comparison)]
    for arm in others:
        common = len(arm.runs.keys() & baseline.runs.keys())
        cells = []
        for iteration in comparison.iterations():
            values = paired(arm, baseline, figure, iteration)
            cells.append(cell(values, common, sign="+"))
        lines.append([arm.name, str(common), *cells])
    return lines


def table_of_wins(comparison: Comparison) -> Table:
    """In how many seeds an arm is above the baseline, and in how many below."""
    figure = comparison.figure()
    baseline, *others = comparison.arms
    lines = [heading(comparison)]
    for arm in others:
        common = len(arm.runs.keys() & baseline.runs.keys())
        cells = []
        for iteration in comparison.iterations():
            cells.append(sides(paired(arm, baseline, figure, iteration)))
        lines.append([arm.name, str(common), *cells])
    return lines


def heading(comparison: Comparison) -> list[str]:
    return ["arm", "seeds", *(f"iter {i}" for i in comparison.iterations())]


def paired(arm: Arm, baseline: Arm, figure: str, iteration: int) -> list[float]:
    """The difference of each seed that both have."""
    of_arm = arm.values(figure, iteration)
    of_baseline = baseline.values(figure, iteration)
    return [of_arm[seed] - of_baseline[seed] for seed in of_arm if seed in of_baseline]


def table_of_costs(comparison: Comparison) -> Table:
    """What each arm was given: means of totals, over the seeds that have come as far as any."""
    iterations = [i for i in comparison.iterations() if i > 0]
    lines = [["arm", "seeds", "pairs", "updates", "tokens sampled"]]
    for arm in comparison.arms:
        line = [arm.name, str(len(arm.totals("steps", iterations)))]
        for figure in ("pairs", "steps", "sampled_tokens"):
            totals = arm.totals(figure, iterations)
            line.append(f"{fmean(totals):,.0f}" if totals else "-")
        lines.append(line)
    return lines


def cell(values: list[float], seeds: int, sign: str = "") -> str:
    """Mean ± standard error, or "-". Behind it, where seeds are missing, how many there are."""
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    text = f"{mean:{sign}.3f}"
    if error is not None:
        text += f"±{error:.3f}"
    if len(values) < seeds:
        text += f" ({len(values)})"
    return text


def put_first(comparison: Comparison, name: str) -> None:
    """Make the arm of that name the baseline."""
    known = [arm.name for arm in comparison.arms]
    if name not in known:
        where = f"{comparison.name}: " if comparison.name else ""
        raise Stop(f"--baseline {name}: {where}the arms are {', '.join(known)}.")
    baseline = comparison.arms.pop(known.index(name))
    comparison.arms.insert(0, baseline)


class Titled(NamedTuple):
    title: str
    table: Table


def tables(comparison: Comparison) -> list[Titled]:
    figure = comparison.figure()
    title = f"{figure.capitalize()}, on held-out prompts"
    shown = [Titled(title, table_of_means(comparison, figure))]
    if len(comparison.arms) > 1:
        title = f"Its difference to {comparison.baseline().name}, paired by seed"
        shown.append(Titled(title, table_of_differences(comparison)))
        title = "Seeds in which it is above : below"
        shown.append(Titled(title, table_of_wins(comparison)))
        title = "The difference after the last iteration, and with every run at its best iteration"
        shown.append(Titled(title, table_of_last_and_best(comparison)))
    if figure == "gold" and not comparison.optimises_gold():
        title = "Reward: the proxy that was optimised, above the initial policy's"
        shown.append(Titled(title, table_of_means(comparison, "reward_diff")))
    title = "KL to the initial policy, nats per answer: median [least, most] over seeds"
    shown.append(Titled(title, table_of_ranges(comparison, "kl/init")))
    title = (
        "Accuracy of the implicit reward, against the arm's reference, on pairs in training, mean "
        "over an iteration's steps"
    )
    shown.append(Titled(title, table_of_means(comparison, "accuracy")))
    title = (
        "Share of chosen answers that became less likely than under the arm's reference, "
        "mean over an iteration's steps"
    )
    shown.append(Titled(title, table_of_means(comparison, "chosen_fell")))
    shown.append(Titled("What an arm was given, over all iterations", table_of_costs(comparison)))
    return shown


# ---- curves ------------------------------------------------------------------------------------


def panels(comparison: Comparison) -> list[Panel]:
    """The figure against iteration, its differences, the proxy, the figure against KL.

    Where there is no proxy beside the figure, KL takes its place.
    """
    figure = comparison.figure()
    title = figure.capitalize()
    kl = "KL to the initial policy, nats"
    of_figure = "Held-out prompts; means over seeds, bars are one standard error."
    of_difference = "What an arm is above or below the baseline, paired by seed."
    of_proxy = (
        "What was optimised, above the initial policy's: where it rises and gold falls, it was "
        "optimised too far."
    )
    of_kl = "How far the policies have moved."
    of_distance = "Each point is an iteration: how much was gained at which distance."

    first = Panel(title, of_figure, "iteration", per_iteration(comparison, figure))
    gain = per_iteration(comparison, "reward_diff")
    proxy = Panel("Reward, the proxy: gain", of_proxy, "iteration", gain)
    distances = per_iteration(comparison, "kl/init")
    distance = Panel(kl, of_kl, "iteration", distances, y_scale="distance")
    against = against_kl(comparison, figure)
    last = Panel(f"{title} against distance", of_distance, kl, against, x_scale="distance")
    has_proxy = figure == "gold" and not comparison.optimises_gold()
    second = proxy if has_proxy else distance
    if len(comparison.arms) == 1:
        return [first, second, last]
    title = f"{title} minus that of {comparison.baseline().name}"
    difference = Panel(title, of_difference, "iteration", differences(comparison, figure))
    return [first, difference, second, last]


def per_iteration(comparison: Comparison, figure: str) -> list[Curve]:
    """Of each arm: the mean of the figure against the iteration."""
    curves = []
    for arm in comparison.arms:
        points = []
        for iteration in comparison.iterations():
            values = arm.values_of_all(figure, iteration)
            if values:
                mean, error = mean_and_error(values)
                points.append(Point(iteration, mean, error or 0.0))
        curves.append(Curve(arm.name, points))
    return curves


def differences(comparison: Comparison, figure: str) -> list[Curve]:
    """Of each arm but the baseline: the mean difference to it, over the seeds that both have."""
    baseline, *others = comparison.arms
    curves = []
    for arm in others:
        points = []
        for iteration in comparison.iterations():
            values = paired(arm, baseline, figure, iteration)
            if len(values) == len(arm.runs.keys() & baseline.runs.keys()) > 0:
                mean, error = mean_and_error(values)
                points.append(Point(iteration, mean, error or 0.0))
        curves.append(Curve(arm.name, points))
    return curves


def against_kl(comparison: Comparison, figure: str) -> list[Curve]:
    """Of each arm: the mean of the figure against the mean KL, a point per iteration."""
    distances = per_iteration(comparison, "kl/init")
    curves = []
    for curve, distance in zip(per_iteration(comparison, figure), distances, strict=True):
        kl_at = {point.x: point.y for point in distance.points}  # iteration -> KL
        points = [p._replace(x=kl_at[p.x]) for p in curve.points if p.x in kl_at]
        curves.append(Curve(curve.name, points))
    return curves


# ---- the page ----------------------------------------------------------------------------------


def html_of(comparisons: list[Comparison], drawings: list[list[Drawing]]) -> str:
    parts = ["<h1>Runs compared</h1>", *paragraphs([LEGEND])]
    for comparison, curves in zip(comparisons, drawings, strict=True):
        if comparison.name:
            parts.append(f"<h2>{escape(comparison.name)}</h2>")
        parts.append(figures(curves))
        for title, table in tables(comparison):
            parts += paragraphs([title])
            parts.append(grid(table))
    return document("Runs compared", parts)


def rows_of(comparison: Comparison) -> list[dict]:
    """OUTPUT.jsonl of one comparison."""
    rows = []
    for arm in comparison.arms:
        for seed, its_rows in arm.runs.items():
            head = {"comparison": comparison.name, "arm": arm.name, "seed": seed}
            rows += [head | row for row in its_rows]
    return rows


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("paths", nargs="+", type=Path, metavar="RUN", help="see above")
    p.add_argument("--output", required=True, help="of OUTPUT.html, OUTPUT.png and OUTPUT.jsonl")
    p.add_argument("--baseline", help="the arm that others are compared with; default: the first")
    return p


def check_output_is_ours(output: str) -> None:
    """Stop where a file that would be replaced was not written by this tool."""
    rows = Path(f"{output}.jsonl")
    if rows.exists():
        read_rows(rows)  # Stop, if they are not ours
        return
    for path in (Path(f"{output}.html"), Path(f"{output}.png")):
        if path.exists():
            raise Stop(
                f"{path}: exists, and not {rows.name}: it is not of this tool. Move it away."
            )


def main():
    args = arguments().parse_args()
    check_output_is_ours(args.output)
    comparisons = read_paths(args.paths)
    rows = []
    for comparison in comparisons:
        if args.baseline:
            put_first(comparison, args.baseline)
        rows += rows_of(comparison)
        if comparison.name:
            print(f"\n{comparison.name}")
        for title, table in tables(comparison):
            print(f"\n{textwrap.fill(title, WIDTH)}\n{plain(table)}")

    write_whole(f"{args.output}.jsonl", "".join(map(dump, rows)))
    names = [comparison.name for comparison in comparisons]
    drawings = draw(names, [panels(comparison) for comparison in comparisons], f"{args.output}.png")
    write_whole(f"{args.output}.html", html_of(comparisons, drawings))
    print(f"\n{LEGEND}\nThe curves are in {args.output}.html")


if __name__ == "__main__":
    run(main)
