"""The curves of tools/compare.py: one row of panels per comparison, one curve per arm.

An arm has the same colour and marker in all panels. All panels become SVG within the page, and
together one picture.
"""

from pathlib import Path
from typing import NamedTuple

from records import Stop, whole
from report_curves import INK, STYLE, as_svg, dress

# Colours that can be told apart on white and on black, also by most of the colour-blind.
LOOKS = [
    ("#3a7bd5", "o"),
    ("#d9722b", "s"),
    ("#2a9d62", "^"),
    ("#b04fc0", "D"),
    ("#c8434f", "v"),
    ("#7a7f87", "P"),
    ("#a08a1d", "X"),
    ("#2b9fb5", "*"),
]


class Point(NamedTuple):
    x: float
    y: float
    error: float  # of y, one standard error


class Curve(NamedTuple):
    name: str
    points: list[Point]


class Panel(NamedTuple):
    title: str
    x_label: str
    curves: list[Curve]


def draw(names: list[str], rows: list[list[Panel]], png: str) -> list[dict[str, str]]:
    """Write the picture; return of each row: title -> SVG.

    names: of the comparisons, one per row.
    """
    try:
        import matplotlib.figure
    except ImportError:
        raise Stop("the curves need matplotlib: pip install matplotlib") from None
    looks = looks_of(rows)
    with matplotlib.rc_context(STYLE):
        across, down = max(map(len, rows)), len(rows)
        picture = matplotlib.figure.Figure((4 * across, 3 * down), layout="constrained")
        grid = picture.subplots(down, across, squeeze=False)
        for name, panels, places in zip(names, rows, grid, strict=True):
            for panel, ax in zip(panels, places, strict=True):
                plot(ax, panel, looks, legend=panel is panels[0])
                title = f"{name}: {panel.title}" if name else panel.title
                ax.set_title(title, fontsize=10, color=INK)
        with whole(Path(png)) as temporary:
            picture.savefig(temporary, format="png", dpi=160)
        return [svgs_of(panels, looks) for panels in rows]


def svgs_of(panels: list[Panel], looks: dict) -> dict[str, str]:
    from matplotlib.figure import Figure

    svgs = {}
    for panel in panels:
        figure = Figure((4, 3), layout="constrained")
        plot(figure.add_subplot(), panel, looks, legend=True)
        svgs[panel.title] = as_svg(figure)
    return svgs


def looks_of(rows: list[list[Panel]]) -> dict[str, tuple[str, str]]:
    """name of an arm -> its colour and marker."""
    names: dict[str, None] = {}
    for panels in rows:
        for panel in panels:
            names |= dict.fromkeys(curve.name for curve in panel.curves)
    return {name: LOOKS[i % len(LOOKS)] for i, name in enumerate(names)}


def plot(ax, panel: Panel, looks: dict, legend: bool) -> None:
    for curve in panel.curves:
        color, marker = looks[curve.name]
        errors = [point.error for point in curve.points]
        ax.errorbar(
            [point.x for point in curve.points],
            [point.y for point in curve.points],
            errors if any(errors) else None,
            label=curve.name,
            color=color,
            marker=marker,
            markersize=4,
            linewidth=1.5,
            capsize=2,
        )
    if legend:
        ax.legend(frameon=False, labelcolor=INK, fontsize=8)
    dress(ax, panel.x_label)
