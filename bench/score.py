"""Scoring packed, each prompt once for all its answers, against naive batches of a fixed number of
padded answers.

    OMP_NUM_THREADS=1 python -m bench.score                                # a small Llama, CPU
    OMP_NUM_THREADS=1 python -m bench.score --vllm --rows 16               # also vLLM's pooling runner
    python -m bench.score --model Skywork/Skywork-Reward-V2-Qwen3-8B --dtype bf16 --rows 64

Both score the same random token ids, of lengths as in UltraFeedback with 8 answers a prompt:
log-normal prompts of median 100 and answers of median 250 tokens, long tails cut at 1024 each.
Naive is what a loop over a DataLoader does: --naive_batch answers in the order of the file, padded
to the longest of them. The scores must be equal before the times mean anything. Each way runs once
to warm up and then --repeats times in turn; the best time counts: seconds on a GPU, seconds of
processor on a CPU, so that other programs there do not count.

The first command, on one thread: naive batches of 8, 16 and 32 take 3.15, 4.47 and 5.47 times as
long as score.py at its default for a CPU. Padding makes them compute 1.8 to 2.4 times the tokens
that the answers have; score.py computes 0.75 times as many, for each prompt is computed once.
(Padded batches of like length, which score.py made before: naive batches of 8 took 1.76 times as
long.)

vLLM's pooling runner gives the same scores and is not faster here, so score.py does without it. In
processor seconds, --vllm --rows 16 --hidden_size 512 --naive_batch 8 --tokens_per_batch 4096: naive
27.8, score.py 9.75, vLLM 9.58, scores within 4e-5 of each other. It, too, computes a prompt once,
through its prefix cache, and takes half a minute to start.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections import Counter

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import score
from kernels.attention import ATTENTION
from stage import parse


def lengths(rows: int, answers: int, seed: int) -> list[list[int]]:
    """Of each row: tokens of the prompt, and of each of its answers."""
    rng = random.Random(seed)

    def draw(median, sigma):
        return min(1024, max(8, round(median * rng.lognormvariate(0, sigma))))

    return [[draw(100, 1.0), *(draw(250, 0.8) for _ in range(answers))] for _ in range(rows)]


@torch.inference_mode()
def naive(network, sequences: list[list[int]], size: int) -> list[float]:
    scores = []
    for start in range(0, len(sequences), size):
        batch = [torch.tensor(s, device=network.device) for s in sequences[start : start + size]]
        mask = pad_sequence([torch.ones_like(s) for s in batch], batch_first=True)
        ids = pad_sequence(batch, batch_first=True, padding_value=network.config.pad_token_id)
        scores += (
            network(input_ids=ids, attention_mask=mask, use_cache=False)
            .logits[:, 0]
            .float()
            .tolist()
        )
    return scores


def vllm(network, dtype: str):
    """vLLM's pooling runner on the network's weights: raw logits of token ids, nothing remembered
    between two calls.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from vllm import LLM, PoolingParams

    folder = tempfile.mkdtemp()
    network.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))
    ).save_pretrained(folder)
    engine = LLM(
        folder, runner="pooling", convert="classify", dtype={"fp32": "float32", "bf16": "bfloat16"}[dtype],
        enforce_eager=True, gpu_memory_utilization=0.5,
    )  # fmt: skip

    def score(sequences: list[list[int]]) -> list[float]:
        engine.reset_prefix_cache()
        prompts = [{"prompt_token_ids": s} for s in sequences]
        raw = PoolingParams(use_activation=False)  # else the logit goes through a sigmoid
        outputs = engine.encode(
            prompts, pooling_params=raw, pooling_task="classify", use_tqdm=False
        )
        return [o.outputs.data.item() for o in outputs]

    return score


