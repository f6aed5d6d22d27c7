"""The initial policy: a byte-level BPE tokenizer and a Llama of 0.4 M parameters, pre-trained on
sloppy answers.

Maximum likelihood on the tokens of the answer y, given the prompt x,

    L = - sum_t log p(y_t | x, y_<t) / number of answer tokens in the batch

on an endless stream: every step draws prompts and writes new answers to them, so there is nothing
to overfit, and the policy becomes a faithful copy of the sloppy writer (task.py). Anything better
it must learn from preferences.
"""

import random

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.task import sloppy_answer

# ChatML, as Qwen uses it: no BOS anywhere, and every turn ends with <|im_end|>, the EOS.
CHAT_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: 3 special tokens, 256 bytes and as many merges as fit into 512.

    Any text can be encoded.
    """
    bpe = Tokenizer(models.BPE())
    # ", " is a piece of its own: a word is the same token at the start of an answer and within it
    pieces = pre_tokenizers.Split(Regex(r", | ?\w+|\s+|[^\s\w]+"), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        # not the EOS: a pad that can also be a real token is where masks go wrong
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",  # a batch of prompts must end where the answers begin
        clean_up_tokenization_spaces=False,  # decode() gives back exactly what was encoded
        model_max_length=256,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,  # of 32 dimensions, the smallest that vLLM's attention offers
        intermediate_size=256,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # near 1 / sqrt(96); a model so narrow learns far slower from the usual 0.02
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    # what generate() and vLLM stop at
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def make_batch(
    prompts: list[dict],
    contexts: list[list[int]],
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    rng: random.Random,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, targets), both [B, T]: random prompts, each with a new sloppy answer.

    contexts: the prompts' token ids. A target is -100 where there is nothing to learn.
    """
    ids, targets = [], []
    for i in rng.choices(range(len(prompts)), k=batch_size):
        context = contexts[i]
        answer = tokenizer.encode(sloppy_answer(prompts[i]["meta"], rng))
        answer.append(tokenizer.eos_token_id)
        ids.append(torch.tensor(context + answer))
        targets.append(torch.tensor([-100] * len(context) + answer))
    # Padding is on the right and attention looks to the left, so no mask is needed.
    ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)  # [B, T]
    targets = pad_sequence(targets, batch_first=True, padding_value=-100)  # [B, T]
    return ids, targets


def train_policy(
    prompts: list[dict],
    seed: int,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The initial policy and its tokenizer."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    questions = [row["prompt"][0]["content"] for row in prompts]
    answers = [sloppy_answer(row["meta"], rng) for row in prompts]
    roles = ["user", "assistant"] * len(prompts)
    tokenizer = make_tokenizer(questions + answers + roles)
    model = make_model(tokenizer)

    contexts = []
    for row in prompts:
        encoded = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)
        contexts.append(encoded.input_ids)

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for step in range(steps):
        # the loss L above, of a fresh batch
        ids, targets = make_batch(prompts, contexts, tokenizer, batch_size, rng)  # [B, T]
        logits = model(ids, use_cache=False).logits  # [B, T, V]
        predicted = logits[:, :-1].flatten(0, 1)  # [B (T - 1), V], of the token that follows
        following = targets[:, 1:].flatten()  # [B (T - 1)]
        loss = F.cross_entropy(predicted, following)

        # the update
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            nats = loss.item()
            print(f"policy        step {step:4d}  loss {nats:.3f} nats per token", flush=True)
    return model.eval(), tokenizer
