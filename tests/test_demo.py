"""The demo: gold is what its formula says, its files are what the contract says, and a build is
repeatable and whole.
"""

import json
import random
import statistics
import subprocess
import sys
import time

import pytest

import records
from conftest import ROOT
from demo.gold import CATEGORIES, gold
from demo.task import make_prompts, sloppy_answer, varied_answer
from demo.verifiable import correct
from stage import hash_path

TINY = ["--policy_steps", "2", "--comparisons", "32"]
THREE_FRUITS = {"category": "fruits", "count": 3}


@pytest.fixture(scope="module")
def built(stage, tmp_path_factory):
    """A build of a few steps: the same code as the real one, only shorter."""
    folder = tmp_path_factory.mktemp("demo") / "build"
    stage("demo/build.py", "--output", folder, *TINY)
    return folder


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("plum, fig, pear", 1.0),
        ("Plum, fig and pear.", 1.0),
        (" plum,fig\npear\n", 1.0),
        ("plum, fig", 2 / 3),  # one is missing
        ("plum, fig, pear, apple", 3 / 4),  # one too many
        ("plum, fig, plum", 2 / 3),  # a repeat is not a new fruit
        ("plum, plum, plum, plum, plum", 1 / 5),
        ("plum, fig, wolf", 2 / 3),  # one is not a fruit
        ("wolf, bear, dog", 0.0),  # another category
        ("plum fig pear", 0.0),  # no list
        ("plums, figs, pears", 0.0),  # no words of the game
        ("plum, , fig, pear", 3 / 4),  # an empty item is an item
        ("", 0.0),
        (" ,,\n, and ", 0.0),
        ("<|im_end|> \x00 日本 " * 50, 0.0),
    ],
)
def test_gold(answer, expected):
    """gold = min(distinct right words, count) / max(count, items), whatever the text."""
    assert gold("three fruits", answer, THREE_FRUITS) == pytest.approx(expected)
    assert gold(
        [{"role": "user", "content": "three fruits"}], answer, THREE_FRUITS
    ) == pytest.approx(expected)


@pytest.mark.parametrize(
    "answer",
    ["plum, fig, pear", "kiwi, lime, date"],
)
def test_the_verifiable_reward_is_1_where_all_is_right(answer):
    assert correct("three fruits", answer, THREE_FRUITS) == gold("", answer, THREE_FRUITS) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "plum, fig",  # one is missing
        "plum, fig, pear, apple",  # one too many
        "plum, fig, plum",  # a repeat
        "plum, fig, wolf",  # another category
        "plum, fig and pear",  # another form
        "Plum, fig, pear",
        "plum, fig, pear.",
        "plum,fig,pear",
        "",
    ],
)
def test_the_verifiable_reward_is_0_where_anything_is_wrong(answer):
    assert correct("three fruits", answer, THREE_FRUITS) == 0.0


def scored_with(stage, folder, function):
    """Three rows of four answers, of which two are right and one of these twice -> their rewards"""
    texts = ["plum, fig, pear", "kiwi, lime, date", "plum, fig", "plum, fig, pear"]
    candidates = [
        {
            "text": text,
            "token_ids": [1, 2],
            "logprob": -1.0,
            "finish_reason": "stop",
            "temperature": 1.0,
            "model": "m",
        }
        for text in texts
    ]
    row = {"prompt": "three fruits", "meta": THREE_FRUITS, "prompt_token_ids": [1]}
    rows = [row | {"id": f"p{i}", "candidates": candidates} for i in range(3)]
    (folder / "c.jsonl").write_text("".join(map(records.dump, rows)))
    flags = ["--candidates", folder / "c.jsonl", "--output", folder / "s.jsonl"]
    stage("score.py", *flags, "--reward_fn", f"demo/verifiable.py:{function}")
    scored = records.read_jsonl(folder / "s.jsonl", records.SCORED)
    return [[candidate["reward"] for candidate in row["candidates"]] for row in scored]


def test_the_verifiable_rewards_in_score_py(stage, tmp_path):
    """One function is called per answer, the other per prompt: it takes from the answer that was
    written twice.
    """
    assert scored_with(stage, tmp_path, "correct") == [[1.0, 1.0, 0.0, 1.0]] * 3
    (tmp_path / "s.jsonl").unlink()
    assert scored_with(stage, tmp_path, "correct_and_rare") == [[0.5, 1.0, 0.0, 0.5]] * 3


def test_gold_refuses_a_prompt_of_another_game():
    with pytest.raises(ValueError, match="category"):
        gold("three fruits", "plum", {})


def test_no_word_belongs_to_two_categories():
    """Otherwise the gold of an answer would not be one number."""
    words = [word for group in CATEGORIES.values() for word in group]
    assert len(words) == len(set(words)) == 60


def test_prompts_are_split_once_and_for_all():
    """PITFALLS 15: training and held-out prompts share neither id nor text; another seed is another
    split.
    """
    prompts, heldout = make_prompts(seed=0)
    assert (len(prompts), len(heldout)) == (2104, 200)
    for key in (lambda row: row["id"], lambda row: row["prompt"][0]["content"]):
        assert len({key(row) for row in prompts + heldout}) == 2304
    assert {row["prompt"][0]["content"] for row in make_prompts(1)[1]} != {
        row["prompt"][0]["content"] for row in heldout
    }


