"""Train a policy on preference pairs with DPO: plain torch, no trainer class.

    python dpo_train.py --model MODEL --pairs pairs.jsonl --output policy
    torchrun --nproc_per_node 8 dpo_train.py …
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        dpo_train.py --shard_size 8 …

The second command uses 8 GPUs of one machine. The third uses 4 machines; each holds one copy of the
weights, sharded over its 8 GPUs.

A pair is a prompt x with a chosen answer y_w and a rejected answer y_l. In the loop both answers
come from the policy itself: generate.py sampled them just before. Let

    pi(y|x)     the policy, which is trained
    ref(y|x)    the reference, which is not: by default the policy before its first step
    |y|         the number of tokens of an answer
    d           [log pi(y_w|x) - log ref(y_w|x)] - [log pi(y_l|x) - log ref(y_l|x)]

with log-probs summed over the tokens of an answer. So d says how much more the policy prefers y_w
to y_l than the reference does. DPO (arXiv 2305.18290, eq. 7) minimises -log sigmoid(beta d). In
general, with e = --label_smoothing, alpha = --length_coef and

    z = beta d + alpha (|y_w| - |y_l|)

the loss of a pair is, by --loss_type,

    sigmoid   -(1-e) log sigmoid(z) - e log sigmoid(-z)               DPO; cDPO where e > 0
    robust    [-(1-e) log sigmoid(z) + e log sigmoid(-z)] / (1-2e)    rDPO (2403.00409)
    hinge     max(0, 1 - z)                                           SLiC (2305.10425)
    ipo       (d' - 1 / (2 beta))^2                                   IPO (2310.12036, eq. 17)

Both e and alpha are 0 by default. With alpha > 0, a pair whose chosen answer is the longer one has
a larger z from the start, so it pushes d less, and the policy learns less about length as such:
R-DPO (2403.19159). And --nll_coef c adds c times -log pi(y_w|x) / |y_w|. For ipo, d' is d with
means per token in place of sums. The IPO paper uses sums. They grow with the length of an answer,
and the target 1 / (2 beta) does not: long answers would reach it by a small change per token.

The loss of a step is the mean over all its pairs, of all ranks and microbatches: however the pairs
are divided, the gradient is the same. What happens, in the order of main():

  1. Read the pairs. We train on the token ids that the generator wrote; nothing is tokenized again.
  2. Compute the reference's log-probs once, before the first step. By default the reference *is*
     the policy that was just loaded: one pass without gradients, and no second model on the GPU.
  3. Audit. The generator stored the log-prob of each answer that it sampled, and the trainer's must
     agree. Otherwise something upstream is wrong (template, doubled BOS, old weights): stop.
  4. Train. A microbatch is one row without padding, [prompt|chosen|rejected][prompt|…, where the
     rejected answer does not see the chosen one (kernels/attention.py). Log-probs come straight
     from hidden states, and logits are never held (kernels/logprob.py). FSDP2 shards the weights
     (training/fsdp.py), which are fp32, always: at a learning rate of 5e-7, AdamW on bf16 weights
     would round nearly every update away. The model stays in evaluation mode (training/network.py),
     so that policy and reference are the same function. In between, and before the first step
     and after the last, the same losses and rewards of held-out pairs (--eval_pairs). With
     --lora_rank the weights stay as they are, and small factors beside them are trained
     (training/lora.py).
  5. Save a Hugging Face folder. With --lora_rank the factors are added to the weights first.

SIGTERM or Ctrl-C in training saves a checkpoint, and the same command resumes from it.
"""

import gc
import math
import os
import random
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

# Microbatches differ in size, which would fragment the GPU's free memory. torch reads this when it
# is imported. If the user has set it, under this name or the old one, that value is used.
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
from arguments import integer_in, number_in, parse, parser
from kernels.attention import attention_implementation
from kernels.logprob import backbone, linear_logprob, lm_head

# Stop is an error for the user: run prints it as one line, without a traceback.
# whole gives a temporary path, for a file or a folder, which gets its name when it is complete.
# say and progress print on rank 0 only.
from records import Stop, whole
from stage import Stage, progress, ranks, run, say, seconds_since, seed_of
from training import checks, fsdp, lora, network, speed, tracker
from training.batches import cost, feed, lengths_of, microbatches, shortest_and_longest
from training.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from training.log import TrainLog
from training.pairs import load_held_out, load_pairs

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
INTERRUPTED = 75  # the exit code EX_TEMPFAIL: for iterate.sh, an interruption and no failure

# A run may be resumed with other values of these arguments. Some change the rounding, the others
# change nothing.
FREE = (
    "tokens_per_batch",
    "gradient_checkpointing",
    "cpu_offload",
    "shard_size",
    "save_every",
    "max_logprob_gap",
    "iteration",  # which --beta it means is in the arguments
    "report_to",
    "run_name",
    "logging_dir",
    "steps_before",
)


