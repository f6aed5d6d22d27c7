"""Packed scoring, which computes each prompt once for all its answers, against naive batches of a
fixed number of padded answers.

    OMP_NUM_THREADS=1 python -m bench.score                      # a small Llama on a CPU
    OMP_NUM_THREADS=1 python -m bench.score --vllm --rows 16     # also vLLM's pooling runner
    python -m bench.score --model Skywork/Skywork-Reward-V2-Qwen3-8B --dtype bf16 --rows 64

Both score the same random token ids, of lengths as in UltraFeedback with 8 answers per prompt:
log-normal prompts of median 100 and answers of median 250 tokens, long tails cut at 1024 each.
Naive is what a loop over a DataLoader does: --naive_batch answers in the order of the file, padded
to the longest of them. The scores must be equal, or the times mean nothing. Each way runs once to
warm up and then --repeats times in turn; the best time counts: wall time on a GPU, processor time
on a CPU, so that other programs there do not count.

The first command, on one thread: naive batches of 8, 16 and 32 take 3.15, 4.47 and 5.47 times as
long as score.py at its default for a CPU. Padding makes them compute 1.8 to 2.4 times the tokens
that the answers have; score.py computes 0.75 times as many, because each prompt is computed once.
(Compared with padded batches of like length, which score.py made before, naive batches of 8 took
1.76 times as long.)

vLLM's pooling runner gives the same scores and is not faster here, so score.py does without it. In
processor seconds, --vllm --rows 16 --hidden_size 512 --naive_batch 8 --tokens_per_batch 4096: naive
27.8, score.py 9.75, vLLM 9.58, scores within 4e-5 of each other. vLLM also computes a prompt once,
through its prefix cache, and takes half a minute to start.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import score
from arguments import parse
from kernels.attention import ATTENTION


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
        ones = [torch.ones_like(s) for s in batch]
        pad = network.config.pad_token_id
        ids = pad_sequence(batch, batch_first=True, padding_value=pad)  # [size, longest]
        mask = pad_sequence(ones, batch_first=True)  # [size, longest]
        logits = network(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [size, 1]
        scores += logits[:, 0].float().tolist()
    return scores


def vllm(network, dtype: str):
    """vLLM's pooling runner on the network's weights, as a function of token ids: raw logits, with
    nothing cached between two calls.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from vllm import LLM, PoolingParams

    folder = tempfile.mkdtemp()
    network.save_pretrained(folder)
    no_tokenizer = Tokenizer(models.WordLevel({"a": 0}, "a"))  # vLLM needs one, but never uses it
    PreTrainedTokenizerFast(tokenizer_object=no_tokenizer).save_pretrained(folder)
    engine = LLM(
        folder,
        runner="pooling",
        convert="classify",
        dtype={"fp32": "float32", "bf16": "bfloat16"}[dtype],
        enforce_eager=True,
        gpu_memory_utilization=0.5,
    )
    raw = PoolingParams(use_activation=False)  # else the logit goes through a sigmoid

    def scores(sequences: list[list[int]]) -> list[float]:
        engine.reset_prefix_cache()
        prompts = [{"prompt_token_ids": s} for s in sequences]
        outputs = engine.encode(
            prompts, pooling_params=raw, pooling_task="classify", use_tqdm=False
        )
        return [o.outputs.data.item() for o in outputs]

    return scores


def processor_seconds() -> float:
    """Of this process and of what it started: vLLM's engine is another process."""
    import psutil

    own = psutil.Process()
    return sum(sum(p.cpu_times()[:2]) for p in [own, *own.children(recursive=True)])


def arguments():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = p.add_argument
    add("--model", help="a reward model; default: a random Llama of 2 x 128")
    add("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 without one")
    add("--rows", type=int, default=32, help="prompts")
    add("--answers", type=int, default=8)
    add("--tokens_per_batch", type=int, nargs="+", default=[4096, 16384])
    add("--naive_batch", type=int, nargs="+", default=[8, 16, 32])
    add("--vllm", action="store_true", help="also time vLLM's pooling runner; a minute to start")
    add("--hidden_size", type=int, default=128, help="of the random Llama")
    add("--repeats", type=int, default=2)
    return p


