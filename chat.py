"""Conversation -> token ids: the one place that knows chat templates, BOS and stop ids.

A language model reads token ids. Three habits of its tokenizer decide which ids a conversation
becomes, and each of them has gone wrong in public projects:

    template    turns -> text with marks between them: <|im_start|>user\\nHi<|im_end|>\\n…
                A template is a small program (Jinja) that comes with the model. It may refuse a
                conversation, or fail on it. Then the stage stops, and names file and line.
    BOS         one token at the very start, if the tokenizer adds one. The template writes it
                itself, and encoding the rendered text would add a second one. So rendered text is
                never encoded here, and every prompt is checked to begin with one BOS.
    stop ids    the tokens that end an answer. Often there are several: the generation config names
                some, the tokenizer has its EOS, and the template puts one after an assistant's
                turn.

Nothing that begins with two BOS is ever sampled from, trained on or scored. A text that brings its
own BOS, to which the tokenizer adds another, can mean two things:

    the model's own text    a prompt that the policy answers or is trained on. The tokenizer adds
                            the BOS already, so this one is a mistake in the file: it is refused.
    another model's text    a reward model reads the policy's prompt. The BOS in it belongs to the
                            policy. Nobody made a mistake, so one of the two is left out.

An answer ends with its first stop id. The policy cannot write beyond it, so nothing after it is
part of the answer: neither the "\\n" of "<|im_end|>\\n" nor Phi-3's second end token is trained on.
"""

import re

from jinja2 import TemplateError

from records import TOKEN_IDS, Stop, check_kind

# What a template raises: its own refusals, and Python's errors on a conversation of another shape.
TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
)


def render(tokenizer, turns: list[dict], where: str, template_kwargs: dict, **how):
    """Turns through the tokenizer's chat template: token ids, or text with tokenize=False.

    where: file and line, or the row, for messages. template_kwargs: the user's arguments for the
    template. how: ours, add_generation_prompt and tokenize. Raises Stop where there is no template,
    or where it refuses the turns.
    """
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise Stop(
            f"{where}: the prompt is a conversation, but {name} has no chat template. Use a model "
            "that has one, add the model's chat_template.jinja to its folder, or give prompts as "
            "strings."
        )
    try:
        return tokenizer.apply_chat_template(turns, return_dict=False, **how, **template_kwargs)
    except TEMPLATE_ERRORS as e:
        reason = str(e).rstrip(".")
        remedy = "Correct the conversation or the template"
        refusal = f"the chat template of {name} refuses it: {reason}"
        raise Stop(f"{where}: {refusal}. {remedy}.") from None


def check_template_kwargs(tokenizer, template_kwargs: dict) -> None:
    """Stop at an argument that the chat template never reads: it may be misspelt."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    for key in template_kwargs:
        if not re.search(rf"\b{re.escape(key)}\b", template):
            reason = f"the chat template of {tokenizer.name_or_path} never reads it"
            raise Stop(f"--chat_template_kwargs {key}: {reason}.")


# ---- BOS ---------------------------------------------------------------------------------------


def adds_bos(tokenizer) -> bool:
    """Whether this tokenizer begins every text with BOS."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def encode_text(tokenizer, text: str, another_models: bool = False) -> list[int]:
    """Token ids of a raw text, with the BOS that the tokenizer adds.

    another_models: the text was written for another model, and may begin with that model's BOS.
    One of the two is left out then. Otherwise both stay, and check_bos refuses them.
    """
    ids = tokenizer(text).input_ids
    bos = tokenizer.bos_token_id
    doubled = bos is not None and ids[:2] == [bos, bos]
    if doubled and another_models:
        return ids[1:]
    return ids


