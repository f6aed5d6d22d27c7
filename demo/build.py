"""Build the demo, offline, in some 75 seconds of one CPU core.

    prompts.jsonl, heldout.jsonl    what is asked, disjoint by id and text (task.py)
    policy/                         a Llama pre-trained on sloppy answers (train_policy.py)
    reward_model/                   a Bradley-Terry model of noisy choices (train_reward_model.py)

    python demo/build.py --output demo/build/seed_0 --seed 0

How honest is it? The gold reward (gold.py) determines the annotator's noisy choices, as a person's
true taste would, and it is the report's second curve. No training sees its values, and within a run
nothing is selected by it. But it was used to design the demo: how sloppy the writer is, how noisy
the annotator is, and the loop's learning rate were set so that three iterations show a rise, on
held-out prompts like these. So the curve shows that the loop works, but is no evidence for the
method.

The same seed gives the same bytes on the same machine with the same OMP_NUM_THREADS.
"""

import sys
import time
from pathlib import Path

# run as a script, but part of the repository
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import records
from arguments import integer_in, parse, parser
from demo.task import make_prompts
from stage import Stage, run, seconds_since


def arguments():
    p = parser(__doc__)
    add = p.add_argument
    add("--output", default="demo/build/seed_0", help="folder to build (default: %(default)s)")
    add(
        "--seed",
        type=integer_in("[0, inf)"),
        default=0,
        help="for the split, the weights, the answers and the noise",
    )
    add(
        "--policy_steps",
        type=integer_in("[1, inf)"),
        default=400,
        help="of 32 answers; flat by 300 (default: 400)",
    )
    add(
        "--comparisons",
        type=integer_in("[1, inf)"),
        default=5000,
        help="noisy choices, seen twice (default: 5000)",
    )
    add(
        "--writers",
        choices=("policy", "varied"),
        default="policy",
        help="whose answers are compared: the policy's, or three quarters of them by writers from "
        "careless to careful (default: policy)",
    )
    return p


def build_policy(prompts: list[dict], heldout: list[dict], args):
    """Train the initial policy and show some of its answers; return it and its tokenizer."""
    from demo.train_policy import train_policy
    from demo.train_reward_model import sample

    started = time.monotonic()
    policy, tokenizer = train_policy(prompts, args.seed, args.policy_steps)
    print(f"the policy was trained in {seconds_since(started):.0f} s and writes:")

    shown = heldout[:3]
    for row, answer in zip(shown, sample(policy, tokenizer, shown), strict=True):
        question = row["prompt"][0]["content"]
        print(f"    {question} -> {answer}", flush=True)
    return policy, tokenizer


def build_reward_model(policy, tokenizer, prompts: list[dict], heldout: list[dict], args):
    """Train the reward model on choices between the policy's answers, and say how good it is."""
    from demo.train_reward_model import accuracy, compare, train_reward_model

    started = time.monotonic()
    choices = compare(policy, tokenizer, prompts, args.comparisons, args.seed, args.writers)
    reward_model = train_reward_model(policy, tokenizer, choices, args.seed)

    fresh = compare(policy, tokenizer, heldout, 500, args.seed + 1)
    annotator, proxy = accuracy(reward_model, tokenizer, fresh)
    seconds = seconds_since(started)
    print(
        f"the reward model was trained in {seconds:.0f} s; of fresh pairs on held-out prompts\n"
        f"    the annotator gets {annotator:.0%} right, the reward model {proxy:.0%}"
    )
    return reward_model


def main() -> None:
    args = parse(arguments())
    code = sorted(Path(__file__).parent.glob("*.py"))
    stage = Stage(args, {"code": code}, args.output)
    if stage.done:
        return

    # Imported here and in the functions above, not at the top: torch and transformers take seconds
    # to import, and often there is nothing left to do.
    from transformers.utils import logging

    logging.disable_progress_bar()

    prompts, heldout = make_prompts(args.seed)
    policy, tokenizer = build_policy(prompts, heldout, args)
    reward_model = build_reward_model(policy, tokenizer, prompts, heldout, args)

    with records.whole(stage.output) as folder:
        for name, rows in (("prompts", prompts), ("heldout", heldout)):
            lines = [records.dump(row) for row in rows]
            records.write_whole(folder / f"{name}.jsonl", "".join(lines))
        for name, model in (("policy", policy), ("reward_model", reward_model)):
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        total = len(prompts) + len(heldout)
        stage.count("prompts", total, len(prompts), {"held out": len(heldout)})
        stage.write_meta()
    stage.clean()


if __name__ == "__main__":
    run(main)
