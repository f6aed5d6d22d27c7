"""How flags are read: Hugging Face's spelling, dashes accepted, and every number within bounds.

    add("--top_p", type=number_in("(0, 1]"), default=1.0)
    add("--num_samples", type=integer_in("[1, inf)"), default=8)

Bounds are written as in mathematics: "(0, 1]" is above 0 and at most 1. NaN lies in no interval, so
it is refused wherever a number is asked for; so is infinity.
"""

import argparse
import itertools
import json
import math
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

from records import LARGEST_NUMBER, Stop


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Called by argparse for a wrong flag. It would print the whole usage, too."""
        raise Stop(f"{message}. python {self.prog} --help explains every flag.")


def parser(description: str) -> Parser:
    """A parser with the flags that every stage has; the stage's docstring is its --help."""
    p = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--overwrite", action="store_true", help="redo the stage even where its output exists"
    )
    return p


def parse(p: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; --learning-rate is read as --learning_rate."""
    words = sys.argv[1:] if argv is None else argv
    for word in words:
        check_utf8(word, "the command line")
    check_not_empty(words)
    return p.parse_args([_with_underscores(word) for word in words])


def check_not_empty(words: list[str]) -> None:
    """Stop at an empty word, as a variable that is not set leaves it: it would count as no flag."""
    for before, word in itertools.pairwise(["the command line", *words]):
        if word == "":
            raise Stop(f"{before} is given an empty word: name something, or leave the flag out.")


def check_utf8(word: str, where: str) -> None:
    """Stop at a word that is no UTF-8: it could not be written into the metadata."""
    try:
        word.encode()
    except UnicodeEncodeError:
        raise Stop(
            f"{where}: {word!a} is not UTF-8. Rename the file or change the value."
        ) from None


def _with_underscores(word: str) -> str:
    """--learning-rate=a-b -> --learning_rate=a-b; what is no flag stays as it is."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.removeprefix("--").partition("=")
    return "--" + flag.replace("-", "_") + equals + value


# ---- numbers -----------------------------------------------------------------------------------


class Interval(NamedTuple):
    written: str  # "(0, 1]"
    low: float
    high: float
    has_low: bool  # [ and not (
    has_high: bool  # ] and not )

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.has_low else value > self.low
        below = value <= self.high if self.has_high else value < self.high
        return above and below


def interval(written: str) -> Interval:
    low, high = written[1:-1].split(",")
    return Interval(
        written, float(low), float(high), written.startswith("["), written.endswith("]")
    )


def number_in(bounds: str) -> Callable[[str], float]:
    """An argparse type: a finite float within `bounds`."""
    allowed = interval(bounds)

    def read(word: str) -> float:
        value = float_of(word)
        if value is None or value not in allowed:
            raise argparse.ArgumentTypeError(f"{word!r} is not a number in {allowed.written}")
        return value

    return read


def integer_in(bounds: str) -> Callable[[str], int]:
    """An argparse type: a whole number within `bounds`, written in decimal digits alone."""
    allowed = interval(bounds)

    def read(word: str) -> int:
        is_whole = re.fullmatch("-?[0-9]{1,15}", word)
        if not is_whole or int(word) not in allowed:
            raise argparse.ArgumentTypeError(f"{word!r} is not a whole number in {allowed.written}")
        return int(word)

    return read


def float_of(word: str) -> float | None:
    """The finite float that `word` says; None where it says none."""
    if not re.fullmatch(r"[-+.0-9eE]+", word):  # Python would take "nan", "1_0" and Arabic digits
        return None
    try:
        value = float(word)
    except ValueError:
        return None
    return value if abs(value) <= LARGEST_NUMBER else None


# ---- KEY=VALUE ---------------------------------------------------------------------------------


def key_values(flag: str, pairs: list[str] | None) -> dict:
    """["a=1", "b=x"] -> {"a": 1, "b": "x"}: a value is JSON where it can be, else a string."""
    result = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise Stop(f"--{flag}: {pair!r} is not a key=value pair.")
        try:
            result[key] = json.loads(value)
        except (ValueError, RecursionError):
            result[key] = value
        if isinstance(result[key], float) and not math.isfinite(result[key]):
            raise Stop(f"--{flag}: {pair!r}: NaN and infinity are no values here.")
    return result
