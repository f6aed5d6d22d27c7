"""Give every candidate a reward: from reward models, Python functions, an LLM judge, or any mixture
of them.

    python score.py --candidates candidates.jsonl --output scored.jsonl \\
        --reward_model Skywork/Skywork-Reward-V2-Qwen3-8B
    torchrun --nproc_per_node 8 score.py …                               one GPU a rank; the same file comes out
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 score.py …
    python score.py … --reward_model rm=PATH --reward_fn gold=demo/gold.py:gold --reward_weights gold=0
    python score.py … --judge_url http://localhost:8000/v1 --judge_model Qwen/Qwen3-32B

Each candidate y of a prompt x gains "rewards", a number from each of them, and "reward", what pairs
are made of:

    reward(x, y) = sum_k weight_k * rewards_k(x, y) - missing_eos_penalty * [y was cut off by the token limit]

A weight of 0 watches: the number is written down and decides nothing. With --ref_model,
"ref_logprobs" holds log p_ref(y | x) at temperature 1, summed over the tokens, from which the KL to
that model is estimated. Rows keep their order and everything else that is in them.

What one has to get right, because each was wrong somewhere in the field:

  - The reward model sees its own chat template, tokenised once (no second BOS), and the whole text
    that is trained on: an answer longer than the model can read is dropped and counted, never cut.
  - A score is the same alone and in a batch. Answers are packed, not padded, and their prompt,
    which they have in common, is computed once for all of them. The first batch is checked at every
    start.
  - Several candidate files (two policies, say) are joined by id, never by position.
  - NaN and infinity stop the run and name the place. Whatever has no score is dropped under a name.

Memory does not grow with the rows: every model is loaded once and stays, and the rows pass through
all of them part by part, so that a kill costs one part. Models that do not fit side by side take
turns: score the first run's output again; its rewards are kept beside the new ones, and "reward" is
the sum over the last run's.
"""

import asyncio
import hashlib
import importlib.util
import ipaddress
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, combinations, groupby
from pathlib import Path
from urllib.parse import urlsplit

# Batches differ in size, and the GPU's free memory would fall into pieces. torch reads this when it
# is imported.
os.environ.setdefault(
    "PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
)

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.modeling_layers import GenericForSequenceClassification

import chat
import models
import records
from kernels.attention import (
    ATTENTION,
    attention_implementation,
    packing_refusal,
    positions,
    prefix_layout,
)
from kernels.logprob import backbone, linear_logprob, lm_head
from records import CANDIDATES, Stop, dump, finite
from stage import Stage, key_values, parse, parser, run, seed_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# How far a score may move, absolutely and relatively, when its neighbours in the batch change.
# Rounding alone moves it by 1e-6 in fp32; in bf16, with 8 bits a number, by some hundredths; a
# wrong mask as far as two answers differ.
TOLERANCE = {"bf16": (0.25, 0.01), "fp32": (1e-3, 1e-5)}


