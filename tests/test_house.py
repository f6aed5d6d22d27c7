"""The house: what may import what. Each stage is one file, and one process."""

import ast
import re
import subprocess
import sys

import pytest

from conftest import ROOT

STAGES = ("generate", "score", "judge", "make_pairs", "dpo_train")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("stage", STAGES)
def test_pitfalls_30_a_stage_imports_records_and_kernels_and_no_other_stage(stage):
    """One process a stage: an engine's memory is free when the process ends, and no trainer ever
    holds an engine.
    """
    ours = {p.stem for p in ROOT.glob("*.py")} | {"demo", "tools", "bench", "tests"}
    assert set(imports(ROOT / f"{stage}.py")) & ours <= {"records", "stage", "chat", "models"}
    if stage != "generate":
        assert "vllm" not in set(imports(ROOT / f"{stage}.py"))


def test_make_pairs_needs_no_torch():
    code = (
        "import sys, make_pairs; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_loop_runs_every_stage_as_a_process():
    script = (ROOT / "iterate.sh").read_text()
    assert all(f" {stage}.py " in script for stage in STAGES)
    assert (
        "set -euo pipefail" in script and "sleep 140" not in script and "pkill" not in script
    )  # PITFALLS 35


def test_every_setting_that_a_run_records_reaches_the_script_that_records_it():
    """One that iterate.sh gives a default but does not export would stand empty in config.json."""
    source = (ROOT / "tools/start_run.py").read_text()
    recorded = " ".join(
        re.findall(r'"([A-Z_ ]+)"', source.partition("SETTINGS")[2].partition(")")[0])
    ).split()
    exported = re.search(
        r"^export (MODEL(?:[^\n]*\\\n)*[^\n]*)", (ROOT / "iterate.sh").read_text(), re.M
    )[1]
    assert sorted(recorded) == sorted(exported.replace("\\\n", " ").split()) and len(recorded) > 20
