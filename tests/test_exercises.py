"""docs/exercises.md: its commands are understood, its figures are those of the runs, and its flawed
rewards have the flaws that they are said to have.
"""

import importlib
import re
import shlex

import pytest

from conftest import ROOT
from demo import flawed
from demo.gold import gold
from demo.task import make_prompts
from experiments import exercises
from test_readme import flag_names

PAGE = exercises.PAGE.read_text()
LINES = exercises.commands(PAGE)
STAGE_OF = {"TRAIN_ARGS": "dpo_train", "PAIRS_ARGS": "make_pairs"}


def settings_of(line: str) -> dict[str, str]:
    words = shlex.split(line)
    assert words[-2:] == ["bash", "iterate.sh"]
    return dict(word.split("=", 1) for word in words[:-2])


RUNS = [settings_of(line) for line in LINES if line.endswith("bash iterate.sh")]


def test_ten_exercises_and_a_question_in_each():
    assert len(re.findall(r"^## \d+\. ", PAGE, re.M)) == 10
    assert PAGE.count("*Question:*") == 10


@pytest.mark.parametrize("settings", RUNS, ids=lambda settings: settings["RUN"])
def test_every_setting_and_every_flag_is_known(settings):
    known = re.findall(r"^setting ([A-Z_]+)", (ROOT / "iterate.sh").read_text(), re.M)
    assert settings.keys() <= set(known)
    for name in STAGE_OF.keys() & settings.keys():
        flags = {word for word in settings[name].split() if word.startswith("--")}
        stage = importlib.import_module(STAGE_OF[name])
        assert flags and flags <= flag_names(stage)


def test_every_run_has_its_figures_behind_it():
    names = [settings["RUN"].rpartition("/")[2] for settings in RUNS]
    assert len(names) == len(set(names)) >= 14
    markers = [name for marker in exercises.MARKER.findall(PAGE) for name in marker.split()]
    assert sorted(markers) == sorted(["demo", *names, exercises.AUDIT])


def test_the_figures_are_those_of_the_runs():
    """bench/results/exercises.txt has the lines that the page shows."""
    command, heading, *lines = exercises.RESULTS.read_text().splitlines()
    assert command == "$ python -m experiments.exercises" and heading == exercises.HEADING
    assert lines[0].startswith("demo ") and lines[-1].startswith("error: ")
    found = {exercises.AUDIT: lines[-1]}
    for line in lines[:-1]:
        name = line.split()[0]
        found[name] = f"{found[name]}\n{line}" if name in found else line
    assert exercises.with_figures(PAGE, found) == PAGE
    assert "generator and trainer disagree" in found[exercises.AUDIT]


def test_figures_replace_older_ones():
    page = "one\n<!-- figures: demo -->\n\n```\nold\nold\n```\ntwo\n<!-- figures: audit -->\n"
    found = {"demo": "demo 1", "audit": "error: no"}
    heading = exercises.HEADING
    new = exercises.with_figures(page, found)
    assert new == (
        f"one\n<!-- figures: demo -->\n\n```\n{heading}\ndemo 1\n```\n"
        "two\n<!-- figures: audit -->\n\n```\nerror: no\n```\n"
    )
    assert exercises.with_figures(new, found) == new
    unknown = "<!-- figures: demo other -->\nthree\n"
    assert exercises.with_figures(unknown, found) == unknown


def test_the_wordy_reward_pays_for_every_item():
    meta = {"category": "fruits", "count": 2}
    exact, longer = "plum, fig", "plum, fig, pear, lime"
    assert gold("", exact, meta) == 1.0 and gold("", longer, meta) == 0.5
    assert flawed.exact("", longer, meta) == 0.5
    assert flawed.wordy("", exact, meta) == pytest.approx(1.6)
    assert flawed.wordy("", longer, meta) == pytest.approx(1.7)


def test_the_noisy_reward_is_the_wrong_way_round_for_three_prompts_of_ten():
    flipped = 0
    prompts, _ = make_prompts(seed=0)
    for row in prompts:
        rewards = flawed.noisy(row["prompt"], ["plum", "oak, fir"], row["meta"])
        truth = [gold("", answer, row["meta"]) for answer in ("plum", "oak, fir")]
        assert rewards in (truth, [-value for value in truth])
        flipped += min(rewards) < 0
    category = sum(row["meta"]["category"] in ("fruits", "trees") for row in prompts)
    assert 0.25 < flipped / category < 0.35  # of the others, both answers are worth 0
