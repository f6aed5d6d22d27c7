#!/usr/bin/env bash
# Online iterative DPO, the whole loop. With no settings at all it builds the offline demo and runs it:
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
# Each iteration: the policy answers prompts, a reward scores the answers, best and worst become pairs, DPO trains on
# them, and the new policy is evaluated on held-out prompts. Every command is printed before it runs, so any of them can
# be run by hand. Stopped or killed at any moment, the same command goes on where it was: each stage's output has its
# final name only when it is whole, and a stage that is done says so and ends.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# ---- Settings --------------------------------------------------------------------------------------------------------

if [[ -z "${MODEL:-}" ]]; then # the demo: a small language game, built offline in a minute (demo/)
    DEMO=demo/build/seed_${SEED:-0}
    RUN=${RUN:-runs/demo}
    MODEL=$DEMO/policy
    REWARD_MODEL=${REWARD_MODEL:-$DEMO/reward_model}
    PROMPTS=${PROMPTS:-$DEMO/prompts.jsonl}
    HELDOUT=${HELDOUT:-$DEMO/heldout.jsonl}
    GOLD_FN=${GOLD_FN:-demo/gold.py:gold} # the truth of the game; it only watches
    PROMPTS_PER_ITER=${PROMPTS_PER_ITER:-512}
    GENERATE_ARGS=${GENERATE_ARGS:---max_new_tokens 40}
    # A policy of 0.4M parameters takes a learning rate 400 times that of a 1B model, and smaller batches.
    TRAIN_ARGS=${TRAIN_ARGS:---learning_rate 2e-4 --batch_size 32}
fi
RUN=${RUN:?name the run: RUN=runs/NAME}
PROMPTS=${PROMPTS:?prompts.jsonl to train on; tools/prepare_prompts.py makes it}
HELDOUT=${HELDOUT:?held-out prompts, disjoint from PROMPTS; tools/prepare_prompts.py splits them off}
REWARD_MODEL=${REWARD_MODEL:-} # a reward model, and/or
REWARD_FN=${REWARD_FN:-}       # a python function, file.py:name, and/or
JUDGE=${JUDGE:-}               # a language model that compares answers: served here, by vLLM, while answers are scored
JUDGE_ARGS=${JUDGE_ARGS:-}     # more arguments for that server, or
JUDGE_URL=${JUDGE_URL:-}       # the http://…/v1 of a server that offers JUDGE; its key in OPENAI_API_KEY
GOLD_FN=${GOLD_FN:-}           # a function that only watches the held-out answers
ITERS=${ITERS:-3}
REF=${REF:-prev}               # the reference: "prev", the policy that wrote the answers, or "init", the first one
HISTORY=${HISTORY:-0}          # train on the pairs of so many earlier iterations, too
ENHANCER=${ENHANCER:-}         # "prev", "init" or a model: a second policy that answers the same prompts
NUM_SAMPLES=${NUM_SAMPLES:-8}
EVAL_SAMPLES=${EVAL_SAMPLES:-4}
PROMPTS_PER_ITER=${PROMPTS_PER_ITER:-} # default: all of PROMPTS, every iteration
SEED=${SEED:-0}
KEEP=${KEEP:-all}              # "last" removes a policy when nothing needs it any more
GENERATE_ARGS=${GENERATE_ARGS:-} SCORE_ARGS=${SCORE_ARGS:-} PAIRS_ARGS=${PAIRS_ARGS:-} TRAIN_ARGS=${TRAIN_ARGS:-}

# Machines. NPROC processes here; for several machines start this script on each with the same settings, its NODE_RANK,
# a shared RUN folder and TORCHRUN_ARGS="--nnodes 4 --rdzv_backend c10d --rdzv_endpoint HOST:29500".
. tools/environment.sh # count_gpus, install, and PYTHON
gpus=$(count_gpus)
NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))}
GENERATE_NPROC=${GENERATE_NPROC:-$NPROC} # processes of generate.py: fewer where GENERATE_ARGS has --tensor_parallel_size
TORCHRUN_ARGS=${TORCHRUN_ARGS:-}
NODE_RANK=${NODE_RANK:-0}
# Two processes that each take all cores run ten times slower than two that share them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((($(nproc) - 1) / NPROC) + 1))}
export TOKENIZERS_PARALLELISM=false

