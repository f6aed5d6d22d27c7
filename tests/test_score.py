"""score.py: a score depends on prompt and answer and on nothing else, and nothing is dropped
without a reason that is counted.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    RobertaConfig,
)

import candidates
import records
import score
import small_models
from conftest import ROOT
from kernels.attention import positions

WORDS = "plum fig pear name three the user asks for fruits".split()


def rows(n=10, candidates=4, longest=12, seed=0, text=False):
    """Rows as generate.py writes them, with answers of many lengths."""
    rng = random.Random(seed)

    def words(most):
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    def candidate(k):
        ids = [rng.randrange(6, 300) for _ in range(rng.randint(1, longest))]
        reason = "length" if k == 0 else "stop"
        return dict(
            text=words(longest),
            token_ids=ids,
            logprob=-1.0,
            finish_reason=reason,
            temperature=1.0,
            model="m",
        )

    return [
        {
            "id": f"p{i}",
            "prompt": words(6) if text else [{"role": "user", "content": words(6)}],
            "prompt_token_ids": [rng.randrange(6, 300) for _ in range(rng.randint(1, 8))],
            "candidates": [candidate(k) for k in range(candidates)],
            "note": {"kept": i},
        }
        for i in range(n)
    ]


def write(path, rows):
    path.write_text("".join(map(records.dump, rows)))
    return path


def read(path):
    return [json.loads(line) for line in open(path)]


def meta(path):
    return json.loads(Path(f"{path}.meta.json").read_text())


@pytest.fixture
def run(monkeypatch):
    """run(candidates, output, …): the stage, in this process; a failing one raises records.Stop.

    candidates: a path, or a list of paths.
    """

    def call(candidates, output, *arguments):
        paths = candidates if isinstance(candidates, list) else [candidates]
        argv = ["score.py", "--candidates", *paths, "--output", output, *arguments]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        score.main()

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward model, a reference, a file of reward functions."""
    d = tmp_path_factory.mktemp("models")
    small_models.reward_model(d / "rm")
    small_models.causal_lm(d / "ref")
    (d / "f.py").write_text(
        "import math\n"
        "def length(prompt, response, meta): return len(response)\n"
        "def vowels(prompt, response, meta): return sum(response.count(v) for v in 'aeiou')\n"
        "def nan(prompt, response, meta): return math.nan if 'fig' in response else 1\n"
        "def breaks(prompt, response, meta):\n"
        "    return meta['no such key']\n"
        "def none(prompt, response, meta): pass\n"
        "def word(prompt, response, meta): return '1.5'\n"
        "def rank(prompt, responses, meta):\n"
        "    return [sorted(responses).index(response) for response in responses]\n"
        "def few(prompt, responses, meta): return [1.0] * (len(responses) - 1)\n"
        "def one(prompt, responses, meta): return 1.0\n"
        "def named(prompt, responses, meta): return {r: 1.0 for r in responses}\n"
        "def some_nan(prompt, responses, meta):\n"
        "    return [math.nan if 'fig' in response else 1 for response in responses]\n"
        "def some_none(prompt, responses, meta):\n"
        "    return [None if 'fig' in response else 1 for response in responses]\n"
        "def leaves(prompt, responses, meta): raise SystemExit(3)\n"
    )
    return d


def definition(path, row, candidate):
    """The score as a model card would have it computed: one conversation, one forward pass. (Eager,
    for SDPA leaves Gemma 2's soft-capping out.)
    """
    model = AutoModelForSequenceClassification.from_pretrained(
        path, attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer.apply_chat_template(
        [*row["prompt"], {"role": "assistant", "content": candidate["text"]}],
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    with torch.no_grad():
        return model(ids).logits[0, 0].item()


def loaded(path, load=score.load_reward_model, max_length=None):
    argv = ["--candidates", "c", "--output", "o", "--reward_model", str(path)]
    args = score.arguments().parse_args(argv)
    args.max_length = max_length
    score.resolve(args)
    return load(str(path), args, "cpu")


def answers_of(rows):
    return candidates.answers_of(rows, strip_reasoning=False, files=["c.jsonl"])


# ---- one score, whatever is in the batch -------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("pad", [0, None, 5], ids=["own_pad", "no_pad", "pad_is_end_of_turn"])
def test_score_is_the_same_alone_batched_and_shuffled(tmp_path, run, arch, pad):
    """Law 9, PITFALLS 8: Skywork's shapes. With pad = the last token of every text, transformers
    reads off the token before it, padded or not; with none, the last one.
    """
    small_models.reward_model(tmp_path / "rm", arch, pad_token_id=pad)
    data = rows()
    write(tmp_path / "ordered.jsonl", data)
    write(tmp_path / "shuffled.jsonl", random.Random(1).sample(data, len(data)))
    for name, source, budget in (
        ("a", "ordered", 1),
        ("b", "ordered", 200),
        ("c", "ordered", 9999),
        ("d", "shuffled", 300),
    ):
        run(
            tmp_path / f"{source}.jsonl",
            tmp_path / f"{name}.jsonl",
            "--reward_model",
            tmp_path / "rm",
            "--tokens_per_batch",
            budget,
        )
    scores = [
        {
            (r["id"], i): c["rewards"]["rm"]
            for r in read(tmp_path / f"{n}.jsonl")
            for i, c in enumerate(r["candidates"])
        }
        for n in "abcd"
    ]
    assert scores[0].keys() == {(r["id"], i) for r in data for i in range(4)}
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], abs=1e-5)
    for row in data[:3]:
        for i, c in enumerate(row["candidates"]):
            assert scores[0][row["id"], i] == pytest.approx(
                definition(tmp_path / "rm", row, c), abs=1e-5
            )
    assert len(set(scores[0].values())) > 30  # the model does tell them apart


