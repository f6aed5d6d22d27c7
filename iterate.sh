#!/usr/bin/env bash
# Online iterative DPO, the whole loop. Without MODEL it builds the offline demo and runs that:
#
#     bash iterate.sh
#
# With settings, which are environment variables, it runs on your models and prompts:
#
#     MODEL=Qwen/Qwen2.5-1.5B-Instruct REWARD_MODEL=Skywork/Skywork-Reward-V2-Qwen3-0.6B \
#     PROMPTS=prompts.jsonl HELDOUT=heldout.jsonl RUN=runs/qwen bash iterate.sh
#
# A model is a folder, or a name on the hub, which may name a branch, a tag or a commit: NAME@REVISION.
#
# Each iteration: the policy answers prompts, a reward scores the answers, best and worst become pairs,
# DPO trains on them, and the new policy is evaluated on held-out prompts. Every command is printed
# before it runs, so any of them can be run by hand. After a stop or a kill at any moment, the same
# command resumes: each stage's output has its final name only when it is whole, and a stage that is
# done says so and ends.
set -euo pipefail
caller=$PWD
here=$(readlink -f "${BASH_SOURCE[0]}")
cd "${here%/*}"
. tools/environment.sh # the python to run, and what is installed
. tools/loop.sh        # the functions that are called below. Of the variables below, score reads
                       # rewards and candidates, evaluate reads watched; begin sets tracker
from_folder "$caller" MODEL PROMPTS HELDOUT RUN REWARD_MODEL REWARD_FN GOLD_FN OPPONENT ENHANCER
[[ -n ${JUDGE_URL:-} ]] || from_folder "$caller" JUDGE # else it is a name at that server
files_from_folder "$caller" EXTRA_PAIRS

# ---- Settings ------------------------------------------------------------------------------------

[[ -n ${MODEL:-} ]] || . demo/settings.sh

# What is trained, and on what
setting MODEL    # the policy to start from
setting PROMPTS  # prompts.jsonl to train on; tools/prepare_prompts.py makes it
setting HELDOUT  # held-out prompts, disjoint from PROMPTS; tools/prepare_prompts.py splits them off
setting RUN      # the folder of the run: runs/NAME
setting SEED 0

# Who rewards: at least one of the first three, or any mixture of them
setting REWARD_MODEL      # a sequence classifier with one label
setting REWARD_FN         # a python function, file.py:name
setting JUDGE             # a language model that compares answers; served here, unless there is a
setting JUDGE_URL         # http://…/v1 of a server that offers JUDGE; its key in OPENAI_API_KEY
setting JUDGE_SERVER_ARGS # more arguments for the server that is started here
setting OPPONENT          # whose answers a judge compares held-out ones with: a file of answers, or
                          # "meta.reference"; default: the initial policy's
setting GOLD_FN           # a function that only watches the held-out answers

# The loop
setting ITERS 3
setting PROMPTS_PER_ITER # default: all of PROMPTS, every iteration
setting NUM_SAMPLES 8    # answers to each prompt
setting EVAL_SAMPLES 4   # answers to each held-out prompt
setting WRITER policy    # who answers the prompts: "policy" (the current one) or "init" (the first:
                         # offline DPO, as a control)
setting REF prev         # the reference: "prev", the policy before this iteration, or "init", the first
setting HISTORY 0        # also train on the pairs of this many earlier iterations
setting EXTRA_PAIRS      # files of other preference pairs, which are trained on as well
setting EXTRA_PAIRS_ITERS first # in the "first" iteration, or in "all"
setting ENHANCER         # "prev", "init" or a model: a second policy that answers the same prompts
setting KEEP all         # "last" removes a policy when nothing needs it any more
setting EVAL_PAIRS_SHARE # e.g. 0.05: hold out the pairs of this share of the prompts, and evaluate
                         # training on them
setting REPORT_TO none   # or tensorboard, wandb, trackio: one run there for the whole loop

# More arguments for a stage; see its --help
setting GENERATE_ARGS
setting EVAL_ARGS # of generate.py on held-out prompts; it samples there at temperature 1 unless told
setting SCORE_ARGS
setting JUDGE_ARGS
setting PAIRS_ARGS
setting TRAIN_ARGS

# Machines. NPROC processes here. For several machines, start this script on each with the same
# settings, its NODE_RANK, a shared RUN folder and
# TORCHRUN_ARGS="--nnodes 4 --rdzv_backend c10d --rdzv_endpoint HOST:29500".
setting NPROC "$(processes_here)"
setting GENERATE_NPROC "$NPROC" # fewer where GENERATE_ARGS has --tensor_parallel_size
setting TORCHRUN_ARGS

