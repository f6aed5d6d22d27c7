"""What generate.py costs beyond vLLM itself, on the same prompts, samples and engine.

    python bench/generate.py --model MODEL --prompts prompts.jsonl --num_samples 8 --max_new_tokens 64
    python bench/generate.py --model demo/build/seed_0/policy --prompts demo/build/seed_0/heldout.jsonl --untrained \
        --max_new_tokens 128 --engine_args max_model_len=256 enforce_eager=true        on a CPU, answers of real length

One engine is started and both sides use it, in turns, so that its start, compiling and the
machine's mood cancel out:

    direct    LLM.generate on the token ids of all prompts at once, with the same seeds; the answers stay in memory
    stage     the whole of generate.py: hashing inputs, tokenizing, sampling, decoding, writing, flushing, joining

`direct` is timed twice: with vLLM's own detokenizing, as a user would call it, and without. Beside
the clock stands the processor time of this process; the engine has its own, which is the same for
all sides. What the stage costs once and not for each answer, about half a second, needs a run of a
minute to vanish. --untrained gives the model random weights: it hardly ever ends an answer, and the
demo's, of 7 tokens, would make this a measurement of the work between answers.
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

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import generate  # noqa: E402
import records  # noqa: E402
from stage import seed_of  # noqa: E402


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True)
    p.add_argument("--prompts", required=True)
    p.add_argument("--num_samples", type=int, default=8)
    p.add_argument("--max_new_tokens", type=int, default=64)
    p.add_argument(
        "--untrained", action="store_true", help="random weights, so that answers are long"
    )
    p.add_argument("--repeats", type=int, default=3, help="turns; medians are printed")
    p.add_argument(
        "--engine_args", nargs="+", default=[], metavar="KEY=VALUE", help="as generate.py's"
    )
    ours = p.parse_args()
    if ours.untrained:
        folder = tempfile.TemporaryDirectory()
        config = AutoConfig.from_pretrained(ours.model)
        AutoTokenizer.from_pretrained(ours.model).save_pretrained(folder.name)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder.name)
        ours.model = folder.name
    stage = [
        "generate.py", "--backend", "vllm", "--model", ours.model, "--prompts", ours.prompts,
        "--num_samples", str(ours.num_samples), "--max_new_tokens", str(ours.max_new_tokens),
        *(["--engine_args", *ours.engine_args] if ours.engine_args else []),
    ]  # fmt: skip
    sys.argv = [*stage, "--output", "unused"]
    args = generate.arguments()
    policy = generate.Policy(args)
    generate.check_prompts(args, policy)
    rows = list(records.read_jsonl(args.prompts, records.PROMPT))
    prompts = [{"prompt_token_ids": policy.encode(row["prompt"], args.prompts)} for row in rows]

    # The stage's engine, and beside it a tokenizer, which LLM.generate wants for its text.
    generate.vllm_environment(args)
    import vllm

    settings = generate.vllm_settings(args, policy) | {"skip_tokenizer_init": False}
    llm = vllm.LLM(**settings)
    llm.llm_engine.engine_core.shutdown = lambda timeout=None: (
        None
    )  # the stage ends its engine; this one goes on
    generate.vllm_engine = lambda *_: llm.llm_engine

    def direct(detokenize: bool) -> int:
        params = [
            vllm.SamplingParams(
                n=args.num_samples, seed=seed_of(args.seed, args.iteration, row["id"]) >> 1, logprobs=0,
                max_tokens=args.max_new_tokens, stop_token_ids=policy.stop_ids, detokenize=detokenize,
            )
            for row in rows
        ]  # fmt: skip
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(c.token_ids) for o in outputs for c in o.outputs)

    def whole_stage() -> str:
        with tempfile.TemporaryDirectory() as folder:
            sys.argv = [*stage, "--output", f"{folder}/candidates.jsonl"]
            generate.main()
            return (Path(folder) / "candidates.jsonl").read_text()

    sides = {
        "direct": lambda: direct(True),
        "direct, ids only": lambda: direct(False),
        "stage": whole_stage,
    }
    clock, processor = {name: [] for name in sides}, {name: [] for name in sides}
    order = list(sides)
    for turn in range(ours.repeats + 1):  # the first warms up
        for name in order:
            llm.reset_prefix_cache()
            begin, cpu = time.perf_counter(), time.process_time()
            tokens = sides[name]()
            clock[name].append(time.perf_counter() - begin)
            processor[name].append(time.process_time() - cpu)
            if isinstance(tokens, str):  # read when the clock has stopped
                rows_out = [json.loads(line)["candidates"] for line in tokens.split("\n")[:-1]]
                tokens = sum(len(c["token_ids"]) for row in rows_out for c in row)
            last = f"{clock[name][-1]:.2f} s, {processor[name][-1]:.2f} s CPU"
            print(f"turn {turn}: {name}: {last}, {tokens:,} tokens", flush=True)
        order = order[1:] + order[:1]  # each comes first, second and last
    median = {
        name: [statistics.median(times[name][1:]) for times in (clock, processor)] for name in sides
    }
    for name, (wall, cpu) in median.items():
        print(f"{name:17} {wall:7.2f} s, {cpu:6.2f} s CPU")
    for name in ("direct", "direct, ids only"):
        (wall, cpu), (own, own_cpu) = median[name], median["stage"]
        print(
            f"the stage beyond {name}: {100 * (own / wall - 1):+.1f} % of time, {own_cpu - cpu:+.2f} s CPU"
        )


if __name__ == "__main__":
    main()
