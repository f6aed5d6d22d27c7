"""experiments/online_offline.sh: its arms and rewards are those that docs/experiments.md lists."""

import os
import shlex
import subprocess

import pytest

import dpo_train
from arguments import parse
from conftest import ROOT

SCRIPT = ROOT / "experiments/online_offline.sh"
ARMS = {
    "online": ("policy", "prev"),
    "online_init": ("policy", "init"),
    "offline": ("init", "init"),
    "offline_prev": ("init", "prev"),
    "sft": ("init", "prev"),
}


def function(name: str) -> str:
    """The source of one of the script's functions."""
    source = SCRIPT.read_text()
    start = source.index(f"\n{name}() {{")
    return source[start : source.index("\n}\n", start) + 3]


def settings_of(call: str, *names: str) -> list[str]:
    """What a call of the function `reward` or `arm` sets."""
    shown = " ".join(f'"${{{name}:-}}"' for name in names)
    lines = [function("reward"), function("arm"), "BATCH_SIZE=32", call, f"printf '%s\\n' {shown}"]
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
    assert (args.beta, args.nll_coef) == (([0], 1) if arm == "sft" else ([0.1], 0))


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
