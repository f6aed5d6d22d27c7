"""The curves of a report: which figures go on which axes, and how they are drawn.

report.py passes in the rows of summary.jsonl and of train.jsonl. The first three curves become
curve.png; all of them become SVG within the page.
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
IN_PNG = 3  # curves


class Curve(NamedTuple):
    key: str  # of the figure
    label: str  # in the legend; a panel with one curve has no legend
    color: str


class Panel(NamedTuple):
    title: str
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
    judge = Curve("reward/judge", "win rate", ONE)
    proxy = judge if by_judge_alone else Curve("reward", "reward", ONE)
    optimised = [proxy]
    if any("score" in row for row in rows):
        optimised.append(Curve("score", "score: less the length penalty", TWO))
    also_judged = [] if by_judge_alone else [judge]
    golden = Curve("gold", "gold", TWO)
    length = Curve("length", "", ONE)
    kl = [Curve("kl/init", "to initial", ONE), Curve("kl/prev", "to previous", TWO)]
    rates = [Curve("distinct", "distinct answers", ONE), Curve("truncated", "cut off", TWO)]
    every = [
        per_iteration(f"{proxy.label.capitalize()}: the proxy that is optimised", rows, optimised),
        per_iteration("Gold: only watched", rows, [golden]),
        against_distance(rows, golden if gold else proxy),
        per_iteration("Win rate, by the judge", rows, also_judged),
        per_iteration("KL, nats per answer", rows, kl),
        per_iteration("Tokens per answer", rows, [length]),
        per_iteration("Rates", rows, rates),
        per_step("Training loss", steps, [Curve("loss", "", ONE)]),
        per_step("Training accuracy", steps, [Curve("rewards/accuracies", "", ONE)]),
        # healthy where the gap between the two grows
        per_step("Implicit rewards of training pairs", steps, chosen_and_rejected("")),
        per_step("Implicit rewards of held-out pairs", between, chosen_and_rejected("eval_")),
    ]
    return [panel for panel in every if has_a_point(panel)]


def per_iteration(title: str, rows: list[dict], curves: list[Curve]) -> Panel:
    return Panel(title, "iteration", "iteration", rows, curves)


def against_distance(rows: list[dict], curve: Curve) -> Panel:
    title = f"{curve.label.capitalize()} against distance travelled"
    return Panel(title, "kl/init", "KL to the initial policy, nats", rows, [curve])


def per_step(title: str, steps: list[dict], curves: list[Curve]) -> Panel:
    return Panel(title, "at", "step, over all iterations", steps, curves)


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
    return any(points_of(panel, curve) for curve in panel.curves)


# ---- how it is drawn ---------------------------------------------------------------------------


def draw(drawn: list[Panel], png: Path) -> dict[str, str]:
    """Write the first panels as a picture; return all of them, title -> SVG."""
    try:
        import matplotlib.figure
    except ImportError:
        raise Stop(
            "summary.jsonl is written, but the curves need matplotlib: pip install matplotlib"
        ) from None
    with matplotlib.rc_context(STYLE):
        write_png(drawn[:IN_PNG], png)
        return {panel.title: svg_of(panel) for panel in drawn}


def write_png(drawn: list[Panel], png: Path) -> None:
    """The panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure((4 * len(drawn), 3), layout="constrained")
    for i, panel in enumerate(drawn, 1):
        ax = figure.add_subplot(1, len(drawn), i)
        plot(ax, panel)
        ax.set_title(panel.title, fontsize=10, color=INK)
    with whole(png) as temporary:
        figure.savefig(temporary, format="png", dpi=160)


def svg_of(panel: Panel) -> str:
    """The panel as an SVG element that can be put into a page."""
    from matplotlib.figure import Figure

    figure = Figure((4, 2.6), layout="constrained")
    plot(figure.add_subplot(), panel)
    return as_svg(figure)


def as_svg(figure) -> str:
    """A figure as an SVG element, in the page's colours."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})

    # no header, and no size of its own
    opening = r'(?s).*?<svg .*?(viewBox="[^"]*").*?>'
    svg = re.sub(opening, r'<svg role="img" \1>', text.getvalue(), count=1)
    # remove metadata, and ids that several figures would share
    svg = re.sub(r'(?s)<metadata>.*?</metadata>| id="\w+_\d+"', "", svg)
    # the page's colours
    for color, name in PAGE_COLORS.items():
        svg = svg.replace(color, name)
    return svg


def plot(ax, panel: Panel) -> None:
    for curve in panel.curves:
        plot_curve(ax, panel, curve)
    if len(panel.curves) > 1:
        ax.legend(frameon=False, labelcolor=INK)
    if panel.x == "iteration":
        few = len(panel.rows) < 12
        ax.set_xticks([row["iteration"] for row in panel.rows] if few else ax.get_xticks())
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