# ---- The loop ------------------------------------------------------------------------------------

begin # checks the settings, installs what is missing, and locks the run
rewards=(${REWARD_MODEL:+--reward_model "rm=$REWARD_MODEL"} ${REWARD_FN:+--reward_fn "$REWARD_FN"})
watched=(${GOLD_FN:+--reward_fn "gold=$GOLD_FN" --reward_weights gold=0}) # recorded, decides nothing

# The initial policy on the held-out prompts
policy=$MODEL
previous=$MODEL
evaluate "$RUN/iter_00" "$policy"
report 0

for ((i = 1; i <= ITERS; i++)); do
    now=$(folder_of "$i")
    if is_done_and_gone "$now"; then # KEEP=last has removed what would be needed to look again
        previous=$policy
        policy=$now/policy
        continue
    fi

    # Which prompts: a seeded shuffle, each iteration the next slice.
    once "$now/logs/prompts.log" "$now/prompts.jsonl" \
        tools/take_prompts.py --prompts "$PROMPTS" --heldout "$RUN/heldout.jsonl" \
        --output "$now/prompts.jsonl" --iteration "$i" --seed "$SEED" \
        ${PROMPTS_PER_ITER:+--num_prompts "$PROMPTS_PER_ITER"}

    # The policy writes NUM_SAMPLES answers to each.
    writer=$policy
    [[ $WRITER == policy ]] || writer=$MODEL
    everywhere "$now/logs/generate.log" generate.py --model "$writer" --prompts "$now/prompts.jsonl" \
        --output "$now/candidates.jsonl" --num_samples "$NUM_SAMPLES" --iteration "$i" \
        --seed "$SEED" $GENERATE_ARGS
    candidates=("$now/candidates.jsonl")

    # A second policy widens the choice ("RLHF Workflow", arXiv 2405.07863).
    if [[ -n $ENHANCER ]]; then
        case $ENHANCER in
            init) enhancer=$MODEL ;;
            prev) enhancer=$previous ;;
            *) enhancer=$ENHANCER ;;
        esac
        everywhere "$now/logs/generate.log" generate.py --model "$enhancer" \
            --prompts "$now/prompts.jsonl" --output "$now/enhancer.jsonl" \
            --num_samples "$NUM_SAMPLES" --iteration "$i" --seed "$((SEED + 1))" $GENERATE_ARGS
        candidates+=("$now/enhancer.jsonl")
    fi

    # The reward ranks them.
    score "$now/logs" "$now/scored.jsonl"

    # Best and worst become pairs.
    hold_out=()
    evaluate_on=()
    if [[ -n $EVAL_PAIRS_SHARE ]]; then
        hold_out=(--eval_share "$EVAL_PAIRS_SHARE" --eval_output "$now/eval_pairs.jsonl")
        evaluate_on=(--eval_pairs "$now/eval_pairs.jsonl")
    fi
    once "$now/logs/pairs.log" "$now/pairs.jsonl" \
        make_pairs.py --scored "$now/scored.jsonl" --output "$now/pairs.jsonl" \
        --iteration "$i" --seed "$SEED" "${hold_out[@]}" $PAIRS_ARGS

    # DPO trains on the fresh pairs, on those of HISTORY iterations before, and on EXTRA_PAIRS.
    pairs=("$now/pairs.jsonl")
    for ((j = i - 1; j >= 1 && j >= i - HISTORY; j--)); do
        pairs+=("$(folder_of "$j")/pairs.jsonl")
    done
    if ((i == 1)) || [[ $EXTRA_PAIRS_ITERS == all ]]; then
        pairs+=($EXTRA_PAIRS)
    fi
    reference=()
    [[ $REF == prev ]] || reference=(--ref_model "$MODEL")
    steps=()
    [[ $REPORT_TO == none ]] || steps=(--steps_before "$(steps_before "$i")")
    everywhere "$now/logs/train.log" dpo_train.py --model "$policy" "${reference[@]}" \
        --pairs "${pairs[@]}" "${evaluate_on[@]}" --output "$now/policy" --iteration "$i" \
        --seed "$SEED" "${tracker[@]}" "${steps[@]}" $TRAIN_ARGS

    # The new policy on the held-out prompts, with its distance from the one before and from the first
    evaluate "$now" "$now/policy" --ref_model "init=$MODEL" "prev=$policy"
    report "$i"

    [[ $KEEP == all ]] || discard "$policy"
    previous=$policy
    policy=$now/policy
done

echo
echo "iterate.sh: done. The last policy is $policy; the report is $RUN/report.html"