# ---- Tools -----------------------------------------------------------------------------------------------------------

die() { echo "iterate.sh: $1" >&2; exit "${2:-1}"; }

[[ $REF == prev || $REF == init ]] || die "REF is \"prev\" or \"init\", not \"$REF\""
[[ $KEEP == all || $ENHANCER != prev ]] || die "ENHANCER=prev needs KEEP=all: it answers with a policy that KEEP=last removes"
[[ $KEEP == all || $KEEP == last ]] || die "KEEP is \"all\" or \"last\", not \"$KEEP\""
[[ -n $REWARD_MODEL$REWARD_FN$JUDGE || $SCORE_ARGS == *--judge_url* ]] || die "no reward: set REWARD_MODEL, REWARD_FN or JUDGE"
[[ -n $JUDGE || -z $JUDGE_URL$JUDGE_ARGS ]] || die "JUDGE_URL and JUDGE_ARGS have no effect without JUDGE, the model's name"
[[ $JUDGE_URL != *@* ]] || die "JUDGE_URL holds credentials, which would end up in logs: put the key into OPENAI_API_KEY"
[[ -z $JUDGE_URL || -z $JUDGE_ARGS ]] || die "JUDGE_ARGS are for a server started here; JUDGE_URL's runs already"

install requirements.txt # makes .venv on the first run
((gpus == 0)) || install requirements-gpu.txt

mkdir -p "$RUN"
if ((NODE_RANK == 0)); then # two loops must never share a run; the lock goes with the process
    exec 9>"$RUN/.lock" # a stage that was just killed may hold it for a moment yet
    flock --wait 5 9 || die "another loop is at work in $RUN (or a stage of a killed one is; see: fuser $RUN/.lock)"
fi

# Ctrl-C and SIGTERM reach the stage as SIGTERM: training saves a checkpoint, the others keep their finished parts.
child=
stop() {
    trap '' INT TERM
    [[ -z $child ]] || { kill -TERM "$child" 2>/dev/null && wait "$child" || true; }
    die "stopped; the same command goes on from here" 75
}
trap stop INT TERM

# stage LOG COMMAND…: print it, run it, keep its output in LOG, stop the loop when it fails.
stage() {
    local log=$1 status=0
    shift
    mkdir -p "$(dirname "$log")"
    printf '\n+ %s\n' "$*" | tee -a "$log"
    "$@" > >(trap '' INT TERM; exec tee -a "$log") 2>&1 & # Ctrl-C reaches tee, too, and a stage has last words
    child=$!
    wait "$child" || status=$?
    child=
    ((status != 75)) || die "stopped on request; the same command goes on from here" 75
    ((status == 0)) || die "$1 ${2:-} failed with exit code $status. Its output is in $log" "$status"
}

# everywhere LOG STAGE.py ARGS…: on all ranks of all machines.
everywhere() {
    local log=$1 processes=$NPROC
    shift
    [[ $1 != generate.py ]] || processes=$GENERATE_NPROC
    if ((processes == 1)) && [[ -z $TORCHRUN_ARGS ]]; then
        stage "$log" "$PYTHON" "$@"
    else
        # shellcheck disable=SC2086
        stage "$log" "$PYTHON" -m torch.distributed.run --nproc_per_node "$processes" ${TORCHRUN_ARGS:---standalone} "$@"
    fi
}

# once LOG OUTPUT SCRIPT.py ARGS…: in one process, on the first machine; the others wait for its output.
once() {
    local log=$1 output=$2
    shift 2
    if ((NODE_RANK == 0)); then
        stage "$log" "$PYTHON" "$@"
    else
        until [[ -e $output ]]; do sleep 1; done
    fi
}

