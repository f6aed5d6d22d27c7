"""Write the model card of a run's policy, README.md, from what the run recorded.

    python tools/model_card.py runs/NAME         the last evaluated policy; into its folder
    python tools/model_card.py runs/NAME 2       that of iteration 2
    hf upload USER/REPO runs/NAME/iter_03/policy

It says where the policy comes from, how it was trained, what it scored on held-out prompts with
standard errors, and what these figures do not show. Figures are those of tools/report.py; settings
are those of config.json and of the stages' metadata. Of a path on this machine, a card has only the
last part.

The front matter, which the hub reads, names the base model where it is one of the hub, the data set
where tools/prepare_prompts.py took the prompts from the hub, and no license: that follows from
those of the base model and the data, and is yours to state.

A card changes no policy, so the hash of a folder leaves README.md out (stage.hash_path): the same
command of iterate.sh still finds everything done.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # records.py is in the root
from arguments import integer_in, parse, parser
from records import Stop, write_whole
from report import Run, read_run
from report_table import legend, plain, sources_of_pairs, table
from stage import meta_path_of, read_meta, run

DPO = "https://arxiv.org/abs/2305.18290"
RLHF_WORKFLOW = "https://arxiv.org/abs/2405.07863"
REWARDS = {"REWARD_MODEL": "reward model", "REWARD_FN": "Python function", "JUDGE": "judge"}
LIMITS = (
    "The reward that was optimised is a proxy: it may rise where quality does not.",
    "The held-out prompts come from the same source as those of the training: the figures say "
    "nothing about other prompts. A standard error is that of the prompts: it holds no variation "
    "between trainings.",
    "Safety and factual accuracy were not measured. The limits of the base model remain.",
)


def arguments():
    p = parser(__doc__)
    add = p.add_argument
    add("run", type=Path, help="folder of the run, runs/NAME")
    add(
        "iteration",
        type=integer_in("[1, inf)"),
        nargs="?",
        help="default: the last one that was evaluated",
    )
    add("--output", type=Path, help="default: README.md in the policy's folder")
    return p


# ---- what is known of the run ------------------------------------------------------------------


def rows_up_to(run: Run, asked: int | None) -> list[dict]:
    """The figures of the initial policy and of all iterations up to this one, which is the last."""
    if not run.config:
        raise Stop(f"{run.folder}: has no config.json. Give the folder of a run of iterate.sh.")
    evaluated = [row["iteration"] for row in run.rows if "reward" in row and "pairs" in row]
    if not evaluated:
        raise Stop(f"{run.folder}: no trained policy was evaluated yet.")
    iteration = asked or evaluated[-1]
    if iteration not in evaluated:
        known = ", ".join(map(str, evaluated))
        raise Stop(f"{run.folder}: iteration {iteration} was not evaluated, only {known}.")
    return [row for row in run.rows if row["iteration"] <= iteration]


def folder_of(run: Run, rows: list[dict]) -> Path:
    return run.folder / f"iter_{rows[-1]['iteration']:02d}"


def arguments_of(output: Path) -> dict:
    """The arguments of the stage that wrote `output`."""
    path = meta_path_of(output)
    return read_meta(path, "Run iterate.sh again with the settings of this run")["arguments"]


def shown(value: str) -> str:
    """A model, a file or a function, without the folders of this machine."""
    is_path = value.count("/") > 1 or value.startswith((".", "/")) or Path(value).exists()
    return Path(value).name if is_path else value


def base_model(config: dict) -> str | None:
    """The base model's name on the hub; None for a folder. iterate.sh adds a commit to a name."""
    name, _, commit = config["MODEL"].partition("@")
    return name if commit and not Path(config["MODEL"]).exists() else None


def data_set(config: dict) -> str | None:
    """The hub's name of the data set that the prompts were taken from, where that is recorded."""
    path = meta_path_of(config["PROMPTS"])
    if not path.exists():
        return None
    source = read_meta(path, "Remove it, and make the prompts again")["arguments"].get("dataset")
    is_name = isinstance(source, str) and shown(source) == source
    return source if is_name else None


# ---- the card ----------------------------------------------------------------------------------