def test_padding_side_changes_nothing(folder):
    """Law 9, PITFALLS 8: transformers' own left- and right-padded batches give our scores."""
    m = loaded(folder / "rm")
    answers = answers_of(rows(3))
    ours = m.score(answers)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder / "rm").eval()
    for side in ("left", "right"):
        m.tokenizer.padding_side = side
        ids = [list(m.sequence(a).ids) for a in answers]
        batch = m.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        assert (batch["attention_mask"][:, 0 if side == "left" else -1] == 0).any()
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            assert ours == pytest.approx(
                theirs(**batch, position_ids=positions).logits[:, 0].tolist(), abs=1e-5
            )


@pytest.mark.parametrize("load", [score.load_reward_model, score.load_reference])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2"])
def test_a_prompt_is_computed_once_for_all_its_answers(tmp_path, arch, load):
    """Law 9 and PITFALLS 19: sequences share a beginning, or all of it; one that only looks shared
    belongs to another row. What packing cannot express (Gemma 2) runs one by one. Every value is
    that of the sequence alone.
    """
    if load is score.load_reward_model:
        small_models.reward_model(tmp_path / "m", arch)
    else:
        small_models.causal_lm(tmp_path / "m", arch)
    m = loaded(tmp_path / "m", load)
    data = rows(6, candidates=5)
    for c in data[2]["candidates"][1:3]:  # the same answer three times
        c |= {k: data[2]["candidates"][0][k] for k in ("text", "token_ids")}
    data[3]["candidates"][1]["token_ids"] = data[3]["candidates"][0]["token_ids"] + [
        7,
        8,
    ]  # one begins like another
    data[3]["candidates"][1]["text"] = data[3]["candidates"][0]["text"] + " plum"
    data[4]["candidates"] = data[4]["candidates"][:1]
    data[5] |= {k: data[4][k] for k in ("prompt", "prompt_token_ids")}
    answers = answers_of(data)
    alone = [m.score_alone(m.sequence(a)) for a in answers]
    seen = []
    m.network.base_model.register_forward_pre_hook(
        lambda _, a, k: seen.append((a[0] if a else k["input_ids"]).numel()), with_kwargs=True
    )
    assert m.score(answers) == pytest.approx(alone, rel=1e-6, abs=1e-5)
    different = {m.sequence(a) for a in answers}
    every = sum(len(sequence.ids) for sequence in different)
    assert m.packs == (arch != "gemma2") and (
        sum(seen) < 0.8 * every if m.packs else sum(seen) == every
    )
    m.tokens_per_batch = 150
    assert m.score(answers) == pytest.approx(alone, rel=1e-6, abs=1e-5)


def test_two_ranks_write_the_file_of_one(tmp_path, run, stage, folder):
    """Law 9, PITFALLS 12: same bytes, rows in = rows out."""
    write(tmp_path / "c.jsonl", rows(140, candidates=2))
    candidates, two = tmp_path / "c.jsonl", tmp_path / "two.jsonl"
    models = ["--reward_model", folder / "rm", "--ref_model", folder / "ref"]
    run(candidates, tmp_path / "one.jsonl", *models)
    stage("score.py", "--candidates", candidates, "--output", two, *models, nproc=2)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert meta(tmp_path / "two.jsonl")["counts"] == {
        "rows": {"in": 140, "out": 140, "dropped": {}},
        "candidates": {"in": 280, "out": 280, "dropped": {}},
    }
    assert meta(tmp_path / "two.jsonl")["world_size"] == 2


def test_memory_that_does_not_suffice_halves_the_batch(folder, capsys):
    """Every forward beyond 150 tokens fails, as a full GPU would; the scores are the same and later
    batches small.
    """
    answers, m = answers_of(rows(8)), loaded(folder / "rm")
    expected = m.score(answers)
    sizes = []

    def full(module, args, kwargs):
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > 150:
            raise torch.OutOfMemoryError("out of memory")

    hook = m.network.base_model.register_forward_pre_hook(full, with_kwargs=True)
    assert m.score(answers) == pytest.approx(expected, abs=1e-5)
    assert 0 < sum(size > 150 for size in sizes) < 6
    assert "out of memory" in capsys.readouterr().err
    hook.remove()
    m.network.base_model.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("oom"))
    )
    with pytest.raises(records.Stop, match="--max_length"):
        m.score(answers)


def test_a_model_for_which_packing_is_wrong_is_scored_one_by_one(folder, tmp_path, capsys):
    """Law 9 at run time: positions that are dropped on the way are noticed in the first batch, and
    nothing is lost.
    """
    answers, m = answers_of(rows(4)), loaded(folder / "rm")
    expected = m.score(answers)
    m = loaded(folder / "rm")
    m.network.base_model.register_forward_pre_hook(
        lambda _, a, k: (a, {**k, "position_ids": None}), with_kwargs=True
    )
    assert m.score(answers) == pytest.approx(expected, abs=1e-5)
    assert not m.packs and "one by one" in capsys.readouterr().err

    config = BertConfig(
        vocab_size=small_models.VOCAB,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=1,
        initializer_range=0.5,
    )
    small_models.tokenizer(tmp_path / "bert", "bos")
    torch.manual_seed(0)
    bert = AutoModelForSequenceClassification.from_config(config).eval()
    bert.save_pretrained(tmp_path / "bert")
    m = loaded(tmp_path / "bert")
    with torch.no_grad():
        expected = [bert(torch.tensor([m.sequence(a).ids])).logits.item() for a in answers]
    assert m.score(answers) == pytest.approx(expected, abs=1e-5)


def test_llama4s_text_model_is_a_reference(tmp_path):
    """Its base_model is the whole model, head included."""
    small_models.causal_lm(tmp_path / "ref", "llama4_text", **small_models.LLAMA4)
    answers, m = answers_of(rows(3)), loaded(tmp_path / "ref", score.load_reference)
    alone = [m.score_alone(m.sequence(a)) for a in answers]
    assert m.score(answers) == pytest.approx(alone, abs=1e-4)


