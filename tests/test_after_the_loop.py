"""What becomes of a run: AlpacaEval's answers, LLaMA-Factory's pairs, a model card on the hub."""

import json
import re
import shutil
import sys

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ROOT
from records import dump
from small_models import causal_lm
from stage import hash_path, meta_path_of
from test_report import small_run, write_meta_of

sys.path.insert(0, str(ROOT / "tools"))
import export_pairs


def lines(path, rows):
    path.write_text("".join(map(dump, rows)))
    return path


def counts(output):
    return json.loads(meta_path_of(output).read_text())["counts"]


# ---- LLaMA-Factory -----------------------------------------------------------------------------


def turn(role, content="text"):
    return {"role": role, "content": content}


def pair(*prompt, chosen="yes", rejected="no", **more):
    answers = {"chosen": [turn("assistant", chosen)], "rejected": [turn("assistant", rejected)]}
    return {"id": "p", "prompt": list(prompt), "score_chosen": 1.0} | answers | more


def imported(row, info):
    """What LLaMA-Factory's SharegptDatasetConverter makes of a row: our pair, if all is right."""
    assert info["formatting"] == "sharegpt" and info["ranking"] is True and "tags" not in info
    role = {"human": "user", "gpt": "assistant", "system": "system"}  # its default tags
    columns = info["columns"]
    messages = row[columns["messages"]]
    chat = messages[1:] if messages[0]["from"] == "system" else messages
    assert len(chat) % 2 == 1
    assert [m["from"] for m in chat] == [("human", "gpt")[i % 2] for i in range(len(chat))]

    def back(message):
        assert message.keys() == {"from", "value"}
        return turn(role[message["from"]], message["value"])

    chosen, rejected = row[columns["chosen"]], row[columns["rejected"]]
    assert chosen["from"] == rejected["from"] == "gpt"
    return [back(m) for m in messages], [back(chosen)], [back(rejected)]


def test_pairs_go_to_llama_factory_and_back(tmp_path, stage):
    """Every text, of several files, with line breaks, quotes and other scripts."""
    hostile = 'a "b"\n\\ 日本 🙂 </s>'
    pairs = [
        pair(turn("user"), chosen=hostile),
        pair(turn("system", hostile), turn("user", hostile), rejected=hostile),
        pair(turn("user", "1"), turn("assistant", "2"), turn("user", "3")),
    ]
    files = [lines(tmp_path / "a.jsonl", pairs[:2]), lines(tmp_path / "b.jsonl", pairs[2:])]
    output = tmp_path / "exported"
    flags = ["--format", "llamafactory", "--output", output]
    stage("tools/export_pairs.py", "--pairs", *files, *flags)

    (info,) = json.loads((output / "dataset_info.json").read_text()).values()
    rows = json.loads((output / info["file_name"]).read_text())
    original = [(p["prompt"], p["chosen"], p["rejected"]) for p in pairs]
    assert [imported(row, info) for row in rows] == original
    assert counts(output)["rows"] == {"in": 3, "out": 3, "dropped": {}}
    assert "already done" in stage("tools/export_pairs.py", "--pairs", *files, *flags).stdout


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "raw", "chosen": "yes", "rejected": "no"}, "text_prompt"),
        (pair(turn("user"), chosen="x", rejected="y", prompt=[turn("user")]), None),
        (pair(turn("user")) | {"rejected": [turn("assistant")] * 2}, "several_messages"),
        (pair(turn("user")) | {"chosen": [turn("user")]}, "several_messages"),
        (pair(turn("user")) | {"chosen": "text"}, "several_messages"),
        (pair(turn("user"), turn("user")), "turns_out_of_order"),
        (pair(turn("user"), turn("assistant")), "turns_out_of_order"),
        (pair(turn("assistant")), "turns_out_of_order"),
        (pair(turn("system")), "turns_out_of_order"),
        (pair(turn("user"), turn("system"), turn("user")), "turns_out_of_order"),
        (pair(turn("user"), turn("tool"), turn("user")), "turns_out_of_order"),
    ],
)
def test_what_llama_factory_would_skip_is_named(row, reason):
    assert export_pairs.why_not(row) == reason