def front_matter(config: dict) -> str:
    """YAML; each value is written as JSON, which is YAML as well."""
    fields: dict = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "online-dpo", "iterative-dpo", "rlhf"],
    }
    base, source = base_model(config), data_set(config)
    if base:
        fields["base_model"] = base
    if source:
        fields["datasets"] = [source]
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def method(config: dict, iterations: int) -> str:
    rewards = []
    for name, kind in REWARDS.items():
        if config[name]:
            rewards.append(f"{kind} `{shown(config[name])}`")
    is_prev = config["REF"] == "prev"
    reference = "the policy of the iteration before" if is_prev else "the base model"
    return (
        f"Fine-tuned from `{shown(config['MODEL'])}` with online iterative DPO, {iterations} "
        "iterations. In each, the current policy answered prompts, a reward ranked the answers, "
        f"two of them became a preference pair, and [DPO]({DPO}) trained on the pairs, as in "
        f"[RLHF Workflow]({RLHF_WORKFLOW}).\n\n"
        f"Reward: {', '.join(rewards)}. Reference of DPO: {reference}."
    )


def settings(folder: Path, config: dict, row: dict) -> str:
    """A list of what was set, from the metadata of the last iteration."""
    sampling = arguments_of(folder / "candidates.jsonl")
    pairing = arguments_of(folder / "pairs.jsonl")
    training = arguments_of(folder / "policy")
    source = data_set(config) or shown(config["PROMPTS"])
    loss = f"{training['loss_type']}, beta {training['beta'][-1]:g}"
    if training["nll_coef"]:
        loss += f", {training['nll_coef']:g} x NLL of the chosen answer"
    facts = {
        "prompts": f"{source}, {config['PROMPTS_PER_ITER'] or 'all'} per iteration",
        "answers per prompt": sampling["num_samples"],
        "tokens per answer": f"at most {sampling['max_new_tokens']}",
        "pairs": f"{pairing['strategy']}; {row['pairs']:,} in the last iteration",
        "loss": loss,
        "learning rate": f"{training['learning_rate']:g}, {training['lr_scheduler']}",
        "trained": what_is_trained(training),
        "pairs per step": training["batch_size"],
        "epochs": f"{training['num_train_epochs']} per iteration",
        "seed": config["SEED"],
    }
    if config.get("EXTRA_PAIRS"):
        names = ", ".join(shown(path) for path in config["EXTRA_PAIRS"].split())
        facts["pairs of other origin"] = f"{names}, iterations: {config['EXTRA_PAIRS_ITERS']}"
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def what_is_trained(training: dict) -> str:
    """training: the arguments of dpo_train.py; an older version's have no rank."""
    rank = training.get("lora_rank")
    if not rank:
        return "all weights"
    return f"LoRA of rank {rank}, alpha {training['lora_alpha']:g}, merged"


def card(run: Run, rows: list[dict]) -> str:
    last = rows[-1]
    parts = [
        front_matter(run.config),
        f"# {run.folder.resolve().name}, iteration {last['iteration']}",
        method(run.config, last["iteration"]),
        "## Settings",
        settings(folder_of(run, rows), run.config, last),
        "## Held-out figures",
        "\n".join(["```", plain(table(rows, run.rewards)), "```"]),
        "\n".join(legend(rows, run.rewards) + sources_of_pairs(rows)),
        "KL is in nats per answer; cut is the share of answers at the token limit. Iteration 0 is "
        "the base model.",
        "## Limits",
        "\n".join(f"- {text}" for text in (*LIMITS, *run.warnings)),
    ]
    return "\n\n".join(parts) + "\n"


def main():
    args = parse(arguments())
    whole_run = read_run(args.run)
    rows = rows_up_to(whole_run, args.iteration)
    policy = folder_of(whole_run, rows) / "policy"
    if not args.output and not policy.is_dir():
        raise Stop(f"{policy}: was not kept (KEEP=last). Give --output.")
    output = args.output or policy / "README.md"
    if output.exists() and not args.overwrite:
        raise Stop(f"{output}: exists. Move it away, or pass --overwrite to write it anew.")
    write_whole(output, card(whole_run, rows))
    print(f"{output}: written")


if __name__ == "__main__":
    run(main)
