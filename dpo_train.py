"""Train a policy on preference pairs with DPO: plain torch, no trainer class.

    python dpo_train.py --model MODEL --pairs pairs.jsonl --output policy
    torchrun --nproc_per_node 8 dpo_train.py …
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        dpo_train.py --shard_size 8 …

The second command uses 8 GPUs of one machine; the third 4 machines, each with a copy of the
weights.

A pair is a prompt x with a chosen answer y_w and a rejected answer y_l. In the loop both answers
come from the policy itself: generate.py sampled them just before. Let

    pi(y|x)     the policy, which is trained
    ref(y|x)    the reference, which is not: by default the policy before its first step
    |y|         the number of tokens of an answer
    d           [log pi(y_w|x) - log ref(y_w|x)] - [log pi(y_l|x) - log ref(y_l|x)]

with log-probs summed over the tokens of an answer. So d says how much more the policy prefers y_w
to y_l than the reference does. DPO (arXiv 2305.18290, eq. 7) minimises -log sigmoid(beta d). In
general, with e = --label_smoothing and

    z = beta d + a (|y_w| - |y_l|)

the loss of a pair is, by --loss_type,

    sigmoid   -(1-e) log sigmoid(z) - e log sigmoid(-z)               DPO; cDPO where e > 0
    robust    [-(1-e) log sigmoid(z) + e log sigmoid(-z)] / (1-2e)    rDPO (2403.00409)
    hinge     max(0, 1 - z)                                           SLiC (2305.10425)
    ipo       (d' - 1 / (2 beta))^2                                   IPO (2310.12036, eq. 17)

Here a = --length_coef is 0 by default. With a > 0 a longer chosen answer needs less preference,
which discounts length: R-DPO (2403.19159). And --nll_coef c adds c times -log pi(y_w|x) / |y_w|.
For ipo, d' is d with means per token in place of sums. The IPO paper has sums; with them a long
answer reaches the target by a few of its tokens, and pairs of different lengths are not comparable.

The loss of a step is the mean over all its pairs, of all ranks and microbatches: however they are
cut, the gradient is the same. What happens, in the order of main():

  1. Read the pairs. The token ids that the generator wrote are trained as they are.
  2. Compute the reference's log-probs once, before the first step. By default the reference *is*
     the policy that was just loaded: one pass without gradients, and no second model at any time.
  3. Audit. The generator stored the log-prob of each answer that it sampled, and the trainer's must
     agree. Otherwise something upstream is wrong (template, doubled BOS, old weights): stop.
  4. Train. A microbatch is one row without padding, [prompt|chosen|rejected][prompt|…, where the
     rejected answer does not see the chosen one (kernels/attention.py). Log-probs come straight
     from hidden states, and logits are never held (kernels/logprob.py). FSDP2 shards the weights
     (training/fsdp.py), which are fp32, always: at a learning rate of 5e-7, AdamW on bf16 weights
     would round nearly every update away. The model stays in evaluation mode (training/network.py),
     so that policy and reference are the same function.
  5. Save a Hugging Face folder.

SIGTERM or Ctrl-C in training saves a checkpoint, and the same command resumes from it.
"""

import gc
import importlib.util
import math
import os
import random
import signal
import sys
import time
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

