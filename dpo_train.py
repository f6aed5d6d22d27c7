"""Train a policy on preference pairs with DPO: plain torch, no trainer class.

    python dpo_train.py --model MODEL --pairs pairs.jsonl --output policy
    torchrun --nproc_per_node 8 dpo_train.py …                                    one machine
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        dpo_train.py --shard_size 8 …                                             four, sharded within each

For a prompt x with answers y_w (chosen) and y_l (rejected) let

    l_w = log pi(y_w | x)    r_w = log ref(y_w | x)    summed over the tokens of the answer; the same for y_l
    d   = (l_w - r_w) - (l_l - r_l)                    how much more the policy prefers y_w than the reference does
    z   = beta d + a (|y_w| - |y_l|)                   a = --length_coef > 0 discounts length: R-DPO (arXiv 2403.19159)

    sigmoid   -(1-e) log s(z) - e log s(-z)            DPO (arXiv 2305.18290, eq. 7); cDPO with e = --label_smoothing
    robust    [-(1-e) log s(z) + e log s(-z)] / (1-2e) rDPO (arXiv 2403.00409)
    hinge     max(0, 1 - z)                            SLiC (arXiv 2305.10425)
    ipo       (d' - 1 / (2 beta))^2                    IPO (arXiv 2310.12036, eq. 17); d' from per-token means of l
                                                       and r, so that an answer's length does not set the target
    … + c (-l_w / |y_w|)                               c = --nll_coef, the chosen answer's loss per token

The loss of a step is the mean over all its pairs, of all ranks and microbatches: however they are
cut, the gradient is the same. What happens, in order:

  1. Read the pairs. The token ids that the generator wrote are trained as they are; nothing is
     tokenised twice. Pairs without ids are rendered here, once, and an answer ends at its first
     stop id (chat.py).
  2. Compute r once, before the first step. By default the reference *is* the policy just loaded, so
     one pass without gradients gives r, and no second model exists at any time. r is kept beside
     the pairs under the hash of both.
  3. Audit (training/checks.py). The generator stored each answer's log-prob, and r is that same
     number from other code. When they are far apart, something upstream is wrong (template, doubled
     BOS, old weights), and the run stops.
  4. Train, in evaluation mode: dropout and its like are off, as they were when the answers were
     sampled. A microbatch is one row without padding, [P|C|R][P|C|R]…, each prompt once
     (training/batches.py and attention.py); log-probs come from kernels/logprob.py, which never
     holds the logits. FSDP2 shards the weights (training/fsdp.py), and they are fp32, always: at a
     learning rate of 5e-7, AdamW on bf16 weights rounds nearly every update away.
  5. Save a Hugging Face folder. SIGTERM or Ctrl-C in training saves a checkpoint; the same command
     goes on from it.
"""

import gc
import hashlib
import importlib.util
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path

