"""Prompts -> candidates: the current policy writes N answers to every prompt.

    y_1 … y_N ~ pi(. | x)                          N answers to the prompt x
    logprob(y) = sum_t log pi(y_t | x, y_<t)       stored with each of them

This is what makes DPO online: the answers come from the policy that is trained next (RLHF Workflow,
arXiv:2405.07863). However an answer was sampled, its `logprob` is that at temperature 1 over the
whole vocabulary. The trainer computes the same number and compares the two: this shows a wrong
template, a doubled BOS or stale weights.

    python generate.py --model Qwen/Qwen2.5-1.5B-Instruct \\
        --prompts prompts.jsonl --output candidates.jsonl
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        generate.py --model …

Each rank takes its share of the prompts and has an engine of its own: with --tensor_parallel_size 4
start 2 ranks on a machine of 8 GPUs. The same command resumes a killed run, on any number of ranks.

What makes the answers the policy's own:

1. Token ids are what counts. The ids that the policy wrote are stored and trained on; `text` is
   decoded from them, for reading and for rewards. Text is never encoded again, because
   encode(decode(ids)) is not ids.
2. Nothing shapes the distribution but --temperature, --min_p, --top_k and --top_p, in this order,
   as in vLLM. Many models come with a generation_config.json that sets top_k or a repetition
   penalty. Only the ids that end an answer are taken from that file.
3. An answer ends at any stop id: those of the generation config, the tokenizer's EOS, and the one
   that the chat template puts after an assistant's turn. It is the last of token_ids exactly when
   finish_reason is "stop".
4. The random numbers of a prompt depend on (--seed, --iteration, prompt id) alone: not on its
   neighbours in the file or in the batch, and not on the ranks. On a CPU either backend writes the
   same file again, bit for bit. On a GPU rounding depends on the batch, and vLLM's batches depend
   on timing, so now and then another token is sampled.
"""

import argparse
import importlib.util
import inspect
import itertools
import math
import os
from collections.abc import Iterator
from contextlib import chdir, closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