# ---- arguments ---------------------------------------------------------------------------------


def arguments():
    p = parser(__doc__)
    add_files(p.add_argument)
    add_loss(p.add_argument)
    add_optimizer(p.add_argument)
    add_lora(p.add_argument)
    add_memory_and_speed(p.add_argument)
    add_evaluation(p.add_argument)
    add_watching(p.add_argument)
    add_tracker(p.add_argument)
    return p


def add_files(add) -> None:
    add(
        "--model", required=True, help="the policy to start from: a folder or a hub name[@revision]"
    )
    add("--ref_model", help="the reference; default: --model itself, which costs no second model")
    add("--pairs", nargs="+", required=True, help="preference pairs, one file or several")
    add(
        "--output",
        required=True,
        help="folder of the trained policy; its log is OUTPUT.train.jsonl",
    )
    add(
        "--max_length",
        type=integer_in("[1, inf)"),
        help="pairs with a longer prompt + answer are dropped; default: the model's positions",
    )


def add_loss(add) -> None:
    add(
        "--beta",
        type=number_in("[0, inf)"),
        nargs="+",
        default=[0.1],
        help="0.1, as in the DPO paper. Several: one per epoch, counted over all iterations of a "
        "loop; the last holds for all later epochs. So values beyond the end are no error",
    )
    add(
        "--iteration",
        type=integer_in("[1, inf)"),
        default=1,
        help="of the loop: epoch e = 0, 1, … of iteration i has the --beta number (i - 1) * "
        "num_train_epochs + e, from 0; default 1",
    )
    add("--loss_type", choices=("sigmoid", "ipo", "hinge", "robust"), default="sigmoid")
    add(
        "--label_smoothing",
        type=number_in("[0, 0.5)"),
        help="share of flipped labels (sigmoid: default 0; robust: needed)",
    )
    add(
        "--nll_coef",
        type=number_in("[0, inf)"),
        default=0.0,
        help="weight of the chosen answer's loss per token; default 0: DPO alone",
    )
    add(
        "--length_coef",
        type=number_in("(-inf, inf)"),
        help="alpha in the equations above: discounts length; default 0",
    )


def add_optimizer(add) -> None:
    # The defaults are those of OpenRLHF 0.9.5, its last release with an iterative DPO loop.
    add(
        "--learning_rate",
        type=number_in("(0, 1]"),
        default=5e-7,
        help="5e-7 suits full fine-tuning of 1B parameters and more",
    )
    add(
        "--batch_size",
        type=integer_in("[1, inf)"),
        default=128,
        help="pairs per optimizer step, over all ranks",
    )
    add(
        "--num_train_epochs",
        type=integer_in("[1, inf)"),
        default=1,
        help="1: the next iteration has fresh pairs",
    )
    add(
        "--lr_scheduler",
        choices=("cosine", "constant"),
        default="cosine",
        help="after the warm-up: down to a tenth, or constant",
    )
    add(
        "--warmup_ratio",
        type=number_in("[0, 1]"),
        default=0.03,
        help="share of the steps with a rising rate",
    )
    add(
        "--weight_decay",
        type=number_in("[0, inf)"),
        default=0.0,
        help="0: beta holds the policy back already",
    )
    add(
        "--adam_betas",
        type=number_in("[0, 1)"),
        nargs=2,
        default=[0.9, 0.95],
        metavar=("B1", "B2"),
    )
    add(
        "--max_grad_norm",
        type=number_in("[0, inf)"),
        default=1.0,
        help="clip the gradient's norm; 0: do not",
    )


def add_lora(add) -> None:
    add(
        "--lora_rank",
        type=integer_in("[1, inf)"),
        help="train factors of this rank beside frozen weights (LoRA), with a --learning_rate of "
        "5e-6 or more; 16 is usual; default: full training",
    )
    add(
        "--lora_alpha",
        type=number_in("(0, inf)"),
        help="the factors' product is multiplied by alpha / rank; default: twice the rank",
    )
    add(
        "--lora_targets",
        nargs="+",
        help="names of linear layers, as peft's target_modules: q_proj, mlp.up_proj, …; default: "
        "all in the decoder layers",
    )


def add_memory_and_speed(add) -> None:
    add(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="dtype of the matrix products; auto: bf16 on a GPU, fp32 on a CPU. "
        "Trained weights and log-probs are fp32 either way",
    )
    add(
        "--save_dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="dtype of the saved folder; auto: that of the model's files",
    )
    add(
        "--tokens_per_batch",
        type=integer_in("[1, inf)"),
        default=16384,
        help="tokens in one forward pass of one rank; 16k fill a large GPU",
    )
    add(
        "--packing",
        choices=("auto", "prefix", "padded"),
        default="auto",
        help="prefix: no padding, and each prompt once; padded: for models with attention that "
        "the mode 'prefix' cannot express (windows, soft-caps); auto: prefix wherever possible",
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
        type=integer_in("[1, inf)"),
        help="ranks that share one copy of the weights; default: all. With the number of GPUs per "
        "machine, each machine holds a copy (HSDP)",
    )