# Microbatches differ in size, and the GPU's free memory would fall into pieces. torch reads this
# when it is imported.
os.environ.setdefault(
    "PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import chat
import models
from kernels.attention import (
    ATTENTION,
    attention_implementation,
    causal_lm_refusal,
    packing_refusal,
    positions,
)
from kernels.logprob import backbone, linear_logprob, lm_head
from records import Stop, dump, read_jsonl, whole
from stage import Stage, parse, parser, progress, ranks, run, say, seed_of
from training import checks, footprint, fsdp
from training.batches import PARTS, cost, feed, microbatches, shortest_and_longest

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# These may change when a run goes on after an interruption: some change rounding, others nothing at
# all.
FREE = ("tokens_per_batch", "gradient_checkpointing", "cpu_offload", "shard_size", "world_size")
FREE += ("save_every", "report_to", "max_logprob_gap", "dry_run")
INTERRUPTED = 75  # EX_TEMPFAIL: "try again later"; iterate.sh tells it from a failure


def arguments():
    p = parser(__doc__)
    add = p.add_argument
    # fmt: off
    # Models and data
    add("--model", required=True, help="the policy to start from: a folder or a hub name[@revision]")
    add("--ref_model", help="the reference; default: --model itself, which costs no second model")
    add("--pairs", nargs="+", help="pairs.jsonl; several are concatenated (history)")
    add("--output", help="folder of the trained policy; train.jsonl goes beside it")
    add("--max_length", type=int, help="longer prompt + answer is dropped; default: the model's positions")
    # The loss
    add("--beta", type=float, nargs="+", default=[0.1], help="0.1, as in the DPO paper; several: one an epoch")
    add("--loss_type", choices=("sigmoid", "ipo", "hinge", "robust"), default="sigmoid")
    add("--label_smoothing", type=float, help="share of flipped labels (sigmoid: default 0; robust: needed)")
    add("--nll_coef", type=float, default=0.0, help="weight of the chosen answer's NLL; default 0: DPO")
    add("--length_coef", type=float, help="a > 0 discounts length: nats a token that the chosen is longer; default 0")
    # The optimizer; the defaults are those of OpenRLHF 0.9.5's loop (RLHFlow's trains two epochs)
    add("--learning_rate", type=float, default=5e-7, help="5e-7: for full models of 1B and more")
    add("--batch_size", type=int, default=128, help="pairs an optimizer step, over all ranks")
    add("--num_train_epochs", type=int, default=1, help="1: fresh pairs come every iteration")
    add("--lr_scheduler", choices=("cosine", "linear", "constant"), default="cosine")
    add("--min_lr_ratio", type=float, help="where cosine and linear end, as a share; default 0.1")
    add("--warmup_ratio", type=float, default=0.03, help="share of the steps with a rising learning rate")
    add("--weight_decay", type=float, default=0.0, help="0: the reference is what holds the weights")
    add("--adam_betas", type=float, nargs=2, default=[0.9, 0.95], metavar=("B1", "B2"))
    add("--max_grad_norm", type=float, default=1.0, help="clip the gradient's norm; 0 does not")
    # Memory and speed
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto",
        help="of the matrix products; auto: bf16 on a GPU, fp32 on a CPU. Weights and log-probs are fp32 either way")
    add("--save_dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: as the model came")
    add("--tokens_per_batch", type=int, default=16384, help="a rank and forward; 16k fills a large GPU")
    add("--packing", choices=("auto", "prefix", "packed", "padded"), default="auto",
        help="prefix: a pair shares its prompt; packed: it does not; padded: for attention that cannot be packed")
    add("--gradient_checkpointing", action="store_true",
        help="recompute layers: a third more time, activations of one layer instead of all")
    add("--cpu_offload", action="store_true", help="weights and Adam states in host memory (GPU only)")
    add("--shard_size", type=int,
        help="ranks that share one copy of the weights; default all. A machine's ranks: a copy on each (HSDP)")
    add("--dry_run", action="store_true",
        help="print the memory of a rank on a GPU, and end. Needs config.json alone: no weights, --pairs or --output")
    add("--world_size", type=int, help="ranks of the dry run; default 1. torchrun sets those of a real one")
    # Watching and stopping
    add("--save_every", type=int, default=0,
        help="steps between checkpoints; 0: only when interrupted. One is 12 bytes a parameter, and an iteration short")
    add("--max_logprob_gap", type=float,
        help="the audit's tolerance: mean |difference| / sqrt(tokens), nats; default 1e-3 in fp32, "
        "0.1 in bf16 until a GPU has measured what rounding makes there")
    add("--seed", type=int, default=0, help="order of the pairs")
    add("--report_to", choices=("none", "tensorboard", "wandb", "trackio"), default="none")
    # fmt: on
    return p


