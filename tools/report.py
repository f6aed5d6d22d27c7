"""What a run did: summary.jsonl, report.html and curve.png, from the files that its stages wrote.

    python tools/report.py runs/demo

Reads iter_00, iter_01, … as far as they exist. Held-out figures come from iter_*/eval/scored.jsonl:
the same prompts for every policy, several answers each. Answers to one prompt are alike, so prompts
and not answers are the sample. With x_p the mean over the answers to prompt p, of P prompts,

    x         (1/P) sum_p x_p
    x_se      sd(x_p) / sqrt(P)                              standard error, clustered by prompt
    x_diff    (1/P) sum_p (x_p - x_p of the initial policy)  paired; x_diff_se from the sd of these differences
    x_win     (1/P) sum_p P(an answer beats one of the initial policy to the same prompt), ties a half; x_win_se

for x = reward (the weighted sum that was optimised: a proxy), gold (a reward that only watched; see
--gold) and reward/NAME (every other one by itself). The other columns of summary.jsonl, a row an
iteration:

    kl/NAME, _se       mean of log pi(y|x) - log ref(y|x), summed over the tokens of an answer: an unbiased estimate of
                       KL(pi || ref) for answers drawn at temperature 1; ref is "init", the first policy (whose own is
                       0 by definition), or "prev"
    kl/NAME_per_token  the same difference, summed over all answers and divided by all their tokens
    length, truncated, distinct     tokens an answer; share cut off by the token limit; different texts / answers
    sampled/…          reward, length, truncated, distinct of the answers that pairs were made of
    pairs, counts      pairs made; rows in, out and dropped by reason, by stage
    seconds            by stage, counted from its last start
    training           of each column of train.jsonl: its last value, and its mean over the steps
    audit, changed_weights          gap between generator and trainer (docs/math.md); share of weights that changed

and TRL's names, so that dashboards carry over. TRL logs them on training batches; here they are
held-out figures:

    objective/scores = reward            objective/kl = kl/prev, or kl/init where the run has REF=init
    objective/entropy = mean of -log pi(y|x)                        objective/non_score_reward = -beta objective/kl
    objective/rlhf_reward = objective/scores + objective/non_score_reward   val/contain_eos_token = 1 - truncated
    objective/scores_margin = mean of score_chosen - score_rejected, over the iteration's training pairs

No iteration is called the best: to choose one by its held-out figures would spoil them.
"""

import argparse
import heapq
import html
import io
import itertools
import json
import math
import re
import sys
import textwrap
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # records.py stands in the root
from records import SCORED, Stop, dump, read_jsonl, whole, write_whole
from stage import run, seed_of

PAIR = {
    "id": str,
    "prompt": (str, list),
    "score_chosen": (float, int),
    "score_rejected": (float, int),
}
OUTPUTS = [
    "prompts.jsonl",
    "candidates.jsonl",
    "enhancer.jsonl",
    "scored.jsonl",
    "pairs.jsonl",
    "policy",
]
OUTPUTS += ["eval/candidates.jsonl", "eval/scored.jsonl"]
EXAMPLES = 12  # held-out prompts on the page, drawn by a hash of their id
EXTREMES = 5  # strongest and weakest pairs on the page


# --------------------------------------------------------------------------------------------------
# Reading


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_metas(folder: Path) -> dict[str, dict]:
    """stage -> its X.meta.json, in the order of the loop; a stage is called after its output."""
    files = [folder / f"{name}.meta.json" for name in OUTPUTS]
    return {str(f.relative_to(folder)).split(".")[0]: load(f) for f in files if f.exists()}