def arguments():
    p = parser(__doc__)
    # Files
    p.add_argument(
        "--candidates", nargs="+", required=True, help="candidates.jsonl; several are merged by id"
    )
    p.add_argument("--output", required=True, help="scored.jsonl")
    # What judges: any of the three, several at once, each with a name in "rewards"
    several = dict(nargs="+", action="extend", default=[])
    p.add_argument(
        "--reward_model", **several, metavar="[NAME=]PATH",
        help="sequence classifier with one label: folder or hub name[@revision]; called rm, several by their own names",
    )  # fmt: skip
    p.add_argument(
        "--reward_fn", **several, metavar="[NAME=]FILE.py:FUNCTION",
        help="function(prompt, response, meta) -> float; prompt as in the file, response a string",
    )  # fmt: skip
    p.add_argument(
        "--judge_url", help="an OpenAI-compatible endpoint, http://…/v1; its key in OPENAI_API_KEY"
    )
    p.add_argument("--judge_model", help="the model's name at that endpoint")
    p.add_argument(
        "--judge_prompt",
        help="text file with {prompt}, {answer_a}, {answer_b}; default: see JUDGE_PROMPT",
    )
    p.add_argument(
        "--judge_max_tokens",
        type=int,
        help="of a reply, thoughts included; default 512: a short reason",
    )
    p.add_argument(
        "--judge_concurrency", type=int,
        help="requests in flight per rank; default 64 for a server on this machine (localhost, "
        "127.0.0.1), which batches them, else 16, to keep within rate limits",
    )  # fmt: skip
    p.add_argument(
        "--judge_requests_per_minute",
        type=int,
        help="of all ranks, repeated ones too; default: no limit",
    )
    p.add_argument(
        "--judge_max_requests",
        type=int,
        help="budget: replies paid for, restarts included; default: none",
    )
    # What is made of it
    p.add_argument(
        "--reward_weights", nargs="+", action="extend", metavar="[NAME=]WEIGHT",
        help="by name (gold=0), the others 1; or one each in the order models, functions, judge. 0 = watch only",
    )  # fmt: skip
    p.add_argument(
        "--missing_eos_penalty",
        type=float,
        default=0.0,
        help="taken off a cut-off answer; default 0",
    )
    p.add_argument(
        "--strip_reasoning", action="store_true",
        help="show the rewards only what follows </think>; token_ids, and so training, keep all of it",
    )  # fmt: skip
    p.add_argument(
        "--ref_model", **several, metavar="[NAME=]PATH",
        help="adds log p(answer) under it: folder or hub name[@revision]",
    )  # fmt: skip
    # How the models run
    p.add_argument(
        "--chat_template_kwargs",
        nargs="+",
        metavar="KEY=JSON",
        help="for the reward models' templates",
    )
    p.add_argument(
        "--max_length",
        type=int,
        help="tokens of prompt and answer; default: all that the model can read",
    )
    p.add_argument(
        "--tokens_per_batch", type=int,
        help="in a forward pass; default 16384 to fill a GPU, 4096 to stay in a CPU's cache. Halved where memory ends",
    )  # fmt: skip
    p.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        help="default auto: bf16 on a GPU, fp32 without one",
    )
    return p


def resolve(args) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Refuse what contradicts itself, fill in defaults, give names: {name: path} of models,
    functions, references.
    """
    needs = dict.fromkeys([flag for flag in vars(args) if flag.startswith("judge_")], "judge_url")
    needs |= dict.fromkeys(("max_length", "tokens_per_batch", "dtype"), "reward_model or ref_model")
    needs |= {"chat_template_kwargs": "reward_model"}
    for flag, needed in needs.items():
        value = getattr(args, flag)
        if value is not None and not any(getattr(args, other) for other in needed.split(" or ")):
            raise Stop(f"--{flag} has no effect without --{needed}.")
        if isinstance(value, int) and value < 1:
            raise Stop(f"--{flag} starts at 1.")
    if args.judge_url and not args.judge_model:
        raise Stop(
            "--judge_url needs --judge_model, the name under which the server offers its model."
        )
    if "@" in (args.judge_url or ""):
        raise Stop(
            "--judge_url holds credentials, which would end up in logs. Put the key into OPENAI_API_KEY."
        )

    reward_models = named(
        args.reward_model, lambda path: "rm" if len(args.reward_model) == 1 else last_name(path)
    )
    functions = named(args.reward_fn, lambda spec: spec.rpartition(":")[2])
    references = named(
        args.ref_model, lambda path: "ref" if len(args.ref_model) == 1 else last_name(path)
    )
    names = [*reward_models, *functions, *["judge"] * bool(args.judge_url)]
    if not names:
        raise Stop("nothing to score with: give --reward_model, --reward_fn or --judge_url.")
    if len(set(names)) < len(names):
        raise Stop(f"two rewards share a name among {', '.join(names)}. Tell them apart: NAME=….")
    args.reward_weights = weights(args.reward_weights or [], names)
    if reward_models or references:
        gpu = torch.cuda.is_available()
        args.tokens_per_batch = args.tokens_per_batch or (16384 if gpu else 4096)
        if args.dtype in (None, "auto"):
            args.dtype = "bf16" if gpu else "fp32"
    if args.judge_url:
        args.judge_max_tokens = args.judge_max_tokens or 512
        if args.judge_concurrency is None:
            args.judge_concurrency = 64 if on_this_machine(args.judge_url) else 16

    # Models and files are inputs, known by their content; what else of them decides the result is
    # recorded here.
    args.rewards, args.references = names, list(references)
    args.functions = [spec.rpartition(":")[2] for spec in functions.values()]
    return reward_models, functions, references


def on_this_machine(url: str) -> bool:
    """Whether a URL's host is localhost or a loopback address, 127.0.0.1 or [::1]."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name, or no URL
        return False


