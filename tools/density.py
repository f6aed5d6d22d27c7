"""How dense is the code? Reading takes time per thought, so a line should hold one thought.

    python tools/density.py                 every Python file of the project, the densest first
    python tools/density.py FILE.py …       these files, of any project, to compare with
    python tools/density.py --limits        fail if the root, kernels/ or training/ exceeds a limit

Per file: tokens per code line (docstrings, comments and blank lines are not code), code lines,
comment lines per code line, lines over 100 columns, the longest function, and comprehensions within
comprehensions. For comparison, the same count gives nanoGPT's train.py 7.4, cleanrl's ppo.py 8.6,
and eric-mitchell/direct-preference-optimization 10.5.
"""

import argparse
import ast
import io
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 100  # columns
MOST_TOKENS = 10.5  # per code line, of any file in_house
MEAN_TOKENS = 9.5  # per code line, over all files in_house
MOST_LINES = 60  # of a function

NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass
class Density:
    path: str
    tokens: int
    code_lines: int
    comment_lines: int
    wide_lines: int
    longest: int  # lines of the longest function
    longest_name: str
    nested: int  # comprehensions within comprehensions

    @property
    def tokens_per_line(self) -> float:
        return self.tokens / max(1, self.code_lines)


def docstring_lines(tree: ast.Module) -> set[int]:
    """The numbers of all lines that belong to a docstring."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
            continue
        if ast.get_docstring(node, clean=False) is None:
            continue
        docstring = node.body[0]
        lines.update(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def nested_comprehensions(tree: ast.Module) -> int:
    count = 0
    for node in ast.walk(tree):
        if not isinstance(node, COMPREHENSIONS):
            continue
        inner = [child for child in ast.walk(node) if isinstance(child, COMPREHENSIONS)]
        count += len(inner) > 1  # itself, and another
    return count


def measure(path: Path, name: str) -> Density:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    docstrings = docstring_lines(tree)

    tokens = 0
    code_lines: set[int] = set()
    comment_lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        first, last = token.start[0], token.end[0]
        if token.type == tokenize.COMMENT:
            comment_lines.add(first)
        if token.type in NO_CODE or first in docstrings:
            continue
        tokens += 1
        code_lines.update(range(first, last + 1))

    longest, longest_name = 0, "-"
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            lines = node.end_lineno - node.lineno + 1
            if lines > longest:
                longest, longest_name = lines, node.name

    wide = [line for line in source.splitlines() if len(line) > WIDTH]
    return Density(
        path=name,
        tokens=tokens,
        code_lines=len(code_lines),
        comment_lines=len(comment_lines),
        wide_lines=len(wide),
        longest=longest,
        longest_name=longest_name,
        nested=nested_comprehensions(tree),
    )


def project_files() -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return [name for name in listing.stdout.split() if (ROOT / name).exists()]


def in_house(name: str) -> bool:
    """The files that people come to read: the root, kernels/ and training/."""
    folder = Path(name).parent
    return str(folder) in (".", "kernels", "training")


def faults(house: list[Density]) -> list[str]:
    """What is over a limit, one line each."""
    found = []
    for d in house:
        if d.tokens_per_line > MOST_TOKENS:
            found.append(
                f"{d.path}: {d.tokens_per_line:.1f} tokens per code line; at most {MOST_TOKENS}"
            )
        if d.wide_lines:
            found.append(f"{d.path}: {d.wide_lines} lines over {WIDTH} columns")
        if d.longest > MOST_LINES:
            found.append(f"{d.path}: {d.longest_name} has {d.longest} lines; at most {MOST_LINES}")
        if d.nested:
            found.append(f"{d.path}: {d.nested} comprehensions within comprehensions")
    mean = mean_tokens(house)
    if mean > MEAN_TOKENS:
        found.append(
            f"all of them: {mean:.1f} tokens per code line on average; at most {MEAN_TOKENS}"
        )
    return found


def mean_tokens(files: list[Density]) -> float:
    return sum(d.tokens for d in files) / max(1, sum(d.code_lines for d in files))


def print_table(files: list[Density]) -> None:
    print(
        f"{'tokens/line':>11} {'code':>5} {'comments':>8} {'wide':>4} {'nested':>6}"
        "  file, longest function"
    )
    for d in sorted(files, key=lambda d: -d.tokens_per_line):
        comments = d.comment_lines / max(1, d.code_lines)
        numbers = f"{d.tokens_per_line:11.1f} {d.code_lines:5} {comments:8.2f}"
        numbers += f" {d.wide_lines:4} {d.nested:6}"
        print(f"{numbers}  {d.path}, {d.longest_name} {d.longest}")
    house = [d for d in files if in_house(d.path)]
    if house:
        print(
            f"{mean_tokens(house):11.1f} {sum(d.code_lines for d in house):5}"
            "  the root, kernels/ and training/"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", help="default: every Python file of the project")
    parser.add_argument(
        "--limits", action="store_true", help="exit with 1 if the root, kernels/ or training/ fails"
    )
    args = parser.parse_args()

    if args.files:
        files = [measure(Path(name), name) for name in args.files]
    else:
        files = [measure(ROOT / name, name) for name in project_files()]
    print_table([d for d in files if d.code_lines > 5])

    if args.limits:
        found = faults([d for d in files if in_house(d.path)])
        print("\n".join(found), file=sys.stderr)
        sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
