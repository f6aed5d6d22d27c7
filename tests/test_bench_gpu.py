"""bench/gpu.sh runs where nobody can correct it: its commands are understood, it ends in time, and
no step stops the others.
"""

import argparse
import importlib
import os
import shlex
import subprocess
import sys
import time

import pytest
import torch

import small_models
from bench import audit, headline, memory, step_profile
from conftest import ROOT

PHASES = ("A", "B", "C")
MOST_SECONDS = 570


def listed(phase):
    """[name, seconds with the grace to be killed, words of the command] of each step."""
    command = ["bash", "bench/gpu.sh", phase, "--list"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return [(name, int(seconds), shlex.split(command)) for name, seconds, command in rows]


@pytest.mark.parametrize("script", ["gpu.sh", "steps.sh", "interrupt_demo.sh"])
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", f"bench/{script}"], cwd=ROOT, check=True)


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_ends_in_nine_and_a_half_minutes(phase):
    seconds = [seconds for _, seconds, _ in listed(phase)]
    assert len(seconds) >= 4
    assert sum(seconds) <= MOST_SECONDS


class Understood(Exception):
    pass


def our_module_and_flags(command):
    """The bench that a command runs, and its flags: None for pip, pytest and scripts."""
    if "-m" not in command:
        return None
    module, *flags = command[command.index("-m", command.index(sys.executable)) + 1 :]
    return (module, flags) if module.startswith("bench.") else None


@pytest.mark.parametrize("phase", PHASES)
def test_each_command_is_one_that_its_module_understands(phase, monkeypatch):
    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    benches = [found for _, _, command in listed(phase) if (found := our_module_and_flags(command))]
    assert len(benches) >= 4
    for name, flags in benches:
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [name, *flags])
        if name != "bench.versions":  # the one without flags
            with pytest.raises(Understood):
                module.main()


def test_a_flag_that_no_module_has_would_be_seen(monkeypatch):
    """The test above can fail: argparse ends the process at a flag that it does not understand."""
    monkeypatch.setattr(sys, "argv", ["bench.gemms", "--cubes", "3"])
    with pytest.raises(SystemExit):
        importlib.import_module("bench.gemms").main()


def test_other_commands_exist():
    files = [
        word
        for phase in PHASES
        for _, _, command in listed(phase)
        for word in command
        if word.endswith(".sh")
    ]
    assert files
    for file in files:
        assert (ROOT / file).exists()


STEPS = """
set -uo pipefail
. bench/steps.sh
summary=$1/summary.txt log=$1/log.txt grace=1
step "says much" 20 bash -c 'echo "headline: much: 1 GiB"; seq 200000'
step "goes well" 20 echo "headline: products: 3 ms (predicted 2: 1.50 times)"
pick "times"
step "goes wrong" 20 bash -c 'echo why; exit 3'
step "hangs" 1 sleep 60
step "cannot be stopped" 1 bash -c 'trap "" TERM; while true; do sleep 0.2; done'
step "is killed" 20 bash -c 'kill -KILL $$'
step "is not there" 20 ./no_such_program
skip "needs more" "there is no more"
step "comes last" 20 echo done
finish
"""