# Microbatches differ in size, and the GPU's free memory would fall into pieces. torch reads this
# when it is imported. A setting of the user's, under the old name too, wins.
os.environ.setdefault(
    "PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import models
from kernels.attention import attention_implementation
from kernels.logprob import backbone, linear_logprob, lm_head
from records import Stop, whole
from stage import Stage, parse, parser, progress, ranks, run, say, seed_of
from training import checks, fsdp, network, speed
from training.batches import cost, feed, lengths_of, microbatches, shortest_and_longest
from training.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from training.log import TrainLog
from training.pairs import load_pairs

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
INTERRUPTED = 75  # the exit code EX_TEMPFAIL, by which iterate.sh knows a stop from a failure

# A run may be resumed with other values of these arguments. Some change rounding, the others
# nothing.
FREE = (
    "tokens_per_batch",
    "gradient_checkpointing",
    "cpu_offload",
    "shard_size",
    "save_every",
    "report_to",
    "max_logprob_gap",
)


# ---- arguments ---------------------------------------------------------------------------------


def arguments():
    p = parser(__doc__)
    add_files(p.add_argument)
    add_loss(p.add_argument)
    add_optimizer(p.add_argument)
    add_memory_and_speed(p.add_argument)
    add_watching(p.add_argument)
    return p


def add_files(add) -> None:
    add(
        "--model", required=True, help="the policy to start from: a folder or a hub name[@revision]"
    )
    add("--ref_model", help="the reference; default: --model itself, which costs no second model")
    add("--pairs", nargs="+", required=True, help="pairs.jsonl; several are trained on together")
    add("--output", required=True, help="folder of the trained policy; train.jsonl goes beside it")
    add(
        "--max_length",
        type=int,
        help="longer prompt + answer is dropped; default: the model's positions",
    )


def add_loss(add) -> None:
    add(
        "--beta",
        type=float,
        nargs="+",
        default=[0.1],
        help="0.1, as in the DPO paper; several: one per epoch",
    )
    add("--loss_type", choices=("sigmoid", "ipo", "hinge", "robust"), default="sigmoid")
    add(
        "--label_smoothing",
        type=float,
        help="share of flipped labels (sigmoid: default 0; robust: needed)",
    )
    add(
        "--nll_coef",
        type=float,
        default=0.0,
        help="weight of the chosen answer's loss per token; default 0: DPO alone",
    )
    add(
        "--length_coef",
        type=float,
        help="a in the equations above: discounts length; default 0",
    )


def add_optimizer(add) -> None:
    # The defaults are those of OpenRLHF 0.9.5, its last release with an iterative DPO loop.
    add("--learning_rate", type=float, default=5e-7, help="5e-7: for full models of 1B and more")
    add("--batch_size", type=int, default=128, help="pairs per optimizer step, over all ranks")
    add("--num_train_epochs", type=int, default=1, help="1: the next iteration has fresh pairs")
    add(
        "--lr_scheduler",
        choices=("cosine", "constant"),
        default="cosine",
        help="after the warm-up: down to a tenth, or level",
    )
    add("--warmup_ratio", type=float, default=0.03, help="share of the steps with a rising rate")
    add("--weight_decay", type=float, default=0.0, help="0: beta holds the policy back already")
    add("--adam_betas", type=float, nargs=2, default=[0.9, 0.95], metavar=("B1", "B2"))
    add("--max_grad_norm", type=float, default=1.0, help="clip the gradient's norm; 0: do not")


def add_memory_and_speed(add) -> None:
    add(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of the matrix products; auto: bf16 on a GPU, fp32 on a CPU. "
        "Weights and log-probs are fp32 either way",
    )
    add(
        "--save_dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of the saved folder; auto: as the model came",
    )
    add(
        "--tokens_per_batch",
        type=int,
        default=16384,
        help="of one forward pass of one rank; 16k tokens fill a large GPU",
    )
    add(
        "--packing",
        choices=("auto", "prefix", "padded"),
        default="auto",
        help="prefix: no padding, and each prompt once; padded: for models whose attention this "
        "would change (windows, soft-caps); auto: prefix where it gives the model's own numbers",
    )
    add(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute layers: a third more time, activations of one layer instead of all",
    )
    add(
        "--cpu_offload",
        action="store_true",
        help="weights and Adam states in host memory (GPU only)",
    )
    add(
        "--shard_size",
        type=int,
        help="ranks that share one copy of the weights; default: all. With the number of GPUs per "
        "machine, each machine holds a copy (HSDP)",
    )


def add_watching(add) -> None:
    add(
        "--save_every",
        type=int,
        default=0,
        help="steps between checkpoints of 12 bytes per weight; 0: only when interrupted, "
        "as an iteration is short",
    )
    add(
        "--max_logprob_gap",
        type=float,
        help="the audit's tolerance: mean |difference| / sqrt(tokens), in nats, as rounding errors "
        "add up like a random walk; default 1e-3 in fp32, 0.1 in bf16 (provisional)",
    )
    add("--seed", type=int, default=0, help="of the order of the pairs")
    add("--report_to", choices=("none", "tensorboard", "wandb", "trackio"), default="none")


def check_arguments(args, device_type: str, world: int) -> None:
    """A flag without effect is an error: the run is not what its author thinks."""
    check_loss_arguments(args)
    if args.cpu_offload and device_type == "cpu":
        raise Stop("--cpu_offload has no effect without a GPU")
    check_shard_size(args.shard_size, world)
    for flag in ("batch_size", "num_train_epochs", "tokens_per_batch"):
        if getattr(args, flag) < 1:
            raise Stop(f"--{flag} must be at least 1")
    if args.report_to != "none" and not importlib.util.find_spec(args.report_to):
        remedy = "Install it, or leave the flag out"
        raise Stop(f"--report_to {args.report_to}: no such package. {remedy}")
    if args.batch_size < 128 and args.learning_rate <= 5e-7:
        say(
            f"note: --batch_size {args.batch_size} at --learning_rate {args.learning_rate:g}: the "
            "rate was tuned for 128 pairs per step, and smaller batches have given worse results "
            "at it (RLHFlow/Online-RLHF issue 3). Raise the one or the other"
        )


def check_shard_size(shard_size: int | None, world: int) -> None:
    if shard_size is None:
        return
    divides = shard_size >= 1 and world % shard_size == 0
    if world == 1 or not divides:
        must = f"must divide the number of ranks ({world}, more than one)"
        raise Stop(f"--shard_size {shard_size} {must}")


def check_loss_arguments(args) -> None:
    smoothing = args.label_smoothing
    if args.loss_type in ("hinge", "ipo") and smoothing is not None:
        raise Stop(f"--label_smoothing has no effect with --loss_type {args.loss_type}")
    if args.loss_type == "robust" and not 0 < (smoothing or 0) < 0.5:
        raise Stop("--loss_type robust needs --label_smoothing between 0 and 0.5")
    if args.loss_type == "ipo" and args.length_coef is not None:
        raise Stop("--length_coef has no effect with --loss_type ipo")
    if len(args.beta) not in (1, args.num_train_epochs):
        epochs = args.num_train_epochs
        raise Stop(f"--beta takes one value, or one for each of the {epochs} epochs")


# ---- the loss ----------------------------------------------------------------------------------


def dpo_loss(
    policy_chosen_logprobs: Tensor,
    policy_rejected_logprobs: Tensor,
    reference_chosen_logprobs: Tensor,
    reference_rejected_logprobs: Tensor,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_margin: Tensor | float = 0.0,
) -> Tensor:
    """The loss of each pair, [n]. The equations stand at the top of the file.

    Log-probs: [n] fp32 of whole answers; for ipo their means per token.
    length_margin: a (|y_w| - |y_l|), [n].
    """
    chosen_logratios = policy_chosen_logprobs - reference_chosen_logprobs  # [n]
    rejected_logratios = policy_rejected_logprobs - reference_rejected_logprobs  # [n]
    d = chosen_logratios - rejected_logratios  # [n]
    z = beta * d + length_margin  # [n]
    e = label_smoothing

    if loss_type == "sigmoid":
        return -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)
    if loss_type == "robust":
        return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)
    if loss_type == "hinge":
        return torch.relu(1 - z)
    if loss_type == "ipo":
        return (d - 1 / (2 * beta)) ** 2
    raise ValueError(f"no loss is called {loss_type!r}")


