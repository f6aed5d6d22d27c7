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
     so that policy and reference are the same function. Before the first step, every --eval_every
     steps and after the last, it computes the same losses and rewards of held-out pairs
     (--eval_pairs). With --lora_rank the weights stay as they are, and small factors beside them
     are trained (training/lora.py).
  5. Save a Hugging Face folder. With --lora_rank the factors are added to the weights first.

SIGTERM or Ctrl-C in training saves a checkpoint, and the same command resumes from it.
"""

import gc
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

# Microbatches differ in size, which would fragment the GPU's free memory. torch reads this when it
# is imported. If the user has set it, under this name or the old one, that value is used.
os.environ.setdefault(
    "PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import models
from arguments import parse, parser
from kernels.attention import attention_implementation, positions
from kernels.logprob import backbone, linear_logprob, lm_head

# Stop is an error for the user: run prints it as one line, without a traceback.
# whole gives a temporary path, for a file or a folder, which gets its name when it is complete.
# say and progress print on rank 0 only.
from records import Stop, whole
from stage import Stage, progress, ranks, run, say, seconds_since
from training import checks, flags, fsdp, lora, network, speed
from training.batches import feed
from training.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from training.log import open_log, row_of_step, show
from training.pairs import load_held_out, load_pairs
from training.plans import (
    StepPlan,
    answer_lengths,
    indices_of,
    lengths_of,
    plan_all_steps,
    plan_evaluation,
    plan_step,
    shortest_and_longest,
)
from training.reference import keep_reference, load_reference

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
INTERRUPTED = 75  # the exit code EX_TEMPFAIL: for iterate.sh, an interruption and no failure


def arguments():
    p = parser(__doc__)
    flags.add_flags(p)
    return p


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


def unsharded_policy(path: str, config, args, with_factors: bool, dtype=None) -> Policy:
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
        policy = unsharded_policy(path, config, args, with_factors)
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
        say(f"{path}: switched off in training: {network.names_and_values(noise)}")

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
    """Log-probs of one pair, [2]. All ranks call it together: FSDP gathers weights from all."""
    plans = [plan_step([pair], [0], args)]  # one rank computes the pair, the others a stand-in
    return all_logprobs(policy, [pair], plans, args.packing, device)[0]


@torch.no_grad()
def all_logprobs(policy, pairs: list[dict], plans: list[StepPlan], packing: str, device) -> Tensor:
    """Log-probs of all pairs, [n, 2] fp32 on the CPU. plans: they name each pair once.

    All ranks have the same number of microbatches, because FSDP's collectives need every rank.
    Where one is empty, feed puts in some pair with weight 0.
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


class StopSignals:
    """From here on, SIGTERM and Ctrl-C only set `received`; they no longer end the process.

    A step looks at it when its last microbatch is done. A signal during the export has no effect:
    the export is nearly done, and worth waiting for.
    """

    def __init__(self):
        self.received = False
        signal.signal(signal.SIGTERM, self.receive)
        signal.signal(signal.SIGINT, self.receive)

    def receive(self, *_) -> None:
        self.received = True


class StepSettings(NamedTuple):
    microbatch_count: int  # of this rank; all ranks have the same number
    pair_count: int  # of all ranks
    beta: float
    learning_rate: float
    signals: StopSignals  # of this rank


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
    for k in range(settings.microbatch_count):
        batch = next(batches)
        # Within a copy of the model, gradients are reduced to shards after every microbatch: whole
        # ones would take 4 bytes per weight on every rank (28 GB for 7B). Between copies (HSDP)
        # they are added up once, after the last.
        policy.set_requires_all_reduce(k == settings.microbatch_count - 1)

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

    # add up over all ranks, and their votes, too: if one rank was told to stop, all stop
    vote = torch.full_like(totals["loss"], float(settings.signals.received))
    sums = torch.stack([*totals.values(), vote])
    dist.all_reduce(sums)
    *sums, votes = sums.tolist()
    means = {name: s / settings.pair_count for name, s in zip(totals, sums, strict=True)}
    stop = votes > 0

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


class Data(NamedTuple):
    """What is trained and evaluated on."""

    pairs: list[dict]  # those to train on, and behind them those of --eval_pairs
    reference: Tensor  # [n, 2], of all of them
    plans: list[StepPlan]  # of all steps
    eval_plans: list[StepPlan]  # of the held-out pairs
    steps_per_epoch: int


