"""The curves of a report: which figures go on which axes, and how they are drawn.

report.py passes in the rows of summary.jsonl and of train.jsonl. The first three panels become
curve.png; all of them become SVG within the page, which has their titles, notes and legends as text
beside them: text of the page has its size on a telephone, too, and covers no curve.
"""

import io
import math
import re
from pathlib import Path
from typing import NamedTuple

from records import Stop, whole

# In the page these become its own colours, light or dark.
INK = "#1b1f24"
ONE = "#2f66c4"
TWO = "#c2680e"
PAGE_COLORS = {INK: "currentColor", ONE: "var(--one)", TWO: "var(--two)"}

STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "",  # same figures, same bytes
    "font.size": 9,
}
IN_PNG = 3  # panels
SIZE = (3.6, 2.5)  # inches of an SVG: small, so that its numbers can be read on a telephone


class Curve(NamedTuple):
    key: str  # of the figure
    label: str  # in the legend; a panel with one curve has no legend
    color: str


class Panel(NamedTuple):
    title: str
    note: str  # one sentence: what it shows
    x: str  # key of the figure on the axis
    x_label: str
    rows: list[dict]  # one per point
    curves: list[Curve]


# ---- what is drawn -----------------------------------------------------------------------------


def panels(
    rows: list[dict],
    logs: list[list[dict]],
    evaluations: list[list[dict]],
    gold: str | None,
    by_judge_alone: bool,
) -> list[Panel]:
    """All panels that have a point.

    rows: summary.jsonl. logs: train.jsonl of each iteration, its steps; evaluations: its others.
    by_judge_alone: the reward is a judge's win rate and nothing else.
    """
    steps = numbered_steps(logs)
    between = numbered_evaluations(logs, evaluations)
    every = [
        *panels_of_rewards(rows, gold, by_judge_alone),
        *panels_of_answers(rows),
        *panels_of_training(steps, between),
    ]
    return [panel for panel in every if has_a_point(panel)]


def panels_of_rewards(rows: list[dict], gold: str | None, by_judge_alone: bool) -> list[Panel]:
    """What held-out answers are worth."""
    judge = Curve("reward/judge", "win rate", ONE)
    proxy = judge if by_judge_alone else Curve("reward", "reward", ONE)
    optimised = [proxy]
    if any("score" in row for row in rows):
        optimised.append(Curve("score", "score: less the length penalty", TWO))
    golden = Curve("gold", "gold", TWO)
    travelled = golden if gold else proxy

    of_proxy = "What ranks the answers, as a mean over held-out ones; bars are one standard error."
    of_gold = "It decides nothing, so it shows whether the proxy still means what it should."
    of_distance = (
        "Each point is an iteration: how much was gained, how far from the initial policy."
    )
    of_judge = "How often a held-out answer is preferred to the opponent's; at 0.5 it is as good."
    return [
        per_iteration(
            f"{proxy.label.capitalize()}: the proxy that is optimised",
            of_judge if by_judge_alone else of_proxy,
            rows,
            optimised,
        ),
        per_iteration("Gold: only watched", of_gold, rows, [golden]),
        Panel(
            f"{travelled.label.capitalize()} against distance travelled",
            of_distance,
            "kl/init",
            "KL to the initial policy, nats",
            rows,
            [travelled],
        ),
        per_iteration("Win rate, by the judge", of_judge, rows, [] if by_judge_alone else [judge]),
    ]


def panels_of_answers(rows: list[dict]) -> list[Panel]:
    """What the held-out answers are like."""
    kl = [Curve("kl/init", "to initial", ONE), Curve("kl/prev", "to previous", TWO)]
    length = Curve("length", "", ONE)
    rates = [Curve("distinct", "distinct answers", ONE), Curve("truncated", "cut off", TWO)]
    of_kl = "How far the policy has moved; a jump is a step that was too large."
    of_length = "Many rewards prefer long answers: a steady rise may be that alone."
    of_rates = "Fewer distinct answers: the policy repeats itself. Cut off: by the token limit."
    return [
        per_iteration("KL, nats per answer", of_kl, rows, kl),
        per_iteration("Tokens per answer", of_length, rows, [length]),
        per_iteration("Rates", of_rates, rows, rates),
    ]


def panels_of_training(steps: list[dict], between: list[dict]) -> list[Panel]:
    """The steps, and the evaluations between them."""
    loss = Curve("loss", "", ONE)
    accuracy = Curve("rewards/accuracies", "", ONE)
    of_loss = "A line per iteration; it begins at ln 2 = 0.69 where the reference is the policy."
    of_accuracy = (
        "Share of pairs whose chosen answer has the larger implicit reward; 0 where both are 0."
    )
    of_trained = "Beta times the log-prob gained on the reference: healthy where the gap grows."
    of_held_out = "The same for pairs that are not trained on: here, too, the gap should grow."
    return [
        per_step("Training loss", of_loss, steps, [loss]),
        per_step("Training accuracy", of_accuracy, steps, [accuracy]),
        per_step("Implicit rewards of training pairs", of_trained, steps, chosen_and_rejected("")),
        per_step(
            "Implicit rewards of held-out pairs", of_held_out, between, chosen_and_rejected("eval_")
        ),
    ]


def per_iteration(title: str, note: str, rows: list[dict], curves: list[Curve]) -> Panel:
    return Panel(title, note, "iteration", "iteration", rows, curves)


def per_step(title: str, note: str, steps: list[dict], curves: list[Curve]) -> Panel:
    return Panel(title, note, "at", "step, over all iterations", steps, curves)


