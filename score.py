"""Give every candidate a reward: from reward models, Python functions, an LLM judge, or any mixture of them.

    python score.py --candidates candidates.jsonl --output scored.jsonl \\
        --reward_model Skywork/Skywork-Reward-V2-Qwen3-8B
    torchrun --nproc_per_node 8 score.py …                               one GPU a rank; the same file comes out
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 score.py …
    python score.py … --reward_model rm=PATH --reward_fn gold=demo/gold.py:gold --reward_weights gold=0
    python score.py … --judge_url http://localhost:8000/v1 --judge_model Qwen/Qwen3-32B

Each candidate y of a prompt x gains "rewards", a number from each of them, and "reward", what pairs are made of:

    reward(x, y) = sum_k weight_k * rewards_k(x, y) - missing_eos_penalty * [y was cut off by the token limit]

A weight of 0 watches: the number is written down and decides nothing. With --ref_model, "ref_logprobs" holds
log p_ref(y | x) at temperature 1, summed over the tokens, from which the KL to that model is estimated. Rows keep
their order and everything else that is in them.

What one has to get right, because each was wrong somewhere in the field:

  - The reward model sees its own chat template, tokenised once (no second BOS), and the whole text that is trained
    on: an answer longer than the model can read is dropped and counted, never cut.
  - A score is the same alone and in a batch. transformers reads it off the last token that differs from
    pad_token_id, whatever the attention mask says, so a model without a pad token cannot be batched, and one that is
    given EOS for it loses its last token. See `reward_batch`; the first answer is checked at every start.
  - Several candidate files (two policies, say) are joined by id, never by position.
  - NaN and infinity stop the run and name the place. Whatever has no score is dropped under a name.

Memory does not grow with the rows: every model is loaded once and stays, and the rows pass through all of them part
by part, so that a kill costs one part. Models that do not fit side by side take turns: score the first run's output
again; its rewards are kept beside the new ones, and "reward" is the sum over the last run's.
"""

import hashlib
import importlib.util
import json
import os
import re
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, groupby
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from kernels.attention import attention_implementation
from kernels.logprob import linear_logprob, lm_head
from records import CANDIDATES, Stage, Stop, count_rows, dump, finite, parse, parser, read_jsonl, run

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# How far a score may move, absolutely and relatively, when its neighbours in the batch change. Rounding alone moves
# it by 1e-6 in fp32; in bf16, with 8 bits a number, by some hundredths; a wrong mask as far as two answers differ.
TOLERANCE = {"bf16": (0.25, 0.01), "fp32": (1e-3, 1e-5)}


def arguments():
    p = parser(__doc__)
    # Files
    p.add_argument("--candidates", nargs="+", required=True, help="candidates.jsonl; several are merged by id")
    p.add_argument("--output", required=True, help="scored.jsonl")
    # What judges: any of the three, several at once, each with a name in "rewards"
    p.add_argument(
        "--reward_model", nargs="+", action="extend", default=[], metavar="[NAME=]PATH",
        help="sequence classifier with one label, folder or hub name; called rm, where several by its folder",
    )  # fmt: skip
    p.add_argument(
        "--reward_fn", nargs="+", action="extend", default=[], metavar="[NAME=]FILE.py:FUNCTION",
        help="function(prompt, response, meta) -> float; prompt as in the file, response a string",
    )  # fmt: skip
    p.add_argument("--judge_url", help="an OpenAI-compatible endpoint, http://…/v1; its key in OPENAI_API_KEY")
    p.add_argument("--judge_model", help="the model's name at that endpoint")
    p.add_argument("--judge_prompt", help="text file with {prompt}, {answer_a}, {answer_b}; default: see JUDGE_PROMPT")
    p.add_argument("--judge_max_tokens", type=int, help="length of a reply; default 512: room for a short reason")
    p.add_argument("--judge_concurrency", type=int, help="requests in flight per rank: the rate limit; default 16")
    p.add_argument("--judge_max_requests", type=int, help="budget: replies paid for, restarts included; default: none")
    # What is made of it
    p.add_argument(
        "--reward_weights", nargs="+", metavar="[NAME=]WEIGHT",
        help="by name (gold=0), the others 1; or one each in the order models, functions, judge. 0 = watch only",
    )  # fmt: skip
    p.add_argument("--missing_eos_penalty", type=float, default=0.0, help="taken off a cut-off answer; default 0")
    p.add_argument(
        "--strip_reasoning", action="store_true",
        help="show the rewards only what follows </think>; token_ids, and so training, keep all of it",
    )  # fmt: skip
    p.add_argument(
        "--ref_model", nargs="+", action="extend", default=[], metavar="[NAME=]PATH", help="adds log p(answer) under it"
    )
    # How the models run
    p.add_argument(
        "--chat_template_kwargs", nargs="+", metavar="KEY=JSON", help="for the reward models' chat templates"
    )
    p.add_argument("--max_length", type=int, help="tokens of prompt and answer; default: all that the model can read")
    p.add_argument(
        "--tokens_per_batch", type=int,
        help="padded tokens in a forward pass; default 16384 fills a GPU; halved where memory does not suffice",
    )  # fmt: skip
    p.add_argument("--dtype", choices=("auto", "bf16", "fp32"), help="default auto: bf16 on a GPU, fp32 without one")
    return p