# serve_judge LOG PORT: start JUDGE's server and wait until it answers. score.py shares the GPUs with it, for a reward
# model, say, or the references of an evaluation; the next stage finds them free.
# shellcheck disable=SC2086
serve_judge() {
    local log=$1 port=$2 copies=()
    ((gpus < 2)) || [[ $JUDGE_ARGS == *parallel* ]] || copies=(--data-parallel-size "$gpus")
    # What `vllm serve` runs; that command does not exist in vLLM's build for CPUs.
    set -- "$PYTHON" -m vllm.entrypoints.openai.api_server --host 127.0.0.1 --port "$port" --model "$JUDGE" \
        --gpu-memory-utilization 0.6 --max-model-len auto "${copies[@]}" $JUDGE_ARGS
    mkdir -p "$(dirname "$log")"
    printf '\n+ %s &\n' "$*" | tee -a "$log"
    set -m # a process group of its own, to be stopped as a whole: while it starts, the server itself may miss a signal
    (
        VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} "$@" &
        while kill -0 $$ && kill -0 $!; do sleep 1; done
        kill -0 $$ || { trap '' TERM; kill -TERM 0; sleep 20; kill -KILL 0; } # this script was killed
    ) </dev/null >>"$log" 2>&1 9>&- &
    set +m
    judge=$!
    disown
    until (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do # it listens when the model is loaded
        kill -0 "$judge" 2>/dev/null || die "the judge's server did not start. Its output is in $log"
        sleep 1
    done
}

judge=
stop_judge() {
    [[ -n $judge ]] || return 0
    kill -TERM -- "-$judge" 2>/dev/null || true
    for _ in {1..200}; do
        kill -0 -- "-$judge" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL -- "-$judge" 2>/dev/null || true
    judge=
}
trap stop_judge EXIT # however this script ends, the server ends with it

# score LOG OUTPUT ARGS…: with the rewards that were set.
# shellcheck disable=SC2086
score() {
    local log=$1 output=$2 url=$JUDGE_URL port
    shift 2
    if [[ -n $JUDGE && -z $url ]]; then
        port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
        url=http://127.0.0.1:$port/v1
        [[ -e $output ]] || serve_judge "${log%/*}/judge.log" "$port"
    fi
    everywhere "$log" score.py --output "$output" "${rewards[@]}" ${JUDGE:+--judge_url "$url" --judge_model "$JUDGE"} \
        "$@" $SCORE_ARGS
    stop_judge
}

# evaluate FOLDER POLICY [score.py arguments]: the same held-out prompts, temperature and seeds for every policy.
# shellcheck disable=SC2086
evaluate() {
    local folder=$1 policy=$2
    shift 2
    everywhere "$folder/logs/generate.log" generate.py --model "$policy" --prompts "$RUN/heldout.jsonl" \
        --output "$folder/eval/candidates.jsonl" --num_samples "$EVAL_SAMPLES" --seed "$SEED" $GENERATE_ARGS
    score "$folder/logs/score.log" "$folder/eval/scored.jsonl" --candidates "$folder/eval/candidates.jsonl" \
        "${watched[@]}" "$@"
}

# pinned MODEL: a name on the hub with its commit of now. Whatever is pushed there later, this run keeps to that one.
pinned() {
    if [[ -z $1 || -e $1 || $1 == init || $1 == prev ]]; then
        echo "$1"
    else
        "$PYTHON" models.py "$1"
    fi
}

report() { once "$RUN/report.log" "$RUN/summary.jsonl" tools/report.py "$RUN"; }

# ---- The loop --------------------------------------------------------------------------------------------------------

if [[ -n ${DEMO:-} ]]; then
    once "$RUN/demo.log" "$DEMO" demo/build.py --output "$DEMO" --seed "$SEED"
fi
MODEL=$(pinned "$MODEL")
REWARD_MODEL=$(pinned "$REWARD_MODEL")
ENHANCER=$(pinned "$ENHANCER")
rewards=(${REWARD_MODEL:+--reward_model "rm=$REWARD_MODEL"} ${REWARD_FN:+--reward_fn "$REWARD_FN"})
watched=(${GOLD_FN:+--reward_fn "gold=$GOLD_FN" --reward_weights gold=0}) # weight 0: written down, decides nothing
export MODEL REWARD_MODEL REWARD_FN JUDGE JUDGE_ARGS JUDGE_URL GOLD_FN PROMPTS HELDOUT RUN ITERS REF HISTORY ENHANCER \
    NUM_SAMPLES EVAL_SAMPLES PROMPTS_PER_ITER SEED KEEP NPROC GENERATE_NPROC GENERATE_ARGS SCORE_ARGS PAIRS_ARGS \
    TRAIN_ARGS TORCHRUN_ARGS
