"""Run by test_lora.py: answers by vLLM, of the merged policy, and of the factors that it loads
beside the old model.

    python tests/lora_in_vllm.py FOLDER

FOLDER holds model/, policy/, policy.adapter/ and pairs.jsonl. The output is a line of JSON per
engine: for each prompt, the token ids of an answer and their log-prob.
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine runs in this process
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
os.environ["VLLM_NO_USAGE_STATS"] = "1"

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def answers(engine, rows: list[dict], adapter) -> list[tuple[list[int], float]]:
    prompts = [{"prompt_token_ids": row["prompt_token_ids"]} for row in rows]
    settings = SamplingParams(seed=0, max_tokens=12, logprobs=0, ignore_eos=True)
    outputs = engine.generate(prompts, settings, lora_request=adapter, use_tqdm=False)
    found = []
    for output in outputs:
        answer = output.outputs[0]
        found.append((list(answer.token_ids), answer.cumulative_logprob))
    return found


def main():
    folder = Path(sys.argv[1])
    rows = [json.loads(line) for line in open(folder / "pairs.jsonl")]
    adapter = LoRARequest("policy", 1, str(folder / "policy.adapter"))
    for model, request in (("policy", None), ("model", adapter)):
        engine = LLM(
            model=str(folder / model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=16,
            gpu_memory_utilization=0.2,
            enable_lora=request is not None,
            max_lora_rank=8,
        )
        print(json.dumps(answers(engine, rows, request)), flush=True)
        del engine


if __name__ == "__main__":
    main()