def choose_gold(asked: str | None, heldout: list[Path], metas: list[dict]) -> str | None:
    """The reward that only watched, if there is one: no score.py of the run gave it a weight."""
    scoring = [
        m[stage]["arguments"] for m in metas for stage in ("scored", "eval/scored") if stage in m
    ]
    optimised = {
        n for a in scoring for n, w in zip(a["rewards"], a["reward_weights"], strict=True) if w
    }
    scored = (
        c for path in heldout[:1] for row in read_jsonl(path, SCORED) for c in row["candidates"]
    )
    names = next(scored, {"rewards": {}})["rewards"].keys()
    if asked and asked not in names:
        raise Stop(
            f"--gold {asked}: held-out answers have no reward of this name, only {', '.join(sorted(names))}."
        )
    if asked in optimised:
        raise Stop(
            f"--gold {asked}: this reward has a weight in what was optimised, so it cannot check it."
        )
    return asked or ("gold" if "gold" in names - optimised else None)


def measure(row: dict, gold: str | None = None) -> dict[str, list[float]]:
    """All that is measured of the answers to one prompt: name -> a value an answer; empty where
    none has a score.
    """
    values, answers = defaultdict(list), row["candidates"]
    for c in answers:
        values["reward"].append(c["reward"])
        for name, reward in c["rewards"].items():
            values["gold" if name == gold else f"reward/{name}"].append(reward)
        for name, logprob in c.get("ref_logprobs", {}).items():
            values[f"kl/{name}"].append(c["logprob"] - logprob)
        values["objective/entropy"].append(-c["logprob"])
        values["length"].append(len(c["token_ids"]))
        values["truncated"].append(c["finish_reason"] == "length")
    if answers:
        values["distinct"] = [len({c["text"] for c in answers}) / len(answers)]
    return values


def read_heldout(path: Path, gold: str | None) -> dict[str, dict]:
    """prompt id -> its measures; empty while there is no such file."""
    return {r["id"]: measure(r, gold) for r in read_jsonl(path, SCORED)} if path.exists() else {}


def check_heldout(folders: list[Path], heldout: list[dict], metas: list[dict]) -> list[str]:
    """Stop unless every policy answered the same prompts. Returns what a reader must know about the
    comparison.
    """
    notes, settings = [], defaultdict(dict)
    asked = next((h.keys() for h in heldout if h), set())
    for folder, h, meta in zip(folders, heldout, metas, strict=True):
        if h and h.keys() != asked:
            raise Stop(
                f"{folder}/eval/scored.jsonl: these are not the held-out prompts of the other iterations; id "
                f'"{min(h.keys() ^ asked)}", for one, is on one side only. Evaluate this policy again.'
            )
        if silent := sum(not m for m in h.values()):
            notes.append(
                f"{folder.name}: {silent} held-out prompts have no scored answer; the others are compared."
            )
        arguments = meta.get("eval/candidates", {}).get("arguments", {})
        for name in ("num_samples", "temperature", "top_p", "max_new_tokens", "seed"):
            if name in arguments:
                settings[name].setdefault(str(arguments[name]), folder.name)
    for name, values in settings.items():
        if len(values) > 1:
            different = ", ".join(f"{value} from {first}" for value, first in values.items())
            notes.append(f"The policies were not evaluated alike: {name} was {different}.")
    if {*settings["temperature"], *settings["top_p"]} - {"1.0", "[1.0]"}:
        notes.append(
            "Held-out answers were not drawn at temperature 1 and top_p 1, so the KL columns estimate no KL."
        )
    return notes


# --------------------------------------------------------------------------------------------------
# Figures


def over_prompts(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard error of a value a prompt."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def win_rate(now: list[float], then: list[float]) -> float:
    """The chance that one of these answers beats one of those; a tie, but for rounding, is half a
    win.
    """
    return fmean(
        0.5 if math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-5) else float(a > b)
        for a in now
        for b in then
    )


def heldout_figures(now: dict[str, dict], initial: dict[str, dict] | None) -> dict:
    """x, x_se, … of one policy; x_diff and x_win, too, when there is an initial one to compare it
    with.
    """
    now = {id: m for id, m in now.items() if m}
    row = {"prompts": len(now), "answers": sum(len(m["reward"]) for m in now.values())}
    for x in dict.fromkeys(name for m in now.values() for name in m):
        known = {id: m for id, m in now.items() if x in m}
        row[x], row[f"{x}_se"] = over_prompts([fmean(m[x]) for m in known.values()])
        if x.startswith("kl/"):
            tokens = sum(sum(m["length"]) for m in known.values())
            row[f"{x}_per_token"] = sum(sum(m[x]) for m in known.values()) / tokens
        both = [(m[x], initial[id][x]) for id, m in known.items() if initial and x in initial[id]]
        if both and re.match("gold$|reward", x):
            row[f"{x}_diff"], row[f"{x}_diff_se"] = over_prompts(
                [fmean(a) - fmean(b) for a, b in both]
            )
            row[f"{x}_win"], row[f"{x}_win_se"] = over_prompts([win_rate(a, b) for a, b in both])
    return row