def resolve(args) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Refuse what contradicts itself, fill in defaults, give names: {name: path} of models, functions, references."""
    of_judge = [flag for flag in vars(args) if flag.startswith("judge_") and flag != "judge_url"]
    of_models = ["max_length", "tokens_per_batch", "dtype"]
    for flags, chosen, needs in (
        (of_models, args.reward_model or args.ref_model, "--reward_model or --ref_model"),
        (["chat_template_kwargs"], args.reward_model, "--reward_model"),
        (of_judge, args.judge_url, "--judge_url"),
    ):
        for flag in flags:
            value = getattr(args, flag)
            if value is not None and not chosen:
                raise Stop(f"--{flag} has no effect without {needs}.")
            if isinstance(value, int) and value < 1:
                raise Stop(f"--{flag} starts at 1.")
    if args.judge_url and not args.judge_model:
        raise Stop("--judge_url needs --judge_model, the name under which the server offers its model.")
    if "@" in (args.judge_url or ""):
        raise Stop("--judge_url holds credentials, which would end up in logs. Put the key into OPENAI_API_KEY.")

    models = named(args.reward_model, lambda path: "rm" if len(args.reward_model) == 1 else Path(path).name)
    functions = named(args.reward_fn, lambda spec: spec.rpartition(":")[2])
    references = named(args.ref_model, lambda path: "ref" if len(args.ref_model) == 1 else Path(path).name)
    names = [*models, *functions, *["judge"] * bool(args.judge_url)]
    if not names:
        raise Stop("nothing to score with: give --reward_model, --reward_fn or --judge_url.")
    if len(set(names)) < len(names):
        raise Stop(f"two rewards share a name among {', '.join(names)}. Tell them apart: NAME=….")
    args.reward_weights = weights(args.reward_weights or [], names)
    if models or references:
        args.tokens_per_batch = args.tokens_per_batch or 16384
        if args.dtype in (None, "auto"):
            args.dtype = "bf16" if torch.cuda.is_available() else "fp32"
    if args.judge_url:
        args.judge_max_tokens = args.judge_max_tokens or 512
        args.judge_concurrency = args.judge_concurrency or 16

    # Models and files are inputs, known by their content; what else of them decides the result is recorded here.
    args.rewards, args.references = names, list(references)
    args.functions = [spec.rpartition(":")[2] for spec in functions.values()]
    return models, functions, references


def weights(given: list[str], names: list[str]) -> list[float]:
    """--reward_weights as one number a reward: ["gold=0"] or ["1", "0"] of ["rm", "gold"] -> [1.0, 0.0]."""
    by_name = dict(w.split("=", 1) for w in given if "=" in w)
    if not by_name and given and len(given) != len(names):
        raise Stop(f"{len(given)} --reward_weights for {len(names)} rewards: {', '.join(names)}.")
    if by_name and (len(by_name) < len(given) or not by_name.keys() <= set(names)):
        raise Stop(f"--reward_weights {' '.join(given)}: by name, all of them, or by place; names: {', '.join(names)}.")
    try:
        return [float(by_name.get(name, 1)) for name in names] if by_name or not given else list(map(float, given))
    except ValueError:
        raise Stop(f"--reward_weights {' '.join(given)}: not a number.") from None


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


def key_value(pair: str) -> tuple[str, object]:
    key, equals, value = pair.partition("=")
    if not equals:
        raise Stop(f"--chat_template_kwargs {pair}: write KEY=VALUE, the value as JSON or as a plain word.")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


@dataclass
class Answer:
    """A candidate on its way through the rewards."""

    row: dict
    index: int  # in the input's row
    candidate: dict
    text: str  # what the rewards see
    values: dict[str, dict[str, float]] = field(default_factory=lambda: {"rewards": {}, "ref_logprobs": {}})
    dropped: str | None = None  # why

    def __str__(self):
        return f'row id "{self.row["id"]}", candidate {self.index}'


# ----------------------------------------------------------------------------------------------------
# Models. Each reward, here and below, takes a list of answers; each gets a number, or a word: why it has none


@dataclass
class Model:
    path: str
    network: nn.Module
    tokenizer: object  # a reward model's own
    head: dict | None  # a reference's, as linear_logprob takes it
    limit: int  # tokens it reads
    budget: int  # padded tokens a forward
    tolerance: tuple[float, float] | None  # None once `in_batches` has seen that a padded batch changes nothing

    def __post_init__(self):
        self.config = self.network.config.get_text_config()
        self.pad = self.config.pad_token_id  # as its makers left it


def load(path: str, kind, args, device) -> Model:
    """A reward model (kind AutoModelForSequenceClassification) or a reference (AutoModelForCausalLM)."""
    scores, tokenizer, head = kind is AutoModelForSequenceClassification, None, None
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if kind.__name__ in (getattr(config, "auto_map", None) or {}):
            raise ValueError("it asks for trust_remote_code")
        if scores and config.num_labels != 1:
            raise Stop(
                f"{path}: has {config.num_labels} labels; a reward model has one, whose logit is the reward. (A plain "
                "language model counts as two.) Take a one-label model such as Skywork-Reward-V2, or put this one "
                "behind a --reward_fn that makes one number of its outputs."
            )
        if scores:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        network, report = kind.from_pretrained(
            path, dtype=DTYPES[args.dtype], attn_implementation=attention_implementation(config),
            trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
        network = network.to(device).eval()
        if not scores:
            head = lm_head(network)
    except (OSError, ValueError, KeyError, ImportError) as e:
        remedy = "Check the path: a folder with config.json, weights and tokenizer, or a name on the hub."
        if "trust_remote_code" in str(e):
            remedy = "Code that comes with a model is not run here: call the model from a --reward_fn of your own."
        raise Stop(f"{path}: cannot be loaded ({e}). {remedy}") from None
    if lost := report["missing_keys"] | report["mismatched_keys"]:
        raise Stop(f"{path}: its files hold no weights for {', '.join(sorted(map(str, lost)))}, so it would be random.")
    if scores and isinstance(getattr(network, "score", None), nn.Linear):
        # The last product in fp32: in bf16 a reward near 10 moves in steps of 1/16, and steps make ties.
        network.score.float()
        network.score.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    network.config.use_cache = False
    limit = args.max_length or getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    return Model(path, network, tokenizer, head, limit, args.tokens_per_batch, TOLERANCE[args.dtype])


@torch.inference_mode()
def in_batches(m: Model, alone: Callable, batch: Callable, items: list, lengths: list[int], too_long: str) -> list:
    """batch(m, items), some at a time, in the order of `items`; `too_long` for those beyond the model's limit.

    A batch holds items of like length, so that hardly anything in it is padding, and as many as the budget allows.
    """
    values: list[float | str] = [too_long] * len(items)
    # Longest first: what does not fit into memory shows at once, not after an hour.
    order = sorted((i for i, n in enumerate(lengths) if n <= m.limit), key=lambda i: -lengths[i])

    short = order[-1] if order else None
    longer = next((i for i in reversed(order) if lengths[i] > lengths[short]), None)
    if m.tolerance and longer is not None:
        one, beside = alone(m, items[short]), batch(m, [items[longer], items[short]])[1]
        if abs(one - beside) > m.tolerance[0] + m.tolerance[1] * abs(one):
            raise Stop(
                f"{m.path}: one sequence gets {one:.6g} alone and {beside:.6g} in a padded batch, so its scores would "
                "depend on their neighbours. Score with it one by one, from a --reward_fn of your own."
            )
        m.tolerance = None

    while order:
        longest = max(1, lengths[order[0]])
        chosen = order[: max(1, m.budget // longest)]
        try:
            results = batch(m, [items[i] for i in chosen])
        except torch.OutOfMemoryError:
            if len(chosen) == 1:
                raise Stop(f"{m.path}: one sequence of {longest} tokens is too much. Lower --max_length.") from None
            m.budget = len(chosen) // 2 * longest
            torch.cuda.empty_cache()
            print(f"{m.path}: out of memory: {m.budget} tokens a batch from here on", file=sys.stderr)
            continue
        for i, value in zip(chosen, results, strict=True):
            values[i] = value
        order = order[len(chosen) :]
    return values


def right_padded(sequences: list[list[int]], pad: int, device) -> dict[str, torch.Tensor]:
    width = max(map(len, sequences))
    ids = torch.tensor([s + [pad] * (width - len(s)) for s in sequences], device=device)  # [B, T]
    lengths = torch.tensor([len(s) for s in sequences], device=device)  # [B]
    return {"input_ids": ids, "attention_mask": (torch.arange(width, device=device) < lengths[:, None]).long()}


def reward_model(m: Model, template: dict, answers: list[Answer]) -> list[float | str]:
    sequences = [reward_tokens(m, template, a) for a in answers]
    lengths = [len(s) for s in sequences]
    return in_batches(m, reward_alone, reward_batch, sequences, lengths, "too_long_for_reward_model")


def reward_tokens(m: Model, template: dict, a: Answer) -> list[int]:
    """Prompt and answer as the reward model was trained to see them."""
    prompt = a.row["prompt"]
    if isinstance(prompt, str):
        ids = m.tokenizer(prompt + a.text)["input_ids"]
        return ids[1:] if ids[:2] == [m.tokenizer.bos_token_id] * 2 else ids  # the text had a BOS of its own
    if m.tokenizer.chat_template is None:
        raise Stop(
            f"{m.path}: its tokenizer has no chat template, but {a} answers a conversation. Save the template that "
            "the reward model was trained with as chat_template.jinja in its folder."
        )
    turns = [*prompt, {"role": "assistant", "content": a.text}]
    try:
        return m.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **template)["input_ids"]
    except TemplateError as e:
        raise Stop(f"{m.path}: its chat template refuses {a}: {e}") from None


def reward_alone(m: Model, sequence: list[int]) -> float:
    """The definition: one sequence, no padding, the configuration as it came."""
    m.config.pad_token_id = m.pad
    return m.network(torch.tensor([sequence], device=m.network.device)).logits[0, 0].item()


def reward_batch(m: Model, sequences: list[list[int]]) -> list[float]:
    """transformers takes the logit at the last token that is not pad_token_id; it never asks the attention mask.

    So right padding with the model's own pad token changes nothing. A model without one is scored at its very last
    token, whatever that is: the batch is padded with an id that none of its sequences ends in.
    """
    ends = {s[-1] for s in sequences}
    pad = m.pad if m.pad is not None else next(i for i in range(len(ends) + 1) if i not in ends)
    m.config.pad_token_id = pad
    logits = m.network(**right_padded(sequences, pad, m.network.device)).logits  # [B, 1]
    return logits[:, 0].float().tolist()


def reference_model(m: Model, answers: list[Answer]) -> list[float | str]:
    """log p(answer | prompt), both as the token ids that the generator wrote."""
    for a in answers:
        if not a.row["prompt_token_ids"]:
            raise Stop(f"{a}: prompt_token_ids is empty: nothing precedes the first token of the answer.")
    items = [(a.row["prompt_token_ids"], a.candidate["token_ids"]) for a in answers]
    lengths = [len(prompt) + len(answer) for prompt, answer in items]
    return in_batches(m, reference_alone, reference_batch, items, lengths, "too_long_for_ref_model")


def reference_alone(m: Model, item: tuple[list[int], list[int]]) -> float:
    """The definition, from the model's own logits."""
    prompt, answer = item
    ids = torch.tensor([prompt + answer], device=m.network.device)  # [1, T]
    logits = m.network(ids).logits[0, len(prompt) - 1 : -1]  # [|y|, V]: the state before a token predicts it
    return logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum().item()


