"""Pairs: which answers form one, what is refused and for which reason, and that nothing depends on
the order of rows.
"""

import json
import math
import random
import resource
import shutil
import subprocess
import sys
from collections import Counter

import pytest

from arguments import parse
from conftest import ROOT
from make_pairs import STRATEGIES, arguments, rank_pairs
from records import dump
from stage import meta_path_of, write_meta


def candidate(reward, text=None, tokens=3, finish="stop", logprob=-1.5, model="m"):
    text = f"answer {reward}" if text is None else text
    return {
        "text": text,
        "token_ids": list(range(tokens)),
        "logprob": logprob,
        "finish_reason": finish,
        "temperature": 1.0,
        "model": model,
        "rewards": {"rm": reward},
        "reward": reward,
    }


def row(id, *candidates, prompt=None, **extra):
    prompt = prompt or [{"role": "user", "content": f"question {id}"}]
    return {
        "id": id,
        "prompt": prompt,
        "prompt_token_ids": [1, 2],
        "candidates": list(candidates),
        **extra,
    }


@pytest.fixture
def pairs_of(tmp_path, stage):
    """pairs_of(rows, flags…) -> (pairs, balances)"""

    def make(rows, *flags):
        (tmp_path / "scored.jsonl").write_text("".join(map(dump, rows)))
        output = tmp_path / "pairs.jsonl"
        stage(
            "make_pairs.py",
            "--scored",
            tmp_path / "scored.jsonl",
            "--output",
            output,
            "--overwrite",
            *flags,
        )
        meta = json.loads((tmp_path / "pairs.jsonl.meta.json").read_text())
        return [json.loads(line) for line in output.read_text().splitlines()], meta["counts"]

    return make


def test_a_pair_holds_all_that_the_trainer_and_trl_need(pairs_of):
    best, worst = candidate(2.0, logprob=-3.0, model="a"), candidate(-1.0, tokens=5, model="b")
    (pair,), counts = pairs_of(
        [row("p", candidate(0.5), best, worst, meta={"x": 1}, kept="yes")], "--iteration", "4"
    )
    assert pair == {
        "id": "p",
        "prompt": [{"role": "user", "content": "question p"}],
        "prompt_token_ids": [1, 2],
        "kept": "yes",
        "iteration": 4,
        "chosen": [{"role": "assistant", "content": "answer 2.0"}],
        "rejected": [{"role": "assistant", "content": "answer -1.0"}],
        "score_chosen": 2.0,
        "score_rejected": -1.0,
        "chosen_token_ids": [0, 1, 2],
        "rejected_token_ids": [0, 1, 2, 3, 4],
        "chosen_logprob": -3.0,
        "rejected_logprob": -1.5,
        "chosen_index": 1,
        "rejected_index": 2,
        "chosen_model": "a",
        "rejected_model": "b",
    }
    assert counts["rows"] == {"in": 1, "out": 1, "dropped": {}}


def test_a_text_prompt_is_answered_by_text(pairs_of):
    (pair,), _ = pairs_of([row("p", candidate(1.0), candidate(0.0), prompt="once upon")])
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (
        "once upon",
        "answer 1.0",
        "answer 0.0",
    )


def test_strategies_by_hand():
    scores = [0.1, 0.9, 0.5, 0.7]  # best first: 1, 3, 2, 0
    rng = random.Random(0)
    assert rank_pairs(scores, "max_min", 3, rng) == [(1, 0), (3, 2)]
    assert rank_pairs(scores, "max_second", 2, rng) == [(1, 3), (3, 2)]
    for _ in range(20):
        pairs = rank_pairs(scores, "max_random", 3, rng)
        assert {w for w, _ in pairs} == {1} and sorted(l for _, l in pairs) == [0, 2, 3]
        pairs = rank_pairs(scores, "random", 4, rng)
        assert len(set(pairs)) == 4 and all(scores[w] > scores[l] for w, l in pairs)
    assert rank_pairs([1.0], "max_min", 1, rng) == rank_pairs([1.0], "random", 1, rng) == []


def test_pitfalls_9_ties_and_identical_answers_make_no_pair_and_are_counted(pairs_of):
    rows = [
        row("ok", candidate(1.0), candidate(0.0)),
        row("tie", candidate(1.0, "a"), candidate(1.0, "b"), candidate(1.0, "c")),
        row("same", candidate(1.0, "a"), candidate(0.5, "a")),
        row("close", candidate(1.0, "a"), candidate(0.95, "b")),
        row("cut", candidate(1.0, "a"), candidate(0.0, "b", finish="length")),
        row("one", candidate(1.0, "a")),
        row("none"),
    ]
    pairs, counts = pairs_of(rows, "--min_margin", "0.1")
    assert [p["id"] for p in pairs] == ["ok"]
    dropped = {"tie": 1, "identical": 1, "margin": 1, "truncated": 1, "single_candidate": 2}
    assert counts["rows"] == {"in": 7, "out": 1, "dropped": dropped}
    assert counts["candidates"] == {"in": 12, "out": 11, "dropped": {"truncated": 1}}
    assert counts["pairs"] == {
        "in": 4,
        "out": 1,
        "dropped": {"tie": 1, "identical": 1, "margin": 1},
    }


