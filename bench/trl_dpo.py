"""Do we and TRL's DPOTrainer compute the same thing? Five steps on the same pairs.jsonl, in fp32,
side by side.

    python -m bench.trl_dpo             needs trl==1.16.0 in addition to requirements.txt
    python -m bench.trl_dpo --model runs/demo/iter_01/policy \\
        --pairs runs/demo/iter_02/pairs.jsonl --limit 64

Both train the same weights on the whole file as one batch: sigmoid loss, the same beta, AdamW (0.9,
0.95), no decay, constant learning rate without warm-up, gradient clipped at 1, no dropout, and the
reference log-probs computed once. Each runs in a process of its own: ours is `python dpo_train.py`,
theirs `trl.DPOTrainer` as a user would call it.

TRL reads the file unchanged, but only its text: it renders and tokenises that itself. We train on
the generator's token ids. The two are the same sequences only where tokenising the text gives back
the ids, so this is checked pair by pair before anything is compared. If it fails for some pair (a
template that writes "\\n" after EOS is enough: TRL trains it, and the generator stops at EOS), we
get the ids that TRL trains on, and the output says so.

Without --model it builds a Llama of two layers with Llama 3's kind of template, and 24 pairs of
random words with all keys of the data contract. Exit code 1 when the curves differ by more than
--tolerance, or the first loss is not ln 2.
"""