def weights(given: list[str], names: list[str]) -> list[float]:
    """--reward_weights as one number a reward: ["gold=0"] or ["1", "0"] of ["rm", "gold"] -> [1.0,
    0.0].
    """
    try:
        pairs = (
            [w.split("=") for w in given]
            if "=" in "".join(given) or not given
            else zip(names, given, strict=True)
        )
        found = {name: float(weight) for name, weight in pairs}
        if len(found) == len(given) and found.keys() <= set(names):
            return [found.get(name, 1.0) for name in names]
    except ValueError:
        pass
    raise Stop(
        f"--reward_weights {' '.join(given)}: NAME=WEIGHT, or one weight for each of {', '.join(names)}."
    )


def named(specs: list[str], default: Callable[[str], str]) -> dict[str, str]:
    """["PATH", "NAME=PATH"] -> {name: path}, with default(path) for those that came without a name."""
    found: dict[str, str] = {}
    for spec in specs:
        name, path = re.fullmatch(r"(?:([\w.-]+)=)?(.*)", spec, re.DOTALL).groups()
        if name is None or os.path.exists(spec):  # a path may hold "=", too
            name, path = default(spec), spec
        if name in found:
            raise Stop(f"{found[name]} and {path} are both called {name}. Tell them apart: NAME=….")
        found[name] = path
    return found


def last_name(path: str) -> str:
    """What a model is called, the last part of its name: models/rm and ORG/rm@v1 are both rm."""
    repository, _ = models.split(path)
    return Path(repository).name


@dataclass
class Answer:
    """A candidate on its way through the rewards."""

    row: dict
    index: int  # in the input's row
    candidate: dict
    text: str  # what the rewards see
    dropped: str | None = None  # why

    def __str__(self):
        return f'row id "{self.row["id"]}", candidate {self.index}'


# --------------------------------------------------------------------------------------------------
# Models. Each reward, here and below, takes a list of answers; each gets a number, or a word: why
# it has none


@dataclass
class Model:
    """What reward models and references have in common: many sequences at once, each as if it were
    alone.

    A sequence is token ids, and how many of them are the prompt.
    """

    path: str
    network: nn.Module
    packs: bool  # else its sequences run one by one
    limit: int  # tokens it reads
    budget: int  # tokens a forward
    tolerance: tuple[float, float] | None  # None once a batch was seen to change nothing

    def __call__(self, answers: list[Answer]) -> list[float | str]:
        sequences = [self.sequence(a) for a in answers]
        keys = [
            (a.row["id"], prompt, tuple(ids))
            for a, (ids, prompt) in zip(answers, sequences, strict=True)
        ]
        once = dict(
            zip(keys, sequences, strict=True)
        )  # an answer written twice is computed once, and ties exactly
        values = dict(
            zip(once, self.score(list(once.values()), [row for row, *_ in once]), strict=True)
        )
        return [values[key] for key in keys]

    @torch.inference_mode()
    def score(self, sequences: list[tuple[list[int], int]], rows: list) -> list[float | str]:
        """rows[i] tells which sequences, standing side by side, may have a beginning in common."""
        values: list[float | str] = [self.too_long] * len(sequences)
        order = [i for i, (ids, _) in enumerate(sequences) if len(ids) <= self.limit]
        while order:
            sizes = list(accumulate(len(sequences[i][0]) for i in order))
            chosen = order[: max(1, sum(size <= self.budget for size in sizes))]
            batch = [sequences[i] for i in chosen]
            try:
                if self.packs:
                    results = self.read(self.hidden(batch, [rows[i] for i in chosen]), batch)
                else:
                    results = [self.alone(*sequence) for sequence in batch]
            except torch.OutOfMemoryError:
                if len(chosen) == 1:
                    raise Stop(
                        f"{self.path}: {sizes[0]} tokens do not fit into memory. Lower --max_length."
                    ) from None
                self.budget = sizes[len(chosen) - 1] // 2
                torch.cuda.empty_cache()
                print(
                    f"{self.path}: out of memory: {self.budget} tokens a batch from here on",
                    file=sys.stderr,
                )
                continue
            if self.packs and self.tolerance:
                k = min(
                    range(len(batch)), key=lambda i: len(batch[i][0])
                )  # the cheapest to compute again
                one, among = self.alone(*batch[k]), results[k]
                if abs(one - among) > self.tolerance[0] + self.tolerance[1] * abs(one):
                    print(
                        f"{self.path}: {one:.6g} alone, {among:.6g} packed: so one by one",
                        file=sys.stderr,
                    )
                    self.packs = False
                    continue
                self.tolerance = None if len(batch) > 1 else self.tolerance
            for i, value in zip(chosen, results, strict=True):
                values[i] = value
            order = order[len(chosen) :]
        return values

    def hidden(self, sequences: list[tuple[list[int], int]], rows: list) -> list[torch.Tensor]:
        """The last layer's states [n, D] of each sequence, from one row of T tokens:
        [P|A|B|C][P|A|B]...

        P is what all sequences of a prompt begin with. A's queries see [P|A], B's see [P|B], and so
        on: the picture in kernels/attention.py, with more than two answers.
        """
        row, lengths, device = [], [], self.network.device
        for _, group in groupby(zip(rows, sequences, strict=True), key=lambda both: both[0]):
            group = [ids for _, (ids, _) in group]
            shared = min(
                len(os.path.commonprefix(group)), min(map(len, group)) - 1
            )  # each keeps a token of its own
            row += group[0][:shared] + [token for ids in group for token in ids[shared:]]
            lengths.append((shared, *(len(ids) - shared for ids in group)))
        positions, layout = prefix_layout(lengths, device)
        row = torch.tensor([row], device=device)  # [1, T]
        decoder = backbone(self.network)
        states = decoder(input_ids=row, position_ids=positions, layout=layout, use_cache=False)[0][
            0
        ]
        return list(
            states[layout.kv_index].split(layout.k_lengths)
        )  # the states of P once for each of its answers


