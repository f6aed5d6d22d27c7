"""Give every candidate a reward: from reward models, Python functions, or any mixture of them.

    python score.py --candidates candidates.jsonl --output scored.jsonl \\
        --reward_model Skywork/Skywork-Reward-V2-Qwen3-8B
    python score.py … --reward_model PATH --reward_fn gold=demo/gold.py:gold --reward_weights gold=0
    torchrun --nproc_per_node 8 score.py …             one GPU per rank; the same file comes out
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 score.py …

Each candidate y of a prompt x gains "rewards", one number per model or function, and "reward", by
which pairs are made:

    reward(x, y) = sum_k weight_k * rewards_k(x, y) - missing_eos_penalty * cut_off(y)

where cut_off(y) is 1 if the token limit ended the answer, else 0. A reward with weight 0 is only
watched: it is recorded and decides nothing. With --ref_model, "ref_logprobs" holds
log p_ref(y | x), the log-prob of the answer at temperature 1, from which the KL to that model is
estimated. Rows keep their order and everything else that is in them.

A Python function sees one answer at a time, or, if its second parameter is called `responses`, all
answers to a prompt at once (docs/usage.md has an example of each).

A language model that compares answers is a stage of its own, judge.py: it adds its reward to those
in scored.jsonl. If only the judge decides and you want a reference, give --ref_model here without
any reward. Then rewards that the input has are kept; if it has none, "rewards" is empty and
"reward" is 0, less the penalty.

What has to be right, because each of these was wrong in some public project:

  - The reward model sees its own chat template (a prompt that is a string goes without one),
    tokenised once (no second BOS), and the whole text that is trained on: an answer longer than the
    model can read is dropped and counted, never cut.
  - A score is the same alone and in a batch. Answers are packed, not padded, and the prompt that
    they share is computed once for all of them. At every start the first batch is checked.
  - Several candidate files (of two policies, say) are joined by id, never by position.
  - NaN and infinity stop the run and name the place. A candidate without a score is dropped, and
    counted by reason.

Memory does not grow with the rows: every model is loaded once and stays, and the rows pass through
all models part by part, so that a kill costs one part. Models that do not fit into memory together
can run one after another: score the first run's output again, with another NAME=. The first run's
rewards are kept beside the new ones, but only watched: "reward" is the sum over the last run's.
"""

import copy
import functools
import importlib.util
import inspect
import os
import re
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import ClassVar, NamedTuple

# Batches differ in size, which would fragment the GPU's free memory. torch reads this when it is
# imported. If the user has set it, under this name or the old one, that value is used.
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
from arguments import float_of, integer_in, key_values, number_in, parse, parser
from candidates import Answer, answers_of, drop_unscored, merge_by_id
from kernels.attention import (
    ATTENTION,
    attention_implementation,
    packing_refusal,
    positions,
    prefix_layout,
)
from kernels.logprob import backbone, linear_logprob, lm_head, logprob_from_logits
from records import CANDIDATES, Stop, finite
from stage import Stage, run, seconds_since

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# How far a score may move, absolutely and relatively, when its neighbours in the batch change.
# Rounding alone moves it by 1e-6 in fp32, and by some hundredths in bf16, which has 8 bits per
# number; a wrong mask moves it by as much as two answers differ.
TOLERANCE = {"bf16": (0.25, 0.01), "fp32": (1e-3, 1e-5)}


def arguments():
    p = parser(__doc__)
    add = p.add_argument

    # Files
    add("--candidates", nargs="+", required=True, help="candidates.jsonl; several are merged by id")
    add("--output", required=True, help="scored.jsonl")

    add_reward_arguments(p)
    add_model_arguments(p)
    return p


