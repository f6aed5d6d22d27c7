"""The flags of dpo_train.py: what each means, its default and why, and what is refused."""

from arguments import integer_in, number_in
from records import Stop
from stage import say
from training import lora, tracker

INPUTS = ("model", "ref_model", "pairs", "eval_pairs")  # the result depends on their content

# A run may be resumed with other values of these: at most the rounding changes.
FREE = (
    "tokens_per_batch",
    "gradient_checkpointing",
    "cpu_offload",
    "shard_size",
    "save_every",
    "max_logprob_gap",
    "iteration",  # what it decides, the betas of this run, is compared instead
    "report_to",
    "run_name",
    "logging_dir",
    "steps_before",
)


def add_flags(p) -> None:
    """All of them. p: the argparse.ArgumentParser."""
    add_files(p.add_argument)
    add_loss(p.add_argument)
    add_optimizer(p.add_argument)
    add_lora(p.add_argument)
    add_memory_and_speed(p.add_argument)
    add_evaluation(p.add_argument)
    add_watching(p.add_argument)
    add_tracker(p.add_argument)


def add_files(add) -> None:
    add(
        "--model",
        required=True,
        help="the policy to start from: a folder or a hub name[@revision]",
    )
    add("--ref_model", help="the reference; default: --model itself, which costs no second model")
    add("--pairs", nargs="+", required=True, help="preference pairs, one file or several")
    add(
        "--output",
        required=True,
        help="folder of the trained policy; its log is OUTPUT.train.jsonl",
    )
    add(
        "--max_length",
        type=integer_in("[1, inf)"),
        help="pairs with a longer prompt + answer are dropped; default: the model's positions",
    )


def add_loss(add) -> None:
    add(
        "--beta",
        type=number_in("[0, inf)"),
        nargs="+",
        default=[0.1],
        help="0.1, as in the DPO paper. Several: one per epoch, counted over all iterations of a "
        "loop; the last holds for all later epochs. So values beyond the end are no error",
    )
    add(
        "--iteration",
        type=integer_in("[1, inf)"),
        default=1,
        help="number of this iteration in the loop, from 1: it says which values of --beta belong "
        "to this run's epochs; default 1",
    )
    add("--loss_type", choices=("sigmoid", "ipo", "hinge", "robust"), default="sigmoid")
    add(
        "--label_smoothing",
        type=number_in("[0, 0.5)"),
        help="share of flipped labels (sigmoid: default 0; robust: needed)",
    )
    add(
        "--nll_coef",
        type=number_in("[0, inf)"),
        default=0.0,
        help="weight of the chosen answer's loss per token; default 0: DPO alone",
    )
    add(
        "--length_coef",
        type=number_in("(-inf, inf)"),
        help="alpha in the equations above: discounts length; default 0",
    )


def add_optimizer(add) -> None:
    # The defaults are those of OpenRLHF 0.9.5, its last release with an iterative DPO loop.
    add(
        "--learning_rate",
        type=number_in("(0, 1]"),
        default=5e-7,
        help="5e-7 suits full fine-tuning of 1B parameters and more",
    )
    add(
        "--batch_size",
        type=integer_in("[1, inf)"),
        default=128,
        help="pairs per optimizer step, over all ranks",
    )
    add(
        "--num_train_epochs",
        type=integer_in("[1, inf)"),
        default=1,
        help="1: the next iteration has fresh pairs",
    )
    add(
        "--lr_scheduler",
        choices=("cosine", "constant"),
        default="cosine",
        help="after the warm-up: down to a tenth, or constant",
    )
    add(
        "--warmup_ratio",
        type=number_in("[0, 1]"),
        default=0.03,
        help="share of the steps with a rising rate",
    )
    add(
        "--weight_decay",
        type=number_in("[0, inf)"),
        default=0.0,
        help="0: beta holds the policy back already",
    )
    add(
        "--adam_betas",
        type=number_in("[0, 1)"),
        nargs=2,
        default=[0.9, 0.95],
        metavar=("B1", "B2"),
    )
    add(
        "--max_grad_norm",
        type=number_in("[0, inf)"),
        default=1.0,
        help="clip the gradient's norm; 0: do not",
    )


def add_lora(add) -> None:
    add(
        "--lora_rank",
        type=integer_in("[1, inf)"),
        help="train factors of this rank beside frozen weights (LoRA), with a --learning_rate of "
        "5e-6 or more; 16 is usual; default: full training",
    )
    add(
        "--lora_alpha",
        type=number_in("(0, inf)"),
        help="the factors' product is multiplied by alpha / rank; default: twice the rank",
    )
    add(
        "--lora_targets",
        nargs="+",
        help="names of linear layers, as peft's target_modules: q_proj, mlp.up_proj, …; default: "
        "all in the decoder layers",
    )