def reference_batch(m: Model, items: list[tuple[list[int], list[int]]]) -> list[float]:
    inputs = right_padded([prompt + answer for prompt, answer in items], 0, m.network.device)
    hidden = m.network.base_model(**inputs)[0]  # [B, T, D]
    predicts = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)  # [B, T]
    for i, (prompt, answer) in enumerate(items):
        predicts[i, len(prompt) - 1 : len(prompt) - 1 + len(answer)] = True
    targets = torch.tensor([t for _, answer in items for t in answer], dtype=torch.long, device=hidden.device)
    logprobs = linear_logprob(hidden[predicts], targets=targets, **m.head)  # [sum of |y|] fp32
    return [part.double().sum().item() for part in logprobs.split([len(answer) for _, answer in items])]


# ----------------------------------------------------------------------------------------------------
# Functions


def load_function(spec: str) -> Callable:
    file, _, name = spec.rpartition(":")
    if not os.path.isfile(file):
        raise Stop(f"--reward_fn {spec}: no such file. It is written FILE.py:FUNCTION.")
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(Path(file).stem, file))
    sys.path.append(str(Path(file).resolve().parent))  # so that it may import what stands beside it
    try:
        module.__spec__.loader.exec_module(module)
    except Exception as e:
        raise Stop(f"{place(e, file)}: {type(e).__name__}: {e}, on importing it for --reward_fn {spec}.") from e
    if not callable(getattr(module, name, None)):
        raise Stop(f"{file}: has no function {name}. Write one: {name}(prompt, response, meta) -> float.")
    return getattr(module, name)


