"""bench/chaos.py settings: hostile values of every setting of iterate.sh."""

import re

from bench.chaos_world import ROOT, THEIRS, World
from records import remove

# What must never run makes a file of this name, wherever it runs.
MARK = "X_WAS_RUN"

VALUES = {
    "empty": "",
    "octal": "08",
    "exponent": "1e3",
    "negative": "-1",
    "nan": "NaN",
    "huge": "99999999999",
    "substitution": f"$(touch {MARK})`touch {MARK}`",
    "subscript": f"a[$(touch {MARK})0]",
    "semicolon": f";touch {MARK}",
    "star": "*",
    "blanks": "one two  three ",
    "quotes": "'one\" two",
    "newline": f"one\ntouch {MARK}\n",
    "bytes": b"\xff\xfe one",
    "long": "x" * 100_000,
    "flags": "-rf",
    "folder": "/",
    "unicode": "ünï ☃ \u202e",
}

MORE = ("NODE_RANK", "CUDA_VISIBLE_DEVICES")  # read by the shell, too

# What else a setting needs to be looked at, and to be looked at within a second.
BESIDE = {
    "JUDGE": {"JUDGE_URL": "http://127.0.0.1:9/v1", "REWARD_FN": ""},
    "JUDGE_URL": {"JUDGE": "m"},
    "JUDGE_ARGS": {"JUDGE": "m", "JUDGE_URL": "http://127.0.0.1:9/v1"},
    "JUDGE_SERVER_ARGS": {"JUDGE": "m"},
}
# These are used in iterations only; the others show what they do without any.
IN_ITERATIONS = (
    "PROMPTS_PER_ITER NUM_SAMPLES REF HISTORY ENHANCER KEEP PAIRS_ARGS TRAIN_ARGS".split()
)

# Not hostile, but as likely: each must be refused in time.
SECRETS = [
    {"JUDGE": "m", "JUDGE_URL": "http://host/v1?key=secret"},
    {"JUDGE": "m", "JUDGE_URL": "http://me:secret@host/v1"},
    {"JUDGE": "m", "JUDGE_SERVER_ARGS": "--api-key secret"},
    {"JUDGE": "m", "JUDGE_SERVER_ARGS": "--api_key=secret"},
    {"JUDGE": "m", "JUDGE_ARGS": "--api-key secret", "JUDGE_URL": "http://host/v1"},
]


def names_of_settings() -> list[str]:
    script = (ROOT / "iterate.sh").read_text()
    return re.findall(r"^setting ([A-Z_]+)", script, re.M) + list(MORE)


def disturb(world: World, report, rng, args) -> None:
    world.build()
    whole = {}
    for iterations in (0, 1):
        assert world.loop(ITERS=iterations, PROMPTS_PER_ITER=20).code == 0
        whole[iterations] = world.keep(f"iterations_{iterations}"), world.results()

    for name in names_of_settings():
        iterations = int(name in IN_ITERATIONS)
        copy, results = whole[iterations]
        tried = False
        for kind, value in VALUES.items():
            if not report.wants(f"{name} {kind}"):
                continue
            if name == "MODEL" and not value:
                continue  # that is the demo
            tried = True
            world.restore(copy)
            more = {"ITERS": iterations, "PROMPTS_PER_ITER": 20} | BESIDE.get(name, {})
            try_value(world, report, f"{name} {kind}", more | {name: value}, results)
        if tried:  # what a user does next
            usual_again(world, report, name, iterations, results)

    for more in SECRETS:
        name = " ".join(f"{k}={v}" for k, v in more.items())
        if report.wants(name):
            world.restore(whole[0][0])
            try_secret(world, report, name, more, whole[0][1])


def try_value(world: World, report, name: str, more: dict, results: dict) -> None:
    config = (world.run / "config.json").read_bytes()
    loop = world.loop(timeout=60, **more)
    faults = loop.faults() + harm_done(world, results)
    if loop.code != 0 and (world.run / "config.json").read_bytes() != config:
        faults.append("the settings of a refused start became config.json")
    outcome = "accepted" if loop.code == 0 else "refused"
    report.case(name, outcome, loop.message(), faults)
    tidy(world)


def usual_again(world: World, report, name: str, iterations: int, results: dict) -> None:
    """After all hostile values the usual one, on what the last of them has left."""
    loop = world.loop(ITERS=iterations, PROMPTS_PER_ITER=20)
    faults = loop.faults() + harm_done(world, results)
    if loop.code != 0:
        faults.append("the usual settings no longer work")
    report.case(f"{name} as usual", "accepted", loop.message(), faults)


def try_secret(world: World, report, name: str, more: dict, results: dict) -> None:
    loop = world.loop(timeout=60, ITERS=0, **more)
    faults = loop.faults() + harm_done(world, results)
    if loop.code == 0:
        faults.append("accepted")
    for path in world.run.rglob("*"):
        if path.is_file() and b"secret" in path.read_bytes():
            faults.append(f"the secret is in {path.relative_to(world.run)}")
    report.case(name, "refused", loop.message(), faults)


def harm_done(world: World, results: dict) -> list[str]:
    """What hostile settings must not do."""
    found = []
    for folder in (world.folder, ROOT):
        for path in folder.rglob(f"*{MARK}*"):
            if path.name == MARK:  # and not a folder whose name holds the whole value
                found.append(f"{path} was made: the value was run")
    if world.hash_of_theirs() != world.theirs:
        found.append("a file of the user's was changed")
    now = world.results()  # ITERS= means three iterations, so there may be more
    if any(now.get(name) != hash for name, hash in results.items()):
        found.append("a finished result was changed")
    return found


def tidy(world: World) -> None:
    """Remove the folders that RUN=… has made where the user stands."""
    for path in world.home.iterdir():
        if path.name not in THEIRS:
            remove(path)
