"""Prompts -> candidates: the current policy writes N answers to every prompt.

    y_1 .. y_N ~ pi(. | x)          Online DPO's first half: answers come from the policy that is trained next
    logprob(y) = sum_t log pi(y_t | x, y_<t)                              (RLHF Workflow, arXiv:2405.07863)

However answers are sampled, `logprob` is that at temperature 1 over the whole vocabulary, because
that is what the trainer computes, and it compares the two: a wrong template, a doubled BOS or stale
weights show there.

    python generate.py --model Qwen/Qwen2.5-1.5B-Instruct --prompts prompts.jsonl --output candidates.jsonl
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 generate.py --model …

Each rank takes its share of the prompts and has an engine of its own; with --tensor_parallel_size 4
start 2 ranks on a machine of 8 GPUs. A killed run is gone on with by the same command, on any
number of ranks.

What makes answers the policy's own:

1. Token ids are what counts. The ids that the policy wrote are stored and trained on; `text` is
   decoded from them, for reading and for rewards. Text is never encoded again: encode(decode(ids))
   is not ids.
2. Nothing shapes the distribution but --temperature, --min_p, --top_k and --top_p, in this order,
   as in vLLM. Many models ship a generation_config.json with top_k or a repetition penalty in it;
   of that file only the ids that end an answer are taken.
3. An answer ends at any stop id: those of the generation config, the tokenizer's EOS, and what the
   chat template puts behind an assistant turn. That id is the last of token_ids exactly when
   finish_reason is "stop".
4. The random numbers of a prompt depend on (--seed, --iteration, prompt id) alone, not on its
   neighbours in the file or in the batch, and not on the ranks. On a CPU either backend gives the
   same file again, bit for bit. On a GPU rounding depends on the batch, and vLLM batches by what is
   finished when: now and then a sample tips over into another one.
"""

import argparse
import importlib.util
import inspect
import itertools
import math
import os
import sys
from collections.abc import Iterator
from contextlib import chdir, closing
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

import chat
import models
import records
from kernels.attention import attention_implementation, causal_lm_refusal, positions
from kernels.logprob import backbone, linear_logprob, lm_head, logprob_from_logits
from records import Stop
from stage import Stage, die_with_parent, key_values, parse, parser, run, say, seed_of

