"""The data contract: errors that name file and line, whole files, parts, balances, and what
differs.
"""

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest

import records
from arguments import parse, parser
from conftest import ROOT
from records import PROMPT, SCORED, Stop, count_rows, dump, read_jsonl
from stage import Stage, hash_path, seed_of


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line if isinstance(line, str) else dump(line) for line in lines))
    return path


def prompts(path, n=150):
    return write(
        path,
        *({"id": f"p{i}", "prompt": f"question {i}", "extra": {"kept": [i]}} for i in range(n)),
    )


def new_stage(tmp_path, overwrite=False, **settings):
    args = argparse.Namespace(overwrite=overwrite, prompts=str(tmp_path / "p.jsonl"), **settings)
    return Stage(args, {"prompts": args.prompts}, tmp_path / "out.jsonl")


def fill(stage, path, stop_after=None):
    """Copy the prompts through the parts of a stage, as a real one does."""
    for n, (index, rows) in enumerate(stage.todo(read_jsonl(path, PROMPT))):
        if n == stop_after:
            return
        stage.write_part(index, rows, {"rows": {"in": len(rows), "out": len(rows), "dropped": {}}})
    stage.join(count_rows(path, PROMPT))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json\n", "not JSON"),
        ('["a list"]\n', "must be an object"),
        ('{"prompt": "x"}\n', 'key "id" is missing'),
        ('{"id": 7, "prompt": "x"}\n', 'key "id" must be a string'),
        ('{"id": "a", "prompt": []}\n', "conversation"),
        ('{"id": "a", "prompt": [{"role": "user"}]}\n', "conversation"),
        ('{"id": "p0", "prompt": "again"}\n', 'id "p0" was used in line 1'),
        ('{"id": "a", "prom', "not JSON"),  # a torn last line
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, says):
    path = write(tmp_path / "p.jsonl", {"id": "p0", "prompt": "x"}, line)
    with pytest.raises(Stop, match=f"p.jsonl:2.*{says}"):
        count_rows(path, PROMPT)


def test_a_bad_candidate_is_named(tmp_path):
    row = {"id": "a", "prompt": "x", "prompt_token_ids": [1], "candidates": [{"text": "no reward"}]}
    with pytest.raises(
        Stop, match=r's.jsonl:1: candidates\[0\]: key "token_ids", "logprob".* are missing'
    ):
        list(read_jsonl(write(tmp_path / "s.jsonl", row), SCORED))


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(Stop, match="no such file"):
        list(read_jsonl(tmp_path / "none.jsonl", PROMPT))
    with pytest.raises(Stop, match="empty"):
        list(read_jsonl(write(tmp_path / "empty.jsonl"), PROMPT))


