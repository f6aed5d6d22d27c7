"""Would the tests notice? Small mistakes, put into a copy of the source one at a time, and for each
the tests that must fail on it.

    python tests/mutants.py                   every mutant, in 10 to 15 minutes on two cores
    python tests/mutants.py NAME …            these
    python tests/mutants.py --list            their names, and the promise that each of them breaks

A mutant is "killed" where its tests fail, and "survived" where they pass: then a promise of this
project could be broken, and nobody would see it. First the same tests must pass without any mutant.
Exits with 0 where all are killed. tests/test_mutants.py sees to it that the list fits the source.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600  # for the tests of one mutant

# pytest's exit codes
PASSED, FAILED = 0, 1


class Mutant(NamedTuple):
    name: str
    promise: str  # that it breaks
    file: str
    old: str  # occurs once in the file
    new: str
    tests: tuple[str, ...]  # pytest's ids


LOOP = "tests/test_iterate.py::"
TRAINER = "tests/test_dpo_train.py::"
EQUATIONS = TRAINER + "test_every_loss_is_its_equation"
PLAIN_LOOP = TRAINER + "test_a_training_is_a_plain_loop_over_its_steps"
HAND_WRITTEN = TRAINER + "test_pitfalls_16_loss_and_gradient_equal_a_hand_written_fp64_loop"
NO_FLAGS = TRAINER + "test_a_run_without_flags_has_the_settings_that_the_help_names"
RESUMED = TRAINER + "test_an_interrupted_training_goes_on_after_its_checkpoint_with_adams_states"
ROUNDING = (
    TRAINER + "test_pitfalls_28_the_audit_lets_rounding_pass_and_stops_stale_weights[fp32-0.001]"
)
PAIRS = "tests/test_make_pairs.py::"
COMPUTED_ONCE = (
    "tests/test_score.py::"
    "test_a_prompt_is_computed_once_for_all_its_answers[llama-load_reward_model]"
)
RANDOM = TRAINER + "test_pitfalls_44_nothing_random_is_left_on"
HELDOUT = "tests/test_prompts.py::test_heldout_prompts_are_never_dealt_out"
KERNEL = "tests/test_logprob.py::"
HELD_OUT = "tests/test_held_out_pairs.py::"
LORA = "tests/test_lora.py::"

MUTANTS = [
    # ---- the loop ------------------------------------------------------------------------------
    Mutant(
        "ref-prev-is-init",
        "By default the reference is the policy that wrote the answers.",
        "iterate.sh",
        '[[ $REF == prev ]] || reference=(--ref_model "$MODEL")',
        'reference=(--ref_model "$MODEL")',
        (LOOP + "test_each_iteration_trains_the_policy_of_the_one_before_which_is_its_reference",),
    ),
    Mutant(
        "ref-init-is-prev",
        "REF=init keeps the first policy as the reference.",
        "iterate.sh",
        'reference=(--ref_model "$MODEL")',
        'reference=(--ref_model "$policy")',
        (LOOP + "test_ref_init_is_the_first_policy_in_every_iteration",),
    ),
    Mutant(
        "enhancer-prev-is-init",
        "ENHANCER=prev is the policy before the one that answers.",
        "iterate.sh",
        "prev) enhancer=$previous ;;",
        "prev) enhancer=$MODEL ;;",
        (LOOP + "test_the_second_policy_is_the_one_before_the_policy",),
    ),
    Mutant(
        "enhancer-with-the-same-seed",
        "The second policy has random numbers of its own.",
        "iterate.sh",
        '--seed "$((SEED + 1))"',
        '--seed "$SEED"',
        (LOOP + "test_the_second_policy_is_the_one_before_the_policy",),
    ),
    Mutant(
        "kl-names-swapped",
        "kl/init is the distance from the first policy, kl/prev from the one before.",
        "iterate.sh",
        '"init=$MODEL" "prev=$policy"',
        '"init=$policy" "prev=$MODEL"',
        (LOOP + "test_the_distance_is_from_the_first_policy_and_from_the_one_before",),
    ),
    Mutant(
        "one-iteration-too-few",
        "ITERS iterations are run.",
        "iterate.sh",
        "i <= ITERS",
        "i < ITERS",
        (LOOP + "test_each_iteration_trains_the_policy_of_the_one_before_which_is_its_reference",),
    ),
    Mutant(
        "always-from-the-first-policy",
        "Each iteration goes on from the policy of the one before.",
        "iterate.sh",
        "policy=$now/policy\ndone",
        "policy=$MODEL\ndone",
        (LOOP + "test_the_answers_are_those_of_the_policy_that_is_trained_next",),
    ),
    Mutant(
        "history-off-by-one",
        "HISTORY=1 adds the pairs of one earlier iteration.",
        "iterate.sh",
        "j >= i - HISTORY",
        "j > i - HISTORY",
        (LOOP + "test_history_adds_the_pairs_of_so_many_earlier_iterations",),
    ),
    Mutant(
        "offline-pairs-in-every-iteration",
        "EXTRA_PAIRS_ITERS=first adds pairs of other origin to the first iteration alone.",
        "iterate.sh",
        "if ((i == 1)) ||",
        "if ((i > 0)) ||",
        (LOOP + "test_pairs_of_other_origin_stand_beside_the_fresh_ones[first]",),
    ),
    Mutant(
        "offline-pairs-not-the-callers",
        "A relative path in EXTRA_PAIRS means the folder that iterate.sh is called from.",
        "tools/loop.sh",
        "[[ $file == /* || ! -e $1/$file ]] || file=$1/$file",
        ":",
        (LOOP + "test_a_relative_path_among_pairs_of_other_origin_is_the_callers",),
    ),
    Mutant(
        "a-card-is-another-policy",
        "A model card in a policy's folder changes neither its identity nor what is done.",
        "stage.py",
        "if f.is_file() and f != card",
        "if f.is_file()",
        ("tests/test_after_the_loop.py::test_a_card_changes_no_policy_but_any_other_file_does",),
    ),
    Mutant(
        "the-best-answer-for-alpaca-eval",
        "AlpacaEval gets the first answer that was sampled.",
        "tools/answers.py",
        'row["candidates"][0]["text"]',
        'row["candidates"][-1]["text"]',
        ("tests/test_after_the_loop.py::test_answers_are_alpaca_evals",),
    ),
    Mutant(
        "keep-last-removes-too-early",
        "KEEP=last removes a policy when nothing needs it any more.",
        "iterate.sh",
        'discard "$policy"',
        'discard "$now/policy"',
        (LOOP + "test_keep_last_removes_a_policy_when_the_next_is_evaluated",),
    ),
    Mutant(
        "evaluated-on-training-prompts",
        "Every policy is evaluated on the held-out prompts.",
        "tools/loop.sh",
        '--prompts "$RUN/heldout.jsonl" --output "$folder/eval',
        '--prompts "$PROMPTS" --output "$folder/eval',
        (LOOP + "test_every_policy_is_evaluated_on_the_same_heldout_prompts_and_seed",),
    ),
    Mutant(
        "gold-decides",
        "GOLD_FN watches the held-out answers and decides nothing.",
        "iterate.sh",
        "--reward_weights gold=0",
        "--reward_weights gold=1",
        (LOOP + "test_what_only_watches_scores_the_heldout_answers_with_weight_0",),
    ),
    Mutant(
        "the-same-slice-every-iteration",
        "Each iteration takes the next prompts.",
        "iterate.sh",
        '--output "$now/prompts.jsonl" --iteration "$i"',
        '--output "$now/prompts.jsonl" --iteration 1',
        (LOOP + "test_each_iteration_has_its_own_slice_of_the_prompts",),
    ),
    Mutant(
        "train-args-lost",
        "TRAIN_ARGS reach the trainer.",
        "iterate.sh",
        '"${steps[@]}" $TRAIN_ARGS',
        '"${steps[@]}"',
        (LOOP + "test_the_settings_of_a_stage_and_the_seed_reach_it",),
    ),
    Mutant(
        "seed-lost",
        "SEED reaches every stage that draws.",
        "iterate.sh",
        '--seed "$SEED" "${hold_out[@]}" $PAIRS_ARGS',
        '"${hold_out[@]}" $PAIRS_ARGS',
        (LOOP + "test_the_settings_of_a_stage_and_the_seed_reach_it",),
    ),
    Mutant(
        "generate-nproc-ignored",
        "GENERATE_NPROC processes generate.",
        "tools/loop.sh",
        "processes=$GENERATE_NPROC",
        "processes=$NPROC",
        (LOOP + "test_a_stage_runs_in_as_many_processes_as_was_said",),
    ),
    Mutant(
        "numbers-not-checked",
        "The shell calculates with whole numbers alone, and runs nothing that a setting holds.",
        "tools/loop.sh",
        "local value=${!1}",
        "return 0; local value=${!1}",
        (LOOP + "test_only_whole_numbers_reach_the_shells_arithmetic",),
    ),
    Mutant(
        "star-is-a-pattern",
        "A * among the arguments of a stage stays as it is.",
        "tools/loop.sh",
        "\nset -f\n",
        "\n",
        (LOOP + "test_a_star_among_arguments_is_no_pattern_of_files",),
    ),
    Mutant(
        "relative-to-the-script",
        "A relative path means the folder in which the loop is called.",
        "iterate.sh",
        'from_folder "$caller" MODEL PROMPTS HELDOUT RUN',
        'from_folder "$caller" MODEL',
        (LOOP + "test_relative_paths_mean_the_folder_of_the_caller",),
    ),
    # ---- prompts -------------------------------------------------------------------------------
    Mutant(
        "heldout-id-not-checked",
        "No held-out prompt is trained on, by id.",
        "tools/take_prompts.py",
        "if id in place_of_id:",
        "if False:",
        (HELDOUT,),
    ),
    Mutant(
        "heldout-content-not-checked",
        "No held-out prompt is trained on, by content.",
        "tools/take_prompts.py",
        "if content in place_of_content:",
        "if False:",
        (HELDOUT,),
    ),
    Mutant(
        "duplicates-on-both-sides",
        "The training prompts and the held-out ones share no content.",
        "tools/prepare_prompts.py",
        "if content in first:",
        "if False:",
        ("tests/test_prompts.py::test_split_is_disjoint_and_balanced",),
    ),
    Mutant(
        "same-prompts-every-iteration",
        "No prompt comes twice before every one came once.",
        "tools/take_prompts.py",
        "first, last = (iteration - 1) * n, iteration * n",
        "first, last = 0, n",
        ("tests/test_prompts.py::test_take_is_a_row_of_passes",),
    ),
    Mutant(
        "prompts-not-by-seed",
        "SEED decides which prompts an iteration gets.",
        "tools/take_prompts.py",
        'seed_of("take_prompts", seed, number)',
        'seed_of("take_prompts", number)',
        ("tests/test_prompts.py::test_seed_decides_the_slice",),
    ),
    # ---- generate ------------------------------------------------------------------------------
    Mutant(
        "seed-without-iteration",
        "A prompt that comes again gets other random numbers.",
        "generate.py",
        'seed_of(self.args.seed, self.args.iteration, row["id"])',
        'seed_of(self.args.seed, row["id"])',
        ("tests/test_generate.py::test_seeds",),
    ),
    Mutant(
        "temperature-ignored",
        "Answers are sampled at the temperature that was asked for.",
        "generate.py",
        "scores = logits.float() / self.temperatures[rows]",
        "scores = logits.float()",
        ("tests/test_generate.py::test_temperatures_share_the_samples_and_zero_is_greedy",),
    ),
    Mutant(
        "prompts-too-long-not-counted",
        "Rows in are rows out and dropped, each with a reason.",
        "generate.py",
        'dropped = {"prompt_too_long": too_long}',
        "dropped = {}",
        ("tests/test_generate.py::test_long_prompts_are_dropped_and_counted",),
    ),
    Mutant(
        "logprobs-of-the-next-token",
        "An answer's stored log-prob is that of its own tokens.",
        "generate.py",
        "torch.cat([last, hidden[:, :-1]], 1)",
        "hidden",
        ("tests/test_generate.py::test_answers_hold_what_the_policy_wrote",),
    ),
    Mutant(
        "stop-id-not-in-the-answer",
        "A stop id ends the answer and belongs to it.",
        "generate.py",
        "is_stop.cumsum(1) - is_stop.long()",
        "is_stop.cumsum(1)",
        ("tests/test_generate.py::test_answers_hold_what_the_policy_wrote",),
    ),
    Mutant(
        "stop-id-not-trained",
        "Training teaches where an answer ends.",
        "chat.py",
        "return ids[: position + 1]",
        "return ids[:position]",
        ("tests/test_chat.py::test_pitfalls_51_an_answer_ends_at_its_first_stop_id",),
    ),
    Mutant(
        "doubled-bos-accepted",
        "A prompt begins with one BOS.",
        "chat.py",
        "if doubled or missing:",
        "if missing:",
        ("tests/test_chat.py::test_pitfalls_1_a_doubled_bos_is_refused_or_another_models",),
    ),
    Mutant(
        "merged-boundary-accepted",
        "Text whose prompt is no prefix in tokens is not trained on.",
        "chat.py",
        "if ids[: len(prompt_ids)] != prompt_ids:",
        "if False:",
        (
            TRAINER
            + "test_pitfalls_3_pairs_without_ids_are_rendered_and_a_merged_boundary_is_dropped",
        ),
    ),
    # ---- rewards -------------------------------------------------------------------------------
    Mutant(
        "reward-weights-ignored",
        "The reward is the weighted sum of all rewards.",
        "score.py",
        'sum(weight * candidate["rewards"][name]',
        'sum(candidate["rewards"][name]',
        ("tests/test_score.py::test_weights_penalty_and_everything_else_untouched",),
    ),
    Mutant(
        "cut-off-answers-pay-nothing",
        "--missing_eos_penalty is taken from answers that were cut off.",
        "score.py",
        "return total - args.missing_eos_penalty * cut_off",
        "return total",
        ("tests/test_score.py::test_weights_penalty_and_everything_else_untouched",),
    ),
    Mutant(
        "group-of-some-answers",
        "A reward function of responses sees all answers of the prompt.",
        "score.py",
        "texts = [answer.text for answer in group]",
        "texts = [answer.text for answer in {a.text: a for a in group}.values()]",
        ("tests/test_score.py::test_a_function_of_responses_sees_all_answers_of_a_prompt_at_once",),
    ),
    Mutant(
        "reward-of-the-first-token",
        "A packed reward is the model's own, read at the last token.",
        "score.py",
        "for place in reversed(range(len(ids))):",
        "for place in range(len(ids)):",
        (COMPUTED_ONCE,),
    ),
    Mutant(
        "packing-not-checked",
        "A model for which packing is wrong is scored one by one.",
        "score.py",
        "errs = abs(alone - packed) > absolute + relative * abs(alone)",
        "errs = False",
        ("tests/test_score.py::test_a_model_for_which_packing_is_wrong_is_scored_one_by_one",),
    ),
    Mutant(
        "answers-of-the-second-policy-lost",
        "Rows of several files are joined, with the answers of all of them.",
        "candidates.py",
        'merged["candidates"] + row["candidates"]',
        'merged["candidates"]',
        ("tests/test_score.py::test_files_are_merged_by_id",),
    ),
    Mutant(
        "judge-weight-ignored",
        "--judge_weight is the judge's share of the reward.",
        "judge.py",
        "args.judge_weight * rate",
        "rate",
        ("tests/test_judge.py::test_the_weight_counts_without_other_rewards_too",),
    ),
    Mutant(
        "judge-sees-one-order",
        "The judge sees two answers in both orders.",
        "judge.py",
        "answers[j], answers[i])",
        "answers[i], answers[j])",
        ("tests/test_judge.py::test_win_rates_over_all_pairs_in_both_orders",),
    ),
    Mutant(
        "position-bias-counts-as-decided",
        "A place that wins in both orders is reported, and is no verdict.",
        "judge.py",
        "outcomes[outcome(first, second)] += 1",
        'outcomes["out"] += 1',
        ("tests/test_judge.py::test_a_judge_that_prefers_a_place_decides_nothing_and_is_reported",),
    ),
    Mutant(
        "heldout-answers-judged-among-themselves",
        "A judge compares held-out answers with a fixed opponent's.",
        "tools/loop.sh",
        'local opponent=(--opponent "${OPPONENT:-$RUN/iter_00/eval/candidates.jsonl}")',
        "local opponent=()",
        (
            LOOP
            + "test_a_judge_compares_heldout_answers_with_one_opponent_in_every_iteration[a file]",
        ),
    ),
    Mutant(
        "opponent-is-the-policy-itself",
        "The opponent is the initial policy, in every iteration.",
        "tools/loop.sh",
        "$RUN/iter_00/eval/candidates.jsonl",
        "$folder/eval/candidates.jsonl",
        (LOOP + "test_a_judge_compares_heldout_answers_with_one_opponent_in_every_iteration[]",),
    ),
    Mutant(
        "opponent-always-shown-second",
        "A judge that prefers a place moves no win rate over an opponent.",
        "judge.py",
        "points[i].append((first + 1 - second) / 2)",
        "points[i].append(first)",
        ("tests/test_judge.py::test_pitfalls_43_a_heldout_curve_under_a_judge_can_move[0-1]",),
    ),
    Mutant(
        "opponents-first-answer-alone",
        "Our k-th answer meets the opponent's k-th.",
        "judge.py",
        "theirs[ours.index % len(theirs)]",
        "theirs[0]",
        ("tests/test_judge.py::test_each_answer_meets_the_one_in_its_place_in_both_orders",),
    ),
    Mutant(
        "evaluation-samples-as-training",
        "However training samples, held-out answers are drawn from the policy itself.",
        "tools/loop.sh",
        "$GENERATE_ARGS $PLAIN_SAMPLING $EVAL_ARGS",
        "$PLAIN_SAMPLING $GENERATE_ARGS $EVAL_ARGS",
        (LOOP + "test_training_may_sample_otherwise_and_evaluation_does_not",),
    ),
    # ---- pairs ---------------------------------------------------------------------------------
    Mutant(
        "a-penalty-that-decides-nothing",
        "A recorded --missing_eos_penalty that no pair can show stops make_pairs.py.",
        "make_pairs.py",
        "if any(penalties) and not args.keep_truncated:",
        "if False:",
        (PAIRS + "test_a_penalty_on_answers_that_take_part_in_no_pair_stops",),
    ),
    Mutant(
        "a-penalty-behind-the-judge",
        "The penalty is found where judge.py stands between score.py and make_pairs.py.",
        "make_pairs.py",
        'recorded.get("candidates", [])',
        "[]",
        (PAIRS + "test_a_penalty_is_found_behind_the_judge",),
    ),
    Mutant(
        "lost-prompts-unsaid",
        "Prompts lost to identical answers count towards the warning.",
        "make_pairs.py",
        "share = (tied + identical) / rows.total",
        "share = tied / rows.total",
        (PAIRS + "test_many_prompts_lost_to_answers_that_are_alike_are_said",),
    ),
    Mutant(
        "ties-broken-by-index",
        "Equal scores stand in random order, and no source of answers comes first.",
        "make_pairs.py",
        "rng.shuffle(best_first)",
        "pass",
        (PAIRS + "test_pitfalls_41_ties_are_broken_by_seed_and_id_and_by_nothing_else[max_min]",),
    ),
    Mutant(
        "pair-turned-around",
        "The chosen answer is the better one.",
        "make_pairs.py",
        "chosen, rejected = answers[winner], answers[loser]",
        "chosen, rejected = answers[loser], answers[winner]",
        (PAIRS + "test_a_pair_holds_all_that_the_trainer_and_trl_need",),
    ),
    Mutant(
        "length-penalty-is-a-bonus",
        "--length_penalty is taken from the reward of each token.",
        "make_pairs.py",
        'candidate["reward"] - args.length_penalty * ',
        'candidate["reward"] + args.length_penalty * ',
        (PAIRS + "test_pitfalls_10_the_length_penalty_decides_and_is_not_undone",),
    ),
    Mutant(
        "ties-make-pairs",
        "Two answers with the same score make no pair.",
        "make_pairs.py",
        "if chosen.score == rejected.score:",
        "if False:",
        (PAIRS + "test_pitfalls_9_ties_and_identical_answers_make_no_pair_and_are_counted",),
    ),
    Mutant(
        "margin-ignored",
        "--min_margin refuses pairs whose scores are closer.",
        "make_pairs.py",
        "if margin < min_margin and not",
        "if False and not",
        (PAIRS + "test_pitfalls_9_ties_and_identical_answers_make_no_pair_and_are_counted",),
    ),
    Mutant(
        "refused-pairs-not-counted",
        "What makes no pair is counted under a name.",
        "make_pairs.py",
        "pairs.dropped.update(refused)",
        "pass",
        (PAIRS + "test_pitfalls_9_ties_and_identical_answers_make_no_pair_and_are_counted",),
    ),
    # ---- the loss ------------------------------------------------------------------------------
    Mutant(
        "loss-sign",
        "The loss falls as the chosen answer becomes more likely.",
        "dpo_train.py",
        "return -(1 - e) * F.logsigmoid(z)",
        "return (1 - e) * F.logsigmoid(z)",
        (EQUATIONS,),
    ),
    Mutant(
        "chosen-and-rejected-swapped",
        "d is the log-ratio of the chosen answer minus that of the rejected one.",
        "dpo_train.py",
        "d = chosen_logratios - rejected_logratios",
        "d = rejected_logratios - chosen_logratios",
        (EQUATIONS,),
    ),
    Mutant(
        "label-smoothing-ignored",
        "--label_smoothing is in the loss.",
        "dpo_train.py",
        "args.label_smoothing or 0.0,",
        "0.0,",
        (EQUATIONS,),
    ),
    Mutant(
        "length-margin-sign",
        "--length_coef discounts length: a longer chosen answer needs less preference.",
        "dpo_train.py",
        "(lengths[:, 0] - lengths[:, 1])",
        "(lengths[:, 1] - lengths[:, 0])",
        (EQUATIONS,),
    ),
    Mutant(
        "ipo-with-sums",
        "IPO compares means per token.",
        "dpo_train.py",
        "policy = policy / lengths",
        "policy = policy",
        (EQUATIONS,),
    ),
    Mutant(
        "beta-of-the-first-epoch-only",
        "Each epoch has its own --beta.",
        "dpo_train.py",
        "beta=args.beta[index // data.steps_per_epoch]",
        "beta=args.beta[0]",
        (
            TRAINER + "test_every_loss_trains_and_passes_its_own_step_0_check"
            "[--beta 0.1 0.5 --num_train_epochs 2]",
        ),
    ),
    # ---- the trainer ---------------------------------------------------------------------------
    Mutant(
        "frozen-weights-end-the-export",
        "A model whose own code freezes weights is saved with them as they were.",
        "training/fsdp.py",
        "result.load_state_dict(result.state_dict() | weights)",
        "result.load_state_dict(weights)",
        (
            "tests/test_which_models.py::"
            "test_weights_that_the_models_own_code_freezes_are_exported_as_they_were",
        ),
    ),
    Mutant(
        "a-rank-stops-alone",
        "A signal during a step ends training behind that step.",
        "dpo_train.py",
        "float(settings.signals.received)",
        "0.0",
        (RESUMED,),
    ),
    Mutant(
        "a-thought-is-a-verdict",
        "A judge's reply that was cut off is no verdict, whatever it quotes.",
        "judge.py",
        "return text + CUT_OFF if was_cut_off else text",
        "return text",
        (
            "tests/test_judge.py::test_a_reply_without_a_verdict_is_unreadable_and_not_paid_for_again",
        ),
    ),
    Mutant(
        "a-server-that-is-down-loses-answers",
        "A judge that is down stops the stage, and its answers are not dropped.",
        "judge.py",
        'return getattr(error, "status_code", None) in (401, 404, 429)',
        'return getattr(error, "status_code", None) in (401, 404)',
        ("tests/test_judge.py::test_a_server_that_is_down_stops_the_judge_and_loses_nothing",),
    ),
    Mutant(
        "a-file-twice",
        "A file that is given twice does not count twice.",
        "candidates.py",
        "        if real in seen:",
        "        if False:",
        ("tests/test_score.py::test_a_file_that_is_given_twice_is_refused",),
    ),
    Mutant(
        "learning-rate-default",
        "Without --learning_rate it is 5e-7.",
        "training/flags.py",
        "default=5e-7",
        "default=5e-6",
        (NO_FLAGS,),
    ),
    Mutant(
        "batch-size-default",
        "Without --batch_size a step has 128 pairs.",
        "training/flags.py",
        "default=128",
        "default=64",
        (NO_FLAGS,),
    ),
    Mutant(
        "no-clipping",
        "The gradient is clipped to --max_grad_norm.",
        "dpo_train.py",
        "args.max_grad_norm or math.inf",
        "math.inf",
        (PLAIN_LOOP,),
    ),
    Mutant(
        "gradients-of-all-steps",
        "A step's update is by its own gradient.",
        "dpo_train.py",
        "optimizer.zero_grad()",
        "pass",
        (PLAIN_LOOP,),
    ),
    Mutant(
        "weight-decay-ignored",
        "--weight_decay reaches the optimizer.",
        "dpo_train.py",
        "weight_decay=args.weight_decay",
        "weight_decay=0.0",
        (PLAIN_LOOP,),
    ),
    Mutant(
        "adam-betas-ignored",
        "--adam_betas reach the optimizer.",
        "dpo_train.py",
        "betas=tuple(args.adam_betas)",
        "betas=(0.9, 0.95)",
        (PLAIN_LOOP,),
    ),
    Mutant(
        "mean-over-microbatches",
        "The loss is the mean over all pairs of the step, however they are cut.",
        "dpo_train.py",
        "(total_loss * world / settings.pair_count).backward()",
        '(total_loss * world / len(batch["rows"])).backward()',
        (TRAINER + "test_pitfalls_22_one_batch_accumulated_batches_and_packings_agree",),
    ),
    Mutant(
        "warm-up-from-zero",
        "The warm-up wastes no step at a learning rate of zero.",
        "dpo_train.py",
        "(step + 1) / warmup",
        "step / warmup",
        (TRAINER + "test_the_schedule",),
    ),
    Mutant(
        "pairs-in-the-order-of-the-file",
        "The pairs are shuffled, by seed and epoch.",
        "training/plans.py",
        "random.Random(seed).shuffle(order)",
        "pass",
        (TRAINER + "test_the_order_of_the_pairs_is_another_in_each_epoch_and_for_each_seed",),
    ),
    Mutant(
        "same-order-every-epoch",
        "Each epoch has an order of its own.",
        "training/plans.py",
        'seed_of("dpo_train", args.seed, epoch)',
        'seed_of("dpo_train", args.seed)',
        (TRAINER + "test_the_order_of_the_pairs_is_another_in_each_epoch_and_for_each_seed",),
    ),
    Mutant(
        "budget-of-tokens-ignored",
        "A forward pass has at most --tokens_per_batch tokens.",
        "training/plans.py",
        "microbatches(costs, args.tokens_per_batch,",
        "microbatches(costs, 10**9,",
        (TRAINER + "test_a_plan_keeps_to_the_batch_size_and_to_the_tokens_of_a_forward_pass",),
    ),
    Mutant(
        "max-length-ignored",
        "Pairs longer than --max_length are dropped, and counted.",
        "training/pairs.py",
        "args.max_length or positions(config)",
        "positions(config)",
        (TRAINER + "test_pitfalls_21_pairs_without_room_or_tokens_are_dropped_and_counted",),
    ),
    Mutant(
        "ref-model-not-loaded",
        "The reference is --ref_model's log-probs where it is given.",
        "dpo_train.py",
        "reference = load_policy(args.ref_model,",
        "reference = load_policy(args.model,",
        (TRAINER + "test_another_reference_is_loaded_used_and_gone",),
    ),
    Mutant(
        "one-token-late-in-a-packed-row",
        "The prompt's last token predicts the answer's first one, in packed rows.",
        "training/batches.py",
        "end_of_prompt = start + p - 1",
        "end_of_prompt = start + p",
        (HAND_WRITTEN,),
    ),
    Mutant(
        "one-token-late-in-a-padded-row",
        "The prompt's last token predicts the answer's first one, in padded rows.",
        "training/batches.py",
        "np.arange(ends_of_prompts[row], length - 1)",
        "np.arange(ends_of_prompts[row] + 1, length)",
        (TRAINER + "test_pitfalls_22_one_batch_accumulated_batches_and_packings_agree",),
    ),
    Mutant(
        "stand-ins-count",
        "A rank without a pair takes part in the collectives, and in nothing else.",
        "training/batches.py",
        "weight = 1.0 if group else 0.0",
        "weight = 1.0",
        ("tests/test_fsdp.py::test_microbatches_arrive_in_order_and_one_at_a_time",),
    ),
    Mutant(
        "audit-never-stops",
        "The audit stops where generator and trainer disagree.",
        "training/checks.py",
        "if not mean <= tolerance:",
        "if False:",
        (ROUNDING,),
    ),
    Mutant(
        "audit-tolerance-ignored",
        "--max_logprob_gap is the audit's tolerance.",
        "training/checks.py",
        "if tolerance is None:",
        "if True:",
        (ROUNDING,),
    ),
    Mutant(
        "stale-weights-pass",
        "The audit compares whole answers, and weights of another policy stand out.",
        "training/checks.py",
        "len(pair[answer]) ** 0.5",
        "len(pair[answer]) ** 2",
        (ROUNDING,),
    ),
    Mutant(
        "answers-of-others-audited",
        "The audit is of the answers that this very policy wrote.",
        "training/checks.py",
        'pair["models"][k] != model_hash or theirs is None',
        "theirs is None",
        (TRAINER + "test_history_is_trained_on_and_not_audited",),
    ),
    Mutant(
        "first-loss-not-checked",
        "A first loss other than that of equal log-probs stops the run.",
        "training/checks.py",
        "if not abs(loss - expected) <= tolerance",
        "if False and not abs(loss - expected) <= tolerance",
        (
            TRAINER
            + "test_pitfalls_18_a_policy_that_is_not_its_reference_is_stopped_at_the_first_loss",
        ),
    ),
    Mutant(
        "not-compared-with-transformers",
        "A model whose head or attention we get wrong is refused.",
        "training/checks.py",
        "gap = gap_per_token(logprobs, own_logprobs(model, pair), pair)",
        "gap = 0.0",
        (TRAINER + "test_a_head_we_cannot_express_is_refused",),
    ),
    Mutant(
        "randomness-not-looked-for",
        "Two passes of the same pair that differ stop the run.",
        "training/checks.py",
        "gap = gap_per_token(first, second, pair)",
        "gap = 0.0",
        (TRAINER + "test_pitfalls_44_what_is_left_on_is_named",),
    ),
    Mutant(
        "trained-in-training-mode",
        "Policy and reference are the same function: nothing random is left on.",
        "training/network.py",
        "model.train(model._is_stateful)",
        "model.train()",
        (RANDOM + "[phimoe-False]",),
    ),
    Mutant(
        "dropout-left-on",
        "Dropout is zero in layers that are recomputed, too.",
        "training/network.py",
        "setattr(owner, name, 0.0)",
        "pass",
        (RANDOM + "[opt-True]",),
    ),
    Mutant(
        "weights-in-bf16",
        "The weights that are trained are fp32, whatever the model came in.",
        "dpo_train.py",
        "trained_dtype = dtype or torch.float32",
        "trained_dtype = dtype or torch.bfloat16",
        (TRAINER + "test_pitfalls_23_weights_are_fp32_masters_and_all_of_them_move",),
    ),
    Mutant(
        "checkpoint-not-resumed",
        "An interrupted training goes on after its checkpoint.",
        "dpo_train.py",
        "steps_done = load_checkpoint(stage.parts, policy, optimizer, steps)",
        "steps_done = 0",
        (RESUMED,),
    ),
    Mutant(
        "adam-states-lost",
        "A resumed training has the optimizer's states.",
        "dpo_train.py",
        "steps_done = load_checkpoint(stage.parts, policy, optimizer, steps)",
        "steps_done = load_checkpoint(stage.parts, policy, optimizer, steps)\n"
        "    optimizer = make_optimizer(policy, args, device)",
        (RESUMED,),
    ),
    Mutant(
        "save-every-ignored",
        "--save_every bounds what a kill costs.",
        "dpo_train.py",
        "return done % save_every == 0 or done == steps",
        "return done == steps",
        (TRAINER + "test_save_every_bounds_what_a_kill_costs",),
    ),
    Mutant(
        "old-weights-exported",
        "What is saved is what was trained.",
        "training/fsdp.py",
        "result.load_state_dict(result.state_dict() | weights)",
        "pass",
        (
            TRAINER + "test_pitfalls_27_every_architecture_trains_and_is_exported_as_it_was_trained"
            "[True-llama]",
        ),
    ),
    Mutant(
        "saved-in-another-dtype",
        "The policy is saved in the dtype that the model came in.",
        "dpo_train.py",
        "save_dtype = DTYPES.get(args.save_dtype)",
        "save_dtype = DTYPES.get(args.save_dtype, torch.float32)",
        (TRAINER + "test_a_policy_is_saved_in_the_dtype_that_the_model_came_in",),
    ),
    Mutant(
        "nothing-for-wandb",
        "--report_to wandb and trackio show every row of the log.",
        "training/tracker.py",
        'self.run.log({**row, "global_step": step})',
        "pass",
        ("tests/test_training_log.py::test_a_tracker_is_sent_every_row_of_the_log[wandb]",),
    ),
    Mutant(
        "nothing-for-tensorboard",
        "--report_to tensorboard shows every number of the log.",
        "training/tracker.py",
        "self.writer.add_scalar(name, value, step)",
        "pass",
        ("tests/test_training_log.py::test_tensorboard_is_sent_every_number_and_at_once",),
    ),
    Mutant(
        "undone-steps-stay-in-the-log",
        "A step that a kill has undone stands in the log once.",
        "training/log.py",
        "if found == steps:",
        "if found == steps + 1:",
        ("tests/test_training_log.py::test_rows_after_the_checkpoint_are_cut_off",),
    ),
    Mutant(
        "a-row-sent-before-is-sent-again",
        "No point stands twice in a tracker.",
        "training/tracker.py",
        'if place <= self.state["sent"]:',
        "if False:",
        ("tests/test_tracker.py::test_the_place_is_written_down_before_the_row_is_sent",),
    ),
    Mutant(
        "each-iteration-from-step-0",
        "The iterations of a loop stand on one axis of steps.",
        "training/tracker.py",
        'step = self.steps_before + row["step"]',
        'step = row["step"]',
        ("tests/test_training_log.py::test_tensorboard_is_sent_every_number_and_at_once",),
    ),
    Mutant(
        "another-wandb-run-per-process",
        "A loop is one run in a tracker.",
        "training/tracker.py",
        "resumed = self.path.exists() and not anew",
        "resumed = False",
        ("tests/test_tracker.py::test_the_place_is_written_down_before_the_row_is_sent",),
    ),
    # ---- held-out pairs ------------------------------------------------------------------------
    Mutant(
        "beta-of-the-first-iteration-only",
        "--beta lists the epochs of all iterations.",
        "training/flags.py",
        "first = (args.iteration - 1) * args.num_train_epochs",
        "first = 0",
        (TRAINER + "test_beta_is_a_list_over_the_epochs_of_all_iterations",),
    ),
    Mutant(
        "held-out-pairs-are-trained-on",
        "A held-out pair is evaluated, and never trained on.",
        "dpo_train.py",
        "plans = plan_all_steps(pairs[:trained], args)",
        "plans = plan_all_steps(pairs, args)",
        (HELD_OUT + "test_an_evaluation_changes_no_weight_and_stands_behind_its_step",),
    ),
    Mutant(
        "a-trained-pair-is-evaluated",
        "A pair that is also trained on is refused.",
        "training/pairs.py",
        "if identity(pair) in trained_at:",
        "if False:",
        (HELD_OUT + "test_a_pair_that_is_also_trained_on_is_refused_with_its_place",),
    ),
    Mutant(
        "an-evaluation-counts-as-a-step",
        "A resumed run's log is that of an uninterrupted one, evaluations included.",
        "training/log.py",
        "found += not is_evaluation(row)",
        "found += 1",
        (HELD_OUT + "test_resumed_equals_uninterrupted_bit_for_bit",),
    ),
    Mutant(
        "the-pairs-of-a-prompt-on-both-sides",
        "All pairs of a prompt are on one side.",
        "make_pairs.py",
        "(held if held_out else out).write(dump(pair))",
        "(held if held_out and pair is made[0] else out).write(dump(pair))",
        (HELD_OUT + "test_all_pairs_of_a_prompt_are_on_one_side_and_all_are_counted",),
    ),
    # ---- the kernels ---------------------------------------------------------------------------
    Mutant(
        "soft-cap-not-read",
        "A head's soft-cap is in its log-probs.",
        "kernels/heads.py",
        '"softcap": caps[0] if caps else None',
        '"softcap": None',
        (KERNEL + "test_lm_head_gives_the_models_own_log_probs[gemma2]",),
    ),
    Mutant(
        "soft-cap-not-applied",
        "The kernel caps the logits.",
        "kernels/logprob.py",
        "z.div_(cap).tanh_()",
        "z.div_(cap)",
        (KERNEL + "test_equals_fp64[torch.float64-False-softcap]",),
    ),
    Mutant(
        "scale-not-in-the-gradient",
        "The gradient has the head's scale.",
        "kernels/logprob.py",
        "r = plan.scale / total",
        "r = 1 / total",
        (KERNEL + "test_equals_fp64[torch.float64-False-scale]",),
    ),
    Mutant(
        "rejected-sees-chosen",
        "The rejected answer does not see the chosen one.",
        "kernels/attention.py",
        "torch.arange(start, end).split([p, *answers])",
        "torch.arange(start, end).split([p, sum(answers)])",
        ("tests/test_attention.py::test_only_what_may_look_at_a_token_depends_on_it[chosen]",),
    ),
    # ---- every stage ---------------------------------------------------------------------------
    Mutant(
        "open-balances-accepted",
        "A balance that does not close stops the stage.",
        "stage.py",
        "if rows_in != rows_out + sum(dropped.values()):",
        "if False:",
        ("tests/test_records.py::test_pitfalls_12_a_balance_that_does_not_close_fails",),
    ),
    Mutant(
        "damaged-output-is-done",
        "A finished output that was damaged since is not used.",
        "stage.py",
        "if written and hash_path(output) != written:",
        "if False:",
        ("tests/test_records.py::test_an_output_that_was_damaged_since_is_not_taken_for_done",),
    ),
    Mutant(
        "an-exit-code-of-torchruns",
        "A stage that was interrupted ends with 75 on several ranks, too.",
        "tools/torchrun.py",
        "sys.exit(first.exitcode)",
        "sys.exit(1)",
        ("tests/test_torchrun.py::test_the_exit_code_is_that_of_the_rank",),
    ),
    Mutant(
        "a-lost-rank-is-a-traceback",
        "A rank that was left by another one adds nothing to its message.",
        "stage.py",
        "LOST_RANK.search(str(cause))",
        "False",
        ("tests/test_torchrun.py::test_the_message_of_a_rank_is_all_that_is_said",),
    ),
    Mutant(
        "a-full-disk-without-a-name",
        "Of a full disk the file is named that did not fit.",
        "records.py",
        'error.add_note(f"{WRITING}{path}")',
        "pass",
        ("tests/test_records.py::test_a_full_disk_is_said_and_nothing_is_lost",),
    ),
    Mutant(
        "a-damaged-log-is-resumed",
        "The rows of a training log that was damaged are not taken over.",
        "training/log.py",
        'if f"{hash.hexdigest()}\\n".encode() != expected:',
        "if False:",
        (
            "tests/test_hostile.py::"
            "test_a_damaged_log_is_not_resumed_and_the_remedy_works[train.jsonl-a digit]",
        ),
    ),
    Mutant(
        "other-settings-mixed-in",
        "A part that was made with other settings is not used.",
        "stage.py",
        "if was == now:",
        "if True:",
        (
            "tests/test_records.py::"
            "test_pitfalls_13_an_unfinished_run_with_other_arguments_is_not_mixed_in",
        ),
    ),
    Mutant(
        "a-rank-outlives-its-torchrun",
        "A rank whose torchrun was killed before it began does nothing.",
        "stage.py",
        "if is_orphan():",
        "if False:",
        (LOOP + "test_a_rank_that_torchrun_has_left_alone_before_it_began_does_nothing",),
    ),
    Mutant(
        "kl-with-the-other-sign",
        "The distance is log pi - log ref of the policy's own answers.",
        "tools/report_run.py",
        'candidate["logprob"] - ref_logprob',
        'ref_logprob - candidate["logprob"]',
        ("tests/test_report.py::test_figures_equal_those_on_paper",),
    ),
    Mutant(
        "win-rate-of-win-rates",
        "A judge's win rate is not compared with another one as if it were a reward.",
        "tools/report_figures.py",
        "has_win=x not in win_rates",
        "has_win=True",
        ("tests/test_report.py::test_a_judges_figure_is_a_win_rate_and_there_is_none_of_it",),
    ),
    Mutant(
        "score-without-the-penalty",
        "The score is the reward less the length penalty, which decided the pairs.",
        "tools/report_run.py",
        "rewards.length_penalty * length",
        "rewards.length_penalty",
        ("tests/test_report.py::test_a_length_penalty_is_in_the_score_that_decided_the_pairs",),
    ),
    Mutant(
        "a-table-wider-than-a-telephone",
        "A table that is too wide scrolls by itself, also by the keyboard.",
        "tools/report_page.py",
        '<div class="scroll" tabindex="0">',
        "<div>",
        ("tests/test_report.py::test_the_page_fits_a_telephone",),
    ),
    # ---- LoRA ----------------------------------------------------------------------------------
    Mutant(
        "lora-without-its-scale",
        "The product of the factors is multiplied by alpha / rank.",
        "training/lora.py",
        "F.linear(x, self.lora_A) * self.scale",
        "F.linear(x, self.lora_A)",
        (LORA + "test_what_is_saved_is_what_was_trained_and_peft_loads_the_factors[llama]",),
    ),
    Mutant(
        "lora-begins-elsewhere",
        "B is zero, so the policy begins as its reference.",
        "training/lora.py",
        "torch.zeros(layer.lora_B.shape)",
        "torch.ones(layer.lora_B.shape)",
        (LORA + "test_the_first_factors_are_drawn_as_pefts",),
    ),
    Mutant(
        "lora-merged-in-bf16",
        "The sum of weight and update is formed in fp32, and rounded once.",
        "training/lora.py",
        "exact = before.float() + update",
        "exact = (before + update.to(before.dtype)).float()",
        (LORA + "test_the_sum_is_formed_in_fp32_and_its_rounding_is_reported",),
    ),
    Mutant(
        "lora-saves-frozen-weights",
        "A checkpoint of LoRA holds the factors and their Adam states alone.",
        "training/checkpoints.py",
        "if not parameter.requires_grad:",
        "if False:",
        (LORA + "test_an_interrupted_training_goes_on_from_its_factors",),
    ),
]


# ---- the source, with one mistake --------------------------------------------------------------


class ListError(Exception):
    """The list does not fit the source."""


def mutated(mutant: Mutant, root: Path) -> str:
    """The text of the mutant's file, with the mistake in it."""
    source = (root / mutant.file).read_text(encoding="utf-8")
    count = source.count(mutant.old)
    if count != 1:
        raise ListError(f"{mutant.file} has the old text {count} times, not once: {mutant.old!r}")
    return source.replace(mutant.old, mutant.new)


