"""Prompts -> candidates: the current policy writes N answers to every prompt.

    y_1 .. y_N ~ pi(. | x)          Online DPO's first half: answers come from the policy that is trained next
    logprob(y) = sum_t log pi(y_t | x, y_<t)                              (RLHF Workflow, arXiv:2405.07863)

Sampling may be at any temperature and top-p; `logprob` is always at temperature 1 over the whole vocabulary, because
that is what the trainer computes, and it compares the two: a wrong template, a doubled BOS or stale weights show there.

    python generate.py --model Qwen/Qwen2.5-1.5B-Instruct --prompts prompts.jsonl --output candidates.jsonl
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 generate.py --model …

Each rank takes its share of the prompts and has an engine of its own; with --tensor_parallel_size 4 start 2 ranks on
a machine of 8 GPUs. A killed run is gone on with by the same command, on any number of ranks.

What makes answers the policy's own:

1. Token ids are what counts. The ids that the policy wrote are stored and trained on; `text` is decoded from them, for
   reading and for rewards. Text is never encoded again: encode(decode(ids)) is not ids.
2. Nothing but --temperature and --top_p shapes the distribution. Many models ship a generation_config.json with top_k
   or a repetition penalty in it; of that file only the ids that end an answer are taken.
3. An answer ends at any stop id: those of the generation config, the tokenizer's EOS, and what the chat template puts
   behind an assistant turn. That id is the last of token_ids exactly when finish_reason is "stop".
4. The random numbers of a prompt depend on (--seed, --iteration, prompt id) alone, not on its neighbours in the file or
   in the batch, and not on the ranks. What remains is rounding: the same sum in another order can tip a sample over.
   The hf backend on a CPU gives the same file, bit for bit; vLLM batches by what is finished when, so on a GPU most
   answers of a second run are the same and not all.
"""

import argparse
import ctypes
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    TopPLogitsWarper,
)

import records
from kernels.attention import attention_implementation
from kernels.logprob import linear_logprob, lm_head


