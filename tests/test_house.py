"""The structure of the code: what may import what. Each stage is one file, and one process."""

import ast
import re
import subprocess
import sys

import pytest

from conftest import ROOT
from tools import density

STAGES = ("generate", "score", "judge", "make_pairs", "dpo_train")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("stage", STAGES)
def test_pitfalls_30_a_stage_imports_no_other_stage(stage):
    """One process per stage: an engine's memory is free when the process ends, and no trainer ever
    holds an engine.
    """
    ours = {p.stem for p in ROOT.glob("*.py")} | {"demo", "tools", "bench", "tests"}
    assert set(imports(ROOT / f"{stage}.py")) & ours <= {
        "arguments",
        "candidates",
        "records",
        "stage",
        "chat",
        "models",
    }
    if stage != "generate":
        assert "vllm" not in set(imports(ROOT / f"{stage}.py"))


def test_make_pairs_needs_no_torch():
    code = (
        "import sys, make_pairs; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_loop_runs_every_stage_as_a_process():
    script = (ROOT / "iterate.sh").read_text() + (ROOT / "tools/loop.sh").read_text()
    assert all(f" {stage}.py " in script for stage in STAGES)
    assert (
        "set -euo pipefail" in script and "sleep 140" not in script and "pkill" not in script
    )  # PITFALLS 35


def test_the_house_is_not_denser_than_it_may_be():
    """One thought per line: tools/density.py has the limits, and what they are compared with."""
    files = [name for name in density.project_files() if density.in_house(name)]
    assert len(files) > 15
    assert density.faults([density.measure(ROOT / name, name) for name in files]) == []


def test_every_setting_of_iterate_sh_stands_in_it_once():
    """It is stated, exported and recorded by one line: setting NAME DEFAULT."""
    script = (ROOT / "iterate.sh").read_text()
    stated = re.findall(r"^setting ([A-Z_]+)", script, re.M)
    assert len(stated) == len(set(stated)) > 20
    used = set(re.findall(r"\$\{?([A-Z][A-Z_]+)", script))
    assert used - {"BASH_SOURCE", "PWD"} <= set(stated)


def test_every_number_of_a_pitfall_stands_in_the_docs_and_names_a_test():
    """docs/pitfalls.md: each row names a test that exists; each number in a test has its row."""
    rows = re.findall(r"^\| (\d+) \|.*\| (\S.*) \|$", (ROOT / "docs/pitfalls.md").read_text(), re.M)
    documented = {int(number) for number, _ in rows}
    for _, test in rows:
        file, _, name = test.partition(": ")
        source = (ROOT / "tests" / file).read_text()
        assert f"def {name}(" in source or not name, test
    for path in (ROOT / "tests").glob("*.py"):
        for number in re.findall(r"pitfalls_(\d+)", path.read_text()):
            assert int(number) in documented, (path.name, number)
