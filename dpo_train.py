"""Train a policy on preference pairs with DPO: plain torch, FSDP2, one file.

    python dpo_train.py --model MODEL --pairs pairs.jsonl --output policy
    torchrun --nproc_per_node 8 dpo_train.py …                                    one machine
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        dpo_train.py --shard_size 8 …                                             four, sharded within each

For a prompt x with answers y_w (chosen) and y_l (rejected) let

    l_w = log pi(y_w | x)    r_w = log ref(y_w | x)        sums over the tokens of the answer; the same for y_l
    d   = (l_w - r_w) - (l_l - r_l)                        how much more pi prefers y_w than ref does
    z   = beta d + a (|y_w| - |y_l|)                       a = --length_coef; R-DPO (arXiv 2403.19159, eq. 9)

    sigmoid   -(1-e) log s(z) - e log s(-z)                DPO (arXiv 2305.18290, eq. 7); e = --label_smoothing: cDPO
    robust    [-(1-e) log s(z) + e log s(-z)] / (1 - 2e)   rDPO (arXiv 2403.00409, eq. 11)
    hinge     max(0, 1 - z)                                SLiC (arXiv 2305.10425)
    ipo       (d' - 1 / (2 beta))^2                        IPO (arXiv 2310.12036, eq. 17), with d' from per-token means
                                                           of l and r, so that length does not set the target
    + c * -l_w / |y_w|                                     c = --nll_coef: NLL of the chosen answer, per token

and the loss of a step is the mean over all its pairs, on all ranks and in all microbatches: cut as you like, the
gradient stays the same.

What happens, in order:
  1. Read the pairs. Token ids that the generator wrote are trained as they are; nothing is tokenised twice.
  2. Compute r once, before the first step, with no second model beside the policy: by default the reference *is* the
     policy just loaded, and one pass without gradients gives r. It is kept beside the pairs, under the hash of both.
  3. Audit: the generator stored the log-prob of each answer, and r is the same number from other code. If they are
     far apart, something upstream is wrong (template, doubled BOS, old weights), and the run stops.
  4. Train. Each microbatch is one row without padding, [P|C|R][P|C|R]…, the prompt once (kernels/attention.py), and
     log-probs come from kernels/logprob.py, which never holds the logits. Master weights are fp32: at a learning
     rate of 5e-7 AdamW on bf16 weights rounds nearly every update away.
  5. Save a Hugging Face folder. SIGTERM saves a checkpoint and exits with 75; the same command goes on from it.
"""

import hashlib
import heapq
import json
import math
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from kernels.logprob import linear_logprob, lm_head, logprob_from_logits
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from kernels.attention import ATTENTION, attention_implementation, packed_layout, packing_refusal, prefix_layout
from records import Stage, Stop, barrier, dump, parse, parser, ranks, read_jsonl, remove, run, seed_of, whole

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
INTERRUPTED = 75  # EX_TEMPFAIL: "try again later"; iterate.sh tells it from a failure


def arguments():
    p = parser(__doc__)
    # Models and data
    p.add_argument("--model", required=True, help="the policy to start from: a folder or a hub name")
    p.add_argument("--ref_model", help="the reference; default: --model itself, which costs no second model")
    p.add_argument("--pairs", required=True, nargs="+", help="pairs.jsonl; several are concatenated (history)")
    p.add_argument("--output", required=True, help="folder of the trained policy; train.jsonl goes beside it")
    p.add_argument("--max_length", type=int, help="longer prompt + answer is dropped; default: the model's positions")
    # The loss
    p.add_argument(
        "--beta", type=float, nargs="+", default=[0.1], help="0.1, as in the DPO paper; several: one an epoch"
    )
    p.add_argument("--loss_type", choices=("sigmoid", "ipo", "hinge", "robust"), default="sigmoid")
    p.add_argument("--label_smoothing", type=float, help="share of flipped labels (sigmoid: default 0; robust: needed)")
    p.add_argument("--nll_coef", type=float, default=0.0, help="weight of the chosen answer's NLL; default 0: DPO")
    p.add_argument("--length_coef", type=float, help="reward per token of extra length in the margin; default 0")
    # The optimizer; the defaults are OpenRLHF's and RLHFlow's
    p.add_argument("--learning_rate", type=float, default=5e-7, help="5e-7: for full models of 1B and more")
    p.add_argument("--batch_size", type=int, default=128, help="pairs an optimizer step, over all ranks")
    p.add_argument("--num_train_epochs", type=int, default=1, help="1: fresh pairs come every iteration")
    p.add_argument("--lr_scheduler", choices=("cosine", "linear", "constant"), default="cosine")
    p.add_argument("--min_lr_ratio", type=float, help="where cosine and linear end, as a share; default 0.1")
    p.add_argument("--warmup_ratio", type=float, default=0.03, help="share of the steps with a rising learning rate")
    p.add_argument("--weight_decay", type=float, default=0.0, help="0: the reference is what holds the weights")
    p.add_argument("--adam_betas", type=float, nargs=2, default=[0.9, 0.95], metavar=("B1", "B2"))
    p.add_argument("--max_grad_norm", type=float, default=1.0, help="clip the gradient's norm; 0 does not")
    # Memory and speed
    p.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of the matrix products; auto: "
        "bf16 on a GPU, fp32 on a CPU. Master weights, gradients and log-probs are fp32 either way",
    )
    p.add_argument("--save_dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: as the model came")
    p.add_argument("--tokens_per_batch", type=int, default=16384, help="a rank and forward; 16k fills a large GPU")
    p.add_argument(
        "--packing",
        choices=("auto", "prefix", "packed", "padded"),
        default="auto",
        help="prefix shares "
        "the prompt of a pair; packed does not; padded is for attention that cannot be packed; auto chooses",
    )
    p.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute layers: a third more time, activations of one layer instead of all",
    )
    p.add_argument("--cpu_offload", action="store_true", help="weights and Adam states in host memory (GPU only)")
    p.add_argument(
        "--shard_size",
        type=int,
        help="ranks that share one copy of the weights; default: all. Set it to "
        "the ranks of a machine and each machine holds a copy (HSDP)",
    )
    # Watching and stopping
    p.add_argument(
        "--save_every",
        type=int,
        default=0,
        help="steps between checkpoints; 0: only on SIGTERM, because "
        "one is 12 bytes a parameter and an iteration is short",
    )
    p.add_argument(
        "--max_logprob_gap",
        type=float,
        help="the audit's tolerance, mean nats a token; default 1e-3 in fp32, 0.05 in bf16",
    )
    p.add_argument("--seed", type=int, default=0, help="order of the pairs")
    p.add_argument("--report_to", choices=("none", "tensorboard", "wandb", "trackio"), default="none")
    return p


