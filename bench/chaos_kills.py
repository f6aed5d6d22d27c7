"""bench/chaos.py kills and loops: kill -9 at random moments; two loops at once on one run."""

import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

from bench.chaos_damage import State, differences
from bench.chaos_world import ROOT, World, wait_until
from records import UNFINISHED, remove

LONG = 0.8  # seconds of a stage that is killed twice in a round

# The settings that do not say what is run.
OF_ANY_RUN = ("PYTHON", "RUN", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE")


class Demo(World):
    """The demo, as `bash iterate.sh` runs it, but in a folder of its own.

    Settings of the caller's, such as ITERS=1, reach it.
    """

    def build(self) -> None:
        self.home = ROOT
        self.theirs = []

    def given(self) -> dict:
        given = super().given()
        return {name: given[name] for name in OF_ANY_RUN}

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

    hits: Counter = Counter()  # stage -> kills in it
    while hits.total() < args.kills:
        remove(world.run)
        for number, delay in moments(seconds, rng):
            if hits.total() < args.kills:
                kill(world, report, number, delay, hits)
        reach_the_end(world, report, state, hits.total())
    for name, count in sorted(hits.items()):
        report.say(f"{count:4} kills in {name}")


def seconds_of(loop) -> list[float]:
    """How long each command took."""
    moments = [when for when, _ in loop.stages]
    moments.append(loop.ended)
    return [after - before for before, after in pairwise(moments)]


def moments(seconds: list[float], rng):
    """(number of a command, seconds after its start), in the order of the loop."""
    for number, length in enumerate(seconds):
        times = 2 if length > LONG else 1
        fractions = sorted(rng.random() for _ in range(times))
        for fraction in fractions:
            yield number, fraction * length


def kill(world: World, report, number: int, delay: float, hits: Counter) -> None:
    """Start the loop, and kill all of it so many seconds after a command has begun."""
    loop = world.start()
    while len(loop.stages) <= number and loop.process.poll() is None:
        time.sleep(0.002)
    if len(loop.stages) > number:
        began, _ = loop.stages[number]
        time.sleep(max(0, began + delay - time.monotonic()))
    if loop.process.poll() is not None:
        ended_before(loop, report)
        return

    loop.kill()
    stage = stage_of(loop)
    hits[stage] += 1
    said = f"command {number + 1} and {delay:.2f} s"
    torn = len(list(world.run.rglob("*" + UNFINISHED)))
    if torn:
        said += f"; {torn} torn"
    # A fork of the warm python that joins the group after the kill finds its caller gone, and ends.
    wait_until(lambda: not loop.left_behind(), seconds=5)
    faults = [f"left behind: {name}" for name in loop.left_behind()]
    report.case(f"kill {hits.total()} in {stage}", "killed", said, faults)


def ended_before(loop, report) -> None:
    """The loop was faster than its kill; that is no fault, and no kill."""
    faults = loop.faults()
    if loop.code != 0:
        faults.append("it stopped by itself")
    report.case("ended before its kill", "not killed", loop.message(), faults)


def reach_the_end(world: World, report, state: State, kills: int) -> None:
    """The same command once more, and no kill: the bytes of an undisturbed run."""
    last = world.loop(timeout=3600)
    faults = last.faults() + differences(world, state)
    if last.code != 0:
        faults.append("the end was not reached")
    report.case(f"after {kills} kills", "same bytes", last.message(), faults)


def stage_of(loop) -> str:
    """Its last command, as "generate.py (evaluation) iter_01"."""
    if not loop.stages:
        return "the start"
    _, command = loop.stages[-1]
    words = command.split()
    scripts = [word for word in words if word.endswith(".py")]
    name = Path(scripts[0]).name
    output = words[words.index("--output") + 1] if "--output" in words else ""
    if "/eval/" in output:
        name += " (evaluation)"
    for part in Path(output).parts:
        if part.startswith("iter_"):
            name += f" {part}"
    return name


# ---- two loops ---------------------------------------------------------------------------------


def two_loops(world: World, report, rng, args) -> None:
    """The second starts together with the first one, or when it has come to a stage."""
    world.build()
    undisturbed = world.loop()
    state = State("", Path(), world.results(), bool, {})
    commands = len(undisturbed.stages)
    for number in (None, 0, 1, *range(4, commands // 2, 3)):
        if not report.wants(f"at {number}"):
            continue
        remove(world.run)
        first = world.start()
        while number is not None and len(first.stages) <= number:
            time.sleep(0.002)
        second = world.start()
        faults = faults_of_all([first, second], world, state)
        refused = second if second.code else first
        report.case(f"two loops, at {number}", "one refused", refused.message(), faults)

    # five at once on a new run
    remove(world.run)
    loops = [world.start() for _ in range(5)]
    faults = faults_of_all(loops, world, state)
    codes = [loop.code for loop in loops]
    report.case("five loops at once", "one worked", f"exit codes {codes}", faults)


def faults_of_all(loops: list, world: World, state: State) -> list[str]:
    """One of them works, and the others refuse."""
    faults = []
    for loop in loops:
        loop.wait(600)
        faults += loop.faults()
    codes = sorted(loop.code for loop in loops)
    if codes != [0] + [1] * (len(loops) - 1):
        faults.append(f"exit codes {codes}")
    return faults + differences(world, state)
