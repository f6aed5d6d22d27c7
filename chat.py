"""Conversation -> token ids: the one place that knows chat templates, BOS and stop ids.

A language model reads token ids. Between a conversation and its ids stand three habits of the
model's tokenizer, and each has gone wrong in public projects:

    template    turns -> text with marks between them: <|im_start|>user\\nHi<|im_end|>\\n…
                A template is a small program (Jinja) that came with the model. It may refuse a
                conversation, or fail on it. That ends in one line which names file and line.
    BOS         one token at the very start, if the tokenizer has that habit. The template writes
                it itself. Encoding a rendered text would add a second one, so no rendered text is
                encoded here. Exactly one is checked.
    stop ids    the tokens that end an answer. Often several: the generation config names some,
                the tokenizer has its EOS, and the template puts one behind an assistant's turn.

A doubled BOS is never sampled from, trained on, or scored. A text that brings its own BOS, beside
the one that the tokenizer adds, can mean two things:

    the model's own text    a prompt that the policy answers or is trained on. Whoever wrote it did
                            what the tokenizer does already: a mistake in the file, so refused.
    another model's text    a reward model reads the policy's prompt. The BOS in it is the policy's
                            and right there. Nobody made a mistake, so one of the two is left out.

An answer ends at its first stop id, inclusive. A policy cannot write beyond it, so nothing behind
it is part of its answer: the "\\n" of "<|im_end|>\\n" is not trained, nor Phi-3's second end token.
"""

import re

from jinja2 import TemplateError

from records import Stop

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
    """turns through the tokenizer's chat template: list[int], or str with tokenize=False.

    where: file and line, or the row, for messages. template_kwargs: what the user tells the
    template. how: add_generation_prompt, tokenize. Raises Stop without a template, or where it
    refuses.
    """
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise Stop(
            f"{where}: the prompt is a conversation, but {name} has no chat template. Use an "
            "instruct model, add the model's chat_template.jinja to its folder, or give prompts "
            "as strings."
        )
    try:
        return tokenizer.apply_chat_template(turns, return_dict=False, **how, **template_kwargs)
    except TEMPLATE_ERRORS as e:
        reason = str(e).rstrip(".")
        remedy = "Mend the conversation or the template"
        refusal = f"the chat template of {name} refuses it: {reason}"
        raise Stop(f"{where}: {refusal}. {remedy}.") from None


def check_template_kwargs(tokenizer, template_kwargs: dict) -> None:
    """Stop at an argument that the chat template never reads: a misspelt one has no effect."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    for key in template_kwargs:
        if not re.search(rf"\b{re.escape(key)}\b", template):
            reason = f"the chat template of {tokenizer.name_or_path} never reads it"
            raise Stop(f"--chat_template_kwargs {key}: {reason}.")


# --------------------------------------------------------------------------------------------------
# BOS


def adds_bos(tokenizer) -> bool:
    """Whether this tokenizer begins every text with BOS."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def encode_text(tokenizer, text: str, another_models: bool = False) -> list[int]:
    """Token ids of a raw text, with the BOS that the tokenizer adds.

    another_models: the text was written for another model and may begin with that one's BOS. Then
    one of the two is left out. Otherwise both stay, for check_bos to refuse.
    """
    ids = tokenizer(text).input_ids
    bos = tokenizer.bos_token_id
    doubled = bos is not None and ids[:2] == [bos, bos]
    return ids[1:] if doubled and another_models else ids


def check_bos(tokenizer, ids: list[int], where: str, required: bool = True) -> None:
    """Stop unless ids begin with exactly one BOS; with none where the tokenizer has none.

    required=False: none is right, too. A reward model was trained with its template as it is.
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


# --------------------------------------------------------------------------------------------------
# Stop ids


def find_stop_ids(tokenizer, generation_config, template_kwargs: dict) -> tuple[list[int], bool]:
    """The ids that end an answer, sorted; and False if there is a template that shows no answer.

    They are those of the generation config, the tokenizer's EOS, and the special token that the
    template puts behind an assistant's turn. To see that one, we render an answer that no template
    can mistake for anything else, and look at what comes right behind it.
    """
    named = generation_config.eos_token_id
    stop_ids = set(named if isinstance(named, list) else [named])
    stop_ids.add(tokenizer.eos_token_id)
    stop_ids.discard(None)
    if not tokenizer.chat_template:
        return sorted(stop_ids), True

    question = {"role": "user", "content": "question"}
    answer = {"role": "assistant", "content": "plainanswer"}
    try:
        text = render(tokenizer, [question, answer], "", template_kwargs, tokenize=False)
    except Stop:  # it wants a system turn first, say
        text = ""
    _, shown, behind = text.partition("plainanswer")
    marks = tokenizer(behind, add_special_tokens=False).input_ids
    special = [token for token in marks if token in tokenizer.added_tokens_decoder]
    stop_ids.update(special[:1])
    return sorted(stop_ids), bool(shown)


def until_stop(ids: list[int], stop_ids: list[int]) -> list[int]:
    """ids up to the first stop id, inclusive; all of them where there is none."""
    for position, token in enumerate(ids):
        if token in stop_ids:
            return ids[: position + 1]
    return ids


def ends(answer_ids: list[int], stop_ids: list[int]) -> bool:
    """Whether the answer's last token is one that ends it."""
    return bool(answer_ids) and answer_ids[-1] in stop_ids


# --------------------------------------------------------------------------------------------------
# What each stage encodes


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

    tokenizer: the reward model's own, which need have nothing in common with the policy's.
    """
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt + answer, another_models=True)
    turns = [*prompt, {"role": "assistant", "content": answer}]
    ids = render(tokenizer, turns, where, template_kwargs)
    check_bos(tokenizer, ids, where, required=False)
    return ids


def encode_pair(tokenizer, row: dict, where: str, stop_ids: list[int]) -> list[list[int]] | None:
    """Token ids of (prompt, chosen, rejected) of a row without any: anyone's preference data.

    row: prompt, chosen and rejected are three strings, or a conversation and two lists of one turn
    each, the assistant's. An answer ends at its first stop id. Strings end in EOS. Where a template
    writes no stop id, the answer has none: no end is invented that generation would not meet.

    Returns None when the prompt's ids do not begin the ids of prompt + answer. The boundary is
    then inside a token, and there is no right place to cut.
    """
    prompt, answers = row["prompt"], (row["chosen"], row["rejected"])
    if len({type(x) for x in (prompt, *answers)}) > 1:
        rule = "must be all text, or all turns, of which none is repeated"
        raise Stop(f"{where}: prompt, chosen and rejected {rule}")
    prompt_ids = encode_prompt(tokenizer, prompt, where, {})
    result = [prompt_ids]
    for answer in answers:
        if isinstance(prompt, str):
            whole = encode_text(tokenizer, prompt + answer)
            if tokenizer.eos_token_id is not None:
                whole = [*whole, tokenizer.eos_token_id]  # a second one is cut off below
        elif len(answer) == 1:
            whole = render(tokenizer, prompt + answer, where, {})
        else:
            rule = "must each be one turn, the assistant's. Earlier turns belong to the prompt"
            raise Stop(f"{where}: chosen and rejected {rule}.")
        if whole[: len(prompt_ids)] != prompt_ids:
            return None
        answer_ids = whole[len(prompt_ids) :]
        result.append(until_stop(answer_ids, stop_ids))
    return result