def add_evaluation(add) -> None:
    add(
        "--eval_pairs",
        nargs="+",
        help="held-out pairs.jsonl: loss, accuracy and rewards on them before and after training",
    )
    add(
        "--eval_every",
        type=integer_in("[0, inf)"),
        default=0,
        help="steps between evaluations; 0: before and after training only",
    )


def add_watching(add) -> None:
    add(
        "--save_every",
        type=integer_in("[0, inf)"),
        default=0,
        help="steps between checkpoints of 12 bytes per trained weight; 0: only when interrupted, "
        "as an iteration is short",
    )
    add(
        "--max_logprob_gap",
        type=number_in("(0, inf)"),
        help="the audit's tolerance, in nats: the mean over answers of |difference| / sqrt(|y|), "
        "as rounding errors add up like a random walk; default 1e-3 in fp32, 0.1 in bf16 "
        "(provisional)",
    )
    add("--seed", type=integer_in("[0, inf)"), default=0, help="seed for shuffling the pairs")


def add_tracker(add) -> None:
    add(
        "--report_to",
        choices=tracker.TRACKERS,
        default="none",
        help="show the log's rows there, too; training/tracker.py says how",
    )
    add("--run_name", help="of the run there; default: the name of --output")
    add("--logging_dir", help="for the tracker's files; default: OUTPUT.tracker")
    add(
        "--steps_before",
        type=integer_in("[0, inf)"),
        default=0,
        help="steps of the loop's earlier iterations: the tracker counts on from there",
    )


def check_arguments(args, device_type: str, world: int) -> None:
    """A flag without effect is an error: the run is not what its author thinks."""
    check_loss_arguments(args)
    if args.cpu_offload and device_type == "cpu":
        raise Stop("--cpu_offload has no effect without a GPU")
    check_shard_size(args.shard_size, world)
    if args.eval_every and not args.eval_pairs:
        raise Stop("--eval_every has no effect without --eval_pairs")
    tracker.check_arguments(args)
    lora.settle_arguments(args)
    comment_on_rate(args)


def comment_on_rate(args) -> None:
    if args.learning_rate > 5e-7:
        return
    if args.lora_rank:
        say(
            f"note: --learning_rate {args.learning_rate:g} is one of full training, and LoRA wants "
            f"five to ten times as much: begin with {lora.RATE:g}"
        )
    elif args.batch_size < 128:
        say(
            f"note: --batch_size {args.batch_size} at --learning_rate {args.learning_rate:g}: the "
            "rate was tuned for 128 pairs per step, and smaller batches have given worse results "
            "at it (RLHFlow/Online-RLHF issue 3). Raise one of the two"
        )


def check_shard_size(shard_size: int | None, world: int) -> None:
    if shard_size is None:
        return
    if world == 1:
        raise Stop(f"--shard_size {shard_size} has no effect with one rank: leave it out")
    if world % shard_size:
        raise Stop(f"--shard_size {shard_size} does not divide the {world} ranks")


