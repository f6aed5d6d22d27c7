"""tools/report.py: its numbers against hand-made ones, its page in front of hostile text, and
unfinished runs.
"""

import json
import math
import random
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from records import Stop, dump
from stage import hash_path, write_meta

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import report
import report_figures

HOSTILE = '<script>alert("x")</script> & <b>bold</b> </textarea> None'


def write(path: Path, rows: list[dict], **meta) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(map(dump, rows)), encoding="utf-8")
    write_meta_of(path, **meta)


def write_meta_of(path: Path, **meta) -> None:
    versions = {"python": "3.11.0", "torch": "2.13.0"}
    meta = {
        "versions": versions,
        "git": {"commit": "c0ffee", "dirty": False},
        "seconds": 2.5,
        "counts": {},
        "arguments": {},
        "key": {},
    } | meta
    write_meta(path.with_name(path.name + ".meta.json"), meta)


def candidate(text: str, rewards: dict, logprob=-2.0, tokens=4, finish="stop", **more) -> dict:
    base = {
        "text": text,
        "token_ids": [5] * tokens,
        "logprob": logprob,
        "finish_reason": finish,
        "temperature": 1.0,
    }
    return base | {"model": "m", "rewards": rewards, "reward": rewards["rm"]} | more


def scored(id: str, candidates: list[dict]) -> dict:
    turns = [{"role": "user", "content": f"question {id} {HOSTILE}"}]
    return {"id": id, "prompt": turns, "prompt_token_ids": [1, 2], "candidates": candidates}


SCORE_ARGUMENTS = {"rewards": ["rm", "gold"], "reward_weights": [1.0, 0.0]}


def add_eval(run: Path, k: int, rows: list[dict], **arguments) -> None:
    sampling = {"temperature": [1.0], "top_p": 1.0, "num_samples": 2, "seed": 0} | arguments
    folder = run / f"iter_{k:02d}" / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    write_meta_of(folder / "candidates.jsonl", arguments=sampling, seconds=3.0)
    write(folder / "scored.jsonl", rows, arguments=SCORE_ARGUMENTS, seconds=1.0)


def add_training(run: Path, k: int, pairs: list[tuple[float, float]], steps: int = 4) -> None:
    """The files of one iteration up to the trained policy."""
    folder = run / f"iter_{k:02d}"
    rows, made = [], []
    for i, (w, l) in enumerate(pairs):
        answers = [
            candidate(f"good {i}", {"rm": w}),
            candidate(f"bad {i}", {"rm": l}, tokens=6, finish="length"),
        ]
        rows.append(scored(f"t{i}", answers))
        completion = {"chosen": f"good {i} {HOSTILE}", "rejected": f"bad {i}"}
        made.append(
            {
                "id": f"t{i}",
                "iteration": k,
                "prompt": rows[-1]["prompt"],
                "score_chosen": w,
                "score_rejected": l,
            }
            | {name: [{"role": "assistant", "content": text}] for name, text in completion.items()}
        )
    n = len(pairs)
    waiting = {"rows": {"in": 100, "out": n + 2, "dropped": {"other iterations": 98 - n}}}
    write(
        folder / "prompts.jsonl",
        [{"id": r["id"], "prompt": r["prompt"]} for r in rows],
        counts=waiting,
    )
    write(
        folder / "scored.jsonl",
        rows,
        arguments={"rewards": ["rm"], "reward_weights": [1.0]},
        seconds=10.0,
    )
    write(
        folder / "pairs.jsonl",
        made,
        counts={"rows": {"in": n + 2, "out": n, "dropped": {"tie": 2}}},
    )
    log = [
        {
            "step": s,
            "epoch": s / steps,
            "loss": 0.7 - 0.1 * s,
            "rewards/accuracies": 0.5 + 0.1 * s,
            "grad_norm": 1.0,
        }
        for s in range(1, steps + 1)
    ]
    (folder / "policy.train.jsonl").write_text("".join(map(dump, log)))
    audit = {"answers": 2 * n, "mean": 1e-5, "max": 4e-5}
    arguments = {"beta": [0.1, 0.2]}
    write_meta_of(
        folder / "policy", arguments=arguments, audit=audit, changed_weights=0.75, seconds=60.0
    )


def with_refs(text, rm, gold, logprob, init, prev, **more):
    return candidate(
        text, {"rm": rm, "gold": gold}, logprob, ref_logprobs={"init": init, "prev": prev}, **more
    )


