"""Which models work: each causal language model that transformers knows, small and random.

    python -m bench.models --save docs/models.md                 all of them, one after another
    python -m bench.models --only qwen3 gemma3_text              some; what they print is shown
    python -m bench.models --only qwen3 --save docs/models.md    … and their rows are replaced
    python -m bench.models --lora_rank 4                         all of them, trained with LoRA

A model is made from its configuration class with small sizes (SIZES and OWN below), random weights
and a tokenizer of bytes. Then it takes the steps of a user's model, by the same main() functions:

    1. generate.py --backend hf    two prompts, two answers each. A model that is refused there gets
                                   random answers, as if another engine had written them.
    2. dpo_train.py                two steps on those answers; its own checks are on. The second
                                   changes no weight, so the log-probs that it logs are those of the
                                   exported weights.
    3. compare                     with transformers' own attention, logits and autograd in fp32:
                                   the log-prob of each answer, and the gradient of the first step
    4. reload                      the exported folder in transformers: no weight is missing, some
                                   have changed, the log-probs are those that the trainer logged

What the table says about a model:

    packed     trained as dpo_train.py prefers: prompts shared, no padding
    padded     trained in padded batches, for the reason given
    refused    dpo_train.py said in one line why
    not built  transformers cannot make it from a small configuration, so nothing is known
    FAILED     a traceback, a disagreement or a time-out. None should be left

With --lora_rank the gradient is not compared; tests/test_lora.py compares some models' with peft's.

Each model runs in a process of its own, so that a crash or an endless loop ends that one only.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import io
import json
import multiprocessing
import os
import random
import re
import resource
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is on the hub

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

import dpo_train
import generate
import stage
from arguments import parse
from kernels.logprob import logprob_from_logits
from records import dump, read_jsonl

NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)  # model types: "llama", "qwen3", …
BETA = 0.1
VOCAB = 307  # a prime, and more than the tokenizer knows

# ---- small configurations ----------------------------------------------------------------------

# A small value, and the fields of a configuration that get it, wherever there is such a field.
SIZES = (
    (VOCAB, "vocab_size vocab_size_per_layer_input audio_vocab_size"),
    # Width
    (64, "hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim"),
    (64, "attention_hidden_size input_embedding_size output_embedding_size hidden_size_global"),
    (64, "lru_width backbone_hidden_size"),
    (96, "intermediate_size intermediate_size_mlp dense_intermediate_size feed_forward_size"),
    (96, "ffn_dim d_ff dff dim_ff d_inner n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim"),
    (16, "hidden_size_per_layer_input"),
    # Depth and length
    (2, "num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers encoder_layers"),
    (256, "max_position_embeddings n_positions n_ctx max_seq_len context_length"),
    # Heads
    (4, "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads"),
    (4, "decoder_attention_heads encoder_attention_heads linear_num_value_heads linear_num_heads"),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups"),
    (2, "linear_num_key_heads index_n_heads"),
    (16, "head_dim d_head dim_head kv_channels attention_head_size swa_head_dim global_head_dim"),
    (16, "linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim v_head_dim"),
    (16, "query_pre_attn_scalar kv_lora_rank q_lora_rank o_lora_rank laurel_rank"),
    (8, "qk_rope_head_dim qk_nope_head_dim rotary_dim"),
    # Experts
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts"),
    (1, "n_group topk_group"),
    (32, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size"),
    (32, "moe_shared_expert_intermediate_size shared_intermediate_size router_hidden_size"),
    # Recurrent layers
    (16, "mamba_d_state state_size ssm_state_size mamba_n_heads mamba_num_heads"),
    (8, "mamba_chunk_size chunk_size mamba_d_head mamba_head_dim"),
    (128, "mamba_d_ssm"),
    # Tokens far from equally likely, so that a mistake is seen: 0.02 gives nearly uniform ones.
    (0.1, "initializer_range init_std"),
    # Ids of the tokenizer below
    (0, "pad_token_id"),
    (1, "bos_token_id"),
    (2, "eos_token_id"),
    # Families that are encoders otherwise: BERT and its relatives, and XLM
    (True, "is_decoder causal"),
)
SMALL = {}
for size, names in SIZES:
    SMALL |= dict.fromkeys(names.split(), size)

# Model type -> arguments that its configuration needs, because it consists of other ones.
GEMMA4_DRAFT = {
    "model_type": "gemma4_text",
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}
NEEDED: dict[str, dict] = {
    "gemma4_assistant": {"text_config": GEMMA4_DRAFT},
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text"}},
    "musicgen": {
        "text_encoder": {"model_type": "t5"},
        "audio_encoder": {"model_type": "encodec"},
        "decoder": {"model_type": "musicgen_decoder"},
    },
}
MELODY = {"decoder": {"model_type": "musicgen_melody_decoder"}}
NEEDED["musicgen_melody"] = NEEDED["musicgen"] | MELODY

# Model type -> fields that need another value than SMALL's, and why.
OWN: dict[str, dict] = {
    # Sizes that SMALL cannot know
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "mamba2": {"num_heads": 8},  # times head_dim it is twice hidden_size
    "cpmant": {"prompt_length": 8},  # of its own, before each sequence
    # The product is the number of positions, the sum the hidden size.
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32]},
    "zaya": {"num_experts_per_tok": 1},  # it supports no other
    # A layer of each kind, where the kinds are no "layer_types"
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "zamba": {  # its attention is shared by the hybrid layers, so there are two of them
        "layers_block_type": ["linear_attention"] * 2 + ["hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 5,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
    },
    "gemma3n_text": {  # the last two layers take their keys from the first two
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    # Fields that published configurations have and the class does not set
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
            },
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96},
    },
    "dots1": {"n_shared_experts": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
}


def small_fields(kind: type) -> dict:
    """Arguments for a small configuration of the class `kind`."""
    needed = NEEDED.get(kind.model_type, {})
    default = kind(**copy.deepcopy(needed))  # some take their arguments apart
    fields = {}
    for name, value in default.to_dict().items():
        if name in SMALL:
            fields[name] = SMALL[name]
        elif isinstance(value, dict) and "model_type" in value and name in default.sub_configs:
            part = small_fields(type(getattr(default, name)))
            fields[name] = {"model_type": value["model_type"]} | part | needed.get(name, {})
    if "kv_lora_rank" in fields:  # DeepSeek's attention has no groups, and rotates a part of a head
        fields["num_key_value_heads"] = SMALL["num_attention_heads"]
        fields["head_dim"] = SMALL["qk_rope_head_dim"]
    # A layer of each kind that the default has, which the first two of its list need not be
    kinds = list(dict.fromkeys(default.to_dict().get("layer_types") or []))
    if len(kinds) > 1:
        fields["layer_types"] = kinds
        fields["num_hidden_layers"] = len(kinds)
    return fields | OWN.get(kind.model_type, {})


def build(name: str, folder: Path) -> None:
    """A small random model of the type `name` and its tokenizer, as a folder."""
    kind = CONFIG_MAPPING[name]
    config = kind(**small_fields(kind))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and no merges, and ChatML as template: id 0 pads, 1 begins a turn, 2 ends it."""
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    letters = Tokenizer(models.BPE())
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    letters.train_from_iterator([], trainer)
    result = PreTrainedTokenizerFast(
        tokenizer_object=letters, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    result.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return result


# ---- the steps of one model --------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the table. All are strings, as in the table."""

    name: str  # model type
    outcome: str  # packed, padded, refused, not built or FAILED
    sampling: str  # "hf", or "-" where generate.py --backend hf refuses
    gap: str  # the largest difference to transformers' own log-probs, nats per token
    why: str  # the reason for anything but packed and hf


class Disagreement(Exception):
    """Ours and transformers' own are different numbers."""


def call(main, script: str, *arguments) -> str:
    """Run a stage's main() as its command would; return its output. SystemExit: it has refused."""
    sys.argv = [script, *map(str, arguments)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        stage.run(main)
    return said.getvalue()


def sample(model: Path, folder: Path) -> list[dict]:
    """Two prompts, two answers each: rows of candidates.jsonl."""
    prompts, candidates = folder / "prompts.jsonl", folder / "candidates.jsonl"
    # Of two lengths, so that one row of the batch is padded.
    texts = ["name a fruit", "name three fruits for a picnic"]
    turns = [[{"role": "user", "content": text}] for text in texts]
    rows = [{"id": f"p{i}", "prompt": turn} for i, turn in enumerate(turns)]
    prompts.write_text("".join(map(dump, rows)))
    call(
        generate.main,
        "generate.py",
        "--model",
        model,
        "--prompts",
        prompts,
        "--output",
        candidates,
        "--backend",
        "hf",
        "--num_samples",
        2,
        "--max_new_tokens",
        8,
    )
    rows = list(read_jsonl(candidates, {}))
    for row, other in zip(rows, made_up(), strict=True):
        first, second = row["candidates"]
        if first["token_ids"] == second["token_ids"]:  # so sure a model gives no preference
            row["candidates"][1] = other["candidates"][1]
    return rows


def made_up() -> list[dict]:
    """Rows as sample() returns them, of random tokens instead of a policy's."""
    rng = random.Random(0)
    rows = []
    for i, length in enumerate((20, 40)):
        prompt = [rng.randrange(3, 250) for _ in range(length)]
        answers = [[rng.randrange(3, 250) for _ in range(n)] for n in (8, 6)]
        candidates = [{"token_ids": ids, "logprob": None, "model": None} for ids in answers]
        rows.append({"id": f"p{i}", "prompt_token_ids": prompt, "candidates": candidates})
    return rows


def write_pairs(rows: list[dict], file: Path) -> None:
    with open(file, "w") as out:
        for row in rows:
            pair = {"id": row["id"], "prompt": "-", "prompt_token_ids": row["prompt_token_ids"]}
            for answer, candidate in zip(("chosen", "rejected"), row["candidates"], strict=True):
                pair[answer] = "-"
                pair[f"{answer}_token_ids"] = candidate["token_ids"]
                pair[f"{answer}_logprob"] = candidate["logprob"]
                pair[f"{answer}_model"] = candidate["model"]
            out.write(dump(pair))


def plain_logprobs(model, rows: list[dict]) -> torch.Tensor:
    """[n, 2], log-probs of both answers of each row by transformers, a plain sequence at a time."""
    sums = []
    for row in rows:
        for candidate in row["candidates"]:
            answer = candidate["token_ids"]
            ids = torch.tensor([row["prompt_token_ids"] + answer])  # [1, L]
            n = len(answer)
            logits = model(input_ids=ids, use_cache=False).logits[0, -n - 1 : -1]  # [n, V]
            sums.append(logprob_from_logits(logits, ids[0, -n:]).sum())
    return torch.stack(sums).view(-1, 2)


def lengths(rows: list[dict]) -> torch.Tensor:
    """[n, 2], tokens of the answers."""
    return torch.tensor([[len(c["token_ids"]) for c in row["candidates"]] for row in rows])


def agree(what: str, gap: float, limit: float) -> float:
    if not gap <= limit:
        raise Disagreement(f"{what} differs from transformers' own by {gap:.1e}")
    return gap


def load_plain(folder: Path, **options):
    """The model as transformers loads it, in fp32, with an attention that omits nothing."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    )


def examine(name: str, folder: Path, lora_rank: int | None) -> Row:
    """All steps for one model, as the top of this file lists them."""
    model = folder / "model"
    try:
        build(name, model)
    except Exception as e:
        return Row(name, "not built", "-", "-", textwrap.shorten(one_line(e), 120))

    # 1. Answers
    notes = []
    try:
        rows = sample(model, folder)
        sampling = "hf"
    except SystemExit as e:
        rows = made_up()
        sampling = "-"
        notes.append(message(e, model))

    # 2. Two steps of training; the last changes nothing
    write_pairs(rows, folder / "pairs.jsonl")
    try:
        said = train(model, folder, lora_rank)
    except SystemExit as e:
        return Row(name, "refused", sampling, "-", message(e, model))
    meta = json.loads((folder / "policy.meta.json").read_text())
    packing = meta["arguments"]["packing"]
    if packing == "padded":
        notes.append(re.search(r": (.*), so batches are padded", said)[1])

    # 3. What was sampled and what was trained is what transformers computes
    plain = load_plain(model)
    expected = plain_logprobs(plain, rows)  # [n, 2]
    gaps = []
    for row, own in zip(rows, expected.tolist(), strict=True):
        for candidate, logprob in zip(row["candidates"], own, strict=True):
            if candidate["logprob"] is not None:
                gap = abs(candidate["logprob"] - logprob) / len(candidate["token_ids"])
                gaps.append(agree("a sampled answer's log-prob per token", gap, 1e-4))
    first, last = map(json.loads, (folder / "policy.train.jsonl").read_text().splitlines())
    if not lora_rank:
        gradient = first_gradient(plain, expected)
        agree("the gradient's norm (relative)", abs(first["grad_norm"] / gradient - 1), 1e-3)

    # 4. What was saved is what was trained
    reloaded, info = load_plain(folder / "policy", output_loading_info=True)
    lost = {kind: keys for kind, keys in info.items() if keys}
    if lost or not meta["changed_weights"]:
        raise Disagreement(f"export: {lost}, changed weights {meta['changed_weights']}")
    with torch.no_grad():
        saved = plain_logprobs(reloaded, rows).mean(0)  # [2]
    trained = torch.tensor([last["logps/chosen"], last["logps/rejected"]])
    gap = ((saved - trained).abs() / lengths(rows).float().mean(0)).max().item()
    gaps.append(agree("the exported policy's log-prob per token", gap, 1e-4))
    outcome = "padded" if packing == "padded" else "packed"
    return Row(name, outcome, sampling, f"{max(gaps):.0e}", "; ".join(notes))


def train(model: Path, folder: Path, lora_rank: int | None) -> str:
    """dpo_train.py's two steps, from folder/pairs.jsonl to folder/policy; returns its output.

    In the second, beta is 0 and so is the gradient; without Adam's first moment no weight changes.
    """
    lora = ["--lora_rank", lora_rank] if lora_rank else []
    return call(
        dpo_train.main,
        "dpo_train.py",
        *lora,
        "--model",
        model,
        "--pairs",
        folder / "pairs.jsonl",
        "--output",
        folder / "policy",
        "--learning_rate",
        1e-3,
        "--num_train_epochs",
        2,
        "--beta",
        BETA,
        0,
        "--adam_betas",
        0,
        0.95,
        "--warmup_ratio",
        0,
        "--save_dtype",
        "fp32",
    )


def first_gradient(plain, logprobs: torch.Tensor) -> float:
    """The norm of DPO's gradient at the first step, where the policy is its own reference.

    The loss is -log sigmoid(beta d) with d = 0, so its derivative to d is -beta / 2. logprobs:
    [n, 2], of `plain`.
    """
    margins = logprobs[:, 0] - logprobs[:, 1]  # [n]
    (-BETA / 2 * margins).mean().backward()
    norms = [p.grad.norm() for p in plain.parameters() if p.grad is not None]
    return torch.stack(norms).norm().item()


def message(refusal: SystemExit, model: Path) -> str:
    """What a user reads, without the folder that this run happened to use."""
    if not isinstance(refusal.code, str):
        raise Disagreement(f"ended with exit code {refusal.code} and no message")
    told = one_line(refusal.code.removeprefix("error: ")).replace(f"{model}: ", "")
    return told.removesuffix(".")


def one_line(text) -> str:
    kind = f"{type(text).__name__}: " if isinstance(text, Exception) else ""
    return re.sub(r"\s+", " ", kind + str(text)).strip().replace("|", "/")


# ---- all of them, and the table ----------------------------------------------------------------


def guarded(name: str, seconds: float, lora_rank: int | None = None) -> Row:
    """examine(name) in its own process; a crash or a time-out becomes a row, too."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    # A fork has everything imported already. No thread has been started yet that it would lack.
    context = multiprocessing.get_context("fork")
    process = context.Process(target=work, args=(name, lora_rank, sender))
    process.start()
    sender.close()
    try:
        in_time = receiver.poll(seconds)
        row = receiver.recv() if in_time else failed(name, f"no end after {seconds:g} s")
    except EOFError:
        process.join()
        row = failed(name, f"the process died, exit code {process.exitcode}")
    process.kill()
    process.join()
    return row


def work(name: str, lora_rank: int | None, sender) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            row = examine(name, Path(folder), lora_rank)
        except Exception as e:
            traceback.print_exc()
            row = failed(name, one_line(e))
    sender.send(row)


def failed(name: str, why: str) -> Row:
    return Row(name, "FAILED", "-", "-", why)


OUTCOMES = ("packed", "padded", "refused", "not built", "FAILED")
COLUMNS = "| model type | trains | samples | gap | remark |\n|---|---|---|---|---|\n"


def counts(rows: list[Row]) -> str:
    """One sentence: "178 model types: 90 packed, …"."""
    found = Counter(row.outcome for row in rows)
    shares = [f"{found[outcome]} {outcome}" for outcome in OUTCOMES if found[outcome]]
    return f"{len(rows)} model types: {', '.join(shares)}"


def line(row: Row) -> str:
    return f"| {' | '.join(row)} |\n"


def read_rows(file: Path) -> list[Row]:
    """The rows of a table that was written before; none where there is no such file."""
    text = file.read_text() if file.exists() else ""
    table = text.partition(COLUMNS)[2].splitlines()
    return [Row(*(cell.strip() for cell in row.strip("|").split("|"))) for row in table]


def document(rows: list[Row]) -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch")]
    return f"""{HEADER}
{counts(rows)}; {", ".join(versions)}, CPU.

{COLUMNS}{"".join(map(line, rows))}"""


HEADER = """# Which models work

Each causal language model that transformers knows, made small and random, sampled by generate.py,
trained by dpo_train.py, exported, loaded again, and compared with transformers' own attention,
logits and autograd in fp32:

    python -m bench.models --save docs/models.md

- `trains`: how dpo_train.py trains it. *packed*: without padding, each prompt computed once.
  *padded*: in padded batches. *refused*: it ends with the line in `remark`, before anything is
  trained. *not built*: transformers cannot make a small model of it here, so nothing is known.
- `samples`: hf where generate.py --backend hf writes answers, else - with its refusal in `remark`.
  vLLM was not tried.
- `gap`: the largest difference to transformers' own log-probs, in nats per token: of the sampled
  answers, and of the policy in training to the exported folder.

Sequences are short here. If a model's attention window is shorter than prompt + answer, packed
becomes padded. Models of pictures or sound are given text alone.
"""


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help="default: all")
    p.add_argument("--save", type=Path, help="the table; rows of models not asked for stay")
    p.add_argument("--timeout", type=float, default=120, help="seconds per model")
    p.add_argument("--lora_rank", type=int, help="train with LoRA; default: in full")
    args = parse(p)
    if args.lora_rank and args.save:
        p.error("the table of --save is about full training: leave out --lora_rank")
    if not args.only:  # nobody reads the warnings of hundreds of models
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
    rows = {row.name: row for row in read_rows(args.save) if row.name in NAMES} if args.save else {}
    began = time.time()
    for name in args.only or NAMES:
        rows[name] = guarded(name, args.timeout, args.lora_rank)
        print(line(rows[name]), end="", flush=True)
        if args.save:
            args.save.write_text(document([rows[n] for n in NAMES if n in rows]))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    print(f"{counts(list(rows.values()))}; {time.time() - began:.0f} s, {cpu:.0f} s of a core")
    sys.exit(any(row.outcome == "FAILED" for row in rows.values()))


if __name__ == "__main__":
    main()