def test_what_is_not_exported_is_counted_and_nothing_at_all_is_an_error(tmp_path, stage):
    bad = pair(turn("assistant"))
    source = lines(tmp_path / "p.jsonl", [pair(turn("user")), bad, bad])
    flags = ["--pairs", source, "--format", "llamafactory", "--output", tmp_path / "out"]
    stage("tools/export_pairs.py", *flags)
    dropped = {"turns_out_of_order": 2}
    assert counts(tmp_path / "out")["rows"] == {"in": 3, "out": 1, "dropped": dropped}
    lines(source, [bad])
    done = stage("tools/export_pairs.py", *flags, "--overwrite", check=False)
    assert done.returncode == 1 and "none of 1 pairs can be exported" in done.stderr


# ---- AlpacaEval --------------------------------------------------------------------------------


def test_answers_are_alpaca_evals(tmp_path, stage):
    """One answer per prompt, the first that was sampled and not the best; the rest is counted."""

    def row(id, prompt, *texts):
        candidates = []
        for i, text in enumerate(texts):
            answer = {"text": text, "token_ids": [1], "logprob": -1.0, "finish_reason": "stop"}
            candidates.append(answer | {"model": "m", "rewards": {"rm": i}, "reward": float(i)})
        return {"id": id, "prompt": prompt, "prompt_token_ids": [1], "candidates": candidates}

    rows = [
        row("a", [turn("user", "name a tree")], "oak", "an even better oak"),
        row("b", [turn("system", "short"), turn("user", "name a fruit")], "fig 日本"),
        row("c", "raw text", "and so on"),
        row("d", [turn("user"), turn("assistant"), turn("user")], "x"),
        row("e", [turn("user", "silent")]),
        row("f", [turn("system", "long"), turn("user", "name a fruit")], "a plum"),
    ]
    source, output = lines(tmp_path / "s.jsonl", rows), tmp_path / "model_outputs.json"
    flags = ["--candidates", source, "--generator", "mine", "--output", output]
    stage("tools/answers.py", *flags)
    shown = {"dataset": "heldout", "generator": "mine"}
    assert json.loads(output.read_text()) == [
        shown | {"instruction": "name a tree", "output": "oak"},
        shown | {"instruction": "name a fruit", "output": "fig 日本"},
        shown | {"instruction": "raw text", "output": "and so on"},
    ]
    dropped = {"several_turns": 1, "no_answer": 1, "same_instruction": 1}
    assert counts(output)["rows"] == {"in": 6, "out": 3, "dropped": dropped}
    lines(source, rows[3:5])
    done = stage("tools/answers.py", *flags, "--overwrite", check=False)
    assert done.returncode == 1 and "no row has an answer to show" in done.stderr


# ---- a model card ------------------------------------------------------------------------------

CONFIG = {
    "MODEL": "Qwen/Qwen3-0.6B@c1899de289a04d12100db370d81485cdf75e47ca",
    "REWARD_MODEL": "/home/someone/secret/rm",
    "REWARD_FN": "",
    "JUDGE": "",
    "REF": "prev",
    "SEED": "0",
    "PROMPTS_PER_ITER": "512",
    "EXTRA_PAIRS": "/home/someone/old.jsonl",
    "EXTRA_PAIRS_ITERS": "first",
}
TRAINING = {
    "loss_type": "sigmoid",
    "beta": [0.1],
    "nll_coef": 0.0,
    "learning_rate": 5e-7,
    "lr_scheduler": "cosine",
    "batch_size": 128,
    "num_train_epochs": 1,
}


@pytest.fixture
def finished(tmp_path):
    """A run whose prompts are from the hub, with a policy."""
    run = small_run(tmp_path / "run")
    config = CONFIG | {"PROMPTS": str(tmp_path / "prompts.jsonl")}
    (run / "config.json").write_text(json.dumps(config))
    write_meta_of(tmp_path / "prompts.jsonl", arguments={"dataset": "HuggingFaceH4/ultrafeedback"})
    folder = run / "iter_01"
    sampling = {"num_samples": 8, "max_new_tokens": 1024}
    write_meta_of(folder / "candidates.jsonl", arguments=sampling)
    write_meta_of(folder / "pairs.jsonl", arguments={"strategy": "max_min"})
    write_meta_of(folder / "policy", arguments=TRAINING)
    causal_lm(folder / "policy")
    return run