def processor_seconds() -> float:
    """Of this process and of what it started: vLLM's engine is a process of its own."""
    import psutil

    own = psutil.Process()
    return sum(sum(p.cpu_times()[:2]) for p in [own, *own.children(recursive=True)])


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", help="a reward model; default: a random Llama of 2 x 128")
    p.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        help="default: as score.py, bf16 on a GPU, fp32 without one",
    )
    p.add_argument("--rows", type=int, default=32, help="prompts")
    p.add_argument("--answers", type=int, default=8)
    p.add_argument("--tokens_per_batch", type=int, nargs="+", default=[4096, 16384])
    p.add_argument("--naive_batch", type=int, nargs="+", default=[8, 16, 32])
    p.add_argument(
        "--vllm",
        action="store_true",
        help="also time vLLM's pooling runner; it takes a minute to start",
    )
    p.add_argument("--hidden_size", type=int, default=128, help="of the random Llama")
    p.add_argument("--repeats", type=int, default=2)
    args = parse(p)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = args.dtype or {"cuda": "bf16", "cpu": "fp32"}[device]
    clock = (
        time.perf_counter
        if device == "cuda"
        else processor_seconds
        if args.vllm
        else time.process_time
    )
    networks, dtype = [], score.DTYPES[args.dtype]
    for attention in ("sdpa", ATTENTION):
        torch.manual_seed(0)
        if args.model:
            network = AutoModelForSequenceClassification.from_pretrained(
                args.model, dtype=dtype, attn_implementation=attention
            )
        else:
            config = LlamaConfig(
                vocab_size=1000, hidden_size=args.hidden_size, intermediate_size=3 * args.hidden_size,
                num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=2048, num_labels=1, pad_token_id=0,
                initializer_range=0.1, attn_implementation=attention,
            )  # fmt: skip
            network = LlamaForSequenceClassification(config).to(dtype)
        networks.append(network.to(device).eval())
    plain, packing = networks

    rng = random.Random(0)
    prompts, sequences = [], []
    for i, (prompt, *answers) in enumerate(lengths(args.rows, args.answers, seed=0)):
        shared = rng.choices(range(5, plain.config.vocab_size), k=prompt)
        sequences += [shared + rng.choices(range(5, plain.config.vocab_size), k=n) for n in answers]
        prompts += [i] * args.answers
    sizes = [len(s) for s in sequences]

    def ours(tokens: int) -> list[float]:
        m = score.RewardModel(args.model, packing, True, max(sizes), tokens, None, None, {})
        return m.score([(s, 0) for s in sequences], prompts)

    ways = {
        f"naive, {n} a batch": (lambda n=n: naive(plain, sequences, n)) for n in args.naive_batch
    }
    ways |= {f"score.py, {n} tokens a batch": (lambda n=n: ours(n)) for n in args.tokens_per_batch}
    if args.vllm:
        engine = vllm(plain, args.dtype)
        ways["vLLM's pooling runner"] = lambda: engine(sequences)
    expected = naive(plain, sequences, 1)
    best, computed, gaps = (
        dict.fromkeys(ways, float("inf")),
        Counter(),
        {},
    )  # of each way, the last two in its last run
    for network in networks:
        network.model.embed_tokens.register_forward_pre_hook(
            lambda _, inputs: computed.update({name: inputs[0].numel()})
        )
    for _ in range(1 + args.repeats):
        for name, f in ways.items():
            computed[name] = 0
            start = clock()
            got = f()
            best[name] = min(best[name], clock() - start)
            gaps[name] = gap = max(abs(a - b) for a, b in zip(got, expected, strict=True))
            assert gap <= score.TOLERANCE[args.dtype][0], f"{name}: scores differ by {gap}"

    print(
        f"{len(sizes)} answers of {min(sizes)}-{max(sizes)} tokens, mean {statistics.mean(sizes):.0f}, {args.dtype}, "
        f"{torch.cuda.get_device_name() if device == 'cuda' else f'CPU, {torch.get_num_threads()} thread(s)'}"
    )
    fastest = min(best.values())
    for name, seconds in best.items():
        tokens = (
            f"{computed[name] / sum(sizes):5.2f} x the answers' tokens computed, "
            if computed[name]
            else ""
        )
        print(
            f"{name:33} {seconds:7.2f} s {len(sizes) / seconds:8,.0f} answers/s {seconds / fastest:5.2f} x the fastest "
            f"{tokens}scores within {gaps[name]:.0e}"
        )


if __name__ == "__main__":
    main()