def chosen_and_rejected(prefix: str) -> list[Curve]:
    chosen = Curve(f"{prefix}rewards/chosen", "chosen", ONE)
    rejected = Curve(f"{prefix}rewards/rejected", "rejected", TWO)
    return [chosen, rejected]


def numbered_steps(logs: list[list[dict]]) -> list[dict]:
    """The steps of all iterations one after another, numbered as "at".

    A row of NaN after each iteration breaks the line.
    """
    steps: list[dict] = []
    number = 0
    for log in logs:
        for step in log:
            number += 1
            steps.append(step | {"at": number})
        if log:
            steps.append(dict.fromkeys(steps[-1], math.nan))
    return steps


def numbered_evaluations(logs: list[list[dict]], evaluations: list[list[dict]]) -> list[dict]:
    """The evaluations of all iterations, on the axis of numbered_steps."""
    rows: list[dict] = []
    before = 0  # steps of the iterations before
    for log, its_evaluations in zip(logs, evaluations, strict=True):
        for row in its_evaluations:
            rows.append(row | {"at": before + row.get("step", 0)})
        if its_evaluations:
            rows.append(dict.fromkeys(rows[-1], math.nan))
        before += len(log)
    return rows


def points_of(panel: Panel, curve: Curve) -> list[dict]:
    """The rows that have both coordinates."""
    return [row for row in panel.rows if panel.x in row and curve.key in row]


def has_a_point(panel: Panel) -> bool:
    return bool(shown(panel))


def shown(panel: Panel) -> list[Curve]:
    """The curves that have a point."""
    return [curve for curve in panel.curves if points_of(panel, curve)]


# ---- how it is drawn ---------------------------------------------------------------------------


class Drawing(NamedTuple):
    """A panel as the page shows it."""

    title: str
    note: str
    legend: list[tuple[str, str]]  # (label, colour) of each curve, where there are several
    svg: str


def draw(drawn: list[Panel], png: Path) -> list[Drawing]:
    """Write the first panels as a picture; return all of them for the page."""
    try:
        import matplotlib.figure
    except ImportError:
        raise Stop(
            "summary.jsonl is written, but the curves need matplotlib: pip install matplotlib"
        ) from None
    with matplotlib.rc_context(STYLE):
        write_png(drawn[:IN_PNG], png)
        return [Drawing(p.title, p.note, legend_of(p), svg_of(p)) for p in drawn]


def legend_of(panel: Panel) -> list[tuple[str, str]]:
    curves = shown(panel)
    if len(curves) < 2:
        return []
    return [(curve.label, PAGE_COLORS[curve.color]) for curve in curves]


def write_png(drawn: list[Panel], png: Path) -> None:
    """The panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure((4 * len(drawn), 3), layout="constrained")
    for i, panel in enumerate(drawn, 1):
        ax = figure.add_subplot(1, len(drawn), i)
        plot(ax, panel)
        ax.set_title(panel.title, fontsize=10, color=INK)
        if len(shown(panel)) > 1:
            ax.legend(frameon=False, labelcolor=INK)
    with whole(png) as temporary:
        figure.savefig(temporary, format="png", dpi=160)


def svg_of(panel: Panel) -> str:
    """The panel as an SVG element that can be put into a page."""
    from matplotlib.figure import Figure

    figure = Figure(SIZE, layout="constrained")
    plot(figure.add_subplot(), panel)
    return as_svg(figure, panel.title)


def as_svg(figure, title: str) -> str:
    """A figure as an SVG element, in the page's colours."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})

    # no header, and no size of its own; what it shows, for who cannot see it
    opening = r'(?s).*?<svg .*?(viewBox="[^"]*").*?>'
    named = rf'<svg role="img" aria-label="{title}" \1>'
    svg = re.sub(opening, named, text.getvalue(), count=1)
    # remove metadata, and ids that several figures would share
    svg = re.sub(r'(?s)<metadata>.*?</metadata>| id="\w+_\d+"', "", svg)
    # the page's colours
    for color, name in PAGE_COLORS.items():
        svg = svg.replace(color, name)
    return svg


def plot(ax, panel: Panel) -> None:
    for curve in shown(panel):
        plot_curve(ax, panel, curve)
    if panel.x == "iteration":
        last = panel.rows[-1]["iteration"]
        ax.set_xticks(range(0, last + 1, max(1, math.ceil(last / 8))))
    if panel.x == "kl/init":  # room for the names of the points
        ax.margins(0.1)
    dress(ax, panel.x_label)


def dress(ax, x_label: str) -> None:
    """What all axes have in common."""
    ax.set_xlabel(x_label, color=INK)
    ax.tick_params(colors=INK, length=3)
    ax.grid(color=INK, alpha=0.12, linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(INK)


def plot_curve(ax, panel: Panel, curve: Curve) -> None:
    points = points_of(panel, curve)
    errors = [row.get(f"{curve.key}_se", 0) for row in points]
    many_points = panel.x == "at"  # a point per training step
    ax.errorbar(
        [row[panel.x] for row in points],
        [row[curve.key] for row in points],
        errors if any(errors) else None,
        label=curve.label,
        color=curve.color,
        linewidth=1.6,
        marker="" if many_points else "o",
        markersize=4,
        capsize=2.5,
    )
    if panel.x == "kl/init":  # the axis shows no iteration, so each point names its own
        for row in points:
            at = (row[panel.x], row[curve.key])
            below_right = (5, -11)
            name = str(row["iteration"])
            ax.annotate(name, at, below_right, textcoords="offset points", color=INK)