def read_card(path):
    _, front, body = path.read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_card_says_where_the_policy_comes_from_and_what_it_scored(finished, stage):
    policy = finished / "iter_01/policy"
    before = hash_path(policy)
    stage("tools/model_card.py", finished)
    front, body = read_card(policy / "README.md")
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "online-dpo", "iterative-dpo", "rlhf"],
        "base_model": "Qwen/Qwen3-0.6B",
        "datasets": ["HuggingFaceH4/ultrafeedback"],
    }
    for text in (
        "arxiv.org/abs/2305.18290",
        "reward model `rm`",
        "the policy of the iteration before",
        "- answers per prompt: 8\n",
        "- learning rate: 5e-07, cosine\n",
        "- pairs: max_min; 2 in the last iteration\n",
        "- pairs of other origin: old.jsonl, iterations: first\n",
        "2.250±1.750",  # the reward, as in test_report.py
        "## Limits",
    ):
        assert text in body, text
    assert "/home" not in body and str(finished.parent) not in body

    # It is a folder for the hub: card and model, whose identity is the same as before.
    assert hash_path(policy) == before
    AutoModelForCausalLM.from_pretrained(policy)
    AutoTokenizer.from_pretrained(policy)


def test_the_hubs_library_reads_the_card(finished, stage):
    from huggingface_hub import ModelCard

    stage("tools/model_card.py", finished)
    data = ModelCard.load(finished / "iter_01/policy/README.md").data
    assert data.base_model == "Qwen/Qwen3-0.6B" and data.library_name == "transformers"


def test_a_card_of_a_local_model_names_no_base_model_of_the_hub(finished, stage, tmp_path):
    config = json.loads((finished / "config.json").read_text())
    config |= {"MODEL": str(tmp_path / "mine"), "PROMPTS": str(tmp_path / "none.jsonl")}
    (finished / "config.json").write_text(json.dumps(config))
    stage("tools/model_card.py", finished, "1", "--output", tmp_path / "card.md")
    front, body = read_card(tmp_path / "card.md")
    assert "base_model" not in front and "datasets" not in front
    assert "Fine-tuned from `mine`" in body and str(tmp_path) not in body
    assert not (finished / "iter_01/policy/README.md").exists()


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda run: (run / "config.json").unlink(), "has no config.json"),
        (lambda run: shutil.rmtree(run / "iter_01"), "no trained policy was evaluated yet"),
        (lambda run: shutil.rmtree(run / "iter_01/policy"), "was not kept"),
    ],
)
def test_a_card_of_what_is_not_there_is_refused(finished, stage, break_it, says):
    break_it(finished)
    done = stage("tools/model_card.py", finished, check=False)
    assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1


def test_a_card_that_somebody_wrote_is_not_written_over(finished, stage):
    card = finished / "iter_01/policy/README.md"
    card.write_text("mine")
    done = stage("tools/model_card.py", finished, check=False)
    assert done.returncode == 1 and f"{card}: exists." in done.stderr
    assert card.read_text() == "mine"
    stage("tools/model_card.py", finished, "--overwrite")
    assert card.read_text().startswith("---\nlibrary_name")


def test_an_iteration_that_was_not_evaluated_is_named(finished, stage):
    done = stage("tools/model_card.py", finished, "2", check=False)
    assert done.returncode == 1 and "iteration 2 was not evaluated, only 1" in done.stderr


def test_a_card_changes_no_policy_but_any_other_file_does(tmp_path):
    """README.md of the folder itself: within folders of the folder it is content."""
    folder = tmp_path / "policy"
    (folder / "more").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    before = hash_path(folder)
    (folder / "README.md").write_text("a card")
    assert hash_path(folder) == before
    (folder / "more/README.md").write_text("content")
    assert hash_path(folder) != before


# ---- the commands of docs/usage.md -------------------------------------------------------------


def test_the_commands_after_the_loop_are_those_of_the_tools():
    """Each tool's flags stand in its help."""
    usage = (ROOT / "docs/usage.md").read_text()
    section = usage[usage.index("## After the loop") :].split("\n## ")[0]
    joined = section.replace("\\\n", " ")
    for tool in ("answers", "model_card", "export_pairs"):
        (command,) = re.findall(rf"python tools/{tool}\.py (.*)", joined)
        source = (ROOT / f"tools/{tool}.py").read_text()
        for flag in re.findall(r"--\w+", command):
            assert f'"{flag}"' in source, (tool, flag)
