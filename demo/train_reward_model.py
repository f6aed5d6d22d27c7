"""A Bradley-Terry reward model: from noisy choices between two answers to a score for one.

An annotator sees two answers of the policy to one prompt and says which is better. The demo's
annotator knows the truth but makes mistakes, more often the closer the answers are (Bradley and
Terry 1952):

    P(a is preferred to b) = s((gold(a) - gold(b)) / NOISE),        s(z) = 1 / (1 + e^-z)

The reward model r is the policy with a scalar head in place of the vocabulary, fitted to these
choices by maximum likelihood (Ouyang et al. 2022, arXiv:2203.02155, equation 1):

    L = - mean over comparisons of log s(r(x, preferred) - r(x, other))

It sees only the choices, never a gold value. It is a proxy: right about what the initial policy
writes, less sure about what a better policy will write, and an online loop finds the answers where
it is wrong. Choices between answers of many writers, from careless to careful, make a proxy that
holds longer, but not for ever (--writers varied; docs/experiments.md).
"""

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForSequenceClassification

from demo.gold import gold
from demo.task import varied_answer

# of two answers that differ by one item in five, the better one is preferred 73 times in 100
NOISE = 0.2


# ---- the annotator -----------------------------------------------------------------------------


class Choice(NamedTuple):
    """One comparison: the annotator read two answers to a prompt and preferred one."""

    row: dict  # of prompts.jsonl
    preferred: str
    other: str


@torch.no_grad()
def sample(policy, tokenizer, rows: list[dict], batch_size: int = 500) -> list[str]:
    """One answer of the policy to each row's prompt, at temperature 1."""
    answers = []
    for start in range(0, len(rows), batch_size):
        end = start + batch_size
        prompts = [row["prompt"] for row in rows[start:end]]
        batch = tokenizer.apply_chat_template(
            prompts,
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
        )  # ids and mask, [B, P]
        ids = policy.generate(
            **batch,
            do_sample=True,
            top_k=0,  # all tokens; transformers' default is the 50 most likely
            max_new_tokens=24,
        )  # [B, P + A]
        prompt_length = batch["input_ids"].shape[1]
        answer_ids = ids[:, prompt_length:]  # [B, A]
        answers += tokenizer.batch_decode(answer_ids, skip_special_tokens=True)
    return answers


def sample_varied(policy, tokenizer, rows: list[dict], rng: random.Random) -> list[str]:
    """One answer to each row's prompt: a quarter by the policy, each other one by a new writer."""
    answers = [varied_answer(row["meta"], rng) for row in rows]
    by_policy = [i for i in range(len(rows)) if rng.random() < 0.25]
    sampled = sample(policy, tokenizer, [rows[i] for i in by_policy])
    for i, answer in zip(by_policy, sampled, strict=True):
        answers[i] = answer
    return answers


def compare(
    policy, tokenizer, prompts: list[dict], n: int, seed: int, writers: str = "policy"
) -> list[Choice]:
    """n choices of the annotator, each between two fresh answers.

    writers: of the answers; "policy", or "varied": the policy and others (sample_varied).
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows = rng.choices(prompts, k=n)
    if writers == "varied":
        first = sample_varied(policy, tokenizer, rows, rng)
        second = sample_varied(policy, tokenizer, rows, rng)
    else:
        first = sample(policy, tokenizer, rows)
        second = sample(policy, tokenizer, rows)

    choices = []
    for row, a, b in zip(rows, first, second, strict=True):
        z = torch.tensor(gold_difference(row, a, b) / NOISE)
        prefers_a = rng.random() < torch.sigmoid(z).item()
        if prefers_a:
            choices.append(Choice(row, preferred=a, other=b))
        else:
            choices.append(Choice(row, preferred=b, other=a))
    return choices


def gold_difference(row: dict, a: str, b: str) -> float:
    """By how much answer a is truly better than answer b."""
    gold_a = gold(row["prompt"], a, row["meta"])
    gold_b = gold(row["prompt"], b, row["meta"])
    return gold_a - gold_b


# ---- the reward model --------------------------------------------------------------------------


def make_reward_model(policy) -> LlamaForSequenceClassification:
    """The policy's layers under a scalar head."""
    one_label = {
        "num_labels": 1,
        "id2label": {0: "reward"},
        "label2id": {"reward": 0},
    }
    config = LlamaConfig(**(policy.config.to_dict() | one_label))
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(policy.model.state_dict())
    torch.nn.init.zeros_(model.score.weight)  # all scores start equal: the first loss is ln 2
    return model


def encode(tokenizer, row: dict, answer: str) -> list[int]:
    """The whole conversation through the chat template: what the reward model reads."""
    conversation = [*row["prompt"], {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(conversation).input_ids


def scores(model, tokenizer, sequences: list[list[int]]) -> torch.Tensor:
    """r of each sequence, [B]: the head at its last token that is not padding."""
    batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")  # ids and mask, [B, T]
    logits = model(**batch, use_cache=False).logits  # [B, 1]
    return logits[:, 0]


def train_reward_model(
    policy,
    tokenizer,
    choices: list[Choice],
    seed: int,
    epochs: int = 2,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
) -> LlamaForSequenceClassification:
    """Fit a reward model to the annotator's choices."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = make_reward_model(policy)

    preferred_ids = [encode(tokenizer, c.row, c.preferred) for c in choices]
    other_ids = [encode(tokenizer, c.row, c.other) for c in choices]

    # each epoch sees every choice once, in a new order
    order: list[int] = []
    for _ in range(epochs):
        order += rng.sample(range(len(choices)), len(choices))
    steps = max(1, len(order) // batch_size)

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for step in range(steps):
        # the loss L above, of a batch of B choices
        start = step * batch_size
        batch = order[start : start + batch_size]
        sequences = [preferred_ids[i] for i in batch] + [other_ids[i] for i in batch]
        r = scores(model, tokenizer, sequences)  # [2B]
        r_preferred, r_other = r.chunk(2)  # [B] each
        loss = -F.logsigmoid(r_preferred - r_other).mean()

        # the update
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"reward model  step {step:4d}  loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def accuracy(model, tokenizer, choices: list[Choice]) -> tuple[float, float]:
    """How often the annotator, and how often the reward model, agrees with gold.

    Pairs that gold cannot tell apart do not count.
    """
    # the truth: above 0 where the annotator was right
    differences = [gold_difference(c.row, c.preferred, c.other) for c in choices]
    truth = torch.tensor(differences)  # [N]

    # the reward model's opinion: above 0 where it prefers what the annotator preferred
    preferred_ids = [encode(tokenizer, c.row, c.preferred) for c in choices]
    other_ids = [encode(tokenizer, c.row, c.other) for c in choices]
    r_preferred = scores(model, tokenizer, preferred_ids)  # [N]
    r_other = scores(model, tokenizer, other_ids)  # [N]
    opinion = r_preferred - r_other

    differ = truth != 0
    annotator_agrees = truth > 0
    model_agrees = opinion * truth > 0
    return share(annotator_agrees[differ]), share(model_agrees[differ])


def share(flags: torch.Tensor) -> float:
    return flags.float().mean().item()
