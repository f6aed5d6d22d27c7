"""Where prompts come from: tools/prepare_prompts.py splits a data set, tools/take_prompts.py
divides it among the iterations.
"""

import json
import random
import sys
from pathlib import Path

import pytest

from records import dump

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import prepare_prompts
import take_prompts


def run(tool, monkeypatch, **flags) -> None:
    argv = []
    for name, value in flags.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        argv += [f"--{name}", *map(str, values)]
    monkeypatch.setattr(sys, "argv", [tool.__name__, *argv])
    tool.main()


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(map(dump, rows)), encoding="utf-8")
    return path


def read(path) -> list[dict]:
    with open(path, encoding="utf-8") as file:  # str.splitlines would also cut at U+2028
        return [json.loads(line) for line in file]


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def counts(path) -> dict:
    return json.loads(Path(f"{path}.meta.json").read_text())["counts"]["rows"]


# ---- prepare_prompts ---------------------------------------------------------------------------


def prepare(tmp_path, monkeypatch, dataset, **flags) -> list[dict]:
    output = tmp_path / "out" / "prompts.jsonl"
    run(prepare_prompts, monkeypatch, dataset=dataset, output=output, **flags)
    return read(output)


def test_split_is_disjoint_and_balanced(tmp_path, monkeypatch):
    """PITFALLS 12 and 15: rows in = rows out + named drops; no held-out prompt is trained on, by id
    or content.
    """
    rows = [{"prompt": f"question {i}"} for i in range(50)]
    rows += [{"prompt": f"  question\n{i} "} for i in range(10)] + [
        {"prompt": " "},
        {"prompt": None},
    ]
    data = write(tmp_path / "data.jsonl", rows)
    held = tmp_path / "out" / "heldout.jsonl"
    out = prepare(tmp_path, monkeypatch, data, heldout=7, heldout_output=held, max_prompts=30)
    held_rows = read(held)

    assert (len(out), len(held_rows)) == (30, 7)
    assert not {r["id"] for r in out} & {r["id"] for r in held_rows}
    words = [" ".join(r["prompt"].split()) for r in out + held_rows]
    assert len(set(words)) == 37
    dropped = {"duplicate": 10, "empty": 2, "held out": 7, "over the maximum": 13}
    assert counts(tmp_path / "out" / "prompts.jsonl") == {"in": 62, "out": 30, "dropped": dropped}
    assert counts(held)["dropped"] == {
        "duplicate": 10,
        "empty": 2,
        "training": 30,
        "over the maximum": 13,
    }


def test_split_depends_on_content_and_seed_alone(tmp_path, monkeypatch):
    """PITFALLS 14: shuffled input, same split and same ids; another seed, another split."""

    def split(rows, folder, seed):
        tmp = tmp_path / folder
        tmp.mkdir()
        data = write(tmp / "data.jsonl", rows)
        prepare(tmp, monkeypatch, data, heldout=10, heldout_output=tmp / "heldout.jsonl", seed=seed)
        return {r["id"] for r in read(tmp / "heldout.jsonl")}

    rows = [{"prompt": f"question {i}"} for i in range(60)]
    first = split(rows, "a", 0)
    random.Random(1).shuffle(rows)
    assert split(rows, "b", 0) == first
    assert split(rows, "c", 1) != first


