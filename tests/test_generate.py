"""generate.py with the transformers backend: exact samples, right ids, right ends, and nothing lost
on the way.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, T5Config

import generate
import records
from bench.kill_stages import family, finished
from conftest import ROOT
from small_models import LLAMA4, SPECIAL, VOCAB, causal_lm, tokenizer
from stage import hash_path

CHAT = [
    [{"role": "user", "content": "please name three fruits"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "name one fig"}],
    [
        {"role": "user", "content": "a pear"},
        {"role": "assistant", "content": "plum, fig"},
        {"role": "user", "content": "and three more for a long picnic please, please"},
    ],
]
STOPS = [
    4,
    *range(100, 110),
]  # EOS and ten more: a random model would hardly ever stop at one token of 307


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    causal_lm(folder, eos=STOPS)
    return folder


def write_prompts(path, prompts) -> None:
    """Each prompt is a string, a conversation, or a whole row."""
    rows = [
        p if isinstance(p, dict) else {"id": f"p{i}", "prompt": p} for i, p in enumerate(prompts)
    ]
    path.write_text("".join(map(records.dump, rows)))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(model, prompts, "--flag", value, …) -> rows of candidates.jsonl, computed in this
    process.
    """

    def call(model, prompts, *flags, output="candidates.jsonl"):
        write_prompts(tmp_path / "prompts.jsonl", prompts)
        arguments = [
            "--model",
            model,
            "--prompts",
            tmp_path / "prompts.jsonl",
            "--output",
            tmp_path / output,
        ]
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, [*arguments, *flags])])
        generate.main()
        return [json.loads(line) for line in open(tmp_path / output, encoding="utf-8")]

    return call


@torch.no_grad()
def own_logprob(model, prompt: list[int], answer: list[int]) -> float:
    """The plain way: one sequence, no padding, no cache, the model's own logits."""
    logits = (
        model(torch.tensor([prompt + answer]), use_cache=False).logits[0].double().log_softmax(-1)
    )
    return sum(logits[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer))