def check(args, device) -> None:
    """A flag without effect is an error: it means that the run is not what its author thinks."""
    if args.loss_type in ("hinge", "ipo") and args.label_smoothing is not None:
        raise Stop(f"--label_smoothing has no effect with --loss_type {args.loss_type}")
    if args.loss_type == "robust" and not 0 < (args.label_smoothing or 0) < 0.5:
        raise Stop("--loss_type robust needs --label_smoothing, the share of flipped labels, between 0 and 0.5")
    if args.loss_type == "ipo" and args.length_coef is not None:
        raise Stop("--length_coef has no effect with --loss_type ipo, which works on per-token means")
    if args.lr_scheduler == "constant" and args.min_lr_ratio is not None:
        raise Stop("--min_lr_ratio has no effect with --lr_scheduler constant")
    if len(args.beta) not in (1, args.num_train_epochs):
        raise Stop(f"--beta takes one value, or one for each of the {args.num_train_epochs} epochs")
    if args.cpu_offload and device.type == "cpu":
        raise Stop("--cpu_offload has no effect without a GPU: the weights are in host memory already")
    if args.shard_size is not None and (ranks()[1] == 1 or ranks()[1] % args.shard_size):
        raise Stop(f"--shard_size {args.shard_size} must divide the number of ranks ({ranks()[1]}, more than one)")
    if min(args.batch_size, args.num_train_epochs, args.tokens_per_batch) < 1:
        raise Stop("--batch_size, --num_train_epochs and --tokens_per_batch must be at least 1")
    if args.batch_size < 128 and args.learning_rate <= 5e-7:
        say(
            f"note: --batch_size {args.batch_size} at --learning_rate {args.learning_rate:g}: the rate was tuned for "
            "128 pairs a step, and smaller batches have given worse results at it (RLHFlow/Online-RLHF issue 3)"
        )


def say(text: str) -> None:
    if ranks()[0] == 0:
        tqdm.write(text)
        sys.stdout.flush()


# ----------------------------------------------------------------------------------------------------
# The loss


def dpo_loss(
    policy, reference, lengths, beta, loss_type="sigmoid", label_smoothing=None, length_coef=None, nll_coef=0.0
):
    """Loss of each pair. The equations stand at the top of the file.

    policy, reference: [n, 2] fp32, summed log-probs of (chosen, rejected). lengths: [n, 2], their tokens. -> [n]
    """
    e, a = label_smoothing or 0.0, length_coef or 0.0
    ratio = policy - reference  # [n, 2]
    z = beta * (ratio[:, 0] - ratio[:, 1]) + a * (lengths[:, 0] - lengths[:, 1])  # [n]
    if loss_type == "sigmoid":
        loss = -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)
    elif loss_type == "robust":
        loss = (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)
    elif loss_type == "hinge":
        loss = torch.relu(1 - z)
    elif loss_type == "ipo":
        per_token = ratio / lengths
        loss = (per_token[:, 0] - per_token[:, 1] - 1 / (2 * beta)) ** 2
    return loss - nll_coef * policy[:, 0] / lengths[:, 0]


# ----------------------------------------------------------------------------------------------------
# The data