def test_messages_lose_the_answer_and_nothing_else(tmp_path, monkeypatch):
    """Trailing assistant turns are the answer; earlier ones are context. Extra keys in turns are
    left out.
    """
    turns = [
        {"role": "user", "content": "a", "weight": 1},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]
    only_answers = {"messages": turns[1:2]}
    data = write(tmp_path / "data.jsonl", [{"messages": turns}, only_answers])
    (row,) = prepare(tmp_path, monkeypatch, data, system="Be brief.")
    roles = [(t["role"], t["content"]) for t in row["prompt"]]
    assert roles == [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    assert set(row) == {"id", "prompt"} and set(row["prompt"][1]) == {"role", "content"}
    assert counts(tmp_path / "out" / "prompts.jsonl")["dropped"] == {"empty": 1}


def test_conversation_field_meta_and_ids(tmp_path, monkeypatch):
    rows = [
        {"q": "x", "id": 7, "answer": "1", "meta": {"k": 2}},
        {"q": "y", "answer": "2", "meta": {"k": 3}},
    ]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows, indent=1))
    out = prepare(
        tmp_path, monkeypatch, data, field="q", as_conversation=True, meta=["answer", "meta"]
    )
    assert [r["prompt"] for r in out] == [user("x"), user("y")]
    assert [r["meta"] for r in out] == [{"answer": "1", "k": 2}, {"answer": "2", "k": 3}]
    assert out[0]["id"] == "7" and out[1]["id"].startswith("p") and len(out[1]["id"]) == 17


def test_template_like_text_survives(tmp_path, monkeypatch):
    """PITFALLS 6: nothing in a prompt is a sentinel."""
    text = "None <|im_end|>\n<|im_start|>assistant {x} \u2028 ü 🙂"
    data = write(tmp_path / "data.jsonl", [{"prompt": text}])
    assert prepare(tmp_path, monkeypatch, data)[0]["prompt"] == text


def test_again_does_nothing_and_a_lost_output_comes_back(tmp_path, monkeypatch, capsys):
    """PITFALLS 13: the same command is done; another setting stops and names itself; one lost file
    is remade alike.
    """
    data = write(tmp_path / "data.jsonl", [{"prompt": f"question {i}"} for i in range(20)])
    held = tmp_path / "heldout.jsonl"
    out = prepare(tmp_path, monkeypatch, data, heldout=5, heldout_output=held)
    before = held.read_bytes()
    capsys.readouterr()
    prepare(tmp_path, monkeypatch, data, heldout=5, heldout_output=held)
    assert capsys.readouterr().out.count("already done") == 2
    held.unlink()
    assert prepare(tmp_path, monkeypatch, data, heldout=5, heldout_output=held) == out
    assert held.read_bytes() == before
    with pytest.raises(SystemExit, match="--seed: was 0, is 1"):
        prepare(tmp_path, monkeypatch, data, heldout=5, heldout_output=held, seed=1)


@pytest.mark.parametrize(
    "rows, flags, message",
    [
        ([{"text": "x"}], {}, r'data.jsonl: row 1: no key "messages".*--field.*text'),
        ([[1]], {}, "row 1: expected a JSON object|data.jsonl:1: expected a JSON object"),
        ([{"prompt": 3}], {}, r'row 1: "prompt" must be text or a list'),
        ([{"prompt": [{"from": "human", "value": "x"}]}], {}, r"row 1.*must be text or a list"),
        (
            [{"prompt": "x"}, {"prompt": "y"}],
            {"heldout": 2},
            r"2 different prompts, 2 of them to hold out",
        ),
        (
            [{"prompt": "x", "id": 1}, {"prompt": "y", "id": 1}],
            {},
            r'row 2: id "1" was used .*row 1.*--new_ids',
        ),
        ([{"prompt": user("x")}], {"as_conversation": True}, "--as_conversation has no effect"),
        ([{"prompt": "x"}], {"system": "s"}, "--system has no effect"),
        ([{"prompt": "x"}], {"split": "test"}, "--split has no effect"),
        ([{"prompt": "x"}], {"meta": ["k"]}, r'row 1: no key "k", which --meta names'),
    ],
)
def test_bad_rows_and_idle_flags_are_errors(tmp_path, monkeypatch, rows, flags, message):
    """PITFALLS 25 for the flags; every message names the place, and no output is left."""
    data = write(tmp_path / "data.jsonl", rows)
    if "heldout" in flags:
        flags = flags | {"heldout_output": tmp_path / "heldout.jsonl"}
    with pytest.raises(SystemExit, match=message):
        prepare(tmp_path, monkeypatch, data, **flags)
    assert (
        not (tmp_path / "out" / "prompts.jsonl").exists()
        and not (tmp_path / "heldout.jsonl").exists()
    )


