"""A Bradley-Terry reward model: from noisy choices between two answers to a score for one.

An annotator sees two answers of the policy to one prompt and says which is better. The demo's
annotator knows the truth but errs, the more easily the closer the answers are (Bradley and Terry
1952):

    P(a is preferred to b) = s((gold(a) - gold(b)) / NOISE),        s(z) = 1 / (1 + e^-z)

The reward model r is the policy with a scalar head in place of the vocabulary, fitted to these
choices by maximum likelihood (Ouyang et al. 2022, arXiv:2203.02155, equation 1):

    L = - mean over comparisons of log s(r(x, preferred) - r(x, other))

Only the choices reach it, never a gold value. It is a proxy: right about what the initial policy
writes, less sure about what a better policy will write, and an online loop finds out where it is
wrong.
"""

import random

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForSequenceClassification

from demo.gold import gold

# of two answers that differ by one item in five, the better one is preferred 73 times in 100
NOISE = 0.2


@torch.no_grad()
def sample(policy, tokenizer, rows: list[dict], batch_size: int = 500) -> list[str]:
    """One answer of the policy to each row's prompt, at temperature 1."""
    answers = []
    for start in range(0, len(rows), batch_size):
        prompts = [row["prompt"] for row in rows[start : start + batch_size]]
        batch = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_tensors="pt"
        )
        ids = policy.generate(
            **batch, do_sample=True, top_k=0, max_new_tokens=24
        )  # [B, prompt + answer]
        answers += tokenizer.batch_decode(
            ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return answers


def compare(
    policy, tokenizer, prompts: list[dict], n: int, seed: int
) -> list[tuple[dict, str, str]]:
    """n choices of the annotator: (row, preferred answer, other answer)."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows = rng.choices(prompts, k=n)
    choices = []
    for row, a, b in zip(
        rows, sample(policy, tokenizer, rows), sample(policy, tokenizer, rows), strict=True
    ):
        difference = gold(row["prompt"], a, row["meta"]) - gold(row["prompt"], b, row["meta"])
        prefers_a = rng.random() < torch.sigmoid(torch.tensor(difference / NOISE)).item()
        choices.append((row, a, b) if prefers_a else (row, b, a))
    return choices


def encode(tokenizer, row: dict, answer: str) -> list[int]:
    """The whole conversation through the chat template: what the reward model reads."""
    return tokenizer.apply_chat_template(
        [*row["prompt"], {"role": "assistant", "content": answer}]
    ).input_ids


def scores(model, tokenizer, sequences: list[list[int]]) -> torch.Tensor:
    batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")  # ids and mask, [B, T]
    return model(**batch, use_cache=False).logits[
        :, 0
    ]  # [B], the head at the last token that is no padding


def train_reward_model(
    policy,
    tokenizer,
    choices: list[tuple],
    seed: int,
    epochs: int = 2,
    batch_size: int = 32,
    learning_rate=1e-3,
):
    """Fit a reward model to the annotator's choices."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    label = {"num_labels": 1, "id2label": {0: "reward"}, "label2id": {"reward": 0}}
    model = LlamaForSequenceClassification(LlamaConfig(**{**policy.config.to_dict(), **label}))
    model.model.load_state_dict(policy.model.state_dict())
    torch.nn.init.zeros_(model.score.weight)  # it starts indifferent: the first loss is ln 2

    pairs = [(encode(tokenizer, row, a), encode(tokenizer, row, b)) for row, a, b in choices]
    order = [i for _ in range(epochs) for i in rng.sample(range(len(pairs)), len(pairs))]
    steps = max(1, len(order) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for step in range(steps):
        batch = [pairs[i] for i in order[step * batch_size : (step + 1) * batch_size]]
        r = scores(
            model, tokenizer, [preferred for preferred, _ in batch] + [other for _, other in batch]
        )  # [2B]
        preferred, other = r.chunk(2)
        loss = -F.logsigmoid(preferred - other).mean()

        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"reward model  step {step:4d}  loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def accuracy(model, tokenizer, choices: list[tuple]) -> tuple[float, float]:
    """(annotator, reward model): how often each agrees with gold, of the pairs that gold can tell
    apart.
    """
    r_preferred = scores(model, tokenizer, [encode(tokenizer, row, a) for row, a, _ in choices])
    r_other = scores(model, tokenizer, [encode(tokenizer, row, b) for row, _, b in choices])
    truth = torch.tensor(
        [gold(row, a, row["meta"]) - gold(row, b, row["meta"]) for row, a, b in choices]
    )
    differ = truth != 0
    annotator = truth > 0
    agrees = (r_preferred - r_other) * truth > 0
    return annotator[differ].float().mean().item(), agrees[differ].float().mean().item()
