"""Small random models of real architectures and a real tokenizer, as folders that transformers and
vLLM load.

tokenizer(folder, template="chatml")      byte-level BPE of 300 tokens and a chat template
causal_lm(folder, arch="llama")           + config, generation config and weights: a policy
reward_model(folder, arch="llama")        + a sequence classification head: a reward model
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

# a prime, so not a multiple of any block (PITFALLS 33), and 7 more than the tokenizer has, as with
# Qwen's
VOCAB = 307

TEMPLATES = {
    # Qwen's shape: no BOS, and the end of a turn is EOS.
    "chatml": dict(
        bos=None,
        eos="<|im_end|>",
        template="{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        "<|im_start|>assistant\n"
        "{% if enable_thinking is false %}no thoughts\n{% endif %}"
        "{% endif %}",
    ),
    # Llama 3's shape: template and tokenizer both add a BOS (PITFALLS 1), and a turn's end is not
    # EOS (PITFALLS 5).
    "bos": dict(
        bos="<|bos|>",
        eos="<|eos|>",
        template="{{ bos_token }}"
        "{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|eot|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    # A base model: raw text only.
    "none": dict(bos="<|bos|>", eos="<|eos|>", template=None),
}
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|eot|>"]
CORPUS = [
    "please name three fruits for a picnic",
    "plum, fig, pear",
    "the user asks and the assistant answers",
] * 4


def tokenizer(folder, template: str = "chatml"):
    """Save the tokenizer and return it. Ids 0-5 are SPECIAL in its order, then bytes and merges."""
    kind = TEMPLATES[template]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )
    if kind["bos"]:
        bpe.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", 1)]
        )
    tok = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=kind["bos"],
        eos_token=kind["eos"],
        pad_token="<|pad|>",
        additional_special_tokens=[s for s in SPECIAL[3:] if s != kind["eos"]],
    )
    tok.chat_template = kind["template"]
    tok.save_pretrained(folder)
    return tok


def config(arch: str = "llama", **overrides):
    """A config of `arch` with 2 layers; "gemma3" is its text model. `overrides` win."""
    small = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # vLLM on a CPU supports no smaller one
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        # transformers' 0.02 gives nearly uniform tokens, with which tests would see no mistake
        initializer_range=0.1,
    )
    if arch in ("gemma2", "gemma3"):
        small["query_pre_attn_scalar"] = 32
    if arch == "phi3":
        small["partial_rotary_factor"] = 1.0
    name = {"gemma3": "gemma3_text"}.get(arch, arch)
    return AutoConfig.for_model(name, **(small | overrides))


# What Llama 4's text model has beside the sizes above
LLAMA4 = dict(
    num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=96, attention_chunk_size=64
)


def causal_lm(
    folder,
    arch="llama",
    tie=False,
    seed=0,
    template="chatml",
    dtype=torch.float32,
    eos=None,
    **overrides,
):
    """Save a random policy with its tokenizer (template=None: without). `eos` goes into the
    generation config.
    """
    c = config(arch, tie_word_embeddings=tie, **overrides)
    if template:
        c.eos_token_id = tokenizer(folder, template).eos_token_id
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(c, dtype=dtype)
    model.generation_config = GenerationConfig(
        eos_token_id=c.eos_token_id if eos is None else eos,
        bos_token_id=c.bos_token_id,
        pad_token_id=c.pad_token_id,
    )
    model.save_pretrained(folder)
    return model.eval()


def reward_model(
    folder, arch="llama", labels=1, seed=0, template="bos", dtype=torch.float32, **overrides
):
    """Save a random sequence classification model with a tokenizer whose template is not the
    policies'.
    """
    c = config(arch, num_labels=labels, **overrides)
    tokenizer(folder, template)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(c, dtype=dtype)
    model.save_pretrained(folder)
    return model.eval()
