"""Interrupt one training run at 20 random steps, with kill -9 and SIGTERM in turn: the weights must
be those of an undisturbed run.

    OMP_NUM_THREADS=1 python -m bench.kill_train --save bench/results/kill_train.txt

The model is a Llama of the demo's size, on the CPU. The trainer runs as a user runs it, in its own
process, with --save_every. This script reads its train.jsonl, and interrupts when the step drawn
for this restart has been logged. After kill -9 the trainer resumes from the last checkpoint and
repeats up to --save_every - 1 steps. After SIGTERM it saves first, exits with 75, and repeats none.
At the end train.jsonl must have one row per step, all as in the undisturbed run except for the
times, and the weights must be equal in every bit.
"""

import argparse
import importlib.metadata
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from arguments import parse
from records import dump

ROOT = Path(__file__).resolve().parent.parent
STEPS, BATCH, VOCABULARY = 100, 4, 512


def build(folder: Path) -> None:
    """folder/model, random weights and a tokenizer of words; folder/pairs.jsonl, STEPS * BATCH of
    them.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0").save_pretrained(
        folder / "model"
    )
    rng, lines = random.Random(0), []
    for i in range(STEPS * BATCH):
        row = {"id": f"p{i}", "prompt": "-", "chosen": "-", "rejected": "-"}
        for key, most in (("prompt", 30), ("chosen", 40), ("rejected", 40)):
            row[f"{key}_token_ids"] = [
                rng.randrange(2, VOCABULARY) for _ in range(rng.randint(5, most))
            ]
        lines.append(dump(row))
    (folder / "pairs.jsonl").write_text("".join(lines))


def start(folder: Path, output: Path, save_every: int) -> subprocess.Popen:
    command = [sys.executable, "dpo_train.py"]
    command += ["--model", folder / "model", "--pairs", folder / "pairs.jsonl", "--output", output]
    command += ["--batch_size", BATCH, "--learning_rate", 1e-4, "--save_every", save_every]
    log = open(folder / f"{output.name}.log", "a")
    return subprocess.Popen([str(x) for x in command], cwd=ROOT, stdout=log, stderr=log)


def logged(output: Path) -> int:
    """Steps in the unfinished run's log."""
    log = output.with_name(output.name + ".parts") / "train.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def rows(output: Path) -> list[dict]:
    lines = output.with_name(output.name + ".train.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines
    ]


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--interruptions", type=int, default=20)
    p.add_argument(
        "--save_every",
        type=int,
        default=3,
        help="3: kill -9 falls on, just after and well after a save",
    )
    p.add_argument("--seed", type=int, default=0, help="of the steps")
    p.add_argument("--save", type=Path, help="write what is printed there, too")
    args = parse(p)
    lines = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    versions = [
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "transformers", "safetensors")
    ]
    say(
        f"{STEPS} steps, --save_every {args.save_every}, "
        f"{args.interruptions} interruptions, seed {args.seed}"
    )
    say(f"python {sys.version.split()[0]}, {', '.join(versions)}, on a CPU")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder)
        quiet, disturbed, log = (
            folder / "quiet/policy",
            folder / "disturbed/policy",
            folder / "policy.log",
        )
        for output in (quiet, disturbed):
            output.parent.mkdir()
        began = time.time()
        assert start(folder, quiet, args.save_every).wait() == 0, log.read_text()
        say(f"undisturbed: {time.time() - began:.0f} s")

        drawn = sorted(random.Random(args.seed).sample(range(1, STEPS - 5), args.interruptions))
        for i, step in enumerate(drawn):
            number = (signal.SIGKILL, signal.SIGTERM)[i % 2]
            # the last signal may have arrived some steps late
            step = max(step, logged(disturbed) + 1)
            process = start(folder, disturbed, args.save_every)
            while process.poll() is None and logged(disturbed) < step:
                time.sleep(0.002)
            process.send_signal(number)
            code = process.wait()
            checkpoints = disturbed.with_name("policy.parts").glob("step_??????")
            saved = sorted(int(folder.name[-6:]) for folder in checkpoints)
            say(
                f"{number.name} at step {step:3}: exit {code:3}, "
                f"{logged(disturbed):3} logged, checkpoint {saved}"
            )
            assert code == (75 if number == signal.SIGTERM else -number), log.read_text()
        assert start(folder, disturbed, args.save_every).wait() == 0, log.read_text()
        a, b = (load_file(output / "model.safetensors") for output in (quiet, disturbed))
        assert rows(quiet) == rows(disturbed) and len(rows(quiet)) == STEPS
        before = load_file(folder / "model/model.safetensors")
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        weights = sum(v.numel() for v in a.values())
        moved = sum((a[k] != before[k]).sum().item() for k in a)
        say(
            f"{STEPS} rows and all {weights:,} weights equal, bit for bit; "
            f"training moved {moved:,} of them"
        )
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        command_line = " ".join(["$ python -m bench.kill_train", *sys.argv[1:]])
        args.save.write_text("\n".join([command_line, *lines]) + "\n")


if __name__ == "__main__":
    main()
