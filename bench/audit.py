"""How far generator and trainer are apart when nothing is wrong, and when something is: this shows
where the audit's tolerance belongs.

    python -m bench.audit --max_new_tokens 4 16 64 256 --num_samples 8 \\
        --save bench/results/audit_random.txt
    python -m bench.audit --model M --prompts P --stale runs/x/iter_01/policy \\
        --save bench/results/audit.txt

dpo_train.py stops when the log-prob that the generator stored with each answer and its own are too
far apart. Both add n numbers, one per token, that were rounded differently. If such errors were
independent, their sum D would grow like the root of n; that of a mistake (another template, other
weights) grows mostly like n. So two measures of an answer are shown, |D| / n and |D| / sqrt(n),
over answers cut at several lengths.

Without --model, the network has 24 layers of random weights: rounding errors come from the depth,
not from training. For each backend and dtype, generate.py answers, and the trainer's own functions
compute the log-probs again, without a mistake and with mistakes made on purpose: the first token of
the prompt doubled (a second BOS), its last one left out (a template cut short), and with --stale
the weights of another policy, such as one iteration later.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import random
import string
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import dpo_train
from arguments import parse
from bench.headline import headline
from records import CANDIDATES, dump, read_jsonl
from training.plans import cost, microbatches

ROOT = Path(__file__).resolve().parent.parent
MISTAKES = {
    "none": lambda ids: ids,
    "bos twice": lambda ids: ids[:1] + ids,
    "prompt cut": lambda ids: ids[:-1],
}


def build_random(folder: Path) -> None:
    """folder/model, 24 layers of random weights and a tokenizer of bytes; folder/prompts.jsonl, 16
    of them.
    """
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.04,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.lm_head.weight.data *= 3  # else all tokens are about equally likely, and no error shows
    model.save_pretrained(folder / "model")
    letters = Tokenizer(models.BPE())
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    letters.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    prompts = [
        {"id": f"p{i}", "prompt": "".join(rng.choices(string.ascii_letters, k=20))}
        for i in range(16)
    ]
    (folder / "prompts.jsonl").write_text("".join(map(dump, prompts)))


def log_probs(model: str, rows: list[dict], mistake, dtype: str) -> list[float]:
    """The trainer's log-prob of every candidate of `rows`, in order."""
    pairs = []
    for row in rows:
        answers = [np.array(c["token_ids"], np.int32) for c in row["candidates"]]
        prompt = np.array(mistake(row["prompt_token_ids"]), np.int32)
        for a, b in zip(answers[0::2], answers[1::2], strict=True):
            pairs.append({"prompt": prompt, "chosen": a, "rejected": b, "id": row["id"]})
    flags = ["--model", model, "--pairs", "none", "--output", "none", "--dtype", dtype]
    args = dpo_train.parse(dpo_train.arguments(), flags)
    device = dpo_train.fsdp.start()
    args.packing = "prefix"
    policy = dpo_train.load_policy(model, args, device, pairs)
    plan = microbatches({i: cost(p, "prefix") for i, p in enumerate(pairs)}, 4096, 1, "prefix")
    found = dpo_train.all_logprobs(policy, pairs, [plan], "prefix", device)
    torch.distributed.destroy_process_group()
    return found.flatten().tolist()


def measure(args, backend: str, dtype: str, longest: int, folder: Path) -> list[str]:
    candidates = folder / f"{backend}-{dtype}-{longest}.jsonl"
    command = [sys.executable, ROOT / "generate.py"]
    command += ["--model", args.model, "--prompts", args.prompts, "--output", candidates]
    command += ["--backend", backend, "--dtype", dtype]
    command += ["--num_samples", args.num_samples, "--max_new_tokens", longest]
    if backend == "vllm" and args.engine_args:
        command += ["--engine_args", *args.engine_args]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-1000:] + done.stderr[-3000:])
    rows = list(read_jsonl(candidates, CANDIDATES))
    answers = [c for row in rows for c in row["candidates"]]
    n = np.array([len(c["token_ids"]) for c in answers])
    lines = []
    runs = [(name, args.model, mistake) for name, mistake in MISTAKES.items()]
    runs += [("stale weights", args.stale, MISTAKES["none"])] * (args.stale is not None)
    for name, model, mistake in runs:
        d = np.abs(
            [c["logprob"] for c in answers] - np.array(log_probs(model, rows, mistake, dtype))
        )
        per_token, gap = d / n, d / n**0.5
        lines.append(
            f"{backend:7} {dtype:5} {name:13} {len(n):7,} {n.mean():6.1f}   "
            f"{per_token.mean():7.1e} {per_token.max():7.1e}   "
            f"{gap.mean():7.1e} {gap.max():7.1e}"
        )
        print(lines[-1], flush=True)
        if name == "none":
            case = f"audit, {backend}, {dtype}, {n.mean():.0f} tokens"
            print(headline(f"{case}, mean gap", gap.mean(), "nats / sqrt(token)"))
            print(headline(f"{case}, largest", gap.max(), "nats / sqrt(token)"), flush=True)
    return lines


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", help="default: random weights, and prompts for them")
    p.add_argument("--prompts")
    p.add_argument(
        "--stale", help="another policy, whose log-probs of the same answers are the mistake"
    )
    p.add_argument(
        "--backends", nargs="+", default=["hf", *["vllm"] * bool(importlib.util.find_spec("vllm"))]
    )
    p.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    p.add_argument("--num_samples", type=int, default=8, help="even: answers are put into pairs")
    p.add_argument("--max_new_tokens", type=int, nargs="+", default=[40])
    p.add_argument("--engine_args", nargs="+", metavar="KEY=VALUE", help="vllm only")
    p.add_argument("--save", type=Path, help="write what is printed there, too")
    args = parse(p)
    lines = ["python -m bench.audit " + " ".join(sys.argv[1:])]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    lines.append(
        ", ".join(versions)
        + ", "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")
    )
    lines.append(f"{'':27} {'':7} {'':6}   {'|D| / n':15}   |D| / sqrt(n)")
    lines.append(
        f"{'backend dtype mistake':27} answers tokens   {'mean':7} {'max':7}   mean    max"
    )
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            build_random(Path(folder))
            args.model, args.prompts = f"{folder}/model", f"{folder}/prompts.jsonl"
        for run in itertools.product(args.backends, args.dtypes, args.max_new_tokens):
            lines += measure(args, *run, Path(folder))
    if args.save:
        args.save.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
