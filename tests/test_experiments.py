"""experiments/online_offline.sh: its arms and rewards are those that docs/experiments.md lists, and
the page's tables are those of the rows that were published.
"""

import os
import re
import shlex
import subprocess
import sys

import pytest

import dpo_train
from arguments import parse
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import compare

SCRIPT = ROOT / "experiments/online_offline.sh"
ARMS = {
    "online": ("policy", "prev"),
    "online_init": ("policy", "init"),
    "offline": ("init", "init"),
    "offline_prev": ("init", "prev"),
    "sft": ("init", "prev"),
    "online_sft": ("policy", "prev"),
}


def function(name: str) -> str:
    """The source of one of the script's functions."""
    source = SCRIPT.read_text()
    start = source.index(f"\n{name}() {{")
    return source[start : source.index("\n}\n", start) + 3]


def settings_of(call: str, *names: str) -> list[str]:
    """What a call of the function `reward` or `arm` sets."""
    shown = " ".join(f'"${{{name}:-}}"' for name in names)
    lines = [
        function("reward"),
        function("arm"),
        "BATCH_SIZE=32",
        "LEARNING_RATE=2e-4",
        call,
        f"printf '%s\\n' {shown}",
    ]
    done = subprocess.run(
        ["bash", "-euc", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_a_writer_a_reference_and_flags_that_the_trainer_takes(arm, monkeypatch):
    writer, reference, train_args = settings_of(f"arm {arm}", "WRITER", "REF", "TRAIN_ARGS")
    assert (writer, reference) == ARMS[arm]
    command = ["dpo_train.py", "--model", "M", "--pairs", "P", "--output", "O"]
    monkeypatch.setattr("sys.argv", [*command, *shlex.split(train_args)])
    args = parse(dpo_train.arguments())
    assert args.batch_size == 32
    assert (args.beta, args.nll_coef) == (([0], 1) if "sft" in arm else ([0.1], 0))


def test_gold_watches_unless_it_is_the_reward():
    names = ("REWARD_FN", "REWARD_MODEL", "GOLD_FN")
    assert settings_of("reward truth 3", *names) == ["demo/gold.py:gold", "", ""]
    assert settings_of("reward strong 3", *names) == [
        "",
        "demo/build/strong_3/reward_model",
        "demo/gold.py:gold",
    ]


@pytest.mark.parametrize("wrong", [{"ARMS": "online sideways"}, {"REWARDS": "praise"}])
def test_an_unknown_name_is_told_before_anything_is_built(wrong, tmp_path):
    environment = os.environ | {"SEEDS": "987", "FOLDER": str(tmp_path), "CORES": "1"}
    environment |= {"ARMS": "sideways", "REWARDS": "truth"} | wrong
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    ((name, words),) = wrong.items()
    assert f"{name}: there is no {words.split()[-1]}" in done.stderr
    assert not (ROOT / "demo/build/seed_987").exists()


# ---- docs/experiments.md -------------------------------------------------------------------------

RESULTS = ROOT / "bench/results"
ROWS = [
    RESULTS / "online_offline.jsonl",
    RESULTS / "online_offline_fresh_prompts.jsonl",
    RESULTS / "online_offline_controls.jsonl",
]


def words_of(text: str) -> set[tuple[str, ...]]:
    """The words of each line: tables may be set narrower in a page."""
    return {tuple(line.split()) for line in text.splitlines() if line.strip()}


def tables_of_rows() -> set[tuple[str, ...]]:
    """Every line of every table that tools/compare.py makes of the published rows."""
    lines: set[tuple[str, ...]] = set()
    for path in ROWS:
        for comparison in compare.read_rows(path):
            if len(comparison.arms) > 1:
                compare.put_first(comparison, "online")
            for _, table in compare.tables(comparison):
                lines |= words_of(compare.plain(table))
    return lines


def test_every_figure_of_a_table_is_one_of_the_published_rows():
    page = (ROOT / "docs/experiments.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```$", page, re.M | re.S)
    assert len(blocks) >= 5
    published = tables_of_rows() | words_of((RESULTS / "agreement.txt").read_text())
    for block in blocks:
        assert words_of(block) <= published


def test_the_rows_are_of_ten_seeds_and_five_arms():
    for comparison in compare.read_rows(ROWS[0]):
        assert {arm.name for arm in comparison.arms} == set(ARMS) - {"online_sft"}
        assert all(sorted(arm.runs) == list(range(2, 12)) for arm in comparison.arms)
