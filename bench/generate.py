"""What generate.py costs beyond vLLM itself, on the same prompts, samples and engine.

    python bench/generate.py --model MODEL --prompts prompts.jsonl --num_samples 8 --max_new_tokens 64

One engine is started and both sides use it, in turns, so that its start, compiling and the machine's mood cancel out:

    direct    LLM.generate on the token ids of all prompts at once, with the same seeds; the answers stay in memory
    stage     the whole of generate.py: hashing inputs, tokenizing, sampling, decoding, writing, flushing, joining

`direct` is timed twice: with vLLM's own detokenizing, as a user would call it, and without.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import generate  # noqa: E402
import records  # noqa: E402


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--prompts", required=True)
    p.add_argument("--num_samples", type=int, default=8)
    p.add_argument("--max_new_tokens", type=int, default=64)
    p.add_argument("--repeats", type=int, default=3, help="turns; medians are printed")
    p.add_argument("--engine_args", nargs="+", default=[], metavar="KEY=VALUE", help="as generate.py's")
    ours = p.parse_args()
    stage = [
        "generate.py", "--backend", "vllm", "--model", ours.model, "--prompts", ours.prompts,
        "--num_samples", str(ours.num_samples), "--max_new_tokens", str(ours.max_new_tokens),
        *(["--engine_args", *ours.engine_args] if ours.engine_args else []),
    ]  # fmt: skip
    sys.argv = [*stage, "--output", "unused"]
    args = generate.arguments()
    policy = generate.Policy(args)
    rows = list(records.read_jsonl(args.prompts, records.PROMPT))
    prompts = [{"prompt_token_ids": policy.encode(row["prompt"], args.prompts)} for row in rows]

    # The stage's engine, and beside it a tokenizer, which LLM.generate wants for its text.
    generate.vllm_environment(args)
    import vllm

    settings = generate.vllm_settings(args, policy) | {"skip_tokenizer_init": False}
    llm = vllm.LLM(**settings)
    llm.llm_engine.engine_core.shutdown = lambda timeout=None: None  # the stage ends its engine; this one goes on
    generate.vllm_engine = lambda *_: llm.llm_engine

    def direct(detokenize: bool) -> int:
        params = [
            vllm.SamplingParams(
                n=args.num_samples, seed=records.seed_of(args.seed, args.iteration, row["id"]) >> 1, logprobs=0,
                max_tokens=args.max_new_tokens, stop_token_ids=policy.stop_ids, detokenize=detokenize,
            )
            for row in rows
        ]  # fmt: skip
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(c.token_ids) for o in outputs for c in o.outputs)

    def whole_stage() -> int:
        with tempfile.TemporaryDirectory() as folder:
            sys.argv = [*stage, "--output", f"{folder}/candidates.jsonl"]
            generate.main()
            answers = [json.loads(line)["candidates"] for line in open(f"{folder}/candidates.jsonl")]
        return sum(len(c["token_ids"]) for row in answers for c in row)

    sides = {"direct": lambda: direct(True), "direct, ids only": lambda: direct(False), "stage": whole_stage}
    seconds = {name: [] for name in sides}
    for turn in range(ours.repeats + 1):  # the first warms up
        for name, side in sides.items():
            llm.reset_prefix_cache()
            begin, cpu = time.perf_counter(), time.process_time()
            tokens = side()
            seconds[name].append(time.perf_counter() - begin)
            cpu = time.process_time() - cpu  # the engine computes in a process of its own
            print(f"turn {turn}: {name}: {seconds[name][-1]:.2f} s, {cpu:.2f} s CPU, {tokens:,} tokens", flush=True)
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, value in median.items():
        print(f"{name:17} {value:7.2f} s   the stage takes {100 * (median['stage'] / value - 1):+.1f} %")


if __name__ == "__main__":
    main()