def arguments() -> argparse.Namespace:
    p = records.parser(__doc__)
    p.add_argument("--model", required=True, help="the policy: a folder, or a name on the hub")
    p.add_argument("--prompts", required=True, help="prompts.jsonl")
    p.add_argument("--output", required=True, help="candidates.jsonl")
    p.add_argument(
        "--backend", choices=("auto", "vllm", "hf"), default="auto",
        help="hf is transformers: slower, and runs wherever torch does. auto: vllm where it and a GPU are, else hf",
    )  # fmt: skip
    # What is sampled
    p.add_argument("--num_samples", type=int, default=8, help="answers a prompt; 8 as RLHF Workflow and OpenRLHF")
    p.add_argument(
        "--temperature", type=float, nargs="+", default=[1.0],
        help="1: the policy itself. Several: the samples are split among them, in order. 0: greedy",
    )  # fmt: skip
    p.add_argument("--top_p", type=float, default=1.0, help="sample the likeliest tokens of this mass; 1: all")
    p.add_argument("--max_new_tokens", type=int, default=1024, help="tokens an answer; longer ones are cut: 'length'")
    p.add_argument(
        "--max_prompt_length", type=int,
        help="tokens; longer prompts are dropped and counted. Default: what --max_new_tokens leaves of the context",
    )  # fmt: skip
    p.add_argument(
        "--chat_template_kwargs", nargs="+", metavar="KEY=JSON", help="for the chat template: enable_thinking=false"
    )
    p.add_argument("--seed", type=int, default=0, help="another seed, other answers")
    p.add_argument("--iteration", type=int, default=0, help="is part of the seed: a prompt seen again is answered anew")
    # How it is computed
    p.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: config.json's, or fp32")
    p.add_argument("--batch_size", type=int, help="hf only: sequences a forward; default 512 on a CPU, 64 on a GPU")
    p.add_argument("--tensor_parallel_size", type=int, help="vllm only: GPUs an engine, and so a rank; default 1")
    p.add_argument(
        "--engine_args", nargs="+", metavar="KEY=VALUE",
        help="vllm only: any argument of its engine, as gpu_memory_utilization=0.8 max_num_seqs=512",
    )  # fmt: skip
    args = records.parse(p)

    if args.backend == "auto":
        args.backend = "vllm" if importlib.util.find_spec("vllm") and torch.cuda.is_available() else "hf"
    for flag in ("batch_size",) if args.backend == "vllm" else ("tensor_parallel_size", "engine_args"):
        if getattr(args, flag) is not None:
            raise records.Stop(f"--{flag} has no effect with --backend {args.backend}: leave it out.")
    for flag in ("num_samples", "max_new_tokens", "max_prompt_length", "batch_size", "tensor_parallel_size"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise records.Stop(f"--{flag} starts at 1, not {value}.")
    if not 0 < args.top_p <= 1 or min(args.temperature) < 0:
        raise records.Stop("--top_p lies in (0, 1], and --temperature is not negative.")
    if args.num_samples < len(args.temperature):
        raise records.Stop(f"{len(args.temperature)} temperatures for {args.num_samples} samples: some would get none.")
    if args.batch_size is not None and args.batch_size < args.num_samples:
        raise records.Stop(f"--batch_size {args.batch_size}: the {args.num_samples} samples of a prompt run together.")
    if temperatures(args).count(0.0) > 1:
        raise records.Stop("--temperature 0 writes the same answer every time: give it one of the --num_samples.")
    return args


def temperatures(args) -> list[float]:
    """The temperature of each of the N samples: 8 samples at 0.7 and 1.0 are four of each."""
    n, k = args.num_samples, len(args.temperature)
    return [args.temperature[i * k // n] for i in range(n)]


def key_values(flag: str, pairs: list[str] | None) -> dict:
    """["a=1", "b=x"] -> {"a": 1, "b": "x"}: JSON where it is JSON, else a string."""
    result = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise records.Stop(f"--{flag}: {pair!r} is no key=value.")
        try:
            result[key] = json.loads(value)
        except json.JSONDecodeError:
            result[key] = value
    return result


# ---- the policy: what it reads, and where it ends ------------------------------------------------------------------


class Prompt(NamedTuple):
    part: int  # which part of the file it belongs to, and which row of the part it is
    position: int
    ids: list[int]
    seed: int


class Policy:
    """Everything about the model but its weights, which are the backends' business."""

    def __init__(self, args):
        self.args = args
        try:
            self.config = AutoConfig.from_pretrained(args.model)
        except (OSError, ValueError) as e:
            raise records.Stop(f"{args.model}: no model that transformers knows ({e})") from None
        if type(self.config) not in MODEL_FOR_CAUSAL_LM_MAPPING or self.config.is_encoder_decoder:
            raise records.Stop(
                f"{args.model}: {self.config.model_type} is no decoder-only language model of transformers' "
                "own. Encoder-decoders have no single sequence to train on, and remote code is not run."
            )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise records.Stop(f"{args.model}: no tokenizer ({e}). Save it beside the weights.") from None
        if len(self.tokenizer) == 0:  # what transformers makes of a folder with none in it
            raise records.Stop(f"{args.model}: no tokenizer. Save it beside the weights: tokenizer.save_pretrained(…).")
        self.template = self.tokenizer.chat_template and self.tokenizer.get_chat_template()
        self.template_kwargs = key_values("chat_template_kwargs", args.chat_template_kwargs)
        for key in self.template_kwargs:
            if not re.search(rf"\b{re.escape(key)}\b", self.template or ""):
                raise records.Stop(f"--chat_template_kwargs {key}: the chat template of {args.model} never reads it.")
        named = {"bf16": torch.bfloat16, "fp32": torch.float32}
        self.dtype = named.get(args.dtype) or self.config.dtype or torch.float32
        self.stop_ids = self._stop_ids()
        # Does the tokenizer begin every text with a BOS?
        bos, ids = self.tokenizer.bos_token_id, self.tokenizer("a").input_ids
        self.adds_bos = bos is not None and ids[:1] == [bos]

        self.context = key_values("engine_args", args.engine_args).get("max_model_len") or getattr(
            self.config.get_text_config(), "max_position_embeddings", sys.maxsize
        )
        self.max_prompt_length = min(args.max_prompt_length or sys.maxsize, self.context - args.max_new_tokens)
        if self.max_prompt_length < 1:
            raise records.Stop(
                f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt: the context of {args.model} is "
                f"{self.context} tokens. Lower it."
            )

    def _stop_ids(self) -> list[int]:
        try:
            generation = GenerationConfig.from_pretrained(self.args.model)
        except OSError:  # the file is optional; transformers falls back to the model's config, and so do we
            generation = GenerationConfig.from_model_config(self.config)
        eos = generation.eos_token_id
        stop = {*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id} - {None}
        if self.template:
            # Render an answer that no template can mistake for anything, and look at what comes right behind it.
            answer = "plainanswer"
            turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, **self.template_kwargs)
            behind = self.tokenizer(text.rpartition(answer)[2], add_special_tokens=False).input_ids
            stop.update([i for i in behind if i in self.tokenizer.added_tokens_decoder][:1])
        if not stop:
            raise records.Stop(
                f"{self.args.model}: nothing says where an answer ends. Set eos_token_id in generation_config.json."
            )
        return sorted(stop)

    def encode(self, prompt, where: str) -> list[int]:
        """Token ids of a prompt, with one BOS if the tokenizer has that habit."""
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt).input_ids
        elif not self.template:
            raise records.Stop(
                f"{where}: the prompt is a conversation, but {self.args.model} has no chat template. Use an instruct "
                "model, add chat_template.jinja to the folder, or give prompts as strings."
            )
        else:
            try:
                # The template writes BOS itself; tokenize=True adds no second one, which encoding its text would.
                ids = self.tokenizer.apply_chat_template(
                    prompt, tokenize=True, add_generation_prompt=True, return_dict=False, **self.template_kwargs
                )
            except TemplateError as e:
                raise records.Stop(f"{where}: the chat template of {self.args.model} refuses it: {e}") from None
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise records.Stop(
                f"{where}: the prompt begins with two BOS, {self.tokenizer.bos_token}. "
                "A string must not hold what the tokenizer adds; a chat template must write it once."
            )
        if self.adds_bos and ids[:1] != [bos]:
            raise records.Stop(
                f"{where}: the tokenizer of {self.args.model} begins a text with {self.tokenizer.bos_token}, its chat "
                "template does not. Put {{ bos_token }} at the start of the template, or turn it off in the tokenizer."
            )
        return ids


def check_prompts(args, policy: Policy) -> int:
    """Read all prompts before the first is answered, so that line 90,000 is not what ends a night's run."""
    n = records.count_rows(args.prompts, records.PROMPT)
    conversations = 0
    for number, row in enumerate(records.read_jsonl(args.prompts, records.PROMPT), 1):
        if isinstance(row["prompt"], list):
            conversations += 1
            if row["prompt"][-1]["role"] == "assistant":
                raise records.Stop(
                    f"{args.prompts}:{number}: the conversation ends in an assistant turn, so there is nothing to "
                    "answer. Remove that turn (tools/prepare_prompts.py does)."
                )
    if policy.template_kwargs and not conversations:
        raise records.Stop("--chat_template_kwargs has no effect: every prompt is a string.")
    lengths = []
    for number, row in enumerate(records.read_jsonl(args.prompts, records.PROMPT), 1):
        lengths.append(len(policy.encode(row["prompt"], f"{args.prompts}:{number}")))
        if lengths[-1] <= policy.max_prompt_length:  # nearly always the first
            return n
    raise records.Stop(
        f"{args.prompts}: all {n} prompts are longer than {policy.max_prompt_length} tokens (the shortest has "
        f"{min(lengths)}). Raise --max_prompt_length, or lower --max_new_tokens: the context is {policy.context}."
    )


# ---- backend: transformers -----------------------------------------------------------------------------------------


class Sampler:
    """Exact samples from rows of scores, with random numbers of each prompt's own.

        argmax_v (s_v + g_v),  g_v = -log e_v,  e_v ~ Exp(1)        is distributed as softmax(s)      (Gumbel, 1954)

    torch.multinomial would draw all rows from one stream, and a row's sample would depend on the rows around it.
    """

    def __init__(self, args, seeds: list[int], device):
        self.generators = [torch.Generator(device).manual_seed(s) for s in seeds]  # B of them
        # [B*N, 1]; dividing by 1e-5 leaves the noise nothing to decide, which is what temperature 0 means
        self.temperatures = torch.tensor(temperatures(args) * len(seeds), device=device).clamp_min(1e-5)[:, None]
        self.n = args.num_samples
        self.top_p = TopPLogitsWarper(args.top_p) if args.top_p < 1 else None

    def __call__(self, scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """scores [R, V] of those of the B*N rows that still write -> token ids [R]"""
        noise = torch.empty(len(self.generators), self.n, scores.shape[-1], device=scores.device)  # [B, N, V]
        for own, generator in zip(noise, self.generators, strict=True):
            own.exponential_(generator=generator)  # for all N, or a row's numbers would depend on who has finished
        # An exponential that rounds to 0 would be noise of +inf, and NaN on a token that top-p ruled out.
        noise = noise.flatten(0, 1)[rows].clamp_min_(torch.finfo(torch.float32).tiny).log_().neg_()  # [R, V]
        scores = scores.float() / self.temperatures[rows]
        return ((self.top_p(None, scores) if self.top_p else scores) + noise).argmax(-1)


@torch.inference_mode()
def hf_samples(args, policy: Policy, prompts: Iterator[Prompt]) -> Iterator[tuple[Prompt, list[dict]]]:
    """Answer the prompts a part at a time, in left-padded batches of like length."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    attention = attention_implementation(policy.config)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=policy.dtype, attn_implementation=attention)
    if model._is_stateful:
        raise records.Stop(f"{policy.config.model_type} is recurrent, which hf cannot batch here: --backend vllm.")
    model = model.to(device).eval()
    per_batch = max(1, (args.batch_size or (64 if cuda else 512)) // args.num_samples)
    for _, part in itertools.groupby(prompts, key=lambda p: p.part):
        part = sorted(part, key=lambda p: -len(p.ids))  # longest first: what does not fit fails at once
        for i in range(0, len(part), per_batch):
            batch = part[i : i + per_batch]
            try:
                answers = hf_batch(args, policy, model, batch)
            except torch.OutOfMemoryError:
                raise records.Stop(
                    f"out of GPU memory with {len(batch) * args.num_samples} sequences a forward. Run again with a "
                    "smaller --batch_size: what was finished is kept."
                ) from None
            yield from zip(batch, answers, strict=True)


def forward(module, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache, **kwargs):
    """Run `ids` [R, L] behind what is cached. mask [R, cached + L]; positions start at its first real token."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return module(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **kwargs
    )


def hf_batch(args, policy: Policy, model, batch: list[Prompt]) -> list[list[dict]]:
    """N answers to each of B prompts, then their log-probs. Either way a prompt is computed once, not N times."""
    n, device = args.num_samples, model.device
    longest = max(len(p.ids) for p in batch)
    ids = torch.tensor([[0] * (longest - len(p.ids)) + p.ids for p in batch], device=device)  # [B, P]
    mask = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in batch], device=device)
    stop_ids = torch.tensor(policy.stop_ids, device=device)

    # Write. `rows` are those of the B*N that the batch still holds; it is cut down when a quarter of it has finished.
    sampler = Sampler(args, [p.seed for p in batch], device)
    cache = DynamicCache(config=model.config)
    scores = forward(model, ids, mask, cache, logits_to_keep=1).logits[:, -1].repeat_interleave(n, 0)  # [B*N, V]
    cache.batch_repeat_interleave(n)
    rows, row_mask = torch.arange(len(batch) * n, device=device), mask.repeat_interleave(n, 0)
    alive = torch.ones_like(rows, dtype=torch.bool)
    written = []  # C x [B*N]
    for _ in range(args.max_new_tokens):
        tokens = sampler(scores, rows)  # [R]
        written.append(torch.zeros(len(batch) * n, dtype=torch.long, device=device).index_copy_(0, rows, tokens))
        alive &= ~torch.isin(tokens, stop_ids)
        if not alive.any() or len(written) == args.max_new_tokens:
            break
        if alive.sum() <= 0.75 * len(alive):
            cache.batch_select_indices(alive.nonzero()[:, 0])
            rows, row_mask, tokens, alive = rows[alive], row_mask[alive], tokens[alive], alive[alive]
        row_mask = torch.cat([row_mask, row_mask.new_ones(len(rows), 1)], 1)
        scores = forward(model, tokens[:, None], row_mask, cache).logits[:, -1]  # [R, V]
    written = torch.stack(written, 1)  # [B*N, C]; behind a row's first stop id stands what nobody asked for
    stops = torch.isin(written, stop_ids)
    keep = stops.cumsum(1) - stops.long() == 0  # [B*N, C]: no stop id before this token

    # Score: one forward pass over the finished answers. Position t-1 predicts token t: the prompt's last comes first.
    cache = DynamicCache(config=model.config)
    hidden = forward(model.base_model, ids, mask, cache)[0][:, -1:].repeat_interleave(n, 0)  # [B*N, 1, D]
    if written.shape[1] > 1:
        cache.batch_repeat_interleave(n)
        row_mask = torch.cat([mask.repeat_interleave(n, 0), keep[:, :-1].long()], 1)
        hidden = torch.cat([hidden, forward(model.base_model, written[:, :-1], row_mask, cache)[0]], 1)  # [B*N, C, D]
    logprobs = torch.zeros(keep.shape, dtype=torch.float64, device=device)
    logprobs[keep] = linear_logprob(hidden[keep], targets=written[keep], **lm_head(model)).double()

    finished = zip(written.tolist(), keep.sum(1).tolist(), logprobs.sum(1).tolist(), stops.any(1).tolist(), strict=True)
    answers = [
        {"token_ids": row[:length], "logprob": logprob, "finish_reason": "stop" if stopped else "length"}
        for row, length, logprob, stopped in finished
    ]
    return [answers[i : i + n] for i in range(0, len(answers), n)]