def test_writers_from_careless_to_careful_write_better_answers_than_the_sloppy_one():
    """On average and at their best; each writes words of the game in the game's form."""
    rng = random.Random(0)
    sloppy = [gold("", sloppy_answer(THREE_FRUITS, rng), THREE_FRUITS) for _ in range(2000)]
    varied = [gold("", varied_answer(THREE_FRUITS, rng), THREE_FRUITS) for _ in range(2000)]
    assert statistics.mean(varied) > statistics.mean(sloppy) + 0.1
    assert statistics.stdev(varied) > 0.3 and min(varied) == 0 and max(varied) == 1


def test_a_reward_model_of_varied_answers_is_another_one(built, stage, tmp_path):
    """Prompts and policy stay what they are: only what the annotator compares is different."""
    stage("demo/build.py", "--output", tmp_path / "varied", "--writers", "varied", *TINY)
    for name in ("prompts.jsonl", "heldout.jsonl", "policy/model.safetensors"):
        assert hash_path(tmp_path / "varied" / name) == hash_path(built / name)
    reward_model = "reward_model/model.safetensors"
    assert hash_path(tmp_path / "varied" / reward_model) != hash_path(built / reward_model)


def test_files_follow_the_contract(built):
    assert records.count_rows(built / "prompts.jsonl", records.PROMPT) == 2104
    assert records.count_rows(built / "heldout.jsonl", records.PROMPT) == 200
    for row in records.read_jsonl(built / "heldout.jsonl", records.PROMPT):
        assert [turn["role"] for turn in row["prompt"]] == ["user"]
        assert gold(row["prompt"], "nothing of the kind", row["meta"]) == 0.0
    meta = json.loads((built.parent / "build.meta.json").read_text())
    assert meta["counts"]["prompts"] == {"in": 2304, "out": 2104, "dropped": {"held out": 200}}


def test_models_load_as_any_other(built):
    """Policy, reward model and tokenizers through transformers' Auto classes; the reward head has
    one label.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    for name, kind in (
        ("policy", AutoModelForCausalLM),
        ("reward_model", AutoModelForSequenceClassification),
    ):
        tokenizer = AutoTokenizer.from_pretrained(built / name)
        model = kind.from_pretrained(built / name).eval()
        assert model.dtype == torch.float32
        assert model.config.vocab_size == len(tokenizer) <= 512
        assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
        # A tensor that is missing would be filled at random, and two loads would differ.
        again = kind.from_pretrained(built / name)
        assert all(
            torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
        )
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 1)


def test_template_has_no_bos_and_every_turn_ends_in_eos(built):
    """PITFALLS 1 and 5: no BOS, rendered and encoded or in one go; the stop id of generation is the
    template's.
    """
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(built / "policy")
    conversation = [
        {"role": "user", "content": "name two trees"},
        {"role": "assistant", "content": "oak, fir"},
    ]
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert text == (
        "<|im_start|>user\nname two trees<|im_end|>\n<|im_start|>assistant\noak, fir<|im_end|>\n"
    )
    ids = tokenizer.apply_chat_template(conversation).input_ids
    assert tokenizer.bos_token_id is None
    assert ids == tokenizer.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(tokenizer.eos_token_id) == 2
    assert GenerationConfig.from_pretrained(built / "policy").eos_token_id == tokenizer.eos_token_id
    # What comes before the answer is a prefix of the whole: nothing merges at the boundary
    # (PITFALLS 3).
    prompt = tokenizer.apply_chat_template(conversation[:1], add_generation_prompt=True).input_ids
    assert ids[: len(prompt)] == prompt
    assert ids[len(prompt) : -1] == tokenizer.encode("oak, fir") + [tokenizer.eos_token_id]


def test_any_text_survives_the_tokenizer(built):
    """PITFALLS 2: byte-level, so decode(encode(text)) == text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built / "policy")
    for text in ("plum, fig", " plum ,fig", "Grüße,  日本\n\n\t🙂 None", "a , b. c!", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_another_seed_is_another_demo(built, stage, tmp_path):
    """PITFALLS 14: split, tokenizer and weights are a function of the seed (the same seed: the last
    test here).
    """
    stage("demo/build.py", "--output", tmp_path / "other", "--seed", "1", *TINY)
    for name in (
        "prompts.jsonl",
        "heldout.jsonl",
        "policy/model.safetensors",
        "reward_model/model.safetensors",
    ):
        assert hash_path(tmp_path / "other" / name) != hash_path(built / name)


def test_built_once(built, stage):
    """The same command does nothing; another seed for the same folder stops and names it (PITFALLS
    13).
    """
    before = hash_path(built)
    assert "already done" in stage("demo/build.py", "--output", built, *TINY).stdout
    refused = stage("demo/build.py", "--output", built, "--seed", "7", *TINY, check=False)
    assert refused.returncode != 0 and "--seed: was 0, is 7" in refused.stderr
    assert hash_path(built) == before


def test_killed_build_leaves_nothing_that_looks_finished(built, stage, tmp_path):
    """PITFALLS 36 and 14: killed between the first file of the folder and the last, then built: the
    same bytes.
    """
    folder = tmp_path / "build"
    command = [sys.executable, str(ROOT / "demo/build.py"), "--output", str(folder), *TINY]
    building = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    while not (tmp_path / "build.iterdpo-unfinished" / "prompts.jsonl").exists():
        assert building.poll() is None, "the build ended before it could be killed"
        time.sleep(0.001)
    building.kill()
    building.wait()
    assert not folder.exists()

    stage("demo/build.py", "--output", folder, *TINY)
    assert hash_path(folder) == hash_path(built)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build", "build.meta.json"]