# Engine arguments that set memory and pace: no answer is meant to depend on them, so a run may go
# on with others.
PACE = ("gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "enforce_eager")
LENGTH_STEP = 1024  # tokens; vLLM's max_model_len is a multiple of it, see engine_length


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    add = p.add_argument
    add(
        "--model",
        required=True,
        help="the policy: a folder, or a name on the hub, NAME or NAME@REVISION",
    )
    add("--prompts", required=True, help="prompts.jsonl")
    add("--output", required=True, help="candidates.jsonl")
    add(
        "--backend",
        choices=("auto", "vllm", "hf"),
        default="auto",
        help="auto: vllm on a GPU, else hf: transformers",
    )
    # What is sampled
    add("--num_samples", type=int, default=8, help="answers a prompt; 8 as in RLHF Workflow")
    add(
        "--temperature",
        type=float,
        nargs="+",
        default=[1.0],
        help="0: greedy. Several share the samples, in order",
    )
    add("--top_p", type=float, default=1.0, help="sample the likeliest tokens of this mass; 1: all")
    add("--top_k", type=int, default=0, help="sample the likeliest this many; 0: all")
    add(
        "--min_p",
        type=float,
        default=0.0,
        help="sample what has this share of the likeliest token's chance; 0: all",
    )
    add(
        "--max_new_tokens",
        type=int,
        default=1024,
        help="tokens an answer; longer ones are cut: 'length'",
    )
    add(
        "--max_prompt_length",
        type=int,
        help="longer ones are dropped; default: what --max_new_tokens leaves free",
    )
    add(
        "--chat_template_kwargs",
        nargs="+",
        metavar="KEY=JSON",
        help="for the template: enable_thinking=false",
    )
    add("--seed", type=int, default=0, help="another seed, other answers")
    add(
        "--iteration",
        type=int,
        default=0,
        help="is part of the seed: a prompt seen again is answered anew",
    )
    # How it is computed
    add(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="auto: config.json's, or fp32",
    )
    add(
        "--batch_size",
        type=int,
        help="hf only: sequences a forward; default 512 on a CPU, 64 on a GPU",
    )
    add(
        "--tensor_parallel_size",
        type=int,
        help="vllm only: GPUs an engine, and so a rank; default 1",
    )
    add(
        "--engine_args",
        nargs="+",
        metavar="KEY=VALUE",
        help="vllm only: EngineArgs, as max_num_seqs=512; paths absolute",
    )
    args = parse(p)

    if args.backend == "auto":
        args.backend = (
            "vllm" if importlib.util.find_spec("vllm") and torch.cuda.is_available() else "hf"
        )
    for flag in (
        ("batch_size",) if args.backend == "vllm" else ("tensor_parallel_size", "engine_args")
    ):
        if getattr(args, flag) is not None:
            raise Stop(f"--{flag} has no effect with --backend {args.backend}: leave it out.")
    args.engine = [a for a in args.engine_args or [] if a.split("=")[0] not in PACE]
    for flag in (
        "num_samples",
        "max_new_tokens",
        "max_prompt_length",
        "batch_size",
        "tensor_parallel_size",
    ):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise Stop(f"--{flag} starts at 1, not {value}.")
    if not (
        0 < args.top_p <= 1
        and 0 <= args.min_p <= 1
        and args.top_k >= 0
        and min(args.temperature) >= 0
    ):
        raise Stop(
            "--top_p lies in (0, 1], --min_p in [0, 1]; --top_k and --temperature are not negative."
        )
    if not any(args.temperature) and (args.top_p, args.top_k, args.min_p) != (1, 0, 0):
        raise Stop(
            "--top_p, --top_k and --min_p have no effect at --temperature 0: leave them out."
        )
    if args.num_samples < len(args.temperature):
        raise Stop(
            f"{len(args.temperature)} temperatures for {args.num_samples} samples: some would get none."
        )
    if temperatures(args).count(0.0) > 1:
        raise Stop(
            "--temperature 0 writes the same answer every time: give it one of the --num_samples."
        )
    if args.batch_size is not None and args.batch_size < args.num_samples:
        raise Stop(
            f"--batch_size {args.batch_size}: the {args.num_samples} samples of a prompt run together."
        )
    return args


def temperatures(args) -> list[float]:
    """The temperature of each of the N samples: 8 samples at 0.7 and 1.0 are four of each."""
    n, k = args.num_samples, len(args.temperature)
    return [args.temperature[i * k // n] for i in range(n)]


# ---- the policy: what it reads, and where it ends ----------------------------------------------


class Policy:
    """Everything about the model but its weights, which are the backends' business."""

    def __init__(self, args):
        self.name = args.model
        self.config = models.load_config(self.name)
        refusal = causal_lm_refusal(self.config)
        if refusal:
            raise Stop(f"{self.name}: {refusal}.")
        self.tokenizer = models.load_tokenizer(self.name)
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(
            args.dtype, self.config.dtype or torch.float32
        )
        self.template_kwargs = key_values("chat_template_kwargs", args.chat_template_kwargs)
        chat.check_template_kwargs(self.tokenizer, self.template_kwargs)
        ends = models.load_generation_config(self.name, self.config)
        self.stop_ids, shown = chat.find_stop_ids(self.tokenizer, ends, self.template_kwargs)
        if not shown:
            known = f"so answers end at {self.stop_ids}"
            say(f"note: the chat template shows no answer of an assistant, {known}")
        if not self.stop_ids:
            raise Stop(
                f"{self.name}: nothing says where an answer ends. Set eos_token_id in generation_config.json."
            )

        asked = key_values("engine_args", args.engine_args).get("max_model_len")
        self.context = asked or positions(self.config)
        self.max_prompt_length = min(
            args.max_prompt_length or sys.maxsize, self.context - args.max_new_tokens
        )
        self.longest = (
            self.max_prompt_length
        )  # prompt to come; check_prompts has seen them all and lowers it

    def encode(self, prompt: str | list[dict], where: str) -> list[int]:
        """Token ids of a prompt, with one BOS if the tokenizer has that habit."""
        ids = chat.encode_prompt(self.tokenizer, prompt, where, self.template_kwargs)
        if not ids:
            raise Stop(f"{where}: the prompt is empty. Remove it.")
        return ids


def check_prompts(args, policy: Policy) -> int:
    """Read and encode all prompts before the first is answered: line 90,000 must not be what ends a
    night's run.
    """
    n = records.count_rows(args.prompts, records.PROMPT)
    strings, lengths = 0, set()
    for number, row in enumerate(records.read_jsonl(args.prompts, records.PROMPT), 1):
        prompt, where = row["prompt"], f"{args.prompts}:{number}"
        strings += isinstance(prompt, str)
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            raise Stop(
                f"{where}: the conversation ends in an assistant turn: nothing is left to answer. Remove it."
            )
        lengths.add(len(policy.encode(prompt, where)))
    if policy.template_kwargs and strings == n:
        raise Stop("--chat_template_kwargs has no effect: every prompt is a string.")
    policy.longest = max((x for x in lengths if x <= policy.max_prompt_length), default=0)
    if not policy.longest:
        room = f"all {n} prompts are longer than {policy.max_prompt_length} tokens, the shortest {min(lengths)}"
        remedy = (
            f"raise --max_prompt_length, or lower --max_new_tokens: the context is {policy.context}"
        )
        raise Stop(f"{args.prompts}: {room}; {remedy}.")
    return n


class Prompt(NamedTuple):
    part: int  # of the file, see records.py
    row: dict
    ids: list[int]
    seed: int


# ---- backend: transformers ---------------------------------------------------------------------


class Sampler:
    """Exact samples from rows of scores, with random numbers of each prompt's own.

        argmax_v (s_v + g_v),  g_v = -log e_v,  e_v ~ Exp(1)        is distributed as softmax(s)      (Gumbel, 1954)

    torch.multinomial would draw all rows from one stream, and a row's sample would depend on the
    rows around it.
    """

    def __init__(self, args, seeds: list[int], device):
        self.generators = [torch.Generator(device).manual_seed(s) for s in seeds]  # B of them
        # [B*N, 1]; dividing by 1e-5 leaves the noise nothing to decide, which is what temperature 0
        # means
        self.temperatures = torch.tensor(temperatures(args) * len(seeds), device=device).clamp_min(
            1e-5
        )[:, None]
        self.n = args.num_samples
        self.warpers = (
            [transformers.MinPLogitsWarper(args.min_p)] if args.min_p > 0 else []
        )  # in vLLM's order
        self.warpers += [transformers.TopKLogitsWarper(args.top_k)] if args.top_k > 0 else []
        self.warpers += [transformers.TopPLogitsWarper(args.top_p)] if args.top_p < 1 else []

    def __call__(self, scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """scores [R, V] of those of the B*N rows that still write -> token ids [R]"""
        noise = torch.empty(
            len(self.generators), self.n, scores.shape[-1], device=scores.device
        )  # [B, N, V]
        for own, generator in zip(noise, self.generators, strict=True):
            own.exponential_(
                generator=generator
            )  # for all N, or a row's numbers would depend on who has finished
        # An exponential that rounds to 0 would be noise of +inf, and NaN on a token that was ruled
        # out.
        noise = (
            noise.flatten(0, 1)[rows].clamp_min_(torch.finfo(torch.float32).tiny).log_().neg_()
        )  # [R, V]
        scores = scores.float() / self.temperatures[rows]
        for warper in self.warpers:
            scores = warper(None, scores)  # -inf for what is not to be sampled
        return (scores + noise).argmax(-1)


@torch.inference_mode()
def hf_samples(
    args, policy: Policy, prompts: Iterator[Prompt]
) -> Iterator[tuple[Prompt, list[dict]]]:
    """Answer the prompts a part at a time, in left-padded batches of like length."""
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    )
    attention = attention_implementation(policy.config)
    model = models.load_model(
        transformers.AutoModelForCausalLM, args.model, policy.dtype, attention
    )
    model = model.to(device).eval()
    if model._is_stateful:
        raise Stop(
            f"{policy.config.model_type} is recurrent, which hf cannot batch here: --backend vllm."
        )
    try:
        lm_head(model)
    except ValueError as e:
        raise Stop(f"{args.model}: {e}. --backend vllm needs no such thing.") from None
    check_batches(args.model, policy, model)
    per_batch = max(1, (args.batch_size or (64 if cuda else 512)) // args.num_samples)
    for _, part in itertools.groupby(prompts, key=lambda p: p.part):
        part = sorted(
            part, key=lambda p: -len(p.ids)
        )  # longest first: what does not fit fails at once
        for i in range(0, len(part), per_batch):
            batch = part[i : i + per_batch]
            try:
                answers = hf_batch(args, policy, model, batch)
            except torch.OutOfMemoryError:
                size = len(batch) * args.num_samples
                raise Stop(
                    f"out of memory at {size} sequences a forward: lower --batch_size, and go on."
                ) from None
            yield from zip(batch, answers, strict=True)


def forward(module, ids: torch.Tensor, mask: torch.Tensor, cache, **kwargs):
    """Run `ids` [R, L] behind what is cached. mask [R, cached + L]; positions start at its first
    real token.
    """
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return module(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        **kwargs,
    )


def hf_batch(args, policy: Policy, model, batch: list[Prompt]) -> list[list[dict]]:
    """N answers to each of B prompts, then their log-probs. Either way a prompt is computed once,
    not N times.
    """
    n, device = args.num_samples, model.device
    longest = max(len(p.ids) for p in batch)
    ids = torch.tensor(
        [[0] * (longest - len(p.ids)) + p.ids for p in batch], device=device
    )  # [B, P]
    mask = torch.tensor(
        [[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in batch], device=device
    )
    stop_ids = torch.tensor(policy.stop_ids, device=device)

    # Write. `rows` are those of the B*N that the batch still holds; it is cut down when a quarter
    # of it has finished.
    sampler = Sampler(args, [p.seed for p in batch], device)
    cache = transformers.DynamicCache(config=model.config)
    scores = (
        forward(model, ids, mask, cache, logits_to_keep=1).logits[:, -1].repeat_interleave(n, 0)
    )  # [B*N, V]
    cache.batch_repeat_interleave(n)
    rows, row_mask = torch.arange(len(batch) * n, device=device), mask.repeat_interleave(n, 0)
    alive = torch.ones_like(rows, dtype=torch.bool)
    written = []  # C x [B*N]
    for _ in range(args.max_new_tokens):
        tokens = sampler(scores, rows)  # [R]
        written.append(
            torch.zeros(len(batch) * n, dtype=torch.long, device=device).index_copy_(
                0, rows, tokens
            )
        )
        alive &= ~torch.isin(tokens, stop_ids)
        if not alive.any() or len(written) == args.max_new_tokens:
            break
        if alive.sum() <= 0.75 * len(alive):
            cache.batch_select_indices(alive.nonzero()[:, 0])
            rows, row_mask, tokens, alive = (
                rows[alive],
                row_mask[alive],
                tokens[alive],
                alive[alive],
            )
        row_mask = torch.cat([row_mask, row_mask.new_ones(len(rows), 1)], 1)
        scores = forward(model, tokens[:, None], row_mask, cache).logits[:, -1]  # [R, V]
    written = torch.stack(
        written, 1
    )  # [B*N, C]; behind a row's first stop id stands what nobody asked for
    stops = torch.isin(written, stop_ids)
    keep = stops.cumsum(1) - stops.long() == 0  # [B*N, C]: no stop id before this token

    # Score: one forward pass over the finished answers. Position t-1 predicts token t: the prompt's
    # last comes first.
    cache = transformers.DynamicCache(config=model.config)
    decoder = backbone(model)
    hidden = forward(decoder, ids, mask, cache)[0][:, -1:].repeat_interleave(n, 0)  # [B*N, 1, D]
    cache.batch_repeat_interleave(n)
    row_mask = torch.cat([mask.repeat_interleave(n, 0), keep.long()], 1)
    behind = forward(decoder, written, row_mask, cache)[0]
    hidden = torch.cat([hidden, behind[:, :-1]], 1)  # [B*N, C, D]
    logprobs = torch.zeros(keep.shape, dtype=torch.float64, device=device)
    logprobs[keep] = linear_logprob(hidden[keep], targets=written[keep], **lm_head(model)).double()

    finished = zip(
        written.tolist(),
        keep.sum(1).tolist(),
        logprobs.sum(1).tolist(),
        stops.any(1).tolist(),
        strict=True,
    )
    answers = [
        {
            "token_ids": row[:length],
            "logprob": logprob,
            "finish_reason": "stop" if stopped else "length",
        }
        for row, length, logprob, stopped in finished
    ]
    return [answers[i : i + n] for i in range(0, len(answers), n)]


def check_batches(name: str, policy: Policy, model) -> None:
    """Stop where batches, as hf_batch runs them, would make another model of it.

    Left padding wants positions that a model takes, decoding a cache that it reads, and scoring a
    head that we know. Some take what they are given and do nothing with it, so two made-up prompts
    are answered to see.
    """
    try:
        gap = batch_gap(policy, model)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever comes of an argument that its code did not expect
        raise Stop(
            f"{name}: {policy.config.model_type} does not run in padded batches with a cache "
            f"({type(e).__name__}: {e}), as --backend hf wants it. Try --backend vllm."
        ) from None
    if not gap <= (
        1e-3 if model.dtype == torch.float32 else 0.25
    ):  # as in the trainer: bf16 has 8 bits
        raise Stop(
            f"{name}: {policy.config.model_type} is another function in padded batches with a cache, as --backend hf "
            f"runs them, than alone: its log-probs differ by {gap:.2g} nats per token. Try --backend vllm."
        )


def batch_gap(policy: Policy, model) -> float:
    """Nats per token by which greedy answers of hf_batch differ from the model's plain forward
    pass, on average.
    """
    few = argparse.Namespace(
        num_samples=2, temperature=[0.0], min_p=0.0, top_k=0, top_p=1.0, max_new_tokens=4
    )
    middle = policy.config.get_text_config().vocab_size // 2
    prompts = [Prompt(0, {}, list(range(middle, middle + length)), seed=0) for length in (5, 2)]
    gaps = []
    for prompt, answers in zip(prompts, hf_batch(few, policy, model, prompts), strict=True):
        for answer in answers:
            n = len(answer["token_ids"])
            ids = torch.tensor([prompt.ids + answer["token_ids"]], device=model.device)  # [1, L]
            logits = model(input_ids=ids, use_cache=False).logits[0, -n - 1 : -1]  # [n, V]
            own = logprob_from_logits(logits, ids[0, -n:])  # [n]
            likeliest = logprob_from_logits(logits, logits.argmax(-1))  # [n]
            scored_otherwise = abs(own.sum().item() - answer["logprob"]) / n
            written_otherwise = (
                (likeliest - own).mean().item()
            )  # greedy means that these are the same
            gaps.append(max(scored_otherwise, written_otherwise))
    return sum(gaps) / len(gaps)


# ---- backend: vLLM -----------------------------------------------------------------------------


if __name__ == "__mp_main__":  # the name of this file in a process that vLLM spawned
    die_with_parent()  # or the GPU's memory would stay taken


def vllm_environment(args) -> None:
    """Give this rank's engine its GPUs, and hide from it that torchrun started us: it would wait
    for the others.
    """
    local_rank, local_world = (
        int(os.environ.get("LOCAL_RANK", 0)),
        int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
    launcher = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    for name in [
        k for k in os.environ if k in launcher or k.startswith(("GROUP_", "ROLE_", "TORCHELASTIC_"))
    ]:
        del os.environ[name]
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = (
        "spawn"  # a fork would inherit what CUDA knew before the next lines
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if torch.cuda.is_available():
        each, count = args.tensor_parallel_size or 1, torch.cuda.device_count()
        if count < each:
            sees = f"a process sees {count} here, and of cards cut by MIG one part"
            raise Stop(f"--tensor_parallel_size {each} takes {each} GPUs: {sees}.")
        if count < local_world * each:
            raise Stop(
                f"{count} GPUs for {local_world} ranks of {each}: start {count // each} (--nproc_per_node)."
            )
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(
            ","
        )
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(
            visible[local_rank * each : (local_rank + 1) * each]
        )
    else:
        os.environ.setdefault(
            "VLLM_CPU_KVCACHE_SPACE", "1"
        )  # GiB; its own default is half of the machine's memory
        if local_world > 1:  # each engine would bind its threads to the same cores
            cores = sorted(os.sched_getaffinity(0))[local_rank::local_world] or [0]
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))


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
    the folder above, and always loads "policy". The current folder is each process's own: unlike a
    link with a fixed name, no other rank or run can point it at other weights.
    """
    if not os.path.isdir(model):
        return Path.cwd(), model  # a name on the hub is the same in every iteration
    path = Path(os.path.abspath(model))
    return path.parent, path.name


def merge_overrides(ours: dict, asked: dict) -> dict:
    """Changes to the model's config, key by key: the user's keys win, the rest of ours stays."""
    if not isinstance(asked, dict):
        example = 'hf_overrides={"head_dtype":"model"}'
        raise Stop(f"--engine_args hf_overrides={asked}: give a JSON object, as '{example}'.")
    return ours | asked


def vllm_settings(args, policy: Policy) -> dict:
    """The engine's arguments: ours, which make answers what the contract says, and --engine_args."""
    from vllm import EngineArgs

    repository, commit = models.locate(args.model)
    ours = dict(
        model=repository,
        revision=commit,
        trust_remote_code=False,
        skip_tokenizer_init=True,  # ids go in and ids come out
        generation_config="vllm",  # not the model's: no top_k, no penalties
        dtype=policy.dtype,  # its own "auto" makes bf16 of an fp32 model
        logprobs_mode="raw_logprobs",  # at temperature 1, over the whole vocabulary
        disable_log_stats=True,
        tensor_parallel_size=args.tensor_parallel_size or 1,
    )
    defaults = dict(
        enable_prefix_caching=True,  # N samples share a prompt, and many prompts a system turn
        max_model_len=engine_length(policy, args.max_new_tokens),
        hf_overrides={},
    )
    if torch.cuda.is_available():
        # fp32 logits, as the trainer's; vLLM's own default rounds them to bf16. A GPU's product of
        # bf16 factors gives them directly. On a CPU vLLM would copy the head to fp32 at every step.
        defaults["hf_overrides"] = {"head_dtype": "float32"}
    else:
        # After a piece of a prompt the random numbers are rewound, which a CPU's generator cannot
        # (vLLM 0.32).
        defaults |= dict(
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(4096, defaults["max_model_len"]),
        )
    asked = key_values("engine_args", args.engine_args)
    for key in asked:
        if key in ours:
            raise Stop(f"--engine_args {key}: this stage sets it itself ({key}={ours[key]}).")
        if key not in inspect.signature(EngineArgs).parameters:
            raise Stop(f"--engine_args {key}: vLLM's EngineArgs has no such argument.")
    overrides = merge_overrides(defaults["hf_overrides"], asked.get("hf_overrides", {}))
    return ours | defaults | asked | {"hf_overrides": overrides}


def vllm_engine(args, policy: Policy):
    vllm_environment(args)  # before vLLM is imported
    settings = vllm_settings(args, policy)
    from vllm import EngineArgs, LLMEngine
    from vllm.usage.usage_lib import UsageContext

    folder, settings["model"] = engine_place(settings["model"])
    context = UsageContext.LLM_CLASS  # the batch sizes of vLLM's LLM, which are for throughput
    with chdir(folder):  # the engine's processes start and stay here; this one goes back
        return LLMEngine.from_engine_args(EngineArgs(**settings), usage_context=context)


def vllm_samples(
    args, policy: Policy, prompts: Iterator[Prompt]
) -> Iterator[tuple[Prompt, list[dict]]]:
    """Keep the engine fed across parts; yield prompts as they finish, in any order.

    The engine holds a bounded number of requests, so memory is flat, but twice what it runs at
    once: it never starves.
    """
    engine = vllm_engine(args, policy)
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    groups = [(t, len(list(g))) for t, g in itertools.groupby(temperatures(args))]  # a request each
    at_once = (
        engine.vllm_config.scheduler_config.max_num_seqs / args.num_samples * len(groups)
    )  # requests
    waiting: dict[
        str, tuple[Prompt, int, list]
    ] = {}  # request -> prompt, index of its first sample, the N answers
    try:
        while True:
            while len(waiting) < 2 * at_once and (prompt := next(prompts, None)):
                first, answers = 0, [None] * args.num_samples
                for temperature, count in groups:
                    params = SamplingParams(
                        # vLLM gives its sample i the seed + i, so that all N of a prompt have
                        # different ones.
                        n=count, seed=prompt.seed + first, temperature=temperature,
                        top_p=args.top_p, top_k=args.top_k, min_p=args.min_p,
                        max_tokens=args.max_new_tokens, stop_token_ids=policy.stop_ids,
                        # of the sampled token and no other, in the cheaper container
                        logprobs=0, flat_logprobs=True,
                        detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
                    )  # fmt: skip
                    name = f"{prompt.row['id']}/{first}"
                    engine.add_request(
                        name, {"type": "token", "prompt_token_ids": prompt.ids}, params
                    )
                    waiting[name] = prompt, first, answers
                    first += count
            if not waiting:
                return
            for done in engine.step():
                prompt, first, answers = waiting.pop(done.request_id)
                answers[first : first + len(done.outputs)] = [
                    {
                        "token_ids": list(o.token_ids),
                        "logprob": o.cumulative_logprob,
                        "finish_reason": o.finish_reason,
                    }
                    for o in done.outputs
                ]
                if None not in answers:
                    yield prompt, answers
    finally:
        engine.engine_core.shutdown(
            timeout=20
        )  # its processes end with us; after 20 s they are killed


# ---- the stage ---------------------------------------------------------------------------------


def candidates(args, policy: Policy, model: str, answers: list[dict], where: str) -> list[dict]:
    """The answers as the contract wants them, each checked: EOS is there exactly when the policy
    wrote it.
    """
    texts = policy.tokenizer.batch_decode(
        [a["token_ids"] for a in answers], skip_special_tokens=True
    )
    result = []
    for answer, text, temperature in zip(answers, texts, temperatures(args), strict=True):
        ended = answer["token_ids"][-1] in policy.stop_ids
        if answer["finish_reason"] != ("stop" if ended else "length"):
            raise AssertionError(
                f"{where}: finish_reason {answer['finish_reason']}, but EOS at the end: {ended}"
            )
        records.finite(answer["logprob"], f"{where}: the log-prob of an answer")
        result.append({"text": text, **answer, "temperature": temperature, "model": model})
    return result


def main() -> None:
    args = arguments()
    inputs = {"model": args.model, "prompts": args.prompts}
    stage = Stage(
        args, inputs, args.output, free=("batch_size", "tensor_parallel_size", "engine_args")
    )
    if stage.done:
        return
    policy = Policy(args)
    n = check_prompts(args, policy)
    bar = stage.progress(n)
    rows_in: dict[int, int] = {}  # part -> how many rows it has
    kept: dict[int, list[dict]] = {}  # those that fit, of which so many
    waiting: dict[int, int] = {}  # are not answered yet

    def prompts() -> Iterator[Prompt]:
        # the first prompt is asked for when the model is loaded: its time is not that of the tokens
        bar.reset()
        for part, rows in stage.todo(records.read_jsonl(args.prompts, records.PROMPT)):
            encoded = [(row, policy.encode(row["prompt"], args.prompts)) for row in rows]
            fit = [(row, ids) for row, ids in encoded if len(ids) <= policy.max_prompt_length]
            rows_in[part], kept[part], waiting[part] = len(rows), [row for row, _ in fit], len(fit)
            if not fit:
                write(part)
            for row, ids in fit:
                # A bit less than seed_of gives: vLLM adds a sample's index to it, and 63 bits must
                # hold the sum.
                yield Prompt(
                    part, row, ids, seed=seed_of(args.seed, args.iteration, row["id"]) >> 1
                )

    def write(part: int) -> None:
        rows = kept.pop(part)
        dropped = rows_in[part] - len(rows)
        counts = {"in": rows_in[part], "out": len(rows), "dropped": {"prompt_too_long": dropped}}
        stage.write_part(part, rows, {"rows": counts})
        bar.update(dropped)

    samples = vllm_samples if args.backend == "vllm" else hf_samples
    with (
        bar,
        closing(samples(args, policy, prompts())) as stream,
    ):  # closing it ends the engine, whatever happens here
        tokens = 0
        for prompt, answers in (
            stream if bar.total else ()
        ):  # else nothing is left: no engine is started
            checked = candidates(
                args,
                policy,
                stage.hashes["model"],
                answers,
                f'{args.prompts}: "{prompt.row["id"]}"',
            )
            prompt.row.update(prompt_token_ids=prompt.ids, candidates=checked)
            waiting[prompt.part] -= 1
            if not waiting[prompt.part]:
                write(prompt.part)
            tokens += sum(len(a["token_ids"]) for a in answers)
            bar.set_postfix_str(
                f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s", refresh=False
            )
            bar.update()
    stage.join(n)


if __name__ == "__main__":
    run(main)
