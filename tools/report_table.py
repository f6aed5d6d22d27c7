"""The figures of all iterations as a table, and what a reader must know about it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from report_figures import INITIAL, names_of
from report_run import JUDGE, Rewards
from stage import ROWS_OF

WIDTH = 120  # columns of what is printed
LEAST_NEEDED = ("win", "distinct", "cut", "time")  # not printed where the width does not suffice


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
