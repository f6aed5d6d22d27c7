"""The curves of tools/compare.py: one row of panels per comparison, one curve per arm.

An arm has the same colour and marker in all panels. All panels become SVG within the page, and
together one picture.
"""

from pathlib import Path
from typing import NamedTuple

from records import Stop, whole
from report_curves import INK, SIZE, STYLE, Drawing, as_svg, dress


class Look(NamedTuple):
    color: str
    marker: str


# Colours that can be told apart on white and on black, also by most of the colour-blind.
COLORS = ["#3a7bd5", "#d9722b", "#2a9d62", "#b04fc0", "#c8434f", "#7a7f87", "#a08a1d", "#2b9fb5"]
MARKERS = "os^DvPX"  # one fewer than colours, so that 56 arms look different


class Point(NamedTuple):
    x: float
    y: float
    error: float  # of y, one standard error


class Curve(NamedTuple):
    name: str
    points: list[Point]


class Panel(NamedTuple):
    title: str
    note: str  # one sentence: what it shows
    x_label: str
    curves: list[Curve]
    x_scale: str = "linear"  # or "distance": from 1 on logarithmic
    y_scale: str = "linear"


def draw(names: list[str], rows: list[list[Panel]], png: str) -> list[list[Drawing]]:
    """Write the picture; return the panels for the page, row by row.

    names: of the comparisons, one per row.
    """
    try:
        import matplotlib.figure
    except ImportError:
        raise Stop("the curves need matplotlib: pip install matplotlib") from None
    looks = looks_of(rows)
    with matplotlib.rc_context(STYLE):
        write_png(names, rows, looks, png)
        return [[drawing_of(panel, looks) for panel in panels] for panels in rows]


def write_png(names: list[str], rows: list[list[Panel]], looks: dict, png: str) -> None:
    """A row per comparison, a legend in each row."""
    from matplotlib.figure import Figure

    across, down = max(map(len, rows)), len(rows)
    picture = Figure((3.3 * across, 2.8 * down), layout="constrained")
    grid = picture.subplots(down, across, squeeze=False)
    for name, panels, places in zip(names, rows, grid, strict=True):
        for ax in places[len(panels) :]:
            ax.set_visible(False)
        for panel, ax in zip(panels, places, strict=False):
            plot(ax, panel, looks)
            title = f"{name}: {panel.title}" if name else panel.title
            ax.set_title(title, fontsize=10, color=INK)
        places[0].legend(frameon=False, labelcolor=INK, fontsize=8)
    with whole(Path(png)) as temporary:
        picture.savefig(temporary, format="png", dpi=160)


def drawing_of(panel: Panel, looks: dict) -> Drawing:
    from matplotlib.figure import Figure

    figure = Figure(SIZE, layout="constrained")
    plot(figure.add_subplot(), panel, looks)
    legend = [(curve.name, looks[curve.name].color) for curve in panel.curves]
    return Drawing(panel.title, panel.note, legend, as_svg(figure, panel.title))


def looks_of(rows: list[list[Panel]]) -> dict[str, Look]:
    """name of an arm -> its look, the same in all panels."""
    names: dict[str, None] = {}
    for panels in rows:
        for panel in panels:
            names |= dict.fromkeys(curve.name for curve in panel.curves)
    looks = {}
    for i, name in enumerate(names):
        looks[name] = Look(COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)])
    return looks


def plot(ax, panel: Panel, looks: dict[str, Look]) -> None:
    for curve in reversed(panel.curves):  # the first is the baseline, and lies on top
        look = looks[curve.name]
        errors = [point.error for point in curve.points]
        ax.errorbar(
            [point.x for point in curve.points],
            [point.y for point in curve.points],
            errors if any(errors) else None,
            label=curve.name,
            color=look.color,
            marker=look.marker,
            markersize=4,
            linewidth=1.5,
            capsize=2,
        )
    for axis, scale in (("x", panel.x_scale), ("y", panel.y_scale)):
        if scale == "distance":  # one arm that went far must not hide the others
            ax.set(**{f"{axis}scale": "symlog"})
    dress(ax, panel.x_label)