def add_reward_arguments(p) -> None:
    add = p.add_argument
    several = {"nargs": "+", "action": "extend"}

    # What gives numbers: several at once, each with a name
    add(
        "--reward_model",
        **several,
        default=[],
        metavar="[NAME=]PATH",
        help="sequence classifier with one label: folder or hub name[@revision]; its reward is "
        "called rm, or if there are several, each by the last part of its model's name",
    )
    add(
        "--reward_fn",
        **several,
        default=[],
        metavar="[NAME=]FILE.py:FUNCTION",
        help="NAME(prompt, response, meta) -> float, prompt as in the file, response a string; or "
        "NAME(prompt, responses, meta) -> list[float], called once per prompt with all its answers",
    )
    add(
        "--ref_model",
        **several,
        default=[],
        metavar="[NAME=]PATH",
        help="adds the log-prob of the answer under it: folder or hub name[@revision]",
    )

    # What is made of the rewards
    add(
        "--reward_weights",
        **several,
        metavar="[NAME=]WEIGHT",
        help="by name (gold=0; the others are 1), or one for each, models before functions. "
        "0: only watched",
    )
    add(
        "--missing_eos_penalty",
        type=number_in("[0, inf)"),
        default=0.0,
        help="subtracted if cut off; default 0",
    )
    add("--strip_reasoning", action="store_true", help="show rewards only what follows </think>")


def add_model_arguments(p) -> None:
    """How the models run."""
    add = p.add_argument
    add(
        "--chat_template_kwargs",
        nargs="+",
        metavar="KEY=JSON",
        help="for a reward model's template",
    )
    add(
        "--max_length",
        type=integer_in("[1, inf)"),
        help="tokens of prompt and answer; default: all a model can read",
    )
    add(
        "--tokens_per_batch",
        type=integer_in("[1, inf)"),
        help="in one forward pass; default 16384 to fill a GPU, 4096 to stay in a CPU's cache. "
        "Halved when memory runs out",
    )
    add("--dtype", choices=("auto", "bf16", "fp32"), help="default auto: bf16 on a GPU, else fp32")


# ---- what is asked for -------------------------------------------------------------------------


class Asked(NamedTuple):
    """Everything that gives each answer a number, by name."""

    reward_models: dict[str, str]  # name -> path
    references: dict[str, str]  # name -> path
    functions: dict[str, str]  # name -> FILE.py:FUNCTION


def resolve(args) -> Asked:
    """Refuse contradictions, give names to what has none, and fill in defaults."""
    asked = Asked(
        reward_models=name_models(args.reward_model, only="rm"),
        references=name_models(args.ref_model, only="ref"),
        functions=named(args.reward_fn, [function_name(spec) for spec in args.reward_fn]),
    )
    for spec in asked.functions.values():
        if ":" not in spec:
            raise Stop(f"--reward_fn {spec}: names no function. Write FILE.py:FUNCTION.")
    check_effect(args, asked)
    names = [*asked.reward_models, *asked.functions]
    if len(set(names)) < len(names):
        raise Stop(f"two rewards share a name among {', '.join(names)}. Tell them apart: NAME=….")

    if asked.reward_models or asked.references:
        gpu = torch.cuda.is_available()
        if args.tokens_per_batch is None:
            args.tokens_per_batch = 16384 if gpu else 4096
        if args.dtype in (None, "auto"):
            args.dtype = "bf16" if gpu else "fp32"

    # Models and files are inputs of the stage, which hashes them. Their names and weights decide
    # the result as well, and are recorded here.
    args.rewards = names
    args.reward_weights = weights(args.reward_weights or [], names)
    args.references = list(asked.references)
    args.functions = [function_name(spec) for spec in asked.functions.values()]
    return asked