# ---- what the reward model sees ----------------------------------------------------------------


@pytest.mark.parametrize("text", [False, True], ids=["conversation", "raw_text"])
def test_one_bos_and_the_reward_models_own_template(folder, text):
    """PITFALLS 1 and 7: the policy speaks ChatML without BOS, the reward model does not."""
    m = loaded(folder / "rm")
    bos = m.tokenizer.bos_token_id
    for row in rows(3, text=text):
        a = candidates.Answer(row, 1, row["candidates"][1], row["candidates"][1]["text"], "c.jsonl")
        ids = m.sequence(a).ids
        assert ids[0] == bos and ids.count(bos) == 1
        seen = m.tokenizer.decode(ids)
        assert seen.endswith(a.text if text else a.text + "<|eot|>")
        if text:
            assert seen == "<|bos|>" + row["prompt"] + a.text
            row["prompt"] = (
                "<|bos|>" + row["prompt"]
            )  # a text that was rendered elsewhere brings its own
            assert m.sequence(a).ids == ids


def test_what_is_too_long_is_dropped_and_never_cut(tmp_path, run, folder):
    """PITFALLS 7, 12: the answer is dropped for a reason, the row and other scores stay."""
    data = rows(6)
    data[2]["candidates"][1]["text"] = "plum " * 300  # the model reads 256 tokens
    for c in data[4]["candidates"]:
        c["text"] = "fig " * 300
    write(tmp_path / "c.jsonl", data)
    run(tmp_path / "c.jsonl", tmp_path / "s.jsonl", "--reward_model", folder / "rm")
    out = read(tmp_path / "s.jsonl")
    assert [len(r["candidates"]) for r in out] == [4, 4, 3, 4, 0, 4]
    assert [c["text"] for c in out[2]["candidates"]] == [
        c["text"] for i, c in enumerate(data[2]["candidates"]) if i != 1
    ]
    counts = meta(tmp_path / "s.jsonl")["counts"]
    assert counts["candidates"] == {
        "in": 24,
        "out": 19,
        "dropped": {"too_long_for_reward_model": 5},
    }
    assert counts["rows"] == {"in": 6, "out": 6, "dropped": {}}
    run(
        tmp_path / "c.jsonl",
        tmp_path / "none.jsonl",
        "--max_length",
        3,
        "--reward_model",
        folder / "rm",
    )
    assert meta(tmp_path / "none.jsonl")["counts"]["candidates"]["out"] == 0


def test_reasoning_is_stripped_from_what_is_shown_only(tmp_path, run, folder):
    data = rows(1, candidates=3)
    for c, text in zip(
        data[0]["candidates"],
        ["<think>fig</think>\n\nplum", "fig</think>plum", "plum"],
        strict=True,
    ):
        c["text"] = text
    write(tmp_path / "c.jsonl", data)
    for name, flags, expected in (
        ("off", [], [24, 15, 4]),
        ("on", ["--strip_reasoning"], [4, 4, 4]),
    ):
        out = tmp_path / f"{name}.jsonl"
        run(tmp_path / "c.jsonl", out, "--reward_fn", folder / "f.py:length", *flags)
        scored = read(out)[0]["candidates"]
        assert [c["reward"] for c in scored] == expected
        assert [c["text"] for c in scored] == [c["text"] for c in data[0]["candidates"]]
        assert [c["token_ids"] for c in scored] == [c["token_ids"] for c in data[0]["candidates"]]


