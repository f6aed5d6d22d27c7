"""What bench/chaos.py disturbs: a small model, a Python reward, prompts, and the loop on them."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from records import dump, remove
from stage import hash_path
from tests.small_models import causal_lm

ROOT = Path(__file__).resolve().parent.parent
REWARD = (
    "def reward(prompt, response, meta):\n    return response.count('e') - 0.01 * len(response)\n"
)
PROMPTS, HELDOUT = 75, 6  # more than stage.ROWS_PER_PART, so that a stage has two parts
LEAKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "VLLM_", "OPENAI_API_KEY")

THEIRS = ("model", "reward.py", "prompts.jsonl", "heldout.jsonl")
ROWS = ("prompts.jsonl", "candidates.jsonl", "scored.jsonl", "pairs.jsonl")
EVALUATION = ("eval/candidates.jsonl", "eval/scored.jsonl")

# What bash and the tools that it calls say when the script did not foresee something.
UNFORESEEN = re.compile(
    r"^\S*\.sh: line \d+: .*|^(?:mkdir|mv|rm|tee|find|flock|cat|dirname|touch): .*", re.M
)
TRACEBACK = "Traceback (most recent call last)"


@dataclass
class World:
    """folder/home is where the user stands and keeps what is theirs; folder/run is the run."""

    folder: Path
    warm: str = ""  # a warm python, which knows SUICIDE
    python: str = ""  # what the stages run in

    def __post_init__(self):
        self.home = self.folder / "home"
        self.run = self.folder / "runs/run"

    def build(self) -> None:
        """What a user brings."""
        causal_lm(self.home / "model", tie=True)
        (self.home / "reward.py").write_text(REWARD)
        rows = []
        for i in range(PROMPTS + HELDOUT):
            turn = {"role": "user", "content": f"name fruit {i}"}
            rows.append({"id": f"p{i}", "prompt": [turn]})
        (self.home / "prompts.jsonl").write_text("".join(map(dump, rows[:PROMPTS])))
        (self.home / "heldout.jsonl").write_text("".join(map(dump, rows[PROMPTS:])))
        self.theirs = self.hash_of_theirs()

    def given(self) -> dict:
        """The settings that all runs have."""
        return {
            "PYTHON": self.python,
            "MODEL": self.home / "model",
            "REWARD_FN": f"{self.home}/reward.py:reward",
            "PROMPTS": self.home / "prompts.jsonl",
            "HELDOUT": self.home / "heldout.jsonl",
            "RUN": self.run,
            "ITERS": 2,
            "PROMPTS_PER_ITER": 70,
            "NUM_SAMPLES": 3,
            "EVAL_SAMPLES": 2,
            "NPROC": 1,
            "GENERATE_ARGS": "--max_new_tokens 12 --backend hf",
            "PAIRS_ARGS": "--keep_truncated",
            "TRAIN_ARGS": "--learning_rate 1e-3 --batch_size 8 --save_every 4",
            "OMP_NUM_THREADS": 1,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": 1,
        }

    def settings(self, **more) -> dict[str, str]:
        """The environment of the loop."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(LEAKS)}
        return clean | {k: text(v) for k, v in (self.given() | more).items()}

    def start(self, prepare: Callable[[], None] | None = None, **more) -> "Loop":
        return Loop(self, self.settings(**more), prepare)

    def loop(self, timeout: float = 600, prepare=None, **more) -> "Loop":
        """Run the loop to its end."""
        loop = self.start(prepare, **more)
        loop.wait(timeout)
        return loop

    def hash_of_theirs(self) -> list[str]:
        """Of what the user has brought; a run of theirs may come to stand beside it."""
        return [hash_path(self.home / name) for name in THEIRS]

    def results(self, run: Path | None = None) -> dict[str, str]:
        """Hashes of all that a run is for: rows, weights, evaluations, and the training's log."""
        run = run or self.run
        found = {}
        for folder in sorted(run.glob("iter_??")):
            files = [folder / name for name in (*ROWS, *EVALUATION)]
            files += sorted(folder.glob("policy/*"))
            for path in files:
                if path.exists():
                    found[str(path.relative_to(run))] = hash_path(path)
            log = folder / "policy.train.jsonl"
            if log.exists():
                found[str(log.relative_to(run))] = without_times(log)
        return found

    def keep(self, name: str) -> Path:
        """A copy of the run as it is now, to begin from again."""
        copy = self.folder / "kept" / name
        remove(copy)
        shutil.copytree(self.run, copy, symlinks=True)
        return copy

    def restore(self, copy: Path) -> None:
        """The run as it was. Its folder stays: it may be where a file system is mounted."""
        self.run.mkdir(parents=True, exist_ok=True)
        for path in self.run.iterdir():
            remove(path)
        shutil.copytree(copy, self.run, symlinks=True, dirs_exist_ok=True)

    def copy_back(self, original: Path, path: Path) -> None:
        """One file or folder, from a kept copy."""
        remove(path)
        if original.is_dir():
            shutil.copytree(original, path, symlinks=True)
        else:
            shutil.copy2(original, path)


