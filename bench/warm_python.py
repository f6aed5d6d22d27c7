"""A python that has torch and transformers imported already: a loop's stages start in 0.1 s, not 3.

    python -m bench.warm_python bash iterate.sh

    with WarmPython(folder) as warm:
        subprocess.run(["bash", "iterate.sh"], env=os.environ | {"PYTHON": warm.path})

warm.path is a small program. It asks a server for a fork: a process with the server's modules, and
the caller's arguments, environment, folder, open files, limits and process group. So the stages run
as they do under `python stage.py`, except that nothing is imported anew. Whatever is not a .py file
(-c, -m) is run by the real python.

SUICIDE=generate.py:stage.Stage.write_part:2 kills generate.py with -9 when it calls that method for
the second time: a way to make half-finished runs that are always the same.
"""

import atexit
import ctypes
import gc
import importlib
import io
import json
import os
import pkgutil
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = 9  # the descriptor that holds the lock of a run, in tools/loop.sh
LIMITS = ("RLIMIT_FSIZE",)

CLIENT = """#!{python} -IS
import json, os, resource, signal, socket, sys
words = sys.argv[1:]
if not words or not words[0].endswith(".py"):
    if words[:2] == ["-m", "vllm.entrypoints.openai.api_server"]:
        sys.exit("no server is started here")
    os.execv({python!r}, [{python!r}, *words])
files = [fd for fd in (0, 1, 2, {lock}) if os.path.exists("/proc/self/fd/%d" % fd)]
request = {{
    "argv": words,
    "env": dict(os.environ),
    "cwd": os.getcwd(),
    "group": os.getpgrp(),
    "files": files,
    "limits": {{name: resource.getrlimit(getattr(resource, name)) for name in {limits!r}}},
    "ignored": [n for n in (signal.SIGXFSZ,) if signal.getsignal(n) == signal.SIG_IGN],
}}
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"x"], files)
server.sendall(json.dumps(request).encode())
server.shutdown(socket.SHUT_WR)
answer = server.recv(100)
if not answer:
    sys.exit("the warm python has gone")
code = int(answer)
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class WarmPython:
    """The server, as a process, for the time of a with block."""

    def __init__(self, folder: Path):
        self.path = folder / "warm_python"
        self.address = str(folder / "warm.socket")
        client = CLIENT.format(
            python=sys.executable, address=self.address, lock=LOCK, limits=LIMITS
        )
        self.path.write_text(client)
        self.path.chmod(0o755)

    def __enter__(self):
        command = [sys.executable, __file__, "--serve", self.address]
        # These are read when torch and the hub's client are imported.
        settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | settings, preexec_fn=end_with_parent
        )
        while not os.path.exists(self.address):
            assert self.server.poll() is None, "the warm python did not start"
            time.sleep(0.05)
        return self

    def __exit__(self, *_):
        self.server.kill()
        self.server.wait()


def end_with_parent() -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# ---- the server --------------------------------------------------------------------------------


def import_everything() -> None:
    """All that a stage imports; no thread may be running when the process forks."""
    sys.path[0] = str(ROOT)
    names = ["generate", "score", "judge", "make_pairs", "dpo_train", "arguments", "openai"]
    names += ["transformers.models.llama.modeling_llama", "matplotlib.backends.backend_agg"]
    names += ["matplotlib.backends.backend_svg", "matplotlib.pyplot", "tokenizers", "safetensors"]
    names += ["torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp"]
    for package in ("training", "kernels"):
        names += [f"{package}.{m.name}" for m in pkgutil.iter_modules([str(ROOT / package)])]
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:  # a package of some machines only
            pass
    draw_something()


def draw_something() -> None:
    """The first figure of a process reads fonts, which takes half a second."""
    from matplotlib.figure import Figure

    figure = Figure()
    figure.add_subplot().plot([1, 2], label="text")
    for kind in ("png", "svg"):
        figure.savefig(io.BytesIO(), format=kind)


def serve(address: str) -> dict:
    """Fork for every request. Returns, in the fork, the request that it is to serve."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    noticed, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    waiting: dict[int, socket.socket] = {}  # process -> who waits for its end
    while True:
        ready, _, _ = select.select([listener, noticed], [], [])
        if noticed in ready:
            os.read(noticed, 1000)
            answer_the_ended(waiting)
        if listener not in ready:
            continue
        client, _ = listener.accept()
        request, files = receive(client)
        if request is None:
            client.close()
            continue
        gc.freeze()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for mine in (listener, *waiting.values()):
                mine.close()
            os.close(noticed)
            os.close(wake)
            join_group(request["group"], client)
            become(request, files)
            return request
        waiting[pid] = client
        for file in files:
            os.close(file)


def receive(client: socket.socket) -> tuple[dict | None, list[int]]:
    """The request, None where its sender was killed before all of it was sent; and its files."""
    _, files, _, _ = socket.recv_fds(client, 1, 10)
    pieces = []
    while piece := client.recv(1 << 16):
        pieces.append(piece)
    try:
        return json.loads(b"".join(pieces)), files
    except ValueError:
        for file in files:
            os.close(file)
        return None, []


def answer_the_ended(waiting: dict[int, socket.socket]) -> None:
    while waiting:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        client = waiting.pop(pid)
        try:
            client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        except OSError:  # it was killed
            pass
        client.close()


def join_group(group: int, client: socket.socket) -> None:
    """Be killed with the caller; where it was killed meanwhile, end at once."""
    try:
        os.setpgid(0, group)
    except OSError:  # none of the group is left
        os._exit(1)
    poll = select.poll()
    poll.register(client, select.POLLHUP)
    if any(event & select.POLLHUP for _, event in poll.poll(0)):
        os._exit(1)
    client.close()


def become(request: dict, files: list[int]) -> None:
    """Take over what the caller's process has."""
    moved = [os.dup2(file, 100 + file) for file in files]  # out of the way of their new numbers
    for file, number in zip(moved, request["files"], strict=True):
        os.dup2(file, number)
    for file in (*files, *moved):
        if file not in request["files"]:
            os.close(file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", 1, "utf-8", "backslashreplace", closefd=False)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    for name, limit in request["limits"].items():
        resource.setrlimit(getattr(resource, name), limit)
    script = request["argv"][0]
    sys.argv = request["argv"]
    sys.path[0] = str(Path(script).resolve().parent)
    if sys.path[0] != str(ROOT):
        sys.path.insert(1, str(ROOT))


def plan_suicide(plan: str, script: str) -> None:
    """plan: SCRIPT:MODULE.CLASS.METHOD:COUNT"""
    wanted, place, count = plan.split(":")
    if Path(script).name != wanted:
        return
    module, of_class, method = place.rsplit(".", 2)
    owner = getattr(importlib.import_module(module), of_class)
    original = getattr(owner, method)
    left = int(count)

    def last_call(*args, **more):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **more)

    setattr(owner, method, last_call)


def run_and_leave(script: str) -> None:
    """As python does, but without freeing what the server imported, which takes a second."""
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def with_warm_python(command: list[str]) -> int:
    """Run a command whose PYTHON is a warm one; its exit code."""
    with tempfile.TemporaryDirectory() as folder, WarmPython(Path(folder)) as warm:
        return subprocess.run(command, env=os.environ | {"PYTHON": str(warm.path)}).returncode


if __name__ == "__main__":
    if sys.argv[1] != "--serve":
        sys.exit(with_warm_python(sys.argv[1:]))
    import_everything()
    asked = serve(sys.argv[2])
    if "SUICIDE" in os.environ:
        plan_suicide(os.environ["SUICIDE"], asked["argv"][0])
    run_and_leave(asked["argv"][0])
