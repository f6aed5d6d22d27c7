"""Begin a run, or resume it: record its settings in config.json, its held-out prompts in
heldout.jsonl.

    python tools/start_run.py NAME…        names of settings, whose values are in the environment

The settings of a run that is resumed go into resumed.json. iterate.sh makes that the record when
every stage has accepted them: those of a restart that a stage refuses never become it.

The held-out prompts are copied, so that a later change of the file cannot change the evaluation in
the middle of a run: if the file has changed, this stops. It also stops if the hub now gives another
commit for a model's name than when the run began; iterate.sh appends the commit to each name.
"""

import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arguments import check_utf8
from records import NEW_PROMPT, TEXTS, Stop, count_rows, read_json, whole, write_whole
from stage import hash_path, run
from training.tracker import check_installed


def check_commits(old: dict, new: dict) -> None:
    """Stop where a model's name, as in "NAME@COMMIT", has another commit than before."""
    for setting in ("MODEL", "REWARD_MODEL", "ENHANCER"):
        was, now = old.get(setting, ""), new[setting]
        if was != now and was.partition("@")[0] == now.partition("@")[0]:
            raise Stop(
                f"{setting} was {was} when this run began, and is {now} now. "
                f"Resume with {setting}={was}, or use the new one in another RUN."
            )


def main():
    folder = Path(os.environ["RUN"])
    config = folder / "config.json"
    heldout = folder / "heldout.jsonl"
    settings = {name: os.environ.get(name, "") for name in sys.argv[1:]}
    for name, value in settings.items():
        check_utf8(value, name)
    check_installed(settings.get("REPORT_TO", "none"), "REPORT_TO")
    resumed = config.exists()
    if resumed:
        remedy = "Remove it: it is written again from the settings"
        check_commits(read_json(config, TEXTS, remedy), settings)
    count_rows(os.environ["HELDOUT"], NEW_PROMPT)
    if not heldout.exists():
        with whole(heldout) as temporary:
            shutil.copyfile(os.environ["HELDOUT"], temporary)
    elif hash_path(heldout) != hash_path(os.environ["HELDOUT"]):
        raise Stop(
            f"{os.environ['HELDOUT']} is not what this run began with ({heldout}). Use another RUN."
        )
    record = folder / "resumed.json" if resumed else config
    write_whole(record, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run(main)