def check_flags(args, device, world: int) -> None:
    """A flag without effect is an error: it means that the run is not what its author thinks."""
    loss, e, size = args.loss_type, args.label_smoothing, args.shard_size
    for wrong, why in (
        (not args.dry_run and not (args.pairs and args.output), "--pairs and --output are needed without --dry_run"),
        (not args.dry_run and args.world_size, "--world_size has no effect without --dry_run: torchrun sets it"),
        (loss in ("hinge", "ipo") and e is not None, f"--label_smoothing has no effect with --loss_type {loss}"),
        (loss == "robust" and not 0 < (e or 0) < 0.5, "--loss_type robust needs --label_smoothing between 0 and 0.5"),
        (loss == "ipo" and args.length_coef is not None, "--length_coef has no effect with --loss_type ipo"),
        (args.lr_scheduler == "constant" and args.min_lr_ratio is not None,
         "--min_lr_ratio has no effect with --lr_scheduler constant"),
        (len(args.beta) not in (1, args.num_train_epochs),
         f"--beta takes one value, or one for each of the {args.num_train_epochs} epochs"),
        (args.cpu_offload and device.type == "cpu", "--cpu_offload has no effect without a GPU"),
        (size is not None and (world == 1 or size < 1 or world % size),
         f"--shard_size {size} must divide the number of ranks ({world}, more than one)"),
        (min(args.batch_size, args.num_train_epochs, args.tokens_per_batch) < 1,
         "--batch_size, --num_train_epochs and --tokens_per_batch must be at least 1"),
        (args.report_to != "none" and not importlib.util.find_spec(args.report_to),
         f"--report_to {args.report_to}: no such package. Install it, or leave the flag out"),
    ):  # fmt: skip
        if wrong:
            raise Stop(why)
    if args.batch_size < 128 and args.learning_rate <= 5e-7:
        say(
            f"note: --batch_size {args.batch_size} at --learning_rate {args.learning_rate:g}: the rate was tuned for "
            "128 pairs a step, and smaller batches have given worse results at it (RLHFlow/Online-RLHF issue 3)"
        )


# --------------------------------------------------------------------------------------------------
# The loss


def dpo_loss(policy, reference, lengths, beta: float, args) -> torch.Tensor:
    """The loss of each pair, [n]; its equations stand at the top of the file.

    policy, reference: [n, 2] fp32, log-probs of (chosen, rejected) answers. lengths: [n, 2], their
    tokens.
    """
    e, a = args.label_smoothing or 0.0, args.length_coef or 0.0
    ratio = policy - reference  # [n, 2]
    z = beta * (ratio[:, 0] - ratio[:, 1]) + a * (lengths[:, 0] - lengths[:, 1])  # [n]
    if args.loss_type == "sigmoid":
        loss = -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)
    elif args.loss_type == "robust":
        loss = (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)
    elif args.loss_type == "hinge":
        loss = torch.relu(1 - z)
    else:  # ipo
        per_token = ratio / lengths  # [n, 2]
        loss = (per_token[:, 0] - per_token[:, 1] - 1 / (2 * beta)) ** 2
    return loss - args.nll_coef * policy[:, 0] / lengths[:, 0]


# --------------------------------------------------------------------------------------------------
# The data


def load_pairs(args, tokenizer, config, stage) -> list[dict]:
    """Token ids as int32 arrays, a tenth of a list's memory. What cannot be trained on is counted
    under a reason.
    """
    stop_ids = find_stop_ids(args.model, tokenizer, config)
    config = config.get_text_config()
    limit = args.max_length or positions(config)
    pairs, total, rendered, endless, dropped = [], 0, 0, 0, Counter()
    for path in args.pairs:
        for line, row in enumerate(read_jsonl(path, dict.fromkeys(PARTS, (str, list))), 1):
            where = f"{path}:{line}"
            total += 1
            ids = [row.get(f"{k}_token_ids") for k in PARTS]
            if ids == [None] * 3:
                ids = chat.encode_pair(tokenizer, row, where, stop_ids)
                rendered += 1
                if ids and not all(chat.ends(answer, stop_ids) for answer in ids[1:]):
                    endless += 1
            elif None in ids:
                raise Stop(
                    f"{where}: prompt_, chosen_ and rejected_token_ids come together, or not at all"
                )
            if ids is None:
                dropped["template_not_prefix"] += 1
            elif not all(ids):
                dropped["no_tokens"] += 1
            elif len(ids[0]) + max(len(ids[1]), len(ids[2])) > limit:
                dropped["too_long"] += 1
            elif not 0 <= min(map(min, ids)) <= max(map(max, ids)) < config.vocab_size:
                raise Stop(
                    f"{where}: a token id outside 0 … {config.vocab_size - 1}: another model's tokenizer?"
                )
            else:
                pair = {k: np.asarray(x, dtype=np.int32) for k, x in zip(PARTS, ids, strict=True)}
                pair["id"] = row.get("id", where)
                for k in ("logprob", "model"):  # what the generator wrote, and who it was
                    pair[f"{k}s"] = [row.get(f"{answer}_{k}") for answer in PARTS[1:]]
                pairs.append(pair)
    if rendered:
        say(
            f"{rendered:,} pairs carry no token ids: rendered with the tokenizer and chat template of {args.model}"
        )
    if endless:
        say(
            f"note: in {endless:,} of them the chat template writes no stop id behind an answer, "
            f"so training does not teach where to end (stop ids: {stop_ids})"
        )
    if not pairs:
        raise Stop(
            f"{', '.join(args.pairs)}: none of {total:,} pairs can be trained on: {dict(dropped)}"
        )
    stage.count("rows", total, len(pairs), dropped)
    return pairs


