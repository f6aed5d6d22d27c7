"""bench/chaos.py damage: every file of a finished or half-finished run, damaged in every way."""

import hashlib
import json
import random
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from bench.chaos_world import World
from records import remove

# ---- the damage --------------------------------------------------------------------------------
#
# Each function changes the file, with a random generator of the case, or returns False where there
# is nothing that it could change.


def truncated(path: Path, rng: random.Random) -> bool:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return len(content) > 1


def emptied(path: Path, rng: random.Random) -> bool:
    had = path.stat().st_size
    path.write_bytes(b"")
    return had > 0


def flipped(path: Path, rng: random.Random) -> bool:
    content = bytearray(path.read_bytes())
    if not content:
        return False
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(7)
    path.write_bytes(content)
    return True


def letter(path: Path, rng: random.Random) -> bool:
    """Another letter within a text, or digit of a number: what follows is as valid as before."""
    content = bytearray(path.read_bytes())
    pattern = rb'"(?:text|content|reply)": "(?=[A-Za-z])|"loss": 0\.(?=\d)'
    places = [found.end() for found in re.finditer(pattern, content)]
    if not places:
        return False
    place = rng.choice(places)
    other = b"12" if chr(content[place]).isdigit() else b"QZ"
    content[place] = other[0] if content[place] != other[0] else other[1]
    path.write_bytes(content)
    return True


def row_removed(path: Path, rng: random.Random) -> bool:
    lines = path.read_bytes().splitlines(keepends=True)
    del lines[rng.randrange(len(lines))]
    path.write_bytes(b"".join(lines))
    return True


def row_twice(path: Path, rng: random.Random) -> bool:
    lines = path.read_bytes().splitlines(keepends=True)
    at = rng.randrange(len(lines))
    path.write_bytes(b"".join([*lines[: at + 1], *lines[at:]]))
    return True


def folder(path: Path, rng: random.Random) -> bool:
    remove(path)
    path.mkdir()
    (path / "mine.txt").write_text("a user's file")
    return True


def removed(path: Path, rng: random.Random) -> bool:
    remove(path)
    return True


def a_file(path: Path, rng: random.Random) -> bool:
    """In the place of a folder."""
    remove(path)
    path.write_text("a user's file")
    return True


OF_FILES = (truncated, emptied, flipped, folder, removed)
OF_ROWS = (letter, row_removed, row_twice)
OF_FOLDERS = (a_file, removed)


# ---- the runs ----------------------------------------------------------------------------------


class State(NamedTuple):
    """A run to be damaged, at some moment."""

    name: str
    copy: Path
    results: dict[str, str]  # of the undisturbed run that it becomes
    files: Callable[[Path], bool]  # which files to damage, by their path within the run
    more: dict  # settings


def disturb(world: World, report, rng, args) -> None:
    world.build()
    for state in [*judged(world), *half_finished(world)]:
        for path in sorted(p.relative_to(state.copy) for p in state.copy.rglob("*")):
            if not state.files(path):
                continue
            for kind in kinds_of(state, path):
                name = f"{state.name} {path} {kind.__name__}"
                if report.wants(name):
                    try_damage(world, report, state, path, kind, f"{args.seed} {name}")


def kinds_of(state: State, path: Path):
    if (state.copy / path).is_dir():
        return OF_FOLDERS
    if path.suffix in (".log", ".png", ".html"):
        return (folder,)
    if state.name == "finished" and path.parts[0] in ("iter_00", "iter_02"):
        return (letter,) if path.suffix == ".jsonl" else (flipped,)
    if path.parent.name == "policy" and path.name not in ("config.json", "model.safetensors"):
        return (flipped, removed)
    if path.suffix == ".jsonl":
        return (*OF_FILES, *OF_ROWS)
    if state.name != "judged" and path.name.endswith(".meta.json"):
        return (flipped, removed)  # the other ways are tried on the judge's
    return OF_FILES


def try_damage(world: World, report, state: State, path: Path, kind, seed: str) -> None:
    world.restore(state.copy)
    victim = world.run / path
    if not kind(victim, random.Random(seed)):
        return
    damaged = fingerprint(victim)
    loop = world.loop(timeout=120, **state.more)
    faults = loop.faults()
    if world.hash_of_theirs() != world.theirs:
        faults.append("a file of the user's was changed")
    if kind in (folder, a_file) and not survives(victim, kind):
        faults.append("what stood in its place was removed")

    if loop.code == 0 and f"{path.name} is gone" in loop.printed:
        outcome = "reported as gone"
        faults += differences(world, state, but=path)
    elif loop.code == 0:
        as_damaged = victim.exists() and fingerprint(victim) == damaged
        outcome = "unnoticed" if as_damaged else "made again"
        faults += differences(world, state)
    else:
        outcome = "refused"
        faults += undone(world, state, path, random.Random(seed))
    report.case(f"{state.name} {path} {kind.__name__}", outcome, loop.message(), faults)