def small_run(run: Path) -> Path:
    """Two prompts, two answers each, two policies: every figure can be computed on paper."""
    add_eval(
        run,
        0,
        [
            scored(
                "a",
                [
                    candidate("x", {"rm": 1.0, "gold": 0.0}),
                    candidate("x", {"rm": 3.0, "gold": 0.0}),
                ],
            ),
            scored(
                "b",
                [
                    candidate("y", {"rm": 0.0, "gold": 1.0}),
                    candidate("z", {"rm": 0.0, "gold": 0.0}),
                ],
            ),
        ],
    )
    add_training(run, 1, [(3.0, 1.0), (2.0, 1.5)])
    add_eval(
        run,
        1,
        [
            scored(
                "b",  # another order than iteration 0: rows are joined by id
                [
                    with_refs("p", 1.0, 1.0, -2.0, -5.0, -5.0, tokens=2),
                    with_refs("q", 0.0, 1.0, -1.0, -2.0, -2.0, tokens=2),
                ],
            ),
            scored(
                "a",
                [
                    with_refs("r", 3.0, 0.0, -3.0, -4.0, -3.5, tokens=6),
                    with_refs(HOSTILE, 5.0, 1.0, -4.0, -7.0, -4.5, tokens=10, finish="length"),
                ],
            ),
        ],
    )
    (run / "config.json").write_text(json.dumps({"MODEL": "a<b>", "REF": "prev", "ITERS": "1"}))
    return run


def call(run: Path, monkeypatch, *flags) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), *flags])
    report.main()
    return [json.loads(line) for line in open(run / "summary.jsonl", encoding="utf-8")]


def figures(run: Path, gold: str | None = None) -> list[dict]:
    """The rows of summary.jsonl, without the page."""
    return report.read_run(run, gold).rows


@pytest.mark.parametrize(
    ("name", "of_stage", "remedy"),
    [
        ("eval/scored.jsonl", "eval/scored.jsonl", "remove it and scored.jsonl.meta.json to make"),
        ("pairs.jsonl", "pairs.jsonl", "remove it and pairs.jsonl.meta.json to make both again"),
        ("policy.train.jsonl", "policy", "remove it: no stage needs it"),
    ],
)
def test_a_file_that_was_damaged_since_is_named_with_a_remedy(tmp_path, name, of_stage, remedy):
    """The report of iteration 0 reads the files of all iterations that are there."""
    folder = small_run(tmp_path / "run") / "iter_01"
    hash = hash_path(folder / name)
    kept = {"output": hash} if name == of_stage else {"beside": {".train.jsonl": hash}}
    write_meta_of(folder / of_stage, **kept)
    report.check_files(folder)
    with open(folder / name, "a") as file:
        file.write("\n")
    with pytest.raises(Stop, match=f"iter_01/{name}: is not what the stage wrote.*{remedy}"):
        report.read_run(tmp_path / "run")


def test_a_training_log_that_is_gone_is_missed(tmp_path):
    run = small_run(tmp_path / "run")
    assert not any("is gone" in warning for warning in report.read_run(run).warnings)
    (run / "iter_01/policy.train.jsonl").unlink()
    missed = "iter_01: policy.train.jsonl is gone, and with it what training has logged."
    assert missed in report.read_run(run).warnings