def train(policy, data: Data, args, stage: Stage, device) -> dict:
    """Every step, with one row per step in train.jsonl. Returns figures for the metadata.

    stage.parts is the folder of the unfinished run, with its log and checkpoint. SIGTERM and Ctrl-C
    end training after a step, with a checkpoint.
    """
    rank, world = ranks()
    pairs, plans = data.pairs, data.plans
    steps = len(plans)
    optimizer = make_optimizer(policy, args, device)
    steps_done = load_checkpoint(stage.parts, policy, optimizer, steps)
    say(f"{steps} steps" + (f"; resuming after step {steps_done}" if steps_done else ""))
    log = open_log(stage, steps_done, args)
    bar = progress(steps, "train", "step", steps_done)
    signals = StopSignals()
    reference = data.reference.to(device)  # [n, 2]
    # one stream of batches over all steps
    mine = chain.from_iterable(plan[rank] for plan in plans[steps_done:])
    batches = feed(pairs, mine, args.packing, device)
    total_seconds = 0.0

    for index in range(steps_done, steps):
        if eval_is_due(index, args):
            evaluate(policy, data, index, args, device, log)

        began = time.monotonic()
        in_step = indices_of(plans[index])  # the pairs of all ranks
        settings = settings_of_step(index, data, signals, args)
        step = training_step(policy, optimizer, batches, reference, settings, args)
        done = index + 1
        if not step.is_finite():
            raise not_finite(step, done, pairs, stage)
        if index == 0 and args.ref_model is None:
            expected = loss_if_policy_is_reference(data, in_step, settings.beta, args)
            checks.check_first_loss(step.metrics["loss"], expected, args.dtype)

        # report
        seconds = seconds_of_step(began, device)
        total_seconds += seconds
        tokens = sum(sum(lengths_of(pairs[i])) for i in in_step)  # prompt + chosen + rejected
        if log:
            log.write(row_of_step(done, data.steps_per_epoch, step, settings, tokens, seconds))
        show(bar, step.metrics, tokens / seconds)

        if step.stop:
            save_and_leave(stage, policy, optimizer, done, steps)
        if checkpoint_is_due(done, steps, args.save_every):
            save_checkpoint(stage.parts, policy, optimizer, done)

    if args.eval_pairs:
        evaluate(policy, data, steps, args, device, log)
        if is_any_told_to_stop(signals, device):
            save_and_leave(stage, policy, optimizer, steps, steps)
    bar.close()
    trained = [lengths_of(pairs[i]) for plan in plans[steps_done:] for i in indices_of(plan)]
    return speed.figures(policy, trained, total_seconds, device, args.dtype, world)


