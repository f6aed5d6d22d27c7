"""One optimizer step of DPO, ours against TRL 1.16's DPOTrainer: pairs and tokens per second,
MFU, peak memory.

    OMP_NUM_THREADS=1 python -m bench.train --rounds 2 --steps 4 --save bench/results/train_cpu.txt
    python -m bench.train --shapes Qwen2.5-0.5B Qwen2.5-1.5B Qwen2.5-7B --save bench/results/gpu.txt

The first command uses a small model on a CPU; the second needs a GPU. With --lora_rank 16 both
sides train factors of that rank beside all linear layers, TRL through peft; the first factors are
the same, and so the losses must be.

Without trl in the environment it measures only our side. What is compared, and how it is kept fair:

  pairs    one file for both, UltraFeedback-like: log-normal lengths, mean 200 (prompt) and 350
           (answers), heavy tails, the two answers to a prompt similar in length (correlation 0.5 of
           the logs); on a CPU a quarter of that. The text is one word per token, so TRL's
           tokenising gives exactly our ids; this is checked.
  step     all pairs in one optimizer step; the same weights, optimizer, learning rate and clipping;
           reference log-probs computed beforehand by both. The losses of all steps are compared, so
           nobody is fast by computing something else. bf16 products over fp32 weights on a GPU,
           fp32 on a CPU.
  TRL      as fast as its options make it: precomputed reference, its chunked log-probs (1.16 has no
           other), pairs sorted by length, several microbatch sizes, Liger's layer kernels on a GPU
           if installed. `padding_free` is switched off by 1.16 itself. "rebalanced" (microbatches
           of unequal size) is shown, but it weighs a pair by the size of its microbatch, so its
           loss is a different one and it cannot win. On a CPU, TRL puts every position through the
           head; on a GPU only those of answers. "answers only" is TRL changed to do so on a CPU as
           well: what remains of our lead there is not due to the device.
  ours     dpo_train.py's own main(), stopped before the export.
  time     from the step's first collation to the end of optimizer.step(), without the first step;
           median over steps and rounds. Each contender runs in a process of its own, and rounds
           alternate between them. GPU: wall clock. CPU: processor time of the process, all its
           threads, so that other work on the machine is not counted (on an idle machine and with
           one thread it is the wall clock); the shortest wall time stands in the last column.
  memory   GPU: torch.cuda.max_memory_allocated over those steps. CPU: the peak of resident memory
           over them (VmHWM, reset after the first step), without pages of files, minus the memory
           in use before a model was loaded.
  tokens   only useful ones count: p + c + r per pair, however often a contender computes the prompt
           or a pad.
  MFU      6 flops per weight and useful token (the head: answer tokens only) and 12 per head
           dimension and visible pair of tokens, per second, over the GPU's dense bf16 peak.
           Recomputation in checkpointing does not count; a frozen weight has 4 flops and not 6.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from arguments import parse
from bench.headline import headline
from bench.trl_dpo import trl_trainer
from records import dump
from stage import hash_path
from training import lora, speed

ROOT = Path(__file__).resolve().parent.parent
# of the published config.json files; "small" has 0.5B's proportions, head and layers, at a fiftieth
SHAPES = {
    "Qwen2.5-0.5B": dict(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "Qwen2.5-1.5B": dict(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "Qwen2.5-7B": dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
    "small": dict(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=8192,
        tie_word_embeddings=True,
    ),
}


# ---- the task ----------------------------------------------------------------------------------


def build_model(folder: Path, shape: str, dtype: torch.dtype) -> None:
    """Random weights, and a tokenizer for which every word "w17" is token 17: text and token ids
    are the same thing.
    """
    config = Qwen2Config(
        **SHAPES[shape],
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # 7B take a minute on a CPU
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # the contenders, processes of their own, need the memory
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, config.vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)


def draw_lengths(n: int, scale: float, seed: int = 0) -> list[tuple[int, int, int]]:
    """(prompt, chosen, rejected) tokens of n pairs; at scale 1 the means are about 200, 350 and
    350.
    """
    rng = random.Random(seed)

    def tokens(median: float, z: float) -> int:
        return round(scale * min(1500, max(8, median * 2.71828 ** (0.7 * z))))

    rows = []
    for _ in range(n):
        p, both, c, r = (rng.gauss(0, 1) for _ in range(4))
        rows.append((tokens(155, p), *(tokens(275, (both + own) * 0.5**0.5) for own in (c, r))))
    return rows


def build_pairs(
    path: Path, lengths: list[tuple[int, int, int]], vocabulary: int, seed: int = 0
) -> None:
    """pairs.jsonl with random words of those lengths (EOS included), as text and as token ids."""
    rng, rows = random.Random(seed), []
    for i, (p, c, r) in enumerate(lengths):
        ids = [[rng.randrange(2, vocabulary) for _ in range(n)] for n in (p, c - 1, r - 1)]
        prompt, chosen, rejected = (" ".join(f"w{t}" for t in x) for x in ids)
        rows.append(
            {
                "id": f"p{i}",
                "prompt": prompt,
                "chosen": f" {chosen} <eos>",
                "rejected": f" {rejected} <eos>",
                "length": p + max(c, r),  # the column by which TRL sorts
                "prompt_token_ids": ids[0],
                "chosen_token_ids": ids[1] + [1],
                "rejected_token_ids": ids[2] + [1],
            }
        )
    path.write_text("".join(map(dump, rows)))


def useful_flops(config, lengths: list[tuple[int, int, int]], lora_rank=None) -> float:
    """Forward and backward flops of one step over these pairs, nothing computed twice."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        if lora_rank:
            lora.freeze(model, torch.float32)
            lora.adapt(model, lora_settings(lora_rank), torch.float32, "model")
    weights = speed.matmul_weights(model.model.layers, config)
    return speed.flops(weights, config, lengths, frozen_head=bool(lora_rank))


