"""Scoring in batches of like length under a token budget, against naive batches of a fixed number of answers.

    OMP_NUM_THREADS=1 python -m bench.score                                # a small Llama, CPU
    python -m bench.score --model Skywork/Skywork-Reward-V2-Qwen3-8B --dtype bf16 --rows 64

Both score the same random token ids, of lengths as in UltraFeedback with 8 answers a prompt: log-normal prompts of
median 100 and answers of median 250 tokens, long tails cut at 1024 each. Naive is what a loop over a DataLoader does:
--naive_batch answers in the order of the file, padded to the longest of them. The scores must be equal before the
times mean anything. Each way runs once to warm up and then --repeats times in turn; the best time counts: seconds on
a GPU, seconds of processor on a CPU, so that other programs there do not count.

The first command, on one thread: naive batches of 8, 16 and 32 take 1.76, 2.41 and 2.95 times as long as score.py,
and 45, 52 and 58 % of what they compute is padding (score.py: 11.5 %). The answers to one prompt stand side by side in
the file and share its length, so small naive batches are already half sorted.
"""

import argparse
import random
import statistics
import time
from collections import Counter

import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import score
from records import parse


def lengths(rows: int, answers: int, seed: int) -> list[int]:
    """Tokens of prompt and answer, `answers` in a row sharing a prompt."""
    rng = random.Random(seed)

    def draw(median, sigma):
        return min(1024, max(8, round(median * rng.lognormvariate(0, sigma))))

    return [prompt + draw(250, 0.8) for prompt in (draw(100, 1.0) for _ in range(rows)) for _ in range(answers)]


@torch.inference_mode()
def naive(m: score.Model, sequences: list[list[int]], size: int) -> list[float]:
    scores = []
    for start in range(0, len(sequences), size):
        inputs = score.right_padded(sequences[start : start + size], m.pad, m.network.device)
        scores += m.network(**inputs).logits[:, 0].float().tolist()
    return scores


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="a reward model; default: a random Llama of 2 x 128")
    p.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32")
    p.add_argument("--rows", type=int, default=32, help="prompts")
    p.add_argument("--answers", type=int, default=8)
    p.add_argument("--tokens_per_batch", type=int, default=16384)
    p.add_argument("--naive_batch", type=int, nargs="+", default=[8, 16, 32])
    p.add_argument("--repeats", type=int, default=2)
    args = parse(p)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.perf_counter if device == "cuda" else time.process_time
    torch.manual_seed(0)
    if args.model:
        common = ["--candidates", "-", "--output", "-", "--reward_model", args.model, "--dtype", args.dtype]
        flags = score.arguments().parse_args([*common, "--tokens_per_batch", str(args.tokens_per_batch)])
        m = score.load(args.model, AutoModelForSequenceClassification, flags, device)
    else:
        config = LlamaConfig(
            vocab_size=1000, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=2048, num_labels=1, pad_token_id=0, initializer_range=0.1,
        )  # fmt: skip
        network = LlamaForSequenceClassification(config).to(device, score.DTYPES[args.dtype]).eval()
        m = score.Model("random", network, None, None, 2048, args.tokens_per_batch, score.TOLERANCE[args.dtype])

    sizes = lengths(args.rows, args.answers, seed=0)
    sequences = [torch.randint(5, m.config.vocab_size, (n,)).tolist() for n in sizes]

    def ours() -> list[float]:
        return score.in_batches(m, score.reward_alone, score.reward_batch, sequences, sizes, "too long")

    ways = {f"naive, {n} a batch": (lambda n=n: naive(m, sequences, n)) for n in args.naive_batch}
    ways[f"score.py, {args.tokens_per_batch} tokens a batch"] = ours
    expected = ours()
    best, computed = dict.fromkeys(ways, float("inf")), Counter()  # seconds, and tokens that went through the model
    m.network.register_forward_pre_hook(
        lambda _, args, kwargs: computed.update({name: kwargs["input_ids"].numel()}), with_kwargs=True
    )
    for _ in range(1 + args.repeats):
        for name, f in ways.items():
            computed[name] = 0
            start = clock()
            got = f()
            best[name] = min(best[name], clock() - start)
            gap = max(abs(a - b) for a, b in zip(got, expected, strict=True))
            assert gap <= score.TOLERANCE[args.dtype][0], f"{name}: scores differ by {gap}"

    print(
        f"{len(sizes)} answers of {min(sizes)}-{max(sizes)} tokens, mean {statistics.mean(sizes):.0f}, {args.dtype}, "
        f"{torch.cuda.get_device_name() if device == 'cuda' else f'CPU, {torch.get_num_threads()} thread(s)'}"
    )
    reference = best[name]
    for name, seconds in best.items():
        padding = 1 - sum(sizes) / computed[name]
        print(
            f"{name:33} {seconds:7.2f} s {sum(sizes) / seconds:9,.0f} tokens/s {padding:6.1%} padding "
            f"{seconds / reference:5.2f} x score.py's time"
        )


if __name__ == "__main__":
    main()