@dataclass
class RewardModel(Model):
    """Its logit at the end of prompt and answer, as it was trained to see them."""

    tokenizer: object  # its own
    template: dict  # arguments of its chat template
    kind, too_long = AutoModelForSequenceClassification, "too_long_for_reward_model"

    def sequence(self, a: Answer) -> tuple[list[int], int]:
        prompt, where = a.row["prompt"], f"{self.path}: {a}"
        return chat.encode_for_reward(self.tokenizer, prompt, a.text, where, self.template), 0

    def alone(self, ids: list[int], _) -> float:
        """The definition: the model as it came."""
        return self.network(torch.tensor([ids], device=self.network.device)).logits[0, 0].item()

    def read(self, hidden: list[torch.Tensor], sequences) -> list[float]:
        # transformers reads the last token that is not pad_token_id, also where that ends every
        # text
        pad = self.network.config.get_text_config().pad_token_id
        ends = [max((k for k, t in enumerate(ids) if t != pad), default=0) for ids, _ in sequences]
        states = torch.stack([h[end] for h, end in zip(hidden, ends, strict=True)])  # [B, D]
        return self.network.score(states)[:, 0].float().tolist()


@dataclass
class Reference(Model):
    """log p(answer | prompt), both as the token ids that the generator wrote."""

    head: dict  # as linear_logprob takes it
    kind, too_long = AutoModelForCausalLM, "too_long_for_ref_model"

    def sequence(self, a: Answer) -> tuple[list[int], int]:
        prompt = a.row["prompt_token_ids"]
        if not prompt:
            raise Stop(
                f"{a}: prompt_token_ids is empty: nothing precedes the first token of the answer."
            )
        return prompt + a.candidate["token_ids"], len(prompt)

    def alone(self, ids: list[int], prompt: int) -> float:
        """The definition, from the model's own logits."""
        row = torch.tensor([ids], device=self.network.device)  # [1, T]
        logits = self.network(row).logits[
            0, prompt - 1 : -1
        ]  # [|y|, V]: the state before a token predicts it
        return logits.float().log_softmax(-1).gather(1, row[0, prompt:, None]).sum().item()

    def read(self, hidden: list[torch.Tensor], sequences) -> list[float]:
        answers = [ids[prompt:] for ids, prompt in sequences]
        states = torch.cat(
            [h[prompt - 1 : -1] for h, (_, prompt) in zip(hidden, sequences, strict=True)]
        )
        targets = torch.tensor(
            [t for answer in answers for t in answer], dtype=torch.long, device=states.device
        )
        logprobs = linear_logprob(states, targets=targets, **self.head)  # [sum of |y|] fp32
        return [
            part.double().sum().item()
            for part in logprobs.split([len(answer) for answer in answers])
        ]


