"""PITFALLS 37: the commands in README, docs and docstrings are those that the code understands, and
its files exist.
"""

import importlib
import re
import shlex

import pytest

from conftest import ROOT

STAGES = ("generate.py", "score.py", "judge.py", "make_pairs.py", "dpo_train.py")
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *(ROOT / s for s in STAGES)]


def commands():
    """Every command of a stage in the texts, lines joined: (where, script, arguments)."""
    for path in TEXTS:
        text = path.read_text().replace("\\\\\n", "\\\n").replace("\\\n", " ")
        for line in text.splitlines():
            for script in STAGES:
                match = re.search(
                    rf"^\s+(?:python|torchrun)\b[^|]*?\b{re.escape(script)}(\s[^#`|]*)$", line
                )
                if match:
                    # two spaces and more set off a remark behind the command
                    yield path.name, script, re.split(r"\s{3,}", match[1].strip())[0]


@pytest.mark.parametrize(("where", "script", "arguments"), list(commands()))
def test_every_command_is_one_the_stage_understands(where, script, arguments, monkeypatch):
    words = [w for w in shlex.split(arguments) if w != "…"]
    stage = importlib.import_module(script.removesuffix(".py"))
    flags = {w.split("=")[0] for w in words if w.startswith("--")}
    known = flag_names(stage)
    assert flags <= known, f"{where}: {script} has no {flags - known}"


def flag_names(module):
    import argparse

    from arguments import parse

    found = set()
    original = argparse.ArgumentParser.parse_args

    def note(self, *args, **kwargs):
        found.update(s for action in self._actions for s in action.option_strings)
        raise SystemExit(0)

    argparse.ArgumentParser.parse_args = note
    try:
        result = module.arguments()
        if isinstance(result, argparse.ArgumentParser):
            parse(result, [])
    except SystemExit:
        pass
    finally:
        argparse.ArgumentParser.parse_args = original
    return found


def test_enough_commands_were_found():
    found = {script for _, script, _ in commands()}
    assert found == set(STAGES)


def test_every_setting_in_the_docs_is_one_of_iterate_sh_and_the_other_way_round():
    script = (ROOT / "iterate.sh").read_text()
    usage = (ROOT / "docs/usage.md").read_text()
    table = usage[usage.index("| setting |") : usage.index("`REF=prev` needs")]
    names = [cell for line in table.splitlines() for cell in line.split("|")[1:2]]
    documented = set(re.findall(r"`([A-Z][A-Z_]+)`", " ".join(names)))
    stated = set(re.findall(r"^setting ([A-Z_]+)", script, re.M))
    assert documented - {"PYTHON", "NODE_RANK"} == stated


def test_files_that_the_readme_names_exist():
    readme = (ROOT / "README.md").read_text()
    for name in re.findall(r"\]\(([^)#]+)\)", readme) + re.findall(
        r"(?<!/)\b(?:tools|kernels|demo|docs|bench)/\w+\.\w+", readme
    ):
        assert (ROOT / name).exists(), name


def test_functions_that_the_readme_says_to_edit_exist():
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("| to … | edit |") : readme.index("More to read")]
    pairs = re.findall(r"`(\w+)`(?: and `(\w+)`)? in ([\w/]+\.py)", table)
    assert len(pairs) >= 5
    for *names, file in pairs:
        for name in filter(None, names):
            assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), (name, file)


@pytest.mark.parametrize("script", STAGES)
def test_help_teaches(script, stage):
    done = stage(script, "--help")
    assert "usage" in done.stdout and "python " + script in done.stdout and len(done.stdout) > 1500


def test_the_demo_table_is_what_a_run_printed():
    """Table and figures in the README are those of bench/results/demo_seeds.txt, beside the
    commands that gave them.
    """
    readme = (ROOT / "README.md").read_text()
    saved = (ROOT / "bench/results/demo_seeds.txt").read_text()
    shown = readme.split("<!-- demo table: begin -->")[1].split("<!-- demo table: end -->")[0]
    assert shown.strip().strip("`").strip() == saved.split("SEED=0\n")[1].split("\n\n")[0].strip()
    rises = [row.split()[5] for row in saved.splitlines() if row.startswith("   3 ")]
    assert len(rises) == 6 and all(float(rise.split("±")[0]) > 0.15 for rise in rises)
    assert all(rise.removeprefix("+").replace("±", " ± ") in readme for rise in rises)


def test_the_requirements_are_pinned_exactly():
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            if line and not line.startswith("#"):
                assert re.match(
                    r"[\w.\-\[\]]+==[\w.]+(?:\+cpu)?(\s*;.*)?$", line.split(" #")[0].strip()
                ), (
                    path.name,
                    line,
                )