def test_figures_equal_those_on_paper(tmp_path, monkeypatch):
    """Standard errors cluster by prompt; differences and wins are paired by prompt; KL per answer
    and per token.
    """
    first, last = figures(small_run(tmp_path / "run"))

    # initial: means per prompt 2 and 0, so 1 ± sd(2, 0) / sqrt 2 = sqrt 2 / sqrt 2 = 1
    assert (first["reward"], first["reward_se"]) == (1.0, pytest.approx(1.0))
    assert (first["gold"], first["gold_se"]) == (0.25, pytest.approx(0.25))
    assert first["distinct"] == 0.75 and first["kl/init"] == 0.0
    assert not any(k.endswith(("_diff", "_win")) for k in first)

    # iteration 1: means per prompt a 4, b 0.5; differences a +2, b +0.5
    assert (last["reward"], last["reward_se"]) == (2.25, pytest.approx(1.75))
    assert (last["reward_diff"], last["reward_diff_se"]) == (1.25, pytest.approx(0.75))
    # a: 3 and 5 against 1 and 3: 1, 1/2, 1, 1 -> 7/8; b: 1 and 0 against 0 and 0: 1, 1, 1/2, 1/2 ->
    # 3/4
    assert (last["reward_win"], last["reward_win_se"]) == (0.8125, pytest.approx(0.0625))
    # gold: a 1/2 against 0, b 1 against 1/2
    assert (last["gold_diff"], last["gold_diff_se"]) == (0.5, 0.0)
    assert last["gold_win"] == pytest.approx((3 / 4 + 3 / 4) / 2)

    # KL: a (1 + 3) / 2 = 2 and b (3 + 1) / 2 = 2 to init; a 0.5 and b 2 to prev; 20 tokens in all
    assert (last["kl/init"], last["kl/init_se"], last["kl/init_per_token"]) == (
        2.0,
        0.0,
        pytest.approx(8 / 20),
    )
    assert (last["kl/prev"], last["kl/prev_per_token"]) == (1.25, pytest.approx(5 / 20))
    assert (last["length"], last["truncated"], last["distinct"]) == (5.0, 0.25, 1.0)

    assert last["sampled/reward"] == pytest.approx((3 + 1 + 2 + 1.5) / 4)
    assert (last["sampled/length"], last["sampled/truncated"], last["sampled/distinct"]) == (
        5.0,
        0.5,
        1.0,
    )
    assert (last["pairs"], last["objective/scores_margin"]) == (2, 1.25)
    assert last["counts"]["pairs"]["rows"] == {"in": 4, "out": 2, "dropped": {"tie": 2}}
    assert last["seconds"]["policy"] == 60.0 and last["seconds"]["eval/scored"] == 1.0
    assert last["training"]["loss"] == {"last": pytest.approx(0.3), "mean": pytest.approx(0.45)}
    assert last["audit"]["max"] == 4e-5 and last["changed_weights"] == 0.75

    assert last["beta"] == 0.2 and last["objective/kl"] == 1.25
    assert last["objective/entropy"] == 2.5
    assert last["objective/rlhf_reward"] == pytest.approx(2.25 - 0.2 * 1.25)
    assert last["val/contain_eos_token"] == 0.75


def test_chosen_and_rejected_rewards_stand_side_by_side(tmp_path, monkeypatch):
    """Of the training pairs, and of held-out ones where there are any, on one axis of steps."""
    run = small_run(tmp_path / "run")
    add_training(run, 2, [(3.0, 1.0)], steps=2)
    rewards = {"rewards/chosen": 0.5, "rewards/rejected": -0.5}
    for k, steps in ((1, 4), (2, 2)):
        log = [{"step": s, "epoch": s / steps, "loss": 0.7} | rewards for s in range(1, steps + 1)]
        for step, value in ((steps, 0.25), (0, 0.0)):
            row = {"step": step, "epoch": 0, "eval_loss": 0.7 - value}
            row |= {"eval_rewards/chosen": value, "eval_rewards/rejected": -value}
            log.insert(step, row)
        (run / f"iter_0{k}/policy.train.jsonl").write_text("".join(map(dump, log)))

    _, first, second = call(run, monkeypatch)
    assert (first["steps"], second["steps"]) == (4, 2)
    assert first["training"]["loss"] == {"last": 0.7, "mean": pytest.approx(0.7)}
    assert second["evaluation"]["eval_rewards/chosen"] == {"first": 0.0, "last": 0.25}
    page = (run / "report.html").read_text(encoding="utf-8")
    titles = ["Implicit rewards of training pairs", "Implicit rewards of held-out pairs"]
    assert page.index(titles[0]) < page.index(titles[1])

    read = report.read_run(run)
    logs = [iteration.steps for iteration in read.iterations]
    evaluations = [iteration.evaluations for iteration in read.iterations]
    drawn = {
        panel.title: panel for panel in report.panels(read.rows, logs, evaluations, None, False)
    }
    held_out = drawn[titles[1]]
    assert [curve.label for curve in held_out.curves] == ["chosen", "rejected"]
    ends = [row["at"] for row in held_out.rows if row["at"] == row["at"]]  # without NaN
    assert ends == [0, 4, 4, 6]

    for k in (1, 2):  # without held-out pairs there is one such curve
        log = run / f"iter_0{k}/policy.train.jsonl"
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(line for line in lines if "eval_" not in line))
    call(run, monkeypatch)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert titles[0] in page and titles[1] not in page


def test_reference_decides_objective_kl(tmp_path):
    run = small_run(tmp_path / "run")
    (run / "config.json").write_text('{"REF": "init"}')
    assert figures(run)[1]["objective/kl"] == 2.0