def loss_of_pairs(policy: Tensor, reference: Tensor, lengths: Tensor, beta: float, args) -> Tensor:
    """The loss of each pair, [n], as the flags say.

    policy, reference: [n, 2] fp32, log-probs of (chosen, rejected) answers. lengths: [n, 2], |y|.
    """
    nll_per_token = -policy[:, 0] / lengths[:, 0]  # [n], of the chosen answer
    length_margin = (args.length_coef or 0.0) * (lengths[:, 0] - lengths[:, 1])  # [n]
    if args.loss_type == "ipo":
        policy = policy / lengths
        reference = reference / lengths
    loss = dpo_loss(
        policy[:, 0],
        policy[:, 1],
        reference[:, 0],
        reference[:, 1],
        beta,
        args.loss_type,
        args.label_smoothing or 0.0,
        length_margin,
    )
    return loss + args.nll_coef * nll_per_token


# ---- the policy --------------------------------------------------------------------------------


class Policy(torch.nn.Module):
    """A causal LM whose forward gives log-probs of answers, [n, 2], instead of logits.

    It is the FSDP root. Only in the root's forward is the weight of the head whole, and not a
    shard, so that linear_logprob can read it.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch: dict) -> Tensor:
        """batch: n pairs of T tokens in all, Tc of them in answers (training/batches.py)."""
        output = backbone(self.model)(**batch["inputs"], use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1)  # [T, D]
        # The state before a token predicts it: for an answer's first, that is the prompt's last.
        predicting = hidden[batch["positions"]]  # [Tc, D]
        head = lm_head(self.model)  # its weight, and bias, scale and soft-cap where it has them
        logprobs = linear_logprob(predicting, targets=batch["targets"], **head)  # [Tc] fp32

        # sum over the tokens of each answer: chosen 0, rejected 0, chosen 1, …
        of_answers = [tokens.sum() for tokens in logprobs.split(batch["split"])]
        chosen = torch.stack(of_answers[0::2])  # [n]
        rejected = torch.stack(of_answers[1::2])  # [n]
        return torch.stack([chosen, rejected], dim=1)  # [n, 2], no view: FSDP hooks its backward


def build_policy(config, args, device_type: str, world: int) -> Policy:
    """A sharded fp32 Policy on the meta device: each tensor has its shape, and none has memory."""
    with torch.device("meta"):
        model = network.build_model(
            config, torch.float32, args.packing, args.gradient_checkpointing, args.model
        )
        policy = Policy(model)
    dtype = DTYPES[args.dtype]
    return fsdp.shard(policy, dtype, args.shard_size, args.cpu_offload, device_type, world)


def load_policy(path: str, args, device, pairs: list[dict]) -> Policy:
    """A sharded Policy with its weights. Rank 0 reads them; two of `pairs` check the result."""
    rank, world = ranks()
    config = models.load_config(path)
    noise = network.random_fields(config)  # dropout, router jitter; build_policy switches it off
    if noise:
        say(f"{path}: switched off in training: {network.listed(noise)}")

    policy = build_policy(config, args, device.type, world)
    source = None
    if rank == 0:
        # In bf16 its own dtype will do: it is copied into fp32 weights, and checked against below.
        dtype = torch.float32 if args.dtype == "fp32" else "auto"
        attention = attention_implementation(config)
        source = models.load_model(AutoModelForCausalLM, path, dtype, attention)
    fsdp.load_weights(policy, source, device, args.cpu_offload)

    # The same pair twice gives the same numbers: nothing random is left on.
    short, long = shortest_and_longest(pairs, args.packing, args.tokens_per_batch)
    refusal = f"{path}: cannot be trained: {config.model_type}"
    first = first_logprobs(policy, long, args, device, refusal)  # [2]
    second = logprobs_of_one(policy, long, args, device)  # [2]
    checks.check_repeat(first, second, long, device.type, noise, path)

    # The numbers equal transformers' own. On the shortest pair, as rank 0 computes all its logits.
    ours = logprobs_of_one(policy, short, args, device)  # [2]
    if rank == 0:
        checks.check_causal(source, short, args.dtype, path)  # BERT and XLNet may look both ways
        checks.check_model(ours, source, short, args.dtype, path)
    return policy


def first_logprobs(policy, pair: dict, args, device, refusal: str) -> Tensor:
    """logprobs_of_one, where it may turn out that the model's code wants other inputs than ours.

    refusal: the beginning of the message in that case.
    """
    try:
        return logprobs_of_one(policy, pair, args, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:
        fault = f"{type(e).__name__}: {e}"
        raise Stop(
            f"{refusal} does not run on token ids alone, as dpo_train.py lays them in rows "
            f"({fault})."
        ) from e


def logprobs_of_one(policy, pair: dict, args, device) -> Tensor:
    """[2], of a pair alone. All ranks call it together, as FSDP gathers the weights from all."""
    plan = [plan_step([pair], [0], args)]
    return all_logprobs(policy, [pair], plan, args.packing, device)[0]


@torch.no_grad()
def all_logprobs(policy, pairs: list[dict], plans: list, packing: str, device) -> Tensor:
    """Log-probs of all pairs, [n, 2] fp32 on the CPU.

    plans: [step][rank] -> microbatches of indices into pairs, each pair once. A rank without a pair
    left computes a stand-in of weight 0, as FSDP's collectives need every rank.
    """
    rank, _ = ranks()
    result = torch.zeros(len(pairs), 2, device=device)
    mine = [batch for step in plans for batch in step[rank]]
    with progress(len(mine), "log-probs", "batch") as bar:
        for batch in feed(pairs, mine, packing, device):
            logprobs = policy(batch)  # [n, 2]
            result[batch["rows"]] += logprobs * batch["weights"][:, None]
            bar.update()
    # After a forward without a backward FSDP2 leaves gathered weights in parameters(). An optimizer
    # made now would hold those instead of the shards.
    fsdp.reshard(policy)
    dist.all_reduce(result)  # each pair was one rank's, and adding zeros is exact
    return result.cpu()


# ---- which pairs, in which order ---------------------------------------------------------------


def plan_step(pairs: list[dict], step: list[int], args) -> list[list[list[int]]]:
    """How the ranks share a step: [rank][microbatch] -> indices into pairs, of those in `step`."""
    _, world = ranks()
    costs = {i: cost(pairs[i], args.packing) for i in step}
    return microbatches(costs, args.tokens_per_batch, world, args.packing)


def plan_all_steps(pairs: list[dict], args) -> list:
    """The plan of every step of every epoch. Made in advance, it needs no place in a checkpoint."""
    plans = []
    for epoch in range(args.num_train_epochs):
        order = list(range(len(pairs)))
        random.Random(seed_of("dpo_train", args.seed, epoch)).shuffle(order)
        for start in range(0, len(order), args.batch_size):
            step = order[start : start + args.batch_size]
            plans.append(plan_step(pairs, step, args))
    return plans


def indices_of(plan: list) -> list[int]:
    """The pairs of a step, of all ranks. plan: [rank][microbatch] -> indices."""
    return [i for share in plan for batch in share for i in batch]


# ---- one step ----------------------------------------------------------------------------------


class StepSettings(NamedTuple):
    microbatches: int  # how many this rank has
    pair_count: int  # of all ranks
    beta: float
    learning_rate: float
    told_to_stop: bool  # this rank was


class Step(NamedTuple):
    metrics: dict[str, float]  # means over all pairs of the step
    grad_norm: float
    stop: bool  # some rank was told to stop
    losses: list[tuple[Tensor, Tensor]]  # of this rank's microbatches: rows [n], loss [n]

    def is_finite(self) -> bool:
        return all(map(math.isfinite, [*self.metrics.values(), self.grad_norm]))


def training_step(
    policy, optimizer, batches: Iterator[dict], reference: Tensor, settings: StepSettings, args
) -> Step:
    """Forward, backward and update on one step's pairs; no update where a number is not finite.

    batches: of training/batches.feed. reference: log-probs of all pairs, [all, 2].
    """
    _, world = ranks()
    totals: dict[str, Tensor] = {}  # of the metrics, summed over pairs
    losses = []
    for k in range(settings.microbatches):
        batch = next(batches)
        # Gradients are reduced to shards after every microbatch: kept whole in between they would
        # take 4 bytes per weight on every rank (28 GB for 7B). Those of copies of the model (HSDP)
        # are added up once, at the end.
        policy.set_requires_all_reduce(k == settings.microbatches - 1)

        # forward
        logprobs = policy(batch)  # [n, 2]
        refs = reference[batch["rows"]]  # [n, 2]
        loss = loss_of_pairs(logprobs, refs, batch["lengths"], settings.beta, args)  # [n]

        # backward; FSDP divides by the ranks, and we want the mean over the step's pairs. A
        # stand-in has weight 0
        total_loss = (loss * batch["weights"]).sum()
        (total_loss * world / settings.pair_count).backward()

        # add up the metrics
        losses.append((batch["rows"], loss.detach()))
        metrics = metrics_of(loss, logprobs, refs, batch["lengths"], settings.beta)
        for name, values in metrics.items():
            total = (values.double() * batch["weights"]).sum()
            totals[name] = totals[name] + total if name in totals else total

    fsdp.reshard(policy)  # drop gathered copies: the update below makes them stale

    # add up over all ranks. "stop" travels along: one rank that was told to stop stops all
    totals["stop"] = torch.full_like(totals["loss"], float(settings.told_to_stop))
    sums = torch.stack(list(totals.values()))
    dist.all_reduce(sums)
    means = dict(zip(totals, (sums / settings.pair_count).tolist(), strict=True))
    stop = means.pop("stop") > 0

    # clip the gradient
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm or math.inf)
    step = Step(means, norm.full_tensor().item(), stop, losses)

    # update
    if step.is_finite():
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate
        optimizer.step()
        optimizer.zero_grad()
    return step


@torch.no_grad()
def metrics_of(
    loss: Tensor, logprobs: Tensor, reference: Tensor, lengths: Tensor, beta: float
) -> dict[str, Tensor]:
    """TRL's names and some of ours; each is [n], one number per pair.

    Rewards are DPO's implicit ones, whatever the --loss_type.
    """
    rewards = beta * (logprobs - reference)  # [n, 2], the implicit rewards of DPO
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "loss": loss,
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/accuracies": margins > 0,
        "rewards/margins": margins,
        "logps/chosen": logprobs[:, 0],
        "logps/rejected": logprobs[:, 1],
        "logps/chosen_fell": logprobs[:, 0] < reference[:, 0],
        "length/chosen": lengths[:, 0],
        "length/rejected": lengths[:, 1],
    }


def learning_rate(step: int, steps: int, args) -> float:
    """A linear warm-up that wastes no step at zero, then level, or a cosine down to a tenth."""
    warmup = math.ceil(args.warmup_ratio * steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    if args.lr_scheduler == "constant":
        return args.learning_rate
    done = (step - warmup) / max(1, steps - 1 - warmup)
    cosine = (1 + math.cos(math.pi * done)) / 2  # from 1 to 0
    return args.learning_rate * (0.1 + 0.9 * cosine)


# ---- all steps ---------------------------------------------------------------------------------


def train(policy, pairs: list[dict], reference, plans: list, args, stage, device) -> dict:
    """Every step, with one row per step in train.jsonl. Returns figures for the metadata.

    reference: [n, 2]. plans: [step][rank] -> microbatches of indices into pairs. SIGTERM and Ctrl-C
    end it after a step, with a checkpoint.
    """
    rank, world = ranks()
    steps = len(plans)
    optimizer = make_optimizer(policy, args, device)
    first = load_checkpoint(stage.parts, policy, optimizer, steps)
    say(f"{steps} steps" + (f"; resuming after step {first}" if first else ""))
    log = TrainLog(stage.parts / "train.jsonl", first, args.report_to) if rank == 0 else None
    bar = progress(steps, "train", "step", first)
    signals = StopSignals()
    reference_on_device = reference.to(device)  # [n, 2]
    # One stream of batches for all steps, so that the next is prepared while this one is computed
    mine = chain.from_iterable(plan[rank] for plan in plans[first:])
    batches = feed(pairs, mine, args.packing, device)
    total_seconds = 0.0

    for number in range(first, steps):
        began = time.time()
        indices = indices_of(plans[number])
        settings = StepSettings(
            microbatches=len(plans[number][rank]),
            pair_count=len(indices),
            beta=beta_of(number, steps, args),
            learning_rate=learning_rate(number, steps, args),
            told_to_stop=signals.received,
        )
        step = training_step(policy, optimizer, batches, reference_on_device, settings, args)
        if not step.is_finite():
            raise not_finite(step, number, pairs, stage)
        if number == 0 and args.ref_model is None:
            expected = loss_if_policy_is_reference(pairs, reference, indices, settings.beta, args)
            checks.check_first_loss(step.metrics["loss"], expected, args.dtype)

        # report
        if device.type == "cuda":
            torch.cuda.synchronize()  # or the clock would measure how fast work is queued
        seconds = time.time() - began
        total_seconds += seconds
        tokens = sum(sum(lengths_of(pairs[i])) for i in indices)  # prompt + chosen + rejected
        if log:
            epoch = (number + 1) / (steps // args.num_train_epochs)
            log.write(log_row(number, epoch, step, settings, tokens, seconds))
        show(bar, step.metrics, tokens / seconds)

        if step.stop or checkpoint_is_due(number + 1, steps, args.save_every):
            save_checkpoint(stage.parts, policy, optimizer, number + 1)
        if step.stop:
            say(f"interrupted: saved after step {number + 1} of {steps}; the same command resumes")
            fsdp.leave()
            sys.exit(INTERRUPTED)

    bar.close()
    done = [lengths_of(pairs[i]) for plan in plans[first:] for i in indices_of(plan)]
    return speed.figures(policy, done, total_seconds, device, args.dtype, world)


def make_optimizer(policy, args, device):
    return torch.optim.AdamW(
        policy.parameters(),
        betas=tuple(args.adam_betas),
        weight_decay=args.weight_decay,
        fused=device.type == "cuda",
    )


def checkpoint_is_due(done: int, steps: int, save_every: int) -> bool:
    """Every save_every steps, and after the last one: an export may fail, too."""
    if not save_every:
        return False
    return done % save_every == 0 or done == steps


def beta_of(step: int, steps: int, args) -> float:
    """--beta of the epoch that the step is in."""
    epoch = step // (steps // args.num_train_epochs)
    return args.beta[min(epoch, len(args.beta) - 1)]


def loss_if_policy_is_reference(
    pairs: list[dict], reference: Tensor, indices: list[int], beta: float, args
) -> float:
    """The mean loss of a step whose policy is the reference; ln 2 for the sigmoid loss."""
    logprobs = reference[indices]  # [n, 2]
    lengths = torch.tensor([lengths_of(pairs[i])[1:] for i in indices])  # [n, 2]
    return loss_of_pairs(logprobs, logprobs, lengths, beta, args).mean().item()


def log_row(number, epoch, step: Step, settings: StepSettings, tokens, seconds) -> dict:
    """A line of train.jsonl."""
    return {
        "step": number + 1,
        "epoch": epoch,
        **step.metrics,
        "grad_norm": step.grad_norm,
        "learning_rate": settings.learning_rate,
        "beta": settings.beta,
        "pairs": settings.pair_count,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
    }


def show(bar, metrics: dict[str, float], tokens_per_second: float) -> None:
    """Move the progress bar by one step."""
    loss = f"{metrics['loss']:.4f}"
    accuracy = f"{metrics['rewards/accuracies']:.2f}"
    bar.set_postfix(loss=loss, acc=accuracy, tok_s=f"{tokens_per_second:.0f}", refresh=False)
    bar.update()


def not_finite(step: Step, number: int, pairs: list[dict], stage: Stage) -> Stop:
    """The message for a step with NaN or infinity in it."""
    bad = []
    for rows, loss in step.losses:
        for row in rows[~loss.isfinite()].tolist():
            bad.append(pairs[row]["id"])
    kept = [folder.name for folder in checkpoints(stage.parts)]
    loss, norm = step.metrics["loss"], step.grad_norm
    return Stop(
        f"step {number + 1}: loss {loss:g}, gradient norm {norm:g}: not finite; no update was "
        f"made. This rank's pairs with such a loss: {bad[:8] or 'none'}. "
        f"Last checkpoint: {kept or 'none'}. "
        "Look at those pairs, or begin again (--overwrite) with a lower --learning_rate."
    )


class StopSignals:
    """From here on SIGTERM and Ctrl-C only set `received`; the process does not end by them.

    The checkpoint is worth waiting for, and so is the export.
    """

    def __init__(self):
        self.received = False
        signal.signal(signal.SIGTERM, self.receive)
        signal.signal(signal.SIGINT, self.receive)

    def receive(self, *_) -> None:
        self.received = True


# ---- the reference -----------------------------------------------------------------------------


def load_reference(file: Path) -> Tensor | None:
    """The reference's log-probs of an interrupted run, [n, 2] fp32; None without one.

    An .npz file holds a checksum, so that damage is noticed.
    """
    rank, _ = ranks()
    found = [None]  # one rank looks: file systems need not show all of them the same
    if rank == 0 and file.exists():
        try:
            with np.load(file) as content:
                found = [torch.from_numpy(content["logprobs"])]
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as e:
            say(f"{file}: is damaged ({e}); the reference is computed again")
    dist.broadcast_object_list(found)
    return found[0]


def save_reference(file: Path, reference: Tensor, pairs: list[dict]) -> None:
    """Rank 0 keeps the reference's log-probs for a run that is interrupted and resumed."""
    if not reference.isfinite().all():
        rows = (~reference.isfinite()).any(1).nonzero().flatten().tolist()
        bad = [pairs[row]["id"] for row in rows[:8]]
        raise Stop(f"the reference's log-probs are not finite for the pairs {bad}")
    rank, _ = ranks()
    if rank == 0:
        with whole(file) as temporary, open(temporary, "wb") as out:
            np.savez(out, logprobs=reference.numpy())


