"""Every setting of iterate.sh at once, on the demo's models: undisturbed, then killed and resumed.

    OMP_NUM_THREADS=1 python -m bench.all_settings --save bench/results/all_settings.txt

Some settings exclude others, so there are two runs, of three iterations each:

    served   two ranks; iterate.sh starts vLLM for the judge and stops it. With answers of a second
             policy, pairs of an earlier iteration and of two other files, and an opponent's file
    by_url   one rank; a vLLM server that is up already judges. With pairs held out of training,
             and reference answers that the prompts bring along as the opponent

Then each is killed, with kill -9 of its process group, in --kills of its commands, spread over it,
at a random moment of each; the same command follows at once. In the end all must be as it was in
the undisturbed run, to the byte: rows, scores, pairs, weights, evaluations, the training's log, the
figures of summary.jsonl, and the points in tensorboard, each once. And no server may be left. With
--folder the runs stay there, each with its report.html. The stages of by_url run in forks of one
python (bench/warm_python.py), which saves their imports; those of served as a user runs them.

The judge is a small language model of our own (bench/small_judge.py), served in fp32: in bf16 the
other requests that vLLM computes at the same time might turn a narrow verdict.
"""

import argparse
import importlib.metadata
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arguments import integer_in, parse
from bench.chaos_kills import seconds_of
from bench.chaos_world import ROOT, Loop, World, wait_until
from bench.small_judge import train_judge
from bench.warm_python import WarmPython
from demo.gold import CATEGORIES
from demo.task import make_prompts, sloppy_answer
from records import dump, remove
from stage import hash_path

DEMO = ROOT / "demo/build/seed_0"
TRAIN, HELDOUT = 1024, 100  # prompts
OFFLINE = 32  # pairs in each file of other origin
SERVER = "vllm.entrypoints.openai.api_server"
SERVER_ARGS = "--enforce-eager --dtype float32"
TIMED = ("seconds", "tokens_per_second")  # figures that differ from run to run


class AllSettings(World):
    """What both runs have in common."""

    name = ""

    def __post_init__(self):
        super().__post_init__()
        self.run = self.folder / "runs" / self.name

    def given(self) -> dict:
        home = self.home
        return {
            "PYTHON": self.python,
            "OMP_NUM_THREADS": 1,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": 1,
            "MODEL": DEMO / "policy",
            "PROMPTS": home / "prompts.jsonl",
            "HELDOUT": home / "heldout.jsonl",
            "RUN": self.run,
            "SEED": 1,
            "REWARD_MODEL": DEMO / "reward_model",
            "REWARD_FN": ROOT / "demo/verifiable.py:correct_and_rare",
            "GOLD_FN": ROOT / "demo/gold.py:gold",
            "JUDGE": home / "judge",
            "ITERS": 3,
            "PROMPTS_PER_ITER": 128,
            "NUM_SAMPLES": 3,
            "EVAL_SAMPLES": 2,
            "EXTRA_PAIRS": f"{home}/offline_0.jsonl {home}/offline_1.jsonl",
            "REPORT_TO": "tensorboard",
            "GENERATE_ARGS": "--max_new_tokens 24 --temperature 0.8 1.0 1.2",
            "EVAL_ARGS": "--max_new_tokens 32",
            "SCORE_ARGS": "--reward_weights rm=0.5 correct_and_rare=2 --missing_eos_penalty 1",
            "JUDGE_ARGS": f"--judge_prompt {home}/judge/prompt.txt --judge_max_tokens 4",
            "PAIRS_ARGS": "--keep_truncated --length_penalty 0.02",
        }

    def results(self, run: Path | None = None) -> dict:
        """Also the second policy's answers, both files of scores, and what is shown of the run."""
        run = run or self.run
        found = super().results(run)
        for pattern in ("enhancer.jsonl", "eval_pairs.jsonl", "*scored.unjudged.jsonl"):
            for path in sorted(run.glob(f"iter_*/**/{pattern}")):
                found[str(path.relative_to(run))] = hash_path(path)
        found["summary.jsonl"] = figures_of(run / "summary.jsonl")
        found["tensorboard"] = points_of(run / "tracker", run.name)
        return found


class Served(AllSettings):
    """On two ranks, with a judge that iterate.sh serves."""

    name = "served"

    def given(self) -> dict:
        return super().given() | {
            "NPROC": 2,
            "GENERATE_NPROC": 1,
            "TORCHRUN_ARGS": "--standalone --max_restarts 0",
            "JUDGE_SERVER_ARGS": SERVER_ARGS,
            "OPPONENT": self.home / "opponent.jsonl",
            "ENHANCER": "init",
            "HISTORY": 1,
            "EXTRA_PAIRS_ITERS": "all",
            "REF": "init",
            "KEEP": "last",
            "TRAIN_ARGS": "--learning_rate 2e-4 --batch_size 32 --save_every 2 --beta 0.1 0.2",
        }