def check_loss_arguments(args) -> None:
    smoothing = args.label_smoothing
    if args.loss_type in ("hinge", "ipo") and smoothing is not None:
        raise Stop(f"--label_smoothing has no effect with --loss_type {args.loss_type}")
    if args.loss_type == "robust" and not 0 < (smoothing or 0) < 0.5:
        raise Stop("--loss_type robust needs --label_smoothing between 0 and 0.5")
    if args.loss_type == "ipo" and args.length_coef is not None:
        raise Stop("--length_coef has no effect with --loss_type ipo")
    if args.loss_type == "ipo" and 0 in args.beta:
        raise Stop("--beta 0 with --loss_type ipo: its target is 1 / (2 beta)")
    if not any(args.beta) and args.nll_coef == 0:
        raise Stop("--beta 0 trains nothing, unless --nll_coef is above 0")


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
    """The loss of each pair, [n]. The equations are at the top of the file.

    Log-probs: [n] fp32 of whole answers; for ipo their means per token.
    length_margin: alpha (|y_w| - |y_l|), [n].
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


# ---- which pairs, in which order ---------------------------------------------------------------


def plan_step(pairs: list[dict], indices: list[int], args) -> list[list[list[int]]]:
    """Share the pairs of one step among the ranks: [rank][microbatch] -> indices into pairs."""
    _, world = ranks()
    costs = {i: cost(pairs[i], args.packing) for i in indices}
    return microbatches(costs, args.tokens_per_batch, world, args.packing)


def plan_all_steps(pairs: list[dict], args) -> list:
    """The plan of every step of every epoch. It follows from the seed: no checkpoint holds it."""
    plans = []
    for epoch in range(args.num_train_epochs):
        order = list(range(len(pairs)))
        random.Random(seed_of("dpo_train", args.seed, epoch)).shuffle(order)
        for start in range(0, len(order), args.batch_size):
            indices = order[start : start + args.batch_size]
            plans.append(plan_step(pairs, indices, args))
    return plans


def indices_of(plan: list) -> list[int]:
    """The pairs of a step, of all ranks. plan: [rank][microbatch] -> indices."""
    return [i for share in plan for batch in share for i in batch]


# ---- the policy --------------------------------------------------------------------------------


class Policy(torch.nn.Module):
    """A causal LM whose forward gives log-probs of answers, [n, 2], instead of logits.

    It is a module because it is the FSDP root: only in the root's forward is the head's weight
    whole, as linear_logprob needs it, and not a shard.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch: dict) -> Tensor:
        """batch: n pairs of T positions in all, of which Tc are completions, that is, in answers.

        inputs     keyword arguments of the base model
        positions  [Tc]: for each answer token, which of the T states predicts it
        targets    [Tc]: those tokens: chosen 0, rejected 0, chosen 1, …
        split      the length of each of the 2n answers

        Not read here, but by the callers:

        rows       [n]: the indices of the pairs
        lengths    [n, 2]: |y| of (chosen, rejected)
        weights    [n]: 1, or 0 for a stand-in, where a rank has no pair left
        """
        output = backbone(self.model)(**batch["inputs"], use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1)  # [T, D]
        # The state before a token predicts it. For an answer's first token, that is the state of
        # the prompt's last token.
        predicting = hidden[batch["positions"]]  # [Tc, D]
        head = lm_head(self.model)  # its weight, and bias, scale and soft-cap where it has them
        logprobs = linear_logprob(predicting, targets=batch["targets"], **head)  # [Tc] fp32

        # sum over the tokens of each answer: chosen 0, rejected 0, chosen 1, …
        of_answers = [tokens.sum() for tokens in logprobs.split(batch["split"])]
        chosen = torch.stack(of_answers[0::2])  # [n]
        rejected = torch.stack(of_answers[1::2])  # [n]
        return torch.stack([chosen, rejected], dim=1)  # [n, 2]


def whole_policy(path: str, config, args, with_factors: bool, dtype=None) -> Policy:
    """A Policy on torch's default device, without its weights.

    path: of the policy or the reference, for messages. with_factors: of LoRA, which a reference has
    not. dtype: of all weights; None: as they are in training, fp32, or frozen as in the files.
    """
    dtype_of_files = config.dtype  # transformers overwrites it when it builds the model
    trained_dtype = dtype or torch.float32
    model = network.build_model(
        config, trained_dtype, args.packing, args.gradient_checkpointing, path
    )
    if args.lora_rank:
        lora.freeze(model, dtype or dtype_of_files)
    if with_factors:
        lora.adapt(model, args, trained_dtype, path)
    return Policy(model)


def build_policy(
    path: str, config, args, with_factors: bool, device_type: str, world: int
) -> Policy:
    """A sharded Policy on the meta device: its tensors have shapes, but no memory."""
    with torch.device("meta"):
        policy = whole_policy(path, config, args, with_factors)
    dtype = DTYPES[args.dtype]
    return fsdp.shard(policy, dtype, args.shard_size, args.cpu_offload, device_type, world)


def load_policy(
    path: str, args, device, pairs: list[dict], factor_seed: int | None = None
) -> Policy:
    """A sharded Policy with its weights. Rank 0 reads them; two of `pairs` check the result.

    factor_seed: of the first factors of LoRA; None: there are none.
    """
    rank, world = ranks()
    config = models.load_config(path)
    noise = network.random_fields(config)  # dropout, router jitter; build_policy switches it off
    if noise:
        say(f"{path}: switched off in training: {network.listed(noise)}")

    with_factors = factor_seed is not None
    policy = build_policy(path, config, args, with_factors, device.type, world)
    source, factors = None, {}
    if rank == 0:
        # `source` is copied into the weights of `policy` and compared with it below. For bf16 the
        # dtype of the files is precise enough.
        dtype = torch.float32 if args.dtype == "fp32" else "auto"
        attention = attention_implementation(config)
        source = models.load_model(AutoModelForCausalLM, path, dtype, attention)
        if with_factors:
            lora.describe(policy.model, args, path)
            factors = lora.first_factors(policy.model, factor_seed)
    fsdp.load_weights(policy, source, factors, device, args.cpu_offload)

    # The same pair twice gives the same numbers: nothing random is left on. `long` is the longest
    # pair that fits into a microbatch.
    short, long = shortest_and_longest(pairs, args.packing, args.tokens_per_batch)
    first = first_logprobs(policy, long, args, device, path)  # [2]
    second = logprobs_of_one(policy, long, args, device)  # [2]
    checks.check_repeat(first, second, long, device.type, noise, path)
    lora.check_called(policy.model, path)

    # The numbers equal transformers' own. We compare the shortest pair, because rank 0 computes all
    # of its logits.
    ours = logprobs_of_one(policy, short, args, device)  # [2]
    if rank == 0:
        checks.check_causal(source, short, args.dtype, path)  # BERT may see the future
        checks.check_model(ours, source, short, args.dtype, path)
    return policy