def reference_of_another_model(args, config, pairs: list[dict], plans: list, device) -> Tensor:
    """The log-probs of --ref_model, [n, 2]. The model's memory is free again afterwards."""
    theirs = models.load_config(args.ref_model)
    if theirs.get_text_config().vocab_size != config.get_text_config().vocab_size:
        names = f"--ref_model {args.ref_model} and --model {args.model}"
        raise Stop(f"{names} have vocabularies of different sizes")
    reference = load_policy(args.ref_model, args, device, pairs)
    logprobs = all_logprobs(reference, pairs, plans, args.packing, device)
    del reference
    gc.collect()  # FSDP's modules refer to each other: without this it would stay
    torch.cuda.empty_cache()
    return logprobs


# ---- the stage ---------------------------------------------------------------------------------


def main():
    args = parse(arguments())
    transformers_logging.disable_progress_bar()
    device = fsdp.start()
    rank, world = ranks()
    check_arguments(args, device.type, world)
    if args.dtype == "auto":
        args.dtype = "bf16" if device.type == "cuda" else "fp32"
    # The stage hashes its inputs, knows whether this very output is done, and stops if it was made
    # from others. stage.parts is the folder of an unfinished run.
    inputs = {"model": args.model, "ref_model": args.ref_model, "pairs": args.pairs}
    stage = Stage(args, inputs, args.output, free=FREE)
    if stage.done:
        fsdp.leave()
        return
    model_hash = stage.hashes["model"]
    if stage.hashes.get("ref_model") == model_hash:
        args.ref_model = None  # the same weights under another name: no second model

    # 1. The pairs, how this model takes them, and every step in advance
    config = models.load_config(args.model)
    tokenizer = models.load_tokenizer(args.model)
    pairs = load_pairs(args, tokenizer, config, stage)
    longest = max(p + max(c, r) for p, c, r in map(lengths_of, pairs))
    args.packing = network.choose_packing(args.packing, config, longest, args.model)
    plans = plan_all_steps(pairs, args)

    # 2. The reference, in the very microbatches of the first epoch: it rounds as the policy will
    first_epoch = plans[: len(plans) // args.num_train_epochs]
    reference_file = stage.parts / "reference.npz"
    reference = load_reference(reference_file)
    if args.ref_model and reference is None:
        reference = reference_of_another_model(args, config, pairs, first_epoch, device)
    policy = load_policy(args.model, args, device, pairs)
    if reference is None:
        reference = all_logprobs(policy, pairs, first_epoch, args.packing, device)
    save_reference(reference_file, reference, pairs)

    # 3. Audit the answers that this policy wrote. Their log-probs are in `reference` already,
    # unless that is another model: then compute them, for one batch of pairs
    if args.ref_model:
        audited = [pair for pair in pairs if model_hash in pair["models"]][: args.batch_size]
        plan = [plan_step(audited, list(range(len(audited))), args)] if audited else []
        logprobs = all_logprobs(policy, audited, plan, args.packing, device)
    else:
        audited, logprobs = pairs, reference
    audit = checks.audit(audited, logprobs, model_hash, args.dtype, args.max_logprob_gap)

    # 4. Train
    figures = train(policy, pairs, reference, plans, args, stage, device)

    # 5. Save
    weights = fsdp.gather_weights(policy)
    if rank == 0:
        save(weights, tokenizer, stage, args, audit=audit, train=figures)
    fsdp.leave()


def save(weights: dict, tokenizer, stage: Stage, args, **figures) -> None:
    """Rank 0: the trained policy as a Hugging Face folder, its log beside it, and the metadata."""
    with whole(stage.output) as folder:
        save_dtype = DTYPES.get(args.save_dtype)  # None for auto
        changed = fsdp.export(weights, args.model, save_dtype, tokenizer, folder)
        with whole(stage.output.with_name("train.jsonl")) as log:
            log.write_bytes((stage.parts / "train.jsonl").read_bytes())
        stage.write_meta(changed_weights=changed, **figures)
    stage.clean()
    say(f"{args.output}: {changed:.1%} of the weights changed in the saved dtype")


if __name__ == "__main__":
    run(main)
