#!/usr/bin/env bash
# When does online beat offline? Every combination of a reward, an arm and a seed is one run of
# iterate.sh on the demo's game; tools/compare.py draws the picture. docs/experiments.md has the design.
#
#     bash experiments/online_offline.sh --quick     3 seeds, 2 rewards, 4 arms
#     bash experiments/online_offline.sh             10 seeds, 3 rewards, 5 arms
#     SEEDS="7 8" REWARDS=truth ARMS="online offline" FOLDER=runs/mine bash experiments/online_offline.sh
#
# Give other settings another FOLDER: whatever lies there is compared, and a finished run is not made
# again. Each core works on a run of its own. After a stop, the same command resumes. With
# `python -m bench.warm_python bash experiments/…`, stages need no time to import torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/environment.sh
install requirements.txt

if [[ ${1:-} == --quick ]]; then
    : "${SEEDS:=2 3 4}" "${REWARDS:=truth demo}" "${ARMS:=online offline offline_prev sft}"
elif (($# > 0)); then
    echo "unknown: $*; --quick is the only flag, and everything else is a variable" >&2
    exit 2
fi
# Settings were chosen on seed 0, and 1 is for trying, so the result is from others.
: "${SEEDS:=2 3 4 5 6 7 8 9 10 11}"
: "${REWARDS:=truth strong demo}"
: "${ARMS:=online online_init offline offline_prev sft}"
: "${CORES:=$(env --unset OMP_NUM_THREADS nproc)}" # nproc listens to OMP_NUM_THREADS
: "${ITERS:=6}"
: "${PROMPTS_PER_ITER:=512}"
: "${BATCH_SIZE:=32}"
: "${LEARNING_RATE:=2e-4}" # of all arms but sft
: "${FOLDER:=runs/online_offline}"
export ITERS PROMPTS_PER_ITER BATCH_SIZE LEARNING_RATE FOLDER OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# ---- What is run ---------------------------------------------------------------------------------

# reward NAME SEED: who ranks the answers.
reward() {
    case $1 in
        truth) REWARD_FN=demo/gold.py:gold ;;
        demo) REWARD_MODEL=demo/build/seed_$2/reward_model ;;
        strong) REWARD_MODEL=demo/build/strong_$2/reward_model ;;
        *) echo "REWARDS: there is no $1" >&2 && return 1 ;;
    esac
    [[ $1 == truth ]] || GOLD_FN=demo/gold.py:gold
}

# arm NAME: who writes the answers, what the reference is, what is trained on.
arm() {
    local dpo="--learning_rate $LEARNING_RATE"
    local imitate="--learning_rate 1e-3 --beta 0 --nll_coef 1" # no reference, no rejected answer
    case $1 in
        online) WRITER=policy REF=prev HOW=$dpo ;;
        online_init) WRITER=policy REF=init HOW=$dpo ;;
        offline) WRITER=init REF=init HOW=$dpo ;;
        offline_prev) WRITER=init REF=prev HOW=$dpo ;;
        sft) WRITER=init REF=prev HOW=$imitate ;;         # of the best of the same answers
        online_sft) WRITER=policy REF=prev HOW=$imitate ;; # of the best of its own
        *) echo "ARMS: there is no $1" >&2 && return 1 ;;
    esac
    TRAIN_ARGS="--batch_size $BATCH_SIZE $HOW"
}

# build NAME SEED: the models of a seed: "seed", the demo's, or "strong", whose reward model has read
# more comparisons, of more writers.
build() {
    local more=() log=$FOLDER/build_$1_$2.log
    [[ $1 == seed ]] || more=(--writers varied --comparisons 20000)
    "$PYTHON" demo/build.py --output "demo/build/$1_$2" --seed "$2" "${more[@]}" >>"$log" 2>&1 ||
        { tail -n 3 "$log" >&2 && return 1; }
    echo "models, $1 $2: done"
}

# run_one REWARD ARM SEED
run_one() (
    set -euo pipefail
    export RUN=$FOLDER/$1/$2/seed_$3 SEED=$3
    export MODEL=demo/build/seed_$3/policy
    export PROMPTS=demo/build/seed_$3/prompts.jsonl HELDOUT=demo/build/seed_$3/heldout.jsonl
    export GENERATE_ARGS="--max_new_tokens 40"
    export REWARD_MODEL= REWARD_FN= GOLD_FN= WRITER REF TRAIN_ARGS
    reward "$1" "$3"
    arm "$2"
    # summary.jsonl has a row for every iteration, and one for the initial policy
    if [[ ! -e $RUN/summary.jsonl ]] || (($(wc -l <"$RUN/summary.jsonl") <= ITERS)); then
        mkdir -p "$RUN"
        bash iterate.sh >"$RUN/loop.log" 2>&1 || { tail -n 3 "$RUN/loop.log" >&2 && return 1; }
    fi
    echo "$1 $2 $3: done"
)

# ---- Runs, one per core --------------------------------------------------------------------------

# in_parallel FUNCTION: with the words of each line of standard input. A failure does not stop the others.
in_parallel() {
    export -f reward arm build run_one
    xargs --max-procs "$CORES" --max-lines=1 bash -c "$1 \"\$@\"" "$1"
}

# Unknown names end it before anything is built.
(
    for name in $REWARDS; do reward "$name" 0; done
    for name in $ARMS; do arm "$name"; done
)
mkdir -p "$FOLDER"
failed=0
# Models first: the runs of a seed share them.
for seed in $SEEDS; do
    echo "seed $seed"
    [[ " $REWARDS " != *" strong "* ]] || echo "strong $seed"
done | in_parallel build || failed=1
# Seed by seed, so that whatever has been run can be compared.
for seed in $SEEDS; do
    for reward in $REWARDS; do
        for arm in $ARMS; do
            echo "$reward $arm $seed"
        done
    done
done | in_parallel run_one || failed=1

folders=()
for reward in $REWARDS; do
    folders+=("$FOLDER/$reward")
done
baseline=()
[[ $ARMS != *" "* ]] || baseline=(--baseline "${ARMS%% *}")
"$PYTHON" tools/compare.py "${folders[@]}" "${baseline[@]}" --output "$FOLDER/comparison" || failed=1
((failed == 0)) || { echo "some of it has failed; the same command makes what is missing" >&2 && exit 1; }