def add_memory_and_speed(add) -> None:
    add(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="dtype of the matrix products; auto: bf16 on a GPU, fp32 on a CPU. "
        "Trained weights and log-probs are fp32 either way",
    )
    add(
        "--save_dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="dtype of the saved folder; auto: that of the model's files",
    )
    add(
        "--tokens_per_batch",
        type=integer_in("[1, inf)"),
        default=16384,
        help="tokens in one forward pass of one rank; 16k fill a large GPU",
    )
    add(
        "--packing",
        choices=("auto", "prefix", "padded"),
        default="auto",
        help="prefix: no padding, and each prompt once; padded: for models with attention that "
        "the mode 'prefix' cannot express (windows, soft-caps); auto: prefix wherever possible",
    )
    add(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute layers: a third more time, activations of one layer instead of all",
    )
    add(
        "--cpu_offload",
        action="store_true",
        help="weights and Adam states in host memory (GPU only)",
    )
    add(
        "--shard_size",
        type=integer_in("[1, inf)"),
        help="ranks that share one copy of the weights; default: all. With the number of GPUs per "
        "machine, each machine holds a copy (HSDP)",
    )


def add_evaluation(add) -> None:
    add(
        "--eval_pairs",
        nargs="+",
        help="held-out pairs.jsonl: loss, accuracy and rewards on them before and after training",
    )
    add(
        "--eval_every",
        type=integer_in("[0, inf)"),
        default=0,
        help="steps between evaluations; 0: before and after training only",
    )


def add_watching(add) -> None:
    add(
        "--save_every",
        type=integer_in("[0, inf)"),
        default=0,
        help="steps between checkpoints of 12 bytes per trained weight; 0: only when interrupted, "
        "as an iteration is short",
    )
    add(
        "--max_logprob_gap",
        type=number_in("(0, inf)"),
        help="the audit's tolerance, in nats: the mean over answers of |difference| / sqrt(|y|), "
        "as rounding errors add up like a random walk; default 1e-3 in fp32, 0.1 in bf16 "
        "(provisional)",
    )
    add("--seed", type=integer_in("[0, inf)"), default=0, help="seed for shuffling the pairs")


def add_tracker(add) -> None:
    add(
        "--report_to",
        choices=tracker.TRACKERS,
        default="none",
        help="show the log's rows there, too; training/tracker.py says how",
    )
    add("--run_name", help="of the run there; default: the name of --output")
    add("--logging_dir", help="for the tracker's files; default: OUTPUT.tracker")
    add(
        "--steps_before",
        type=integer_in("[0, inf)"),
        default=0,
        help="steps of the loop's earlier iterations: the tracker counts on from there",
    )


# ---- what is refused, and what is filled in -----------------------------------------------------


def settle_arguments(args, device_type: str, world: int) -> None:
    """Refuse contradictions, and fill in what depends on the machine and on the iteration.

    A flag without effect is an error: the run is not what its author thinks.
    """
    if args.loss_type == "ipo" and 0 in args.beta:  # of any iteration
        raise Stop("--beta 0 with --loss_type ipo: its target is 1 / (2 beta)")
    args.beta = betas_of_epochs(args)
    if args.dtype == "auto":
        args.dtype = "bf16" if device_type == "cuda" else "fp32"
    check_loss_arguments(args)
    if args.cpu_offload and device_type == "cpu":
        raise Stop("--cpu_offload has no effect without a GPU")
    check_shard_size(args.shard_size, world)
    if args.eval_every and not args.eval_pairs:
        raise Stop("--eval_every has no effect without --eval_pairs")
    tracker.check_arguments(args)
    lora.settle_arguments(args)
    note_on_rate(args)


def note_on_rate(args) -> None:
    if args.learning_rate > 5e-7:
        return
    if args.lora_rank:
        say(
            f"note: --learning_rate {args.learning_rate:g} is one of full training, and LoRA wants "
            f"five to ten times as much: begin with {lora.RATE:g}"
        )
    elif args.batch_size < 128:
        say(
            f"note: --batch_size {args.batch_size} at --learning_rate {args.learning_rate:g}: the "
            "rate was tuned for 128 pairs per step, and smaller batches have given worse results "
            "at it (RLHFlow/Online-RLHF issue 3). Raise one of the two"
        )


def check_shard_size(shard_size: int | None, world: int) -> None:
    if shard_size is None:
        return
    if world == 1:
        raise Stop(f"--shard_size {shard_size} has no effect with one rank: leave it out")
    if world % shard_size:
        raise Stop(f"--shard_size {shard_size} does not divide the {world} ranks")


def check_loss_arguments(args) -> None:
    smoothing = args.label_smoothing
    if args.loss_type in ("hinge", "ipo") and smoothing is not None:
        raise Stop(f"--label_smoothing has no effect with --loss_type {args.loss_type}")
    if args.loss_type == "robust" and not smoothing:
        raise Stop("--loss_type robust needs --label_smoothing, between 0 and 0.5")
    if args.loss_type == "ipo" and args.length_coef is not None:
        raise Stop("--length_coef has no effect with --loss_type ipo")
    if not any(args.beta) and args.nll_coef == 0:
        raise Stop("--beta 0 trains nothing, unless --nll_coef is above 0")


def betas_of_epochs(args) -> list[float]:
    """The beta of each epoch of this run. --beta lists those of all iterations' epochs."""
    first = (args.iteration - 1) * args.num_train_epochs
    last = len(args.beta) - 1  # it holds for all later epochs
    return [args.beta[min(first + epoch, last)] for epoch in range(args.num_train_epochs)]