def load(args, attention: str, device: str):
    """The reward model, or the random Llama, with one of the two attention functions."""
    dtype = score.DTYPES[args.dtype]
    torch.manual_seed(0)
    if args.model:
        network = AutoModelForSequenceClassification.from_pretrained(
            args.model, dtype=dtype, attn_implementation=attention
        )
    else:
        config = LlamaConfig(
            vocab_size=1000,
            hidden_size=args.hidden_size,
            intermediate_size=3 * args.hidden_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            num_labels=1,
            pad_token_id=0,
            initializer_range=0.1,
            attn_implementation=attention,
        )
        network = LlamaForSequenceClassification(config).to(dtype)
    return network.to(device).eval()


def random_answers(args, vocabulary: int) -> list[score.TokenSequence]:
    """Prompt and answer as random tokens; the answers of one row share their prompt."""
    rng = random.Random(0)
    sequences = []
    for i, (prompt, *answers) in enumerate(lengths(args.rows, args.answers, seed=0)):
        shared = rng.choices(range(5, vocabulary), k=prompt)
        for n in answers:
            ids = shared + rng.choices(range(5, vocabulary), k=n)
            sequences.append(score.TokenSequence(f"row {i}", tuple(ids), prompt_length=0))
    return sequences


def ours(args, network, sequences: list[score.TokenSequence], tokens: int) -> list[float]:
    model = score.RewardModel(
        path=args.model or "a random Llama",
        network=network,
        max_length=sys.maxsize,
        tokens_per_batch=tokens,
        packs=True,
        tolerance=score.TOLERANCE[args.dtype],
        checked=True,
        tokenizer=None,
        template_kwargs={},
    )
    values = model.score_sequences(sequences)
    return [values[sequence] for sequence in sequences]


def ways_to_score(args, plain, packing, sequences: list[score.TokenSequence]) -> dict:
    """name -> function without arguments that returns the scores."""
    ids = [list(sequence.ids) for sequence in sequences]
    ways = {}
    for size in args.naive_batch:
        ways[f"naive, {size} per batch"] = partial(naive, plain, ids, size)
    for tokens in args.tokens_per_batch:
        name = f"score.py, {tokens} tokens per batch"
        ways[name] = partial(ours, args, packing, sequences, tokens)
    if args.vllm:
        ways["vLLM's pooling runner"] = partial(vllm(plain, args.dtype), ids)
    return ways


class Tokens:
    """Counts the tokens that networks compute, pads included."""

    def __init__(self, *networks):
        self.count = 0
        for network in networks:
            network.model.embed_tokens.register_forward_pre_hook(self.add)

    def add(self, module, inputs) -> None:
        self.count += inputs[0].numel()


def main():
    args = parse(arguments())
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    args.dtype = args.dtype or ("bf16" if gpu else "fp32")
    clock = time.process_time
    if gpu:
        clock = time.perf_counter
    elif args.vllm:
        clock = processor_seconds

    plain, packing = load(args, "sdpa", device), load(args, ATTENTION, device)
    sequences = random_answers(args, plain.config.vocab_size)
    sizes = [len(sequence.ids) for sequence in sequences]
    expected = naive(plain, [list(sequence.ids) for sequence in sequences], 1)
    ways = ways_to_score(args, plain, packing, sequences)

    # time each way in turn, the first time to warm up
    tokens = Tokens(plain, packing)
    best = dict.fromkeys(ways, float("inf"))
    computed, gaps = {}, {}  # of each way's last run
    for _ in range(1 + args.repeats):
        for name, scores in ways.items():
            tokens.count = 0
            start = clock()
            got = scores()
            best[name] = min(best[name], clock() - start)
            computed[name] = tokens.count
            gap = max(abs(a - b) for a, b in zip(got, expected, strict=True))
            gaps[name] = gap
            assert gap <= score.TOLERANCE[args.dtype][0], f"{name}: scores differ by {gap}"

    mean = statistics.mean(sizes)
    machine = f"CPU, {torch.get_num_threads()} thread(s)"
    if gpu:
        machine = torch.cuda.get_device_name()
    answers = f"{len(sizes)} answers of {min(sizes)}-{max(sizes)} tokens, mean {mean:.0f}"
    print(f"{answers}, {args.dtype}, {machine}")
    fastest = min(best.values())
    for name, seconds in best.items():
        share = ""
        if computed[name]:  # vLLM's own are not seen
            share = f"{computed[name] / sum(sizes):5.2f} x the answers' tokens computed, "
        print(
            f"{name:33} {seconds:7.2f} s {len(sizes) / seconds:8,.0f} answers/s "
            f"{seconds / fastest:5.2f} x the fastest {share}scores within {gaps[name]:.0e}"
        )


if __name__ == "__main__":
    main()
