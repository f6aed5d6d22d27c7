"""Law 2 across engines: vLLM writes and stores log-probs, the trainer computes them again, and they
are the same.
"""

import json
import re

import pytest


@pytest.mark.vllm
def test_the_trainer_agrees_with_vllm_about_the_demo_policy(stage, tmp_path):
    """The demo's policy (briefly trained), the real engine, and the audit line that a user sees:
    under 1e-3 in fp32.
    """
    demo = tmp_path / "demo"
    stage("demo/build.py", "--output", demo, "--policy_steps", 20, "--comparisons", 64)
    (tmp_path / "prompts.jsonl").write_text("".join(open(demo / "prompts.jsonl").readlines()[:32]))
    policy = ["--model", demo / "policy"]
    files = ["--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "candidates.jsonl"]
    engine = ["--backend", "vllm", "--max_new_tokens", 24, "--engine_args", "enforce_eager=true"]
    stage("generate.py", *policy, *files, *engine, timeout=600)
    scored = ["--candidates", tmp_path / "candidates.jsonl", "--output", tmp_path / "scored.jsonl"]
    stage("score.py", *scored, "--reward_model", demo / "reward_model")
    stage(
        "make_pairs.py",
        "--scored",
        tmp_path / "scored.jsonl",
        "--output",
        tmp_path / "pairs.jsonl",
        "--keep_truncated",
    )
    printed = stage(
        "dpo_train.py",
        *policy,
        "--pairs",
        tmp_path / "pairs.jsonl",
        "--output",
        tmp_path / "policy",
    ).stdout
    mean, worst = map(
        float, re.search(r"differ by (\S+) nats / sqrt\(token\), (\S+) at most", printed).groups()
    )
    audit = json.loads((tmp_path / "policy.meta.json").read_text())["audit"]
    assert (
        audit["answers"] >= 60
        and mean <= worst < 1e-3
        and audit["mean"] == pytest.approx(mean, rel=0.1)
    )