def check_effect(args, asked: Asked) -> None:
    """Stop where there is nothing to do, and at a flag that would change nothing."""
    has_model = bool(asked.reward_models or asked.references)
    has_reward = bool(asked.reward_models or asked.functions)
    needs = [  # flag, whether what it needs is there, what it needs
        ("max_length", has_model, "--reward_model or --ref_model"),
        ("tokens_per_batch", has_model, "--reward_model or --ref_model"),
        ("dtype", has_model, "--reward_model or --ref_model"),
        ("chat_template_kwargs", bool(asked.reward_models), "--reward_model"),
        ("reward_weights", has_reward, "--reward_model or --reward_fn"),
        ("strip_reasoning", has_reward, "--reward_model or --reward_fn"),
    ]
    if not has_reward and not has_model:
        raise Stop("nothing to score with: give --reward_model, --reward_fn or --ref_model.")
    for flag, is_there, needed in needs:
        is_given = getattr(args, flag) not in (None, False)
        if is_given and not is_there:
            raise Stop(f"--{flag} has no effect without {needed}.")


def weights(given: list[str], names: list[str]) -> list[float]:
    """One weight per reward: ["gold=0"] or ["1", "0"], for ["rm", "gold"] -> [1.0, 0.0]."""
    wrong = Stop(
        f"--reward_weights {' '.join(given)}: NAME=WEIGHT, or one weight for each of "
        f"{', '.join(names)}."
    )
    by_place = not any("=" in word for word in given)
    if given and by_place:
        if len(given) != len(names):
            raise wrong
        given = [f"{name}={weight}" for name, weight in zip(names, given, strict=True)]

    found: dict[str, float] = {}
    for word in given:
        name, _, weight = word.partition("=")
        if name not in names or name in found:
            raise wrong
        value = float_of(weight)
        if value is None:
            raise wrong
        found[name] = value
    return [found.get(name, 1.0) for name in names]


def name_models(specs: list[str], only: str) -> dict[str, str]:
    """{name: path}. A single model is called `only`; several by the last parts of their names."""
    if len(specs) == 1:
        return named(specs, [only])
    return named(specs, [last_name(spec) for spec in specs])


def named(specs: list[str], default_names: list[str]) -> dict[str, str]:
    """["PATH", "NAME=PATH"] -> {name: path}; what comes without a name gets its default name."""
    found: dict[str, str] = {}
    for spec, default_name in zip(specs, default_names, strict=True):
        name, path = default_name, spec
        with_name = re.fullmatch(r"([\w.-]+)=(.*)", spec, re.DOTALL)
        if with_name and not os.path.exists(spec):  # a path may hold "=", too
            name, path = with_name.groups()
        if name in found:
            raise Stop(f"{found[name]} and {path} are both called {name}. Tell them apart: NAME=….")
        found[name] = path
    return found


def last_name(path: str) -> str:
    """The last part of a model's name: models/rm and ORG/rm@v1 are both rm."""
    repository, _ = models.split(path)
    return Path(repository).name


def function_name(spec: str) -> str:
    """demo/gold.py:gold -> gold"""
    _, _, name = spec.rpartition(":")
    return name


# ---- many sequences in one forward pass --------------------------------------------------------
#
# Everything below that gives numbers has a method `score`. It takes a list of answers, and returns
# for each of them a number, or one word that says why there is none.


class TokenSequence(NamedTuple):
    """A prompt and an answer to it, as one model reads them."""

    row_id: str  # sequences of one row may have a beginning in common
    ids: tuple[int, ...]  # prompt and answer
    prompt_length: int  # where the answer begins; a Reference alone needs it, else it is 0