def test_truncated_answers_take_part_when_asked(pairs_of):
    rows = [row("cut", candidate(1.0, "a"), candidate(0.0, "b", finish="length"))]
    assert len(pairs_of(rows, "--keep_truncated")[0]) == 1


def test_pitfalls_10_the_length_penalty_decides_and_is_not_undone(pairs_of):
    long, short = candidate(1.0, "long", tokens=100), candidate(0.8, "short", tokens=10)
    (pair,), _ = pairs_of([row("p", long, short)], "--length_penalty", "0.01")
    assert pair["chosen"][0]["content"] == "short"
    assert pair["score_chosen"] == pytest.approx(0.7) and pair["score_rejected"] == pytest.approx(
        0.0
    )


# ---- what no pair can show ---------------------------------------------------------------------


@pytest.fixture
def scored(tmp_path, stage):
    """scored(penalty) -> a file that score.py wrote, with an answer that was cut off in each row"""

    def write(penalty):
        rows = [row(f"p{i}", candidate(1.0, "aa"), candidate(0.0, "b")) for i in range(3)]
        for given in rows:
            given["candidates"].append(candidate(0.0, "cccc", finish="length"))
        (tmp_path / "c.jsonl").write_text("".join(map(dump, rows)))
        (tmp_path / "f.py").write_text("def f(prompt, response, meta): return len(response)\n")
        flags = ["--candidates", tmp_path / "c.jsonl", "--output", tmp_path / "s.jsonl"]
        flags += ["--reward_fn", f"{tmp_path / 'f.py'}:f"]
        stage("score.py", *flags, *(["--missing_eos_penalty", penalty] if penalty else []))
        return tmp_path / "s.jsonl"

    return write


def pair_up(stage, source, *flags):
    output = source.with_name("p.jsonl")
    flags = ["--scored", source, "--output", output, "--overwrite", *flags]
    return stage("make_pairs.py", *flags, check=False), output


def test_a_penalty_on_answers_that_take_part_in_no_pair_stops(stage, scored):
    """What score.py recorded is read: the flag of one stage that another makes void is an error."""
    source = scored(2.5)
    done, output = pair_up(stage, source)
    assert done.returncode == 1 and not output.exists()
    assert done.stderr.startswith(f"error: {source}: was scored with --missing_eos_penalty 2.5,")
    assert "Give --keep_truncated" in done.stderr and done.stderr.count("\n") == 1

    done, output = pair_up(stage, source, "--keep_truncated")
    assert done.returncode == 0 and "note" not in done.stdout
    pairs = [json.loads(line) for line in output.read_text().splitlines()]
    assert [pair["score_chosen"] for pair in pairs] == [2.0] * 3  # aa; cccc has 4 - 2.5


def test_a_penalty_is_found_behind_the_judge(stage, scored, tmp_path):
    """judge.py adds its reward to those of score.py, and keeps what the penalty took."""
    source = scored(2.5)
    judged = tmp_path / "judged.jsonl"
    shutil.copy(source, judged)
    recorded = {"arguments": {"candidates": [str(source)]}, "key": {}, "counts": {}}
    write_meta(meta_path_of(judged), recorded)
    done, _ = pair_up(stage, judged)
    assert done.returncode == 1 and "--missing_eos_penalty 2.5" in done.stderr


def test_answers_that_were_cut_off_and_pay_nothing_get_a_note(stage, scored):
    source = scored(None)
    done, _ = pair_up(stage, source)
    assert done.returncode == 0 and "note" not in done.stdout
    done, _ = pair_up(stage, source, "--keep_truncated", "--length_penalty", "0.1")
    assert done.returncode == 0 and "note" not in done.stdout
    done, _ = pair_up(stage, source, "--keep_truncated")
    assert done.returncode == 0 and "note: --keep_truncated without a penalty" in done.stdout

    # without metadata nothing is known about the rewards
    meta_path_of(source).unlink()
    done, _ = pair_up(stage, source, "--keep_truncated")
    assert done.returncode == 0 and "note" not in done.stdout