def survives(victim: Path, kind) -> bool:
    """Whether what a user has put there is still there."""
    mine = victim / "mine.txt" if kind is folder else victim
    return mine.is_file() and mine.read_text() == "a user's file"


def undone(world: World, state: State, path: Path, rng: random.Random) -> list[str]:
    """The damage is undone; then the same command ends with the same bytes.

    A finished run in which nothing else has changed need not run again: one in eight does.
    """
    world.copy_back(state.copy / path, world.run / path)
    untouched = not differences(world, state) and not list(world.run.rglob("*.parts"))
    if untouched and state.name in ("finished", "judged") and rng.randrange(8):
        return []
    loop = world.loop(timeout=120, **state.more)
    faults = [f"undone: {fault}" for fault in loop.faults()]
    if loop.code != 0:
        faults.append(f"undone, it still stops: {loop.message()}")
    return faults + differences(world, state)


def differences(world: World, state: State, but: Path | None = None) -> list[str]:
    """What is not as in the undisturbed run. but: a file that may differ."""
    now = world.results()
    names = sorted((state.results.keys() | now.keys()) - {str(but)})
    different = [name for name in names if state.results.get(name) != now.get(name)]
    return [f"other bytes than undisturbed: {', '.join(different)}"] if different else []


def fingerprint(path: Path) -> str:
    if path.is_dir():
        return str(sorted(p.name for p in path.rglob("*")))
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "nothing"


# ---- half-finished runs ------------------------------------------------------------------------

DIES = {
    "sampling": "generate.py:stage.Stage.write_part:2",
    "scoring": "score.py:stage.Stage.write_part:2",
    "training": "dpo_train.py:training.log.TrainLog.write:7",
}


def half_finished(world: World) -> list[State]:
    """One run, killed in each of these stages of the first iteration, and then finished."""
    remove(world.run)
    copies = {}
    for name, suicide in DIES.items():
        loop = world.loop(PYTHON=world.warm, SUICIDE=suicide)
        assert loop.code == 137, loop.printed
        copies[name] = world.keep(name)
    one = {"ITERS": 1}  # of the half-finished ones only this iteration is run to its end
    assert world.loop(**one).code == 0
    results = world.results()
    states = [State(name, copy, results, chooser(name), one) for name, copy in copies.items()]
    assert world.loop().code == 0
    whole = world.keep("finished")
    return [*states, State("finished", whole, world.results(), chooser("finished"), {})]


def chooser(state: str) -> Callable[[Path], bool]:
    def of_unfinished_stage(path: Path) -> bool:
        at_the_top = path.name in ("resumed.json", "config.json", "heldout.jsonl")
        return ".parts" in str(path) or (state == "training" and at_the_top)

    def of_finished(path: Path) -> bool:
        """iter_00 and iter_02 hold the like of what is in iter_01; some of it is read less."""
        if path.parts[0] == "iter_01":
            return path.suffix != ".log" or path.name == "train.log"
        if path.name in ("scored.jsonl", "model.safetensors", "policy.train.jsonl"):
            return True
        return len(path.parts) == 1 and path.name not in (".lock", "iter_00", "iter_02")

    return of_finished if state == "finished" else of_unfinished_stage


# ---- a run with a judge ------------------------------------------------------------------------


class Judge(BaseHTTPRequestHandler):
    """A server whose verdict is a function of the request."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        prefers_a = hashlib.sha256(body).digest()[0] % 2
        message = {"role": "assistant", "content": f"Verdict: {'A' if prefers_a else 'B'}"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        head = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        data = json.dumps(head | {"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def judged(world: World) -> list[State]:
    """A run whose judge was killed before its part was written, and the finished one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    more = {"ITERS": 0, "JUDGE": "m", "JUDGE_URL": url}
    loop = world.loop(PYTHON=world.warm, SUICIDE="judge.py:stage.Stage.write_part:1", **more)
    assert loop.code == 137, loop.printed
    half = world.keep("judging")
    assert world.loop(**more).code == 0
    whole = world.keep("judged")
    results = world.results()

    def of_the_judge(path: Path) -> bool:
        return "scored" in path.name and not path.name.endswith("candidates.jsonl")

    return [
        State("judging", half, results, of_the_judge, more),
        State("judged", whole, results, of_the_judge, more),
    ]