@dataclass(kw_only=True)
class Model:
    """A network that gives each sequence a number, many at once, each as if it were alone.

    RewardModel and Reference define that number in three methods: `sequence`, what the network
    reads of an answer; `score_alone`, the definition of the number; `score_packed`, how to compute
    it from the states of many sequences that were packed into one forward pass.
    """

    too_long: ClassVar[str]  # why an answer has no number that is longer than max_length

    path: str
    network: nn.Module
    max_length: int  # tokens that it reads
    tokens_per_batch: int
    packs: bool  # else its sequences run one by one
    tolerance: tuple[float, float]  # see TOLERANCE
    checked: bool = False  # that packing changes nothing

    def score(self, answers: list[Answer]) -> list[float | str]:
        sequences = [self.sequence(answer) for answer in answers]
        # An answer that was written twice is computed once, so the two tie exactly.
        different = list(dict.fromkeys(sequences))
        values = self.score_sequences(different)
        return [values.get(sequence, self.too_long) for sequence in sequences]

    @torch.inference_mode()
    def score_sequences(self, sequences: list[TokenSequence]) -> dict[TokenSequence, float]:
        """The number of each sequence that is not too long for the model."""
        values: dict[TokenSequence, float] = {}
        left = [s for s in sequences if len(s.ids) <= self.max_length]
        while left:
            batch = self.next_batch(left)
            try:
                if self.packs:
                    results = self.score_packed(self.hidden(batch), batch)
                else:
                    results = [self.score_alone(sequence) for sequence in batch]
            except torch.OutOfMemoryError:
                self.make_batches_smaller(batch)
                continue
            if self.packs and not self.checked:
                if self.packing_errs(batch, results):
                    self.packs = False
                    continue  # this batch again, one by one
                self.checked = len(batch) > 1  # with one sequence nothing was packed
            values.update(zip(batch, results, strict=True))
            left = left[len(batch) :]
        return values

    def next_batch(self, left: list[TokenSequence]) -> list[TokenSequence]:
        """The first sequences, as many as tokens_per_batch allows, and at least one.

        A prompt that answers share counts once for each of them here, though it is computed once.
        """
        tokens = 0
        for count, sequence in enumerate(left):
            tokens += len(sequence.ids)
            if tokens > self.tokens_per_batch:
                return left[: max(1, count)]
        return left

    def make_batches_smaller(self, batch: list[TokenSequence]) -> None:
        tokens = sum(len(sequence.ids) for sequence in batch)
        if len(batch) == 1:
            problem = f"{tokens} tokens do not fit into memory"
            raise Stop(f"{self.path}: {problem}. Lower --max_length.") from None
        self.tokens_per_batch = tokens // 2
        torch.cuda.empty_cache()
        self.warn(f"out of memory: {self.tokens_per_batch} tokens per batch from here on")

    def packing_errs(self, batch: list[TokenSequence], results: list[float]) -> bool:
        """Whether the shortest sequence gets another number when it is computed alone."""
        lengths = [len(sequence.ids) for sequence in batch]
        shortest = lengths.index(min(lengths))
        alone, packed = self.score_alone(batch[shortest]), results[shortest]
        absolute, relative = self.tolerance
        errs = abs(alone - packed) > absolute + relative * abs(alone)
        if errs:
            self.warn(f"{alone:.6g} alone, {packed:.6g} packed: so one by one")
        return errs

    def warn(self, message: str) -> None:
        print(f"{self.path}: {message}", file=sys.stderr)

    def hidden(self, sequences: list[TokenSequence]) -> list[torch.Tensor]:
        """The last layer's states [n, D] of each sequence of n tokens.

        The network reads one row of T tokens, [P|A|B|C][P|A|B]…, where P is what all sequences of a
        prompt begin with. A's queries see [P|A], B's see [P|B], and so on: the picture in
        kernels/attention.py, with more than two answers.
        """
        row: list[int] = []
        lengths: list[tuple[int, ...]] = []  # (P, A, B, C) of each prompt
        for _, of_one_row in groupby(sequences, attrgetter("row_id")):
            group = [sequence.ids for sequence in of_one_row]
            shared = shared_length(group)
            own = [ids[shared:] for ids in group]
            row += group[0][:shared]
            for ids in own:
                row += ids
            lengths.append((shared, *map(len, own)))

        device = self.network.device
        position_ids, layout = prefix_layout(lengths, device)
        output = backbone(self.network)(
            input_ids=torch.tensor([row], device=device),  # [1, T]
            position_ids=position_ids,  # [1, T]
            layout=layout,
            use_cache=False,
        )
        states = output[0][0]  # [T, D]
        states = states[layout.kv_index]  # [sum of n, D]: those of P once for each of its answers
        return list(states.split(layout.k_lengths))

    def input_ids(self, sequence: TokenSequence) -> torch.Tensor:
        return torch.tensor([sequence.ids], device=self.network.device)  # [1, n]