def load_pairs(args, tokenizer, config) -> tuple[list[dict], int, Counter]:
    """All pairs of all files, as (file, line, id, prompt, chosen, rejected: int32 arrays, log-probs of the generator).

    A pair without token ids (anyone's preference data) is rendered with the chat template, and dropped when the prompt
    is no prefix of prompt + answer: then the boundary is inside a token, and there is no right place to cut.
    """
    limit = args.max_length or getattr(config, "max_position_embeddings", None) or sys.maxsize
    pairs, total, dropped, rendered = [], 0, Counter(), 0
    for file, path in enumerate(args.pairs):
        for line, row in enumerate(
            read_jsonl(path, {"prompt": (str, list), "chosen": (str, list), "rejected": (str, list)})
        ):
            total += 1
            where = f"{path}:{line + 1}"
            if "chosen_token_ids" in row:
                missing = {"prompt_token_ids", "rejected_token_ids"} - row.keys()
                if missing:
                    raise Stop(f"{where}: has chosen_token_ids, but not {', '.join(sorted(missing))}")
                ids = [row["prompt_token_ids"], row["chosen_token_ids"], row["rejected_token_ids"]]
            else:
                rendered += 1
                ids = render(row, tokenizer, where)
                if ids is None:
                    dropped["template_not_prefix"] += 1
                    continue
            if not all(ids):
                dropped["no_tokens"] += 1
                continue
            if len(ids[0]) + max(len(ids[1]), len(ids[2])) > limit:
                dropped["too_long"] += 1
                continue
            if max(map(max, ids)) >= config.vocab_size or min(map(min, ids)) < 0:
                raise Stop(
                    f"{where}: token id {max(map(max, ids))} is outside the model's vocabulary of "
                    f"{config.vocab_size}. Were these pairs made with another model?"
                )
            prompt, chosen, rejected = (np.asarray(x, dtype=np.int32) for x in ids)
            pairs.append(
                {
                    "file": file,
                    "line": line,
                    "id": row.get("id", where),
                    "prompt": prompt,
                    "chosen": chosen,
                    "rejected": rejected,
                    "logprobs": [row.get("chosen_logprob"), row.get("rejected_logprob")],
                    "models": [row.get("chosen_model"), row.get("rejected_model")],
                }
            )
    if rendered:
        say(f"{rendered:,} pairs carry no token ids: rendered with the tokenizer and chat template of {args.model}")
    if not pairs:
        raise Stop(f"{', '.join(args.pairs)}: none of {total:,} pairs can be trained on: {dict(dropped)}")
    return pairs, total, dropped