def test_nan_is_never_written():
    with pytest.raises(ValueError):
        dump({"reward": float("nan")})


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path):
    path = write(tmp_path / "x.jsonl", "old\n")
    with pytest.raises(RuntimeError), records.whole(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old\n" and os.listdir(tmp_path) == ["x.jsonl"]
    with records.whole(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("1")
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder/a").read_text() == "1"


def test_hash_of_a_folder_sees_names_and_content(tmp_path):
    (tmp_path / "m").mkdir()
    write(tmp_path / "m/a", "1")
    first = hash_path(tmp_path / "m")
    os.rename(tmp_path / "m/a", tmp_path / "m/b")
    second = hash_path(tmp_path / "m")
    write(tmp_path / "m/b", "2")
    assert len({first, second, hash_path(tmp_path / "m")}) == 3
    write(tmp_path / "m/not UTF-8: \udcff", "1")
    assert hash_path(tmp_path / "m")


def test_seeds_depend_on_every_part():
    assert seed_of(1, "a") == seed_of(1, "a")
    assert len({seed_of(*x) for x in [(1, "a"), (2, "a"), (1, "b"), ("1", "a"), (1, "a", 0)]}) == 5


def test_rows_travel_untouched_in_order_and_a_second_run_is_done(tmp_path, capsys):
    path = prompts(tmp_path / "p.jsonl")
    fill(new_stage(tmp_path, seed=1), path)
    assert (tmp_path / "out.jsonl").read_bytes() == path.read_bytes()
    meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
    assert meta["counts"]["rows"] == {"in": 150, "out": 150, "dropped": {}}
    assert meta["inputs"]["prompts"] == hash_path(path) and meta["versions"]["torch"]
    assert not (tmp_path / "out.jsonl.parts").exists()
    assert new_stage(tmp_path, seed=1).done
    assert "already done" in capsys.readouterr().out


def test_pitfalls_13_a_changed_argument_or_input_stops_and_is_named(tmp_path):
    path = prompts(tmp_path / "p.jsonl")
    fill(new_stage(tmp_path, seed=1), path)
    with pytest.raises(Stop, match="--seed: was 1, is 2"):
        new_stage(tmp_path, seed=2)
    prompts(path, 151)
    with pytest.raises(Stop, match="--prompts: content changed"):
        new_stage(tmp_path, seed=1)
    fill(new_stage(tmp_path, seed=1, overwrite=True), path)
    assert (tmp_path / "out.jsonl").read_bytes() == path.read_bytes()


def test_pitfalls_13_an_unfinished_run_with_other_arguments_is_not_mixed_in(tmp_path):
    path = prompts(tmp_path / "p.jsonl")
    fill(new_stage(tmp_path, seed=1), path, stop_after=1)
    with pytest.raises(Stop, match="--seed: was 1, is 2"):
        new_stage(tmp_path, seed=2)


def test_a_run_that_has_done_nothing_yet_holds_nobody_to_its_settings(tmp_path):
    path = prompts(tmp_path / "p.jsonl")
    new_stage(tmp_path, seed=1)  # began, and failed on its first row, say
    fill(new_stage(tmp_path, seed=2), path)
    assert json.loads((tmp_path / "out.jsonl.meta.json").read_text())["arguments"]["seed"] == 2


def test_an_output_of_unknown_origin_is_not_overwritten(tmp_path):
    prompts(tmp_path / "p.jsonl")
    write(tmp_path / "out.jsonl", "precious\n")
    with pytest.raises(Stop, match="not made by this stage"):
        new_stage(tmp_path, seed=1)
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"


def test_an_output_that_was_damaged_since_is_not_taken_for_done(tmp_path):
    """Fewer rows, each of them as valid as before: no later stage could notice."""
    path = prompts(tmp_path / "p.jsonl")
    fill(new_stage(tmp_path, seed=1), path)
    lines = path.read_text().splitlines(keepends=True)
    write(tmp_path / "out.jsonl", "".join(lines[1:]))
    with pytest.raises(Stop, match="is not what the stage wrote"):
        new_stage(tmp_path, seed=1)
    write(tmp_path / "out.jsonl", "".join(lines))
    assert new_stage(tmp_path, seed=1).done


def test_overwriting_keeps_the_old_output_until_the_new_one_is_whole(tmp_path):
    path = prompts(tmp_path / "p.jsonl")
    fill(new_stage(tmp_path, seed=1), path)
    new_stage(tmp_path, seed=1, overwrite=True)
    assert (tmp_path / "out.jsonl.iterdpo-replaced").read_bytes() == path.read_bytes()


def test_overwriting_goes_on_where_it_was_interrupted(tmp_path):
    """Slurm gives a requeued job the same command, including --overwrite; with other settings it
    starts again.
    """
    path = prompts(tmp_path / "p.jsonl")
    fill(new_stage(tmp_path, seed=1), path)
    fill(new_stage(tmp_path, seed=2, overwrite=True), path, stop_after=2)
    again = new_stage(tmp_path, seed=2, overwrite=True)
    assert [index for index, _ in again.todo(read_jsonl(path, PROMPT))] == [2]
    other = new_stage(tmp_path, seed=3, overwrite=True)
    assert [index for index, _ in other.todo(read_jsonl(path, PROMPT))] == [0, 1, 2]


def test_a_restart_does_only_the_missing_parts(tmp_path):
    path = prompts(tmp_path / "p.jsonl")
    fill(new_stage(tmp_path, seed=1), path, stop_after=2)
    again = new_stage(tmp_path, seed=1)
    assert [index for index, _ in again.todo(read_jsonl(path, PROMPT))] == [2]
    fill(again, path)
    assert (tmp_path / "out.jsonl").read_bytes() == path.read_bytes()


def test_pitfalls_12_a_balance_that_does_not_close_fails(tmp_path):
    prompts(tmp_path / "p.jsonl")
    with pytest.raises(AssertionError, match="3 in != 1 out"):
        new_stage(tmp_path, seed=1).count("rows", 3, 1, {"why": 1})


COPY = """
import argparse, sys, time
sys.path.insert(0, {root!r})
import records
from arguments import parse, parser
from stage import Stage, run
def main():
    p = parser("copy")
    p.add_argument("--prompts")
    p.add_argument("--output")
    p.add_argument("--pause", type=float, default=0)
    args = parse(p)
    stage = Stage(args, {{"prompts": args.prompts}}, args.output, free=("pause",))
    if stage.done:
        return
    n = records.count_rows(args.prompts, records.PROMPT)
    for index, rows in stage.todo(records.read_jsonl(args.prompts, records.PROMPT)):
        time.sleep(args.pause)
        balance = {{"in": len(rows), "out": len(rows), "dropped": {{}}}}
        stage.write_part(index, rows, {{"rows": balance}})
    stage.join(n)
run(main)
"""


@pytest.fixture
def copy(tmp_path):
    script = write(tmp_path / "copies.py", COPY.format(root=str(ROOT)))
    path = prompts(tmp_path / "p.jsonl", 1000)
    return [
        sys.executable,
        str(script),
        "--prompts",
        str(path),
        "--output",
        str(tmp_path / "out.jsonl"),
    ]


def test_killed_at_any_moment_nothing_is_lost(tmp_path, copy):
    """kill -9, eight times at growing delays, then the end: the same bytes."""
    for delay in range(8):
        process = subprocess.Popen([*copy, "--pause", "0.02"], stdout=subprocess.DEVNULL)
        time.sleep(0.15 + 0.05 * delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(copy, check=True)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "p.jsonl").read_bytes()


def test_ctrl_c_says_what_to_do(tmp_path, copy):
    process = subprocess.Popen([*copy, "--pause", "0.5"], stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("out.jsonl.parts/0*.jsonl")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert (
        process.returncode == 130
        and "the same command resumes it" in error
        and "Traceback" not in error
    )
    subprocess.run(copy, check=True)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "p.jsonl").read_bytes()


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path, copy):
    """A limit on the size of files makes write() fail where a full disk does, with the kernel's own
    error.
    """

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))

    done = subprocess.run(copy, capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(rf"error: {tmp_path}/out.jsonl\S*: no space left.*\n", done.stderr)
    assert not (tmp_path / "out.jsonl").exists()
    subprocess.run(copy, check=True)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "p.jsonl").read_bytes()