def shared_length(group: list[tuple[int, ...]]) -> int:
    """How many first tokens all of them share, where each keeps at least one of its own."""
    most = min(len(ids) for ids in group) - 1
    for place in range(most):
        tokens_there = {ids[place] for ids in group}
        if len(tokens_there) > 1:
            return place
    return most


# ---- reward models -----------------------------------------------------------------------------


@dataclass(kw_only=True)
class RewardModel(Model):
    """Its logit at the end of prompt and answer, with the chat template it was trained with."""

    tokenizer: object  # its own
    template_kwargs: dict  # for its chat template
    warned_of_text: bool = False
    too_long = "too_long_for_reward_model"

    def sequence(self, answer: Answer) -> TokenSequence:
        prompt, where = answer.row["prompt"], f"{self.path}: {answer}"
        if isinstance(prompt, str) and self.tokenizer.chat_template and not self.warned_of_text:
            self.warned_of_text = True
            self.warn(
                "has a chat template, which a prompt that is a string goes without: its scores may "
                "mean little. tools/prepare_prompts.py --as_conversation makes conversations"
            )
        ids = chat.encode_for_reward(
            self.tokenizer, prompt, answer.text, where, self.template_kwargs
        )
        return TokenSequence(answer.row["id"], tuple(ids), prompt_length=0)

    def score_alone(self, sequence: TokenSequence) -> float:
        """The definition: the model as it came."""
        logits = self.network(self.input_ids(sequence)).logits  # [1, 1]
        return logits[0, 0].item()

    def score_packed(
        self, states: list[torch.Tensor], sequences: list[TokenSequence]
    ) -> list[float]:
        pad = self.network.config.get_text_config().pad_token_id
        last = []  # B of them
        for state, sequence in zip(states, sequences, strict=True):
            last.append(state[last_place(sequence.ids, pad)])  # [D]
        logits = self.network.score(torch.stack(last))  # [B, 1]
        return logits[:, 0].float().tolist()


def last_place(ids: tuple[int, ...], pad: int | None) -> int:
    """Where transformers reads the reward: at the last token that is not pad_token_id.

    A model whose texts all end in its pad token is read one token earlier.
    """
    for place in reversed(range(len(ids))):
        if ids[place] != pad:
            return place
    return 0


def load_reward_model(path: str, args, device) -> RewardModel:
    template_kwargs = key_values("chat_template_kwargs", args.chat_template_kwargs)
    config = models.load_config(path)
    refuse_other_than_reward_models(path, config)

    # With packing, the reward is one product with the last token's state. BERT's head does more.
    network_class = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), object)
    reads_last_state = issubclass(network_class, GenericForSequenceClassification)
    max_length = min(args.max_length or sys.maxsize, positions(config))
    packs = reads_last_state and packing_refusal(config, max_length) is None
    auto_class = AutoModelForSequenceClassification
    # The head is computed in fp32: in bf16 a reward near 10 moves in steps of 1/16, which makes
    # ties. Where it is more than one product, all of the network is.
    dtype = args.dtype if reads_last_state else "fp32"
    network = load_network(auto_class, path, config, packs, dtype, device)
    if isinstance(getattr(network, "score", None), nn.Linear):
        network.score.float().register_forward_pre_hook(inputs_to_fp32)

    tokenizer = models.load_tokenizer(path)
    chat.check_template_kwargs(tokenizer, template_kwargs)
    return RewardModel(
        path=path,
        network=network,
        max_length=max_length,
        tokens_per_batch=args.tokens_per_batch,
        packs=packs,
        tolerance=TOLERANCE[dtype],
        tokenizer=tokenizer,
        template_kwargs=template_kwargs,
    )