def render(row: dict, tokenizer, where: str) -> list[list[int]] | None:
    """Token ids of (prompt, chosen, rejected) for a pair that has none; None when the prompt is no prefix."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        full = [tokenizer(prompt + row[k])["input_ids"] for k in ("chosen", "rejected")]
        if tokenizer.eos_token_id is not None:
            full = [f if f[-1] == tokenizer.eos_token_id else [*f, tokenizer.eos_token_id] for f in full]
    else:
        if not tokenizer.chat_template:
            raise Stop(
                f"{where}: the prompt is a conversation, but the tokenizer has no chat template. Add one to the "
                "model's folder, or give pairs with token ids."
            )
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        full = [tokenizer.apply_chat_template(prompt + row[k], return_dict=False) for k in ("chosen", "rejected")]
    if any(f[: len(ids)] != ids for f in full):
        return None
    return [ids, *(f[len(ids) :] for f in full)]


def cost(pair: dict, packing: str) -> int:
    """Tokens that a pair adds to a forward."""
    p, c, r = len(pair["prompt"]), len(pair["chosen"]), len(pair["rejected"])
    return {"prefix": p + c + r, "packed": 2 * p + c + r, "padded": 2 * (p + max(c, r))}[packing]


def microbatches(costs: list[int], budget: int, world: int, padded: bool) -> list[list[list[int]]]:
    """Cut one step's pairs into microbatches under the token budget: [rank][microbatch] -> indices into `costs`.

    FSDP's collectives need the same number of forwards on every rank, and no rank should wait for another. Packed:
    longest pair first, each into the lightest bin (Graham's LPT rule: within 4/3 of the best balance). Padded: runs
    of equal length, because there a row costs as much as the longest beside it. A bin may stay empty.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    if padded:
        bins = []
        for i in order:
            if not bins or (len(bins[-1]) + 1) * costs[bins[-1][0]] > budget:
                bins.append([])
            bins[-1].append(i)
        bins += [[] for _ in range(-len(bins) % world)]
    else:
        budget = max(budget, costs[order[0]])  # a pair above the budget still has to go somewhere: alone
        count = math.ceil(sum(costs) / budget / world) * world
        while True:
            bins, heap = [[] for _ in range(count)], [(0, b) for b in range(count)]
            for i in order:
                load, b = heapq.heappop(heap)
                heapq.heappush(heap, (load + costs[i], b))
                bins[b].append(i)
            if max(heap)[0] <= budget:
                break
            count += world
    return [bins[rank::world] for rank in range(world)]


def collate(pairs: list[dict], packing: str, device) -> dict:
    """One microbatch of n pairs as the tensors of one forward.

    prefix   input_ids [1, T]    [P|C|R][P|C|R]…
    packed   input_ids [1, T]    [P|C][P|R][P|C][P|R]…
    padded   input_ids [2n, L]   a row a sequence, padded on the right, attention_mask [2n, L]

    positions [Tc]: where in the flattened input the hidden state stands that predicts each answer token; targets
    [Tc]: that token; in the order chosen 0, rejected 0, chosen 1, …  R's first token is predicted by P's last.
    """
    answers = [pair[k] for pair in pairs for k in ("chosen", "rejected")]
    prompts = [pair["prompt"] for pair in pairs for _ in range(2)]
    inputs, positions, start = {}, [], 0
    if packing == "padded":
        rows = [np.concatenate(x) for x in zip(prompts, answers, strict=True)]
        width = max(map(len, rows))
        inputs["input_ids"] = torch.tensor(np.stack([np.pad(r, (0, width - len(r))) for r in rows]), dtype=torch.long)
        inputs["attention_mask"] = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
        inputs["position_ids"] = torch.arange(width).expand(len(rows), -1)
        for i, (p, y) in enumerate(zip(prompts, answers, strict=True)):
            positions.append(np.arange(len(p) - 1, len(p) + len(y) - 1) + i * width)
    else:
        for pair in pairs:
            p, c, r = len(pair["prompt"]), len(pair["chosen"]), len(pair["rejected"])
            if packing == "prefix":
                second = np.concatenate([[p - 1], np.arange(p + c, p + c + r - 1)]) + start
                size = p + c + r
            else:
                second = np.arange(p - 1, p + r - 1) + start + p + c
                size = p + c + p + r
            positions += [np.arange(p - 1, p + c - 1) + start, second]
            start += size
        parts = ("prompt", "chosen", "rejected") if packing == "prefix" else ("prompt", "chosen", "prompt", "rejected")
        row = np.concatenate([pair[k] for pair in pairs for k in parts])
        inputs["input_ids"] = torch.tensor(row, dtype=torch.long)[None]
        if packing == "prefix":
            lengths = [tuple(len(pair[k]) for k in parts) for pair in pairs]
            inputs["position_ids"], inputs["layout"] = prefix_layout(lengths, device)
        else:
            lengths = [len(p) + len(y) for p, y in zip(prompts, answers, strict=True)]
            inputs["position_ids"], inputs["layout"] = packed_layout(lengths, device)
    lengths = [len(y) for y in answers]
    return {
        "inputs": {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()},
        "positions": torch.tensor(np.concatenate(positions), dtype=torch.long, device=device),  # [Tc]
        "targets": torch.tensor(np.concatenate(answers), dtype=torch.long, device=device),  # [Tc]
        "split": lengths,
        "lengths": torch.tensor(lengths, device=device).view(-1, 2),  # [n, 2]
    }


# ----------------------------------------------------------------------------------------------------
# The policy


class Policy(torch.nn.Module):
    """A causal LM whose forward gives log-probs of answers, [n, 2], instead of logits.

    It is the FSDP root, so that the head is used where its weight is whole, and a plain tensor.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch: dict) -> torch.Tensor:
        hidden = self.model.base_model(**batch["inputs"], use_cache=False).last_hidden_state  # [1, T, D] or [2n, L, D]
        hidden = hidden.flatten(0, 1)[batch["positions"]]  # [Tc, D]
        logprobs = linear_logprob(hidden, targets=batch["targets"], **lm_head(self.model))  # [Tc] fp32
        return torch.stack([y.sum() for y in logprobs.split(batch["split"])]).view(-1, 2)  # [n, 2]


def load_policy(path: str, attention: str, args, mesh, device, probe: dict) -> Policy:
    """A sharded Policy with fp32 weights on every rank; only rank 0 reads the weights, the others receive theirs.

    `probe` is one short pair: what transformers says of it, with its own attention and logits, is compared with the
    sharded, packed, fused model, so an architecture whose head or attention we get wrong is refused here and now.
    """
    config = AutoConfig.from_pretrained(path)
    for name in vars(config):
        if name.endswith(("dropout", "_pdrop")) and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)  # reference and policy must be one function
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(model.train())

    compute = None if args.dtype == "fp32" else DTYPES[args.dtype]
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if args.cpu_offload else OffloadPolicy(),
    }
    for layer in [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]:
        fully_shard(layer, **options)
    fully_shard(policy, **options)  # embedding, norm and head stay together in the root: they may be tied

    policy.to_empty(device="cpu" if args.cpu_offload else device)
    model.tie_weights()
    tied = getattr(config, "tie_word_embeddings", False)
    if tied and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise Stop(f"{path}: head and embedding are tied, but came apart while loading")
    source = None
    if ranks()[0] == 0:
        source = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", attn_implementation=attention_implementation(config)
        )
    weights = source.state_dict() if source else {}
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in model.named_buffers():  # rotary frequencies and the like are in no state dict
        value = source.get_buffer(name).to(device, buffer.dtype) if source else torch.empty_like(buffer, device=device)
        dist.broadcast(value, 0)
        model.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = value

    packing = args.packing if attention == ATTENTION else "padded"
    with torch.no_grad():
        ours = policy(collate([probe], packing, device))[0].cpu()  # [2]
    if source:
        theirs = torch.stack([own_logprob(source, probe["prompt"], probe[k]) for k in ("chosen", "rejected")])
        gap = ((ours - theirs).abs() / torch.tensor([len(probe["chosen"]), len(probe["rejected"])])).max().item()
        # fp32: rounding only. bf16 against transformers' own, in the dtype of the folder: rounding of 8 bits.
        if not gap <= (1e-4 if compute is None and source.dtype == torch.float32 else 0.25):
            raise Stop(
                f"{path}: this trainer's log-probs differ from transformers' by {gap:.2g} nats a token on the pair "
                f"{probe['id']}. Its head or its attention is one we cannot express; do not train it with this file."
            )
        say(f"{path}: log-probs equal transformers' own to {gap:.1e} nats a token ({packing})")
    return policy


@torch.no_grad()
def own_logprob(model, prompt, answer) -> torch.Tensor:
    """log p(answer | prompt) from the model's own logits."""
    ids = torch.tensor(np.concatenate([prompt, answer]), dtype=torch.long)[None]  # [1, L]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]  # [|answer|, V]
    return logprob_from_logits(logits, ids[0, len(prompt) :]).sum()


# ----------------------------------------------------------------------------------------------------
# The reference


def cache_path(pairs_path: str, key: str) -> Path:
    return Path(f"{pairs_path}.reference-{key[:12]}.safetensors")


def read_cache(path: Path, lines: int) -> torch.Tensor | None:
    """[lines, 2] fp32 with NaN where a pair was dropped; None when there is none, or when it is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            values, digest = file.get_tensor("logprobs"), file.metadata()["sha256"]
    except (SafetensorError, KeyError, TypeError):
        values, digest = torch.empty(0), None
    if hashlib.sha256(values.numpy().tobytes()).hexdigest() != digest or len(values) != lines:
        say(f"{path}: does not match its own checksum; the reference is computed again")
        return None
    return values


@torch.no_grad()
def reference_logprobs(load, pairs, plan, args, stage, device, config) -> torch.Tensor:
    """r of every pair, [n, 2] fp32 on the CPU, from the cache or from one pass of the model that `load` returns.

    The pass uses the first epoch's microbatches, so reference and policy round alike and the first loss is ln 2.
    """
    reference = stage.hashes.get("ref_model", stage.hashes["model"])
    keys = [
        hashlib.sha256(json.dumps([reference, h, args.dtype, args.packing]).encode()).hexdigest()
        for h in stage.hashes["pairs"]
    ]
    paths = [cache_path(p, key) for p, key in zip(args.pairs, keys, strict=True)]
    lines = [sum(1 for _ in open(p, "rb")) for p in args.pairs]
    cached = [read_cache(path, n) for path, n in zip(paths, lines, strict=True)]
    result = torch.full((len(pairs), 2), math.nan)
    for i, pair in enumerate(pairs):
        if cached[pair["file"]] is not None:
            result[i] = cached[pair["file"]][pair["line"]]
    missing = result.isnan().any(1)  # [n]
    if not missing.any():
        say("reference log-probs: from the cache beside the pairs")
        return result

    model = load()
    found = torch.zeros(len(pairs), 2, device=device)
    bar = tqdm(
        total=int(missing.sum()),
        desc="reference",
        unit="pair",
        disable=ranks()[0] > 0 or not sys.stderr.isatty(),
    )
    for bins in plan:
        for bin in bins:
            bin = [i for i in bin if missing[i]]
            some = bin or [0]  # FSDP's collectives want the same number of forwards on every rank
            logprobs = model(collate([pairs[i] for i in some], args.packing, device))
            if bin:
                found[bin] = logprobs
            bar.update(len(bin) * ranks()[1])
    bar.close()
    dist.all_reduce(found)  # each pair was some one rank's; adding zeros is exact
    result[missing] = found.cpu()[missing]
    if not result.isfinite().all():
        bad = [pairs[i]["id"] for i in (~result.isfinite()).any(1).nonzero().flatten()[:8].tolist()]
        raise Stop(f"the reference's log-probs are not finite for the pairs {bad}")
    if ranks()[0] == 0:
        for f, path in enumerate(paths):
            if cached[f] is None:
                values = torch.full((lines[f], 2), math.nan)
                for i, pair in enumerate(pairs):
                    if pair["file"] == f:
                        values[pair["line"]] = result[i]
                with whole(path) as temporary:
                    digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()
                    save_file({"logprobs": values}, temporary, metadata={"sha256": digest})
    return result


def audit(pairs: list[dict], logprobs: torch.Tensor, model_hash: str, tolerance: float) -> dict:
    """Compare the generator's log-probs with ours, for the answers that this very model wrote.

    logprobs: [n, 2] of the policy as loaded. Past the tolerance the run stops. Returns what is recorded.
    """
    gaps = [
        (abs(pair["logprobs"][k] - logprobs[i, k].item()) / len(pair[name]), pair["id"], name)
        for i, pair in enumerate(pairs)
        for k, name in enumerate(("chosen", "rejected"))
        if pair["models"][k] == model_hash and pair["logprobs"][k] is not None
    ]
    if not gaps:
        say("audit: no answer here was written by this model, so there is nothing to compare")
        return {"answers": 0}
    mean, (worst, id, name) = sum(g[0] for g in gaps) / len(gaps), max(gaps)
    say(
        f"audit: generator and trainer differ by {mean:.2e} nats a token on average, {worst:.2e} at most "
        f"({len(gaps):,} answers)"
    )
    if not mean <= tolerance:
        raise Stop(
            f"the generator and the trainer disagree about the same answers: {mean:.3g} nats a token on average, "
            f"tolerance {tolerance:g}; the worst is the {name} answer of {id}. Look for another chat template, a "
            "doubled BOS, other weights than those that generated, wrong position ids; --max_logprob_gap if it is noise."
        )
    return {"answers": len(gaps), "mean": mean, "max": worst}


# ----------------------------------------------------------------------------------------------------
# Checkpoints and export


def save_checkpoint(stage, policy, optimizer, step: int) -> None:
    """Weights and Adam states of all ranks under parts/step_000012, whole or not at all; only the last is kept.

    Nothing else is random or has a position: the order of the pairs is a function of (seed, epoch).
    """
    folder = stage.parts / f"step_{step:06d}"
    temporary = folder.with_name(folder.name + ".tmp")
    if ranks()[0] == 0:
        remove(temporary)
    barrier()
    weights, adam = get_state_dict(policy, optimizer)
    dcp.save({"weights": weights, "adam": adam}, checkpoint_id=temporary)
    barrier()
    if ranks()[0] == 0:
        os.replace(temporary, folder)
        for old in stage.parts.glob("step_??????"):
            if old != folder:
                remove(old)


def load_checkpoint(stage, policy, optimizer) -> int:
    """Continue from the last checkpoint, written by any number of ranks; the number of steps done, 0 without one."""
    folders = sorted(stage.parts.glob("step_??????"))
    if not folders:
        return 0
    weights, adam = get_state_dict(policy, optimizer)
    dcp.load({"weights": weights, "adam": adam}, checkpoint_id=folders[-1])
    set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=adam)
    return int(folders[-1].name[-6:])


def export(weights: dict, args, folder: Path, tokenizer) -> float:
    """Write a Hugging Face folder from whole weights; the share of them that differ from --model, as saved."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")  # knows how it wants to be saved
    before, dtype = model.state_dict(), DTYPES.get(args.save_dtype, model.dtype)
    changed = sum((v.to(dtype) != before[k].to(dtype)).sum().item() for k, v in weights.items())
    model.to(dtype).load_state_dict(weights)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return changed / sum(v.numel() for v in weights.values())


