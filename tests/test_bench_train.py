"""The comparisons with TRL: both sides are given what the benchmark says, and our side runs."""

import json
import re
import statistics
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from bench import train, trl_dpo
from chat import encode_pair
from training.checks import own_logprobs


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs_for_trl_hold_the_contract_and_canonical_ids(tmp_path):
    """Token ids = what the text tokenises to, one BOS (PITFALLS 1), one EOS at the end, log-probs
    of this model.
    """
    trl_dpo.build_model(tmp_path / "model")
    trl_dpo.build_pairs(tmp_path / "pairs.jsonl", tmp_path / "model", n=6)
    rows, tokenizer = (
        read(tmp_path / "pairs.jsonl"),
        AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert trl_dpo.canonical(rows, tokenizer) == 6
    for row in rows:
        ids = {k: np.asarray(row[f"{k}_token_ids"]) for k in trl_dpo.PARTS}
        assert (
            ids["prompt"] == tokenizer.bos_token_id
        ).sum() == 1 and tokenizer.bos_token_id not in ids["chosen"]
        for k in ("chosen", "rejected"):
            assert (ids[k] == tokenizer.eos_token_id).nonzero()[0].tolist() == [len(ids[k]) - 1]
        expected = [row["chosen_logprob"], row["rejected_logprob"]]
        assert own_logprobs(model, ids).tolist() == pytest.approx(expected, abs=1e-4)
    rows[2]["chosen_token_ids"].insert(
        1, 7
    )  # ids that the text does not tokenise to, as a generator may sample them
    assert trl_dpo.canonical(rows, tokenizer) == 5


def test_text_only_pairs_render_to_the_same_ids(tmp_path):
    trl_dpo.build_model(tmp_path / "model")
    trl_dpo.build_pairs(tmp_path / "pairs.jsonl", tmp_path / "model", n=3)
    rows, tokenizer = (
        read(tmp_path / "pairs.jsonl"),
        AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    for row, text in zip(rows, trl_dpo.text_only(rows), strict=True):
        assert not [k for k in text if "token_ids" in k or "logprob" in k]
        ids = encode_pair(tokenizer, text, "", [tokenizer.eos_token_id])
        assert ids == [row[f"{k}_token_ids"] for k in trl_dpo.PARTS]


def test_words_of_the_benchmark_are_its_token_ids(tmp_path):
    """So TRL, which takes text, trains on the same ids as we do."""
    train.SHAPES["tiny"] = train.SHAPES["small"] | dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1
    )
    train.build_model(tmp_path / "model", "tiny", torch.float32)
    train.build_pairs(tmp_path / "pairs.jsonl", [(9, 4, 7), (1, 2, 2)], 8192)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    for row, lengths in zip(read(tmp_path / "pairs.jsonl"), [(9, 4, 7), (1, 2, 2)], strict=True):
        ids = [row[f"{k}_token_ids"] for k in ("prompt", "chosen", "rejected")]
        assert (
            tuple(map(len, ids)) == lengths and ids[1][-1] == ids[2][-1] == tokenizer.eos_token_id
        )
        assert tokenizer(row["prompt"] + row["chosen"])["input_ids"] == ids[0] + ids[1]
        assert tokenizer(row["prompt"] + row["rejected"])["input_ids"] == ids[0] + ids[2]


def test_lengths_are_those_of_the_docstring():
    """Means about 200 and 350, heavy tails, answers to a prompt alike (correlation of the logs
    0.5), a fixed seed.
    """
    rows = train.draw_lengths(4000, 1.0)
    p, c, r = (np.array(x) for x in zip(*rows, strict=True))
    assert 180 < p.mean() < 215 and 320 < c.mean() < 370 and c.max() == 1500
    assert 0.4 < np.corrcoef(np.log(c), np.log(r))[0, 1] < 0.6
    assert rows[:5] == train.draw_lengths(5, 1.0) != train.draw_lengths(5, 1.0, seed=1)
    quarter = train.draw_lengths(4000, 0.25)
    assert statistics.mean(c for _, c, _ in quarter) == pytest.approx(c.mean() / 4, rel=0.01)


def test_useful_flops_are_those_of_a_plain_model():
    """Against torch's own count of the matrix products of a forward and backward pass, attention
    apart.
    """
    from torch.utils.flop_counter import FlopCounterMode

    shape = train.SHAPES["small"] | dict(vocab_size=512, num_hidden_layers=2)
    config = train.Qwen2Config(**shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    n = 24
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(n)[None], use_cache=False).logits.sum().backward()
    products = counter.get_flop_counts()["Global"]
    attention = [v for k, v in products.items() if k == torch.ops.aten.bmm]
    # One "answer" of n tokens without a prompt, and no second one. Eager attention also computes
    # the masked half.
    visible = 12 * 2 * config.hidden_size * n * (n + 1) / 2
    linear = train.useful_flops(config, [(0, n, 0)]) - visible
    assert linear == pytest.approx(sum(products.values()) - sum(attention), rel=1e-6)
    assert visible == pytest.approx(sum(attention) * (n + 1) / (2 * n), rel=0.05)


def test_only_equal_losses_and_no_more_memory_win():
    """The verdict compares TRL's fastest that computes the same loss with our fastest that fits
    into the same memory.
    """

    def task(name, side, seconds, peak, loss):
        runs = [{"losses": [0.7, loss], "seconds": [seconds], "wall": [seconds], "peak": peak}]
        return {
            "name": name,
            "side": side,
            "checkpointing": False,
            "answers_only": False,
            "runs": runs,
        }

    tasks = [
        task("small", "ours", 2.0, 100, 0.6),
        task("large", "ours", 1.0, 300, 0.6),
        task("wrong", "ours", 0.5, 50, 0.5),
        task("slow", "trl", 9.0, 900, 0.6),
        task("fair", "trl", 4.0, 200, 0.6),
        task("unfair", "trl", 1.0, 200, 0.5),
        task("none", "trl", 1.0, 1, 0.6) | {"runs": [{"failed": "out of memory"}]},
    ]
    lines = train.table(tasks, [(4, 3, 2)], train.Qwen2Config(**train.SHAPES["small"]), 1e12, 1e-4)
    assert [line for line in lines if line.startswith("checkpointing")] == [
        "checkpointing off, fair (its fastest at equal loss): "
        "small: 2.00x its pairs per second, 0.50x its peak memory"
    ]
    assert any(line.split() == ["none", "no", "out", "of", "memory"] for line in lines)


def test_our_side_runs_and_prints_its_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        train.importlib.util, "find_spec", lambda name: None
    )  # as where TRL is not installed
    monkeypatch.setattr(train.importlib.metadata, "version", lambda name: "?")
    flags = (
        "--pairs 3 --scale 0.05 --steps 2 --checkpointing on --packing prefix --tokens_per_batch 96"
    )
    monkeypatch.setattr(
        sys, "argv", ["train.py", *flags.split(), "--save", str(tmp_path / "table.txt")]
    )
    train.main()
    printed = capsys.readouterr().out
    rows = re.findall(
        r"^ours, (\w+), 96 tokens +yes +([\d.]+) +([\d.]+) +([\d,]+) +([\d,]+) +(\S+) ",
        printed,
        re.M,
    )
    assert [row[0] for row in rows] == ["prefix"]
    assert all(float(row[1]) > 0 and float(row[5]) < 1e-4 for row in rows), printed
    assert (tmp_path / "table.txt").read_text().splitlines()[-1] in printed