def copy_tracked_files(target: Path) -> None:
    """What git knows, as it is in the working tree."""
    if target.resolve().is_relative_to(ROOT):
        raise ListError(f"{target} is in the repository: set TMPDIR to another folder")
    command = ["git", "ls-files", "-z"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    for name in listing.stdout.split("\0"):
        source = ROOT / name
        if not source.is_file():
            continue
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
        copy.chmod(source.stat().st_mode)


# ---- its tests ---------------------------------------------------------------------------------


def run_tests(tests: list[str], root: Path) -> tuple[int | None, str]:
    """pytest's exit code, None where it did not end in time; and what it printed."""
    # no bytecode: it is looked up by time and size, which two mutants of a file may share
    changes = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    process = subprocess.Popen(
        command,
        cwd=root,
        env=os.environ | changes,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=SECONDS)
        return process.returncode, printed
    except subprocess.TimeoutExpired:
        return None, f"not done after {SECONDS} s"
    finally:
        end_group(process)


def end_group(process: subprocess.Popen) -> None:
    """A test that was stopped may leave processes."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def verdict(mutant: Mutant, root: Path) -> tuple[str, str]:
    """("killed", ""), ("survived", "") or ("error", why). The source is whole again afterwards."""
    file = root / mutant.file
    source = file.read_bytes()
    try:
        file.write_text(mutated(mutant, root), encoding="utf-8")
        code, printed = run_tests(list(mutant.tests), root)
    except ListError as e:
        return "error", str(e)
    finally:
        file.write_bytes(source)
    if code == FAILED:
        return "killed", ""
    if code == PASSED:
        return "survived", ""
    return "error", f"pytest's exit code is {code}:\n{printed[-3000:]}"


def check_without_mutants(mutants: list[Mutant], root: Path) -> None:
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    print(f"{len(tests)} tests without a mutant …", flush=True)
    code, printed = run_tests(tests, root)
    if code != PASSED or " skipped" in printed:
        raise ListError(f"they must all pass, and none may be skipped:\n{printed[-5000:]}")


# ---- the command -------------------------------------------------------------------------------


def chosen(names: list[str]) -> list[Mutant]:
    by_name = {mutant.name: mutant for mutant in MUTANTS}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ListError(f"no such mutant: {', '.join(unknown)}. --list names them all")
    return [by_name[name] for name in names] or MUTANTS


def run_all(mutants: list[Mutant]) -> dict[str, list[str]]:
    """verdict -> names"""
    found: dict[str, list[str]] = {"killed": [], "survived": [], "error": []}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = Path(folder)
        copy_tracked_files(root)
        check_without_mutants(mutants, root)
        for mutant in mutants:
            began = time.monotonic()
            word, why = verdict(mutant, root)
            seconds = time.monotonic() - began
            print(f"{word:9}{seconds:6.1f} s  {mutant.name}: {mutant.promise}", flush=True)
            if why:
                print(why, flush=True)
            found[word].append(mutant.name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: every mutant")
    parser.add_argument("--list", action="store_true", help="print the list and end")
    args = parser.parse_args()

    try:
        mutants = chosen(args.names)
        if args.list:
            for mutant in mutants:
                print(f"{mutant.name}  ({mutant.file})\n    {mutant.promise}")
            return
        began = time.monotonic()
        found = run_all(mutants)
    except ListError as e:
        sys.exit(f"mutants.py: {e}")

    minutes = (time.monotonic() - began) / 60
    counts = [f"{len(names)} {word}" for word, names in found.items()]
    print(f"{len(mutants)} mutants in {minutes:.1f} minutes: {', '.join(counts)}")
    for word in ("survived", "error"):
        for name in found[word]:
            print(f"  {word}: {name}")
    sys.exit(0 if len(found["killed"]) == len(mutants) else 1)


if __name__ == "__main__":
    main()