def sampled_figures(path: Path) -> dict:
    """Of the answers that pairs are made of: one pass, nothing held."""
    sums, n = Counter(), Counter()
    for row in read_jsonl(path, SCORED):
        for name, values in measure(row).items():
            sums[name] += sum(values)
            n[name] += len(values)
    return {f"sampled/{k}": sums[k] / n[k] for k in ("reward", "length", "truncated", "distinct")}


def margin(pair: dict) -> float:
    return pair["score_chosen"] - pair["score_rejected"]


def summarise(
    folder: Path, metas: dict, heldout: dict, steps: list[dict], initial: dict, reference: str
) -> dict:
    """A row of summary.jsonl; a key is missing as long as the file that it is made of is."""
    row = {"iteration": int(folder.name[5:])}
    if any(heldout.values()):
        row |= heldout_figures(heldout, None if heldout is initial else initial)
        row |= {"objective/scores": row["reward"], "val/contain_eos_token": 1 - row["truncated"]}
        if row["iteration"] == 0:
            row.setdefault("kl/init", 0.0)  # by definition
    if (folder / "scored.jsonl").exists():
        row |= sampled_figures(folder / "scored.jsonl")
    if (folder / "pairs.jsonl").exists():
        margins = [margin(pair) for pair in read_jsonl(folder / "pairs.jsonl", PAIR)]
        row |= {"pairs": len(margins), "objective/scores_margin": fmean(margins)}
    row |= {
        key: {s: m[key] for s, m in metas.items() if m.get(key)} for key in ("counts", "seconds")
    }
    if steps:
        names = [
            k
            for k, v in steps[-1].items()
            if isinstance(v, (int, float)) and k not in ("step", "epoch")
        ]
        row["steps"] = len(steps)
        row["training"] = {
            k: {"last": steps[-1][k], "mean": fmean(s[k] for s in steps)} for k in names
        }
    if "policy" in metas:
        row |= {k: metas["policy"][k] for k in ("audit", "changed_weights") if k in metas["policy"]}
        row["beta"] = metas["policy"]["arguments"]["beta"][-1]
        if f"kl/{reference}" in row:
            row["objective/kl"] = row[f"kl/{reference}"]
            row["objective/non_score_reward"] = -row["beta"] * row["objective/kl"]
            row["objective/rlhf_reward"] = (
                row["objective/scores"] + row["objective/non_score_reward"]
            )
    return {k: v for k, v in row.items() if v is not None and v != {}}


# --------------------------------------------------------------------------------------------------
# The table


def value(row: dict, key: str, sign: str = "", digits: int = 3) -> str:
    """A figure, with its standard error where there is one; "-" where there is none."""
    if key not in row:
        return "-"
    digits = digits if abs(row[key]) < 10 else min(digits, 2) if abs(row[key]) < 100 else 1
    error = f"±{row[f'{key}_se']:.{digits}f}" if f"{key}_se" in row else ""
    return f"{row[key]:{sign}.{digits}f}{error}"


def percent(row: dict, key: str) -> str:
    return f"{row[key]:.0%}" if key in row else "-"


def duration(seconds: float) -> str:
    s = round(seconds)
    return (
        f"{s}s"
        if s < 100
        else f"{s // 60}m{s % 60:02}s"
        if s < 6000
        else f"{s // 3600}h{s % 3600 // 60:02}m"
    )