def test_table_fits_and_shows_both_rewards(tmp_path, monkeypatch, capsys):
    call(small_run(tmp_path / "run"), monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:3])) <= 120 and len({len(line) for line in lines[:3]}) == 1
    assert lines[0].split()[:3] == ["iter", "reward", "vs"] and "gold" in lines[0]
    assert lines[2].split()[:4] == ["1", "2.250±1.750", "+1.250±0.750", "81%"]
    assert "dropped in iteration 1, pairs: 2 rows tie" in lines

    long = {"reward": -12.3456, "gold": 0.1234, "reward_diff": -12.3456, "gold_diff": 0.1234}
    long |= {f"{k}_se": 0.1234 for k in long} | {
        "reward_win": 1.0,
        "gold_win": 1.0,
        "kl/init": 123.456,
    }
    long |= {
        "kl/prev": 99.999,
        "length": 1023.45,
        "truncated": 1.0,
        "distinct": 1.0,
        "pairs": 60000,
    }
    long |= {"iteration": 10, "seconds": {"policy": 86399}}
    assert max(map(len, report.plain(report.table([long], report.Rewards())).splitlines())) <= 120
    for x in ("score", "reward/judge"):
        more = {x: -12.3456, f"{x}_se": 0.1234, f"{x}_diff": -12.3456, f"{x}_diff_se": 0.1234}
        table = report.table([long | more], report.Rewards(judged=True))
        assert max(map(len, report.plain(table).splitlines())) <= 120, x


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [v for k, v in attrs if k == "id"]
        for k, v in attrs:
            assert not (k in ("src", "href", "xlink:href") and not v.startswith("#")), (
                "the page asks the network"
            )

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_one_safe_file(tmp_path, monkeypatch):
    """Answers and settings are text: none of their tags takes effect, and nothing is fetched from
    anywhere.
    """
    run = small_run(tmp_path / "run")
    call(run, monkeypatch)
    page = (run / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    text = "".join(reader.text)
    assert (
        "script" not in reader.tags
        and "img" not in reader.tags
        and not re.search(r"@import|url\((?!#)", page)
    )
    assert text.count(HOSTILE) >= 6  # prompts, an answer, chosen answers
    assert reader.tags.count("svg") == 8
    assert "a<b>" in text and "c0ffee" in text and "2.13.0" in text
    assert text.index("margin 2.000") < text.index("margin 0.500")  # strongest first
    assert (run / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_fits_a_telephone(tmp_path, monkeypatch):
    """It has the window's width; only tables may be wider, and each scrolls in a box of its own,
    which the keyboard reaches.
    """
    run = judged_run(tmp_path / "run")
    call(run, monkeypatch)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count("<table") == page.count('<div class="scroll" tabindex="0"><table') == 4
    assert not re.search(r"<svg[^>]* width=", page)  # it has the width of its box
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_every_curve_has_a_sentence_and_a_name(tmp_path, monkeypatch):
    """As text of the page, with the legend, which so covers no curve."""
    run = small_run(tmp_path / "run")
    call(run, monkeypatch)
    page = (run / "report.html").read_text(encoding="utf-8")
    figures = re.findall(r"<figure>(.*?)</figure>", page, re.S)
    assert len(figures) == 8
    for figure in figures:
        title, note = re.search(r"<b>(.+?)</b><p>(.+?)</p>", figure).groups()
        assert note.endswith(".") and len(note) < 90
        assert f'aria-label="{title}"' in figure and "legend_" not in figure
    (kl,) = [figure for figure in figures if "<b>KL, nats per answer</b>" in figure]
    legend = re.findall(r'<i style="color: var\(--(\w+)\)"></i>([\w ]+)', kl)
    assert legend == [("one", "to initial"), ("two", "to previous")]
    drawn = kl.split("<svg")[1]
    assert all(f"var(--{color})" in drawn for color, _ in legend)


def test_iterations_are_whole_numbers_however_many(tmp_path):
    for count in (1, 2, 14):
        rows = [{"iteration": number, "reward": 0.1 * number} for number in range(count)]
        (panel,) = report.panels(rows, [], [], None, False)
        (drawing,) = report.draw([panel], tmp_path / "curve.png")
        axis = re.search(r'id="matplotlib.axis_1">(.*?)id="matplotlib.axis_2">', drawing.svg, re.S)
        ticks = [text for text in re.findall(r">([^<>\n]+)</text>", axis[1]) if text != "iteration"]
        every = 2 if count == 14 else 1
        assert ticks == [str(number) for number in range(0, count, every)]


def luminance(color: str) -> float:
    """Relative luminance of "#fff" or "#ffffff", by WCAG 2."""
    digits = color.removeprefix("#")
    if len(digits) == 3:
        digits = "".join(digit * 2 for digit in digits)
    linear = []
    for start in (0, 2, 4):
        value = int(digits[start : start + 2], 16) / 255
        linear.append(value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_and_curves_stand_out_from_their_ground(scheme):
    """WCAG 2: 4.5 for words, 3 for lines."""
    css = (Path(report.__file__).parent / "report.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", css, re.S)
    color = dict(re.findall(r"--(\w+): (#\w+)", light if scheme == "light" else dark))
    for ground in ("paper", "card"):
        for name in ("ink", "soft", "good", "bad", "one", "two"):
            high, low = sorted((luminance(color[name]), luminance(color[ground])), reverse=True)
            contrast = (high + 0.05) / (low + 0.05)
            assert contrast >= (3 if name in ("one", "two") else 4.5), (name, ground)


def test_same_files_same_page(tmp_path, monkeypatch):
    run = small_run(tmp_path / "run")
    assert call(run, monkeypatch) == figures(run)
    before = {
        name: (run / name).read_bytes() for name in ("summary.jsonl", "report.html", "curve.png")
    }
    call(run, monkeypatch)
    assert all((run / name).read_bytes() == content for name, content in before.items())


def test_without_gold_it_is_called_a_proxy(tmp_path, monkeypatch, capsys):
    """A reward named gold that has a weight was optimised, so it is not gold; --gold refuses it."""
    run = small_run(tmp_path / "run")
    read = report.read_run(run)
    assert read.gold == "gold" and "gold" in read.rows[0]
    assert "no gold reward" not in " ".join(read.legend + read.warnings)

    write_meta_of(
        run / "iter_01" / "scored.jsonl", arguments={"rewards": ["gold"], "reward_weights": [1.0]}
    )
    rows = call(run, monkeypatch)
    assert "no gold reward" in capsys.readouterr().out
    assert "reward/gold" in rows[0] and "gold" not in rows[0]
    assert "no gold reward" in (run / "report.html").read_text()
    with pytest.raises(SystemExit, match="has a weight in what was optimised"):
        figures(run, "gold")
    with pytest.raises(SystemExit, match="no reward of this name, only gold, rm"):
        figures(run, "truth")


def test_a_judge_that_scored_last(tmp_path):
    """judge.py writes scored.jsonl from score.py's scored.unjudged.jsonl: both weights count."""
    run = small_run(tmp_path / "run")
    folder = run / "iter_01"
    write_meta_of(folder / "scored.unjudged.jsonl", arguments=SCORE_ARGUMENTS, seconds=7.0)
    write_meta_of(folder / "scored.jsonl", arguments={"judge_weight": 1.0}, seconds=9.0)
    read = report.read_run(run)
    assert read.gold == "gold"
    seconds = read.rows[1]["seconds"]
    assert (seconds["scored.unjudged"], seconds["scored"]) == (7.0, 9.0)

    weighted = {"rewards": ["rm", "gold"], "reward_weights": [1.0, 0.5]}
    write_meta_of(folder / "scored.unjudged.jsonl", arguments=weighted)
    assert report.read_run(run).gold is None


JUDGE_ARGUMENTS = {"judge_weight": 1.0, "opponent": "run/iter_00/eval/candidates.jsonl"}


def judged_run(run: Path, rm_weight: float = 0.0) -> Path:
    """small_run, with a judge's win rate over the initial policy beside rm, which has a weight or
    not.
    """
    small_run(run)
    rates = {"iter_00": {"a": [0.5, 0.5], "b": [0.5, 0.5]}, "iter_01": {"a": [1, 1], "b": [0.5, 1]}}
    scoring = {"rewards": ["rm", "gold"], "reward_weights": [rm_weight, 0.0]}
    for name, of_prompts in rates.items():
        path = run / name / "eval/scored.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            for answer, rate in zip(row["candidates"], of_prompts[row["id"]], strict=True):
                answer["rewards"]["judge"] = rate
                answer["reward"] = rm_weight * answer["rewards"]["rm"] + rate
        bias = {"in": 4, "out": 3, "dropped": {"first_shown_won_twice": 1}}
        nothing = {"in": 0, "out": 0, "dropped": {}}
        counts = {"judge_pairs": nothing if name == "iter_00" else bias}
        # unjudged: score.py's file, which judge.py has read
        unjudged = run / name / "eval/scored.unjudged.jsonl"
        inputs = {"candidates": ["the initial answers" if name == "iter_00" else "others"]}
        write_meta_of(unjudged, arguments=scoring, inputs=inputs)
        inputs = {"candidates": ["scored answers"], "opponent": "the initial answers"}
        write(path, rows, arguments=JUDGE_ARGUMENTS, inputs=inputs, counts=counts)
    counts = {"judge_pairs": {"in": 10, "out": 8, "dropped": {"second_shown_won_twice": 2}}}
    folder = run / "iter_01"
    write_meta_of(folder / "scored.unjudged.jsonl", arguments=scoring)
    write_meta_of(folder / "scored.jsonl", arguments={"judge_weight": 1.0}, counts=counts)
    return run


def test_a_judges_figure_is_a_win_rate_and_there_is_none_of_it(tmp_path, monkeypatch, capsys):
    """The judge alone: no reward beside it, no difference that repeats it, no win over itself."""
    run = judged_run(tmp_path / "run")
    first, last = call(run, monkeypatch)
    assert (first["reward/judge"], first["reward/judge_se"]) == (0.5, 0.0)
    # iteration 1: 1 and 3/4, so 7/8 ± (1/4 / sqrt 2) / sqrt 2 = 1/8
    assert (last["reward/judge"], last["reward/judge_se"]) == (0.875, pytest.approx(0.125))
    assert last["reward"] == 0.875 and last["reward_diff"] == 0.375
    assert not {"reward_win", "reward/judge_win"} & last.keys() and "gold_win" in last
    assert last["opponent"] == "the initial policy"
    assert (last["position_bias"], last["sampled/position_bias"]) == (0.25, 0.2)
    assert "position_bias" not in first

    printed = capsys.readouterr().out
    head, *lines = printed.splitlines()[:3]
    assert re.split(r"\s{2,}", head)[1:6] == ["win rate", "bias", "gold", "vs init", "win"]
    assert lines[0].split()[:3] == ["0", "0.500±0.000", "-"]
    assert lines[1].split()[:3] == ["1", "0.875±0.125", "25%"]
    assert "prefers an answer to that of the initial policy" in " ".join(printed.split())
    assert "win rate is the proxy that was optimised" in printed

    page = (run / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    text = "".join(reader.text)
    assert "<th>win rate</th><th>bias</th><th>gold</th>" in page
    assert "Win rate: the proxy that is optimised" in text and "Reward:" not in text


def test_a_judge_beside_another_reward_and_another_opponent(tmp_path):
    """A sum with a win rate in it has no win, but both have a difference."""
    run = judged_run(tmp_path / "run", rm_weight=2.0)
    for name in ("iter_00", "iter_01"):
        path = run / name / "eval/scored.jsonl"
        inputs = {"candidates": ["scored answers"], "opponent": "answers of another model"}
        arguments = JUDGE_ARGUMENTS | {"opponent": "gpt.jsonl"}
        write_meta_of(path, arguments=arguments, inputs=inputs)
    read = report.read_run(run)
    _, last = read.rows
    assert last["reward"] == 2 * 2.25 + 0.875 and "reward_win" not in last
    assert last["reward/judge_diff"] == 0.375 and "reward/rm_win" in last
    assert last["opponent"] == "gpt.jsonl"
    head = report.table(read.rows, read.rewards)[0]
    columns = ["reward", "vs init", "win rate", "vs init", "bias", "gold", "vs init", "win"]
    assert head[1:9] == columns


def test_judged_without_an_opponent_or_by_several_is_said(tmp_path):
    """A judge.py of before, or one that was called by hand."""
    run = judged_run(tmp_path / "run")
    assert "opponent" not in " ".join(report.read_run(run).warnings)
    inputs = {"candidates": ["scored answers"], "opponent": "a file that was changed"}
    write_meta_of(run / "iter_01/eval/scored.jsonl", arguments=JUDGE_ARGUMENTS, inputs=inputs)
    warnings = " ".join(report.read_run(run).warnings)
    assert "opponent was the initial an from iter_00, a file that wa from iter_01" in warnings
    for name in ("iter_00", "iter_01"):
        write_meta_of(run / name / "eval/scored.jsonl", arguments={"judge_weight": 1.0})
    warnings = " ".join(report.read_run(run).warnings)
    assert "iter_01: the held-out answers were judged against each other" in warnings
    assert "reward_win" not in figures(run)[1]


def test_a_judge_that_only_watched_is_gold(tmp_path, monkeypatch, capsys):
    run = judged_run(tmp_path / "run", rm_weight=1.0)
    for path in run.glob("**/scored.jsonl.meta.json"):
        meta = json.loads(path.read_text())
        del meta["sha256"]
        meta["arguments"]["judge_weight"] = 0.0
        write_meta_of(path.with_name("scored.jsonl"), **meta)
    _, last = call(run, monkeypatch, "--gold", "judge")
    assert last["gold"] == 0.875 and "gold_win" not in last and "reward_win" in last
    printed = capsys.readouterr().out
    assert "gold is how often the judge prefers" in printed


def test_a_length_penalty_is_in_the_score_that_decided_the_pairs(tmp_path, monkeypatch, capsys):
    run = small_run(tmp_path / "run")
    without = figures(run)
    pairs = run / "iter_01/pairs.jsonl"
    counts = {"rows": {"in": 4, "out": 2, "dropped": {"tie": 2}}}
    write_meta_of(pairs, arguments={"length_penalty": 0.1}, counts=counts)
    first, last = call(run, monkeypatch)
    # a: 3 - 0.6 and 5 - 1 -> 3.2; b: 1 - 0.2 and 0 - 0.2 -> 0.3
    assert (last["score"], last["score_se"]) == (pytest.approx(1.75), pytest.approx(1.45))
    # initial: four tokens per answer: 2 - 0.4 and 0 - 0.4
    assert first["score"] == pytest.approx(0.6)
    assert last["score_diff"] == pytest.approx(1.15)
    assert last["score_diff_se"] == pytest.approx(((3.2 - 1.6) - (0.3 + 0.4)) / 2)
    assert last["sampled/score"] == pytest.approx((3 + 1 + 2 + 1.5 - 0.1 * (4 + 6 + 4 + 6)) / 4)

    printed = capsys.readouterr().out
    assert "score is reward - 0.1 per token" in printed
    head = re.split(r"\s{2,}", printed.splitlines()[0])
    assert head[1:5] == ["reward", "vs init", "score", "vs init"]
    of_fixed_width = [line for line in printed.splitlines() if str(run) not in line]
    assert max(map(len, of_fixed_width)) <= 120
    page = (run / "report.html").read_text()
    assert "<th>score</th><th>vs init</th><th>win</th>" in page  # what was too wide to print
    assert "score: less the length penalty" in page

    # everything else is as it was, and without a penalty all is
    added = {"score", "score_se", "score_diff", "score_diff_se", "score_win", "score_win_se"}
    for row, row_without in zip((first, last), without, strict=True):
        assert row | row_without == row
        assert row.keys() - row_without.keys() <= added | {"sampled/score"}
    write_meta_of(pairs, arguments={"length_penalty": 0.0}, counts=counts)
    assert figures(run) == without


def test_pairs_by_different_scores_are_said(tmp_path):
    run = small_run(tmp_path / "run")
    add_training(run, 2, [(3.0, 1.0)])
    write_meta_of(run / "iter_01/pairs.jsonl", arguments={"length_penalty": 0.1})
    write_meta_of(run / "iter_02/pairs.jsonl", arguments={"length_penalty": 0.2})
    read = report.read_run(run)
    assert "length_penalty was 0.1 from iter_01, 0.2 from iter_02" in " ".join(read.warnings)
    assert read.rewards.length_penalty == 0.2


def test_reads_what_score_writes(tmp_path, stage):
    """The real score.py records which rewards had a weight, under the names that the report looks
    for.
    """
    (tmp_path / "fn.py").write_text(
        "def length(prompt, response, meta): return float(len(response))\n"
        "def gold(prompt, response, meta): return 1.0\n"
    )
    candidates = [
        {k: v for k, v in candidate("abc", {"rm": 0}).items() if k not in ("reward", "rewards")}
    ]
    for weights, gold in (((1, 0), "gold"), ((1, 1), None)):
        run = tmp_path / f"run_{gold}"
        write(run / "iter_00" / "eval" / "candidates.jsonl", [scored("a", candidates)])
        files = [
            "--candidates",
            run / "iter_00/eval/candidates.jsonl",
            "--output",
            run / "iter_00/eval/scored.jsonl",
        ]
        functions = [
            "--reward_fn",
            f"{tmp_path}/fn.py:length",
            f"{tmp_path}/fn.py:gold",
            "--reward_weights",
            *weights,
        ]
        stage("score.py", *files, *functions)
        read = report.read_run(run)
        assert read.gold == gold and read.rows[0]["reward"] == 3.0 + sum(weights) - 1


def test_unfinished_runs_give_what_exists(tmp_path, monkeypatch, capsys):
    """Only the initial policy; an iteration without evaluation; one that has only begun."""
    run = small_run(tmp_path / "run")
    shutil.rmtree(run / "iter_01" / "eval")
    (run / "iter_02").mkdir()
    rows = call(run, monkeypatch)
    assert [r["iteration"] for r in rows] == [0, 1, 2]
    assert "reward" not in rows[1] and rows[1]["pairs"] == 2 and rows[2] == {"iteration": 2}
    for name in ("iter_01", "iter_02"):
        shutil.rmtree(run / name)
    assert call(run, monkeypatch)[0]["reward"] == 1.0
    shutil.rmtree(run / "iter_00" / "eval")
    assert call(run, monkeypatch) == [{"iteration": 0}]
    assert "Nothing has been evaluated" in (run / "report.html").read_text()
    shutil.rmtree(run / "iter_00")
    with pytest.raises(SystemExit, match="no iter_00 here"):
        figures(run)


def test_other_heldout_prompts_are_an_error(tmp_path):
    """PITFALLS 15: iterates are compared on the same prompts."""
    run = small_run(tmp_path / "run")
    path = run / "iter_01" / "eval" / "scored.jsonl"
    path.write_text(path.read_text().replace('"id": "b"', '"id": "c"'))
    with pytest.raises(
        SystemExit, match=r'iter_01/eval/scored.jsonl: these are not the held-out prompts .*"b"'
    ):
        figures(run)


def test_prompt_whose_answers_were_all_dropped(tmp_path, monkeypatch):
    """score.py keeps such a row without candidates: it is left out of figures and differences, with
    a message.
    """
    run = small_run(tmp_path / "run")
    path = run / "iter_01" / "eval" / "scored.jsonl"
    rows = [json.loads(line) for line in open(path)]
    path.write_text(
        "".join(dump(row | {"candidates": []} if row["id"] == "b" else row) for row in rows)
    )
    last = call(run, monkeypatch)[1]
    assert "1 held-out prompts have no scored answer" in (run / "report.html").read_text()
    assert last["prompts"] == 1 and last["reward_diff"] == 2.0 and "reward_diff_se" not in last


def test_what_the_stages_warned_of_is_repeated(tmp_path, monkeypatch, capsys):
    """On the terminal and on the page, with the iteration and the stage."""
    run = small_run(tmp_path / "run")
    write_meta_of(run / "iter_01/pairs.jsonl", warnings=["40% of the prompts made no pair"])
    call(run, monkeypatch)
    says = "iter_01, pairs: 40% of the prompts made no pair."
    assert says in capsys.readouterr().out
    assert says in (run / "report.html").read_text()


def test_pairs_of_several_files_are_told_apart(tmp_path, monkeypatch, capsys):
    """And what was dropped is said once, for its file."""
    run = small_run(tmp_path / "run")
    counts = {
        "rows": {"in": 9, "out": 7, "dropped": {"too_long": 2}},
        "rows of /r/iter_01/pairs.jsonl": {"in": 2, "out": 2, "dropped": {}},
        "rows of /data/old.jsonl": {"in": 7, "out": 5, "dropped": {"too_long": 2}},
    }
    arguments = {"beta": [0.1]}
    write_meta_of(run / "iter_01/policy", counts=counts, arguments=arguments)
    call(run, monkeypatch)
    printed = capsys.readouterr().out
    assert "Iteration 1 was trained on 2 of iter_01/pairs.jsonl, 5 of data/old.jsonl." in printed
    assert printed.count("too_long") == 1
    assert "iteration 1, policy: 2 rows of /data/old.jsonl too_long" in printed


def test_unlike_sampling_is_said(tmp_path):
    run = small_run(tmp_path / "run")
    write_meta_of(
        run / "iter_01/eval/candidates.jsonl", arguments={"temperature": [0.7], "seed": 0}
    )
    out = " ".join(report.read_run(run).warnings)
    assert (
        "temperature was [1.0] from iter_00, [0.7] from iter_01" in out and "not estimate KL" in out
    )


@pytest.mark.parametrize(
    "shaped", [{"temperature": [0.7]}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}], ids=str
)
def test_answers_that_were_not_drawn_from_the_policy_itself_estimate_no_kl(tmp_path, shaped):
    run = small_run(tmp_path / "run")
    plain = {"temperature": [1.0], "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    for name in ("iter_00", "iter_01"):
        write_meta_of(run / name / "eval/candidates.jsonl", arguments=plain)
    assert "estimate KL" not in " ".join(report.read_run(run).warnings)
    for name in ("iter_00", "iter_01"):
        write_meta_of(run / name / "eval/candidates.jsonl", arguments=plain | shaped)
    assert "do not estimate KL" in " ".join(report.read_run(run).warnings)


def test_clustered_error_is_that_of_repeated_draws():
    """The standard error means what it says: over 200 draws of 30 prompts, its mean is the spread
    of the means.
    """
    rng = random.Random(0)
    means, errors = [], []
    for _ in range(200):
        prompts = {}
        for i in range(30):
            level = rng.gauss(0, 1)  # answers to one prompt are alike
            prompts[str(i)] = {
                "reward": [level + rng.gauss(0, 0.3) for _ in range(4)],
                "length": [1] * 4,
            }
        figures = report_figures.heldout_figures(prompts, {})
        means.append(figures["reward"])
        errors.append(figures["reward_se"])
    spread = math.sqrt(sum(m * m for m in means) / len(means))
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.1)