# ---- backend: vLLM -------------------------------------------------------------------------------------------------


def die_with_parent() -> None:
    """vLLM's processes outlive a parent that is killed with -9, and the GPU's memory with them. Linux can end them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


if __name__ == "__mp_main__":  # the name of this file in a process that vLLM spawned: it imports what was started
    die_with_parent()


def vllm_environment(args) -> None:
    """Give this rank's engine its GPUs, and hide from it that torchrun started us: it would wait for the others."""
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in [k for k in os.environ if k in launcher or k.startswith(("GROUP_", "ROLE_", "TORCHELASTIC_"))]:
        del os.environ[name]
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork would inherit what CUDA knew before the next lines
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if torch.cuda.is_available():
        per_rank, count = args.tensor_parallel_size or 1, torch.cuda.device_count()
        if count < local_world * per_rank:
            raise records.Stop(
                f"{local_world} ranks x --tensor_parallel_size {per_rank} need {local_world * per_rank} GPUs, here are "
                f"{count}: start {count // per_rank} ranks (torchrun --nproc_per_node)."
            )
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[local_rank * per_rank : (local_rank + 1) * per_rank])
    else:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; its own default is half of the machine's memory
        if local_world > 1:  # each engine would bind its threads to the same cores
            cores = sorted(os.sched_getaffinity(0))[local_rank::local_world] or [0]
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))


