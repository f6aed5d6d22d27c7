"""chat.py: one BOS, every stop id, an answer that ends at the right token, and templates that fail
with one line.
"""

import pytest
from transformers import AutoTokenizer, GenerationConfig

import chat
import small_models
from records import Stop

BOS, EOS, END, EOT = (
    small_models.SPECIAL.index(s) for s in ("<|bos|>", "<|eos|>", "<|im_end|>", "<|eot|>")
)
ASK = [{"role": "user", "content": "name a fig"}]


def saved(folder, template="chatml", jinja=None):
    """A tokenizer as a stage loads it; jinja replaces its template."""
    small_models.tokenizer(folder, template)
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return AutoTokenizer.from_pretrained(folder)


def pair(prompt=ASK, chosen="plum", rejected="pear"):
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    answers = {"chosen": chosen, "rejected": rejected}
    turns = {k: [{"role": "assistant", "content": text}] for k, text in answers.items()}
    return {"prompt": prompt, **turns}


# ---- templates that fail -----------------------------------------------------------------------

FAILING = {
    "its own refusal": "{{ raise_exception('no such role') }}",
    "an undefined variable": "{{ messages[0].name.upper() }}",
    "a wrong type": "{{ messages[0].content + 1 }}",
    "a wrong value": "{{ messages[0].content | int(base='x') + [].index(3) }}",
    "a missing key": "{{ {}.pop('x') }}",
    "a division": "{{ 1 / 0 }}",
    "its syntax": "{% if %}",
}


@pytest.mark.parametrize("jinja", FAILING.values(), ids=FAILING)
def test_whatever_a_template_raises_is_one_line_with_its_place(tmp_path, jinja):
    tokenizer = saved(tmp_path, jinja=jinja)
    calls = (
        lambda: chat.encode_prompt(tokenizer, ASK, "p.jsonl:7", {}),
        lambda: chat.encode_for_reward(tokenizer, ASK, "plum", "p.jsonl:7", {}),
        lambda: chat.encode_pair(tokenizer, pair(), "p.jsonl:7", [END]),
    )
    for call in calls:
        with pytest.raises(
            Stop, match="^error: p.jsonl:7: the chat template of .* refuses it: "
        ) as stop:
            call()
        assert "\n" not in str(stop.value)


def test_a_conversation_without_chat_template_is_refused_with_a_remedy(tmp_path):
    tokenizer = saved(tmp_path, "none")
    with pytest.raises(
        Stop, match="p.jsonl:7: the prompt is a conversation, but .* add the model's"
    ):
        chat.encode_pair(tokenizer, pair(), "p.jsonl:7", [EOS])


# ---- BOS ---------------------------------------------------------------------------------------


def test_pitfalls_1_a_doubled_bos_is_refused_or_another_models(tmp_path):
    """The same text: a mistake in the policy's own file, and right where another model wrote it."""
    tokenizer = saved(tmp_path, "bos")
    text = "<|bos|>name a fig"
    with pytest.raises(Stop, match="p.jsonl:7: the prompt begins with 2 BOS, not 1"):
        chat.encode_prompt(tokenizer, text, "p.jsonl:7", {})
    with pytest.raises(Stop, match="p.jsonl:7: the prompt begins with 2 BOS, not 1"):
        chat.encode_pair(tokenizer, pair(text), "p.jsonl:7", [EOS])
    ids = chat.encode_for_reward(tokenizer, text, " plum", "row", {})
    assert ids == tokenizer("name a fig plum").input_ids and ids.count(BOS) == 1


def test_pitfalls_1_a_template_that_doubles_bos_is_refused_by_all(tmp_path):
    plain = saved(tmp_path / "plain", "bos")
    doubled = saved(tmp_path / "doubled", "bos", jinja="{{ bos_token }}" + plain.chat_template)
    for encode, row in ((chat.encode_prompt, ASK), (chat.encode_pair, pair())):
        assert encode(plain, row, "here", {})
        with pytest.raises(Stop, match="here: the prompt begins with 2 BOS"):
            encode(doubled, row, "here", {})
    with pytest.raises(Stop, match="here: the prompt begins with 2 BOS"):
        chat.encode_for_reward(doubled, ASK, "plum", "here", {})