@pytest.mark.parametrize(("tied", "identical", "warned"), [(1, 1, True), (1, 0, False)])
def test_many_prompts_lost_to_answers_that_are_alike_are_said(
    tmp_path, stage, tied, identical, warned
):
    """A third or more of the prompts, of six: the share, and what to do."""
    rows = [row(f"t{i}", candidate(1.0, "a"), candidate(1.0, "b")) for i in range(tied)]
    rows += [row(f"i{i}", candidate(1.0, "a"), candidate(0.0, "a")) for i in range(identical)]
    rows += [row("one", candidate(1.0))]  # lost as well, but for another reason
    rows += [row(f"p{i}", candidate(1.0), candidate(0.0)) for i in range(6 - len(rows))]
    source = tmp_path / "s.jsonl"
    source.write_text("".join(map(dump, rows)))
    done, output = pair_up(stage, source)
    warnings = json.loads(meta_path_of(output).read_text())["warnings"]
    assert len(warnings) == warned and ("warning: " in done.stdout) == warned
    if warned:
        (message,) = warnings
        assert message.startswith("33% of the prompts made no pair") and message in done.stdout
        assert "tie (1) or are identical (1). Raise --temperature or --num_samples" in message


def many(n=60):
    rng = random.Random(7)
    return [
        row(f"p{i}", *(candidate(rng.random(), f"{i} {j}") for j in range(6))) for i in range(n)
    ]


@pytest.mark.parametrize("strategy", ["max_min", "max_random", "max_second", "random"])
def test_pitfalls_11_and_14_pairs_depend_on_seed_and_id_only(pairs_of, strategy):
    rows = many()
    flags = ["--strategy", strategy, "--pairs_per_prompt", "2"]
    first, _ = pairs_of(rows, *flags)
    random.Random(1).shuffle(rows)
    shuffled, _ = pairs_of(rows, *flags)
    assert sorted(map(dump, first)) == sorted(map(dump, shuffled))
    other, _ = pairs_of(rows, *flags, "--seed", "1")
    later, _ = pairs_of(rows, *flags, "--iteration", "1")
    assert (sorted(map(dump, other)) != sorted(map(dump, first))) == (
        strategy in ("max_random", "random")
    )
    assert (
        {(p["id"], p["chosen_index"], p["rejected_index"]) for p in later}
        != {(p["id"], p["chosen_index"], p["rejected_index"]) for p in first}
    ) == (strategy in ("max_random", "random"))


def two_sources(n, first, second, each=8):
    """n rows, a binary reward: `each` candidates of two models, right with these probabilities."""
    rng = random.Random(41)
    rows = []
    for i in range(n):
        answers = []
        for model, chance in (("first", first), ("second", second)):
            for j in range(each):
                right = float(rng.random() < chance)
                answers.append(candidate(right, f"{i} {model} {j}", model=model))
        rows.append(row(f"p{i}", *answers))
    return rows


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pitfalls_41_exchangeable_sources_are_chosen_and_rejected_alike(pairs_of, strategy, k):
    rows = two_sources(3000, 0.5, 0.5, each=2)
    pairs, _ = pairs_of(rows, "--strategy", strategy, "--pairs_per_prompt", k)
    assert len(pairs) > 600
    for model in ("chosen_model", "rejected_model"):
        # Of the first source, by prompt, as the pairs of one prompt are not independent.
        surplus = Counter()
        for pair in pairs:
            surplus[pair["id"]] += 1 if pair[model] == "first" else -1
        chi_square = surplus.total() ** 2 / sum(d * d for d in surplus.values())
        assert chi_square < 10.83, (model, surplus.total(), len(pairs))  # p > 1e-3


def binomial(n, k, p):
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def kept_share(strategy, right):
    """How many pairs are expected of 16 candidates, so many of them right; ties are refused."""
    wrong = 16 - right
    if right == 0 or wrong == 0:
        return 0
    if strategy == "max_random":
        return wrong / 15
    if strategy == "random":
        return right * wrong / math.comb(16, 2)
    return 1  # max_min; and of all 15 neighbours that max_second pairs, right and wrong meet once


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pitfalls_41_a_better_source_is_chosen_as_often_as_it_is_right(pairs_of, strategy):
    """Of m right answers each is chosen with the same chance, of the wrong ones each rejected."""
    # Expected per prompt: pairs, and those that choose or reject the second source.
    kept = chosen = rejected = 0.0
    for a in range(9):
        for b in range(9):
            weight = binomial(8, a, 0.3) * binomial(8, b, 0.9) * kept_share(strategy, right=a + b)
            kept += weight
            chosen += weight * b / max(1, a + b)
            rejected += weight * (8 - b) / max(1, 16 - a - b)

    k = 15 if strategy == "max_second" else 1
    rows = two_sources(1500, 0.3, 0.9)
    pairs, _ = pairs_of(rows, "--strategy", strategy, "--pairs_per_prompt", k)
    assert len(pairs) == pytest.approx(1500 * kept, rel=0.1)
    for model, expected in (("chosen_model", chosen / kept), ("rejected_model", rejected / kept)):
        found = sum(pair[model] == "second" for pair in pairs) / len(pairs)
        error = math.sqrt(expected * (1 - expected) / len(pairs))
        assert abs(found - expected) < 3.3 * error, (model, found, expected)
    assert 0.7 < chosen / kept < 0.8 and rejected / kept < 0.2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pitfalls_41_ties_are_broken_by_seed_and_id_and_by_nothing_else(pairs_of, strategy):
    rows = two_sources(100, 0.5, 0.5)
    flags = ["--strategy", strategy, "--pairs_per_prompt", "15"]
    first, counts = pairs_of(rows, *flags)
    random.Random(1).shuffle(rows)
    shuffled, counts_shuffled = pairs_of(rows, *flags)
    assert sorted(map(dump, first)) == sorted(map(dump, shuffled)) and counts == counts_shuffled
    other, _ = pairs_of(rows, *flags, "--seed", "1")
    assert sorted(map(dump, other)) != sorted(map(dump, first))