once "$RUN/start.log" "$RUN/config.json" tools/start_run.py # config.json and heldout.jsonl
rm -rf "$RUN"/iter_*/policy.gone
policy=$MODEL
evaluate "$RUN/iter_00" "$policy"
report

for ((i = 1; i <= ITERS; i++)); do
    now=$RUN/$(printf 'iter_%02d' "$i")
    if [[ $KEEP == last && -e $now/eval/scored.jsonl ]] && [[ ! -e $now/policy || $policy != "$MODEL" && ! -e $policy ]]; then
        echo "$now: done; its policy or the one before was not kept"
        previous=$policy
        policy=$now/policy
        continue
    fi

    # Which prompts: a seeded shuffle, each iteration the next slice.
    once "$now/logs/prompts.log" "$now/prompts.jsonl" tools/take_prompts.py --prompts "$PROMPTS" \
        --heldout "$RUN/heldout.jsonl" --output "$now/prompts.jsonl" --iteration "$i" --seed "$SEED" \
        ${PROMPTS_PER_ITER:+--num_prompts "$PROMPTS_PER_ITER"}

    # The policy writes NUM_SAMPLES answers to each.
    # shellcheck disable=SC2086
    everywhere "$now/logs/generate.log" generate.py --model "$policy" --prompts "$now/prompts.jsonl" \
        --output "$now/candidates.jsonl" --num_samples "$NUM_SAMPLES" --iteration "$i" --seed "$SEED" $GENERATE_ARGS
    candidates=("$now/candidates.jsonl")
    if [[ -n $ENHANCER ]]; then # a second policy widens the choice ("RLHF Workflow", arXiv 2405.07863)
        case $ENHANCER in
            init) enhancer=$MODEL ;;
            prev) enhancer=${previous:-$MODEL} ;;
            *) enhancer=$ENHANCER ;;
        esac
        # shellcheck disable=SC2086
        everywhere "$now/logs/generate.log" generate.py --model "$enhancer" --prompts "$now/prompts.jsonl" \
            --output "$now/enhancer.jsonl" --num_samples "$NUM_SAMPLES" --iteration "$i" --seed "$((SEED + 1))" $GENERATE_ARGS
        candidates+=("$now/enhancer.jsonl")
    fi

    # The reward ranks them; best and worst become pairs.
    score "$now/logs/score.log" "$now/scored.jsonl" --candidates "${candidates[@]}"
    # shellcheck disable=SC2086
    once "$now/logs/pairs.log" "$now/pairs.jsonl" make_pairs.py --scored "$now/scored.jsonl" \
        --output "$now/pairs.jsonl" --iteration "$i" --seed "$SEED" $PAIRS_ARGS

    # DPO trains on the fresh pairs, and on those of HISTORY iterations before.
    pairs=("$now/pairs.jsonl")
    for ((j = i - 1; j >= 1 && j >= i - HISTORY; j--)); do
        pairs+=("$RUN/$(printf 'iter_%02d' "$j")/pairs.jsonl")
    done
    reference=()
    [[ $REF == prev ]] || reference=(--ref_model "$MODEL")
    # shellcheck disable=SC2086
    everywhere "$now/logs/train.log" dpo_train.py --model "$policy" "${reference[@]}" --pairs "${pairs[@]}" \
        --output "$now/policy" --seed "$SEED" $TRAIN_ARGS

    # The new policy on the held-out prompts, with its distance from the one before and from the first.
    evaluate "$now" "$now/policy" --ref_model "init=$MODEL" "prev=$policy"
    report

    if [[ $KEEP == last && $policy != "$MODEL" ]]; then # renamed first: a folder half removed would be taken for a policy
        mv "$policy" "$policy.gone"
        rm -rf "$policy.gone"
    fi
    previous=$policy
    policy=$now/policy
done

echo
echo "iterate.sh: done. The last policy is $policy; the report is $RUN/report.html"