def text(value) -> str:
    return os.fsdecode(value) if isinstance(value, bytes) else str(value)


def without_times(log: Path) -> str:
    rows = [json.loads(line) for line in log.read_bytes().splitlines()]
    for row in rows:
        row.pop("tokens_per_second", None)
    return json.dumps(rows)


class Loop:
    """One start of iterate.sh, in a process group of its own."""

    def __init__(self, world: World, environment: dict, prepare=None):
        self.world = world
        self.stages: list[tuple[float, str]] = []  # when each command began, and what it is
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            ["bash", ROOT / "iterate.sh"],
            cwd=world.home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=prepare,
        )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        for line in self.process.stdout:
            line = line.decode(errors="backslashreplace")
            self.lines.append(line)
            if line.startswith("+ "):
                self.stages.append((time.monotonic(), line[2:].strip()))

    @property
    def printed(self) -> str:
        return "".join(self.lines)

    @property
    def code(self) -> int | None:
        return self.process.returncode

    def wait(self, timeout: float) -> None:
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            self.lines.append(f"\nchaos: did not end within {timeout:.0f} s\n")
        self.ended = time.monotonic()
        self.reader.join(10)

    def kill(self) -> None:
        """kill -9 of the group; again while a fork of the warm python is about to join it."""
        while self.left_behind():
            os.killpg(self.process.pid, signal.SIGKILL)
            time.sleep(0.01)
        self.process.wait()

    def left_behind(self) -> list[str]:
        """Processes of its group that are still there."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, _, rest = stat.read_text().rpartition(")")
            except OSError:  # it has ended
                continue
            state, _, group = rest.split()[:3]
            if int(group) == self.process.pid and state != "Z":
                found.append(name)
        return found

    def faults(self) -> list[str]:
        """What breaks the rule: success, or one clear message; and nothing left behind."""
        found = []
        printed = self.printed
        if "chaos: did not end" in printed:
            found.append("did not end")
        if TRACEBACK in printed:
            after = printed.split(TRACEBACK)[1].splitlines()
            last = [line for line in after if line[:1].strip()][:1]
            found.append(f"traceback: {last}")
        found += [f"unforeseen: {line[:150]}" for line in UNFORESEEN.findall(printed)]
        errors, ours = self.errors(), self.errors("iterate.sh")
        if self.code != 0 and (len(errors) > 1 or len(ours) > 1 or not errors + ours):
            found.append(f"{len(errors)} messages of stages and {len(ours)} of the loop")
        if not wait_until(lambda: not self.left_behind(), 5):
            found.append(f"left behind: {self.left_behind()}")
        return found

    def message(self) -> str:
        """What it said at its end, in short."""
        if self.code == 0:
            return "done"
        if self.errors():
            return self.errors()[-1]
        return (self.errors("iterate.sh") or self.lines or ["nothing was said"])[-1].strip()

    def errors(self, whose: str = "error") -> list[str]:
        """Messages, also those that stand behind a progress bar."""
        return re.findall(rf"(?:^|[\]\r])({whose}: .*)", self.printed, re.M)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