def check_answers(rows, folder, stops, max_new_tokens, tolerance=1e-3):
    """What must hold for every candidate, whichever backend wrote it."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tok, model_hash = AutoTokenizer.from_pretrained(folder), hash_path(folder)
    for row in rows:
        for c in row["candidates"]:
            ids = c["token_ids"]
            assert c["logprob"] == pytest.approx(
                own_logprob(model, row["prompt_token_ids"], ids), abs=tolerance
            )
            assert c["logprob"] <= 0 and all(0 <= i < VOCAB for i in ids)
            # PITFALLS 4, 5: a stop id is at the end and nowhere else, exactly if the policy stopped
            assert not set(ids[:-1]) & set(stops)
            assert (ids[-1] in stops) == (c["finish_reason"] == "stop")
            assert len(ids) == max_new_tokens or (
                c["finish_reason"] == "stop" and len(ids) < max_new_tokens
            )
            assert c["text"] == tok.decode(ids, skip_special_tokens=True)
            assert c["model"] == model_hash


# ---- what a candidate is -----------------------------------------------------------------------


def test_answers_hold_what_the_policy_wrote(run, policy, tmp_path):
    """Law 1: ids, log-probs, finish reasons, EOS of 64 prompts x 8 samples (PITFALLS 4, 5, 33)."""
    turns = [
        [*CHAT[i % 3][:-1], {"role": "user", "content": f"{i} figs" + " please" * (i % 7)}]
        for i in range(64)
    ]
    prompts = [
        {"id": f"q{i}", "prompt": p, "meta": {"n": i}, "mine": [i]} for i, p in enumerate(turns)
    ]
    rows = run(policy, prompts, "--max_new_tokens", 16)
    assert [r["id"] for r in rows] == [f"q{i}" for i in range(64)]
    assert all(
        r["meta"] == {"n": i} and r["mine"] == [i] for i, r in enumerate(rows)
    )  # unknown keys travel along
    assert all(len(r["candidates"]) == 8 for r in rows)
    check_answers(rows, policy, STOPS, 16, tolerance=1e-4)
    reasons = Counter(c["finish_reason"] for r in rows for c in r["candidates"])
    assert min(reasons["stop"], reasons["length"]) > 50  # or the test above saw only one kind

    meta = json.loads((tmp_path / "candidates.jsonl.meta.json").read_text())
    assert meta["counts"] == {"rows": {"in": 64, "out": 64, "dropped": {}}}
    assert (
        meta["inputs"]["model"] == rows[0]["candidates"][0]["model"]
    )  # PITFALLS 28: which weights wrote this


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    "arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "mistral"]
)
def test_architectures(run, tmp_path, arch, tie):
    """Every family, with a prime vocabulary (PITFALLS 33), soft caps and windows included."""
    small_window = {"sliding_window": 16} if arch in ("gemma2", "gemma3", "mistral") else {}
    causal_lm(tmp_path / "m", arch, tie=tie, eos=STOPS, **small_window)
    rows = run(tmp_path / "m", CHAT, "--max_new_tokens", 12, "--num_samples", 3)
    check_answers(rows, tmp_path / "m", STOPS, 12, tolerance=1e-4)


def test_llama4s_text_model_answers(run, tmp_path):
    """Its base_model is the whole model, head included."""
    causal_lm(tmp_path / "m", "llama4_text", eos=STOPS, **LLAMA4)
    rows = run(tmp_path / "m", CHAT, "--max_new_tokens", 8, "--num_samples", 3)
    check_answers(rows, tmp_path / "m", STOPS, 8, tolerance=1e-4)


def test_a_head_that_we_cannot_express_is_refused_by_name(run, tmp_path):
    causal_lm(tmp_path / "m", eos=STOPS, logits_multiplier=3.0)
    with pytest.raises(records.Stop, match="m: LlamaForCausalLM: its config has logits_multiplier"):
        run(tmp_path / "m", CHAT, "--max_new_tokens", 2)


def test_ids_are_not_retokenised(run, policy):
    """PITFALLS 2: encode(decode(ids)) is often not ids; what is stored, and scored, are the ids."""
    rows = run(policy, CHAT, "--max_new_tokens", 16)
    tok = AutoTokenizer.from_pretrained(policy)
    changed = [
        c for r in rows for c in r["candidates"] if tok(c["text"]).input_ids != c["token_ids"]
    ]
    assert changed  # random bytes rarely survive the trip, so check_answers was not vacuous
    check_answers(rows, policy, STOPS, 16)


def test_bf16_is_the_models_own(run, tmp_path):
    """--dtype auto computes in the checkpoint's dtype, and its log-probs stay close to fp32's."""
    causal_lm(tmp_path / "m", dtype=torch.bfloat16, eos=STOPS)
    auto = run(tmp_path / "m", CHAT, "--max_new_tokens", 12)
    bf16 = run(tmp_path / "m", CHAT, "--max_new_tokens", 12, "--dtype", "bf16", output="b.jsonl")
    assert (
        auto
        == bf16
        != run(tmp_path / "m", CHAT, "--max_new_tokens", 12, "--dtype", "fp32", output="f.jsonl")
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    for row in auto:
        for c in row["candidates"]:
            gap = c["logprob"] - own_logprob(model, row["prompt_token_ids"], c["token_ids"])
            assert abs(gap) / len(c["token_ids"]) < 0.05


# ---- the distribution --------------------------------------------------------------------------


def chi_square_fits(counts: Counter, probabilities: torch.Tensor) -> bool:
    """Pearson's test at five sigma, tokens expected fewer than five times taken together."""
    total = sum(counts.values())
    expected = probabilities.double() * total
    observed = torch.tensor([counts[i] for i in range(len(probabilities))], dtype=torch.double)
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None].clamp_min(1e-9)])
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    freedom = int((~rare).sum())
    return statistic < freedom + 5 * math.sqrt(2 * freedom)