def test_an_unwritable_folder_is_said(tmp_path, copy):
    write(tmp_path / "file", "")
    done = subprocess.run(
        [*copy[:-1], str(tmp_path / "file/out.jsonl")], capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and "Check the path and its permissions" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_dashes_are_accepted_and_unknown_flags_are_not(copy, tmp_path):
    subprocess.run([*copy, "--pause=0"], check=True)
    done = subprocess.run([*copy, "--pau", "0"], capture_output=True, text=True)
    assert done.returncode == 1 and "unrecognized" in done.stderr
    p = parser("x")
    p.add_argument("--max_length", type=int)
    assert (
        parse(p, ["--max-length=3"]).max_length == parse(p, ["--max-length", "3"]).max_length == 3
    )


RANK = """
import os, pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from stage import run

def main():
    pathlib.Path(sys.argv[2], os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(300)

run(main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_ranks_end_when_torchrun_is_killed(tmp_path):
    """Orphans would continue to write at the same time as the ranks of the next start."""
    (tmp_path / "rank.py").write_text(RANK)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    process = subprocess.Popen([*launcher, tmp_path / "rank.py", ROOT, tmp_path])
    pids = [tmp_path / "0", tmp_path / "1"]
    deadline = time.time() + 60
    while not all(p.exists() and p.read_text() for p in pids):
        assert time.time() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()

    def alive(pid):
        try:  # a zombie, which nobody has reaped yet, is dead
            return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    while any(alive(p.read_text()) for p in pids):
        assert time.time() < deadline
        time.sleep(0.05)
