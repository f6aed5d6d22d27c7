"""tools/agreement.py: the share of pairs of answers that the reward orders as gold does."""

import json
import sys
from pathlib import Path

import pytest

from records import Stop, dump

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import agreement


def scored_row(rewards: list[float], golds: list[float | None]) -> dict:
    candidates = []
    for reward, gold in zip(rewards, golds, strict=True):
        parts = {"rm": reward} | ({} if gold is None else {"gold": gold})
        candidate = {"text": "a", "token_ids": [1], "logprob": -1.0, "finish_reason": "stop"}
        candidates.append(candidate | {"model": "m", "rewards": parts, "reward": reward})
    return {"id": "p0", "prompt": "x", "prompt_token_ids": [1], "candidates": candidates}


def write_run(folder: Path, iterations: list[list[dict]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"SEED": "0"}))
    (folder / "summary.jsonl").write_text(dump({"iteration": 0}))
    for i, rows in enumerate(iterations):
        path = folder / f"iter_{i:02d}/eval/scored.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(map(dump, rows)))
    return folder


def test_pairs_that_gold_tells_apart_are_counted(tmp_path):
    # gold 0 < 1 = 1 < 2: five of the six pairs differ. The reward is right in three of them,
    # wrong in one, and undecided in one.
    rows = [scored_row([0.0, 1.0, -1.0, 1.0], [0.0, 1.0, 1.0, 2.0])]
    run = write_run(tmp_path / "run", [rows])
    assert agreement.agreement(run / "iter_00/eval/scored.jsonl") == pytest.approx(3.5 / 5)


def test_pairs_of_different_prompts_are_not_compared(tmp_path):
    rows = [scored_row([0.0, 1.0], [0.0, 0.0]), scored_row([1.0, 0.0], [1.0, 1.0])]
    run = write_run(tmp_path / "run", [rows])
    assert agreement.agreement(run / "iter_00/eval/scored.jsonl") is None


def test_a_line_per_arm_and_a_column_per_iteration(tmp_path, capsys, monkeypatch):
    good, bad = [scored_row([0.0, 1.0], [0.0, 1.0])], [scored_row([1.0, 0.0], [0.0, 1.0])]
    write_run(tmp_path / "demo/online/seed_0", [good, bad])
    write_run(tmp_path / "demo/online/seed_1", [good, good])
    write_run(tmp_path / "demo/offline/seed_0", [bad])
    folders = [str(tmp_path / "demo/online"), str(tmp_path / "demo/offline")]
    monkeypatch.setattr("sys.argv", ["agreement.py", *folders])
    agreement.main()
    lines = [line.split() for line in capsys.readouterr().out.strip().splitlines()]
    assert lines[0] == ["arm", "seeds", "iter_00", "iter_01"]
    assert lines[1] == ["demo/online", "2", "1.000±0.000", "0.500±0.500"]
    assert lines[2] == ["demo/offline", "1", "0.000", "-"]


def test_without_gold_it_says_how_to_have_it(tmp_path):
    run = write_run(tmp_path / "run", [[scored_row([0.0, 1.0], [0.0, None])]])
    with pytest.raises(Stop, match="GOLD_FN"):
        agreement.agreement(run / "iter_00/eval/scored.jsonl")