def load(path: str, kind: type, template: dict, args, device) -> Model:
    config = models.load_config(path)
    if kind is RewardModel and "AutoModelForSequenceClassification" in (
        getattr(config, "auto_map", None) or {}
    ):
        raise models.wants_code(
            path, "reward head"
        )  # in transformers' own class it would be another function
    if kind is RewardModel and config.num_labels != 1:
        raise Stop(
            f"{path}: has {config.num_labels} labels (a plain language model counts as two); a reward model has "
            "one, whose logit is the reward. Call this one from a --reward_fn that makes one number of its outputs."
        )
    limit = args.max_length or positions(config)
    packs = packing_refusal(config, limit) is None
    if (
        kind is RewardModel
    ):  # of the last token's state it must make one product, and not what BERT makes of it
        made_by = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), object)
        packs = packs and issubclass(made_by, GenericForSequenceClassification)
    attention = ATTENTION if packs else attention_implementation(config)
    network = models.load_model(kind.kind, path, DTYPES[args.dtype], attention)
    network = network.to(device).eval()
    network.config.use_cache = False
    common = path, network, packs, limit, args.tokens_per_batch, TOLERANCE[args.dtype]
    if kind is Reference:
        m = Reference(*common, lm_head(network))
    else:
        m = RewardModel(*common, models.load_tokenizer(path), template)
    if kind is RewardModel:
        chat.check_template_kwargs(m.tokenizer, template)
    if kind is RewardModel and isinstance(getattr(network, "score", None), nn.Linear):
        # The last product in fp32: in bf16 a reward near 10 moves in steps of 1/16, and steps make
        # ties.
        network.score.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return m


# --------------------------------------------------------------------------------------------------
# Functions


def reward_function(spec: str) -> Callable[[list[Answer]], list[float]]:
    file, _, name = spec.rpartition(":")
    if not os.path.isfile(file):
        raise Stop(f"--reward_fn {spec}: no such file. It is written FILE.py:FUNCTION.")
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_file_location(Path(file).stem, file)
    )
    sys.path.append(str(Path(file).resolve().parent))  # so that it may import what stands beside it
    module.__spec__.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise Stop(
            f"{file}: has no function {name}. Write one: {name}(prompt, response, meta) -> float."
        )

    def score(answers: list[Answer]) -> list[float]:
        values = []
        for a in answers:
            try:
                values.append(float(function(a.row["prompt"], a.text, a.row.get("meta") or {})))
            except Exception as e:
                e.add_note(
                    f"in --reward_fn {spec} on {a}; it must return one number for every answer"
                )
                raise
        return values

    return score


# --------------------------------------------------------------------------------------------------
# The work


def merge(paths: list[str], stage: Stage) -> tuple[int, Iterator[dict]]:
    """(number of rows, the rows). Several files are joined by id; only ids and byte offsets are
    held in memory.

    The first file's keys win where files disagree; prompts must not, in words or in token ids.
    """
    totals = [records.count_rows(path, CANDIDATES) for path in paths]
    if len(paths) == 1:
        return totals[0], records.read_jsonl(paths[0], CANDIDATES)
    files = {path: open(path, "rb") for path in paths}
    places: dict[str, list[tuple[str, int]]] = {}  # id -> (file, byte), ids in order of appearance
    for path, file in files.items():
        at = 0
        for line in file:
            places.setdefault(json.loads(line)["id"], []).append((path, at))
            at += len(line)
    whole = sum(len(p) == len(paths) for p in places.values())
    stage.count("ids", len(places), whole, {"kept_though_in_some_files_only": len(places) - whole})

    def rows() -> Iterator[dict]:
        for id, found in places.items():
            row = None
            for path, at in found:
                files[path].seek(at)
                other = json.loads(files[path].readline())
                for key in ("prompt", "prompt_token_ids"):
                    if row and row[key] != other[key]:
                        raise Stop(
                            f'{path}: id "{id}": {key} differs from that in {found[0][0]}. Candidates of different '
                            "prompts cannot be merged: generate both files from one prompts.jsonl."
                        )
                row = (
                    row | {"candidates": row["candidates"] + other["candidates"]} if row else other
                )
            yield row

    return len(places), rows()