def find_stop_ids(model: str, tokenizer, config) -> list[int]:
    """The ids that end an answer of `model`, as generate.py finds them."""
    generation_config = models.load_generation_config(model, config)
    stop_ids, _ = chat.find_stop_ids(tokenizer, generation_config, {})
    return stop_ids


def plan(pairs: list[dict], step: list[int], args) -> list[list[list[int]]]:
    """How the ranks share a step: [rank][microbatch] -> indices into pairs, of those in `step`."""
    costs = {i: cost(pairs[i], args.packing) for i in step}
    return microbatches(costs, args.tokens_per_batch, ranks()[1], args.packing)


def plan_all(pairs: list[dict], args) -> list:
    """The plan of every step of every epoch, decided in advance: nothing of it needs saving in a
    checkpoint.
    """
    plans = []
    for epoch in range(args.num_train_epochs):
        order = list(range(len(pairs)))
        random.Random(seed_of("dpo_train", args.seed, epoch)).shuffle(order)
        plans += [
            plan(pairs, order[i : i + args.batch_size], args)
            for i in range(0, len(order), args.batch_size)
        ]
    return plans


# --------------------------------------------------------------------------------------------------
# The policy


def choose_packing(args, config, longest: int) -> None:
    """Settle --packing for sequences of up to `longest` tokens. Stop where there is no way to train
    the model.
    """
    if refusal := causal_lm_refusal(config):
        raise Stop(f"{args.model}: {refusal}.")
    refusal = packing_refusal(config, longest)
    if refusal and args.packing in ("prefix", "packed"):
        raise Stop(f"--packing {args.packing}: {args.model}: {refusal}. Use --packing padded.")
    if args.packing == "auto":
        args.packing = "padded" if refusal else "prefix"
        if refusal:
            say(f"{args.model}: {refusal}, so batches are padded")