class ByUrl(AllSettings):
    """On one rank, with a server that is up already."""

    name = "by_url"
    url = ""

    def given(self) -> dict:
        training = "--learning_rate 2e-4 --batch_size 16 --save_every 3 --eval_every 2"
        return super().given() | {
            "JUDGE_URL": self.url,
            "WRITER": "init",
            "OPPONENT": "meta.reference",
            "ENHANCER": "prev",
            "EVAL_PAIRS_SHARE": 0.1,
            "TRAIN_ARGS": training,
        }


# ---- what a user brings ------------------------------------------------------------------------


def bring(world: World) -> float:
    """Models, prompts, the opponent's answers and pairs of other origin; how often the judge is
    right.
    """
    build = [sys.executable, "demo/build.py", "--output", str(DEMO)]
    subprocess.run(build, cwd=ROOT, check=True)
    rng = random.Random(1)
    prompts, heldout = make_prompts(seed=0)
    heldout = heldout[:HELDOUT]
    opponents = []
    for row in heldout:
        row["meta"]["reference"] = sloppy_answer(row["meta"], rng)
        answers = [{"text": sloppy_answer(row["meta"], rng)} for _ in range(2)]
        opponents.append(row | {"candidates": answers})
    rows = {
        "prompts": prompts[:TRAIN],
        "heldout": heldout,
        "opponent": opponents,
        "offline_0": [offline_pair(row, rng) for row in prompts[-OFFLINE:]],
        "offline_1": [offline_pair(row, rng) for row in prompts[-2 * OFFLINE : -OFFLINE]],
    }
    world.home.mkdir(parents=True, exist_ok=True)
    for name, its_rows in rows.items():
        (world.home / f"{name}.jsonl").write_text("".join(map(dump, its_rows)))
    return train_judge(DEMO / "policy", prompts, world.home / "judge")


def offline_pair(row: dict, rng) -> dict:
    """A right answer and a sloppy one, without token ids, as preference data from elsewhere."""
    words = CATEGORIES[row["meta"]["category"]]
    right = ", ".join(rng.sample(words, k=row["meta"]["count"]))
    texts = {"chosen": right, "rejected": sloppy_answer(row["meta"], rng)}
    turns = {name: [{"role": "assistant", "content": text}] for name, text in texts.items()}
    return {"prompt": row["prompt"]} | turns


@contextmanager
def server(model: Path, log: Path) -> Iterator[str]:
    """The URL of a vLLM server that offers `model`, as long as the block lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", SERVER, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(model), "--max-model-len", "auto", *SERVER_ARGS.split()]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        is_up = wait_until(lambda: answers(port) or process.poll() is not None, 300)
        if not is_up or process.poll() is not None:
            sys.exit(f"the judge's server did not start. Its output is in {log}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


# ---- what must be the same ---------------------------------------------------------------------


def figures_of(summary: Path) -> str:
    """All of summary.jsonl but the times."""
    rows = [json.loads(line) for line in summary.read_text().splitlines()]
    for row in rows:
        for name in TIMED:
            row.pop(name, None)
            row.get("training", {}).pop(name, None)
    return json.dumps(rows)


def points_of(folder: Path, run_name: str) -> str:
    """Every point in tensorboard, as its own reader gives them, but for the times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / run_name), size_guidance={"scalars": 0})
    events.Reload()
    points = {}
    for name in sorted(events.Tags()["scalars"]):
        if not name.endswith(TIMED):
            points[name] = [(event.step, event.value) for event in events.Scalars(name)]
    return json.dumps(points)


# ---- kills -------------------------------------------------------------------------------------


def names_of(loop: Loop) -> list[str]:
    """The loop's commands so far by what they write, as "judge.py iter_01/scored.jsonl".

    What writes elsewhere is named after the one before: the commands of a resumed run are fewer.
    """
    names = ["the start"]
    for _, command in loop.stages:
        words = command.split()
        what = "the judge's server"
        if SERVER not in words:
            what = next(Path(word).name for word in words if word.endswith(".py"))
        if "--output" in words:
            output = Path(words[words.index("--output") + 1])
            names.append(f"{what} {output.relative_to(loop.world.run)}")
        else:
            names.append(f"{what} after {names[-1]}")
    return names[1:]