def refuse_other_than_reward_models(path: str, config) -> None:
    code_of_its_own = getattr(config, "auto_map", None) or {}
    if "AutoModelForSequenceClassification" in code_of_its_own:
        # transformers' own class would load its weights, but compute something else
        raise models.wants_code(path, "reward head")
    if config.num_labels != 1:
        raise Stop(
            f"{path}: has {config.num_labels} labels (a plain language model counts as two); a "
            "reward model has one, whose logit is the reward. Call this one from a --reward_fn "
            "that makes one number of its outputs."
        )


def load_network(auto_class, path: str, config, packs: bool, dtype: str, device) -> nn.Module:
    attention = ATTENTION if packs else attention_implementation(config)
    network = models.load_model(auto_class, path, DTYPES[dtype], attention)
    network.config.use_cache = False
    return network.to(device).eval()


def inputs_to_fp32(module: nn.Module, inputs: tuple) -> tuple:
    return (inputs[0].float(),)


# ---- references --------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Reference(Model):
    """log p(answer | prompt), of the token ids that the policy was given and has written."""

    head: dict  # as linear_logprob takes it
    vocabulary: int  # how many token ids it knows
    too_long = "too_long_for_ref_model"

    def sequence(self, answer: Answer) -> TokenSequence:
        prompt_ids = answer.row["prompt_token_ids"]
        answer_ids = answer.candidate["token_ids"]
        if not prompt_ids:
            problem = "nothing precedes the first token of the answer"
            raise Stop(f"{answer}: prompt_token_ids is empty: {problem}.")
        if max([*prompt_ids, *answer_ids]) >= self.vocabulary:
            beyond = f"a token id beyond the {self.vocabulary} that {self.path} knows"
            raise Stop(f"{answer}: {beyond}. Name a reference with the policy's vocabulary.")
        return TokenSequence(answer.row["id"], (*prompt_ids, *answer_ids), len(prompt_ids))

    def score_alone(self, sequence: TokenSequence) -> float:
        """The definition, from the model's own logits."""
        input_ids = self.input_ids(sequence)
        logits = self.network(input_ids).logits[0]  # [n, V]
        logits = logits[sequence.prompt_length - 1 : -1]  # [|y|, V]: each predicts the next token
        answer_ids = input_ids[0, sequence.prompt_length :]  # [|y|]
        return logprob_from_logits(logits, answer_ids).sum().item()

    def score_packed(
        self, states: list[torch.Tensor], sequences: list[TokenSequence]
    ) -> list[float]:
        before_answers: list[torch.Tensor] = []
        answer_ids: list[int] = []
        lengths: list[int] = []  # |y|
        for state, sequence in zip(states, sequences, strict=True):
            answer = sequence.ids[sequence.prompt_length :]
            before_answers.append(state[sequence.prompt_length - 1 : -1])  # [|y|, D]
            answer_ids += answer
            lengths.append(len(answer))
        hidden = torch.cat(before_answers)  # [sum of |y|, D]
        targets = torch.tensor(answer_ids, dtype=torch.long, device=hidden.device)  # [sum of |y|]
        logprobs = linear_logprob(hidden, targets=targets, **self.head)  # [sum of |y|], per token
        return [of_answer.double().sum().item() for of_answer in logprobs.split(lengths)]


def load_reference(path: str, args, device) -> Reference:
    config = models.load_config(path)
    max_length = min(args.max_length or sys.maxsize, positions(config))
    packs = packing_refusal(config, max_length) is None
    network = load_network(AutoModelForCausalLM, path, config, packs, args.dtype, device)
    return Reference(
        path=path,
        network=network,
        max_length=max_length,
        tokens_per_batch=args.tokens_per_batch,
        packs=packs,
        tolerance=TOLERANCE[args.dtype],
        head=lm_head(network),
        vocabulary=config.get_text_config().vocab_size,
    )