def test_template_arguments_reach_the_template(tmp_path, run, folder):
    """PITFALLS 25: they change the score, and one that no template reads is refused."""
    small_models.reward_model(tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    tokenizer.chat_template = "{% if strict is true %}fig{% endif %}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "rm")
    write(tmp_path / "c.jsonl", rows(2))
    scores = []
    for name, flags in (("a", []), ("b", ["--chat_template_kwargs", "strict=true"])):
        out = tmp_path / f"{name}.jsonl"
        run(tmp_path / "c.jsonl", out, "--reward_model", tmp_path / "rm", *flags)
        scores.append([c["reward"] for row in read(out) for c in row["candidates"]])
    assert all(abs(x - y) > 1e-4 for x, y in zip(*scores, strict=True))
    refused(
        run,
        tmp_path,
        "never reads it",
        "--reward_model",
        tmp_path / "rm",
        "--chat_template_kwargs",
        "lax=1",
    )


# ---- what is made of the numbers ---------------------------------------------------------------


def test_weights_penalty_and_everything_else_untouched(tmp_path, run, folder):
    """Weight 0 decides nothing; a truncated answer pays; unknown keys and the rows' order stay."""
    data = rows(5)
    write(tmp_path / "c.jsonl", data)
    run(
        tmp_path / "c.jsonl",
        tmp_path / "s.jsonl",
        "--reward_model",
        folder / "rm",
        "--reward_fn",
        folder / "f.py:length",
        f"v={folder / 'f.py'}:vowels",
        "--reward_weights",
        0,
        0.5,
        -2,
        "--missing_eos_penalty",
        3,
    )
    out = read(tmp_path / "s.jsonl")
    for before, after in zip(data, out, strict=True):
        for c, d in zip(before["candidates"], after["candidates"], strict=True):
            r = d.pop("rewards")
            assert list(r) == ["rm", "length", "v"] and r["length"] == len(c["text"])
            cut_off = c["finish_reason"] == "length"
            assert d.pop("reward") == pytest.approx(0.5 * r["length"] - 2 * r["v"] - 3 * cut_off)
        assert before == after
    assert meta(tmp_path / "s.jsonl")["arguments"]["reward_weights"] == [0, 0.5, -2]


def test_weights_by_name_and_by_place():
    names = ["rm", "gold", "judge"]
    assert score.weights([], names) == [1, 1, 1]
    assert score.weights(["1", "0", "-.5"], names) == [1, 0, -0.5]
    assert score.weights(["judge=2", "gold=0"], names) == [1, 0, 2]
    # iterate.sh gives gold the weight 0, and SCORE_ARGS may say more: neither undoes the other.
    twice = [
        "--candidates",
        "c",
        "--output",
        "o",
        "--reward_weights",
        "gold=0",
        "--reward_weights",
        "judge=0.5",
    ]
    assert score.weights(score.arguments().parse_args(twice).reward_weights, names) == [1, 0, 0.5]
    for wrong in (
        ["1", "2"],
        ["gold=0", "1", "1"],
        ["silver=0"],
        ["gold=0", "gold=1"],
        ["gold=none"],
        ["a", "b", "c"],
    ):
        with pytest.raises(records.Stop, match="--reward_weights"):
            score.weights(wrong, names)


def test_names_and_a_second_scoring(tmp_path, run, folder):
    """Several models are called by their folders; scoring a scored file adds to its rewards."""
    small_models.reward_model(tmp_path / "other", seed=1)
    write(tmp_path / "c.jsonl", rows(2))
    run(
        tmp_path / "c.jsonl",
        tmp_path / "s.jsonl",
        "--reward_model",
        folder / "rm",
        tmp_path / "other",
    )
    run(tmp_path / "s.jsonl", tmp_path / "t.jsonl", "--reward_fn", folder / "f.py:length")
    for once, twice in zip(read(tmp_path / "s.jsonl"), read(tmp_path / "t.jsonl"), strict=True):
        for c, d in zip(once["candidates"], twice["candidates"], strict=True):
            assert list(c["rewards"]) == ["rm", "other"] and c["reward"] == pytest.approx(
                sum(c["rewards"].values())
            )
            assert d["rewards"] == c["rewards"] | {"length": d["reward"]}


@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen3"])
def test_reference_logprobs_against_a_hand_written_loop(tmp_path, run, arch, folder):
    """One sequence at a time, one token at a time, from the model's own logits; Gemma 2's are
    soft-capped.
    """
    small_models.causal_lm(tmp_path / "ref", arch)
    data = rows(4)
    data[1]["candidates"][2]["token_ids"] = []  # wrote nothing: probability 1
    write(tmp_path / "c.jsonl", data)
    run(
        tmp_path / "c.jsonl",
        tmp_path / "s.jsonl",
        "--reward_fn",
        folder / "f.py:length",
        "--ref_model",
        f"init={tmp_path / 'ref'}",
        "--tokens_per_batch",
        100,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ref", attn_implementation="eager"
    ).eval()
    for row in read(tmp_path / "s.jsonl"):
        for c in row["candidates"]:
            ids, expected = list(row["prompt_token_ids"]), 0.0
            for token in c["token_ids"]:
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[0, -1].double()
                expected += logits.log_softmax(-1)[token].item()
                ids.append(token)
            assert c["ref_logprobs"] == pytest.approx({"init": expected}, rel=1e-5, abs=1e-5)


def test_a_reference_needs_no_reward(tmp_path, run, folder):
    """Where a judge alone gives rewards: "rewards" is empty, and rewards of the input are kept."""
    write(tmp_path / "c.jsonl", rows(3))
    candidates, both = tmp_path / "c.jsonl", tmp_path / "both.jsonl"
    reference = ["--ref_model", folder / "ref"]
    run(candidates, both, *reference, "--reward_fn", folder / "f.py:length")
    run(candidates, tmp_path / "alone.jsonl", *reference)
    run(candidates, tmp_path / "less.jsonl", *reference, "--missing_eos_penalty", 2)
    run(both, tmp_path / "again.jsonl", "--ref_model", f"other={folder / 'ref'}")

    names = ("both", "alone", "less", "again")
    files = [read(tmp_path / f"{name}.jsonl") for name in names]
    for four in zip(*files, strict=True):
        for both, alone, less, again in zip(*(row["candidates"] for row in four), strict=True):
            assert alone["rewards"] == {} and alone["reward"] == 0.0
            assert isinstance(alone["reward"], float)
            assert alone["ref_logprobs"] == both["ref_logprobs"]
            assert less["reward"] == (-2 if less["finish_reason"] == "length" else 0)
            assert again["rewards"] == both["rewards"] and again["reward"] == both["reward"]
            assert again["ref_logprobs"].keys() == {"ref", "other"}


# ---- several files -----------------------------------------------------------------------------


def test_files_are_merged_by_id(tmp_path, run, folder):
    """PITFALLS 11: the second file is shuffled, lacks one id and brings another."""
    first, second = rows(8, seed=0), rows(9, seed=0)
    for row in second:
        for c in row["candidates"]:
            c["model"], c["text"] = "enhancer", c["text"] + " plum"
    second = random.Random(3).sample([r for r in second if r["id"] != "p5"], 8)
    write(tmp_path / "a.jsonl", first)
    write(tmp_path / "b.jsonl", second)
    out = tmp_path / "s.jsonl"
    run([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], out, "--reward_fn", folder / "f.py:length")
    merged = read(out)
    assert [r["id"] for r in merged] == [f"p{i}" for i in range(9)]
    by_id = {r["id"]: r for r in second}
    for row, alone in zip(merged, first, strict=False):
        expected = alone["candidates"] + by_id.get(row["id"], {"candidates": []})["candidates"]
        assert [c["text"] for c in row["candidates"]] == [c["text"] for c in expected]
        assert row["note"] == alone["note"]
    assert len(merged[8]["candidates"]) == 4
    counts = meta(out)["counts"]
    assert meta(out)["warnings"] == [
        "2 of 9 ids are not in all files: their rows have fewer candidates"
    ]
    assert counts["rows"]["out"] == 9 and counts["candidates"]["out"] == 64

    second[3]["prompt_token_ids"] = [1]
    write(tmp_path / "b.jsonl", second)
    with pytest.raises(records.Stop, match=rf'b.jsonl: id "{second[3]["id"]}": prompt_token_ids'):
        run(
            [tmp_path / "a.jsonl", tmp_path / "b.jsonl"],
            tmp_path / "t.jsonl",
            "--reward_fn",
            folder / "f.py:length",
        )


# ---- interruption and size ---------------------------------------------------------------------


def test_killed_and_started_again(tmp_path, run):
    """Law 7: after kill -9 the same command does the missing parts only; same bytes."""
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        "def slow(prompt, response, meta):\n"
        f"    open({str(tmp_path / 'calls')!r}, 'a').write(response + chr(10))\n"
        "    time.sleep(float(os.environ.get('SLOW', 0)))\n"
        "    return len(response) / 7\n"
    )
    data = rows(200, candidates=1)
    for i, row in enumerate(data):
        row["candidates"][0]["text"] = f"{i} plum"
    write(tmp_path / "c.jsonl", data)
    candidates, slow = tmp_path / "c.jsonl", f"{tmp_path / 'slow.py'}:slow"
    run(candidates, tmp_path / "undisturbed.jsonl", "--reward_fn", slow)
    (tmp_path / "calls").unlink()

    out = tmp_path / "s.jsonl"
    command = [sys.executable, ROOT / "score.py", "--candidates", candidates, "--output", out]
    process = subprocess.Popen(
        [*map(str, command), "--reward_fn", slow],
        env={**os.environ, "SLOW": "0.01"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 60
    while not (tmp_path / "s.jsonl.parts/000001.jsonl").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    finished = []
    for part in sorted((tmp_path / "s.jsonl.parts").glob("0*.jsonl")):
        for line in part.read_text().splitlines()[2:]:
            finished.append(json.loads(line)["candidates"][0]["text"])
    (tmp_path / "calls").unlink()
    run(candidates, out, "--reward_fn", slow)
    assert out.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()
    again = (tmp_path / "calls").read_text().splitlines()
    assert (
        len(finished) >= 128
        and not set(finished) & set(again)
        and len(finished) + len(again) == 200
    )
    written = out.stat().st_mtime_ns
    run(candidates, out, "--reward_fn", slow)
    assert out.stat().st_mtime_ns == written  # already done


@pytest.mark.parametrize("files", [1, 2])
def test_memory_does_not_grow_with_the_rows(tmp_path, run, folder, files):
    """1,800 rows of 3 kB more take less than 0.4 kB each: their ids, checked for being unique, and
    byte offsets.
    """
    peaks = {}
    for n in (200, 2000):
        data = rows(n, candidates=1)
        for row in data:
            row["candidates"][0]["text"] = "plum " * 500
        paths = [write(tmp_path / f"{n}_{k}.jsonl", data) for k in range(files)]
        tracemalloc.start()
        run([*paths], tmp_path / f"s{n}.jsonl", "--reward_fn", folder / "f.py:length")
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (peaks[2000] - peaks[200]) / 1800 < 400 * files


# ---- what is refused ---------------------------------------------------------------------------


def refused(run, tmp_path, match, *arguments, data=None):
    write(tmp_path / "c.jsonl", data or rows(2))
    with pytest.raises(records.Stop, match=match):
        run(tmp_path / "c.jsonl", tmp_path / "s.jsonl", *arguments)
    assert not (tmp_path / "s.jsonl").exists()


@pytest.mark.parametrize(
    "function, match",
    [
        ("nan", r'f.py:nan on .*c.jsonl: row id "p1", candidate 2: the value is nan'),  # PITFALLS 9
        (
            "none",
            r"f.py:none on .*c.jsonl: row id \"p0\", candidate 0: returned 'None'; a reward is",
        ),
        (
            "word",
            r"f.py:word on .*c.jsonl: row id \"p0\", candidate 0: returned '1.5'; a reward is",
        ),
        ("missing", "has no function missing"),
    ],
)
def test_reward_functions_that_fail(tmp_path, run, folder, function, match):
    data = rows(2)
    for row in data:
        for c in row["candidates"]:
            c["text"] = "plum"
    data[1]["candidates"][2]["text"] = "fig"
    refused(run, tmp_path, match, "--reward_fn", f"{folder / 'f.py'}:{function}", data=data)


def test_a_reward_function_that_raises_shows_its_traceback_and_the_answer(tmp_path, run, folder):
    write(tmp_path / "c.jsonl", rows(2))
    breaks = f"{folder / 'f.py'}:breaks"
    with pytest.raises(KeyError) as raised:
        run(tmp_path / "c.jsonl", tmp_path / "s.jsonl", "--reward_fn", breaks)
    assert 'row id "p0", candidate 0' in raised.value.__notes__[0]


def test_a_function_of_responses_sees_all_answers_of_a_prompt_at_once(tmp_path, run, folder):
    """One call per prompt, with the answers of all files in the file's order, equal ones as often
    as they were written; in the same run as a function of one answer.
    """
    first, second = rows(70, candidates=3), rows(70, candidates=2, seed=1)
    for row, more in zip(first, second, strict=True):
        more |= {key: row[key] for key in ("prompt", "prompt_token_ids")}
        more["candidates"][1]["text"] = row["candidates"][0]["text"]
    paths = [write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second)]
    calls = tmp_path / "calls.jsonl"
    (tmp_path / "g.py").write_text(
        "import json\n"
        "def share(prompt, responses, meta):\n"
        f"    open({str(calls)!r}, 'a').write(json.dumps([prompt, responses, meta]) + chr(10))\n"
        "    return [responses.count(response) / len(responses) for response in responses]\n"
    )
    functions = [f"{tmp_path / 'g.py'}:share", f"{folder / 'f.py'}:length"]
    run(paths, tmp_path / "s.jsonl", "--reward_fn", *functions)

    scored, seen = read(tmp_path / "s.jsonl"), read(calls)
    assert len(seen) == len(scored) == 70
    for row, (prompt, responses, given_meta) in zip(scored, seen, strict=True):
        texts = [candidate["text"] for candidate in row["candidates"]]
        assert len(texts) == 5 and responses == texts
        assert prompt == row["prompt"] and given_meta == {}
        for candidate in row["candidates"]:
            share, length = candidate["rewards"]["share"], candidate["rewards"]["length"]
            assert share == texts.count(candidate["text"]) / 5 and length == len(candidate["text"])
            assert candidate["reward"] == share + length
    assert {c["rewards"]["share"] for row in scored for c in row["candidates"]} >= {0.2, 0.4}


def test_a_function_of_responses_may_return_numpys_or_torchs_numbers(tmp_path, run, folder):
    (tmp_path / "g.py").write_text(
        "import numpy, torch\n"
        "def n(prompt, responses, meta): return numpy.arange(len(responses)) / 2\n"
        "def t(prompt, responses, meta): return torch.arange(len(responses)) > 1\n"
    )
    write(tmp_path / "c.jsonl", rows(3))
    functions = [f"{tmp_path / 'g.py'}:{name}" for name in "nt"]
    run(tmp_path / "c.jsonl", tmp_path / "s.jsonl", "--reward_fn", *functions)
    for row in read(tmp_path / "s.jsonl"):
        assert [c["rewards"]["n"] for c in row["candidates"]] == [0.0, 0.5, 1.0, 1.5]
        assert [c["rewards"]["t"] for c in row["candidates"]] == [0.0, 0.0, 1.0, 1.0]


def test_a_function_of_responses_sees_what_the_rewards_see(tmp_path, run, folder):
    """--strip_reasoning holds for it, too; an answer that a model has refused is not shown."""
    data = rows(1, candidates=3)
    for candidate, text in zip(data[0]["candidates"], ("plum", "plum " * 60, "fig"), strict=True):
        candidate["text"] = f"<think>pear</think>{text}"
    write(tmp_path / "c.jsonl", data)
    flags = ["--reward_model", folder / "rm", "--max_length", 80, "--strip_reasoning"]
    run(tmp_path / "c.jsonl", tmp_path / "s.jsonl", *flags, "--reward_fn", folder / "f.py:rank")
    (row,) = read(tmp_path / "s.jsonl")
    assert [c["rewards"]["rank"] for c in row["candidates"]] == [1.0, 0.0]
    dropped = {"too_long_for_reward_model": 1}
    assert meta(tmp_path / "s.jsonl")["counts"]["candidates"]["dropped"] == dropped


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (
            "few",
            'f.py:few on .*c.jsonl: row id "p0": returned 3 values for 4 answers; it must',
        ),
        (
            "one",
            'f.py:one on .*c.jsonl: row id "p0": returned float; it must return a list of 4',
        ),
        (
            "named",
            'f.py:named on .*c.jsonl: row id "p0": returned dict; it must return a list of 4',
        ),
        ("some_nan", 'f.py:some_nan on .*c.jsonl: row id "p1", candidate 2: the value is nan'),
        (
            "some_none",
            "f.py:some_none on .*c.jsonl: row id \"p1\", candidate 2: returned 'None'; a reward is",
        ),
        ("leaves", r'f.py:leaves on .*c.jsonl: row id "p0": the function called exit\(3\)'),
    ],
)
def test_a_function_of_responses_that_fails_is_named_with_its_row(
    tmp_path, run, folder, function, match
):
    data = rows(2)
    for row in data:
        for c in row["candidates"]:
            c["text"] = "plum"
    data[1]["candidates"][2]["text"] = "fig"
    refused(run, tmp_path, match, "--reward_fn", f"{folder / 'f.py'}:{function}", data=data)