def score_part(rows: list[dict], scorers: list[tuple[str, str, Callable]], args) -> dict:
    """Score the candidates of `rows`, in place; what has no score leaves its row. Returns the
    balance.
    """
    answers = [
        Answer(row, i, c, c["text"]) for row in rows for i, c in enumerate(row["candidates"])
    ]
    if args.strip_reasoning:
        for a in answers:
            a.text = a.text.split("</think>", 1)[-1].lstrip()
    for kind, name, scorer in scorers:
        left = [a for a in answers if not a.dropped]
        for a, value in zip(left, scorer(left), strict=True):
            if isinstance(value, str):
                a.dropped = value
            else:
                a.candidate[kind] = a.candidate.get(kind, {}) | {
                    name: finite(value, f'{a}, {kind} "{name}"')
                }

    left = [a for a in answers if not a.dropped]
    for row in rows:
        row["candidates"] = [a.candidate for a in left if a.row is row]
    for a in left:
        total = sum(
            w * a.candidate["rewards"][name]
            for name, w in zip(args.rewards, args.reward_weights, strict=True)
        )
        cut_off = a.candidate["finish_reason"] != "stop"
        a.candidate["reward"] = finite(total - args.missing_eos_penalty * cut_off, f"{a}, reward")
    dropped = Counter(a.dropped for a in answers if a.dropped)
    balance = {"in": len(answers), "out": len(left), "dropped": dropped}
    return {"rows": {"in": len(rows), "out": len(rows), "dropped": {}}, "candidates": balance}


def main():
    args = parse(arguments())
    reward_models, functions, references = resolve(args)
    inputs = {
        "candidates": args.candidates,
        "reward_model": list(reward_models.values()),
        "reward_fn": [spec.rpartition(":")[0] for spec in functions.values()],
        "ref_model": list(references.values()),
        "judge_prompt": args.judge_prompt,
    }
    pace = (
        "judge_url",
        "judge_concurrency",
        "judge_requests_per_minute",
        "judge_max_requests",
        "tokens_per_batch",
    )
    stage = Stage(args, inputs, args.output, free=pace)
    if stage.done:
        return
    total, rows = merge(args.candidates, stage)

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    judge = Judge(args, stage) if args.judge_url else None
    template = key_values("chat_template_kwargs", args.chat_template_kwargs)
    # (key in the candidate, name there, function); the judge is asked last, as it costs most
    scorers = [
        ("rewards", name, load(path, RewardModel, template, args, device))
        for name, path in reward_models.items()
    ]
    scorers += [
        ("ref_logprobs", name, load(path, Reference, {}, args, device))
        for name, path in references.items()
    ]
    scorers += [("rewards", name, reward_function(spec)) for name, spec in functions.items()]
    scorers += [("rewards", "judge", judge)] if judge else []

    with stage.progress(total) as bar:
        answers, start = 0, time.time()
        for index, part in stage.todo(rows):
            counts = score_part(part, scorers, args)
            stage.write_part(index, part, counts | (judge.counts if judge else {}))
            answers += counts["candidates"]["in"]
            bar.set_postfix_str(f"{answers / (time.time() - start):,.1f} answers/s", refresh=False)
            bar.update(len(part))
    stage.join(total)


# --------------------------------------------------------------------------------------------------
# The judge: a language model compares two answers at a time, each pair in both orders
#
# With v(a, b) = 1 where the first shown of two answers wins, 0 where the second does and 1/2 for a
# tie, a candidate's score is its win rate, free of the judge's preference for a place:
#
#     score_i = mean over opponents j of [v(i, j) + 1 - v(j, i)] / 2
#
# Opponents are all others among up to 5 candidates (a round robin). Above that they are the two
# neighbours on either side in a ring: N candidates have N (N - 1) / 2 pairs, and a ring takes 2 N.
# The ring is dealt at random. Neighbours in the file come from one source (a policy, a
# temperature), and would be compared with their like.
#
# A ring loses something: an answer that beats its four opponents has a win rate of 1, though a
# better one may stand elsewhere. With a judge that never errs and answers from one source, the
# chosen one is the best of N = 8 in 70 % of the prompts, and of N = 16 in 33 %, where a round robin
# always finds it; and in 0.1 % of the pairs at N = 16, in none at N = 8, the chosen answer is worse
# than the rejected one (python -m bench.judge_ring).
#
# Answers of the same text tie without asking. A pair of which one order has failed is left out:
# half a comparison carries the bias that the other half removes. The prompt is in the manner of
# OAIF (arXiv:2402.04792), which reads off the probability of the first token; a reply in words is
# what every server can give, so that is what is read here.

JUDGE_PROMPT = """\
Below are a request and two answers to it. Decide which answer serves the person who asked better: does what was asked,
is correct and honest, is clear, and wastes none of their time. A longer answer is not better for its length, and the
order in which the two are shown means nothing.

### Request
{prompt}

### Answer A
{answer_a}

### Answer B
{answer_b}

### Your decision
Say in one sentence what decides it. Then end with one line: "Verdict: A", "Verdict: B" or, where neither is better,
"Verdict: TIE".
"""


