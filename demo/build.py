"""Build the demo, offline, in some 75 seconds of one CPU core.

    prompts.jsonl, heldout.jsonl    what is asked, disjoint by id and text (task.py)
    policy/                         a Llama pre-trained on sloppy answers (train_policy.py)
    reward_model/                   a Bradley-Terry model of noisy choices (train_reward_model.py)

    python demo/build.py --output demo/build/seed_0 --seed 0

How honest is it? The gold reward (gold.py) makes the annotator's noisy choices, as a person's true
taste would, and draws the report's second curve; no training sees its values, and within a run
nothing is selected by it. But the demo was designed by looking at it: how sloppy the writer is, how
noisy the annotator, and the loop's learning rate were set so that three iterations show a rise, on
held-out prompts like these. So the curve shows that the loop works, and is no evidence for the
method.

The same seed gives the same bytes on the same machine with the same OMP_NUM_THREADS.
"""

import sys
import time
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # started as a script, yet part of the repository

import records
from demo.task import make_prompts
from stage import Stage, parse, parser, run


def main() -> None:
    p = parser(__doc__)
    p.add_argument(
        "--output", default="demo/build/seed_0", help="folder to build (default: %(default)s)"
    )
    p.add_argument(
        "--seed", type=int, default=0, help="of the split, the weights, the answers and the noise"
    )
    p.add_argument(
        "--policy_steps", type=int, default=400, help="of 32 answers; flat by 300 (default: 400)"
    )
    p.add_argument(
        "--comparisons", type=int, default=5000, help="noisy choices, seen twice (default: 5000)"
    )
    args = parse(p)
    stage = Stage(args, {"code": sorted(Path(__file__).parent.glob("*.py"))}, args.output)
    if stage.done:
        return

    # Here and not above: torch and transformers take seconds to import, and often there is nothing
    # left to do.
    from transformers.utils import logging

    from demo.train_policy import train_policy
    from demo.train_reward_model import accuracy, compare, sample, train_reward_model

    logging.disable_progress_bar()
    started = time.time()
    prompts, heldout = make_prompts(args.seed)
    policy, tokenizer = train_policy(prompts, args.seed, args.policy_steps)
    print(f"the policy was trained in {time.time() - started:.0f} s and writes:")
    for row, answer in zip(heldout[:3], sample(policy, tokenizer, heldout[:3]), strict=True):
        print(f"    {row['prompt'][0]['content']} -> {answer}", flush=True)

    started = time.time()
    choices = compare(policy, tokenizer, prompts, args.comparisons, args.seed)
    reward_model = train_reward_model(policy, tokenizer, choices, args.seed)
    annotator, proxy = accuracy(
        reward_model, tokenizer, compare(policy, tokenizer, heldout, 500, args.seed + 1)
    )
    print(
        f"the reward model was trained in {time.time() - started:.0f} s; of fresh pairs on held-out prompts"
    )
    print(f"    the annotator gets {annotator:.0%} right, the reward model {proxy:.0%}")

    with records.whole(stage.output) as folder:
        for name, rows in (("prompts", prompts), ("heldout", heldout)):
            records.write_whole(folder / f"{name}.jsonl", "".join(map(records.dump, rows)))
        for name, model in (("policy", policy), ("reward_model", reward_model)):
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        stage.count(
            "prompts", len(prompts) + len(heldout), len(prompts), {"held out": len(heldout)}
        )
        stage.write_meta()
    stage.clean()


if __name__ == "__main__":
    run(main)
