# Sourced by iterate.sh when no MODEL is set: the demo, a small language game that is built offline
# in a minute (demo/build.py). A setting that is already set stays as it is.

DEMO=demo/build/seed_${SEED:-0}
MODEL=$DEMO/policy
: "${RUN:=runs/demo}"
# A reward of yours takes the place of the demo's.
[[ -n ${REWARD_FN:-}${JUDGE:-} ]] || : "${REWARD_MODEL:=$DEMO/reward_model}"
: "${PROMPTS:=$DEMO/prompts.jsonl}"
: "${HELDOUT:=$DEMO/heldout.jsonl}"
: "${GOLD_FN:=demo/gold.py:gold}" # the true reward of the game; it is only watched
: "${PROMPTS_PER_ITER:=512}"
: "${GENERATE_ARGS:=--max_new_tokens 40}"
# A policy of 0.4M parameters takes a learning rate 400 times that of a 1B model, and smaller batches.
: "${TRAIN_ARGS:=--learning_rate 2e-4 --batch_size 32}"