# ----------------------------------------------------------------------------------------------------
# Training


def learning_rate(step: int, steps: int, args) -> float:
    """Linear warm-up that never wastes a step at zero, then cosine or linear down to min_lr_ratio at the last step."""
    warmup = math.ceil(args.warmup_ratio * steps)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    floor = 0.1 if args.min_lr_ratio is None else args.min_lr_ratio
    done = (step - warmup) / max(1, steps - 1 - warmup)
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[args.lr_scheduler]
    return args.learning_rate * (floor + (1 - floor) * shape) if args.lr_scheduler != "constant" else args.learning_rate


METRICS = (  # TRL's names, each a mean over the pairs of the step
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "logps/chosen_fell", "length/chosen", "length/rejected",
)  # fmt: skip


def train(policy, pairs, reference, plans, args, stage, device, on_first_batch) -> dict:
    """All steps. Writes a row a step; returns figures for the metadata. `plans`: [step][rank] -> microbatches."""
    steps, epoch_steps = len(plans), len(plans) // args.num_train_epochs
    fused = {"fused": True} if device.type == "cuda" else {}
    optimizer = torch.optim.AdamW(
        policy.parameters(), args.learning_rate, tuple(args.adam_betas), weight_decay=args.weight_decay, **fused
    )
    first = load_checkpoint(stage, policy, optimizer)
    if first:
        say(f"going on after step {first} of {steps}")
    rank, world = ranks()
    log = TrainLog(stage.parts / "train.jsonl", first, args.report_to) if rank == 0 else None
    bar = tqdm(total=steps, initial=first, desc="train", unit="step", disable=rank > 0 or not sys.stderr.isatty())
    terminated = []
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    figures = {"steps": steps, "tokens": 0, "train_seconds": 0.0}

    for step in range(first, steps):
        began = time.time()
        epoch = step // epoch_steps
        beta = args.beta[epoch if len(args.beta) > 1 else 0]
        mine = plans[step][rank]
        n_pairs = sum(len(bin) for bins in plans[step] for bin in bins)
        sums = torch.zeros(len(METRICS) + 1, dtype=torch.float64, device=device)
        losses = {}

        for k, bin in enumerate(mine):
            policy.set_requires_gradient_sync(k == len(mine) - 1)  # add up locally, reduce over the ranks once
            batch = collate([pairs[i] for i in bin or [0]], args.packing, device)
            logprobs = policy(batch)  # [n, 2]
            if not bin:  # this rank has no pair left: take part in the collectives, add nothing
                (logprobs.sum() * 0).backward()
                continue
            ref, lengths = reference[bin].to(device), batch["lengths"]  # [n, 2]
            loss = dpo_loss(
                logprobs,
                ref,
                lengths,
                beta,
                args.loss_type,
                args.label_smoothing,
                args.length_coef,
                args.nll_coef,
            )
            # FSDP averages gradients over the ranks; the loss is the mean over the pairs of all of them.
            (loss.sum() * world / n_pairs).backward()

            with torch.no_grad():
                if step == first == 0:
                    on_first_batch(bin, logprobs.detach())
                rewards = beta * (logprobs - ref)  # [n, 2]
                margins = rewards[:, 0] - rewards[:, 1]
                columns = (
                    loss, rewards[:, 0], rewards[:, 1], margins > 0, margins, logprobs[:, 0], logprobs[:, 1],
                    logprobs[:, 0] < ref[:, 0], lengths[:, 0], lengths[:, 1],
                )  # fmt: skip
                sums[:-1] += torch.stack([c.double().sum() for c in columns])
                losses.update(zip(bin, loss.tolist() if device.type == "cpu" else [loss], strict=False))

        sums[-1] = len(terminated)
        dist.all_reduce(sums)
        if not sums[:-1].isfinite().all():
            bad = [pairs[i]["id"] for i, v in losses.items() if not math.isfinite(float(torch.as_tensor(v).sum()))]
            raise Stop(
                f"step {step + 1}: the loss is not finite (rank {rank}; pairs or microbatches of {bad[:8]}). No "
                f"weight was changed by it. Last checkpoint: {[f.name for f in stage.parts.glob('step_??????')]}"
            )
        if step == 0 and args.ref_model is None:
            check_first_loss(sums[0].item() / n_pairs, pairs, reference, plans[0], beta, args)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args)
        optimizer.step()
        optimizer.zero_grad()

        tokens = sum(
            len(pairs[i][k])
            for bins in plans[step]
            for bin in bins
            for i in bin
            for k in ("prompt", "chosen", "rejected")
        )
        seconds = time.time() - began
        figures["tokens"] += tokens
        figures["train_seconds"] += seconds
        row = {
            "step": step + 1, "epoch": round((step + 1) / epoch_steps, 4),
            **{name: value / n_pairs for name, value in zip(METRICS, sums[:-1].tolist(), strict=True)},
            "grad_norm": norm.item(), "learning_rate": learning_rate(step, steps, args), "beta": beta,
            "pairs": n_pairs, "tokens": tokens, "tokens_per_second": round(tokens / seconds, 1),
        }  # fmt: skip
        if log:
            log.write(row)
        bar.set_postfix(loss=f"{row['loss']:.4f}", acc=f"{row['rewards/accuracies']:.2f}", tok_s=int(tokens / seconds))
        bar.update()
        stopping = sums[-1].item() > 0
        if step + 1 < steps and (stopping or (args.save_every and (step + 1) % args.save_every == 0)):
            save_checkpoint(stage, policy, optimizer, step + 1)
        if stopping and step + 1 < steps:
            say(f"SIGTERM: saved after step {step + 1} of {steps}; the same command goes on from there")
            sys.exit(INTERRUPTED)
    bar.close()
    if log:
        log.close()
        say(f"{steps} steps, loss {row['loss']:.4f}, accuracy {row['rewards/accuracies']:.2f}" if first < steps else "")
    return figures


