"""What generate.py costs beyond vLLM itself, on the same prompts, samples and engine.

    python bench/generate.py --model MODEL --prompts prompts.jsonl --max_new_tokens 64

On a CPU, with answers of real length:

    python bench/generate.py --untrained --max_new_tokens 128 \\
        --model demo/build/seed_0/policy --prompts demo/build/seed_0/heldout.jsonl \\
        --engine_args max_model_len=256 enforce_eager=true

One engine is started and both sides use it in turn, so that its start, compilation and the
machine's varying speed cancel out:

    direct    LLM.generate on the token ids of all prompts at once, with the same seeds; the answers
              stay in memory
    stage     the whole of generate.py: hashing inputs, tokenizing, sampling, decoding, writing,
              flushing, joining

`direct` is timed twice: with vLLM's own detokenizing, as a user would call it, and without. Beside
the wall time is the processor time of this process; the engine's processes have their own, which is
the same for all sides. The stage also costs about half a second once per run, which is negligible
only in a run of a minute. --untrained gives the model random weights, so it hardly ever ends an
answer. The demo's answers, of 7 tokens, would mostly measure the work between answers.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import generate
import records
from stage import seed_of


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--model", required=True)
    add("--prompts", required=True)
    add("--num_samples", type=int, default=8)
    add("--max_new_tokens", type=int, default=64)
    add("--untrained", action="store_true", help="random weights, so that answers are long")
    add("--repeats", type=int, default=3, help="turns; medians are printed")
    add("--engine_args", nargs="+", default=[], metavar="KEY=VALUE", help="as generate.py's")
    return p.parse_args()


def write_untrained(model: str, folder: str) -> None:
    """The model with random weights, and its tokenizer."""
    config = AutoConfig.from_pretrained(model)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def stage_command(ours: argparse.Namespace) -> list[str]:
    command = ["generate.py", "--backend", "vllm"]
    command += ["--model", ours.model, "--prompts", ours.prompts]
    command += ["--num_samples", str(ours.num_samples)]
    command += ["--max_new_tokens", str(ours.max_new_tokens)]
    if ours.engine_args:
        command += ["--engine_args", *ours.engine_args]
    return command


def start_engine(args, policy):
    """The stage's engine, with a tokenizer, which LLM.generate needs for its text."""
    generate.vllm_environment(args)
    import vllm

    settings = generate.vllm_settings(args, policy) | {"skip_tokenizer_init": False}
    return vllm.LLM(**settings)


def sampling_parameters(rows: list[dict], args, policy, detokenize: bool) -> list:
    """What generate.py asks of the engine for each row, through vLLM's public interface."""
    import vllm

    parameters = []
    for row in rows:
        of_row = vllm.SamplingParams(
            n=args.num_samples,
            seed=seed_of(args.seed, args.iteration, row["id"]) >> 1,
            logprobs=0,
            max_tokens=args.max_new_tokens,
            stop_token_ids=policy.stop_ids,
            detokenize=detokenize,
        )
        parameters.append(of_row)
    return parameters


def direct(llm, rows: list[dict], prompts: list[dict], args, policy, detokenize: bool) -> int:
    """LLM.generate on all prompts at once. -> tokens written"""
    parameters = sampling_parameters(rows, args, policy, detokenize)
    tokens = 0
    for output in llm.generate(prompts, parameters, use_tqdm=False):
        tokens += sum(len(answer.token_ids) for answer in output.outputs)
    return tokens


def whole_stage(engine, command: list[str]) -> str:
    """generate.py's main() on the existing engine. -> candidates.jsonl"""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(sys, "argv", [*command, "--output", f"{folder}/candidates.jsonl"]),
        mock.patch.object(generate, "vllm_engine", lambda *_: engine),
        # the stage ends its engine; this one is needed again
        mock.patch.object(engine.engine_core, "shutdown", lambda timeout=None: None),
    ):
        generate.main()
        return (Path(folder) / "candidates.jsonl").read_text()


def tokens_of(result: int | str) -> int:
    """Tokens written, from what a side returned: their number, or candidates.jsonl."""
    if isinstance(result, int):
        return result
    tokens = 0
    for line in result.split("\n")[:-1]:
        tokens += sum(len(c["token_ids"]) for c in json.loads(line)["candidates"])
    return tokens


def time_in_turns(sides: dict, llm, repeats: int) -> dict[str, tuple[float, float]]:
    """Run each side `repeats` times. -> its median seconds, by the clock and of this process"""
    clock = {name: [] for name in sides}
    processor = {name: [] for name in sides}
    order = list(sides)
    for turn in range(repeats + 1):  # the first warms up
        for name in order:
            llm.reset_prefix_cache()
            begin, begin_cpu = time.perf_counter(), time.process_time()
            result = sides[name]()
            wall, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
            clock[name].append(wall)
            processor[name].append(cpu)
            times = f"{wall:.2f} s, {cpu:.2f} s CPU"
            print(f"turn {turn}: {name}: {times}, {tokens_of(result):,} tokens", flush=True)
        order = order[1:] + order[:1]  # each comes first, second and last
    medians = {}
    for name in sides:
        medians[name] = (
            statistics.median(clock[name][1:]),
            statistics.median(processor[name][1:]),
        )
    return medians


def main() -> None:
    ours = arguments()
    if ours.untrained:
        folder = tempfile.TemporaryDirectory()
        write_untrained(ours.model, folder.name)
        ours.model = folder.name
    command = stage_command(ours)
    with mock.patch.object(sys, "argv", [*command, "--output", "unused"]):
        args = generate.read_arguments()
    policy = generate.Policy(args)
    policy.check_prompts(args.prompts)
    rows = list(records.read_jsonl(args.prompts, records.PROMPT))
    prompts = [{"prompt_token_ids": policy.encode(row["prompt"], args.prompts)} for row in rows]

    llm = start_engine(args, policy)
    ask = partial(direct, llm, rows, prompts, args, policy)
    sides = {
        "direct": partial(ask, detokenize=True),
        "direct, ids only": partial(ask, detokenize=False),
        "stage": partial(whole_stage, llm.llm_engine, command),
    }
    medians = time_in_turns(sides, llm, ours.repeats)
    for name, (wall, cpu) in medians.items():
        print(f"{name:17} {wall:7.2f} s, {cpu:6.2f} s CPU")
    own, own_cpu = medians["stage"]
    for name in ("direct", "direct, ids only"):
        wall, cpu = medians[name]
        percent = 100 * (own / wall - 1)
        print(f"the stage beyond {name}: {percent:+.1f} % of time, {own_cpu - cpu:+.2f} s CPU")


if __name__ == "__main__":
    main()