# ---- functions ---------------------------------------------------------------------------------


@dataclass
class RewardFunction:
    """name(prompt, response, meta) -> float, called once per answer."""

    spec: str  # FILE.py:FUNCTION
    function: Callable

    def score(self, answers: list[Answer]) -> list[float]:
        values = []
        for answer in answers:
            where = f"--reward_fn {self.spec} on {answer}"
            value = self.call(answer.row, answer.text, where)
            values.append(number_of(value, where))
        return values

    def call(self, row: dict, text: str | list[str], where: str):
        # copies: what the function does to its arguments must not reach the file
        prompt = copy.deepcopy(row["prompt"])
        meta = copy.deepcopy(row.get("meta") or {})
        try:
            return self.function(prompt, text, meta)
        except SystemExit as e:
            raise Stop(f"{where}: the function called exit({e.code}).") from None
        except Exception as e:
            e.add_note(f"in {where}")
            raise


@dataclass
class GroupRewardFunction(RewardFunction):
    """name(prompt, responses, meta) -> list[float], called once per prompt with all its answers.

    That is, the answers of all candidate files, in their order, equal texts included. Only an
    answer that was too long for a model that scored before is missing: it is dropped.
    """

    def score(self, answers: list[Answer]) -> list[float]:
        values = []
        for _, of_one_row in groupby(answers, lambda answer: answer.row["id"]):
            group = list(of_one_row)
            values += self.score_group(group)
        return values

    def score_group(self, group: list[Answer]) -> list[float]:
        row = group[0].row
        texts = [answer.text for answer in group]
        where = f'--reward_fn {self.spec} on {group[0].source}: row id "{row["id"]}"'
        returned = self.call(row, texts, where)
        try:
            found = list(returned)
        except TypeError:
            found = None
        if found is None or isinstance(returned, (str, dict, set)):
            wanted = f"a list of {len(group)} numbers, one for each answer"
            raise Stop(f"{where}: returned {type(returned).__name__}; it must return {wanted}.")
        if len(found) != len(group):
            raise Stop(
                f"{where}: returned {len(found)} values for {len(group)} answers; it must return "
                "one for each, in their order."
            )
        values = []
        for answer, value in zip(group, found, strict=True):
            values.append(number_of(value, f"--reward_fn {self.spec} on {answer}"))
        return values


def number_of(value, where: str) -> float:
    """The finite float that a function returned; Stop, naming `where`, for anything else."""
    try:
        number = None if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: torch's tensors
        number = None
    if number is None:
        raise Stop(f"{where}: returned {str(value)[:60]!r}; a reward is a number.")
    return finite(number, where)


def load_function(spec: str) -> RewardFunction:
    file, _, name = spec.rpartition(":")
    if not os.path.isfile(file):
        raise Stop(f"--reward_fn {spec}: no such file. It is written FILE.py:FUNCTION.")
    try:
        module = module_of(str(Path(file).resolve()))
    except SystemExit as e:
        raise Stop(f"--reward_fn {spec}: importing the file called exit({e.code}).") from None
    function = getattr(module, name, None)
    if not callable(function):
        example = f"{name}(prompt, response, meta) -> float"
        raise Stop(f"{file}: has no function {name}. Write one: {example}.")
    if second_parameter(function) == "responses":
        return GroupRewardFunction(spec, function)
    return RewardFunction(spec, function)


@functools.cache
def module_of(file: str) -> types.ModuleType:
    """A user's file as a module. Two functions of one file share it, and whatever it loads."""
    sys.path.append(os.path.dirname(file))  # so that it can import files beside it
    name = "reward_functions_of_" + re.sub(r"\W", "_", file)  # no dots: it is in no package
    module_spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickle look a module up by its name
    module_spec.loader.exec_module(module)
    return module