def vllm_settings(args, policy: Policy) -> dict:
    """The engine's arguments: ours, which make answers what the contract says, and --engine_args."""
    from vllm import EngineArgs

    ours = dict(
        model=args.model,
        skip_tokenizer_init=True,  # ids go in and ids come out
        generation_config="vllm",  # not the model's: no top_k, no penalties
        dtype=policy.dtype,  # its own "auto" makes bf16 of an fp32 model
        logprobs_mode="raw_logprobs",  # at temperature 1, before top-p
        disable_log_stats=True,
        tensor_parallel_size=args.tensor_parallel_size or 1,
    )
    defaults = dict(
        enable_prefix_caching=True,  # N samples share a prompt, and many prompts a system turn
        # Its own is the model's whole context, and it refuses to start where memory holds less than that.
        max_model_len=policy.max_prompt_length + args.max_new_tokens,
    )
    if not torch.cuda.is_available():
        # After a piece of a prompt the random numbers are rewound, which a CPU's generator cannot (vLLM 0.32).
        defaults |= dict(enable_chunked_prefill=False, max_num_batched_tokens=max(4096, defaults["max_model_len"]))
    asked = key_values("engine_args", args.engine_args)
    for key in asked:
        if key in ours:
            raise records.Stop(f"--engine_args {key}: this stage sets it itself ({key}={ours[key]}).")
        if key not in inspect.signature(EngineArgs).parameters:
            raise records.Stop(f"--engine_args {key}: vLLM's EngineArgs has no such argument.")
    return ours | defaults | asked


