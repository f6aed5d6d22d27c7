"""tools/compare.py: which runs are seeds of one arm, and its means, errors and differences."""

import json
import re
import statistics
import sys
from pathlib import Path

import pytest

from records import dump

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import compare

ONLINE = [0.3, 0.6, 0.8]  # gold of three iterations, at seed 0
OFFLINE = [0.3, 0.5, 0.4]


def add_run(folder: Path, seed: int, gold: list[float], **settings) -> Path:
    """A run's settings and summary; gold is 0.01 higher for each seed after 0."""
    folder.mkdir(parents=True)
    config = {"MODEL": f"demo/build/seed_{seed}/policy", "SEED": str(seed), "RUN": str(folder)}
    (folder / "config.json").write_text(json.dumps(config | {"ITERS": "2"} | settings))
    rows = []
    for iteration, value in enumerate(gold):
        reward = 2.0 * iteration - seed  # a reward model's zero is arbitrary
        row = {"iteration": iteration, "gold": value + 0.01 * seed, "reward": reward}
        row["kl/init"] = 0.5 * iteration
        if iteration:
            scored = {"candidates": {"in": 40, "out": 40, "dropped": {}}}
            row["reward_diff"] = 2.0 * iteration
            row |= {"pairs": 10, "steps": 3, "sampled/length": 7.0, "counts": {"scored": scored}}
            row["beta"] = float(settings.get("BETA", 0.1))
            row["training"] = {
                "logps/chosen_fell": {"mean": 0.25 * iteration, "last": 0.0},
                "rewards/accuracies": {"mean": 0.5, "last": 0.0},
            }
        rows.append(row)
    (folder / "summary.jsonl").write_text("".join(map(dump, rows)))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two arms of three seeds each, as experiments/online_offline.sh lays them out."""
    folder = tmp_path / "truth"
    for seed in (0, 1, 12):
        add_run(folder / f"online/seed_{seed}", seed, ONLINE, WRITER="policy")
        add_run(folder / f"offline/seed_{seed}", seed, OFFLINE, WRITER="init")
    return folder


@pytest.fixture
def told(capsys, monkeypatch, tmp_path):
    """told(paths, …) -> what is printed; the files are OUTPUT.* in tmp_path."""

    def call(*words):
        command = ["compare.py", *words, "--output", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        compare.main()
        return capsys.readouterr().out

    return call


def cells(printed: str, title: str, arm: str) -> list[str]:
    """The line of an arm in the table under a title."""
    table = printed[printed.index(title) :]
    line = next(line for line in table.splitlines() if line.strip().startswith(arm))
    return line.removeprefix(line[: line.index(arm) + len(arm)]).split()


def test_seeds_are_averaged_and_arms_stand_side_by_side(runs, told):
    printed = told(runs, "--baseline", "online")
    error = statistics.stdev([0, 0.01, 0.12]) / 3**0.5
    mean = statistics.mean([0.8, 0.81, 0.92])
    last = f"{mean:.3f}±{error:.3f}"
    assert cells(printed, "Gold, on held-out prompts", "online") == [
        "3",
        f"{mean - 0.5:.3f}±{error:.3f}",
        f"{mean - 0.2:.3f}±{error:.3f}",
        last,
    ]
    # the seeds differ by 0.12, the arms at one seed always by the same
    differences = cells(printed, "Its difference to online", "offline")
    assert differences == ["3", "+0.000±0.000", "-0.100±0.000", "-0.400±0.000"]
    assert cells(printed, "Reward: the proxy", "online")[-1] == "4.000±0.000"
    assert cells(printed, "What an arm was given", "offline") == ["3", "20", "6", "560"]
    assert cells(printed, "Seeds in which it is above : below", "offline") == (
        ["3", *"0 : 0".split(), *"0 : 3".split(), *"0 : 3".split()]
    )
    fell = cells(printed, "Share of chosen answers that became less likely", "online")
    assert fell == ["3", "-", "0.250±0.000", "0.500±0.000"]


def test_without_beta_there_is_no_accuracy(runs, told):
    for seed in (0, 1):
        add_run(runs / f"sft/seed_{seed}", seed, ONLINE, BETA="0")
    printed = told(runs, "--baseline", "online")
    assert cells(printed, "Accuracy of the implicit", "online") == ["3", "-", *["0.500±0.000"] * 2]
    assert cells(printed, "Accuracy of the implicit", "sft") == ["2", "-", "-", "-"]


def test_only_seeds_that_both_arms_have_are_subtracted(runs, told):
    add_run(runs / "offline/seed_5", 5, [0.9, 0.9, 0.9], WRITER="init")
    printed = told(runs, "--baseline", "online")
    assert cells(printed, "Its difference to online", "offline")[0] == "3"
    assert cells(printed, "Gold, on held-out prompts", "offline")[0] == "4"


def test_a_run_that_is_not_finished_counts_as_far_as_it_came(runs, told):
    summary = runs / "online/seed_12/summary.jsonl"
    summary.write_text("".join(summary.read_text().splitlines(keepends=True)[:2]))
    printed = told(runs, "--baseline", "online")
    assert cells(printed, "Gold, on held-out prompts", "online")[-1] == "(2)"
    assert cells(printed, "Gold, on held-out prompts", "online")[-2] == "0.805±0.005"


def test_without_a_folder_per_arm_they_are_called_after_what_tells_them_apart(tmp_path, told):
    paths = [
        add_run(tmp_path / "a", 0, ONLINE, REF="prev"),
        add_run(tmp_path / "b", 1, ONLINE, REF="prev"),
        add_run(tmp_path / "c", 1, OFFLINE, REF="init", NPROC="2"),
    ]
    printed = told(*paths)
    assert cells(printed, "Gold", "REF=prev")[0] == "2"
    assert cells(printed, "Gold", "REF=init") == ["1", "0.310", "0.510", "0.410"]


def test_gold_that_was_optimised_is_compared_and_no_proxy_is_shown(tmp_path, told):
    """The truth as reward: summary.jsonl calls it reward, and reward/gold beside it."""
    run = add_run(tmp_path / "run", 0, ONLINE)
    rows = list(map(json.loads, (run / "summary.jsonl").read_text().splitlines()))
    rows = [{**row, "reward": row["gold"], "reward/gold": row.pop("gold")} for row in rows]
    (run / "summary.jsonl").write_text("".join(map(dump, rows)))
    printed = told(run)
    assert cells(printed, "Gold, on held-out prompts", "all runs")[-1] == "0.800"
    assert "proxy" not in printed


def test_without_gold_the_reward_is_compared(tmp_path, told):
    run = add_run(tmp_path / "run", 0, ONLINE)
    rows = list(map(json.loads, (run / "summary.jsonl").read_text().splitlines()))
    for row in rows:
        del row["gold"]
    (run / "summary.jsonl").write_text("".join(map(dump, rows)))
    printed = told(run)
    assert "Gold" not in printed
    assert cells(printed, "Reward, on held-out prompts", "all runs")[-1] == "4.000"


def test_its_rows_are_all_it_needs(runs, told, tmp_path):
    """OUTPUT.jsonl, which can be published, gives the same tables, page and picture."""
    first = told(runs)
    (tmp_path / "rows.jsonl").write_text((tmp_path / "out.jsonl").read_text())
    page = (tmp_path / "out.html").read_text()
    assert told(tmp_path / "rows.jsonl") == first
    assert (tmp_path / "out.html").read_text() == page
    assert (tmp_path / "out.png").stat().st_size > 10_000
    row = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[1])
    assert row["comparison"] == "truth" and row["seed"] == 0 and row["sampled_tokens"] == 280


def test_the_page_stands_alone_and_has_each_comparison(runs, told, tmp_path):
    other = tmp_path / "demo <i>"
    add_run(other / "online/seed_0", 0, ONLINE, WRITER="policy")
    add_run(other / "offline/seed_0", 0, OFFLINE, WRITER="init")
    told(runs, other)
    page = (tmp_path / "out.html").read_text()
    assert "<h2>truth</h2>" in page and "<h2>demo &lt;i&gt;</h2>" in page and "<i>" not in page
    assert page.count("<svg") == 8  # four panels each


def test_arms_are_drawn_in_the_same_order_everywhere_the_baseline_first(runs, told, tmp_path):
    printed = told(runs, "--baseline", "online")
    table = printed[printed.index("Gold, on held-out") :]
    assert table.index(" online ") < table.index("offline ")
    assert "minus that of online" in (tmp_path / "out.html").read_text()


def test_one_arm_beside_two_has_no_differences(runs, told, tmp_path):
    other = tmp_path / "alone"
    add_run(other / "online/seed_0", 0, ONLINE, WRITER="policy")
    told(runs, other)
    page = (tmp_path / "out.html").read_text()
    assert page.count("<svg") == 4 + 3
    assert not re.search(r"(src|href)=|@import|url\(", re.sub(r'xlink:href="#|url\(#', "", page))


def test_the_same_run_twice_is_refused(tmp_path):
    for name in ("a", "b"):
        add_run(tmp_path / name, 3, ONLINE)
    with pytest.raises(SystemExit, match="b: another of these runs has the same settings and the"):
        compare.read_paths([tmp_path / "a", tmp_path / "b"])


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="there is no run here"):
        compare.read_paths([tmp_path])
    run = add_run(tmp_path / "run", 0, ONLINE)
    (run / "config.json").write_text('{"MODEL": "m"}')
    with pytest.raises(SystemExit, match=r"config.json: it has no SEED"):
        compare.read_paths([run])


def test_an_unknown_baseline_is_refused_and_the_known_are_named(runs, told):
    with pytest.raises(SystemExit, match="--baseline other: truth: the arms are offline, online"):
        told(runs, "--baseline", "other")