def second_parameter(function: Callable) -> str | None:
    """The name of a function's second parameter; None where it has none, or hides them."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some functions written in C
        return None
    return names[1] if len(names) > 1 else None


# ---- the weighted sum --------------------------------------------------------------------------


class Scorer(NamedTuple):
    key: str  # of the candidate: "rewards" or "ref_logprobs"
    name: str  # in there
    scores: RewardModel | Reference | RewardFunction


def load_scorers(asked: Asked, args) -> list[Scorer]:
    device = device_of_this_rank()
    scorers = []
    for name, path in asked.reward_models.items():
        scorers.append(Scorer("rewards", name, load_reward_model(path, args, device)))
    for name, path in asked.references.items():
        scorers.append(Scorer("ref_logprobs", name, load_reference(path, args, device)))
    for name, spec in asked.functions.items():
        scorers.append(Scorer("rewards", name, load_function(spec)))
    return scorers


def device_of_this_rank() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def score_part(rows: list[dict], scorers: list[Scorer], args) -> dict[str, dict]:
    """Score the candidates of `rows`, in place; those without a score are removed. -> balances"""
    answers = answers_of(rows, args.strip_reasoning, args.candidates)
    for scorer in scorers:
        left = [answer for answer in answers if not answer.dropped]
        values = scorer.scores.score(left)
        for answer, value in zip(left, values, strict=True):
            if isinstance(value, str):
                answer.dropped = value
                continue
            earlier = answer.candidate.get(scorer.key, {})
            if scorer.name in earlier:
                raise Stop(
                    f'{answer}: {scorer.key} has a "{scorer.name}" from an earlier run already. '
                    "Call this one something else: NAME=…."
                )
            value = finite(value, f'{answer}, {scorer.key} "{scorer.name}"')
            answer.candidate[scorer.key] = earlier | {scorer.name: value}

    for answer in answers:
        if not answer.dropped:
            answer.candidate.setdefault("rewards", {})  # with only a reference there are none
            reward = weighted_sum(answer.candidate, args)
            answer.candidate["reward"] = finite(reward, f"{answer}, reward")
    return drop_unscored(rows, answers)


def weighted_sum(candidate: dict, args) -> float:
    """reward(x, y), the formula at the head of this file. References alone keep the input's sum."""
    if args.rewards:
        weighted = zip(args.rewards, args.reward_weights, strict=True)
        total = sum(weight * candidate["rewards"][name] for name, weight in weighted)
    else:
        total = candidate.get("reward", 0.0)
    cut_off = candidate["finish_reason"] != "stop"
    return total - args.missing_eos_penalty * cut_off


# ---- the stage ---------------------------------------------------------------------------------


def main():
    args = parse(arguments())
    asked = resolve(args)
    inputs = {
        "candidates": args.candidates,
        "reward_model": list(asked.reward_models.values()),
        "reward_fn": [spec.rpartition(":")[0] for spec in asked.functions.values()],
        "ref_model": list(asked.references.values()),
    }
    stage = Stage(args, inputs, args.output, free=["tokens_per_batch"])
    if stage.done:
        return
    merged = merge_by_id(args.candidates, CANDIDATES)
    merged.warn_of_incomplete(stage)
    scorers = load_scorers(asked, args)

    started, answers = time.monotonic(), 0
    with stage.progress(merged.total) as bar:
        for index, part in stage.todo(merged.rows):
            counts = score_part(part, scorers, args)
            stage.write_part(index, part, counts)
            answers += counts["candidates"]["in"]
            pace = answers / seconds_since(started)
            bar.set_postfix_str(f"{pace:,.1f} answers/s", refresh=False)
            bar.update(len(part))
    stage.join(merged.total)


if __name__ == "__main__":
    run(main)