def comparisons(answers: list[int], row_id: str) -> list[tuple[int, int]]:
    """Which answers of one prompt meet: all pairs of up to 5, else neighbours in a shuffled ring.

    The ring depends on `row_id` alone, not on ranks, parts or the row's place in the file.
    """
    if len(answers) <= 5:
        return list(combinations(answers, 2))
    ring = answers.copy()
    random.Random(seed_of("judge", row_id)).shuffle(ring)
    next_one = ring[1:] + ring[:1]
    next_but_one = ring[2:] + ring[:2]
    return [*zip(ring, next_one, strict=True), *zip(ring, next_but_one, strict=True)]


class Judge:
    """Calling it scores answers; `counts` then tells of that call what was asked and whether the
    order mattered.
    """

    def __init__(self, args, stage: Stage):
        try:
            import openai
        except ImportError as e:
            raise Stop(
                f"--judge_url: {e}. The judge is asked through it: pip install openai"
            ) from None

        self.args, self.openai, self.prompt = args, openai, JUDGE_PROMPT
        if args.judge_prompt:
            self.prompt = Path(args.judge_prompt).read_text(encoding="utf-8")
            for name in ("{prompt}", "{answer_a}", "{answer_b}"):
                if name not in self.prompt:
                    raise Stop(
                        f"{args.judge_prompt}: {name} does not occur in it, so the judge would not see it."
                    )
        self.parameters = {"temperature": 0, "max_tokens": args.judge_max_tokens}
        self.pause = (
            60 / (args.judge_requests_per_minute or math.inf) * stage.world
        )  # seconds between two requests
        self.next = 0.0  # when the next may leave
        self.counts: dict[str, dict] = {}
        self.last = ""  # the last reply or failure, for the message when nothing works

        # No reply is paid for twice: each rank appends to a file of its own, all ranks read all
        # files at a start.
        self.verdicts: dict[
            str, float | None
        ] = {}  # hash of the request -> v(a, b), None where it cannot be read
        own = stage.output.with_name(f"{stage.output.name}.judge.{stage.rank}.jsonl")
        for path in sorted(own.parent.iterdir()):
            if path.name.startswith(f"{stage.output.name}.judge."):
                lines, _, torn = path.read_bytes().rpartition(b"\n")
                for reply in map(json.loads, lines.splitlines()):
                    self.verdicts[reply["key"]] = verdict(reply["reply"])
                if torn and path == own:  # the line a kill cut short
                    os.truncate(path, len(lines) + 1 if lines else 0)
        self.file = open(own, "a", encoding="utf-8", errors="backslashreplace", buffering=1)
        self.budget = sys.maxsize
        if args.judge_max_requests:
            self.budget = max(0, args.judge_max_requests - len(self.verdicts)) // stage.world

    def __call__(self, answers: list[Answer]) -> list[float | str]:
        pairs: list[tuple[int, int]] = []
        for _, group in groupby(range(len(answers)), lambda k: id(answers[k].row)):
            indices = list(group)
            pairs += comparisons(indices, answers[indices[0]].row["id"])
        both_ways = [order for pair in pairs for order in (pair, pair[::-1])]
        requests = {
            (i, j): self.request(answers[i], answers[j])
            for i, j in both_ways
            if answers[i].text != answers[j].text
        }
        verdicts = self.ask(list(requests.values()))

        points, places = defaultdict(list), Counter()
        for i, j in pairs:
            v = w = 0.5
            if (i, j) in requests:
                v, w = verdicts.get(requests[i, j]), verdicts.get(requests[j, i])
                if v is None or w is None:
                    continue
                places[
                    {(1, 1): "first_shown_won_twice", (0, 0): "second_shown_won_twice"}.get(
                        (v, w), "out"
                    )
                ] += 1
            points[i].append((v + 1 - w) / 2)
            points[j].append((w + 1 - v) / 2)

        read = [verdicts.get(r, "failed") for r in requests.values()]
        lost = {"failed": read.count("failed"), "unreadable": read.count(None)}
        out = len(read) - sum(lost.values())
        if read and not out:
            raise Stop(
                f"{self.args.judge_url}: not one of {len(read)} replies can be read. The last: {self.last!r}"
            )
        self.counts = {
            "judge_replies": {"in": len(read), "out": out, "dropped": lost},
            # Position bias: how many pairs went both times to the same place, not to the same
            # answer.
            "judge_pairs": {"in": places.total(), "out": places.pop("out", 0), "dropped": places},
        }
        return [
            sum(points[k]) / len(points[k]) if points[k] else "no_judge_verdict"
            for k in range(len(answers))
        ]

    def request(self, a: Answer, b: Answer) -> str:
        turns = a.row["prompt"]
        if isinstance(turns, list):
            alone = len(turns) == 1
            turns = "\n\n".join(
                t["content"] if alone else f"{t['role']}: {t['content']}" for t in turns
            )
        parts = {"prompt": turns, "answer_a": a.text, "answer_b": b.text}
        return re.sub(r"\{(prompt|answer_a|answer_b)\}", lambda found: parts[found[1]], self.prompt)

    def ask(self, requests: list[str]) -> dict[str, float | None]:
        """The verdict on each request: None where the reply cannot be read, no entry where there
        was no reply.
        """
        url, model, longest = self.args.judge_url, self.args.judge_model, self.args.judge_max_tokens
        keys = {r: hashlib.sha256(repr((model, longest, r)).encode()).hexdigest() for r in requests}
        new = [(r, key) for r, key in keys.items() if key not in self.verdicts]
        if len(new) > self.budget:
            raise Stop(
                f"--judge_max_requests {self.args.judge_max_requests}: {len(self.verdicts)} replies are paid for, and "
                f"the next rows take {len(new)} more. Raise it and run the same command again: all replies are kept."
            )
        self.budget -= len(new)
        try:
            asyncio.run(self.ask_all(new))
        except self.openai.APIStatusError as e:
            if e.status_code == 404:
                raise Stop(f"{url}: no such endpoint, or no model {model} there ({e}).") from None
            # The text of the others may quote the key.
            raise Stop(f"{url}: refused the key ({e.status_code}). Set OPENAI_API_KEY.") from None
        return {r: self.verdicts[key] for r, key in keys.items() if key in self.verdicts}

    async def ask_all(self, new: list[tuple[str, str]]) -> None:
        # The client itself repeats what is worth it (429, 5xx, lost connections), and waits longer
        # each time.
        client = self.openai.AsyncOpenAI(
            base_url=self.args.judge_url, max_retries=5,
            # a local server wants none, the client wants a word
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            http_client=self.openai.DefaultAsyncHttpxClient(event_hooks={"request": [self.wait_for_turn]}),
        )  # fmt: skip
        free = asyncio.Semaphore(self.args.judge_concurrency)

        async def ask_one(request: str, key: str) -> None:
            async with free:
                try:
                    self.last = await self.reply(client, request)
                except self.openai.APIError as e:
                    if getattr(e, "status_code", None) in (401, 403, 404):
                        raise  # so it would be for all
                    self.last = str(e)
                    return
            self.file.write(dump({"key": key, "reply": self.last}))
            self.verdicts[key] = verdict(self.last)

        async with client:
            await asyncio.gather(*(ask_one(*request) for request in new))

    async def wait_for_turn(self, _) -> None:
        """Called before every request that leaves, so that repeated ones count, too."""
        now = time.monotonic()
        self.next = max(self.next, now) + self.pause
        await asyncio.sleep(self.next - self.pause - now)

    async def reply(self, client, request: str) -> str:
        messages = [{"role": "user", "content": request}]
        while True:
            try:
                answer = await client.chat.completions.create(
                    model=self.args.judge_model,
                    messages=messages,
                    **(asked := dict(self.parameters)),
                )
                return answer.choices[0].message.content or ""
            except self.openai.BadRequestError as e:
                # Reasoning models know max_tokens by another name, and have a temperature of their
                # own.
                refused = [
                    name
                    for name in ("temperature", "max_tokens")
                    if name in asked and name in str(e)
                ]
                if not refused or "support" not in str(e).lower():
                    raise
                self.parameters.pop(refused[0], None)
                if refused[0] == "max_tokens":
                    self.parameters["max_completion_tokens"] = self.args.judge_max_tokens


def verdict(reply: str) -> float | None:
    """v(a, b) of a reply that ends in "Verdict: A", or is that one word; None when it says neither."""
    said = re.findall(
        r"(?:(?i:verdict)\W+|\A\W*)(A|B|(?i:tie))\W*$", reply.split("</think>")[-1], re.MULTILINE
    )
    return {"A": 1.0, "B": 0.0}.get(said[-1], 0.5) if said else None


if __name__ == "__main__":
    run(main)