def first_logprobs(policy, pair: dict, args, device, path: str) -> Tensor:
    """logprobs_of_one; a failure means that this model cannot be trained here.

    Its code may need more than token ids and positions. path: of the model, for the message.
    """
    try:
        return logprobs_of_one(policy, pair, args, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:
        kind = policy.model.config.model_type
        fault = f"{type(e).__name__}: {e}"
        raise Stop(
            f"{path}: cannot be trained: {kind} does not run on token ids alone, as dpo_train.py "
            f"lays them in rows ({fault})."
        ) from e


def logprobs_of_one(policy, pair: dict, args, device) -> Tensor:
    """[2], of a pair alone. All ranks call it together: FSDP gathers the weights from all ranks."""
    plans = [plan_step([pair], [0], args)]  # one rank computes the pair, the others a stand-in
    return all_logprobs(policy, [pair], plans, args.packing, device)[0]


@torch.no_grad()
def all_logprobs(policy, pairs: list[dict], plans: list, packing: str, device) -> Tensor:
    """Log-probs of all pairs, [n, 2] fp32 on the CPU.

    plans: [step][rank] -> microbatches of indices into pairs, each pair once. All ranks have the
    same number of microbatches, because FSDP's collectives need every rank. Where one is empty,
    feed puts in some pair with weight 0.
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
    dist.all_reduce(result)  # one rank computed each pair; the others add zeros, which is exact
    return result.cpu()


# ---- one step ----------------------------------------------------------------------------------


class StepSettings(NamedTuple):
    microbatches: int  # how many this rank has; all ranks have the same number
    pair_count: int  # of all ranks
    beta: float
    learning_rate: float
    told_to_stop: bool  # this rank has received SIGTERM or Ctrl-C


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

    batches: from training/batches.feed. reference: log-probs of all pairs, [all, 2].
    """
    _, world = ranks()
    totals: dict[str, Tensor] = {}  # of the metrics, summed over pairs
    losses = []
    for k in range(settings.microbatches):
        batch = next(batches)
        # Several copies of the model (HSDP) add up their gradients after the last microbatch only.
        # Within a copy FSDP reduces gradients to shards after each one: whole, they would take 4
        # bytes per weight on every rank (28 GB for 7B).
        policy.set_requires_all_reduce(k == settings.microbatches - 1)

        # forward
        logprobs = policy(batch)  # [n, 2]
        refs = reference[batch["rows"]]  # [n, 2]
        loss = loss_of_pairs(logprobs, refs, batch["lengths"], settings.beta, args)  # [n]

        # backward. FSDP averages over the ranks, and we want the mean over the step's pairs
        total_loss = (loss * batch["weights"]).sum()
        (total_loss * world / settings.pair_count).backward()

        # add up the metrics
        loss = loss.detach()
        losses.append((batch["rows"], loss))
        metrics = metrics_of(loss, logprobs, refs, batch["lengths"], settings.beta)
        for name, values in metrics.items():
            total = (values.double() * batch["weights"]).sum()
            totals[name] = totals.get(name, 0.0) + total

    # Where memory allows, fsdp.shard turns resharding off, and weights are gathered since the first
    # microbatch. The update below changes the shards, so those copies must go.
    fsdp.reshard(policy)

    # add up over all ranks. "stop" is summed too: if one rank was told to stop, all stop
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
    """A linear warm-up that wastes no step at zero, then constant, or a cosine down to a tenth."""
    warmup = math.ceil(args.warmup_ratio * steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    if args.lr_scheduler == "constant":
        return args.learning_rate
    done = (step - warmup) / max(1, steps - 1 - warmup)
    cosine = (1 + math.cos(math.pi * done)) / 2  # from 1 to 0
    return args.learning_rate * (0.1 + 0.9 * cosine)


# ---- all steps ---------------------------------------------------------------------------------


def train(policy, pairs, reference, plans: list, held_out, args, stage: Stage, device) -> dict:
    """Every step, with one row per step in train.jsonl. Returns figures for the metadata.

    reference: [n, 2]. plans: [step][rank] -> microbatches of indices into pairs. held_out: the
    HeldOut pairs, for evaluations. stage.parts is the folder of the unfinished run, with its log
    and checkpoint. SIGTERM and Ctrl-C end training after a step, with a checkpoint.
    """
    rank, world = ranks()
    steps = len(plans)
    optimizer = make_optimizer(policy, args, device)
    steps_done = load_checkpoint(stage.parts, policy, optimizer, steps)
    say(f"{steps} steps" + (f"; resuming after step {steps_done}" if steps_done else ""))
    log = open_log(stage, steps_done, args)
    bar = progress(steps, "train", "step", steps_done)
    signals = StopSignals()
    reference_on_device = reference.to(device)  # [n, 2]
    # One stream of batches for all steps, so that the next is prepared while this one is computed
    mine = chain.from_iterable(plan[rank] for plan in plans[steps_done:])
    batches = feed(pairs, mine, args.packing, device)
    steps_per_epoch = steps // args.num_train_epochs
    total_seconds = 0.0

    for number in range(steps_done, steps):
        if eval_is_due(number, args):
            evaluate(policy, held_out, number, args, device, log)

        began = time.monotonic()
        indices = indices_of(plans[number])
        settings = StepSettings(
            microbatches=len(plans[number][rank]),
            pair_count=len(indices),
            beta=args.beta[number // steps_per_epoch],
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
        seconds = seconds_of_step(began, device)
        total_seconds += seconds
        tokens = sum(sum(lengths_of(pairs[i])) for i in indices)  # prompt + chosen + rejected
        if log:
            log.write(log_row(number, steps_per_epoch, step, settings, tokens, seconds))
        show(bar, step.metrics, tokens / seconds)

        if step.stop or checkpoint_is_due(number + 1, steps, args.save_every):
            save_checkpoint(stage.parts, policy, optimizer, number + 1)
        if step.stop:
            leave_interrupted(number + 1, steps)

    if args.eval_pairs:
        evaluate(policy, held_out, steps, args, device, log)
    bar.close()
    done = [lengths_of(pairs[i]) for plan in plans[steps_done:] for i in indices_of(plan)]
    return speed.figures(policy, done, total_seconds, device, args.dtype, world)


def open_log(stage: Stage, steps_done: int, args) -> TrainLog | None:
    """Rank 0 writes the log, from the step that the checkpoint has come to."""
    if stage.rank > 0:
        return None
    shown = tracker.of_training(args, stage.output, steps_done)
    return TrainLog(stage.parts / "train.jsonl", steps_done, shown)


def make_optimizer(policy, args, device):
    """AdamW on the shards; training_step sets the learning rate."""
    return torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad],
        betas=tuple(args.adam_betas),
        weight_decay=args.weight_decay,
        fused=device.type == "cuda",
    )


def checkpoint_is_due(done: int, steps: int, save_every: int) -> bool:
    """Every save_every steps, and after the last, so that a failed export costs no training."""
    if not save_every:
        return False
    return done % save_every == 0 or done == steps


def betas_of_epochs(args) -> list[float]:
    """The beta of each epoch of this run. --beta lists those of all iterations' epochs."""
    first = (args.iteration - 1) * args.num_train_epochs
    last = len(args.beta) - 1  # it holds for all later epochs
    return [args.beta[min(first + epoch, last)] for epoch in range(args.num_train_epochs)]


def loss_if_policy_is_reference(
    pairs: list[dict], reference: Tensor, indices: list[int], beta: float, args
) -> float:
    """The mean loss of a step whose policy is the reference: ln 2, unless flags add to it."""
    logprobs = reference[indices]  # [n, 2]
    lengths = torch.tensor([lengths_of(pairs[i])[1:] for i in indices])  # [n, 2]
    return loss_of_pairs(logprobs, logprobs, lengths, beta, args).mean().item()


def seconds_of_step(began: float, device) -> float:
    """Since `began`, with all work that is queued on a GPU: the clock alone would not see it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return seconds_since(began)


def leave_interrupted(steps_done: int, steps: int) -> None:
    say(f"interrupted: saved after step {steps_done} of {steps}; the same command resumes")
    fsdp.leave()
    sys.exit(INTERRUPTED)


def log_row(number, steps_per_epoch, step: Step, settings: StepSettings, tokens, seconds) -> dict:
    """A line of train.jsonl."""
    return {
        "step": number + 1,
        "epoch": (number + 1) / steps_per_epoch,
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
    """From here on, SIGTERM and Ctrl-C only set `received`; they no longer end the process.

    `train` looks at it, once per step. A signal during the export has no effect: the export
    is nearly done, and worth waiting for.
    """

    def __init__(self):
        self.received = False
        signal.signal(signal.SIGTERM, self.receive)
        signal.signal(signal.SIGINT, self.receive)

    def receive(self, *_) -> None:
        self.received = True


# ---- evaluation on held-out pairs --------------------------------------------------------------


class HeldOut(NamedTuple):
    """The pairs of --eval_pairs. They stand in `pairs` behind those that are trained on."""

    pairs: list[dict]
    reference: Tensor  # [n, 2], of all `pairs`
    plans: list  # [step][rank] -> microbatches of indices of held-out pairs
    steps_per_epoch: int  # of the training


def plan_evaluation(pairs: list[dict], first: int, args) -> list:
    """HeldOut.plans: pairs[first:], as many at a time as in a step of the training."""
    plans = []
    for start in range(first, len(pairs), args.batch_size):
        end = min(start + args.batch_size, len(pairs))
        plans.append(plan_step(pairs, list(range(start, end)), args))
    return plans


def eval_is_due(steps_done: int, args) -> bool:
    """Before the first step, and every --eval_every. After the last, `train` always evaluates."""
    if not args.eval_pairs:
        return False
    if args.eval_every:
        return steps_done % args.eval_every == 0
    return steps_done == 0


@torch.no_grad()
def evaluate(policy, held_out: HeldOut, steps_done: int, args, device, log) -> None:
    """Write a row of means over the held-out pairs into the log, if this rank has one.

    The names are Hugging Face's: those of a step, behind "eval_". beta is that of the last step
    done, or of the first step. Raises Stop where a log-prob is not finite.
    """
    pairs = held_out.pairs
    rows = sorted(i for plan in held_out.plans for i in indices_of(plan))  # the m held-out pairs
    logprobs = all_logprobs(policy, pairs, held_out.plans, args.packing, device)[rows]  # [m, 2]
    if not logprobs.isfinite().all():
        raise Stop(
            f"step {steps_done}: log-probs of held-out pairs are not finite any more: begin again "
            "(--overwrite) with a lower --learning_rate."
        )
    refs = held_out.reference[rows]  # [m, 2]
    lengths = torch.tensor([lengths_of(pairs[i])[1:] for i in rows])  # [m, 2]
    beta = args.beta[max(0, steps_done - 1) // held_out.steps_per_epoch]
    loss = loss_of_pairs(logprobs, refs, lengths, beta, args)  # [m]

    row = {"step": steps_done, "epoch": steps_done / held_out.steps_per_epoch}
    for name, values in metrics_of(loss, logprobs, refs, lengths, beta).items():
        row[f"eval_{name}"] = values.double().mean().item()
    if log:
        log.write(row)
    loss, accuracy = row["eval_loss"], row["eval_rewards/accuracies"]
    say(
        f"step {steps_done}: {len(rows):,} held-out pairs: loss {loss:.7f}, accuracy {accuracy:.3f}"
    )


# ---- the reference -----------------------------------------------------------------------------


def load_reference(file: Path, pair_count: int) -> Tensor | None:
    """The reference's log-probs of an interrupted run, [n, 2] fp32; None if there are none.

    An .npz file holds a checksum, so that damage is noticed.
    """
    rank, _ = ranks()
    found = [None]  # only rank 0 looks: a shared file system may not show all ranks the same
    if rank == 0 and file.exists():
        try:
            with np.load(file) as content:
                logprobs = content["logprobs"]
            if logprobs.shape != (pair_count, 2) or logprobs.dtype != np.float32:
                raise ValueError(f"it holds {logprobs.dtype} {logprobs.shape}")
            found = [torch.from_numpy(logprobs)]
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as e:
            say(f"{file}: is damaged ({e}); the reference is computed again")
    dist.broadcast_object_list(found)
    return found[0]


def save_reference(file: Path, reference: Tensor, pairs: list[dict]) -> None:
    """Check the reference's log-probs, and keep them for a run that is interrupted and resumed.

    Raises Stop where one is not finite, and names the pairs.
    """
    if not reference.isfinite().all():
        rows = (~reference.isfinite()).any(1).nonzero().flatten().tolist()
        bad = [pairs[row]["id"] for row in rows[:8]]
        raise Stop(f"the reference's log-probs are not finite for the pairs {bad}")
    rank, _ = ranks()
    if rank == 0:
        with whole(file) as temporary, open(temporary, "wb") as out:
            np.savez(out, logprobs=reference.numpy())


def reference_of_another_model(args, config, pairs: list[dict], plans: list, device) -> Tensor:
    """The log-probs of --ref_model, [n, 2]. Afterwards the model's memory is free again."""
    theirs = models.load_config(args.ref_model)
    if theirs.get_text_config().vocab_size != config.get_text_config().vocab_size:
        names = f"--ref_model {args.ref_model} and --model {args.model}"
        raise Stop(f"{names} have vocabularies of different sizes")
    reference = load_policy(args.ref_model, args, device, pairs)
    logprobs = all_logprobs(reference, pairs, plans, args.packing, device)
    del reference
    gc.collect()  # FSDP's modules refer to each other: without this they would stay in memory
    torch.cuda.empty_cache()
    return logprobs


# ---- the stage ---------------------------------------------------------------------------------


def answers_to_audit(policy, pairs: list[dict], reference, hashes: dict, args, device):
    """(some of the pairs, a model's log-probs of them [n, 2], the hash of that model).

    The model is the policy. By default its log-probs are the reference's. With --ref_model they are
    not: then they are computed, for one batch of pairs. pair["models"] holds the hashes of the
    writers of (chosen, rejected), and checks.audit skips answers of other models.
    """
    if not args.ref_model:
        return pairs, reference, hashes["model"]
    own = [pair for pair in pairs if hashes["model"] in pair["models"]][: args.batch_size]
    if own:
        plan = plan_step(own, list(range(len(own))), args)
        return own, all_logprobs(policy, own, [plan], args.packing, device), hashes["model"]
    # The policy wrote none of them. In an offline loop (WRITER=init REF=init) the reference did.
    return pairs, reference, hashes["ref_model"]


def audit_answers(policy, pairs: list[dict], reference, hashes: dict, args, device) -> dict:
    """Figures for the metadata. Raises Stop where generator and trainer disagree."""
    audited, logprobs, writer = answers_to_audit(policy, pairs, reference, hashes, args, device)
    return checks.audit(audited, logprobs, writer, args.dtype, args.max_logprob_gap)


def main():
    args = parse(arguments())
    transformers_logging.disable_progress_bar()
    device = fsdp.start()
    rank, world = ranks()
    check_arguments(args, device.type, world)
    if args.dtype == "auto":
        args.dtype = "bf16" if device.type == "cuda" else "fp32"
    args.beta = betas_of_epochs(args)
    # The stage hashes its inputs. If the output exists and was made from the same inputs and flags,
    # it is done; if from others, this stops.
    inputs = {"model": args.model, "ref_model": args.ref_model, "pairs": args.pairs}
    inputs["eval_pairs"] = args.eval_pairs
    stage = Stage(args, inputs, args.output, free=FREE)
    if stage.done:
        fsdp.leave()
        return
    lora.check_place(args, stage)
    model_hash = stage.hashes["model"]
    if stage.hashes.get("ref_model") == model_hash:
        args.ref_model = None  # the same weights under another name: no second model

    # 1. The pairs, whether to pack or to pad them, and the plan of every step. A pair holds token
    # ids; the tokenizer is for preference data that has none (training/pairs.py). Held-out pairs
    # stand behind the others, and no step's plan names them
    config = models.load_config(args.model)
    tokenizer = models.load_tokenizer(args.model)
    pairs = load_pairs(args, tokenizer, config, stage)
    trained = len(pairs)
    pairs += load_held_out(args, tokenizer, config, stage, pairs)
    longest = max(p + max(c, r) for p, c, r in map(lengths_of, pairs))
    args.packing = network.choose_packing(args.packing, config, longest, args.model)
    plans = plan_all_steps(pairs[:trained], args)
    eval_plans = plan_evaluation(pairs, trained, args)

    # 2. The reference, in the microbatches of the first epoch: so its rounding errors are those of
    # the policy's first pass, and the first loss is ln 2
    first_epoch = plans[: len(plans) // args.num_train_epochs] + eval_plans
    reference_file = stage.parts / "reference.npz"
    reference = load_reference(reference_file, len(pairs))
    if args.ref_model and reference is None:
        reference = reference_of_another_model(args, config, pairs, first_epoch, device)
    policy = load_policy(args.model, args, device, pairs, lora.factor_seed(args, model_hash))
    if reference is None:
        reference = all_logprobs(policy, pairs, first_epoch, args.packing, device)
    save_reference(reference_file, reference, pairs)

    # 3. Audit the answers that this policy wrote, or its reference
    audit = audit_answers(policy, pairs, reference, stage.hashes, args, device)

    # 4. Train
    held_out = HeldOut(pairs, reference, eval_plans, len(plans) // args.num_train_epochs)
    figures = train(policy, pairs, reference, plans, held_out, args, stage, device)

    # 5. Save
    weights = fsdp.gather_weights(policy)
    if rank == 0:
        save(weights, tokenizer, stage, args, audit=audit, train=figures)
    fsdp.leave()


def save(weights: dict, tokenizer, stage: Stage, args, **figures) -> None:
    """Rank 0: the trained policy as a Hugging Face folder, its log beside it, and the metadata.

    weights: those in training, by name. With --lora_rank they stand beside the folder, too.
    """
    beside = [".train.jsonl"]
    save_dtype = DTYPES.get(args.save_dtype)  # None for auto
    with whole(stage.output) as folder:
        if args.lora_rank:
            exported = lora.export(weights, args, save_dtype, tokenizer, folder)
            lora.warn_of_rounding(exported, stage)
            lora.save_adapter(weights, args, stage.beside(lora.ADAPTER))
            beside.append(lora.ADAPTER)
        else:
            exported = fsdp.export(weights, args.model, save_dtype, tokenizer, folder)
        with whole(stage.beside(".train.jsonl")) as log:
            log.write_bytes((stage.parts / "train.jsonl").read_bytes())
        stage.write_meta(tuple(beside), **exported, **figures)
    stage.clean()
    changed = exported["changed_weights"]
    say(f"{args.output}: {changed:.1%} of the weights changed in the saved dtype")


if __name__ == "__main__":
    run(main)