def reward_function(function: Callable, spec: str, answers: list[Answer]) -> list[float]:
    values = []
    for a in answers:
        try:
            values.append(float(function(a.row["prompt"], a.text, a.row.get("meta") or {})))
        except Exception as e:
            raise Stop(
                f"{place(e, spec.rpartition(':')[0])}: {type(e).__name__}: {e}, in --reward_fn {spec} on {a}. It must "
                "return one number for every answer."
            ) from e
    return values


def place(e: Exception, file: str) -> str:
    """file:line, the line being the last that ran in the user's own file."""
    frames = traceback.extract_tb(e.__traceback__)
    lines = [f.lineno for f in frames if os.path.abspath(f.filename) == os.path.abspath(file)]
    return f"{file}:{lines[-1]}" if lines else file


# ----------------------------------------------------------------------------------------------------
# The work


def merge(paths: list[str], stage: Stage) -> tuple[int, Iterator[dict]]:
    """(number of rows, the rows). Several files are joined by id; only ids and byte offsets are held in memory.

    The first file's keys win where files disagree; prompts must not, in words or in token ids.
    """
    totals = [count_rows(path, CANDIDATES) for path in paths]
    if len(paths) == 1:
        return totals[0], read_jsonl(paths[0], CANDIDATES)

    places: dict[str, list[tuple[str, int, int]]] = {}  # id -> (file, line, byte), ids in order of appearance
    for path in paths:
        with open(path, "rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                places.setdefault(json.loads(line)["id"], []).append((path, number, offset))
                offset += len(line)
    whole = sum(len(p) == len(paths) for p in places.values())
    stage.count("ids", len(places), whole, {"kept_though_in_some_files_only": len(places) - whole})

    def rows() -> Iterator[dict]:
        files = {path: open(path, "rb") for path in paths}
        for id, found in places.items():
            row, first = None, found[0]
            for path, number, offset in found:
                files[path].seek(offset)
                other = json.loads(files[path].readline())
                if row is None:
                    row = other
                    continue
                for key in ("prompt", "prompt_token_ids"):
                    if row[key] != other[key]:
                        raise Stop(
                            f'{path}:{number}: id "{id}": {key} differs from {first[0]}:{first[1]}. Candidates of '
                            "different prompts cannot be merged: generate both files from one prompts.jsonl."
                        )
                row["candidates"] += other["candidates"]
            yield row

    return len(places), rows()


def score_part(rows: list[dict], scorers: list[tuple[str, str, Callable]], args) -> dict:
    """Score the candidates of `rows`, in place; what has no score leaves its row. Returns the balance."""
    answers = [Answer(row, i, c, shown(c["text"], args)) for row in rows for i, c in enumerate(row["candidates"])]
    for kind, name, scorer in scorers:
        left = [a for a in answers if not a.dropped]
        for a, value in zip(left, scorer(left), strict=True):
            if isinstance(value, str):
                a.dropped = value
            else:
                a.values[kind][name] = finite(value, f'{a}, {kind} "{name}"')

    for row in rows:
        row["candidates"] = []
    for a in answers:
        if a.dropped:
            continue
        for kind, values in a.values.items():
            if values:
                a.candidate[kind] = a.candidate.get(kind, {}) | values
        weighted = [w * a.values["rewards"][name] for name, w in zip(args.rewards, args.reward_weights, strict=True)]
        cut_off = a.candidate["finish_reason"] != "stop"
        a.candidate["reward"] = finite(sum(weighted) - args.missing_eos_penalty * cut_off, f"{a}, reward")
        a.row["candidates"].append(a.candidate)
    dropped = Counter(a.dropped for a in answers if a.dropped)
    return {
        "rows": {"in": len(rows), "out": len(rows), "dropped": {}},
        "candidates": {"in": len(answers), "out": len(answers) - dropped.total(), "dropped": dropped},
    }


def shown(text: str, args) -> str:
    return text.split("</think>", 1)[-1].lstrip() if args.strip_reasoning else text


def main():
    args = parse(arguments())
    models, functions, references = resolve(args)
    functions = {name: (load_function(spec), spec) for name, spec in functions.items()}
    stage = Stage(
        args,
        {
            "candidates": args.candidates,
            "reward_model": list(models.values()),
            "reward_fn": [spec.rpartition(":")[0] for _, spec in functions.values()],
            "ref_model": list(references.values()),
            "judge_prompt": args.judge_prompt,
        },
        args.output,
        free=("tokens_per_batch", "judge_url", "judge_concurrency", "judge_max_requests"),
    )
    total, rows = merge(args.candidates, stage)

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    judge = Judge(args, stage) if args.judge_url else None
    template = dict(key_value(pair) for pair in args.chat_template_kwargs or [])
    scorers = []  # (key in the candidate, name there, function); the judge is asked last, as it costs most
    for name, path in models.items():
        m = load(path, AutoModelForSequenceClassification, args, device)
        for key in template:
            if key not in str(m.tokenizer.chat_template):
                raise Stop(f"--chat_template_kwargs {key}: the chat template of {path} never reads it.")
        scorers.append(("rewards", name, partial(reward_model, m, template)))
    for name, path in references.items():
        scorers.append(("ref_logprobs", name, partial(reference_model, load(path, AutoModelForCausalLM, args, device))))
    for name, (function, spec) in functions.items():
        scorers.append(("rewards", name, partial(reward_function, function, spec)))
    if judge:
        scorers.append(("rewards", "judge", judge))

    done, start = 0, time.time()
    for index, part in stage.todo(rows):
        counts = score_part(part, scorers, args)
        stage.write_part(index, part, counts | (judge.counts if judge else {}))
        done += counts["candidates"]["out"]
        speed = done / (time.time() - start)
        print(f"{args.output}: part {index + 1}, {total:,} rows in all, {speed:.1f} answers/s", file=sys.stderr)
    stage.join(total)


# ----------------------------------------------------------------------------------------------------
# The judge: a language model compares two answers at a time, each pair in both orders
#
# With v(a, b) = 1 where the first shown of two answers wins, 0 where the second does and 1/2 for a tie, a candidate's
# score is its win rate, free of the judge's preference for a place:
#
#     score_i = mean over opponents j of [v(i, j) + 1 - v(j, i)] / 2
#
# Opponents are all others among up to 4 candidates; above that the two neighbours on either side in a ring, as
# comparisons grow with the square of N and what they add does not. Answers of the same text tie without asking.
# A pair of which one order has failed is left out: half a comparison carries the bias that the other half removes.
# The prompt is in the manner of OAIF (arXiv:2402.04792), which reads off the probability of the first token; a
# reply in words is what every server can give, so that is what is read here.

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


class Judge:
    """Calling it scores answers; `counts` then tells of that call what was asked and whether the order mattered."""

    def __init__(self, args, stage: Stage):
        import openai

        self.args, self.openai = args, openai
        self.prompt = JUDGE_PROMPT
        if args.judge_prompt:
            self.prompt = Path(args.judge_prompt).read_text(encoding="utf-8")
            for name in ("{prompt}", "{answer_a}", "{answer_b}"):
                if name not in self.prompt:
                    raise Stop(f"{args.judge_prompt}: {name} does not occur in it, so the judge would not see it.")
        # The client itself repeats what is worth it (429, 5xx, lost connections), and waits longer each time.
        key = os.environ.get("OPENAI_API_KEY") or "none"  # a local server wants none, the client wants a word
        self.client = openai.OpenAI(base_url=args.judge_url, api_key=key, max_retries=5)
        self.counts: dict[str, dict] = {}
        self.last = ""  # the last reply or failure, for the message when nothing works

        # No reply is paid for twice: each rank appends to a file of its own, all ranks read all files at a start.
        self.verdicts: dict[str, float | None] = {}  # hash of the request -> v(a, b), None where it cannot be read
        own = stage.output.with_name(f"{stage.output.name}.judge.{stage.rank}.jsonl")
        for path in sorted(own.parent.iterdir()):
            if path.name.startswith(f"{stage.output.name}.judge."):
                lines, _, torn = path.read_bytes().rpartition(b"\n")
                for reply in map(json.loads, lines.splitlines()):
                    self.verdicts[reply["key"]] = verdict(reply["reply"])
                if torn and path == own:  # the line a kill cut short
                    os.truncate(path, len(lines) + 1 if lines else 0)
        self.file = open(own, "a", encoding="utf-8", errors="backslashreplace")
        self.budget = sys.maxsize
        if args.judge_max_requests is not None:
            self.budget = max(0, args.judge_max_requests - len(self.verdicts)) // stage.world

    def __call__(self, answers: list[Answer]) -> list[float | str]:
        pairs: list[tuple[int, int]] = []
        for _, group in groupby(range(len(answers)), lambda k: id(answers[k].row)):
            g = list(group)
            ring = ((g[k], g[(k + step) % len(g)]) for k in range(len(g)) for step in (1, 2))
            pairs += combinations(g, 2) if len(g) <= 4 else ring
        requests = {
            (i, j): self.request(answers[i], answers[j])
            for pair in pairs
            for i, j in (pair, pair[::-1])
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
                places[{(1, 1): "first_shown_won_twice", (0, 0): "second_shown_won_twice"}.get((v, w), "out")] += 1
            points[i].append((v + 1 - w) / 2)
            points[j].append((w + 1 - v) / 2)

        read = [verdicts.get(r, "failed") for r in requests.values()]
        lost = {"failed": read.count("failed"), "unreadable": read.count(None)}
        if requests and sum(lost.values()) == len(requests):
            raise Stop(
                f"{self.args.judge_url}: not one of {len(requests)} replies can be read. The last: {self.last!r}"
            )
        self.counts = {
            "judge_replies": {"in": len(requests), "out": len(requests) - sum(lost.values()), "dropped": lost},
            # Position bias: how many pairs went both times to the same place, not to the same answer.
            "judge_pairs": {"in": places.total(), "out": places.pop("out", 0), "dropped": places},
        }
        return [sum(points[k]) / len(points[k]) if points[k] else "no_judge_verdict" for k in range(len(answers))]

    def request(self, a: Answer, b: Answer) -> str:
        turns = a.row["prompt"]
        if isinstance(turns, list):
            alone = len(turns) == 1
            turns = "\n\n".join(t["content"] if alone else f"{t['role']}: {t['content']}" for t in turns)
        parts = {"prompt": turns, "answer_a": a.text, "answer_b": b.text}
        return re.sub(r"\{(prompt|answer_a|answer_b)\}", lambda found: parts[found[1]], self.prompt)

    def ask(self, requests: list[str]) -> dict[str, float | None]:
        """The verdict on each request: None where the reply cannot be read, no entry where there was no reply."""
        model, longest = self.args.judge_model, self.args.judge_max_tokens
        keys = {r: hashlib.sha256(repr((model, longest, r)).encode()).hexdigest() for r in requests}
        new = [r for r, key in keys.items() if key not in self.verdicts]
        if len(new) > self.budget:
            raise Stop(
                f"--judge_max_requests {self.args.judge_max_requests}: {len(self.verdicts)} replies are paid for, and "
                f"the next part of the rows takes {len(new)} more. Raise it and run the same command again: finished "
                "parts and replies are kept."
            )
        self.budget -= len(new)

        def reply(request: str) -> str:
            messages = [{"role": "user", "content": request}]
            answer = self.client.chat.completions.create(
                model=model, messages=messages, max_tokens=longest, temperature=0
            )
            return answer.choices[0].message.content or ""

        pool = ThreadPoolExecutor(self.args.judge_concurrency)
        try:
            waiting = {pool.submit(reply, r): keys[r] for r in new}
            for future in as_completed(waiting):
                try:
                    self.last = future.result()
                except self.openai.APIError as e:
                    code = getattr(e, "status_code", None)
                    if code in (401, 403):  # its text may quote the key
                        raise Stop(f"{self.args.judge_url}: refused the key ({code}). Set OPENAI_API_KEY.") from None
                    if code == 404:
                        raise Stop(
                            f"{self.args.judge_url}: no such endpoint, or no model {model} there ({e})."
                        ) from None
                    self.last = str(e)
                    continue
                self.file.write(dump({"key": waiting[future], "reply": self.last}))
                self.file.flush()
                self.verdicts[waiting[future]] = verdict(self.last)
        finally:
            pool.shutdown(cancel_futures=True)
        return {r: self.verdicts[key] for r, key in keys.items() if key in self.verdicts}


def verdict(reply: str) -> float | None:
    """v(a, b) of a reply that ends in "Verdict: A", or is that one word; None when it says neither."""
    said = re.findall(r"(?:(?i:verdict)\W+|\A\W*)(A|B|(?i:tie))\W*$", reply.split("</think>")[-1], re.MULTILINE)
    return {"A": 1.0, "B": 0.0}.get(said[-1], 0.5) if said else None


if __name__ == "__main__":
    run(main)