def check_bos(tokenizer, ids: list[int], where: str, required: bool = True) -> None:
    """Stop unless ids begin with exactly one BOS, or with none where the tokenizer adds none.

    required=False: no BOS is always accepted. A reward model was trained with its template as it
    is, with a BOS or without.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    doubled = ids[:2] == [bos, bos]
    missing = required and ids[:1] != [bos] and adds_bos(tokenizer)
    if doubled or missing:
        found = ids[:2].count(bos)
        remedy = "A string must hold none; a template must write {{ bos_token }} once, at its start"
        raise Stop(f"{where}: the prompt begins with {found} BOS, not 1. {remedy}.")


# ---- stop ids ----------------------------------------------------------------------------------


def find_stop_ids(tokenizer, generation_config, template_kwargs: dict) -> tuple[list[int], bool]:
    """The ids that end an answer, sorted; and False if the template shows no assistant's answer.

    They are those of the generation config, the tokenizer's EOS, and the special token that the
    template puts after an assistant's turn. To find that one, we render an answer that no template
    can mistake for anything else, and look at what comes right after it.
    """
    named = generation_config.eos_token_id  # an id, a list of ids, or None
    if named is None:
        named = []
    elif not isinstance(named, list):
        named = [named]
    check_kind(named, TOKEN_IDS, f"{tokenizer.name_or_path}: eos_token_id")
    stop_ids = set(named)
    stop_ids.add(tokenizer.eos_token_id)
    stop_ids.discard(None)
    if not tokenizer.chat_template:
        return sorted(stop_ids), True

    # what the template puts after an answer
    question = {"role": "user", "content": "question"}
    answer = {"role": "assistant", "content": "plainanswer"}
    try:
        text = render(tokenizer, [question, answer], "", template_kwargs, tokenize=False)
    except Stop:  # it wants a system turn first, for example
        text = ""
    _, shown, behind = text.partition("plainanswer")
    marks = tokenizer(behind, add_special_tokens=False).input_ids
    special = [token for token in marks if token in tokenizer.added_tokens_decoder]
    stop_ids.update(special[:1])  # nothing, where there is no special token
    return sorted(stop_ids), bool(shown)


def until_stop(ids: list[int], stop_ids: list[int]) -> list[int]:
    """The ids up to and including the first stop id; all of them if there is none."""
    for position, token in enumerate(ids):
        if token in stop_ids:
            return ids[: position + 1]
    return ids


def ends(answer_ids: list[int], stop_ids: list[int]) -> bool:
    """Whether the answer's last token is a stop id."""
    return bool(answer_ids) and answer_ids[-1] in stop_ids


# ---- what each stage encodes -------------------------------------------------------------------


def encode_prompt(
    tokenizer, prompt: str | list[dict], where: str, template_kwargs: dict
) -> list[int]:
    """Token ids of a prompt that this model is to answer, up to where its answer begins."""
    if isinstance(prompt, str):
        ids = encode_text(tokenizer, prompt)
    else:
        ids = render(tokenizer, prompt, where, template_kwargs, add_generation_prompt=True)
    if ids:
        check_bos(tokenizer, ids, where)
    return ids


def encode_for_reward(
    tokenizer, prompt: str | list[dict], answer: str, where: str, template_kwargs: dict
) -> list[int]:
    """Token ids of the policy's prompt and answer as a reward model reads them.

    tokenizer: the reward model's own. It may have nothing in common with the policy's.
    """
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt + answer, another_models=True)
    turns = [*prompt, {"role": "assistant", "content": answer}]
    ids = render(tokenizer, turns, where, template_kwargs)
    check_bos(tokenizer, ids, where, required=False)
    return ids


def encode_pair(tokenizer, row: dict, where: str, stop_ids: list[int]) -> list[list[int]] | None:
    """Token ids of (prompt, chosen, rejected), for preference data that came without token ids.

    prompt, chosen and rejected of the row are three strings, or a conversation and two lists of one
    turn each, the assistant's. A text answer ends with the tokenizer's EOS. An answer in turns ends
    as the template writes it, and with its first stop id; if it holds none, all of its tokens are
    kept and no end is added: the policy never meets an end that we invent.

    Returns None when the prompt's ids do not begin the ids of prompt + answer. The boundary then
    lies within a token, and there is no right place to cut.
    """
    prompt = row["prompt"]
    kinds = {type(prompt), type(row["chosen"]), type(row["rejected"])}
    if len(kinds) > 1:
        rule = "must be all text, or all turns; no turn is repeated"
        raise Stop(f"{where}: prompt, chosen and rejected {rule}.")

    prompt_ids = encode_prompt(tokenizer, prompt, where, {})
    result = [prompt_ids]
    for answer in (row["chosen"], row["rejected"]):
        ids = encode_with_answer(tokenizer, prompt, answer, where)
        if ids[: len(prompt_ids)] != prompt_ids:
            return None
        answer_ids = ids[len(prompt_ids) :]
        result.append(until_stop(answer_ids, stop_ids))
    return result


def encode_with_answer(tokenizer, prompt, answer, where: str) -> list[int]:
    """Token ids of prompt + answer: two strings, of which the second ends in EOS, or turns."""
    if isinstance(prompt, str):
        ids = encode_text(tokenizer, prompt + answer)
        eos = tokenizer.eos_token_id
        return ids if eos is None else [*ids, eos]  # until_stop cuts a second one off
    if len(answer) != 1:
        rule = "must each be one turn, the assistant's. Earlier turns belong to the prompt"
        raise Stop(f"{where}: chosen and rejected {rule}.")
    return render(tokenizer, prompt + answer, where, {})
