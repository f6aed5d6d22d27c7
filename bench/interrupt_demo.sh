#!/usr/bin/env bash
# One iteration of a small demo, told to stop (SIGTERM) in training, and resumed with the same
# command.
#
#     bash bench/interrupt_demo.sh [EPOCHS]
#
# EPOCHS of training, default 4: enough that the signal comes during training.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
demo=$folder/build
export RUN=$folder/run ITERS=1 PROMPTS_PER_ITER=256 EVAL_SAMPLES=1
export MODEL=$demo/policy REWARD_MODEL=$demo/reward_model
export PROMPTS=$demo/prompts.jsonl HELDOUT=$demo/heldout.jsonl
export GOLD_FN=demo/gold.py:gold GENERATE_ARGS="--max_new_tokens 40"
export TRAIN_ARGS="--learning_rate 2e-4 --batch_size 32 --num_train_epochs ${1:-4}"
rows=$RUN/iter_01/policy.parts/train.jsonl

# A policy that was trained briefly: only the machinery is tested here.
"${PYTHON:-python3}" demo/build.py --output "$demo" --policy_steps 150 --comparisons 500

bash iterate.sh &
loop=$!
until [[ -s $rows ]]; do # the first step is done
    kill -0 "$loop" 2>/dev/null || { echo "the loop ended before its training began" >&2; exit 1; }
    sleep 0.02
done
kill -TERM "$loop"
status=0
wait "$loop" || status=$?
((status == 75)) || { echo "stopped, the loop ended with $status and not with 75" >&2; exit 1; }
done_before=$(wc -l <"$rows")

bash iterate.sh
steps=$(wc -l <"$RUN/iter_01/policy.train.jsonl")
grep -q "after step [0-9]" "$RUN/iter_01/logs/train.log"
echo "headline: stopped after step $done_before of $steps and resumed there"