class Policy(torch.nn.Module):
    """A causal LM whose forward gives log-probs of answers, [n, 2], instead of logits.

    It is the FSDP root, so the head is used where its weight is whole, and a plain tensor.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch: dict) -> torch.Tensor:
        output = backbone(self.model)(**batch["inputs"], use_cache=False)
        hidden = output.last_hidden_state  # [1, T, D] or [2n, L, D]
        hidden = hidden.flatten(0, 1)[batch["positions"]]  # [Tc, D]
        logprobs = linear_logprob(
            hidden, targets=batch["targets"], **lm_head(self.model)
        )  # [Tc] fp32
        sums = [
            y.sum() for y in logprobs.split(batch["split"])
        ]  # 2n scalars: chosen, rejected, chosen, …
        return torch.stack(
            [torch.stack(sums[0::2]), torch.stack(sums[1::2])], dim=1
        )  # [n, 2]; FSDP wants no view


def build_model(config, args, dtype):
    """The model that `config` describes, without its weights: on the meta device, or where torch is
    told to put it.
    """
    checks.switch_off_dropout(config)
    attention = attention_implementation(config) if args.packing == "padded" else ATTENTION
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    try:
        lm_head(model)
    except ValueError as e:
        raise Stop(f"{args.model}: cannot be trained: {e}.") from None
    # Evaluation mode, in training too: policy and reference must be the same function, the one that
    # generates. Zeros in the config would not do: PhiMoE's router draws experts in training mode.
    # Recurrent models are left in that mode. In the other, RWKV divides its weights in place and
    # xLSTM computes no gradient for long rows. None of them has jitter, and check_repeat watches.
    model.train(model._is_stateful)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for layer in fsdp.layers_of(model):
            layer.training = (
                True  # of the layer alone, not of what is in it: else none is recomputed
            )
    return model


def build_policy(config, args, device_type: str, world: int) -> Policy:
    """A sharded fp32 Policy on the meta device: every tensor has its shape, and none has memory."""
    with torch.device("meta"):
        policy = Policy(build_model(config, args, torch.float32))
    return fsdp.shard(
        policy, DTYPES[args.dtype], args.shard_size, args.cpu_offload, device_type, world
    )


def load_policy(path: str, args, device, pairs: list[dict]) -> Policy:
    """A sharded Policy with its weights, which rank 0 reads, after two checks on some of `pairs`."""
    rank, world = ranks()
    config = models.load_config(path)
    random_fields = checks.random_fields(config)
    if random_fields:
        say(f"{path}: switched off in training: {checks.listed(random_fields)}")
    policy = build_policy(config, args, device.type, world)
    source = None
    if rank == 0:
        dtype, plain = (
            torch.float32 if args.dtype == "fp32" else "auto",
            attention_implementation(config),
        )
        source = models.load_model(AutoModelForCausalLM, path, dtype, plain)
    fsdp.load_weights(policy, source, device, args.cpu_offload)

    # The same pair twice gives the same numbers: nothing random is left on.
    short, long = shortest_and_longest(pairs, args.packing, args.tokens_per_batch)
    its_plan = [plan([long], [0], args)]
    try:
        first = all_logprobs(policy, [long], its_plan, args.packing, device)[0]  # [2]
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ) as e:  # whatever comes of a model whose code wants more than token ids, or other arguments
        kind = config.model_type
        raise Stop(
            f"{path}: {kind} does not run on token ids as dpo_train.py gives them: {type(e).__name__}: {e}"
        ) from e
    second = all_logprobs(policy, [long], its_plan, args.packing, device)[0]  # [2]
    checks.check_repeat(first, second, long, device.type, random_fields, path)

    # And they are transformers' own. On the shortest pair: rank 0 computes all logits, on its CPU.
    its_plan = [plan([short], [0], args)]
    ours = all_logprobs(policy, [short], its_plan, args.packing, device)[0]  # [2]
    if rank == 0:
        checks.check_causal(source, short, args.dtype, path)
        checks.check_model(ours, source, short, args.dtype, path)
    return policy


@torch.no_grad()
def all_logprobs(policy, pairs: list[dict], plans: list, packing: str, device) -> torch.Tensor:
    """[n, 2] fp32 on the CPU: log-probs of all pairs, which are those of `plans` ([step][rank] ->
    microbatches).
    """
    result = torch.zeros(len(pairs), 2, device=device)
    mine = [batch for step in plans for batch in step[ranks()[0]]]
    with progress(len(mine), "log-probs", "batch") as bar:
        for batch, inputs in zip(mine, feed(pairs, mine, packing, device), strict=True):
            logprobs = policy(inputs)  # [n, 2]
            if batch:  # a rank without pairs takes part in the collectives only
                result[inputs["rows"]] = logprobs
            bar.update()
    fsdp.reshard(
        policy
    )  # without a backward the root stays whole, and an optimizer made now would train the copy
    dist.all_reduce(result)  # each pair was one rank's, and adding zeros is exact
    return result.cpu()


# --------------------------------------------------------------------------------------------------
# The reference


def reference_logprobs(compute, pairs: list[dict], plans: list, args, stage) -> torch.Tensor:
    """r of every pair, [n, 2] fp32 on the CPU: from the file beside the pairs, or else from
    compute() -> [n, 2].

    The file is named by a hash of the reference, of the very token ids and of how they lie in
    microbatches, for that is how they round; it holds the numbers and then their sha256, so that
    damage is noticed.
    """
    identity = [
        stage.hashes.get("ref_model", stage.hashes["model"]),
        args.dtype,
        args.packing,
        plans,
    ]
    key = hashlib.sha256(
        json.dumps([*identity, [len(p[k]) for p in pairs for k in PARTS]]).encode()
    )
    for ids in (pair[k] for pair in pairs for k in PARTS):
        key.update(ids)
    file = Path(f"{args.pairs[0]}.reference-{key.hexdigest()[:16]}")
    cached = [
        None
    ]  # one rank looks and tells the others: file systems need not show all of them the same
    if ranks()[0] == 0 and file.exists():
        content = file.read_bytes()
        if hashlib.sha256(content[:-32]).digest() == content[-32:]:
            cached = [torch.frombuffer(bytearray(content[:-32]), dtype=torch.float32).view(-1, 2)]
            say(f"reference log-probs: from the cache {file}")
        else:
            say(f"{file}: is damaged; the reference is computed again")
    dist.broadcast_object_list(cached)
    if cached[0] is not None:
        return cached[0]

    result = compute()
    if not result.isfinite().all():
        bad = [pairs[i]["id"] for i in (~result.isfinite()).any(1).nonzero().flatten()[:8].tolist()]
        raise Stop(f"the reference's log-probs are not finite for the pairs {bad}")
    if ranks()[0] == 0:
        content = result.numpy().tobytes()
        try:
            with whole(file) as temporary:
                temporary.write_bytes(content + hashlib.sha256(content).digest())
        except OSError as e:  # a disk for data may be read-only
            say(f"note: {file}: not cached ({e.strerror})")
    return result


# --------------------------------------------------------------------------------------------------
# Training


def learning_rate(step: int, steps: int, args) -> float:
    """Linear warm-up that wastes no step at zero, then cosine or linear down to min_lr_ratio at the
    last step.
    """
    warmup = math.ceil(args.warmup_ratio * steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    if args.lr_scheduler == "constant":
        return args.learning_rate
    done = (step - warmup) / max(1, steps - 1 - warmup)
    shape = (1 + math.cos(math.pi * done)) / 2 if args.lr_scheduler == "cosine" else 1 - done
    floor = 0.1 if args.min_lr_ratio is None else args.min_lr_ratio
    return args.learning_rate * (floor + (1 - floor) * shape)


METRICS = (  # TRL's names and some of ours; each is the mean over all pairs of the step
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "logps/chosen_fell", "length/chosen", "length/rejected",
)  # fmt: skip


def train(policy, pairs: list[dict], reference, plans: list, args, stage, device) -> dict:
    """All steps; a row a step in train.jsonl. plans: [step][rank] -> microbatches of indices into
    pairs.

    Returns figures for the metadata. SIGTERM and Ctrl-C end it after a step and a checkpoint.
    """
    rank, world = ranks()
    steps, epoch_steps = len(plans), len(plans) // args.num_train_epochs
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        betas=tuple(args.adam_betas),
        weight_decay=args.weight_decay,
        fused=device.type == "cuda",
    )
    first = fsdp.load_checkpoint(stage.parts, policy, optimizer)
    say(f"{steps} steps" + (f"; going on after step {first}" if first else ""))
    log = (
        open_log(stage.parts / "train.jsonl", first, args.report_to)
        if rank == 0
        else lambda row: None
    )
    bar = progress(steps, "train", "step", first)
    stopping = []
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # and no other end from here on: the export is worth waiting for
        signal.signal(number, lambda *_: stopping.append(True))
    sizes = [tuple(len(pair[k]) for k in PARTS) for pair in pairs]
    total_seconds = 0.0
    reference_there = reference.to(device)  # [n, 2]
    mine_of_all_steps = chain.from_iterable(step[rank] for step in plans[first:])
    microbatch = feed(pairs, mine_of_all_steps, args.packing, device)

    for step in range(first, steps):
        began = time.time()
        beta = args.beta[min(step // epoch_steps, len(args.beta) - 1)]
        this_step = [i for share in plans[step] for batch in share for i in batch]  # of all ranks
        count, mine = len(this_step), plans[step][rank]
        losses = {}  # pair -> loss, of this rank
        sums = torch.zeros(len(METRICS) + 1, dtype=torch.float64, device=device)
        for k, batch in enumerate(mine):
            # Gradients are reduced to shards after every microbatch: kept whole in between they
            # would take 4 bytes a weight on every rank (28 GiB for 7B). Those of copies of the
            # model (HSDP) are added up once, at the end.
            policy.set_requires_all_reduce(k == len(mine) - 1)
            inputs = next(microbatch)
            logprobs = policy(inputs)  # [n, 2]
            if not batch:  # no pair left for this rank: take part in the collectives, add nothing
                (logprobs.sum() * 0).backward()
                continue
            ref, lengths = reference_there[inputs["rows"]], inputs["lengths"]  # [n, 2]
            loss = dpo_loss(logprobs, ref, lengths, beta, args)  # [n]
            (
                loss.sum() * world / count
            ).backward()  # FSDP divides by the ranks; we want the mean over the step's pairs
            with torch.no_grad():
                rewards = beta * (logprobs - ref)  # [n, 2]
                margins, fell = rewards[:, 0] - rewards[:, 1], logprobs[:, 0] < ref[:, 0]
                # In the order of METRICS.
                columns = [loss, *rewards.T, margins > 0, margins, *logprobs.T, fell, *lengths.T]
                sums[:-1] += torch.stack([c.double().sum() for c in columns])
                losses |= zip(batch, loss.detach(), strict=True)

        fsdp.reshard(policy)  # gathered copies would be of the weights before this step
        sums[-1] = len(stopping)  # one rank that was told to stop stops all, at the same step
        dist.all_reduce(sums)
        *means, stop = (sums / count).tolist()
        row = dict(zip(METRICS, means, strict=True))
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm or math.inf)
        grad_norm = norm.full_tensor().item()
        if not all(map(math.isfinite, [*means, grad_norm])):
            bad = [pairs[i]["id"] for i, loss in losses.items() if not loss.isfinite()]
            kept = [folder.name for folder in stage.parts.glob("step_??????")]
            raise Stop(
                f"step {step + 1}: loss {row['loss']:g}, gradient norm {grad_norm:g}: not finite; no update was made. "
                f"This rank's pairs with such a loss: {bad[:8] or 'none'}. Last checkpoint: {kept or 'none'}. "
                "Look at those pairs, or begin again (--overwrite) with a lower --learning_rate."
            )
        if step == 0 and args.ref_model is None:
            ref, lengths = (
                reference[this_step],
                torch.tensor([sizes[i][1:] for i in this_step]),
            )  # [n, 2]
            checks.check_first_loss(
                row["loss"], dpo_loss(ref, ref, lengths, beta, args).mean().item(), args.dtype
            )
        rate = learning_rate(step, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()

        if device.type == "cuda":
            torch.cuda.synchronize()  # or the clock would measure how fast work is queued
        seconds, tokens = time.time() - began, sum(sum(sizes[i]) for i in this_step)
        total_seconds += seconds
        log({
            "step": step + 1, "epoch": (step + 1) / epoch_steps, **row, "grad_norm": grad_norm, "learning_rate": rate,
            "beta": beta, "pairs": count, "tokens": tokens, "tokens_per_second": tokens / seconds,
        })  # fmt: skip
        accuracy, speed = f"{row['rewards/accuracies']:.2f}", f"{tokens / seconds:.0f}"
        bar.set_postfix(loss=f"{row['loss']:.4f}", acc=accuracy, tok_s=speed, refresh=False)
        bar.update()
        due = args.save_every and (
            (step + 1) % args.save_every == 0 or step + 1 == steps
        )  # an export may fail, too
        if stop or due:
            fsdp.save_checkpoint(stage.parts, policy, optimizer, step + 1)
        if stop:
            say(
                f"interrupted: saved after step {step + 1} of {steps}; the same command goes on from there"
            )
            fsdp.leave()
            sys.exit(INTERRUPTED)
    bar.close()
    done = [sizes[i] for step in plans[first:] for share in step for batch in share for i in batch]
    return footprint.figures(policy, done, total_seconds, device, args.dtype, world)


def open_log(path: Path, done: int, report_to: str):
    """A function that appends a row to train.jsonl, behind the first `done` rows, and shows it on
    the dashboard.
    """
    rows = path.read_text().splitlines(keepends=True)[:done] if path.exists() else []
    path.write_text("".join(rows))
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(path.parent.with_suffix(".tensorboard")))
    elif report_to != "none":
        board = importlib.import_module(report_to)  # wandb and trackio share this interface
        board.init(project="iterdpo", name=path.parent.stem)

    def log(row: dict) -> None:
        with open(path, "a") as file:
            file.write(dump(row))
        if report_to == "tensorboard":
            for k, v in row.items():
                board.add_scalar(k, v, row["step"])
            board.flush()
        elif report_to != "none":
            board.log(row, step=row["step"])

    return log


# --------------------------------------------------------------------------------------------------


def dry_run(args) -> None:
    """Print the memory of rank 0 on a GPU, from config.json alone."""
    args.dtype = "fp32" if args.dtype == "fp32" else "bf16"
    world = args.world_size or 1
    check_flags(args, torch.device("cuda"), world)
    config = models.load_config(args.model)
    choose_packing(args, config, 550)  # 200 + 350, the pair that footprint.py counts with
    dist.init_process_group(
        "fake", rank=0, world_size=world
    )  # collectives that do nothing: shapes are all we need
    policy = build_policy(config, args, "cpu", world)
    gathered = lambda: Policy(build_model(config, args, DTYPES[args.dtype]))  # noqa: E731
    rows = footprint.predict(policy, gathered, args.tokens_per_batch, args.packing)
    lines = footprint.table(rows, args.cpu_offload)
    if (args.shard_size or world) == 1:
        lines += "\n" + footprint.staying_gathered(
            rows, policy, DTYPES[args.dtype], args.cpu_offload
        )
    say(f"{args.model}, rank 0 of {world}, {args.dtype}, GiB:\n{lines}")


def main():
    args = parse(arguments())
    transformers_logging.disable_progress_bar()
    if args.dry_run:
        return dry_run(args)
    device = fsdp.start()
    check_flags(args, device, ranks()[1])
    if args.dtype == "auto":
        args.dtype = "bf16" if device.type == "cuda" else "fp32"
    inputs = {"model": args.model, "ref_model": args.ref_model, "pairs": args.pairs}
    stage = Stage(args, inputs, args.output, free=FREE)
    if stage.done:
        return fsdp.leave()
    if stage.hashes.get("ref_model") == stage.hashes["model"]:
        args.ref_model = None  # the same weights under another name: no second model

    # 1. The pairs, how this model takes them, and every step in advance
    config = models.load_config(args.model)
    tokenizer = models.load_tokenizer(args.model)
    pairs = load_pairs(args, tokenizer, config, stage)
    choose_packing(
        args,
        config,
        max(len(p["prompt"]) + max(len(p["chosen"]), len(p["rejected"])) for p in pairs),
    )
    plans = plan_all(pairs, args)

    # 2. The reference, once, in the very microbatches of the first epoch: it rounds as the policy will
    first_epoch = plans[: len(plans) // args.num_train_epochs]
    load = partial(load_policy, args=args, device=device, pairs=pairs)
    logprobs = partial(all_logprobs, packing=args.packing, device=device)
    if args.ref_model is None:
        policy = load(args.model)
        compute = lambda: logprobs(policy, pairs, first_epoch)  # noqa: E731
        reference = reference_logprobs(compute, pairs, first_epoch, args, stage)
        own, own_logprobs = pairs, reference
    else:
        theirs = models.load_config(args.ref_model)
        if theirs.get_text_config().vocab_size != config.get_text_config().vocab_size:
            raise Stop(
                f"--ref_model {args.ref_model} and --model {args.model} have vocabularies of different sizes"
            )
        compute = lambda: logprobs(load(args.ref_model), pairs, first_epoch)  # noqa: E731
        reference = reference_logprobs(compute, pairs, first_epoch, args, stage)
        # FSDP's modules refer to each other: without this the reference would stay beside the
        # policy
        gc.collect()
        torch.cuda.empty_cache()
        policy = load(args.model)
        # To audit, a step's worth of what this policy wrote.
        own = [pair for pair in pairs if stage.hashes["model"] in pair["models"]][: args.batch_size]
        own_logprobs = logprobs(
            policy, own, [plan(own, list(range(len(own))), args)] if own else []
        )

    # 3. Audit, 4. train, 5. save
    audited = checks.audit(
        own, own_logprobs, stage.hashes["model"], args.dtype, args.max_logprob_gap
    )
    figures = train(policy, pairs, reference, plans, args, stage, device)
    weights = fsdp.gather_weights(policy)
    if ranks()[0] == 0:
        with whole(stage.output) as folder:
            changed = fsdp.export(
                weights, args.model, DTYPES.get(args.save_dtype), tokenizer, folder
            )
            with whole(stage.output.with_name("train.jsonl")) as log:
                log.write_bytes((stage.parts / "train.jsonl").read_bytes())
            stage.write_meta(audit=audited, changed_weights=changed, train=figures)
        stage.clean()
        say(f"{args.output}: {changed:.1%} of the weights changed in the saved dtype")
    fsdp.leave()


if __name__ == "__main__":
    run(main)