def check_first_loss(loss: float, pairs, reference, plan, beta, args) -> None:
    """Law of step 0: before its first update the policy is its reference, so the loss is that of d = 0 (ln 2)."""
    step = [i for bins in plan for bin in bins for i in bin]
    lengths = torch.tensor([[len(pairs[i]["chosen"]), len(pairs[i]["rejected"])] for i in step])
    expected = dpo_loss(
        reference[step], reference[step], lengths, beta, args.loss_type, args.label_smoothing, args.length_coef, args.nll_coef
    ).mean().item()  # fmt: skip
    say(f"step 0: loss {loss:.7f}, expected {expected:.7f} of policy = reference")
    if abs(loss - expected) > (1e-4 if args.dtype == "fp32" else 2e-2):
        raise Stop(
            f"the first loss is {loss:.6f}, but policy and reference are the same model, so it must be "
            f"{expected:.6f}: something (dropout, precision, masking) differs between the two passes"
        )


class TrainLog:
    """train.jsonl, a row a step, and the dashboard asked for. After a restart it goes on behind row `done`."""

    def __init__(self, path: Path, done: int, report_to: str):
        kept = path.read_text().splitlines(keepends=True)[:done] if path.exists() else []
        path.write_text("".join(kept))
        self.file = open(path, "a")
        self.dashboard = None
        try:
            if report_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                writer = SummaryWriter(str(path.parent.with_suffix(".tensorboard")))
                self.dashboard = lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in row.items()]
            elif report_to != "none":
                module = __import__(report_to)
                module.init(project="iterdpo", name=str(path.parent.name))
                self.dashboard = lambda row: module.log(row, step=row["step"])
        except ImportError as e:
            raise Stop(f"--report_to {report_to}: {e}. pip install {report_to}, or leave it out.") from None

    def write(self, row: dict) -> None:
        self.file.write(dump(row))
        self.file.flush()
        if self.dashboard:
            self.dashboard(row)

    def close(self) -> None:
        self.file.close()