def test_no_pair_at_all_is_an_error_with_the_reasons(tmp_path, stage):
    rows = [row(f"p{i}", candidate(1.0, "a"), candidate(1.0, "b")) for i in range(3)]
    (tmp_path / "s.jsonl").write_text("".join(map(dump, rows)))
    done = stage(
        "make_pairs.py",
        "--scored",
        tmp_path / "s.jsonl",
        "--output",
        tmp_path / "p.jsonl",
        check=False,
    )
    assert (
        done.returncode == 1
        and "no pair could be made from 3 prompts" in done.stderr
        and "3  tie" in done.stderr
    )
    assert not (tmp_path / "p.jsonl").exists()


def test_a_nan_score_is_named(tmp_path, stage):
    (tmp_path / "s.jsonl").write_text(
        json.dumps(row("bad", candidate(1.0), candidate(float("nan"), "x"))) + "\n"
    )
    done = stage(
        "make_pairs.py",
        "--scored",
        tmp_path / "s.jsonl",
        "--output",
        tmp_path / "p.jsonl",
        check=False,
    )
    assert done.returncode == 1 and "s.jsonl:1: not JSON (NaN is no number)" in done.stderr


def test_the_defaults_are_the_fields():
    args = parse(arguments(), ["--scored", "s", "--output", "o"])
    assert (args.strategy, args.pairs_per_prompt, args.min_margin, args.length_penalty) == (
        "max_min",
        1,
        0.0,
        0.0,
    )


def test_rows_stream(tmp_path):
    """Memory does not grow with the file: 40 MB of rows under a limit of 300 MB of address space,
    torch-free.
    """
    with open(tmp_path / "s.jsonl", "w") as file:
        for i in range(4000):
            file.write(
                dump(
                    row(
                        f"p{i}",
                        *(
                            candidate(j / 8, f"{i} {j} " + "word " * 200, tokens=100)
                            for j in range(8)
                        ),
                    )
                )
            )
    assert (tmp_path / "s.jsonl").stat().st_size > 40e6

    def little_memory():
        resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20))

    command = [
        sys.executable,
        ROOT / "make_pairs.py",
        "--scored",
        tmp_path / "s.jsonl",
        "--output",
        tmp_path / "p.jsonl",
    ]
    subprocess.run(command, check=True, preexec_fn=little_memory)
    assert sum(1 for _ in open(tmp_path / "p.jsonl")) == 4000


def test_a_margin_in_tenths_is_what_it_looks_like(pairs_of):
    """0.3 - 0.1 is 0.19999999999999998."""
    data = [row("a", candidate(0.3), candidate(0.1)), row("b", candidate(0.3), candidate(0.2))]
    pairs, counts = pairs_of(data, "--min_margin", 0.2)
    assert [pair["id"] for pair in pairs] == ["a"]
    assert counts["rows"]["dropped"] == {"margin": 1}


def test_ties_are_blamed_and_not_the_share_that_is_held_out(stage, tmp_path):
    data = [row(f"p{i}", candidate(1, "x"), candidate(1, "y")) for i in range(50)]
    (tmp_path / "scored.jsonl").write_text("".join(map(dump, data)))
    flags = ["--scored", tmp_path / "scored.jsonl", "--output", tmp_path / "pairs.jsonl"]
    flags += ["--eval_share", 0.1, "--eval_output", tmp_path / "eval.jsonl"]
    said = stage("make_pairs.py", *flags, check=False).stderr
    assert "no pair could be made from 50 prompts" in said and "50  tie" in said
