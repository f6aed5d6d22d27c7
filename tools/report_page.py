"""The page of a report: one HTML file that loads nothing from the network.

report.py decides what the page shows; here it becomes HTML. All text from the run is escaped: an
answer may contain any tag, and none takes effect. report.css holds the style, for wide and narrow
windows, light and dark, and paper. What is too wide for a window, a table, scrolls by itself, also
by the keyboard.
"""

import html
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from report_curves import Drawing

CSS = Path(__file__).with_name("report.css")
EXAMPLES = 12  # held-out prompts that are shown


class Box(NamedTuple):
    """An answer, shown under its prompt."""

    whose: str
    kind: str  # "up", "down", or "" for no colour
    facts: str
    text: str | list[dict]


class Example(NamedTuple):
    prompt: str | list[dict]
    boxes: list[Box]


@dataclass
class Page:
    """What the page shows, in its order."""

    title: str
    model: str
    table: list[list[str]]  # headings first
    legend: list[str]
    warnings: list[str]
    curves: list[Drawing]
    examples: list[Example] | None  # None: nothing has been evaluated
    pairs_from: str  # the iteration that the pairs are from
    pairs: dict[str, list[Example]]  # "Strongest" and "Weakest"; empty: there are no pairs
    sources: list[str]  # of the pairs, where an iteration was trained on several files
    dropped: list[str]
    figures: list[list[str]]  # every one, headings first
    config: dict
    versions: dict[str, list[str]]


def answer_box(policy: str, candidate: dict) -> Box:
    """A policy's answer to a held-out prompt."""
    rewards = {"reward": candidate["reward"]}
    for name, value in candidate["rewards"].items():
        if value != candidate["reward"]:
            rewards[name] = value
    facts = [f"{name} {value:.3f}" for name, value in rewards.items()]
    facts.append(f"{len(candidate['token_ids'])} tokens")
    if candidate["finish_reason"] == "length":
        facts.append("cut off")
    return Box(policy, "", " · ".join(facts), candidate["text"])


def pair_boxes(pair: dict, margin: float) -> list[Box]:
    """The two answers of a training pair."""
    facts = f"score {pair['score_chosen']:.3f}, margin {margin:.3f}"
    chosen = Box("chosen", "up", facts, pair["chosen"])
    rejected = Box("rejected", "down", f"score {pair['score_rejected']:.3f}", pair["rejected"])
    return [chosen, rejected]


# ---- the page ----------------------------------------------------------------------------------


def html_of(page: Page) -> str:
    parts = [
        f"<h1>{escape(page.title)}</h1><p>Online iterative DPO on {escape(page.model)}</p>",
        grid(page.table),
        *paragraphs(page.legend),
        *paragraphs(page.warnings, " class=notice"),
        figures(page.curves),
        *examples(page),
        *pairs(page),
        *details(page),
    ]
    return document(page.title, parts)


def document(title: str, parts: list[str]) -> str:
    """A whole page of these elements."""
    body = "\n".join(parts)
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · iterdpo</title>"
        f"<style>\n{CSS.read_text(encoding='utf-8')}</style>"
    )
    opening = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n'
    return f"{opening}<body><main>\n{body}\n</main></body></html>\n"


def figures(curves: list[Drawing]) -> str:
    """Each under its title, its note and, where there are several curves, their colours."""
    if not curves:
        return ""
    shown = ""
    for curve in curves:
        legend = ""
        for label, color in curve.legend:
            legend += f'<span><i style="color: {color}"></i>{escape(label)}</span>'
        legend = f'<div class="legend">{legend}</div>' if legend else ""
        caption = f"<b>{escape(curve.title)}</b><p>{curve.note}</p>{legend}"
        shown += f"<figure><figcaption>{caption}</figcaption>{curve.svg}</figure>"
    return f'<div class="curves">{shown}</div>'


def examples(page: Page) -> list[str]:
    """The same held-out prompts, answered by the first and by the last policy."""
    if page.examples is None:
        return []
    shown = [example(e) for e in page.examples]
    return [
        "<h2>The same held-out prompts, then and now</h2>",
        f"<p>{EXAMPLES} prompts drawn by a hash of their id, and each policy's first answer.</p>",
        "".join(shown),
    ]


def pairs(page: Page) -> list[str]:
    parts = []
    for kind, shown in page.pairs.items():
        title = f"{kind} training pairs of {page.pairs_from}"
        parts.append(f"<h2>{title}</h2><p>By margin of score.</p>")
        parts += [example(e) for e in shown]
    return parts


def details(page: Page) -> list[str]:
    """Sources of pairs, drops, every figure, settings and versions."""
    sources = ["<h2>Sources of the pairs</h2>", *paragraphs(page.sources)] if page.sources else []
    dropped = paragraphs(page.dropped) or ["<p>Nothing.</p>"]
    settings = [[name, value] for name, value in page.config.items() if value != ""]
    versions = [[package, "; then ".join(known)] for package, known in page.versions.items()]
    summary = "<summary>summary.jsonl; tools/report.py defines each</summary>"
    return [
        *sources,
        "<h2>Dropped, by reason</h2>",
        "".join(dropped),
        f"<h2>Every figure</h2><details>{summary}",
        grid(page.figures),
        "</details><h2>Settings</h2>",
        grid(settings, headings=False),
        "<h2>Versions</h2>",
        grid(versions, headings=False),
    ]


# ---- its elements ------------------------------------------------------------------------------


def escape(value) -> str:
    return html.escape(str(value))


def paragraphs(texts: list[str], attributes: str = "") -> list[str]:
    return [f"<p{attributes}>{escape(text)}</p>" for text in texts]


def grid(lines: list[list], headings: bool = True) -> str:
    """A table. With headings, the first line holds them; without, its cells are words."""
    rows = ""
    for number, line in enumerate(lines):
        tag = "th" if headings and number == 0 else "td"
        cells = [f"<{tag}>{escape(cell)}</{tag}>" for cell in line]
        rows += f"<tr>{''.join(cells)}</tr>"
    kind = "numbers" if headings else "words"
    return f'<div class="scroll" tabindex="0"><table class="{kind}">{rows}</table></div>'


def example(shown: Example) -> str:
    """A prompt over its answers."""
    boxes = ""
    for box in shown.boxes:
        facts = (
            f'<div class="facts"><b class="{box.kind}">{box.whose}</b> {escape(box.facts)}</div>'
        )
        boxes += f'<div class="answer">{facts}{words(box.text)}</div>'
    return f'<div class="example">{words(shown.prompt)}<div class="two">{boxes}</div></div>'


def words(text: str | list[dict]) -> str:
    """A prompt or an answer, in either of TRL's formats."""
    if isinstance(text, str):
        return f'<div class="text">{escape(text)}</div>'
    shown = ""
    for turn in text:
        if len(text) > 1:
            shown += f'<div class="role">{escape(turn["role"])}</div>'
        shown += words(str(turn["content"]))
    return shown