def lora_settings(rank: int):
    """What dpo_train.py has by default, but for the rank."""
    return argparse.Namespace(lora_rank=rank, lora_alpha=2.0 * rank, lora_targets=None, seed=0)


# ---- one contender, in a process of its own ----------------------------------------------------


def resident(field: str) -> int:
    """Bytes of this process in /proc/self/status: VmHWM is the most since the last reset, RssAnon
    leaves out files.
    """
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


class Meter:
    """Times of the steps after the first, and their peak memory."""

    def __init__(self):
        self.cuda, self.losses, self.times, self.baseline = (
            torch.cuda.is_available(),
            [],
            [],
            resident("RssAnon"),
        )
        self.steps = 0

    def now(self) -> tuple[float, float]:
        if self.cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() if self.cuda else time.process_time()), time.perf_counter()

    def begin(self) -> None:
        self.began = self.now()

    def end(self) -> None:
        self.steps += 1
        if self.steps > 1:
            self.times.append([b - a for a, b in zip(self.began, self.now(), strict=True)])
        elif self.cuda:  # the first step compiled kernels and made Adam's states
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def result(self) -> dict:
        peak = resident("VmHWM") - resident("RssFile") - self.baseline
        if self.cuda:
            peak = torch.cuda.max_memory_allocated()
        seconds, wall = zip(*self.times, strict=True)
        return {"losses": self.losses, "seconds": seconds, "wall": wall, "peak": peak}


class Done(Exception):
    pass


def run_ours(task: dict, folder: Path, meter=None) -> dict:
    import dpo_train
    from training import fsdp
    from training import log as train_log

    meter = meter or Meter()

    class Log:  # dpo_train writes to it at the end of each step
        def __init__(self, *_):
            pass

        def write(self, row):
            meter.losses.append(row["loss"])
            meter.end()
            if row["step"] == task["steps"]:
                raise Done  # before the export
            meter.begin()

    def compiled(module, **options):  # each layer, before it is sharded
        if task["compile"] and isinstance(module, fsdp.GradientCheckpointingLayer):
            module.compile(dynamic=True)
        return fully_shard(module, **options)

    fully_shard, fsdp.fully_shard = fsdp.fully_shard, compiled
    meter.begin()
    train_log.TrainLog = Log
    flags = ["--model", task["model"], "--pairs", task["pairs"], "--output", folder / "policy"]
    flags += [
        "--batch_size",
        task["count"],
        "--num_train_epochs",
        task["steps"],
        "--packing",
        task["packing"],
    ]
    flags += [
        "--tokens_per_batch",
        task["tokens_per_batch"],
        "--dtype",
        task["dtype"],
        "--beta",
        task["beta"],
    ]
    flags += [
        "--learning_rate",
        task["learning_rate"],
        "--lr_scheduler",
        "constant",
        "--warmup_ratio",
        0,
    ]
    flags += ["--gradient_checkpointing"] * task["checkpointing"] + task["ours_args"]
    if task.get("lora_rank"):
        flags += ["--lora_rank", task["lora_rank"]]
    sys.argv = ["dpo_train.py", *map(str, flags)]
    try:
        dpo_train.main()
    except Done:
        torch.distributed.destroy_process_group()
    return meter.result()