@torch.no_grad()
def next_token(folder, prompt_ids, temperature, top_p=1.0, top_k=None, min_p=0.0) -> torch.Tensor:
    """The exact distribution, [V]: temperature, then min_p, then top_k, then top_p of what they
    left, as vLLM does.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    p = (model(torch.tensor([prompt_ids])).logits[0, -1].double() / temperature).softmax(-1)
    p[p < min_p * p.max()] = 0
    p[p.argsort(descending=True)[top_k or VOCAB :]] = 0
    p /= p.sum()
    order = p.argsort(descending=True)
    p[order[p[order].cumsum(0) - p[order] >= top_p]] = 0  # the smallest set that holds top_p stays
    return p / p.sum()


# Both backends are held to the same exact distributions. The order shows: top_p before the others
# would leave 40 and 34 tokens of the last two, and not 16 and 14; min_p before the temperature
# would leave fewer still.
TRUNCATIONS = [
    dict(temperature=1.0, top_p=0.5),
    dict(temperature=1.5, top_p=0.5, top_k=40),
    dict(temperature=1.5, top_p=0.5, min_p=0.4),
]


def check_truncated(rows, folder, arguments):
    """The support exactly, the frequencies by chi-square, and log-probs that do not depend on the
    truncation.
    """
    exact = next_token(folder, rows[0]["prompt_token_ids"], **arguments)
    first = Counter(c["token_ids"][0] for r in rows for c in r["candidates"])
    assert sum(first.values()) >= 5_000 and chi_square_fits(first, exact)
    assert set(first) <= set(exact.nonzero()[:, 0].tolist())
    assert set(first) >= set(
        (exact > 0.005).nonzero()[:, 0].tolist()
    )  # 25 expected: none is cut that should not be
    for name in arguments.keys() - {"temperature"}:  # each argument has an effect
        off = arguments | {name: 1.0 if name == "top_p" else 0}
        assert not chi_square_fits(first, next_token(folder, rows[0]["prompt_token_ids"], **off))
    check_answers([{**rows[0], "candidates": rows[0]["candidates"][:20]}], folder, STOPS, 2)


def flags_of(arguments: dict) -> list:
    return [x for name, value in arguments.items() for x in (f"--{name}", value)]


def test_samples_follow_the_distribution(run, policy):
    """20,000 samples at 0.7 and at 1.0 against exact probabilities, for two tokens in a row."""
    flags = ("--num_samples", 400, "--max_new_tokens", 2)
    rows = run(policy, [CHAT[0]] * 100, *flags, "--temperature", 0.7, 1.0)
    for temperature in (0.7, 1.0):
        mine = [
            c["token_ids"] for r in rows for c in r["candidates"] if c["temperature"] == temperature
        ]
        assert len(mine) == 20_000
        prompt = rows[0]["prompt_token_ids"]
        first = Counter(ids[0] for ids in mine)
        assert chi_square_fits(first, next_token(policy, prompt, temperature))
        assert not chi_square_fits(
            first, next_token(policy, prompt, 1.7 - temperature)
        )  # the test can fail
        common = next(t for t, _ in first.most_common() if t not in STOPS)
        second = Counter(ids[1] for ids in mine if ids[0] == common)
        assert chi_square_fits(second, next_token(policy, [*prompt, common], temperature))


@pytest.mark.parametrize("arguments", TRUNCATIONS, ids=lambda a: " ".join(map(str, flags_of(a))))
def test_truncated_samples_follow_the_distribution(run, policy, arguments):
    flags = ("--num_samples", 400, "--max_new_tokens", 2, *flags_of(arguments))
    check_truncated(run(policy, [CHAT[0]] * 15, *flags), policy, arguments)


def test_temperatures_share_the_samples_and_zero_is_greedy(run, policy):
    rows = run(
        policy, CHAT, "--temperature", 0, 0.7, 1.3, "--num_samples", 3, "--max_new_tokens", 6
    )
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    for row in rows:
        assert [c["temperature"] for c in row["candidates"]] == [0, 0.7, 1.3]
        ids = list(row["prompt_token_ids"])
        for token in row["candidates"][0]["token_ids"]:
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax()
            ids.append(token)
    rows = run(
        policy,
        CHAT[:1],
        "--temperature",
        0.7,
        1.0,
        "--num_samples",
        5,
        "--max_new_tokens",
        2,
        output="b.jsonl",
    )
    assert [c["temperature"] for c in rows[0]["candidates"]] == [0.7] * 3 + [1.0] * 2


def test_the_models_generation_defaults_shape_nothing(run, tmp_path):
    """A generation_config.json with top_k 1 and penalties, as many models ship, does not change a
    single sample.
    """
    causal_lm(tmp_path / "m", eos=STOPS)
    plain = run(tmp_path / "m", CHAT, "--max_new_tokens", 12)
    GenerationConfig(
        eos_token_id=STOPS,
        do_sample=True,
        top_k=1,
        top_p=0.1,
        temperature=0.1,
        repetition_penalty=5.0,
    ).save_pretrained(tmp_path / "m")
    shaped = run(tmp_path / "m", CHAT, "--max_new_tokens", 12, output="b.jsonl")
    assert [[c["token_ids"] for c in r["candidates"]] for r in plain] == [
        [c["token_ids"] for c in r["candidates"]] for r in shaped
    ]


# ---- seeds -------------------------------------------------------------------------------------


def test_seeds(run, policy, tmp_path):
    """PITFALLS 31: (seed, iteration, id) decides. All three the same: the same file; one other:
    other answers.
    """
    same = [{"id": f"p{i}", "prompt": CHAT[0]} for i in range(3)]
    flags = ("--max_new_tokens", 8, "--num_samples", 4)
    seen = []
    for extra in ((), ("--seed", 1), ("--iteration", 1), ("--seed", 1, "--iteration", 1)):
        rows = run(policy, same, *flags, *extra, output=f"{len(seen)}.jsonl")
        seen += [tuple(c["token_ids"]) for r in rows for c in r["candidates"]]
        seen = seen if extra else seen[:12]
    assert len(set(seen)) == len(seen) == 4 * 12

    run(policy, same, *flags, output="again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "0.jsonl").read_bytes()


def test_a_prompts_answers_do_not_depend_on_its_neighbours(run, policy):
    """Alone, in another order, in batches of any size (padding: PITFALLS 20): the same ids,
    log-probs to rounding.
    """
    prompts = [{"id": f"p{i}", "prompt": CHAT[i % 3]} for i in range(9)] + [
        {"id": "short", "prompt": "a"}
    ]
    flags = ("--max_new_tokens", 10)
    together = {r["id"]: r for r in run(policy, prompts, *flags)}
    for name, given, extra in (
        ("alone", prompts[4:5], ()),
        ("one token", prompts[-1:], ()),
        ("reversed", prompts[::-1], ()),
        ("small batches", prompts, ("--batch_size", 8)),
    ):
        for row in run(policy, given, *flags, *extra, output=f"{name}.jsonl"):
            for a, b in zip(row["candidates"], together[row["id"]]["candidates"], strict=True):
                assert a["token_ids"] == b["token_ids"], name
                assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-4)


# ---- templates and stop ids --------------------------------------------------------------------


def test_exactly_one_bos(run, tmp_path):
    """PITFALLS 1: template and tokenizer both add a BOS; the prompt has one, whether conversation
    or text.
    """
    causal_lm(tmp_path / "m", template="bos")
    rows = run(tmp_path / "m", [*CHAT, "a plain text", "a"], "--max_new_tokens", 2)
    for row in rows:
        assert row["prompt_token_ids"][0] == 1 and row["prompt_token_ids"].count(1) == 1
    with pytest.raises(records.Stop, match=r"prompts.jsonl:65: the prompt begins with 2 BOS"):
        run(
            tmp_path / "m",
            ["fine"] * 64 + ["<|bos|>rendered before"],
            "--max_new_tokens",
            2,
            output="b.jsonl",
        )
    assert [f.name for f in (tmp_path / "b.jsonl.parts").iterdir()] == [
        "key.json"
    ]  # seen before any was answered
    template = (tmp_path / "m" / "chat_template.jinja").read_text()
    (tmp_path / "m" / "chat_template.jinja").write_text(template.replace("{{ bos_token }}", ""))
    with pytest.raises(
        records.Stop, match=r"begins with 0 BOS, not 1.*must write {{ bos_token }} once"
    ):
        run(tmp_path / "m", CHAT, "--max_new_tokens", 2, output="c.jsonl")


def test_stop_ids_come_from_everywhere(tmp_path, monkeypatch):
    """PITFALLS 5: generation config, tokenizer, and the token that the template puts after an
    answer.
    """
    causal_lm(tmp_path / "m", template="bos", eos=[77, 78])
    flags = f"--prompts p --output o --max_new_tokens 5 --model {tmp_path / 'm'}"
    monkeypatch.setattr(sys, "argv", ["generate.py", *flags.split()])
    eos, eot = SPECIAL.index("<|eos|>"), SPECIAL.index("<|eot|>")
    assert generate.Policy(generate.read_arguments()).stop_ids == [eos, eot, 77, 78]
    (tmp_path / "m" / "generation_config.json").unlink()  # then the model's config says
    assert generate.Policy(generate.read_arguments()).stop_ids == [eos, eot]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('a system turn comes first') }}",  # its own refusal
        # an error of Python's inside it
        "{% for m in messages %}<|im_start|>{{ m.content + m.name }}{% endfor %}",
        # not shown
        "<|im_start|>{% for m in messages if m.role != 'assistant' %}"
        "{{ m.content }}<|eot|>{% endfor %}",
        # not to be found again
        "<|im_start|>{% for m in messages %}{{ m.content | upper }}<|eot|>{% endfor %}",
    ],
)
def test_templates_that_do_not_show_where_an_answer_ends(tmp_path, monkeypatch, template, capsys):
    """No stop id is guessed from such a template, and no traceback either; a prompt that it refuses
    is named.
    """
    causal_lm(tmp_path / "m", template="bos")
    (tmp_path / "m" / "chat_template.jinja").write_text(template)
    monkeypatch.setattr(
        sys,
        "argv",
        f"generate.py --prompts p --output o --model {tmp_path / 'm'}".split()
        + ["--max_new_tokens", "5"],
    )
    policy = generate.Policy(generate.read_arguments())
    assert policy.stop_ids == [SPECIAL.index("<|eos|>")]
    assert "shows no answer" in capsys.readouterr().out
    if "m.name" in template or "raise" in template:
        with pytest.raises(records.Stop, match="here: the chat template of .*m refuses it"):
            policy.encode(CHAT[0], "here")


@pytest.mark.parametrize("template", ["chatml", "bos"])
def test_prompts_that_look_like_templates_survive(run, tmp_path, template):
    """PITFALLS 6: nothing is cut at a word that some code took for its own mark."""
    causal_lm(tmp_path / "m", template=template)
    words = [
        "None",
        "say None twice: None",
        "plainanswer",
        "{{ m.content }}",
        "{% endfor %}",
        "user\n",
        "<|im_end|>",
    ]
    rows = run(
        tmp_path / "m", [[{"role": "user", "content": w}] for w in words], "--max_new_tokens", 2
    )
    tok = AutoTokenizer.from_pretrained(tmp_path / "m")
    for word, row in zip(words, rows, strict=True):
        begin, end = ("", "<|im_end|>\n") if template == "chatml" else ("<|bos|>", "<|eot|>")
        content = word if template == "chatml" else word.strip()
        text = f"{begin}<|im_start|>user\n{content}{end}<|im_start|>assistant\n"
        assert tok.decode(row["prompt_token_ids"]) == text


def test_template_arguments_reach_the_template(run, policy):
    rows = run(
        policy, CHAT, "--max_new_tokens", 2, "--chat_template_kwargs", "enable_thinking=false"
    )
    tok = AutoTokenizer.from_pretrained(policy)
    assert all(tok.decode(r["prompt_token_ids"]).endswith("no thoughts\n") for r in rows)
    with pytest.raises(records.Stop, match="never reads it"):
        run(policy, CHAT, "--chat_template_kwargs", "enable_thinkin=false", output="b.jsonl")
    with pytest.raises(records.Stop, match="every prompt is a string"):
        run(
            policy,
            ["a"],
            "--chat_template_kwargs",
            "enable_thinking=false",
            "--max_new_tokens",
            2,
            output="c.jsonl",
        )


# ---- nothing lost ------------------------------------------------------------------------------


def test_long_prompts_are_dropped_and_counted(run, policy, tmp_path):
    """PITFALLS 12: rows in = rows out + named drops, over several parts, one of which loses all its
    rows.
    """
    prompts = [
        CHAT[0] if i >= 64 and i % 2 else [{"role": "user", "content": "fig " * 40}]
        for i in range(100)
    ]
    rows = run(
        policy, prompts, "--max_new_tokens", 4, "--max_prompt_length", 30, "--num_samples", 2
    )
    assert [r["id"] for r in rows] == [f"p{i}" for i in range(65, 100, 2)]
    meta = json.loads((tmp_path / "candidates.jsonl.meta.json").read_text())
    assert meta["counts"]["rows"] == {"in": 100, "out": 18, "dropped": {"prompt_too_long": 82}}
    # The same for what the context cannot hold: 256 positions, 200 of them for the answer.
    prompts = [CHAT[0], [{"role": "user", "content": "name " * 60}]]
    rows = run(policy, prompts, "--max_new_tokens", 200, output="b.jsonl")
    assert [r["id"] for r in rows] == ["p0"]


def command(policy, folder, nproc=1):
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
        if nproc > 1
        else []
    )
    flags = f"--model {policy} --prompts {folder}/prompts.jsonl "
    flags += "--max_new_tokens 20 --num_samples 4 --batch_size 32"
    return [sys.executable, *torchrun, str(ROOT / "generate.py"), *flags.split(), "--output"]


def test_killed_at_one_and_at_two_ranks_is_byte_identical(policy, tmp_path):
    """Law 7, PITFALLS 12: kill -9 in the middle of a run of one rank, then of two; the file is that
    of an undisturbed run.
    """
    write_prompts(tmp_path / "prompts.jsonl", [CHAT[i % 3] for i in range(7 * 64 + 7)])
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    quiet = subprocess.Popen([*command(policy, tmp_path), whole], stderr=subprocess.DEVNULL)

    for nproc in (1, 2):
        process = subprocess.Popen(
            [*command(policy, tmp_path, nproc), broken], stderr=subprocess.DEVNULL
        )
        enough = finished(broken) + 2
        while finished(broken) < enough and process.poll() is None:
            time.sleep(0.005)
        for pid in family(process.pid):
            os.kill(pid, signal.SIGKILL)
        assert (
            process.wait() == -signal.SIGKILL
            and not broken.exists()
            and enough <= finished(broken) < 8
        )

    resumed = subprocess.Popen(
        [*command(policy, tmp_path, nproc=2), broken], stdout=subprocess.PIPE, text=True
    )
    assert "resuming the unfinished run" in resumed.communicate()[0] and resumed.returncode == 0
    assert quiet.wait() == 0 and broken.read_bytes() == whole.read_bytes()
    meta = json.loads((tmp_path / "broken.jsonl.meta.json").read_text())
    assert meta["world_size"] == 2 and meta["counts"]["rows"] == {
        "in": 455,
        "out": 455,
        "dropped": {},
    }


@pytest.mark.slow
def test_the_bench_of_kills(tmp_path):
    """Both stages, killed at one and at two ranks; bench/results/kill_stages.txt holds twenty kills
    of each.
    """
    call = [
        sys.executable,
        "-m",
        "bench.kill_stages",
        "--kills",
        "2",
        "--save",
        tmp_path / "kills.txt",
    ]
    subprocess.run(call, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "kills.txt").read_text().count("2 kills,") == 4


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tensor_parallel_size", "1"], "no effect with --backend hf"),
        (["--engine_args", "a=1"], "no effect with --backend hf"),
        (["--backend", "vllm", "--batch_size", "8"], "no effect with --backend vllm"),
        (["--num_samples", "1", "--temperature", "0.5", "1"], "some would get none"),
        (["--temperature", "0"], "same answer every time"),
        (["--top_p", "0"], "top_p: .0. is not a number in"),
        (["--min_p", "2"], "min_p: .2. is not a number in"),
        (["--top_k", "-1"], "is not a whole number in"),
        (
            ["--num_samples", "1", "--temperature", "0", "--top_k", "5"],
            "no effect at --temperature 0",
        ),
        (["--num_samples", "0"], "num_samples: .0. is not a whole number in"),
        (["--max_prompt_length", "0"], "max_prompt_length: .0. is not"),
        (
            ["--max_new_tokens", "256"],
            "longer than 0 tokens, .*lower --max_new_tokens: the context is 256",
        ),
        (["--batch_size", "4"], "samples of a prompt run together"),
        (["--chat_template_kwargs", "x"], "not a key=value"),
        (["--max_prompt_length", "3"], "all 3 prompts are longer than 3 tokens"),
    ],
)
def test_flags_that_cannot_be_meant(run, policy, flags, message):
    with pytest.raises(records.Stop, match=message):
        run(policy, CHAT, "--max_new_tokens", 4, *flags)


def test_unknown_flags_fail(run, policy, capsys):
    with pytest.raises(records.Stop, match="unrecognized arguments: --temperatur"):
        run(policy, CHAT, "--temperatur", "1")


def test_bad_prompts_are_named_before_the_work_begins(run, policy, tmp_path):
    """Issue 2, shown 8: file and line, and what to do."""
    good = {"id": "a", "prompt": CHAT[0]}
    ends_in_assistant = {"id": "b", "prompt": CHAT[2][:2]}
    with pytest.raises(
        records.Stop, match=r"prompts.jsonl:2: the conversation ends in an assistant turn"
    ):
        run(policy, [good, ends_in_assistant], "--max_new_tokens", 4)
    with pytest.raises(records.Stop, match=r'prompts.jsonl:2: id "a" was used in line 1'):
        run(policy, [good, good], "--max_new_tokens", 4)
    with pytest.raises(records.Stop, match=r'prompts.jsonl:2: key "prompt" is missing'):
        run(policy, [good, {"id": "b"}], "--max_new_tokens", 4)
    with pytest.raises(records.Stop, match=r"prompts.jsonl:2: the prompt is empty"):
        run(policy, ["good", ""], "--max_new_tokens", 4)
    with pytest.raises(records.Stop, match="the file is empty"):
        run(policy, [], "--max_new_tokens", 4)
    assert not (tmp_path / "candidates.jsonl").exists()


def test_models_that_cannot_answer(run, tmp_path):
    """Issue 2, shown 8: no model, no tokenizer, no template, an encoder-decoder; each with its
    remedy.
    """
    with pytest.raises(records.Stop, match="no such file or folder"):
        run(tmp_path / "nowhere", CHAT)
    causal_lm(tmp_path / "bare", template=None)
    with pytest.raises(records.Stop, match="bare: its tokenizer cannot be loaded"):
        run(tmp_path / "bare", CHAT)
    causal_lm(tmp_path / "base", template="none")
    with pytest.raises(records.Stop, match=r"prompts.jsonl:2: .*has no chat template"):
        run(tmp_path / "base", ["text is fine", CHAT[0]], "--max_new_tokens", 4)
    assert (
        len(run(tmp_path / "base", ["text is fine"], "--max_new_tokens", 4, output="b.jsonl")) == 1
    )
    T5Config().save_pretrained(tmp_path / "t5")
    tokenizer(tmp_path / "t5")
    with pytest.raises(records.Stop, match="t5 is no decoder-only language model"):
        run(tmp_path / "t5", CHAT)
    model = causal_lm(tmp_path / "nan")
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(
        records.Stop, match=r'prompts.jsonl: "p2": the log-prob of an answer: the value is nan'
    ):
        run(tmp_path / "nan", CHAT, "--max_new_tokens", 4, output="c.jsonl")  # p2: longest first


def test_help_teaches(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--help"])
    with pytest.raises(SystemExit) as e:
        generate.read_arguments()
    text = capsys.readouterr().out
    assert e.value.code == 0 and "torchrun" in text and "--chat_template_kwargs" in text