# ----------------------------------------------------------------------------------------------------


def start_process_group() -> torch.device:
    """torchrun's ranks, or a group of one: the code below knows no other case."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    return device


def make_mesh(args, device):
    """One dimension: shard over all ranks. Two: copies of the model over the first, shards of one over the second."""
    world = ranks()[1]
    if args.shard_size in (None, world):
        return init_device_mesh(device.type, (world,))
    return init_device_mesh(
        device.type, (world // args.shard_size, args.shard_size), mesh_dim_names=("replicate", "shard")
    )


def main():
    args = parse(arguments())
    device = start_process_group()
    check(args, device)
    if args.dtype == "auto":
        args.dtype = "bf16" if device.type == "cuda" else "fp32"
    inputs = {"model": args.model, "ref_model": args.ref_model, "pairs": args.pairs}
    stage = Stage(args, inputs, args.output, free=("save_every", "report_to", "max_logprob_gap"))
    if stage.hashes.get("ref_model") == stage.hashes["model"]:
        args.ref_model = None  # the same weights under another name: no second model

    # 1. The pairs, and the model that they suit
    config = AutoConfig.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pairs, total, dropped = load_pairs(args, tokenizer, config)
    stage.count("rows", total, len(pairs), dropped)
    longest = max(len(p["prompt"]) + max(len(p["chosen"]), len(p["rejected"])) for p in pairs)
    refusal = packing_refusal(config, longest)
    if refusal and args.packing in ("prefix", "packed"):
        raise Stop(f"--packing {args.packing}: {refusal}. Use --packing padded.")
    if refusal:
        say(f"{args.model}: {refusal}, so the batches are padded")
    if args.packing == "auto":
        args.packing = "padded" if refusal else "prefix"
    attention = attention_implementation(config) if args.packing == "padded" else ATTENTION

    # 2. Every step of the run, decided in advance: [step][rank] -> microbatches of indices into pairs
    plans = []
    for epoch in range(args.num_train_epochs):
        order = list(range(len(pairs)))
        random.Random(seed_of("dpo_train", args.seed, epoch)).shuffle(order)
        for start in range(0, len(order), args.batch_size):
            step = order[start : start + args.batch_size]
            costs = [cost(pairs[i], args.packing) for i in step]
            bins = microbatches(costs, args.tokens_per_batch, ranks()[1], args.packing == "padded")
            plans.append([[[step[j] for j in bin] for bin in rank] for rank in bins])

    # 3. The reference, once
    mesh = make_mesh(args, device)
    probe = min(pairs, key=lambda p: cost(p, "prefix"))
    first_epoch = [step[ranks()[0]] for step in plans[: len(plans) // args.num_train_epochs]]
    policy = None
    if args.ref_model is None:
        policy = load_policy(args.model, attention, args, mesh, device, probe)
        reference = reference_logprobs(lambda: policy, pairs, first_epoch, args, stage, device, config)
    else:
        ref_config = AutoConfig.from_pretrained(args.ref_model)
        if ref_config.vocab_size != config.vocab_size:
            raise Stop(
                f"--ref_model has a vocabulary of {ref_config.vocab_size}, --model one of {config.vocab_size}: "
                "they do not read the same token ids"
            )
        load = lambda: load_policy(args.ref_model, attention, args, mesh, device, probe)  # noqa: E731
        reference = reference_logprobs(load, pairs, first_epoch, args, stage, device, config)  # freed on return
        policy = load_policy(args.model, attention, args, mesh, device, probe)

    # 4. The audit. With another reference the first step's log-probs of the policy serve, which cost nothing.
    tolerance = args.max_logprob_gap or (1e-3 if args.dtype == "fp32" else 0.05)
    audited = {}
    if args.ref_model is None:
        audited = audit(pairs, reference, stage.hashes["model"], tolerance)

    def on_first_batch(bin, logprobs):
        if args.ref_model is not None and not audited:
            audited.update(audit([pairs[i] for i in bin], logprobs, stage.hashes["model"], tolerance))

    # 5. Train and save
    figures = train(policy, pairs, reference, plans, args, stage, device, on_first_batch)
    if device.type == "cuda":
        figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    else:
        figures["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights = get_model_state_dict(
        policy.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )  # collective: every rank takes part, rank 0 gets them
    if ranks()[0] == 0:
        with whole(stage.output) as folder:
            changed = export(weights, args, folder, tokenizer)
            with whole(stage.output.with_name("train.jsonl")) as log:
                log.write_bytes((stage.parts / "train.jsonl").read_bytes())
            stage.write_meta(audit=audited, changed_weights=changed, train=figures, packing=args.packing)
        stage.clean()
        say(f"{args.output}: {changed:.1%} of the weights changed in the saved dtype")
    barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