def lora_of_peft(rank: int):
    """peft's settings for what `dpo_train.py --lora_rank` does."""
    import peft

    return peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def use_our_first_factors(model, task: dict) -> None:
    """Give a peft model the A that dpo_train.py draws; B is zero on both sides."""
    settings = lora_settings(task["lora_rank"])
    ours = AutoModelForCausalLM.from_pretrained(task["model"])
    lora.adapt(ours, settings, torch.float32, "model")
    factors = lora.first_factors(ours, lora.factor_seed(settings, hash_path(task["model"])))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            parameter.data.copy_(factors.pop(name))
    assert not factors, f"peft has no factors for {sorted(factors)}"


def run_trl(task: dict, folder: Path) -> dict:
    import trl.trainer.utils
    from transformers import TrainerCallback

    meter = Meter()  # after the imports, so that its baseline includes them
    if task["answers_only"]:
        trl.trainer.utils._use_triton = lambda device: (
            True
        )  # the name there decides this and nothing else

    class Clock(TrainerCallback):
        def on_epoch_begin(
            self, *_, **__
        ):  # an epoch is a step, and its first batch is not collated yet
            meter.begin()

        def on_step_end(self, *_, **__):
            meter.end()

    trainer = trl_trainer(
        task["model"],
        task["pairs"],
        folder,
        task["steps"],
        task["microbatch"],
        beta=task["beta"],
        learning_rate=task["learning_rate"],
        bf16=task["dtype"] == "bf16",
        checkpointing=task["checkpointing"],
        sampling=task["sampling"],
        liger=task["liger"],
        attention=task["attention"],
        callbacks=[Clock()],
        # AutoTokenizer makes any of a Qwen2 Qwen's
        tokenizer=PreTrainedTokenizerFast.from_pretrained(task["model"]),
        peft_config=lora_of_peft(task["lora_rank"]) if task.get("lora_rank") else None,
    )
    if task.get("lora_rank"):
        use_our_first_factors(trainer.model, task)
    for row, line in zip(trainer.train_dataset, open(task["pairs"]), strict=True):
        pair = json.loads(line)
        for k in ("prompt", "chosen", "rejected"):
            assert row[f"{k}_ids"] == pair[f"{k}_token_ids"], (
                f"TRL tokenised {pair['id']} into other ids than ours"
            )
    trainer.train()
    meter.losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return meter.result()