def moments(loop: Loop, kills: int, rng) -> Iterator[tuple[str, float]]:
    """(name of a command, seconds after its beginning): one in each of `kills` equal shares."""
    names = names_of(loop)
    seconds = seconds_of(loop)
    for kill in range(kills):
        number = int((kill + rng.random()) * len(names) / kills)
        yield names[number], rng.random() * seconds[number]


def kill(world: World, name: str, delay: float) -> tuple[str, list[str]]:
    """Start the loop and kill it so long after this command has begun: what happened, and faults.

    It may end before that, with success: not every moment is as long as it was undisturbed.
    """
    loop = world.start()
    while name not in names_of(loop) and loop.process.poll() is None:
        time.sleep(0.01)
    time.sleep(delay)
    if loop.process.poll() is None:
        loop.kill()
        return f"killed {delay:5.2f} s into {name}", []
    loop.wait(60)
    faults = [] if loop.code == 0 else [f"it stopped by itself: {loop.message()}"]
    return f"ended before its kill in {name}", faults


def servers_left() -> list[str]:
    """vLLM's processes that were started from here."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_text()
            same_session = os.getsid(int(folder.name)) == os.getsid(0)
        except (OSError, UnicodeDecodeError):  # it has ended; or it is none of ours
            continue
        if same_session and re.search("vllm", command, re.IGNORECASE):
            found.append(folder.name)
    return found


def disturb(world: AllSettings, kills: int, rng, say) -> int:
    """Run `world`, then run it again with kills; return how many things are not as they were."""
    kept = servers_left()
    undisturbed = world.loop(timeout=3600)
    if undisturbed.code != 0:
        sys.exit(undisturbed.printed)
    expected = world.results()
    seconds = seconds_of(undisturbed)
    say(f"\n{world.name}: undisturbed, {len(seconds)} commands in {sum(seconds):.0f} s")
    say(table_of(undisturbed))
    remove(world.folder / "undisturbed" / world.name)
    world.run.rename(world.folder / "undisturbed" / world.name)

    faults = []
    for number, (name, delay) in enumerate(moments(undisturbed, kills, rng), 1):
        said, its_faults = kill(world, name, delay)
        say(f"{number:3}  {said}")
        faults += its_faults
    last = world.loop(timeout=3600)
    faults += last.faults()
    now = world.results()
    for name in sorted(expected.keys() | now.keys()):
        if expected.get(name) != now.get(name):
            faults.append(f"not as undisturbed: {name}")
    if not wait_until(lambda: servers_left() == kept, 60):
        faults.append(f"servers are left: {servers_left()}")
    say(f"resumed: {last.message()}. {len(now)} results compared, {len(faults)} faults")
    for fault in faults:
        say(f"  {fault}")
    return len(faults)


def table_of(loop: Loop) -> str:
    """What the last report has printed: the table, and what explains it."""
    _, _, report = loop.printed.rpartition("\niter ")
    table, _, _ = report.partition("\nmore, and the answers")
    return f"iter {table}"


# ---- the command -------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--kills", type=integer_in("[0, inf)"), default=12, help="of each run")
    p.add_argument("--seed", type=integer_in("[0, inf)"), default=0, help="of the moments")
    p.add_argument("--only", choices=("served", "by_url"), help="one of the two runs")
    p.add_argument("--folder", type=Path, help="work here, and leave everything; default: /tmp")
    p.add_argument("--save", type=Path, help="write what is printed there, too")
    return p


def main() -> None:
    args = parse(arguments())
    lines = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    with tempfile.TemporaryDirectory() as temporary:
        faults = both_runs(args, (args.folder or Path(temporary)).resolve(), say)
    if args.save:
        command = " ".join(["$ python -m bench.all_settings", *sys.argv[1:]])
        args.save.write_text("\n".join([command, *lines]) + "\n")
    sys.exit(1 if faults else 0)


def both_runs(args, folder: Path, say) -> int:
    packages = ("torch", "transformers", "tensorboard")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    say(", ".join(versions) + ", CPU")
    (folder / "undisturbed").mkdir(parents=True, exist_ok=True)
    served = Served(folder, python=sys.executable)
    say(f"of two answers that differ in gold, the judge prefers the better in {bring(served):.0%}")

    rng = random.Random(args.seed)
    faults = 0
    if args.only != "by_url":
        faults += disturb(served, args.kills, rng, say)
    if args.only != "served":
        log = folder / "server.log"
        with WarmPython(folder) as warm, server(served.home / "judge", log) as url:
            by_url = ByUrl(folder, python=str(warm.path))
            by_url.url = url
            faults += disturb(by_url, args.kills, rng, say)
    return faults


if __name__ == "__main__":
    main()