def table(rows: list[dict]) -> list[list[str]]:
    """The short table, headings first; everything else is in summary.jsonl."""
    scores = [x for x in ("reward", "gold") if x == "reward" or any(x in r for r in rows)]
    head = ["iter", *(h for x in scores for h in (x, "vs init", "win"))]
    lines = [head + ["KL init", "KL prev", "tokens", "cut", "distinct", "pairs", "time"]]
    for r in rows:
        line = [str(r["iteration"])]
        for x in scores:
            line += [value(r, x), value(r, f"{x}_diff", "+"), percent(r, f"{x}_win")]
        bare = {k: v for k, v in r.items() if not k.endswith("_se")}
        line += [
            value(bare, "kl/init", digits=2),
            value(bare, "kl/prev", digits=2),
            value(bare, "length", digits=1),
        ]
        line += [
            percent(r, "truncated"),
            percent(r, "distinct"),
            f"{r['pairs']:,}" if "pairs" in r else "-",
        ]
        lines.append(line + [duration(sum(r.get("seconds", {}).values()))])
    return lines


def plain(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    gap = "  " if sum(widths) + 2 * len(widths) <= 120 else " "
    return "\n".join(
        gap.join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines
    )


def drops(row: dict) -> list[str]:
    """["iteration 1, pairs: 12 rows tie", …], without the prompts that wait for another iteration."""
    return [
        f"iteration {row['iteration']}, {stage}: {n:,} {what} {reason}"
        for stage, balance in row.get("counts", {}).items()
        if stage != "prompts"
        for what, c in balance.items()
        for reason, n in c["dropped"].items()
    ]


def legend(rows: list[dict], gold: str | None) -> list[str]:
    """How to read the table: [what its columns are, what its reward is worth]."""
    last = next((r for r in reversed(rows) if "reward" in r), None)
    if last is None:
        return ["Nothing has been evaluated yet."]
    watched = f'reward is the proxy that was optimised; gold (the reward "{gold}") only watched.'
    proxy = "There is no gold reward: the curve is the proxy that was optimised, and over-optimisation raises it, too."
    return [
        f"{last['prompts']:,} held-out prompts, {last['answers']:,} answers. ± is one standard error, clustered by "
        "prompt; vs init and win compare with the initial policy's answers to the same prompts.",
        watched if gold else proxy,
    ]


# --------------------------------------------------------------------------------------------------
# Curves

INK, ONE, TWO = (
    "#1b1f24",
    "#2f66c4",
    "#c2680e",
)  # in the page they become its own colours, light or dark


def panels(rows: list[dict], logs: list[list[dict]], gold: str | None) -> list[tuple]:
    """(title, key of x, label of x, its rows, [(key, label, color)]) of all curves that have a
    point.
    """
    at, steps = itertools.count(1), []  # of all iterations in a row, the line broken between them
    for log in filter(None, logs):
        steps += [step | {"at": next(at)} for step in log]
        steps += [dict.fromkeys(steps[-1], math.nan)]
    reward, golden = ("reward", "", ONE), ("gold", "", TWO)
    distances = [("kl/init", "to initial", ONE), ("kl/prev", "to previous", TWO)]
    rates = [("distinct", "distinct answers", ONE), ("truncated", "cut off", TWO)]
    travelled = f"{'Gold' if gold else 'Reward'} against distance travelled"
    every = [
        ("Reward: the proxy that is optimised", "iteration", "iteration", rows, [reward]),
        ("Gold: only watched", "iteration", "iteration", rows, [golden]),
        (
            travelled,
            "kl/init",
            "KL to the initial policy, nats",
            rows,
            [golden if gold else reward],
        ),
        ("KL, nats an answer", "iteration", "iteration", rows, distances),
        ("Tokens an answer", "iteration", "iteration", rows, [("length", "", ONE)]),
        ("Rates", "iteration", "iteration", rows, rates),
        ("Training loss", "at", "step, over all iterations", steps, [("loss", "", ONE)]),
        (
            "Training accuracy",
            "at",
            "step, over all iterations",
            steps,
            [("rewards/accuracies", "", ONE)],
        ),
    ]
    return [p for p in every if any(p[1] in r and key in r for r in p[3] for key, *_ in p[4])]


def plot(ax, panel: tuple) -> None:
    _, x, x_label, rows, series = panel
    for key, label, color in series:
        points = [r for r in rows if x in r and key in r]
        bars = [r.get(f"{key}_se", 0) for r in points]
        look = {
            "color": color,
            "linewidth": 1.6,
            "marker": "" if x == "at" else "o",
            "markersize": 4,
            "capsize": 2.5,
        }
        ax.errorbar(
            [r[x] for r in points],
            [r[key] for r in points],
            bars if any(bars) else None,
            label=label,
            **look,
        )
        for r in points if x == "kl/init" else ():
            ax.annotate(
                str(r["iteration"]), (r[x], r[key]), (5, -11), textcoords="offset points", color=INK
            )
    if len(series) > 1:
        ax.legend(frameon=False, labelcolor=INK)
    if x == "iteration":
        ax.set_xticks([r[x] for r in rows] if len(rows) < 12 else ax.get_xticks())
    ax.set_xlabel(x_label, color=INK)
    ax.tick_params(colors=INK, length=3)
    ax.grid(color=INK, alpha=0.12, linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(INK)


def draw(drawn: list[tuple], png: Path) -> str:
    """Write the first three curves as curve.png; return all of them as figures of the page."""
    if not drawn:
        return ""
    try:
        import matplotlib.figure
    except ImportError:
        raise Stop(
            "summary.jsonl is written, but the curves need matplotlib: pip install matplotlib"
        ) from None
    matplotlib.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "",
        "font.size": 9,
    }  # same figures, same bytes

    figure = matplotlib.figure.Figure((4 * len(drawn[:3]), 3), layout="constrained")
    for i, panel in enumerate(drawn[:3], 1):
        ax = figure.add_subplot(1, len(drawn[:3]), i)
        plot(ax, panel)
        ax.set_title(panel[0], fontsize=10, color=INK)
    with whole(png) as temporary:
        figure.savefig(temporary, format="png", dpi=160)

    figures = ""
    for panel in drawn:
        figure, text = matplotlib.figure.Figure((4, 2.6), layout="constrained"), io.StringIO()
        plot(figure.add_subplot(), panel)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        # Inline SVG: no header, no size of its own, no ids that several figures share, the page's
        # colours.
        svg = re.sub(
            r'(?s).*?<svg .*?(viewBox="[^"]*").*?>',
            r'<svg role="img" \1>',
            text.getvalue(),
            count=1,
        )
        svg = re.sub(r'(?s)<metadata>.*?</metadata>| id="\w+_\d+"', "", svg)
        for color, name in ((INK, "currentColor"), (ONE, "var(--one)"), (TWO, "var(--two)")):
            svg = svg.replace(color, name)
        figures += f"<figure><figcaption>{panel[0]}</figcaption>{svg}</figure>"
    return f'<div class="curves">{figures}</div>'


# --------------------------------------------------------------------------------------------------
# The page

CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --line: #d9dde3; --paper: #fff; --card: #f6f7f9;
  --one: #2f66c4; --two: #c2680e; --good: #1a7f4b; --bad: #b3363a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #98a2b0; --line: #323945; --paper: #14171c;
  --card: #1c2027; --one: #79a8f5; --two: #f0a257; --good: #63c795; --bad: #ee8a8d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2.5rem 1.25rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 3rem 0 .5rem; letter-spacing: -.01em; }
p { margin: .4rem 0; max-width: 60rem; } p, figcaption, th, header, .role { color: var(--soft); }
.notice { border-left: 3px solid var(--two); background: var(--card); color: var(--ink); padding: .6rem .9rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 500; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
.words td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.curves { display: grid; gap: 1rem; margin: 1.5rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
figure, .answer { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .9rem; }
figure { margin: 0; } figcaption { font-size: .9rem; } summary { cursor: pointer; }
svg { display: block; width: 100%; height: auto; } svg text { font-family: inherit !important; }
.example { border-top: 1px solid var(--line); padding: 1rem 0; }
.two { display: grid; gap: .75rem; margin-top: .6rem; }
@media (min-width: 44rem) { .two { grid-template-columns: 1fr 1fr; } }
header, .role { font-size: .82rem; } .up { color: var(--good); } .down { color: var(--bad); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 22rem; overflow-y: auto; }
"""


def words(prompt) -> str:
    """A prompt or an answer, in either of TRL's formats, as HTML."""
    if isinstance(prompt, str):
        return f'<div class="text">{html.escape(prompt)}</div>'
    roles = [
        f'<div class="role">{html.escape(str(t["role"]))}</div>' if len(prompt) > 1 else ""
        for t in prompt
    ]
    return "".join(role + words(str(t["content"])) for role, t in zip(roles, prompt, strict=True))


def grid(lines: list[list], kind: str = "") -> str:
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in line) + "</tr>"
        for line in lines
    )
    if not kind:  # the first line holds headings
        head, rest = rows.split("</tr>", 1)
        rows = head.replace("td>", "th>") + "</tr>" + rest
    return f'<div class="scroll"><table class="{kind}">{rows}</table></div>'


def example(prompt, *answers: tuple[str, str, str, object]) -> str:
    """A prompt over its answers; each is (whose, colour, facts, text)."""
    boxes = "".join(
        f'<div class="answer"><header><b class="{kind}">{who}</b> {html.escape(facts)}</header>{words(text)}</div>'
        for who, kind, facts, text in answers
    )
    return f'<div class="example">{words(prompt)}<div class="two">{boxes}</div></div>'


def side_by_side(evaluated: list[Path]) -> str:
    """The same held-out prompts, and each policy's first answer: nobody picked them."""
    policies = {}
    for path in evaluated:
        policies[path.parents[1].name] = {
            r["id"]: r for r in read_jsonl(path, SCORED) if r["candidates"]
        }
    common = set.intersection(*map(set, policies.values()))
    text = ""
    for id in sorted(common, key=lambda id: seed_of("report", id))[:EXAMPLES]:
        answers = []
        for name, rows in policies.items():
            c = rows[id]["candidates"][0]
            others = {k: v for k, v in c["rewards"].items() if v != c["reward"]}
            facts = [f"{k} {v:.3f}" for k, v in ({"reward": c["reward"]} | others).items()]
            facts += [f"{len(c['token_ids'])} tokens"] + ["cut off"] * (
                c["finish_reason"] == "length"
            )
            answers.append((name, "", " · ".join(facts), c["text"]))
        text += example(rows[id]["prompt"], *answers)
    return text


def flatten(row: dict, prefix: str = "") -> dict:
    pairs = [
        flatten(v, f"{prefix}{k}: ") if isinstance(v, dict) else {f"{prefix}{k}": v}
        for k, v in row.items()
    ]
    return {k: v for pair in pairs for k, v in pair.items()}


def page(
    run_dir: Path, rows: list[dict], folders, metas, figures: str, notes: list[str], gold
) -> str:
    config, title = load(run_dir / "config.json"), html.escape(run_dir.resolve().name)
    parts = [
        f"<h1>{title}</h1><p>Online iterative DPO on {html.escape(str(config.get('MODEL', 'a policy')))}</p>"
    ]
    parts += [grid(table(rows)), f"<p>{html.escape(notes[0])}</p>"]
    parts += [
        f"<p{' class=notice' if i or not gold else ''}>{html.escape(n)}</p>"
        for i, n in enumerate(notes[1:])
    ]
    parts += [figures]

    evaluated = [f / "eval/scored.jsonl" for f in folders if (f / "eval/scored.jsonl").exists()]
    if evaluated:
        parts += ["<h2>The same held-out prompts, then and now</h2>"]
        parts += [
            f"<p>{EXAMPLES} prompts drawn by a hash of their id, and each policy's first answer.</p>"
        ]
        parts += [side_by_side(list(dict.fromkeys([evaluated[0], evaluated[-1]])))]
    paired = [f / "pairs.jsonl" for f in folders if (f / "pairs.jsonl").exists()]
    for kind, pick in (
        (("Strongest", heapq.nlargest), ("Weakest", heapq.nsmallest)) if paired else ()
    ):
        parts.append(
            f"<h2>{kind} training pairs of {paired[-1].parent.name}</h2><p>By margin of score.</p>"
        )
        for p in pick(EXTREMES, read_jsonl(paired[-1], PAIR), key=margin):
            chosen = (
                "chosen",
                "up",
                f"score {p['score_chosen']:.3f}, margin {margin(p):.3f}",
                p["chosen"],
            )
            rejected = ("rejected", "down", f"score {p['score_rejected']:.3f}", p["rejected"])
            parts.append(example(p["prompt"], chosen, rejected))

    flat = [flatten(r) for r in rows]
    figure = lambda v: f"{v:.6g}" if isinstance(v, float) else v  # noqa: E731
    every = [
        [k, *(figure(r.get(k, "")) for r in flat)]
        for k in dict.fromkeys(k for r in flat for k in r)
    ]
    versions = defaultdict(dict)  # of a package -> the ones that took part, in order
    for meta in (m for by_stage in metas for m in by_stage.values()):
        git = meta.get("git") or {}
        commit = (
            {"git": git["commit"] + ", with local changes" * git["dirty"]}
            if git.get("commit")
            else {}
        )
        for package, version in (meta.get("versions", {}) | commit).items():
            versions[package][version] = None
    parts += [
        "<h2>Dropped, by name</h2>",
        "".join(f"<p>{html.escape(d)}</p>" for r in rows for d in drops(r)) or "<p>Nothing.</p>",
        "<h2>Every figure</h2><details><summary>summary.jsonl; tools/report.py defines each</summary>",
        grid(every),
        "</details><h2>Settings</h2>",
        grid([[k, v] for k, v in config.items() if v != ""], "words"),
        "<h2>Versions</h2>",
        grid([[k, "; then ".join(v)] for k, v in versions.items()], "words"),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    )
    head += f"<title>{title}</title><style>{CSS}</style>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def read_run(run_dir: Path, asked: str | None = None):
    """Everything but the texts: (folders, their metas, rows of summary.jsonl, steps of training,
    notes, gold).
    """
    folders = [f for f in run_dir.glob("iter_*") if f.name[5:].isdecimal()]
    folders.sort(key=lambda f: int(f.name[5:]))
    if not folders:
        raise Stop(
            f"{run_dir}: there is no iter_00 here. Give the folder of a run, such as runs/demo."
        )
    metas = [read_metas(f) for f in folders]
    paths = [f / "eval/scored.jsonl" for f in folders]
    gold = choose_gold(asked, [path for path in paths if path.exists()], metas)
    heldout = [read_heldout(path, gold) for path in paths]
    notes = check_heldout(folders, heldout, metas)
    logs = [f / "train.jsonl" for f in folders]
    steps = [list(read_jsonl(log, {})) if log.exists() else [] for log in logs]
    initial = heldout[0] if folders[0].name == "iter_00" else {}
    reference = load(run_dir / "config.json").get("REF", "prev")
    rows = [
        summarise(*parts, initial, reference)
        for parts in zip(folders, metas, heldout, steps, strict=True)
    ]
    return folders, metas, rows, steps, legend(rows, gold) + notes, gold


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", type=Path, help="folder of the run, runs/NAME")
    p.add_argument(
        "--gold",
        help='name of the reward that only watched; default: "gold", where it was not optimised',
    )
    args = p.parse_args()

    folders, metas, rows, steps, notes, gold = read_run(args.run, args.gold)
    write_whole(args.run / "summary.jsonl", "".join(map(dump, rows)))
    print(plain(table(rows)))
    for text in [f"dropped in {d}" for d in drops(rows[-1])] + notes:
        print(textwrap.fill(text, 120))

    figures = draw(panels(rows, steps, gold), args.run / "curve.png")
    write_whole(
        args.run / "report.html", page(args.run, rows, folders, metas, figures, notes, gold)
    )
    print(f"more, and the answers themselves, in {args.run / 'report.html'}")


if __name__ == "__main__":
    run(main)