import chat
import models
from arguments import integer_in, key_values, number_in, parse, parser
from kernels.attention import attention_implementation, causal_lm_refusal, positions
from kernels.logprob import backbone, linear_logprob, lm_head, logprob_from_logits
from records import NEW_PROMPT, Stop, count_rows, finite, read_jsonl
from stage import Stage, die_with_parent, run, say, seed_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# Engine arguments that set memory use and speed. Answers are not meant to depend on them, so a run
# may be resumed with others.
PACE = ("gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "enforce_eager")

LEAST_TEMPERATURE = 0.01  # vLLM would take this for anything between it and 0


def arguments() -> argparse.ArgumentParser:
    p = parser(__doc__)
    add = p.add_argument

    # Files
    add("--model", required=True, help="the policy: a folder, or hub name NAME or NAME@REVISION")
    add("--prompts", required=True, help="prompts.jsonl")
    add("--output", required=True, help="candidates.jsonl")
    add(
        "--backend",
        choices=("auto", "vllm", "hf"),
        default="auto",
        help="hf is transformers; default auto: vllm if installed and there is a GPU, else hf",
    )
    add_sampling_arguments(p)
    add_length_arguments(p)
    add_prompt_and_seed_arguments(p)
    add_computing_arguments(p)
    return p


def add_sampling_arguments(p: argparse.ArgumentParser) -> None:
    add = p.add_argument

    # How tokens are sampled. By default from the policy itself, which is what the equations say.
    add(
        "--num_samples",
        type=integer_in("[1, inf)"),
        default=8,
        help="answers per prompt; 8 as in RLHF Workflow",
    )
    add(
        "--temperature",
        type=number_in("[0, inf)"),
        nargs="+",
        default=[1.0],
        help="default 1; 0 is greedy; several: the samples are divided among them, in order",
    )
    add(
        "--top_p",
        type=number_in("(0, 1]"),
        default=1.0,
        help="only the likeliest tokens with this total probability; default 1: all",
    )
    add(
        "--top_k",
        type=integer_in("[0, inf)"),
        default=0,
        help="only this many likeliest tokens; default 0: all",
    )
    add(
        "--min_p",
        type=number_in("[0, 1]"),
        default=0.0,
        help="only tokens at least this share as probable as the likeliest one; default 0: all",
    )


def add_length_arguments(p: argparse.ArgumentParser) -> None:
    add = p.add_argument

    # How long prompts and answers may be, in tokens
    add(
        "--max_new_tokens",
        type=integer_in("[1, inf)"),
        default=1024,
        help='longer answers are cut off, with finish_reason "length"; default 1024',
    )
    add(
        "--max_prompt_length",
        type=integer_in("[1, inf)"),
        help="longer prompts are dropped; default: what --max_new_tokens leaves of the context",
    )


def add_prompt_and_seed_arguments(p: argparse.ArgumentParser) -> None:
    add = p.add_argument

    # What else an answer depends on
    add(
        "--chat_template_kwargs",
        nargs="+",
        metavar="KEY=JSON",
        help="for the chat template, e.g. enable_thinking=false",
    )
    add(
        "--seed",
        type=integer_in("[0, inf)"),
        default=0,
        help="another seed gives other answers; default 0",
    )
    add(
        "--iteration",
        type=integer_in("[0, inf)"),
        default=0,
        help="part of the seed: new answers to an old prompt",
    )


def add_computing_arguments(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of the weights; default auto: what config.json says, or fp32",
    )
    add(
        "--batch_size",
        type=integer_in("[1, inf)"),
        help="hf only: sequences per forward pass; default 512 on a CPU, 64 on a GPU",
    )
    add(
        "--tensor_parallel_size",
        type=integer_in("[1, inf)"),
        help="vllm only: GPUs per engine (and rank); default 1",
    )
    add(
        "--engine_args",
        nargs="+",
        metavar="KEY=VALUE",
        help="vllm only: its EngineArgs, e.g. max_num_seqs=512; paths must be absolute",
    )


def read_arguments() -> argparse.Namespace:
    """The command line, checked. `backend` is never "auto", and `engine` holds the engine arguments
    on which answers depend.
    """
    args = parse(arguments())
    if args.backend == "auto":
        vllm_can_run = torch.cuda.is_available() and importlib.util.find_spec("vllm")
        args.backend = "vllm" if vllm_can_run else "hf"
    args.engine = [pair for pair in args.engine_args or [] if pair.split("=")[0] not in PACE]

    # a flag of the other backend
    others = ["batch_size"] if args.backend == "vllm" else ["tensor_parallel_size", "engine_args"]
    for flag in others:
        if getattr(args, flag) is not None:
            raise Stop(f"--{flag} has no effect with --backend {args.backend}: leave it out.")

    check_sampling(args)
    if args.batch_size is not None and args.batch_size < args.num_samples:
        raise Stop(
            f"--batch_size {args.batch_size}: the {args.num_samples} samples of a prompt run "
            "together."
        )
    return args


def check_sampling(args) -> None:
    """Stop at numbers that do not go together."""
    all_greedy = not any(args.temperature)
    truncates = (args.top_p, args.top_k, args.min_p) != (1, 0, 0)
    if all_greedy and truncates:
        raise Stop(
            "--top_p, --top_k and --min_p have no effect at --temperature 0: leave them out."
        )
    if args.num_samples < len(args.temperature):
        raise Stop(
            f"{len(args.temperature)} temperatures for {args.num_samples} samples: some would get "
            "none."
        )
    if any(0 < temperature < LEAST_TEMPERATURE for temperature in args.temperature):
        raise Stop(f"--temperature: 0 (greedy), or at least {LEAST_TEMPERATURE}.")
    if temperatures(args).count(0.0) > 1:
        raise Stop(
            "--temperature 0 writes the same answer every time: give it one of the --num_samples."
        )


def temperatures(args) -> list[float]:
    """The temperature of each of the N samples: 8 samples at 0.7 and 1.0 are four of each."""
    N, given = args.num_samples, args.temperature
    return [given[i * len(given) // N] for i in range(N)]


# ---- the policy: what it reads, and where it ends ----------------------------------------------


class Policy:
    """Everything about the model but its weights, which each backend loads in its own way."""

    def __init__(self, args):
        self.name = args.model
        self.config = models.load_config(self.name)
        refusal = causal_lm_refusal(self.config)
        if refusal:
            raise Stop(f"{self.name}: {refusal}.")
        self.dtype = DTYPES.get(args.dtype) or self.config.dtype or torch.float32

        # what it reads
        self.tokenizer = models.load_tokenizer(self.name)
        self.template_kwargs = key_values("chat_template_kwargs", args.chat_template_kwargs)
        chat.check_template_kwargs(self.tokenizer, self.template_kwargs)

        # where its answers end
        defaults = models.load_generation_config(self.name, self.config)
        self.stop_ids, shown = chat.find_stop_ids(self.tokenizer, defaults, self.template_kwargs)
        if not shown:
            say(
                "note: the chat template shows no answer of an assistant, so answers end at "
                f"{self.stop_ids}"
            )
        if not self.stop_ids:
            raise Stop(
                f"{self.name}: nothing says where an answer ends. Set eos_token_id in "
                "generation_config.json."
            )

        # how many tokens fit: of prompt and answer together, and of a prompt
        self.asked_context = asked_context(args)
        self.context = self.asked_context or positions(self.config)
        room = self.context - args.max_new_tokens
        self.max_prompt_length = min(room, args.max_prompt_length or room)
        self.longest = self.max_prompt_length  # tokens of a prompt; check_prompts looks at all

    def encode(self, prompt: str | list[dict], where: str) -> list[int]:
        """Token ids of a prompt, with one BOS if the tokenizer adds one."""
        ids = chat.encode_prompt(self.tokenizer, prompt, where, self.template_kwargs)
        if not ids:
            raise Stop(f"{where}: the prompt is empty. Remove it.")
        return ids

    def check_prompts(self, path: str) -> int:
        """Encode all prompts before the first is answered, set self.longest, return their number.

        A mistake in line 90,000 shows now, and not after hours of sampling.
        """
        total = count_rows(path, NEW_PROMPT)
        texts = 0
        lengths = set()
        for number, row in enumerate(read_jsonl(path, NEW_PROMPT), 1):
            prompt, where = row["prompt"], f"{path}:{number}"
            if isinstance(prompt, str):
                texts += 1
            elif prompt[-1]["role"] == "assistant":
                raise Stop(
                    f"{where}: the conversation ends in an assistant turn: nothing is left to "
                    "answer. Remove it."
                )
            lengths.add(len(self.encode(prompt, where)))

        if self.template_kwargs and texts == total:
            raise Stop("--chat_template_kwargs has no effect: every prompt is a string.")
        fitting = [length for length in lengths if length <= self.max_prompt_length]
        if not fitting:
            raise Stop(
                f"{path}: all {total} prompts are longer than {self.max_prompt_length} tokens, the "
                f"shortest {min(lengths)}; raise --max_prompt_length, or lower --max_new_tokens: "
                f"the context is {self.context}."
            )
        self.longest = max(fitting)
        return total


def asked_context(args) -> int | None:
    """max_model_len of --engine_args, in tokens; None where it is not given."""
    length = key_values("engine_args", args.engine_args).get("max_model_len")
    if length is not None and (type(length) is not int or length < 1):
        raise Stop(f"--engine_args max_model_len={length}: give a number of tokens.")
    return length


@dataclass
class Part:
    """Consecutive prompts of the file, see stage.py. Written when all of them are answered."""

    index: int
    total: int  # prompts; those that are too long are not in `rows`
    rows: dict[str, dict | None]  # id -> row of the output, in the file's order; None: waiting


class Prompt(NamedTuple):
    part: Part
    row: dict  # of prompts.jsonl
    ids: list[int]
    seed: int


class Sample(NamedTuple):
    """One of the N answers, as both backends return it."""

    token_ids: list[int]
    logprob: float  # of the answer: its tokens' log-probs, summed
    finish_reason: str


# ---- backend: transformers ---------------------------------------------------------------------


class Sampler:
    """Exact samples from rows of scores, with separate random numbers for each prompt.

        argmax_v (s_v + g_v)                       is distributed as softmax(s)      (Gumbel, 1954)
        g_v = -log e_v,  e_v ~ Exp(1)

    torch.multinomial would draw all rows from one stream, and a row's sample would depend on the
    rows around it.
    """

    def __init__(self, args, seeds: list[int], device):
        self.num_samples = args.num_samples
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]  # B

        # 0 becomes 1e-5 (greedy): the noise then decides between logits that are equal to 1e-4.
        of_all_rows = torch.tensor(temperatures(args) * len(seeds), device=device)  # [B*N]
        self.temperatures = of_all_rows.clamp_min(1e-5)[:, None]  # [B*N, 1]

        self.warpers = []  # in vLLM's order
        if args.min_p > 0:
            self.warpers.append(transformers.MinPLogitsWarper(args.min_p))
        if args.top_k > 0:
            self.warpers.append(transformers.TopKLogitsWarper(args.top_k))
        if args.top_p < 1:
            self.warpers.append(transformers.TopPLogitsWarper(args.top_p))

    def sample(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """logits [R, V] of the rows that still write, rows [R]: their indices -> token ids [R]"""
        scores = logits.float() / self.temperatures[rows]
        for warper in self.warpers:
            scores = warper(None, scores)  # -inf for a token that is not to be sampled
        noise = self.noise(scores.shape[-1], rows)  # [R, V]
        return (scores + noise).argmax(-1)

    def noise(self, vocabulary: int, rows: torch.Tensor) -> torch.Tensor:
        """g [R, V]. Each prompt always draws for all of its N rows. Otherwise a row's numbers would
        depend on which others have finished.
        """
        B, N = len(self.generators), self.num_samples
        draws = torch.empty(B, N, vocabulary, device=rows.device)
        for own, generator in zip(draws, self.generators, strict=True):
            own.exponential_(generator=generator)
        draws = draws.flatten(0, 1)[rows]  # [R, V]
        # A draw that rounds to 0 would make noise of +inf; added to a score of -inf that is NaN.
        tiny = torch.finfo(torch.float32).tiny
        return draws.clamp_min_(tiny).log_().neg_()


@torch.inference_mode()
def hf_samples(
    args, policy: Policy, prompts: Iterator[Prompt]
) -> Iterator[tuple[Prompt, list[Sample]]]:
    """Answer the prompts part by part, in left-padded batches of similar length."""
    model = hf_model(args, policy)
    sequences = args.batch_size or (64 if model.device.type == "cuda" else 512)
    per_batch = max(1, sequences // args.num_samples)
    for _, of_part in itertools.groupby(prompts, key=lambda prompt: prompt.part.index):
        # the longest first: what does not fit into memory fails at once
        longest_first = sorted(of_part, key=lambda prompt: -len(prompt.ids))
        for i in range(0, len(longest_first), per_batch):
            batch = longest_first[i : i + per_batch]
            prompt_ids = [prompt.ids for prompt in batch]
            seeds = [prompt.seed for prompt in batch]
            try:
                samples = hf_batch(args, policy, model, prompt_ids, seeds)
            except torch.OutOfMemoryError:
                size = len(batch) * args.num_samples
                raise Stop(
                    f"out of memory at {size} sequences per forward pass: lower --batch_size and "
                    "run the same command again: finished work is kept."
                ) from None
            yield from zip(batch, samples, strict=True)


def hf_model(args, policy: Policy):
    """The network on this rank's device. Stops if hf_batch would change what it computes."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    attention = attention_implementation(policy.config)
    auto_class = transformers.AutoModelForCausalLM
    model = models.load_model(auto_class, args.model, policy.dtype, attention)
    model = model.to(device).eval()

    if model._is_stateful:
        kind = policy.config.model_type
        raise Stop(f"{kind} is recurrent, which hf cannot batch here: --backend vllm.")
    try:
        lm_head(model)
    except ValueError as e:
        raise Stop(f"{args.model}: {e}. --backend vllm needs no such thing.") from None
    check_batches(args.model, policy, model)
    return model


def hf_batch(
    args, policy: Policy, model, prompt_ids: list[list[int]], seeds: list[int]
) -> list[list[Sample]]:
    """N answers to each of B prompts, and their log-probs.

    Shapes: P tokens of the longest prompt, C tokens of the longest answer, V the vocabulary, D the
    width, R those of the B*N rows that the batch still holds.
    """
    N = args.num_samples
    ids, mask = left_padded(prompt_ids, model.device)  # [B, P], [B, P]
    sampler = Sampler(args, seeds, model.device)
    stop_ids = torch.tensor(policy.stop_ids, device=model.device)
    answers = sample_answers(model, sampler, ids, mask, stop_ids, args.max_new_tokens)  # [B*N, C]

    # An answer ends with its first stop id. What follows is not part of it.
    is_stop = torch.isin(answers, stop_ids)  # [B*N, C]
    stops_before = is_stop.cumsum(1) - is_stop.long()
    own = stops_before == 0  # [B*N, C]
    logprobs = answer_logprobs(model, ids, mask, answers, own)  # [B*N]

    # from tensors to plain Python
    lengths = own.sum(1)
    stopped = is_stop.any(1)
    columns = [column.tolist() for column in (answers, lengths, logprobs, stopped)]
    samples = []
    for token_ids, length, logprob, has_stopped in zip(*columns, strict=True):
        finish_reason = "stop" if has_stopped else "length"
        samples.append(Sample(token_ids[:length], logprob, finish_reason))
    return [samples[i : i + N] for i in range(0, len(samples), N)]


def left_padded(prompt_ids: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """B prompts -> ids [B, P] with zeros in front, and mask [B, P], 1 where a prompt stands."""
    longest = max(len(ids) for ids in prompt_ids)
    rows, masks = [], []
    for ids in prompt_ids:
        padding = [0] * (longest - len(ids))
        rows.append(padding + ids)
        masks.append(padding + [1] * len(ids))
    return torch.tensor(rows, device=device), torch.tensor(masks, device=device)


def sample_answers(model, sampler: Sampler, prompt_ids, prompt_mask, stop_ids, max_new_tokens: int):
    """N answers to each prompt, token by token: prompts [B, P] -> answers [B*N, C].

    C is max_new_tokens, or less if all rows stop earlier. After its first stop id a row may hold
    any tokens.
    """
    # read each prompt once, and copy the result to its N rows
    N = sampler.num_samples
    cache = transformers.DynamicCache(config=model.config)
    output = forward(model, prompt_ids, prompt_mask, cache, logits_to_keep=1)
    logits = output.logits[:, -1].repeat_interleave(N, 0)  # [B*N, V]
    mask = prompt_mask.repeat_interleave(N, 0)  # [B*N, P]
    cache.batch_repeat_interleave(N)

    rows = torch.arange(len(mask), device=mask.device)  # [R]: those that the batch still holds
    writing = torch.ones_like(rows, dtype=torch.bool)  # [R]: no stop id so far
    answers = mask.new_zeros(len(mask), max_new_tokens)  # [B*N, C]
    for t in range(max_new_tokens):
        tokens = sampler.sample(logits, rows)  # [R]
        answers[rows, t] = tokens
        writing &= ~torch.isin(tokens, stop_ids)
        if t == max_new_tokens - 1 or not writing.any():
            break

        # cut the batch down once a quarter of it has finished
        if writing.sum() <= 0.75 * len(writing):
            kept = writing.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, mask, tokens = rows[kept], mask[kept], tokens[kept]
            writing = torch.ones_like(rows, dtype=torch.bool)

        # read what was just written
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)  # [R, P+t+1]
        logits = forward(model, tokens[:, None], mask, cache).logits[:, -1]  # [R, V]
    return answers[:, : t + 1]


def answer_logprobs(model, prompt_ids, prompt_mask, answers, own) -> torch.Tensor:
    """Log-probs [B*N] fp64 of answers [B*N, C], in one forward pass; own: which tokens count."""
    # read each prompt once, and copy the result to its N rows
    N = len(answers) // len(prompt_ids)
    decoder = backbone(model)
    cache = transformers.DynamicCache(config=model.config)
    last = forward(decoder, prompt_ids, prompt_mask, cache)[0][:, -1:]  # [B, 1, D]
    last = last.repeat_interleave(N, 0)  # [B*N, 1, D]
    cache.batch_repeat_interleave(N)

    mask = torch.cat([prompt_mask.repeat_interleave(N, 0), own.long()], 1)  # [B*N, P+C]
    hidden = forward(decoder, answers, mask, cache)[0]  # [B*N, C, D]
    # Position t-1 predicts token t, so the prompt's last position predicts the first token.
    hidden = torch.cat([last, hidden[:, :-1]], 1)  # [B*N, C, D]
    token_logprobs = torch.zeros(own.shape, dtype=torch.float64, device=own.device)  # [B*N, C]
    found = linear_logprob(hidden[own], targets=answers[own], **lm_head(model))
    token_logprobs[own] = found.double()
    return token_logprobs.sum(1)


def forward(module, ids: torch.Tensor, mask: torch.Tensor, cache, **kwargs):
    """Run ids [R, L] after what is cached, mask [R, cached + L]; padding takes no positions."""
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]  # [R, L]
    return module(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        **kwargs,
    )


def check_batches(name: str, policy: Policy, model) -> None:
    """Stop if the model computes something else in batches, as hf_batch runs them.

    Left padding needs a model that uses its positions, decoding needs one that reads its cache, and
    scoring needs a head that we know. Some models take these arguments and ignore them, so we try
    it with two made-up prompts.
    """
    kind = policy.config.model_type
    try:
        gap = batch_gap(policy, model)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # of any kind: the model's code may not expect these arguments
        raise Stop(
            f"{name}: {kind} does not run in padded batches with a cache "
            f"({type(e).__name__}: {e}), as --backend hf wants it. Try --backend vllm."
        ) from None
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.25  # as in the trainer: bf16 has 8 bits
    if not gap <= tolerance:  # this also catches NaN
        raise Stop(
            f"{name}: {kind} is another function in padded batches with a cache, as --backend hf "
            f"runs them, than alone: its log-probs differ by {gap:.2g} nats per token. "
            "Try --backend vllm."
        )


def batch_gap(policy: Policy, model) -> float:
    """Nats per token between hf_batch's greedy answers and the model's plain forward pass, on
    average over two answers to each of two prompts.
    """
    greedy = argparse.Namespace(temperature=[0.0], min_p=0.0, top_k=0, top_p=1.0)
    greedy.num_samples, greedy.max_new_tokens = 2, 4
    middle = policy.config.get_text_config().vocab_size // 2
    prompts = [list(range(middle, middle + length)) for length in (5, 2)]
    answered = hf_batch(greedy, policy, model, prompts, seeds=[0, 0])
    gaps = []
    for prompt_ids, samples in zip(prompts, answered, strict=True):
        gaps += [gap_of_answer(model, prompt_ids, sample) for sample in samples]
    return sum(gaps) / len(gaps)


def gap_of_answer(model, prompt_ids: list[int], sample: Sample) -> float:
    """Nats per token by which the plain forward pass disagrees with a greedy answer."""
    n = len(sample.token_ids)
    ids = torch.tensor([prompt_ids + sample.token_ids], device=model.device)  # [1, L]
    logits = model(input_ids=ids, use_cache=False).logits[0, -n - 1 : -1]  # [n, V]
    of_tokens = logprob_from_logits(logits, ids[0, -n:])  # [n]
    if of_tokens.isnan().any():
        return 0.0  # batches are not to blame; the first answer's log-prob will stop the run
    of_likeliest = logprob_from_logits(logits, logits.argmax(-1))  # [n]
    scored_otherwise = abs(of_tokens.sum().item() - sample.logprob) / n
    # greedy means that these are the same
    written_otherwise = (of_likeliest - of_tokens).mean().item()
    return max(scored_otherwise, written_otherwise)


# ---- backend: vLLM -----------------------------------------------------------------------------

if __name__ == "__mp_main__":  # the name of this file in a process that vLLM spawned
    die_with_parent()  # otherwise it would keep the GPU's memory

LENGTH_STEP = 1024  # tokens; max_model_len is a multiple of it, see engine_length

# torchrun sets these variables in each of its processes, and more that begin with the prefixes.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_PREFIXES = ("GROUP_", "ROLE_", "TORCHELASTIC_")


def vllm_samples(
    args, policy: Policy, prompts: Iterator[Prompt]
) -> Iterator[tuple[Prompt, list[Sample]]]:
    """Keep the engine fed across parts; yield prompts as they finish, in any order."""
    engine = vllm_engine(args, policy)
    requests = Requests(args, policy, engine)
    # The number of requests held is bounded, so memory stays flat. It is twice what runs at once,
    # so the engine never starves.
    prompts_at_once = engine.vllm_config.scheduler_config.max_num_seqs / args.num_samples
    most = 2 * prompts_at_once * len(requests.groups)
    try:
        while True:
            while len(requests.waiting) < most:
                prompt = next(prompts, None)
                if prompt is None:
                    break
                requests.add(prompt)
            if not requests.waiting:
                return
            yield from requests.step()
    finally:
        engine.engine_core.shutdown(timeout=20)  # seconds until its processes are killed


class Requests:
    """What the engine was asked for and has not answered. A request is one prompt at one
    temperature.
    """

    def __init__(self, args, policy: Policy, engine):
        self.args = args
        self.stop_ids = policy.stop_ids
        self.engine = engine
        groups = itertools.groupby(temperatures(args))
        self.groups = [(temperature, len(list(group))) for temperature, group in groups]
        self.waiting: dict[str, tuple[Prompt, int]] = {}  # name -> prompt, index of first sample
        self.samples: dict[str, list[Sample | None]] = {}  # prompt id -> its N; None: waiting

    def add(self, prompt: Prompt) -> None:
        id = prompt.row["id"]
        self.samples[id] = [None] * self.args.num_samples
        first = 0
        for temperature, count in self.groups:
            name = f"{id}/{first}"
            parameters = self.parameters(prompt.seed + first, temperature, count)
            tokens = {"type": "token", "prompt_token_ids": prompt.ids}
            self.engine.add_request(name, tokens, parameters)
            self.waiting[name] = prompt, first
            first += count

    def parameters(self, seed: int, temperature: float, count: int):
        """vLLM gives sample i of a request the seed + i, so all N of a prompt differ."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        args = self.args
        return SamplingParams(
            n=count,
            seed=seed,
            temperature=temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            max_tokens=args.max_new_tokens,
            stop_token_ids=self.stop_ids,
            logprobs=0,  # of the sampled token and no other
            flat_logprobs=True,  # in the cheaper container
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def step(self) -> Iterator[tuple[Prompt, list[Sample]]]:
        """One step of the engine: yield the prompts that have all of their samples now."""
        for done in self.engine.step():
            prompt, first = self.waiting.pop(done.request_id)
            id = prompt.row["id"]
            for i, output in enumerate(done.outputs, first):
                token_ids = list(output.token_ids)
                sample = Sample(token_ids, output.cumulative_logprob, output.finish_reason)
                self.samples[id][i] = sample
            if None not in self.samples[id]:
                yield prompt, self.samples.pop(id)


def vllm_engine(args, policy: Policy):
    vllm_environment(args)  # before vLLM is imported
    settings = vllm_settings(args, policy)
    from vllm import EngineArgs, LLMEngine
    from vllm.usage.usage_lib import UsageContext

    folder, settings["model"] = engine_place(settings["model"])
    context = UsageContext.LLM_CLASS  # the batch sizes of vLLM's LLM, which are for throughput
    with chdir(folder):  # the engine's processes start and stay here; this one returns
        return LLMEngine.from_engine_args(EngineArgs(**settings), usage_context=context)


def vllm_environment(args) -> None:
    """Give this rank's engine its GPUs or cores, and hide torchrun from it. Otherwise the engine
    would take itself for one of several, and wait for the others.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    for name in list(os.environ):
        if name in LAUNCHER or name.startswith(LAUNCHER_PREFIXES):
            del os.environ[name]

    # A fork would inherit what CUDA knew before the next lines.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if torch.cuda.is_available():
        own = share_of_gpus(local_rank, local_world, args.tensor_parallel_size or 1)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        return
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM's default is half the memory
    if local_world > 1:  # else each engine would bind its threads to the same cores
        cores = sorted(os.sched_getaffinity(0))[local_rank::local_world] or [0]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))


def share_of_gpus(local_rank: int, local_world: int, each: int) -> list[str]:
    """The GPUs of this rank, `each` of them, by their names in CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    if count < each:
        raise Stop(
            f"--tensor_parallel_size {each} takes {each} GPUs, and this process sees {count} (of "
            "cards that MIG divides, a process sees one part)."
        )
    if count < local_world * each:
        raise Stop(
            f"{count} GPUs for {local_world} ranks of {each}: start {count // each} "
            "(--nproc_per_node)."
        )
    numbers = ",".join(map(str, range(count)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", numbers).split(",")
    return visible[local_rank * each : (local_rank + 1) * each]


def engine_length(policy: Policy, max_new_tokens: int) -> int:
    """max_model_len in tokens: the longest prompt and its answer, rounded up, at most the context.

    vLLM compiles the model again for every new max_model_len, and each iteration has other prompts.
    Its own default is the whole context, and it refuses to start where memory holds less than that.
    """
    needed = policy.longest + max_new_tokens
    steps = math.ceil(needed / LENGTH_STEP)
    return min(steps * LENGTH_STEP, policy.context)


def engine_place(model: str) -> tuple[Path, str]:
    """The folder that the engine starts in, and the name of the model there.

    vLLM looks up what it compiled by a key that holds the model's path (ModelConfig.compute_hash).
    RUN/iter_01/policy, RUN/iter_02/policy: each would be compiled again. So the engine starts in
    the folder above, and always loads "policy". Each process has its own current folder. Another
    rank or run cannot point it at other weights, as it could with a link of a fixed name.
    """
    if not os.path.isdir(model):
        return Path.cwd(), model  # a name on the hub is the same in every iteration
    path = Path(os.path.abspath(model))
    return path.parent, path.name


def vllm_settings(args, policy: Policy) -> dict:
    """The engine's arguments: ours, which make answers what records.py says, and --engine_args."""
    repository, commit = models.locate(args.model)
    ours = dict(
        model=repository,
        revision=commit,
        trust_remote_code=False,
        skip_tokenizer_init=True,  # ids go in and ids come out
        generation_config="vllm",  # not the model's: no top_k, no penalties
        dtype=policy.dtype,  # vLLM's "auto" turns an fp32 model into bf16
        logprobs_mode="raw_logprobs",  # at temperature 1, over the whole vocabulary
        disable_log_stats=True,
        tensor_parallel_size=args.tensor_parallel_size or 1,
    )
    length = policy.asked_context or engine_length(policy, args.max_new_tokens)
    defaults = dict(
        enable_prefix_caching=True,  # N samples share a prompt, and many prompts a system turn
        max_model_len=length,
    )
    head = {}
    if torch.cuda.is_available():
        # fp32 logits, as the trainer's; vLLM's own default rounds them to bf16. A GPU's product of
        # bf16 factors gives them directly. On a CPU vLLM would copy the head to fp32 at every step.
        head = {"head_dtype": "float32"}
    else:
        # With chunked prefill, vLLM rewinds the random generator after each chunk, which a CPU's
        # cannot do (vLLM 0.32).
        defaults["enable_chunked_prefill"] = False
        defaults["max_num_batched_tokens"] = max(4096, length)
    asked = key_values("engine_args", args.engine_args)
    check_engine_args(asked, ours)
    overrides = merge_overrides(head, asked.get("hf_overrides", {}))
    return ours | defaults | asked | {"hf_overrides": overrides}


def check_engine_args(asked: dict, ours: dict) -> None:
    from vllm import EngineArgs

    known = inspect.signature(EngineArgs).parameters
    if "hf_token" in asked:
        raise Stop("--engine_args hf_token would end up in logs: put it into HF_TOKEN alone.")
    for key in asked:
        if key in ours:
            raise Stop(f"--engine_args {key}: this stage sets it itself ({key}={ours[key]}).")
        if key not in known:
            raise Stop(f"--engine_args {key}: vLLM's EngineArgs has no such argument.")


def merge_overrides(ours: dict, asked: dict) -> dict:
    """Changes to the model's config, key by key: the user's keys win, our other keys stay."""
    if not isinstance(asked, dict):
        example = 'hf_overrides={"head_dtype":"model"}'
        raise Stop(f"--engine_args hf_overrides={asked}: give a JSON object, e.g. '{example}'.")
    return ours | asked


# ---- the stage ---------------------------------------------------------------------------------


class Parts:
    """The parts in progress: prompts go out, candidates come in, and finished parts are written."""

    def __init__(self, args, policy: Policy, stage: Stage, bar):
        self.args = args
        self.policy = policy
        self.stage = stage
        self.bar = bar
        self.tokens = 0  # written so far, for the bar

    def missing(self) -> Iterator[tuple[int, list[dict]]]:
        """Index and rows of each part that is this rank's and not yet written."""
        return self.stage.todo(read_jsonl(self.args.prompts, NEW_PROMPT))

    def prompts(self) -> Iterator[Prompt]:
        """The prompts of all missing parts, less those that are too long."""
        # The first prompt is asked for when the model is loaded: the clock of tokens/s starts here.
        self.bar.reset()
        for index, rows in self.missing():
            part = Part(index, len(rows), rows={})
            prompts = []
            for row in rows:
                ids = self.policy.encode(row["prompt"], self.args.prompts)
                if len(ids) > self.policy.max_prompt_length:
                    continue
                # One bit less than seed_of gives: vLLM adds a sample's index to it, and 63 bits
                # must hold the sum.
                seed = seed_of(self.args.seed, self.args.iteration, row["id"]) >> 1
                prompts.append(Prompt(part, row, ids, seed))
                part.rows[row["id"]] = None
            if not prompts:
                self.write(part)
            yield from prompts

    def take(self, prompt: Prompt, candidates: list[dict]) -> None:
        """Keep the candidates of a prompt, and write its part if it was the last one waiting."""
        row = prompt.row | {"prompt_token_ids": prompt.ids, "candidates": candidates}
        part = prompt.part
        part.rows[row["id"]] = row
        if None not in part.rows.values():
            self.write(part)

        # move the bar
        self.tokens += sum(len(candidate["token_ids"]) for candidate in candidates)
        seconds = max(self.bar.format_dict["elapsed"], 1e-9)
        self.bar.set_postfix_str(f"{self.tokens / seconds:,.0f} tokens/s", refresh=False)
        self.bar.update()

    def write(self, part: Part) -> None:
        rows = list(part.rows.values())
        too_long = part.total - len(rows)
        dropped = {"prompt_too_long": too_long}
        balance = {"in": part.total, "out": len(rows), "dropped": dropped}
        self.stage.write_part(part.index, rows, {"rows": balance})
        self.bar.update(too_long)


def candidates_of(
    samples: list[Sample], args, policy: Policy, model_hash: str, where: str
) -> list[dict]:
    """The samples as records.py wants them: one ends in a stop id exactly when it stopped."""
    all_ids = [sample.token_ids for sample in samples]
    texts = policy.tokenizer.batch_decode(all_ids, skip_special_tokens=True)
    candidates = []
    for sample, text, temperature in zip(samples, texts, temperatures(args), strict=True):
        reason = sample.finish_reason
        ended = chat.ends(sample.token_ids, policy.stop_ids)
        if reason != ("stop" if ended else "length"):
            raise AssertionError(f"{where}: finish_reason {reason}, but a stop id last: {ended}")
        candidate = {
            "text": text,
            "token_ids": sample.token_ids,
            "logprob": finite(sample.logprob, f"{where}: the log-prob of an answer"),
            "finish_reason": reason,
            "temperature": temperature,
            "model": model_hash,
        }
        candidates.append(candidate)
    return candidates


def answer_prompts(args, policy: Policy, parts: Parts, model_hash: str) -> None:
    backend = vllm_samples if args.backend == "vllm" else hf_samples
    # However this ends, closing the generator ends the engine.
    with closing(backend(args, policy, parts.prompts())) as answered:
        for prompt, samples in answered:
            where = f'{args.prompts}: "{prompt.row["id"]}"'
            candidates = candidates_of(samples, args, policy, model_hash, where)
            parts.take(prompt, candidates)


def main() -> None:
    args = read_arguments()
    inputs = {"model": args.model, "prompts": args.prompts}
    free = ("batch_size", "tensor_parallel_size", "engine_args")
    stage = Stage(args, inputs, args.output, free)
    if stage.done:
        return
    policy = Policy(args)
    total = policy.check_prompts(args.prompts)

    with stage.progress(total) as bar:
        parts = Parts(args, policy, stage, bar)
        if next(parts.missing(), None):  # where nothing is missing, no model is loaded
            answer_prompts(args, policy, parts, stage.hashes["model"])
    stage.join(total)


if __name__ == "__main__":
    run(main)
