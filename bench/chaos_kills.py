"""bench/chaos.py kills and loops: kill -9 at random moments; two loops at once on one run."""

import time
from collections import Counter
from pathlib import Path

from bench.chaos_damage import State, differences
from bench.chaos_world import ROOT, World
from records import UNFINISHED, remove

LONG = 0.8  # seconds of a stage that is killed twice in a round


class Demo(World):
    """The demo, as `bash iterate.sh` runs it, but in a folder of its own.

    Settings of the caller's, such as ITERS=1, reach it.
    """

    def build(self) -> None:
        self.home = ROOT
        self.theirs = []

    def given(self) -> dict:
        names = ("PYTHON", "RUN", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE")
        given = super().given()
        return {name: given[name] for name in names}

    def hash_of_theirs(self) -> list[str]:
        return []


def disturb(world: World, report, rng, args) -> None:
    """Rounds: every stage is killed once, a long one twice, at random fractions of its seconds."""
    if args.demo:
        world = Demo(world.folder, world.warm, world.python)
    world.build()
    undisturbed = world.loop(timeout=3600)
    assert undisturbed.code == 0, undisturbed.printed
    state = State("", Path(), world.results(), bool, {})
    seconds = seconds_of(undisturbed)
    report.say(f"undisturbed: {sum(seconds):.1f} s, {len(seconds)} commands")

    kills, hits = 0, Counter()
    while kills < args.kills:
        remove(world.run)
        for number, fraction in moments(seconds, rng):
            if kills == args.kills:
                break
            kills += kill(world, report, number, fraction * seconds[number], hits, kills)
        last = world.loop(timeout=3600)
        faults = last.faults() + differences(world, state)
        if last.code != 0:
            faults.append("the end was not reached")
        report.case(f"after {kills} kills", "same bytes", last.message(), faults)
    for name, count in sorted(hits.items()):
        report.say(f"{count:4} kills in {name}")


def seconds_of(loop) -> list[float]:
    """How long each command took."""
    began = [when for when, _ in loop.stages]
    return [b - a for a, b in zip(began, [*began[1:], loop.ended], strict=True)]


def moments(seconds: list[float], rng):
    """(number of a command, fraction of its seconds), in the order of the loop."""
    for number, length in enumerate(seconds):
        times = 2 if length > LONG else 1
        for fraction in sorted(rng.random() for _ in range(times)):
            yield number, fraction


def kill(world: World, report, number: int, delay: float, hits: Counter, kills: int) -> bool:
    """Start the loop, and kill all of it so many seconds after a command has begun."""
    loop = world.start()
    while len(loop.stages) <= number and loop.process.poll() is None:
        time.sleep(0.002)
    if loop.stages and len(loop.stages) > number:
        time.sleep(max(0, loop.stages[number][0] + delay - time.monotonic()))
    if loop.process.poll() is not None:
        faults = loop.faults()
        if loop.code != 0:
            faults.append("it stopped by itself")
        report.case("ended before its kill", "not killed", loop.message(), faults)
        return False
    loop.kill()
    stage = stage_of(loop.stages[-1][1]) if loop.stages else "the start"
    hits[stage] += 1
    torn = len(list(world.run.rglob("*" + UNFINISHED)))
    faults = [f"left behind: {name}" for name in loop.left_behind()]
    said = f"command {number + 1} and {delay:.2f} s" + f"; {torn} torn" * (torn > 0)
    report.case(f"kill {kills + 1} in {stage}", "killed", said, faults)
    return True


def stage_of(command: str) -> str:
    """A command as "iter_01 generate.py"."""
    words = command.split()
    script = next(Path(word).name for word in words if word.endswith(".py"))
    output = words[words.index("--output") + 1] if "--output" in words else ""
    folder = next((part for part in Path(output).parts if part.startswith("iter_")), "")
    what = " (evaluation)" if "/eval/" in output else ""
    return f"{script}{what} {folder}".strip()


# ---- two loops ---------------------------------------------------------------------------------


def two_loops(world: World, report, rng, args) -> None:
    """The second starts together with the first one, or when it has come to a stage."""
    world.build()
    undisturbed = world.loop()
    state = State("", Path(), world.results(), bool, {})
    seconds = seconds_of(undisturbed)
    for number in (None, 0, 1, *range(4, len(seconds) // 2, 3)):
        if not report.wants(f"at {number}"):
            continue
        remove(world.run)
        first = world.start()
        while number is not None and len(first.stages) <= number:
            time.sleep(0.002)
        second = world.start()
        first.wait(600)
        second.wait(600)
        faults = first.faults() + second.faults() + differences(world, state)
        codes = sorted([first.code, second.code])
        if codes != [0, 1]:
            faults.append(f"exit codes {codes}")
        refused = second if second.code else first
        report.case(f"two loops, at {number}", "one refused", refused.message(), faults)
    many_loops(world, report, state)


def many_loops(world: World, report, state: State) -> None:
    """Five at once on a new run: one works."""
    remove(world.run)
    loops = [world.start() for _ in range(5)]
    for loop in loops:
        loop.wait(600)
    faults = [fault for loop in loops for fault in loop.faults()] + differences(world, state)
    codes = sorted(loop.code for loop in loops)
    if codes != [0, 1, 1, 1, 1]:
        faults.append(f"exit codes {codes}")
    report.case("five loops at once", "one worked", f"exit codes {codes}", faults)
