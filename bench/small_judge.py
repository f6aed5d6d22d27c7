"""A judge of the demo's size: which of two answers has the category that was asked for?

It begins as the demo's policy and learns, by maximum likelihood, to reply "A" or "B". An example is
two answers, one of the right category and one of another, shown in both orders, so that a
preference for a place does not pay. On two sloppy answers, which differ in more
than that, it is right in about nine cases of ten, and its place matters in some: as with real
judges. At temperature 0 a reply depends on the request alone.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.gold import CATEGORIES, gold
from demo.task import sloppy_answer
from judge import verdict

PROMPT = "A: {answer_a}. B: {answer_b}. {prompt}?"  # --judge_prompt
STEPS, EXAMPLES = 400, 32  # per step
LEARNING_RATE = 2e-3
NOTHING = -100  # a target that is not learned


def train_judge(policy: Path, prompts: list[dict], folder: Path, seed: int = 0) -> float:
    """Write the judge and PROMPT (prompt.txt) into `folder`; return how often it is right."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy)

    # Its first gradients are large, as the policy has never said "A"; with the usual 0.999 their
    # squares would hold it back until the end.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for _ in range(STEPS):
        ids, targets = batch(tokenizer, prompts, rng)  # [2 EXAMPLES, T]
        logits = model(ids, use_cache=False).logits  # [2 EXAMPLES, T, V]
        predicted = logits[:, :-1].flatten(0, 1)  # of the token that follows
        loss = F.cross_entropy(predicted, targets[:, 1:].flatten(), ignore_index=NOTHING)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "prompt.txt").write_text(PROMPT)
    return accuracy(model.eval(), tokenizer, prompts, rng)


def batch(tokenizer, prompts: list[dict], rng) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, targets), both [2 EXAMPLES, T]: each example in both orders."""
    ids, targets = [], []
    for row in rng.choices(prompts, k=EXAMPLES):
        for answers, winner in both_orders(row["meta"]["category"], rng):
            request = encode(tokenizer, row, answers)
            reply = tokenizer.encode(winner)
            reply.append(tokenizer.eos_token_id)
            ids.append(torch.tensor(request + reply))
            targets.append(torch.tensor([NOTHING] * len(request) + reply))
    # Padding is on the right and attention looks to the left, so no mask is needed.
    ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    targets = pad_sequence(targets, batch_first=True, padding_value=NOTHING)
    return ids, targets


def both_orders(right: str, rng) -> list[tuple[list[str], str]]:
    """An example: (the two answers, in which place the one of the right category stands)."""
    wrong = rng.choice([category for category in CATEGORIES if category != right])
    better = words_of(right, rng)
    worse = words_of(wrong, rng)
    return [([better, worse], "A"), ([worse, better], "B")]


def words_of(category: str, rng) -> str:
    return ", ".join(rng.choices(CATEGORIES[category], k=rng.randint(1, 5)))


def encode(tokenizer, row: dict, answers: list[str]) -> list[int]:
    """The request as the judge's server renders it."""
    first, second = answers
    question = row["prompt"][0]["content"]
    text = PROMPT.format(prompt=question, answer_a=first, answer_b=second)
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True).input_ids


@torch.no_grad()
def accuracy(model, tokenizer, prompts: list[dict], rng, comparisons: int = 200) -> float:
    """How often it prefers the answer with more gold, of two sloppy ones that differ in it."""
    right = 0
    compared = 0
    while compared < comparisons:
        row = rng.choice(prompts)
        answers = [sloppy_answer(row["meta"], rng) for _ in range(2)]
        first, second = [gold(row["prompt"], answer, row["meta"]) for answer in answers]
        if first == second:
            continue
        request = torch.tensor([encode(tokenizer, row, answers)])  # [1, T]
        written = model.generate(request, do_sample=False, max_new_tokens=4)  # [1, T + R]
        reply_ids = written[0, request.shape[1] :]  # [R]
        reply = tokenizer.decode(reply_ids, skip_special_tokens=True)
        prefers_first = verdict(reply) == 1.0
        right += prefers_first == (first > second)
        compared += 1
    return right / compared