def test_a_missing_bos_is_the_policys_mistake_and_may_be_the_reward_models_way(tmp_path):
    jinja = small_models.TEMPLATES["bos"]["template"].replace("{{ bos_token }}", "")
    tokenizer = saved(tmp_path, "bos", jinja=jinja)
    with pytest.raises(Stop, match="begins with 0 BOS, not 1"):
        chat.encode_prompt(tokenizer, ASK, "here", {})
    assert BOS not in chat.encode_for_reward(tokenizer, ASK, "plum", "here", {})


# ---- where an answer ends ----------------------------------------------------------------------


@pytest.mark.parametrize("behind", ["\n", "<|eot|>", "<|eot|>\n", ""])
def test_pitfalls_51_an_answer_ends_at_its_first_stop_id(tmp_path, behind):
    """ChatML's newline, and a second end token as Phi-3 writes it, stop id or not."""
    template = small_models.TEMPLATES["chatml"]["template"]
    jinja = template.replace("<|im_end|>\n", "<|im_end|>" + behind)
    tokenizer = saved(tmp_path, jinja=jinja)
    for stop_ids in ([END], [END, EOT]):
        prompt, chosen, rejected = chat.encode_pair(tokenizer, pair(), "here", stop_ids)
        assert chosen == [*tokenizer("plum").input_ids, END]
        assert rejected == [*tokenizer("pear").input_ids, END]
        whole = tokenizer.apply_chat_template(ASK + pair()["chosen"], tokenize=False)
        assert tokenizer.decode(prompt + chosen) + behind == whole


def test_text_ends_in_eos_once(tmp_path):
    tokenizer = saved(tmp_path)
    row = pair("a ", chosen="b", rejected="c<|im_end|>\n")
    prompt, chosen, rejected = chat.encode_pair(tokenizer, row, "here", [END])
    assert tokenizer.decode(prompt) == "a "
    assert tokenizer.decode(chosen) == "b<|im_end|>"
    assert tokenizer.decode(rejected) == "c<|im_end|>"


def test_a_template_without_stop_ids_leaves_the_answer_as_it_is(tmp_path):
    template = small_models.TEMPLATES["chatml"]["template"]
    tokenizer = saved(tmp_path, jinja=template.replace("<|im_end|>", ""))
    _, chosen, rejected = chat.encode_pair(tokenizer, pair(), "here", [END])
    assert tokenizer.decode(chosen) == "plum\n" and tokenizer.decode(rejected) == "pear\n"
    assert not chat.ends(chosen, [END]) and chat.ends([7, END], [END]) and not chat.ends([], [END])


def test_an_answer_of_several_turns_is_refused(tmp_path):
    """Cut at its first stop id it would lose all turns but one; no policy writes a user's turn."""
    row = pair()
    row["rejected"] = row["rejected"] + ASK + row["rejected"]
    with pytest.raises(Stop, match="p.jsonl:7: chosen and rejected must each be one turn"):
        chat.encode_pair(saved(tmp_path), row, "p.jsonl:7", [END])


def test_pitfalls_5_stop_ids_come_from_three_places(tmp_path):
    tokenizer = saved(tmp_path, "bos")
    for named, expected in ((None, [EOS, EOT]), (77, [EOS, EOT, 77]), ([78, EOS], [EOS, EOT, 78])):
        config = GenerationConfig(eos_token_id=named)
        assert chat.find_stop_ids(tokenizer, config, {}) == (expected, True)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert chat.find_stop_ids(tokenizer, GenerationConfig(), {}) == ([EOS], False)
