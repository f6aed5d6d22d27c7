"""kill -9 generate.py and score.py at 20 random moments each, at one and at two ranks: the files
must be those of undisturbed runs.

    OMP_NUM_THREADS=1 python -m bench.kill_stages --save bench/results/kill_stages.txt
    OMP_NUM_THREADS=1 python -m bench.kill_stages --vllm --kills 4     generate.py's vLLM backend

The models are small and random, on the CPU. Every stage runs as a user runs it, under torchrun if
there are two ranks. The stage and all that it started are killed at once, and the same command
resumes. One kill in four falls anywhere in a start. The others come when one to three more parts
are there, or up to a part's time later; if no part is left, that is while the parts are joined. An
output that is whole before the kills are used up is compared and removed, and the stage starts
again.

The hf backend and score.py must write the same bytes. vLLM must only give every id once, in order,
with all its samples, each ending as it says (the number of rows whose bytes are the same is
printed).
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from arguments import parse
from records import UNFINISHED, dump, remove
from tests.small_models import causal_lm, reward_model

ROOT = Path(__file__).resolve().parent.parent
PARTS, SAMPLES = 12, 4
REWARD = "def length(prompt, response, meta):\n    return len(response) / 100\n"


def build(folder: Path) -> None:
    """A policy, a reward model and a reward function; prompts of many lengths."""
    causal_lm(folder / "policy", eos=[4, *range(100, 110)])
    reward_model(folder / "reward_model")
    (folder / "reward.py").write_text(REWARD)
    rng, words = random.Random(0), ["please", "three", "fruits", "for", "a", "picnic"]
    turns = (
        [{"role": "user", "content": " ".join(rng.choices(words, k=rng.randint(1, 30)))}]
        for _ in itertools.count()
    )
    rows = [{"id": f"p{i}", "prompt": next(turns)} for i in range(PARTS * 64 - 7)]
    (folder / "prompts.jsonl").write_text("".join(map(dump, rows)))


def command(stage: str, folder: Path, output: Path, ranks: int) -> list[str]:
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
        if ranks > 1
        else []
    )
    if stage == "score":
        flags = [
            "--candidates",
            folder / "generate.jsonl",
            "--reward_model",
            folder / "reward_model",
        ]
        flags += ["--reward_fn", f"{folder}/reward.py:length"]
    else:
        flags = [
            "--model",
            folder / "policy",
            "--prompts",
            folder / "prompts.jsonl",
            "--max_new_tokens",
            32,
        ]
        flags += ["--num_samples", SAMPLES]
        if stage == "generate vllm":
            flags += ["--backend", "vllm", "--engine_args", "enforce_eager=true", "max_num_seqs=64"]
    parts = [sys.executable, *torchrun, ROOT / f"{stage.split()[0]}.py", *flags, "--output", output]
    return [str(x) for x in parts]


def family(pid: int) -> set[int]:
    """The process and all that it started, from /proc: torchrun's ranks and vLLM's engines have
    groups of their own.
    """
    parents = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(entry)] = int(
                open(f"/proc/{entry}/stat").read().rpartition(")")[2].split()[1]
            )
        except OSError:  # it has ended meanwhile
            pass
    found = {pid}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def finished(output: Path) -> int:
    """Parts that are whole, or all where they have been joined."""
    return (
        PARTS
        if output.exists()
        else len(list(output.with_name(output.name + ".parts").glob("0*.jsonl")))
    )


def state(output: Path) -> str:
    """The state in which a kill left the stage."""
    if output.exists():
        return "the output is there"
    torn = len(list(output.parent.glob(output.name + ".parts/*" + UNFINISHED)))
    joining = output.with_name(output.name + UNFINISHED).exists()
    return (
        f"{finished(output):2} of {PARTS} parts"
        + f", {torn} torn" * (torn > 0)
        + ", half joined" * joining
    )


def start(call: list[str], log: Path) -> subprocess.Popen:
    with open(log, "a") as file:
        return subprocess.Popen(call, cwd=ROOT, stdout=file, stderr=file)


def complete(output: Path) -> None:
    """Every prompt once, in order, with all its samples, each ending as it says."""
    rows = [json.loads(line) for line in open(output, encoding="utf-8")]
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(PARTS * 64 - 7)]
    assert all(len(row["candidates"]) == SAMPLES for row in rows)
    ends = Counter(
        (c["finish_reason"], len(c["token_ids"]) == 32) for row in rows for c in row["candidates"]
    )
    assert not ends["length", False] and ends["length", True] and ends["stop", False]


def disturb(stage: str, ranks: int, folder: Path, kills: int, rng: random.Random, say) -> None:
    """`kills` kills of one stage at one number of ranks; every whole output is compared with the
    undisturbed one.
    """
    name, log = stage.split()[0], folder / "log"
    quiet, output = folder / f"{name}.jsonl", folder / f"{name}_disturbed_{ranks}.jsonl"
    if not quiet.exists():
        # by one rank: two ranks must write the same, and score.py reads what generate.py wrote
        assert start(command(stage, folder, quiet, 1), log).wait() == 0, log.read_text()

    # How long a start and a part take, measured on a run of this many ranks.
    began = time.time()
    process = start(command(stage, folder, output, ranks), log)
    while not (first := finished(output)) and process.poll() is None:
        time.sleep(0.005)
    starting = time.time() - began
    assert process.wait() == 0, log.read_text()
    part = (time.time() - began - starting) / max(1, PARTS - first)
    say(
        f"{stage}, ranks: {ranks}. Undisturbed: {starting:.1f} s until the first part, "
        f"{part:.2f} s for each other"
    )

    done = outputs = 0
    while True:
        if process.returncode == 0:
            outputs += 1
            assert not output.with_name(output.name + ".parts").exists()
            if stage == "generate vllm":
                complete(output)
                lines = [path.read_bytes().splitlines() for path in (output, quiet)]
                same = sum(a == b for a, b in zip(*lines, strict=True))
                say(
                    f"  whole: every id once, {SAMPLES} samples each; "
                    f"{same} of {len(lines[0])} rows the same bytes"
                )
            else:
                assert output.read_bytes() == quiet.read_bytes()
                size = output.stat().st_size
                say(f"  whole: {size:,} bytes, those of the undisturbed run of one rank")
            if done == kills:
                return say(f"  {kills} kills, {outputs} whole outputs")
            remove(output)
            remove(output.with_name(output.name + ".meta.json"))
        process, began = start(command(stage, folder, output, ranks), log), time.time()
        if done == kills or finished(output) == PARTS:
            # where no part is left, most kills would fall on a start with nothing to do
            process.wait()
        elif more := rng.randrange(4):
            enough = min(PARTS, finished(output) + more)
            while process.poll() is None and finished(output) < enough:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, part))
        else:
            time.sleep(rng.uniform(0, starting))
        if process.poll() is None:
            for pid in family(process.pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            done += process.wait() == -signal.SIGKILL
            say(f"  kill {done:2} after {time.time() - began:5.2f} s: {state(output)}")
        assert process.returncode in (0, -signal.SIGKILL), log.read_text()


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--kills", type=int, default=20, help="of each stage at each number of ranks")
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    p.add_argument(
        "--vllm", action="store_true", help="generate.py with vLLM, instead of hf and score.py"
    )
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    p.add_argument("--save", type=Path, help="write what is printed there, too")
    args = parse(p)
    lines = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    began, rng = time.time(), random.Random(args.seed)
    versions = " ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")
    )
    python = sys.version.split()[0]
    say(f"{PARTS} parts of 64 prompts, {SAMPLES} samples each; python {python} {versions}, CPU")
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        for stage in ["generate vllm"] if args.vllm else ["generate", "score"]:
            for ranks in args.ranks:
                disturb(stage, ranks, Path(folder), args.kills, rng, say)
    say(f"{time.time() - began:.0f} s in all")
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        command_line = " ".join(["$ python -m bench.kill_stages", *sys.argv[1:]])
        args.save.write_text("\n".join([command_line, *lines]) + "\n")


if __name__ == "__main__":
    main()