import argparse
import importlib.metadata
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from arguments import parse
from chat import encode_pair
from records import dump
from stage import hash_path
from training.checks import own_logprobs

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("prompt", "chosen", "rejected")
SPECIAL = ["<|pad|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)
WORDS = (
    "plum fig pear apple kiwi for a picnic please name three fruits the user asks and answers"
).split()


# ---- a small policy and pairs ------------------------------------------------------------------


def build_model(folder: Path, seed: int = 0) -> None:
    """A random Llama with a byte-level BPE that adds a BOS, as its template does: using both gives
    two.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [" ".join(WORDS)] * 4,
        trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[1]} $A", special_tokens=[(SPECIAL[1], 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=SPECIAL[1], eos_token=SPECIAL[4], pad_token=SPECIAL[0]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=331,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=4,
        pad_token_id=0,
        initializer_range=0.1,  # at 0.02 all tokens are about as likely, and no mistake would show
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def build_pairs(path: Path, model_folder: Path, n: int = 24, seed: int = 0) -> None:
    """n rows as make_pairs.py writes them: text, the token ids a generator would have sampled,
    their log-probs.
    """
    rng, model_hash = random.Random(seed), hash_path(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    rows = []
    for i in range(n):
        text = {k: " ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for k in PARTS}
        prompt = [{"role": "user", "content": text["prompt"]}]
        ids = {
            "prompt": tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=False
            )
        }
        for k in PARTS[1:]:
            ids[k] = tokenizer(text[k], add_special_tokens=False)["input_ids"] + [
                tokenizer.eos_token_id
            ]
        logprobs = own_logprobs(
            model, {k: np.asarray(v, np.int32) for k, v in ids.items()}
        ).tolist()
        rows.append(
            {"id": f"p{i:06d}", "iteration": 1, "prompt": prompt}
            | {k: [{"role": "assistant", "content": text[k]}] for k in PARTS[1:]}
            | {"score_chosen": 1.0, "score_rejected": 0.0, "chosen_index": 0, "rejected_index": 1}
            | {f"{k}_token_ids": ids[k] for k in PARTS}
            | {f"{k}_logprob": x for k, x in zip(PARTS[1:], logprobs, strict=True)}
            | {f"{k}_model": model_hash for k in PARTS[1:]}
        )
    path.write_text("".join(map(dump, rows)))


def text_only(rows: list[dict]) -> list[dict]:
    """The rows as other preference data would be: without what only the generator knows."""
    return [
        {k: v for k, v in row.items() if not k.endswith(("_token_ids", "_logprob", "_model"))}
        for row in rows
    ]


def canonical(rows: list[dict], tokenizer) -> int:
    """In how many pairs the token ids are what the text tokenises to."""
    same = 0
    for row in rows:
        ids = [row.get(f"{k}_token_ids") for k in PARTS]
        same += ids == encode_pair(tokenizer, row, row["id"], [tokenizer.eos_token_id])
    return same


# ---- theirs ------------------------------------------------------------------------------------


def trl_trainer(
    model: str,
    pairs: str,
    folder,
    steps: int,
    microbatch: int,
    *,
    beta,
    learning_rate,
    bf16=False,
    checkpointing=False,
    sampling="sequential",
    liger=False,
    attention="sdpa",
    callbacks=(),
    tokenizer=None,
    peft_config=None,
):
    """A DPOTrainer that takes all pairs in each of `steps` optimizer steps, `microbatch` pairs at a
    time.

    An epoch is one step, so that no shuffle changes which pairs a step has. TRL's log-probs are
    always chunked.
    """
    import datasets
    import trl

    data = datasets.load_dataset(
        "json", data_files=str(pairs), split="train", cache_dir=str(folder / "cache")
    )
    count = len(data)
    if count % microbatch:
        raise SystemExit(
            "error: TRL weighs microbatches alike: "
            f"{microbatch} must divide the {count} pairs of a step"
        )
    config = trl.DPOConfig(
        # the loss
        beta=beta,
        precompute_ref_log_probs=True,
        max_length=None,
        # the optimizer
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        # one step per epoch
        num_train_epochs=steps,
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=count // microbatch,
        train_sampling_strategy=sampling,
        # it removes "length" as well, by which the others sort
        remove_unused_columns=sampling == "sequential",
        seed=0,
        # the machine
        bf16=bf16,
        gradient_checkpointing=checkpointing,
        use_liger_kernel=liger,
        use_cpu=not torch.cuda.is_available(),
        model_init_kwargs={"attn_implementation": attention},
        # what it writes
        output_dir=str(folder / "out"),
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    return trl.DPOTrainer(
        model,
        args=config,
        train_dataset=data,
        callbacks=list(callbacks),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def trl_side(args, folder: Path) -> None:
    """In a process of its own: train, and write losses and the ids that TRL made of the text."""
    trainer = trl_trainer(
        args.model,
        args.pairs,
        folder,
        args.steps,
        args.pairs.read_text().count("\n"),
        beta=args.beta,
        learning_rate=args.learning_rate,
    )
    ids = [[row[f"{k}_ids"] for k in PARTS] for row in trainer.train_dataset]
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    (folder / "trl.json").write_text(json.dumps({"losses": losses, "ids": ids}))


# ---- side by side ------------------------------------------------------------------------------


def ours(args, pairs: Path, count: int, folder: Path) -> list[float]:
    command = [sys.executable, ROOT / "dpo_train.py", "--model", args.model, "--pairs", pairs]
    command += ["--output", folder / "policy", "--dtype", "fp32"]
    command += ["--batch_size", count, "--num_train_epochs", args.steps]
    command += ["--beta", args.beta, "--learning_rate", args.learning_rate]
    command += ["--lr_scheduler", "constant", "--warmup_ratio", 0, "--weight_decay", 0]
    command += ["--adam_betas", 0.9, 0.95, "--max_grad_norm", 1.0]
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT, stdout=sys.stderr)
    return [json.loads(line)["loss"] for line in open(folder / "policy.train.jsonl")]


def compare(args, folder: Path) -> float:
    """Print both curves; return the largest difference."""
    names = ("trl", "transformers", "torch")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names) + ", fp32")
    rows = [json.loads(line) for line in open(args.pairs)]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    same, pairs = canonical(rows, tokenizer), args.pairs
    print(
        f"{len(rows)} pairs, one batch; "
        f"token ids are what the text tokenises to in {same} of them, so"
    )
    if same == len(rows):
        print("  both read the same file, unchanged: we its ids, TRL its text")
    else:
        print("  TRL reads the file unchanged, and we train on the ids that TRL makes of it")

    command = [sys.executable, "-m", "bench.trl_dpo", "--trl_side", folder, *sys.argv[1:]]
    command += ["--model", args.model, "--pairs", args.pairs]
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT, stdout=sys.stderr)
    theirs = json.loads((folder / "trl.json").read_text())
    if same < len(rows):
        pairs = folder / "trl_ids.jsonl"
        keys = [f"{k}_token_ids" for k in PARTS]
        retold = zip(text_only(rows), theirs["ids"], strict=True)
        pairs.write_text(
            "".join(dump(row | dict(zip(keys, ids, strict=True))) for row, ids in retold)
        )
    curve = ours(args, pairs, len(rows), folder)

    print(f"\n{'step':>4} {'ours':>12} {'TRL':>12} {'difference':>12}")
    for step, (a, b) in enumerate(zip(curve, theirs["losses"], strict=True), 1):
        print(f"{step:4} {a:12.8f} {b:12.8f} {abs(a - b):12.1e}")
    largest = max(abs(a - b) for a, b in zip(curve, theirs["losses"], strict=True))
    start = max(abs(x - math.log(2)) for x in (curve[0], theirs["losses"][0]))
    print(
        f"\nlargest difference {largest:.1e} (tolerance {args.tolerance:g}); "
        f"first losses are ln 2 to {start:.1e}"
    )
    return max(largest, start)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", help="folder of a policy; default: a small random Llama")
    p.add_argument("--pairs", type=Path, help="its pairs.jsonl; default: random words")
    p.add_argument("--limit", type=int, help="take the first pairs of the file only; default: all")
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--beta", type=float, default=0.1)
    p.add_argument(
        "--learning_rate",
        type=float,
        default=1e-4,
        help="high enough for the curve to move in five steps",
    )
    p.add_argument("--tolerance", type=float, default=1e-4)
    p.add_argument("--trl_side", type=Path, help=argparse.SUPPRESS)
    args = parse(p)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # fp32 on a CPU is fp32: no TF32, no atomics
    if args.trl_side:
        return trl_side(args, args.trl_side)
    if (args.model is None) != (args.pairs is None):
        p.error("--model and --pairs go together: the pairs are tokenised by that model")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.model is None:
            args.model, args.pairs = str(folder / "model"), folder / "pairs.jsonl"
            build_model(folder / "model")
            build_pairs(args.pairs, folder / "model")
        lines = open(args.pairs).readlines()[: args.limit]
        args.pairs = (
            folder / "pairs.jsonl"
        )  # a copy: dpo_train.py leaves a cache beside the file it reads
        args.pairs.write_text("".join(lines))
        sys.exit(compare(args, folder) > args.tolerance)


if __name__ == "__main__":
    main()
