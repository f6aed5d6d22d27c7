"""bench/models.py, the table that it wrote, and what its models found in the stages."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench import models as zoo
from conftest import ROOT
from kernels.attention import causal_lm_refusal, positions
from kernels.heads import lm_head
from records import Stop
from training import checks, fsdp, speed

TABLE = ROOT / "docs/models.md"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What the bench's own command says of a few: {model type: Row}."""
    file = tmp_path_factory.mktemp("zoo") / "models.md"
    names = ["qwen3", "gemma2", "gemma4_text", "afmoe", "bart", "xlnet"]
    command = [sys.executable, "-m", "bench.models", "--only", *names, "--save", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {row.name: row for row in zoo.read_rows(file)}


def test_a_plain_model_is_packed_and_agrees_with_transformers(rows):
    row = rows["qwen3"]
    assert (row.outcome, row.sampling, row.why) == ("packed", "hf", "")
    assert float(row.gap) < 1e-5


def test_a_soft_capped_model_is_padded_and_says_why(rows):
    row = rows["gemma2"]
    assert (row.outcome, row.sampling) == ("padded", "hf")
    assert "soft-caps" in row.why


def test_layers_of_several_sizes_do_not_end_a_training_that_is_done(rows):
    """Gemma 4's configs raise where a head's size is read that differs between layers."""
    assert rows["gemma4_text"].outcome == "packed"


def test_weights_that_the_models_own_code_freezes_are_exported_as_they_were(rows):
    """AFMoE's routers have such biases: the training was done, and its export failed."""
    assert rows["afmoe"].outcome == "packed"


def test_pitfalls_20_a_model_without_position_ids_is_not_sampled_in_padded_batches(rows):
    row = rows["bart"]
    assert (row.outcome, row.sampling) == ("padded", "-")
    assert "another function in padded batches" in row.why


def test_a_model_that_looks_both_ways_is_refused(rows):
    row = rows["xlnet"]
    assert row.outcome == "refused"
    assert "depend on those after it" in row.why


def test_what_is_wrong_in_a_model_becomes_a_row_and_not_the_end():
    """A model type that does not exist is an example of what can go wrong."""
    script = """if True:
        from bench import models
        print(models.guarded("no such", 60))
        print(models.guarded("llama", 0.01))
    """
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    missing, slow = done.stdout.splitlines()[-2:]
    assert "not built" in missing and "no such" in missing
    assert "FAILED" in slow and "no end after 0.01 s" in slow


# ---- the table


def test_the_table_has_a_row_for_each_model_type_of_the_pinned_transformers():
    pinned = re.search(r"^transformers==(.+)$", (ROOT / "requirements.txt").read_text(), re.M)[1]
    assert f"transformers {pinned}," in TABLE.read_text()
    import transformers

    if transformers.__version__ != pinned:
        pytest.skip(
            f"transformers {transformers.__version__} is installed, and the table is of {pinned}"
        )
    assert [row.name for row in zoo.read_rows(TABLE)] == zoo.NAMES


def test_the_table_counts_its_rows_and_none_has_failed():
    rows = zoo.read_rows(TABLE)
    assert zoo.counts(rows) in TABLE.read_text()
    assert not [row.name for row in rows if row.outcome not in zoo.OUTCOMES[:-1]]
    assert all(row.why for row in rows if row.outcome != "packed" or row.sampling != "hf")


def test_the_readme_counts_as_the_table_does():
    assert zoo.counts(zoo.read_rows(TABLE)) in " ".join((ROOT / "README.md").read_text().split())


# ---- what the models found


def test_a_config_without_heads_has_no_flops_instead_of_an_error():
    mamba = AutoConfig.for_model("mamba", hidden_size=64, num_hidden_layers=2)
    assert speed.flops(1e6, mamba, [(5, 3, 3)]) is None


def test_layers_of_different_sizes_are_added_up():
    config = AutoConfig.for_model(
        "gemma4_text", **zoo.small_fields(type(AutoConfig.for_model("gemma4_text")))
    )
    sizes = [(layer.num_attention_heads, layer.head_dim) for layer in config.per_layer_config]
    assert len(sizes) == 2
    assert speed.attention_width(config) == sum(heads * size for heads, size in sizes)


def test_minus_one_means_no_limit_of_positions():
    assert positions(AutoConfig.for_model("xlnet")) == sys.maxsize
    assert positions(AutoConfig.for_model("llama", max_position_embeddings=77)) == 77


def test_an_encoder_decoder_is_refused_by_its_config():
    assert "no decoder-only" in causal_lm_refusal(AutoConfig.for_model("bart"))
    assert causal_lm_refusal(AutoConfig.for_model("llama")) is None


def small(name: str, **fields):
    kind = type(AutoConfig.for_model(name))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        kind(**zoo.small_fields(kind) | fields), dtype=torch.float32
    ).eval()


def test_causality_is_looked_at_and_not_read_from_a_name():
    pair = {"prompt": np.arange(10, 16), "chosen": np.arange(20, 26), "rejected": np.arange(3)}
    checks.check_causal(small("xlm", causal=True), pair, "fp32", "here")
    with pytest.raises(Stop, match="here: .* after it"):
        checks.check_causal(small("xlm", causal=False), pair, "fp32", "here")


def test_heads_whose_scale_is_none_or_divides():
    assert lm_head(small("cohere_compass_text"))["scale"] == 1.0
    assert lm_head(small("inkling_text"))["scale"] == 1 / 24


def test_weights_that_layers_share_are_named(tmp_path):
    model = small("zamba")
    model.tie_weights()
    first, second = fsdp.shared_weight(model)
    assert first != second and "layers.2.shared_transf" in first + second
    assert fsdp.shared_weight(small("llama", tie_word_embeddings=True)) is None


def test_a_tie_that_the_code_does_not_keep_ends_in_a_sentence(tmp_path, stage):
    zoo.build("cpmant", tmp_path / "model")
    zoo.write_pairs(zoo.made_up(), tmp_path / "pairs.jsonl")
    flags = [
        "--model",
        tmp_path / "model",
        "--pairs",
        tmp_path / "pairs.jsonl",
        "--output",
        tmp_path / "policy",
    ]
    done = stage("dpo_train.py", *flags, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "ties head and embedding" in done.stderr
    assert not Path(tmp_path / "policy").exists()
