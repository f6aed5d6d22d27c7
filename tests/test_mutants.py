"""The list of tests/mutants.py fits the source. `python tests/mutants.py` runs it."""

import ast
import subprocess
import sys
from collections import Counter

import pytest

import mutants
from conftest import ROOT
from mutants import MUTANTS, ListError, Mutant, mutated, verdict


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_and_is_a_program(mutant):
    text = mutated(mutant, ROOT)
    assert text != (ROOT / mutant.file).read_text()
    if mutant.file.endswith(".py"):
        compile(text, mutant.file, "exec")
    else:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def functions_of(file):
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_each_mutant_has_its_name_and_names_tests_that_exist():
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1
    functions = {}
    for mutant in MUTANTS:
        assert mutant.tests and mutant.promise.endswith(".")
        for test in mutant.tests:
            file, _, name = test.partition("::")
            if file not in functions:
                functions[file] = functions_of(file)
            assert name.partition("[")[0] in functions[file], test


def test_a_mutant_is_killed_by_a_test_that_fails_and_by_nothing_else(tmp_path):
    """A test that passes, none at all, and one that cannot be read are no kill."""
    (tmp_path / "two.py").write_text("TWO = 2\n")
    (tmp_path / "test_two.py").write_text(
        "from two import TWO\n\n"
        "def test_two():\n    assert TWO == 2\n\n"
        "def test_number():\n    assert TWO > 0\n"
    )
    three = Mutant("three", "Two is two.", "two.py", "2", "3", ("test_two.py::test_two",))
    assert verdict(three, tmp_path) == ("killed", "")
    passes = three._replace(tests=("test_two.py::test_number",))
    assert verdict(passes, tmp_path) == ("survived", "")
    for wrong in (
        three._replace(tests=("test_two.py::test_three",)),
        three._replace(new="("),
        three._replace(old="4"),
    ):
        assert verdict(wrong, tmp_path)[0] == "error"
    assert (tmp_path / "two.py").read_text() == "TWO = 2\n"
    with pytest.raises(ListError, match="has the old text 0 times, not once: '4'"):
        mutated(three._replace(old="4"), tmp_path)


def test_a_copy_within_the_repository_is_refused():
    with pytest.raises(ListError, match="is in the repository"):
        mutants.copy_tracked_files(ROOT / "copy")
    assert not (ROOT / "copy").exists()


def test_a_name_that_does_not_exist_is_refused():
    command = [sys.executable, ROOT / "tests/mutants.py", "no-such-mutant"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "no such mutant: no-such-mutant" in done.stderr
