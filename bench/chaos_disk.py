"""bench/chaos.py disk: a disk that is full at every write, and then has a little more space."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from bench.chaos_damage import State, differences
from bench.chaos_world import World
from records import remove

INSIDE = "CHAOS_HAS_ITS_OWN_MOUNTS"
DISK = 24 << 20  # bytes; a run takes some 3 MB
STEPS = (8, 32, 64, 128, 256)  # KiB that are freed after each stop
LIMITS = (1, 3, 10, 30, 100, 300, 600)  # KB, of a file


def enter_namespace() -> None:
    """Start again where this process may mount: a full disk can be had without being root."""
    if INSIDE in os.environ or not shutil.which("unshare"):
        return
    private = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*private, "true"], capture_output=True).returncode == 0:
        os.environ[INSIDE] = "yes"
        os.execvp("unshare", [*private, sys.executable, "-m", "bench.chaos", *sys.argv[1:]])


def disturb(world: World, report, rng, args) -> None:
    world.build()
    assert world.loop().code == 0
    state = State("", Path(), world.results(), bool, {})
    remove(world.run)
    for limit in LIMITS:
        if report.wants(f"limit {limit}"):
            small_files(world, report, state, limit)
    if INSIDE in os.environ:
        full_disk(world, report, state, rng)
    else:
        report.say("no file system can be mounted here: only limits on the size of files")


def small_files(world: World, report, state: State, limit: int) -> None:
    """No file may grow beyond `limit` KB, in the loop and in its stages."""

    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit * 1000, resource.RLIM_INFINITY))

    remove(world.run)
    loop = world.loop(prepare=prepare)
    faults = loop.faults()
    where = loop.stages[-1][1].split()[1] if loop.stages else "the start"
    report.case(f"limit {limit} kB", outcome_of(loop, where), loop.message(), faults)

    again = world.loop()
    faults = again.faults() + differences(world, state)
    report.case(f"limit {limit} kB, and none", "done", again.message(), faults)


def outcome_of(loop, where: str) -> str:
    return "done" if loop.code == 0 else f"stopped in {where}"


def full_disk(world: World, report, state: State, rng) -> None:
    """A disk with hardly any space; after every stop a little is freed, until the run is done."""
    disk = world.run.parent
    remove(world.run)
    options = ["-t", "tmpfs", "-o", f"size={DISK}", "none", disk]
    subprocess.run(["mount", *options], check=True)
    filler = disk / "filler"
    taken = DISK
    for number in range(1000):
        taken -= rng.choice(STEPS) << 10
        fill(filler, taken, disk)
        free = shutil.disk_usage(disk).free >> 10
        loop = world.loop()
        where = loop.stages[-1][1].split()[1] if loop.stages else "the start"
        faults = loop.faults()
        if loop.code != 0 and "space" not in loop.message():
            faults.append("the message does not say that the disk is full")
        if loop.code == 0:
            faults += differences(world, state)
        name = f"full disk {number}, {free} KiB free"
        report.case(name, outcome_of(loop, Path(where).name), loop.message(), faults)
        if loop.code == 0:
            break
    subprocess.run(["umount", disk], check=True)


def fill(filler: Path, size: int, disk: Path) -> None:
    """A file of `size` bytes, less what others have taken of the disk already."""
    if not filler.exists():
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    else:
        os.truncate(filler, size)