def test_reward_function_files_that_fail(tmp_path, run):
    refused(run, tmp_path, "no such file", "--reward_fn", tmp_path / "nowhere.py:f")
    refused(run, tmp_path, "names no function", "--reward_fn", "length")
    (tmp_path / "bad.py").write_text("import no_such_module\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        run(tmp_path / "c.jsonl", tmp_path / "s.jsonl", "--reward_fn", tmp_path / "bad.py:f")


def test_an_infinite_score_of_a_model_stops_the_run(tmp_path, run, capsys):
    """PITFALLS 9: weights that overflowed."""
    model = small_models.reward_model(tmp_path / "rm")
    model.score.weight.data.fill_(torch.inf)
    model.save_pretrained(tmp_path / "rm")
    refused(
        run, tmp_path, 'row id "p0", candidate 0, rewards "rm"', "--reward_model", tmp_path / "rm"
    )
    assert "one by one" not in capsys.readouterr().err  # packing is not to blame


def test_models_that_are_no_reward_models(tmp_path, run, folder):
    """Two labels, a language model, code of its own, no template, no tokenizer, no folder: a remedy
    each.
    """
    small_models.reward_model(tmp_path / "two", labels=2)
    refused(run, tmp_path, "2 labels.*--reward_fn", "--reward_model", tmp_path / "two")
    refused(run, tmp_path, "2 labels", "--reward_model", folder / "ref", "--overwrite")

    small_models.reward_model(tmp_path / "remote")
    config = json.loads((tmp_path / "remote/config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_x.Reward"}
    (tmp_path / "remote/config.json").write_text(json.dumps(config))
    refused(
        run,
        tmp_path,
        "not run here.*--reward_fn",
        "--reward_model",
        tmp_path / "remote",
        "--overwrite",
    )

    small_models.causal_lm(tmp_path / "headless", num_labels=1)
    refused(
        run,
        tmp_path,
        "no weights for score.weight",
        "--reward_model",
        tmp_path / "headless",
        "--overwrite",
    )
    small_models.reward_model(tmp_path / "plain", template="none")
    refused(
        run, tmp_path, "p0.*no chat template", "--reward_model", tmp_path / "plain", "--overwrite"
    )
    for file in (tmp_path / "plain").glob("tokenizer*"):
        file.unlink()
    refused(run, tmp_path, "cannot be loaded", "--reward_model", tmp_path / "plain", "--overwrite")
    refused(
        run,
        tmp_path,
        "no such file or folder",
        "--reward_model",
        tmp_path / "nowhere",
        "--overwrite",
    )


@pytest.mark.parametrize(
    "arguments, match",
    [
        ([], "nothing to score with"),
        (
            ["--ref_model", "ref", "--chat_template_kwargs", "a=1"],
            "--chat_template_kwargs has no effect",
        ),
        (
            ["--ref_model", "ref", "--reward_weights", "1"],
            "--reward_weights has no effect without --reward_model or --reward_fn",
        ),
        (["--reward_fn", "f.py:length", "--max_length", "5"], "--max_length has no effect"),
        (["--ref_model", "ref", "--strip_reasoning"], "--strip_reasoning has no effect without"),
        (["--reward_fn", "f.py"], "f.py: names no function"),
        (["--reward_fn", "f.py:length", "--dtype", "fp32"], "--dtype has no effect"),
        (
            ["--reward_fn", "f.py:length", "--chat_template_kwargs", "a=1"],
            "--chat_template_kwargs has no effect",
        ),
        (
            ["--reward_model", "rm", "--tokens_per_batch", "0"],
            "_per_batch: .0. is not a whole number",
        ),
        (["--reward_fn", "f.py:length", "f.py:length"], "both called length"),
        (["--reward_fn", "f.py:length", "--reward_fn", "f.py:length"], "both called length"),
        (["--reward_model", "rm", "--chat_template_kwargs", "strict"], "is not a key=value"),
        (["--reward_model", "length=rm", "--reward_fn", "f.py:length"], "share a name"),
        (
            ["--reward_fn", "f.py:length", "--reward_weights", "1", "2"],
            "--reward_weights 1 2: .* length",
        ),
    ],
)  # PITFALLS 25
def test_flags_that_contradict_or_have_no_effect(
    tmp_path, run, folder, monkeypatch, arguments, match
):
    monkeypatch.chdir(folder)
    refused(run, tmp_path, match, *arguments)


def test_bad_input_names_file_and_line(tmp_path, run, folder):
    for line, match in (
        ("", "empty"),
        ("{}\n", r"c.jsonl:1: key .id., .* are missing"),
        ("{\n", "c.jsonl:1: not JSON"),
    ):
        (tmp_path / "c.jsonl").write_text(line)
        with pytest.raises(records.Stop, match=match):
            run(
                tmp_path / "c.jsonl",
                tmp_path / "s.jsonl",
                "--overwrite",
                "--reward_fn",
                folder / "f.py:length",
            )
    data = rows(2)
    del data[1]["candidates"][2]["finish_reason"]
    refused(
        run,
        tmp_path,
        r'c.jsonl:2: candidates\[2\]: key "finish_reason"',
        "--reward_fn",
        folder / "f.py:length",
        "--overwrite",
        data=data,
    )


def test_another_name_weight_or_function_is_another_run(tmp_path, run, folder):
    """PITFALLS 13: a setting that changes the result stops a restart; another may change."""
    write(tmp_path / "c.jsonl", rows(2))
    common = [tmp_path / "c.jsonl", tmp_path / "s.jsonl"]
    run(*common, "--reward_model", folder / "rm")
    for arguments, match in (
        (["--reward_model", f"a={folder / 'rm'}"], "--rewards"),
        (["--reward_model", folder / "rm", "--reward_weights", "2"], "--reward_weights"),
        (["--reward_model", folder / "rm", "--reward_fn", folder / "f.py:length"], "--functions"),
    ):
        with pytest.raises(records.Stop, match=match):
            run(*common, *arguments)
    written = (tmp_path / "s.jsonl").stat().st_mtime_ns
    run(*common, "--reward_model", folder / "rm", "--tokens_per_batch", "99")
    assert (tmp_path / "s.jsonl").stat().st_mtime_ns == written  # already done


def test_the_same_answer_twice_is_an_exact_tie(tmp_path, run, folder):
    """Packed beside others its score may differ in the last bit: rounding would rank the two."""
    data = rows(4)
    for row in data:
        row["candidates"] = [dict(c) for c in row["candidates"] for _ in range(2)]
    write(tmp_path / "c.jsonl", data)
    run(tmp_path / "c.jsonl", tmp_path / "s.jsonl", "--reward_model", folder / "rm")
    for row in read(tmp_path / "s.jsonl"):
        scores = [c["reward"] for c in row["candidates"]]
        assert scores[0::2] == scores[1::2]


def test_a_file_that_is_given_twice_is_refused(tmp_path, run, folder):
    """By whatever path: each of its candidates would count twice."""
    path = write(tmp_path / "c.jsonl", rows(2))
    (tmp_path / "link.jsonl").symlink_to(path)
    for second in (path, tmp_path / "link.jsonl", tmp_path / "." / "c.jsonl"):
        with pytest.raises(records.Stop, match="is given twice"):
            run([path, second], tmp_path / "s.jsonl", "--reward_fn", folder / "f.py:length")


def test_a_second_reward_of_the_same_name_is_refused(tmp_path, run, folder):
    """Two models are both called rm where each is the only one of its run."""
    path = write(tmp_path / "c.jsonl", rows(2))
    run(path, tmp_path / "s.jsonl", "--reward_model", folder / "rm")
    with pytest.raises(records.Stop, match='rewards has a "rm" from an earlier run'):
        run(tmp_path / "s.jsonl", tmp_path / "t.jsonl", "--reward_model", folder / "rm")
    run(tmp_path / "s.jsonl", tmp_path / "t.jsonl", "--reward_model", f"again={folder / 'rm'}")
    for row in read(tmp_path / "t.jsonl"):
        for one in row["candidates"]:
            assert one["rewards"]["rm"] == one["rewards"]["again"] == one["reward"]


def test_a_reward_model_with_a_template_warns_of_prompts_that_are_strings(
    tmp_path, run, folder, capsys
):
    data = rows(3, text=True)
    assert isinstance(data[0]["prompt"], str)
    path = write(tmp_path / "c.jsonl", data)
    run(path, tmp_path / "s.jsonl", "--reward_model", folder / "rm")
    assert (
        capsys.readouterr().err.count("has a chat template, which a prompt that is a string") == 1
    )


def test_a_reward_file_is_a_module_like_any_other(tmp_path, run):
    """dataclasses look it up by its name, and two functions share what it has loaded."""
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n"
        "import pickle\nfrom dataclasses import dataclass\n"
        "loaded = []\nloaded.append('a model')\n"
        "@dataclass\nclass Judge:\n    weight: float = 2.0\n"
        "def a(prompt, response, meta):\n"
        "    loaded.append('one more')\n    return pickle.loads(pickle.dumps(Judge())).weight\n"
        "def b(prompt, response, meta): return float(len(loaded))\n"
    )
    path = write(tmp_path / "c.jsonl", rows(1, candidates=2))
    run(path, tmp_path / "s.jsonl", "--reward_fn", tmp_path / "mine.py:a", tmp_path / "mine.py:b")
    found = [one["rewards"] for one in read(tmp_path / "s.jsonl")[0]["candidates"]]
    assert found == [{"a": 2.0, "b": 3.0}] * 2  # the model, and two calls of a


def test_an_error_in_a_reward_function_is_not_hidden_behind_one_that_it_has_handled(
    tmp_path, stage
):
    (tmp_path / "mine.py").write_text(
        "def handled(prompt, response, meta):\n"
        "    try:\n        open('cache.json')\n"
        "    except FileNotFoundError:\n        raise ValueError('no index built')\n"
        "def missing(prompt, response, meta):\n    open('answers.json')\n"
    )
    path = write(tmp_path / "c.jsonl", rows(1))

    def fails(function):
        flags = ["--candidates", path, "--output", tmp_path / "s.jsonl"]
        flags += ["--reward_fn", tmp_path / f"mine.py:{function}"]
        return stage("score.py", *flags, check=False).stderr

    said = fails("handled")
    assert "ValueError: no index built" in said and "Check the path" not in said
    said = fails("missing")
    assert "answers.json: No such file or directory (in --reward_fn" in said
    assert 'row id "p0", candidate 0). Check the path' in said


def test_a_limit_of_tokens_is_at_most_what_a_model_can_read(folder):
    """One --max_length for models of several sizes; RoBERTa counts positions from its pad token."""
    own = loaded(folder / "rm").max_length
    assert loaded(folder / "rm", max_length=10 * own).max_length == own
    assert loaded(folder / "rm", max_length=7).max_length == 7
    assert positions(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    assert positions(BertConfig(max_position_embeddings=512)) == 512


def test_a_reference_of_one_prompt_token_and_no_answer(tmp_path, run, folder):
    data = rows(1)
    data[0]["prompt_token_ids"] = [5]
    data[0]["candidates"][0]["token_ids"] = []
    path = write(tmp_path / "c.jsonl", data)
    run(path, tmp_path / "s.jsonl", "--ref_model", folder / "ref")
    assert read(tmp_path / "s.jsonl")[0]["candidates"][0]["ref_logprobs"] == {"ref": 0.0}


def test_what_a_reward_function_does_to_its_arguments_stays_there(tmp_path, run):
    (tmp_path / "f.py").write_text(
        "def f(prompt, response, meta):\n"
        "    prompt.append({'role': 'assistant', 'content': response})\n"
        "    meta['seen'] = meta.get('seen', 0) + 1\n"
        "    return float(len(prompt) + meta['seen'])\n"
    )
    data = rows(2)
    path = write(tmp_path / "c.jsonl", data)
    run(path, tmp_path / "s.jsonl", "--reward_fn", tmp_path / "f.py:f")
    for before, after in zip(data, read(tmp_path / "s.jsonl"), strict=True):
        assert after["prompt"] == before["prompt"] and after.get("meta") == before.get("meta")
        assert len({one["reward"] for one in after["candidates"]}) == 1  # no call sees another


def test_an_input_that_changes_while_it_is_read_stops_the_stage(tmp_path, run):
    """Its hash is in the metadata: nobody would know what was scored."""
    path = write(tmp_path / "c.jsonl", rows(3))
    (tmp_path / "f.py").write_text(
        "def f(prompt, response, meta):\n"
        f"    with open({str(path)!r}, 'a') as file: file.write(' \\n')\n"
        "    return 1.0\n"
    )
    with pytest.raises(records.Stop, match="c.jsonl: (was changed while it was read|is blank)"):
        run(path, tmp_path / "s.jsonl", "--reward_fn", tmp_path / "f.py:f")
    assert not (tmp_path / "s.jsonl").exists()
    os.utime(path)
    (tmp_path / "f.py").write_text(
        f"import os\ndef f(prompt, response, meta):\n    os.utime({str(path)!r})\n    return 1.0\n"
    )
    write(path, rows(3))
    with pytest.raises(records.Stop, match="c.jsonl: was changed while it was read"):
        run(path, tmp_path / "t.jsonl", "--reward_fn", tmp_path / "f.py:f")
    assert not (tmp_path / "t.jsonl").exists() and not (tmp_path / "t.jsonl.parts").exists()
