"""Begin a run, or go on with it: record its settings in config.json and its held-out prompts in
heldout.jsonl.

iterate.sh calls it with its settings in the environment. The held-out prompts are copied, so that a
later change of the file cannot move the yardstick in the middle of a run: if it has changed, this
stops. So it does when the hub now gives another commit for a model's name than it gave when the run
began; iterate.sh puts the commit behind each name.
"""

import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from records import PROMPT, Stop, count_rows, whole, write_whole  # noqa: E402
from stage import hash_path, run  # noqa: E402

SETTINGS = (
    "MODEL REWARD_MODEL REWARD_FN JUDGE JUDGE_ARGS JUDGE_URL GOLD_FN PROMPTS HELDOUT RUN ITERS REF HISTORY ENHANCER "
    "NUM_SAMPLES EVAL_SAMPLES PROMPTS_PER_ITER SEED KEEP NPROC GENERATE_NPROC GENERATE_ARGS SCORE_ARGS PAIRS_ARGS "
    "TRAIN_ARGS TORCHRUN_ARGS"
).split()


def check_commits(old: dict, new: dict) -> None:
    """Stop where a model's setting is the same name at another commit, "NAME@COMMIT": the hub has
    moved on.
    """
    for setting in ("MODEL", "REWARD_MODEL", "ENHANCER"):
        was, now = old.get(setting, ""), new[setting]
        if was != now and was.partition("@")[0] == now.partition("@")[0]:
            raise Stop(
                f"{setting} was {was} when this run began, and is {now} now. "
                f"Go on with {setting}={was}, or use the new one in another RUN."
            )


def main():
    folder = Path(os.environ["RUN"])
    config = folder / "config.json"
    heldout = folder / "heldout.jsonl"
    settings = {name: os.environ.get(name, "") for name in SETTINGS}
    if config.exists():
        check_commits(json.loads(config.read_text()), settings)
    count_rows(os.environ["HELDOUT"], PROMPT)
    if not heldout.exists():
        with whole(heldout) as temporary:
            shutil.copyfile(os.environ["HELDOUT"], temporary)
    elif hash_path(heldout) != hash_path(os.environ["HELDOUT"]):
        raise Stop(
            f"{os.environ['HELDOUT']} is not what this run began with ({heldout}). Use another RUN."
        )
    write_whole(config, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run(main)