def test_other_bad_sources(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no such file or folder"):
        prepare(tmp_path, monkeypatch, tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    with pytest.raises(SystemExit, match=r"bad.jsonl:2: not JSON"):
        prepare(tmp_path, monkeypatch, tmp_path / "bad.jsonl")
    (tmp_path / "bad.json").write_text('[{"prompt": "x"}')
    with pytest.raises(SystemExit, match=r"bad.json: not JSON"):
        prepare(tmp_path, monkeypatch, tmp_path / "bad.json")
    with pytest.raises(SystemExit, match="--heldout has no effect"):
        prepare(tmp_path, monkeypatch, tmp_path / "bad.json", heldout=3)


def test_hub_needs_a_package_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="pip install datasets"):
        prepare(tmp_path, monkeypatch, "someone/something")


def test_folder_of_parquet(tmp_path, monkeypatch):
    """A downloaded data set: the files of the split are read in order, the others are not."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for name, lo in (
        ("train-00000-of-00002", 0),
        ("train-00001-of-00002", 3),
        ("train_sft-00000-of-00001", 6),
    ):
        rows = [
            {"messages": user(f"q{i}") + [{"role": "assistant", "content": "a"}]}
            for i in range(lo, lo + 3)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    out = prepare(tmp_path, monkeypatch, tmp_path / "set")
    assert [r["prompt"] for r in out] == [user(f"q{i}") for i in range(6)]


def test_hub_data_set(tmp_path, monkeypatch):
    """The call that reads from the hub, on a data set that the same library finds in a folder."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "someone" / "something").mkdir(parents=True)
    write(
        tmp_path / "someone" / "something" / "train.jsonl", [{"prompt": f"q{i}"} for i in range(5)]
    )
    hub = prepare_prompts.open_hub(str(tmp_path / "someone" / "something"), None, "train", None)
    assert [row["prompt"] for row in hub] == [f"q{i}" for i in range(5)]
    monkeypatch.setattr(prepare_prompts, "open_hub", lambda *_: hub)
    out = prepare(tmp_path, monkeypatch, "someone/something")
    assert [r["prompt"] for r in out] == [f"q{i}" for i in range(5)]
    assert json.loads((tmp_path / "out/prompts.jsonl.meta.json").read_text())["key"]["arguments"][
        "dataset"
    ]


# ---- take_prompts ------------------------------------------------------------------------------


def taken(tmp_path, monkeypatch, total=10, **flags) -> list[str]:
    prompts = write(
        tmp_path / "prompts.jsonl", [{"id": f"t{i}", "prompt": f"train {i}"} for i in range(total)]
    )
    held = write(tmp_path / "heldout.jsonl", [{"id": "h0", "prompt": "held 0"}])
    name = "-".join(f"{k}{v}" for k, v in flags.items())
    flags = {"prompts": prompts, "heldout": held, "output": tmp_path / f"{name}.jsonl"} | flags
    run(take_prompts, monkeypatch, **flags)
    return [r["id"] for r in read(flags["output"])]


def test_iterations_deal_out_every_prompt_before_any_twice(tmp_path, monkeypatch):
    slices = [taken(tmp_path, monkeypatch, iteration=k, num_prompts=5) for k in (1, 2, 3, 4)]
    assert (
        sorted(slices[0] + slices[1])
        == sorted(slices[2] + slices[3])
        == sorted(f"t{i}" for i in range(10))
    )
    assert set(slices[0]) != set(slices[2])  # a new shuffle
    assert slices[0] == sorted(slices[0])  # in the order of the file


@pytest.mark.parametrize("total, n", [(10, 4), (7, 5), (5, 5), (3, 1), (11, 3)])
def test_take_is_a_row_of_passes(total, n):
    """Every pass holds each prompt once; no iteration holds one twice, not even across passes."""
    slices = [take_prompts.take(total, n, k, seed=3) for k in range(1, 3 * total + 1)]
    assert all(len(set(s)) == n for s in slices)
    flat = sum(slices, [])
    for p in range(len(flat) // total):
        assert sorted(flat[p * total : (p + 1) * total]) == list(range(total))


def test_running_out_wraps_and_says_so(tmp_path, monkeypatch, capsys):
    """PITFALLS 32: no empty slice, and a message in just the iterations that begin a new pass."""
    said = []
    for k in (1, 2, 3, 4, 5, 6):
        assert len(taken(tmp_path, monkeypatch, iteration=k, num_prompts=4)) == 4
        said.append("new shuffle" in capsys.readouterr().out)
    assert said == [
        False,
        False,
        True,
        False,
        False,
        True,
    ]  # 10 prompts: positions 10 and 20 begin passes
    assert len(taken(tmp_path, monkeypatch, iteration=2, num_prompts=99)) == 10
    assert "all are taken, once" in capsys.readouterr().out
    assert len(taken(tmp_path, monkeypatch, iteration=2)) == 10
    assert "shuffle" not in capsys.readouterr().out


def test_seed_decides_the_slice(tmp_path, monkeypatch):
    """PITFALLS 14."""
    first = taken(tmp_path, monkeypatch, total=100, iteration=1, num_prompts=10)
    assert first == taken(tmp_path, monkeypatch, total=100, iteration=1, num_prompts=10, seed=0)
    assert first != taken(tmp_path, monkeypatch, total=100, iteration=1, num_prompts=10, seed=1)


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"id": "h0", "prompt": "new"},
            r'prompts.jsonl:2: id "h0" has the same id as .*heldout.jsonl:1',
        ),
        (
            {"id": "t1", "prompt": user(" held  0")},
            r'prompts.jsonl:2: id "t1" has the same content as .*heldout.jsonl:1',
        ),
        ({"id": "t0", "prompt": "new"}, r'prompts.jsonl:2: id "t0" was used in line 1'),
        ({"id": "t1"}, r'prompts.jsonl:2: key "prompt" is missing'),
    ],
)
def test_heldout_prompts_are_never_dealt_out(tmp_path, monkeypatch, row, message):
    """PITFALLS 15: by id and by content, whatever the spacing, string or conversation."""
    prompts = write(tmp_path / "prompts.jsonl", [{"id": "t0", "prompt": "train 0"}, row])
    held = write(tmp_path / "heldout.jsonl", [{"id": "h0", "prompt": "held 0"}])
    output = tmp_path / "out.jsonl"
    with pytest.raises(SystemExit, match=message):
        run(take_prompts, monkeypatch, prompts=prompts, heldout=held, output=output, iteration=1)
    assert not output.exists()


def test_rows_travel_untouched_and_balance(tmp_path, monkeypatch):
    rows = [
        {"id": "a", "prompt": "ü \u2028 x", "meta": {"k": [1]}, "other": None},
        {"id": "b", "prompt": "y"},
    ]
    prompts = write(tmp_path / "prompts.jsonl", rows)
    prompts.write_text(prompts.read_text().rstrip("\n"))  # a file without a last newline
    held = write(tmp_path / "heldout.jsonl", [{"id": "h", "prompt": "h"}])
    flags = {"prompts": prompts, "heldout": held, "iteration": 1}
    run(take_prompts, monkeypatch, output=tmp_path / "all.jsonl", **flags)
    assert read(tmp_path / "all.jsonl") == rows
    run(take_prompts, monkeypatch, output=tmp_path / "one.jsonl", num_prompts=1, **flags)
    assert counts(tmp_path / "one.jsonl") == {"in": 2, "out": 1, "dropped": {"other iterations": 1}}