def vllm_engine(args, policy: Policy):
    settings = vllm_settings(args, policy)
    vllm_environment(args)
    from vllm import EngineArgs, LLMEngine
    from vllm.usage.usage_lib import UsageContext

    # LLM_CLASS: the batch sizes of vLLM's LLM, which are for throughput
    return LLMEngine.from_engine_args(EngineArgs(**settings), usage_context=UsageContext.LLM_CLASS)


def vllm_samples(args, policy: Policy, prompts: Iterator[Prompt]) -> Iterator[tuple[Prompt, list[dict]]]:
    """Keep the engine fed across parts; yield prompts as they finish, in any order.

    The engine holds a bounded number of requests, so memory is flat, but twice what it runs at once: it never starves.
    """
    engine = vllm_engine(args, policy)
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    n, window = args.num_samples, 2 * engine.vllm_config.scheduler_config.max_num_seqs  # sequences
    groups = [(t, len(list(g))) for t, g in itertools.groupby(temperatures(args))]  # a request each
    waiting: dict[str, tuple[Prompt, int, list]] = {}  # request -> prompt, index of its first sample, the N answers
    in_flight = 0
    try:
        while True:
            while (not waiting or in_flight + n <= window) and (prompt := next(prompts, None)):
                in_flight, first, answers = in_flight + n, 0, [None] * n
                for temperature, count in groups:
                    params = SamplingParams(
                        # vLLM gives its sample i the seed + i, so that all N of a prompt have different ones.
                        n=count, seed=prompt.seed + first, temperature=temperature, top_p=args.top_p,
                        max_tokens=args.max_new_tokens, stop_token_ids=policy.stop_ids,
                        logprobs=0, flat_logprobs=True,  # of the sampled token and no other, in the cheaper container
                        detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
                    )  # fmt: skip
                    name = f"{prompt.part}/{prompt.position}/{first}"
                    engine.add_request(name, {"type": "token", "prompt_token_ids": prompt.ids}, params)
                    waiting[name] = prompt, first, answers
                    first += count
            if not waiting:
                return
            for done in engine.step():
                prompt, first, answers = waiting.pop(done.request_id)
                answers[first : first + len(done.outputs)] = [
                    {"token_ids": list(o.token_ids), "logprob": o.cumulative_logprob, "finish_reason": o.finish_reason}
                    for o in done.outputs
                ]
                if None not in answers:
                    in_flight -= n
                    yield prompt, answers
    finally:
        engine.engine_core.shutdown(timeout=20)  # its processes end with us; after 20 s they are killed