def test_a_step_that_fails_or_hangs_does_not_stop_the_rest(tmp_path):
    began = time.time()
    done = subprocess.run(
        ["bash", "-c", STEPS, "-", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert time.time() - began < 40
    assert done.returncode == 1  # something failed
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    verdicts = [" ".join(line.split()[:-2]) for line in lines if line.endswith(" s")]
    assert verdicts == [
        "says much ok",
        "goes well ok",
        "goes wrong failed (3)",
        "hangs timed out",
        "cannot be stopped timed out",
        "is killed killed",
        "is not there failed (127)",
        "comes last ok",
    ]
    assert lines[1] == "    much: 1 GiB"  # and no last words, where there is a headline
    assert lines[3] == "    products: 3 ms (predicted 2: 1.50 times)"
    assert lines[4] == "    headline: products: 3 ms (predicted 2: 1.50 times)"  # what was picked
    assert "    last words: why" in lines
    assert lines[-1] == "    last words: done"  # what has no headline
    assert any(line.split(maxsplit=2)[:2] == ["needs", "more"] for line in lines)
    assert done.stdout.endswith((tmp_path / "summary.txt").read_text())
    assert "==== comes last\n+ echo done\ndone\n" in (tmp_path / "log.txt").read_text()


def test_all_well_is_exit_0(tmp_path):
    code = ". bench/steps.sh; summary=$1/s log=$1/l; step fine 20 true; finish"
    assert (
        subprocess.run(
            ["bash", "-c", code, "-", tmp_path], cwd=ROOT, capture_output=True
        ).returncode
        == 0
    )


@pytest.mark.parametrize("arguments", [[], ["D"], ["A", "--fast"], ["A", "--list", "B"]])
def test_what_it_does_not_know_is_refused(arguments):
    done = subprocess.run(
        ["bash", "bench/gpu.sh", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "A|B|C [--rehearse|--list]" in done.stderr


def test_a_headline_stands_beside_its_prediction(monkeypatch):
    name = "three GEMMs, 16384x896x151936"
    assert headline.headline("x", 3.0, "ms", 2) == "headline: x: 3 ms (predicted 2: 1.50 times)"
    assert (
        headline.headline("x", 7.0, "ms", (2, 8))
        == "headline: x: 7 ms (predicted 2 to 8: 1.00 times)"
    )
    assert (
        headline.headline("x", 1.0, "ms", (2, 8))
        == "headline: x: 1 ms (predicted 2 to 8: 0.50 times)"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (
        headline.headline(name, 41.0, "ms") == f"headline: {name}: 41 ms"
    )  # predicted for another machine
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    assert (
        headline.headline(name, 41.0, "ms")
        == f"headline: {name}: 41 ms (predicted 20.5: 2.00 times)"
    )


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix product"),
        ("sm90_xmma_gemm_bf16f32_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "matrix product"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "attention"),
        ("row_kernel", "row kernel"),
        ("triton_poi_fused_cat_mul_silu_3", "compiled layers"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float>>",
            "elementwise",
        ),
        (
            "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>",
            "copy and cast",
        ),
        ("Memcpy HtoD (Pageable -> Device)", "copy and cast"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::reduce_kernel<512, 1>", "reduction"),
        ("void at::native::indexFuncLargeIndex<float>", "gather and scatter"),
        ("ncclDevKernel_AllReduce", "communication"),
        ("some_kernel", "other"),
    ],
)
def test_kernels_are_told_apart(kernel, kind):
    assert step_profile.kind_of(kernel) == kind


def test_the_prediction_counts_weights_that_stay_gathered(tmp_path):
    """On the dry run's own output: the line below the sum counts where its condition holds."""
    small_models.causal_lm(tmp_path)
    command = [sys.executable, "tools/memory.py", "--model", tmp_path, "--tokens_per_batch", "96"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    small = "0.00  more on a GPU with 0.0 GiB free"
    assert small in done.stdout
    table = done.stdout.replace(small, "2.50  more on a GPU with 9.0 GiB free")
    assert memory.sum_for(table, free=9.1) == pytest.approx(memory.sum_for(table, free=8.9) + 2.5)


def test_the_audits_trainer_side_is_that_of_transformers(tmp_path):
    model = small_models.causal_lm(tmp_path)
    prompt, answers = [3, 11, 12], [[21, 22, 23], [31, 32]]
    candidates = [{"token_ids": answer} for answer in answers]
    rows = [{"id": "p0", "prompt_token_ids": prompt, "candidates": candidates}]
    found = audit.log_probs(str(tmp_path), rows, audit.MISTAKES["none"], "fp32")
    for answer, logprob in zip(answers, found, strict=True):
        ids = torch.tensor(prompt + answer)
        likely = model(ids[None, :-1]).logits[0].log_softmax(-1).gather(1, ids[1:, None])
        assert logprob == pytest.approx(likely[-len(answer) :].sum().item(), abs=1e-4)