def measure(task: dict) -> dict:
    """Run the contender in a process of its own; its result, or {"failed": why}."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "bench.train",
            "--worker",
            json.dumps(task | {"folder": folder}),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads((Path(folder) / "result.json").read_text())
    if "out of memory" in done.stderr.lower() or done.returncode == -9:
        return {"failed": "out of memory"}
    print(f"{task['name']} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}", file=sys.stderr)
    return {
        "failed": f"failed: {(done.stderr.strip() or str(done.returncode)).splitlines()[-1][:100]}"
    }


# ---- all of them -------------------------------------------------------------------------------


def contenders(args, common: dict) -> list[dict]:
    tasks = []
    for checkpointing in [{"off": False, "on": True}[x] for x in args.checkpointing]:
        base = common | {"checkpointing": checkpointing}
        for packing in args.packing:
            tasks += [
                base
                | {
                    "name": f"ours, {packing}, {budget} tokens" + ", compiled" * compile,
                    "side": "ours",
                    "packing": packing,
                    "tokens_per_batch": budget,
                    "compile": compile,
                    "ours_args": args.ours_args.split(),
                }
                for budget in args.tokens_per_batch
                for compile in (False, True)[: 1 + args.compile]
            ]
        if not importlib.util.find_spec("trl"):
            continue
        liger = args.device == "cuda" and importlib.util.find_spec("liger_kernel") is not None
        base |= {
            "side": "trl",
            "liger": liger,
            "attention": args.trl_attention,
            "answers_only": False,
        }
        sizes = [n for n in args.trl_batch_sizes if args.pairs % n == 0]
        peers = [
            base
            | {
                "name": f"TRL, {n} pairs" + ", liger" * liger,
                "microbatch": n,
                "sampling": "group_by_length",
            }
            for n in sizes
        ]
        middle = {"microbatch": sizes[len(sizes) // 2], "sampling": "batch_rebalance"}
        tasks += [
            *peers,
            base | middle | {"name": f"TRL, {middle['microbatch']} pairs, rebalanced"},
        ]
        if args.device == "cpu":
            tasks.append(
                peers[0] | {"name": peers[0]["name"] + ", answers only", "answers_only": True}
            )
    return tasks


def table(
    tasks: list[dict], lengths, config, peak_flops: float | None, tolerance: float
) -> list[str]:
    """Lines of the table, and the verdicts below it. tasks carry "runs", a list of measure()'s
    results.
    """
    answers = sum(c + r for _, c, r in lengths)
    flops = useful_flops(config, lengths, tasks[0].get("lora_rank"))
    reference = next((t["runs"][0]["losses"] for t in tasks if "losses" in t["runs"][0]), None)
    lines = [
        f"{'contender':38} {'ckpt':4} {'s/step':>8} {'pairs/s':>8} {'answer tok/s':>12} "
        f"{'MFU':>6} {'peak MB':>8} "
        f"{'loss gap':>8} {'wall s':>7}"
    ]
    for t in tasks:
        ckpt = "yes" if t["checkpointing"] else "no"
        if failed := next((r["failed"] for r in t["runs"] if "failed" in r), None):
            lines.append(f"{t['name']:38} {ckpt:4} {failed}")
            continue
        t["median"] = statistics.median(s for r in t["runs"] for s in r["seconds"])
        t["mfu"] = flops / t["median"] / peak_flops if peak_flops else None
        t["peak"] = statistics.median(r["peak"] for r in t["runs"])
        t["gap"] = max(
            abs(a - b) for r in t["runs"] for a, b in zip(r["losses"], reference, strict=True)
        )
        mfu = f"{t['mfu']:6.1%}" if t["mfu"] else f"{'':>6}"
        lines.append(
            f"{t['name']:38} {ckpt:4} {t['median']:8.2f} {len(lengths) / t['median']:8.2f} "
            f"{answers / t['median']:12,.0f} {mfu} {t['peak'] / 2**20:8,.0f} {t['gap']:8.0e} "
            f"{min(s for r in t['runs'] for s in r['wall']):7.2f}"
        )
    lines += ["", f"losses of the steps: {' '.join(f'{x:.6f}' for x in reference or [])}"]
    done = [t for t in tasks if "median" in t and t["gap"] <= tolerance]
    for checkpointing, changed in itertools.product((False, True), (False, True)):
        alike = [t for t in done if t["checkpointing"] == checkpointing]
        ours = [t for t in alike if t["side"] == "ours"]
        theirs = [t for t in alike if t["side"] == "trl" and t["answers_only"] == changed]
        if not theirs or not ours:
            continue
        peer = min(theirs, key=lambda t: t["median"])
        best = min(
            (t for t in ours if t["peak"] <= peer["peak"]), key=lambda t: t["median"], default=None
        )
        lines.append(
            f"checkpointing {'on' if checkpointing else 'off'}, {peer['name']} "
            f"(its fastest at equal loss{', changed' * changed}): "
            + (
                "none of ours needs as little memory"
                if best is None
                else f"{best['name']}: {peer['median'] / best['median']:.2f}x its pairs per "
                f"second, {best['peak'] / peer['peak']:.2f}x its peak memory"
            )
        )
    return lines


def headlines(shape: str, task: dict) -> list[str]:
    """What bench/gpu.sh shows of a contender that table() has seen."""
    name = f"{shape}, {task['name']}" + ", checkpointing" * task["checkpointing"]
    if "median" not in task:
        return [f"headline: {name}: {task['runs'][-1]['failed']}"]
    found = [
        headline(name, task["median"], "s/step"),
        headline(f"peak, {name}", task["peak"] / 2**30, "GiB"),
    ]
    if task["mfu"]:
        plain = task["side"] == "ours" and not task["compile"] and not task["checkpointing"]
        found.append(headline(f"MFU, {shape if plain else name}", 100 * task["mfu"], "%"))
    return found


def main():
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=["Qwen2.5-1.5B" if cuda else "small"]
    )
    p.add_argument(
        "--pairs", type=int, default=128 if cuda else 16, help="of one optimizer step; 128, CPU 16"
    )
    p.add_argument(
        "--scale", type=float, default=1.0 if cuda else 0.25, help="of the lengths; 1, CPU 0.25"
    )
    p.add_argument(
        "--steps", type=int, default=5, help="steps of a run, the first of them not timed"
    )
    p.add_argument("--rounds", type=int, default=1, help="runs of each contender, in alternation")
    p.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"])
    p.add_argument(
        "--packing",
        nargs="+",
        default=["padded", "prefix"],
        help="ours; dpo_train.py --help",
    )
    p.add_argument(
        "--tokens_per_batch", type=int, nargs="+", default=[16384 if cuda else 768], help="ours"
    )
    p.add_argument(
        "--compile", action="store_true", help="ours with torch.compile of the layers as well"
    )
    p.add_argument(
        "--ours_args",
        default="",
        help="more flags for dpo_train.py, as one string: '--cpu_offload'",
    )
    p.add_argument("--lora_rank", type=int, help="LoRA on both sides; default: full training")
    p.add_argument(
        "--trl_batch_sizes",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16] if cuda else [1, 4],
        help="pairs of a microbatch; those that divide --pairs",
    )
    p.add_argument(
        "--trl_attention",
        default="sdpa",
        help="attn_implementation: flash_attention_2 if you have it",
    )
    p.add_argument(
        "--peak_tflops", type=float, help="dense bf16, for the MFU; default: by the GPU's name"
    )
    p.add_argument("--save", type=Path, help="write the tables to this file, too")
    p.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parse(p)
    if args.worker:
        folder = Path(args.worker["folder"])
        result = {"ours": run_ours, "trl": run_trl}[args.worker["side"]](args.worker, folder)
        (folder / "result.json").write_text(json.dumps(result))
        return

    args.device = "cuda" if cuda else "cpu"
    dtype = "bf16" if cuda else "fp32"
    gpu = torch.cuda.get_device_name() if cuda else None
    peak = (
        args.peak_tflops * 1e12 if args.peak_tflops else speed.peak_flops(torch.device(args.device))
    )
    lengths = draw_lengths(args.pairs, args.scale)
    p_, c_, r_ = (statistics.mean(x) for x in zip(*lengths, strict=True))
    longest = max(p + max(c, r) for p, c, r in lengths)
    packages = ("torch", "transformers", "trl", "peft", "liger_kernel")
    names = [n for n in packages if importlib.util.find_spec(n)]
    out = [
        "python -m bench.train " + " ".join(sys.argv[1:]),
        ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)
        + f"; {gpu or f'CPU, {torch.get_num_threads()} thread'}, {dtype}",
        f"{args.pairs} pairs per step, on average {p_:.0f} + {c_:.0f} + {r_:.0f} tokens, "
        f"longest sequence {longest}; "
        f"{args.steps - 1} timed steps x {args.rounds} rounds",
    ]
    print("\n".join(out))
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as name:
            model, pairs = Path(name) / "model", Path(name) / "pairs.jsonl"
            build_model(model, shape, torch.bfloat16 if cuda else torch.float32)
            config = AutoConfig.from_pretrained(model)
            build_pairs(pairs, lengths, config.vocab_size)
            tasks = contenders(
                args,
                {
                    "model": str(model),
                    "pairs": str(pairs),
                    "count": args.pairs,
                    "steps": args.steps,
                    "dtype": dtype,
                    "beta": 0.1,
                    "learning_rate": 1e-4 if args.lora_rank else 1e-5,
                    "lora_rank": args.lora_rank,
                },
            )
            for round in range(args.rounds):
                for task in tasks:
                    last = measure({k: v for k, v in task.items() if k != "runs"})
                    if task.get("liger") and last.get("failed", "out of memory") != "out of memory":
                        task |= {
                            "liger": False,
                            "name": task["name"].replace(", liger", ""),
                        }  # TRL as it runs here
                        last = measure({k: v for k, v in task.items() if k != "runs"})
                    task.setdefault("runs", []).append(last)
                    says = last.get("failed") or f"{statistics.median(last['seconds']):.2f} s/step"
                    print(
                        f"  round {round + 1}: {task['name']}: {says}", file=sys.stderr, flush=True
                    )
                    measured = [t for t in tasks if "runs" in t]
                    lines = [
                        "",
                        shape,
                        *table(measured, lengths, config, peak, 2e-2 if cuda else 1e-4),
                    ]
                    print("\n".join(headlines(shape, task)), flush=True)
                    if (
                        args.save
                    ):  # each time: what is measured is kept if the next one is cut short
                        args.save.write_text("\n".join(out + lines) + "\n")
        print("\n".join(lines), flush=True)
        print(
            "\n".join(f"headline: {shape}, {x}" for x in lines if x.startswith("checkpointing")),
            flush=True,
        )
        out += lines


if __name__ == "__main__":
    main()