# ---- the stage -----------------------------------------------------------------------------------------------------


def candidates(policy: Policy, model: str, temperature: list[float], answers: list[dict], where: str) -> list[dict]:
    """The answers as the contract wants them, each checked: EOS is there exactly when the policy wrote it."""
    texts = policy.tokenizer.batch_decode([a["token_ids"] for a in answers], skip_special_tokens=True)
    result = []
    for answer, text, t in zip(answers, texts, temperature, strict=True):
        ended = answer["token_ids"][-1] in policy.stop_ids
        if answer["finish_reason"] != ("stop" if ended else "length"):
            raise AssertionError(f"{where}: finish_reason {answer['finish_reason']}, but EOS at the end: {ended}")
        records.finite(answer["logprob"], f"{where}: the log-prob of an answer")
        result.append({"text": text, **answer, "temperature": t, "model": model})
    return result


def main() -> None:
    args = arguments()
    inputs = {"model": args.model, "prompts": args.prompts}
    stage = records.Stage(args, inputs, args.output, free=("batch_size", "tensor_parallel_size"))
    policy = Policy(args)
    n = check_prompts(args, policy)
    samples = vllm_samples if args.backend == "vllm" else hf_samples
    unfinished: dict[int, list] = {}  # part -> [its rows, None where dropped; how many still wait for answers]

    def prompts() -> Iterator[Prompt]:
        bar.reset()  # the first prompt is asked for when the model is loaded: its time is not that of the tokens
        for part, rows in stage.todo(records.read_jsonl(args.prompts, records.PROMPT)):
            encoded = [policy.encode(row["prompt"], f"{args.prompts}:{line(part, i)}") for i, row in enumerate(rows)]
            fits = [i for i, ids in enumerate(encoded) if len(ids) <= policy.max_prompt_length]
            unfinished[part] = [[row if i in fits else None for i, row in enumerate(rows)], len(fits)]
            if not fits:
                write(part)
            for i in fits:
                # A bit less than seed_of gives: vLLM adds a sample's index to it, and 63 bits must hold the sum.
                seed = records.seed_of(args.seed, args.iteration, rows[i]["id"]) >> 1
                yield Prompt(part, i, encoded[i], seed)

    def write(part: int) -> None:
        rows, _ = unfinished.pop(part)
        kept = [row for row in rows if row is not None]
        counts = {"in": len(rows), "out": len(kept), "dropped": {"prompt_too_long": len(rows) - len(kept)}}
        stage.write_part(part, kept, {"rows": counts})
        bar.update(counts["dropped"]["prompt_too_long"])

    size = records.ROWS_PER_PART
    todo = [i for i in range(stage.rank, math.ceil(n / size), stage.world) if not stage.part(i).exists()]
    bar = progress_bar(args, stage, sum(min(size, n - i * size) for i in todo))
    with bar, closing(samples(args, policy, prompts())) as stream:  # closing it ends the engine, whatever happens here
        tokens = 0
        for prompt, answers in stream if todo else ():
            rows, waiting = unfinished[prompt.part]
            where = f"{args.prompts}:{line(prompt.part, prompt.position)}"
            rows[prompt.position] |= {
                "prompt_token_ids": prompt.ids,
                "candidates": candidates(policy, stage.hashes["model"], temperatures(args), answers, where),
            }
            unfinished[prompt.part][1] = waiting - 1
            if waiting == 1:
                write(prompt.part)
            tokens += sum(len(a["token_ids"]) for a in answers)
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s", refresh=False)
            bar.update()
    stage.join(n)


def line(part: int, position: int) -> int:
    return part * records.ROWS_PER_PART + position + 1


def progress_bar(args, stage: records.Stage, prompts: int) -> tqdm:
    """Rank 0's share stands for all. In a log file a line every half minute, not ten a second."""
    name = Path(args.output).name + (f" (rank 0 of {stage.world})" if stage.world > 1 else "")
    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(total=prompts, desc=name, unit="prompt", disable=stage.rank > 0, mininterval=seconds, smoothing=0.05)


if __name__ == "__main__":
    records.run(main)