def settings_of_step(index: int, data: Data, signals: StopSignals, args) -> StepSettings:
    rank, _ = ranks()
    plan = data.plans[index]
    return StepSettings(
        microbatch_count=len(plan[rank]),
        pair_count=len(indices_of(plan)),
        beta=args.beta[index // data.steps_per_epoch],
        learning_rate=learning_rate(index, len(data.plans), args),
        signals=signals,
    )


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


def loss_if_policy_is_reference(data: Data, indices: list[int], beta: float, args) -> float:
    """The mean loss of a step whose policy is the reference: ln 2, unless flags add to it."""
    logprobs = data.reference[indices]  # [n, 2]
    lengths = answer_lengths(data.pairs, indices)  # [n, 2]
    return loss_of_pairs(logprobs, logprobs, lengths, beta, args).mean().item()


def seconds_of_step(began: float, device) -> float:
    """Since `began`, with all work that is queued on a GPU: the clock alone would not see it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return seconds_since(began)


def is_any_told_to_stop(signals: StopSignals, device) -> bool:
    """Whether a rank has received a signal. All ranks ask together, and learn the same."""
    votes = torch.tensor(float(signals.received), device=device)
    dist.all_reduce(votes)
    return votes.item() > 0


def save_and_leave(stage: Stage, policy, optimizer, steps_done: int, steps: int) -> None:
    save_checkpoint(stage.parts, policy, optimizer, steps_done)
    say(f"interrupted: saved after step {steps_done} of {steps}; the same command resumes")
    fsdp.leave()
    sys.exit(INTERRUPTED)


def not_finite(step: Step, number: int, pairs: list[dict], stage: Stage) -> Stop:
    """The message for a step with NaN or infinity in it. number: of the step, from 1."""
    bad = []
    for rows, loss in step.losses:
        for row in rows[~loss.isfinite()].tolist():
            bad.append(pairs[row]["id"])
    kept = [folder.name for folder in checkpoints(stage.parts)]
    loss, norm = step.metrics["loss"], step.grad_norm
    return Stop(
        f"step {number}: loss {loss:g}, gradient norm {norm:g}: not finite; no update was "
        f"made. This rank's pairs with such a loss: {bad[:8] or 'none'}. "
        f"Last checkpoint: {kept or 'none'}. "
        "Look at those pairs, or begin again (--overwrite) with a lower --learning_rate."
    )


# ---- evaluation on held-out pairs --------------------------------------------------------------


def eval_is_due(steps_done: int, args) -> bool:
    """Before the first step, and every --eval_every. After the last, `train` always evaluates."""
    if not args.eval_pairs:
        return False
    if args.eval_every:
        return steps_done % args.eval_every == 0
    return steps_done == 0


def evaluate(policy, data: Data, steps_done: int, args, device, log) -> None:
    """Write a row of means over the held-out pairs into the log, if this rank has one.

    The names are Hugging Face's: those of a step, behind "eval_". beta is that of the last step
    done, or of the first step. Raises Stop where a log-prob is not finite.
    """
    rows = sorted(i for plan in data.eval_plans for i in indices_of(plan))  # the m held-out pairs
    logprobs = all_logprobs(policy, data.pairs, data.eval_plans, args.packing, device)  # [n, 2]
    logprobs = logprobs[rows]  # [m, 2]
    if not logprobs.isfinite().all():
        raise Stop(
            f"step {steps_done}: log-probs of held-out pairs are not finite any more: begin again "
            "(--overwrite) with a lower --learning_rate."
        )
    refs = data.reference[rows]  # [m, 2]
    lengths = answer_lengths(data.pairs, rows)  # [m, 2]
    beta = args.beta[max(0, steps_done - 1) // data.steps_per_epoch]
    loss = loss_of_pairs(logprobs, refs, lengths, beta, args)  # [m]

    row = {"step": steps_done, "epoch": steps_done / data.steps_per_epoch}
    for name, values in metrics_of(loss, logprobs, refs, lengths, beta).items():
        row[f"eval_{name}"] = values.double().mean().item()
    if log:
        log.write(row)
    loss, accuracy = row["eval_loss"], row["eval_rewards/accuracies"]
    say(
        f"step {steps_done}: {len(rows):,} held-out pairs: loss {loss:.7f}, accuracy {accuracy:.3f}"
    )


# ---- the reference -----------------------------------------------------------------------------


def reference_of_another_model(
    args, config, pairs: list[dict], plans: list[StepPlan], longest: int, device
) -> Tensor:
    """The log-probs of --ref_model, [n, 2]. Afterwards the model's memory is free again.

    longest: tokens of the longest prompt and answer.
    """
    theirs = models.load_config(args.ref_model)
    if longest > positions(theirs):
        raise Stop(
            f"--ref_model {args.ref_model}: reads {positions(theirs)} tokens, and the longest "
            f"prompt with its answer has {longest}. --max_length {positions(theirs)} drops what is "
            "longer."
        )
    network.choose_packing(args.packing, theirs, longest, args.ref_model)  # refuses what it cannot
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
    flags.settle_arguments(args, device.type, world)
    # The stage hashes its inputs. If the output exists and was made from the same inputs and flags,
    # it is done; if from others, this stops.
    inputs = {name: getattr(args, name) for name in flags.INPUTS}
    stage = Stage(args, inputs, args.output, free=flags.FREE)
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
    steps_per_epoch = len(plans) // args.num_train_epochs

    # 2. The reference, in the microbatches of the first epoch: so its rounding errors are those of
    # the policy's first pass, and the first loss is ln 2
    first_epoch = plans[:steps_per_epoch] + eval_plans
    reference_file = stage.parts / "reference.npz"
    reference = load_reference(reference_file, len(pairs))
    if args.ref_model and reference is None:
        reference = reference_of_another_model(args, config, pairs, first_epoch, longest, device)
    policy = load_policy(args.model, args, device, pairs, lora.factor_seed(args, model_hash))
    if reference is None:
        reference = all_logprobs(policy, pairs, first_epoch, args.packing, device)
    keep_reference(reference_file, reference, pairs)

    # 3. Audit the answers that this policy wrote, or its reference
    audit = audit_answers(policy, pairs, reference, stage.hashes, args, device)

    # 4. Train
    data = Data(pairs, reference, plans, eval_plans, steps_per_epoch)
    figures = train(policy, data, args, stage, device)

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
