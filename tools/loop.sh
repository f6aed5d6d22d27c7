# Sourced by iterate.sh: how its lines run. Settings, processes, logs, signals, the judge's server.
#
# Settings like GENERATE_ARGS hold several arguments. The shell is meant to split them at blanks, but
# not to make file names of a * in them:
# shellcheck disable=SC2086,SC2206
set -f

die() {
    echo "iterate.sh: $1" >&2
    exit "${2:-1}"
}

# ---- Settings ------------------------------------------------------------------------------------

SETTINGS=() # their names; a run records them
DEMO=       # the demo's folder; demo/settings.sh sets it

# setting NAME [DEFAULT]: an environment variable; where it is empty it gets the default.
setting() {
    local name=$1
    [[ -n ${!name:-} ]] || printf -v "$name" %s "${2:-}"
    export "${name?}"
    SETTINGS+=("$name")
}

# from_folder FOLDER SETTING…: a relative path means FOLDER, where iterate.sh was called.
from_folder() {
    local folder=$1 name path
    shift
    [[ $folder != "$PWD" ]] || return 0
    for name in "$@"; do
        path=${!name:-}
        [[ -n $path && $path != /* ]] || continue
        # What is not there may be a name on the hub; a new run's folder is not there yet.
        [[ $name == RUN || -e $folder/${path%:*} ]] || continue
        printf -v "$name" %s "$folder/$path"
    done
}

# files_from_folder FOLDER SETTING: the same for a setting that holds several files.
files_from_folder() {
    local file files=()
    for file in ${!2:-}; do
        [[ $file == /* || ! -e $1/$file ]] || file=$1/$file
        files+=("$file")
    done
    printf -v "$2" %s "${files[*]}"
}

gpus=$(count_gpus)
NODE_RANK=${NODE_RANK:-0}
# A cluster may export these for a job of many processes. A stage here is one, unless torchrun says otherwise.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT

# processes_here: one for each GPU, or one.
processes_here() { echo "$((gpus > 0 ? gpus : 1))"; }

# whole_number NAME LEAST: stop before the shell calculates with anything else. It would take 08 for
# a mistake, 1e3 for nothing, and run the commands in PATH[$(…)].
whole_number() {
    local value=${!1}
    [[ $value =~ ^(0|[1-9][0-9]{0,8})$ ]] && ((value >= $2)) ||
        die "$1 must be a whole number, at least $2 and without leading zeros; found \"$value\""
}

check_settings() {
    whole_number ITERS 0
    whole_number HISTORY 0
    whole_number SEED 0
    whole_number NODE_RANK 0
    whole_number NUM_SAMPLES 1
    whole_number EVAL_SAMPLES 1
    whole_number NPROC 1
    whole_number GENERATE_NPROC 1
    [[ -z $PROMPTS_PER_ITER ]] || whole_number PROMPTS_PER_ITER 1
    [[ -n $RUN && $RUN != / ]] || die "name the run: RUN=runs/NAME"
    [[ $RUN == [/.[:alnum:]]* ]] || RUN=./$RUN # a folder, and no flag of mkdir or operator of find
    [[ -n $PROMPTS ]] || die "PROMPTS: prompts.jsonl to train on; tools/prepare_prompts.py makes it"
    [[ -n $HELDOUT ]] || die "HELDOUT: held-out prompts, disjoint from PROMPTS; tools/prepare_prompts.py splits them off"
    [[ $WRITER == policy || $WRITER == init ]] || die "WRITER is \"policy\" or \"init\", not \"$WRITER\""
    [[ $REF == prev || $REF == init ]] || die "REF is \"prev\" or \"init\", not \"$REF\""
    [[ $KEEP == all || $KEEP == last ]] || die "KEEP is \"all\" or \"last\", not \"$KEEP\""
    [[ -z $TORCHRUN_ARGS || $TORCHRUN_ARGS == -* ]] ||
        die "TORCHRUN_ARGS are flags of torchrun, as in \"--nnodes 4\", not \"$TORCHRUN_ARGS\""
    [[ $REPORT_TO =~ ^(none|tensorboard|wandb|trackio)$ ]] ||
        die "REPORT_TO is \"none\", \"tensorboard\", \"wandb\" or \"trackio\", not \"$REPORT_TO\""
    [[ -z $EVAL_PAIRS_SHARE || $EVAL_PAIRS_SHARE =~ ^0?\.[0-9]*[1-9][0-9]*$ ]] ||
        die "EVAL_PAIRS_SHARE is a share between 0 and 1, as 0.05, not \"$EVAL_PAIRS_SHARE\""
    [[ -z $EVAL_PAIRS_SHARE || $HISTORY == 0 ]] ||
        die "EVAL_PAIRS_SHARE needs HISTORY=0: a held-out prompt would be trained on with its earlier pairs"
    [[ $KEEP == all || $ENHANCER != prev ]] ||
        die "ENHANCER=prev needs KEEP=all: it answers with a policy that KEEP=last removes"
    for function in "$REWARD_FN" "$GOLD_FN"; do # or the mistake shows after an hour of sampling
        [[ -z $function || $function == *:?* && -f ${function%:*} ]] ||
            die "$function: no such file. It is written FILE.py:FUNCTION; give FILE.py with its whole path"
    done
    [[ $EXTRA_PAIRS_ITERS == first || $EXTRA_PAIRS_ITERS == all ]] ||
        die "EXTRA_PAIRS_ITERS is \"first\" or \"all\", not \"$EXTRA_PAIRS_ITERS\""
    [[ -n $EXTRA_PAIRS || $EXTRA_PAIRS_ITERS == first ]] ||
        die "EXTRA_PAIRS_ITERS has no effect without EXTRA_PAIRS, files of preference pairs"
    for file in $EXTRA_PAIRS; do
        [[ -f $file ]] || die "EXTRA_PAIRS: $file: no such file. It holds preference pairs, one JSON object per line"
    done
    [[ -n $REWARD_MODEL$REWARD_FN$JUDGE ]] || die "no reward: set REWARD_MODEL, REWARD_FN or JUDGE"
    [[ ${SCORE_ARGS//-/_} != *__missing_eos_penalty* || -n $REWARD_MODEL$REWARD_FN ]] ||
        die "--missing_eos_penalty in SCORE_ARGS has no effect with JUDGE alone: score.py sees no answer that pairs are made of"
    [[ ${SCORE_ARGS//-/_} != *__missing_eos_penalty* || ${PAIRS_ARGS//-/_} == *__keep_truncated* ]] ||
        die "--missing_eos_penalty in SCORE_ARGS has no effect: answers that were cut off take part in no pair. Give PAIRS_ARGS=--keep_truncated, too"
    [[ -n $JUDGE || -z $JUDGE_URL$JUDGE_ARGS$JUDGE_SERVER_ARGS ]] ||
        die "JUDGE_URL, JUDGE_ARGS and JUDGE_SERVER_ARGS have no effect without JUDGE, the model's name"
    [[ $JUDGE_URL != *[@?#]* && "$JUDGE_ARGS $JUDGE_SERVER_ARGS" != *--api[-_]key* ]] ||
        die "the judge's key would end up in logs and in config.json: put it into OPENAI_API_KEY alone"
    [[ "$GENERATE_ARGS $EVAL_ARGS $JUDGE_SERVER_ARGS" != *hf[-_]token* ]] ||
        die "a token would end up in logs and in config.json: put it into HF_TOKEN alone"
    [[ -n $JUDGE || -z $OPPONENT ]] || die "OPPONENT has no effect without JUDGE, which compares with it"
    [[ " $JUDGE_ARGS" != *" --opponent"* ]] ||
        die "--opponent in JUDGE_ARGS would decide pairs, too: set OPPONENT, which is for evaluation"
    [[ -z $OPPONENT || $OPPONENT == meta.reference || -f $OPPONENT ]] ||
        die "OPPONENT: $OPPONENT: no such file. It is a candidates.jsonl, or \"meta.reference\""
    [[ -z $JUDGE_URL || -z $JUDGE_SERVER_ARGS ]] ||
        die "JUDGE_SERVER_ARGS are for a server started here; JUDGE_URL's runs already"
}

# pinned MODEL: a name on the hub with its current commit. Whatever is pushed there later, this run
# keeps using that commit.
pinned() {
    if [[ -z $1 || -e $1 || $1 == init || $1 == prev ]]; then
        printf '%s\n' "$1" # echo would take a folder called -n for a flag
    else
        "$PYTHON" models.py "$1"
    fi
}

# ---- The run -------------------------------------------------------------------------------------

# check_folder: RUN is new, or a run, which has a .lock. Somebody's logs may be there before.
check_folder() {
    local first
    [[ -d $RUN && ! -e $RUN/.lock ]] || return 0
    first=$(find "$RUN" -mindepth 1 -maxdepth 1 ! -name '*.log' -print -quit)
    [[ -z $first ]] || die "RUN=$RUN: is no run, and holds $first. Name a new folder"
}

# begin: check the settings, install what is missing, lock the run, and record what it is.
begin() {
    check_settings
    check_folder
    install requirements.txt # makes .venv on the first run
    ((gpus == 0)) || install requirements-gpu.txt
    # Two processes that each take all cores run ten times slower than two that share them.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((($(nproc) - 1) / NPROC) + 1))}
    export TOKENIZERS_PARALLELISM=false

    mkdir -p "$RUN" 2>/dev/null || die "RUN=$RUN: this folder cannot be made"
    if ((NODE_RANK == 0)); then # two loops must never share a run; the lock goes with the process
        command -v flock >/dev/null || die "needs the program flock, of the package util-linux"
        { exec 9>"$RUN/.lock"; } 2>/dev/null || die "$RUN/.lock: cannot be written"
        flock --wait 5 9 || # a stage that was just killed may still hold it for a moment
            die "another loop is at work in $RUN (or a stage of a killed one is; see: fuser $RUN/.lock)"
    fi
    tracker=()
    [[ $REPORT_TO == none ]] ||
        tracker=(--report_to "$REPORT_TO" --run_name "$(basename "$RUN")" --logging_dir "$RUN/tracker")
    trap stop INT TERM
    trap stop_judge EXIT # however this script ends, the judge's server ends with it

    if [[ -n ${DEMO:-} ]]; then
        once "$RUN/demo.log" "$DEMO" demo/build.py --output "$DEMO" --seed "$SEED"
    fi
    for name in PROMPTS HELDOUT; do # or it would be looked for on the hub, like a model
        [[ -f ${!name} ]] || die "$name: ${!name}: no such file"
    done
    MODEL=$(pinned "$MODEL")
    REWARD_MODEL=$(pinned "$REWARD_MODEL")
    ENHANCER=$(pinned "$ENHANCER")
    once "$RUN/start.log" "$RUN/config.json" tools/start_run.py "${SETTINGS[@]}"
    ((NODE_RANK > 0)) || find "$RUN" -maxdepth 2 -name policy.gone -exec rm -rf {} +
}

# folder_of ITERATION
folder_of() { echo "$RUN/$(printf 'iter_%02d' "$1")"; }

# is_done_and_gone FOLDER: with KEEP=last, a finished iteration whose policy, or the one before, was
# removed. There is nothing to run again, and no policy to run it with.
is_done_and_gone() {
    [[ $KEEP == last && -e $1/eval/scored.jsonl ]] || return 1
    [[ ! -e $1/policy || ($policy != "$MODEL" && ! -e $policy) ]] || return 1
    echo "$1: done; its policy or the one before was not kept"
}

# discard POLICY: it is renamed first, because a half removed folder would be taken for a policy.
discard() {
    ((NODE_RANK == 0)) && [[ $1 != "$MODEL" ]] || return 0
    mv "$1" "$1.gone"
    rm -rf "$1.gone"
}

# report ITERATION: after all of its stages.
report() {
    # A resumed run's settings become its record when no stage is left that might refuse them.
    if ((NODE_RANK == 0)) && [[ -e $RUN/resumed.json && ! -e $(folder_of "$(($1 + 1))") ]]; then
        mv "$RUN/resumed.json" "$RUN/config.json"
    fi
    once "$RUN/report.log" "$RUN/summary.jsonl" tools/report.py "$RUN" "${tracker[@]}"
}

# steps_before ITERATION: the training steps of all earlier ones; each left a row with a loss.
steps_before() {
    local j log steps=0
    for ((j = 1; j < $1; j++)); do
        log=$(folder_of "$j")/policy.train.jsonl
        [[ -f $log ]] ||
            die "$log: is gone, and REPORT_TO needs its number of steps. Restore it, or set REPORT_TO=none"
        steps=$((steps + $(grep -c '"loss":' "$log")))
    done
    echo "$steps"
}

# ---- Processes -----------------------------------------------------------------------------------

LAUNCHER=tools/torchrun.py # of several processes

# Ctrl-C and SIGTERM reach the stage as SIGTERM: training saves a checkpoint, the others keep their
# finished parts.
child=
stop() {
    trap '' INT TERM
    [[ -z $child ]] || { kill -TERM "$child" 2>/dev/null && wait "$child" || true; }
    die "stopped; the same command resumes from here" 75
}

# note LOG COMMAND: print a command, and write it into the log.
note() {
    { mkdir -p "$(dirname "$1")" && printf '\n+ %s\n' "$2" | tee -a "$1"; } 2>/dev/null ||
        die "$1: cannot be written. If no space is left, free some. The same command resumes from here"
}

# stage LOG COMMAND…: print it, run it, keep its output in LOG, stop the loop when it fails.
stage() {
    local log=$1 status=0 script
    shift
    note "$log" "$*"
    # Ctrl-C reaches tee, too, but the stage still prints. What no longer fits into the log is printed all the same.
    "$@" > >(trap '' INT TERM; exec tee -a "$log" 2>/dev/null) 2>&1 &
    child=$!
    wait "$child" || status=$?
    child=
    ((status != 75)) || die "stopped on request; the same command resumes from here" 75
    for script in "$@"; do # with several processes, the launcher and its arguments come first
        [[ $script != *.py || $script == "$LAUNCHER" ]] || break
    done
    ((status == 0)) || die "$script failed with exit code $status. Its output is in $log" "$status"
    while (($# > 1)); do
        [[ $1 != --output || -e $2 ]] ||
            die "$script ended without an error, and without its output $2. What it said is in $log"
        shift
    done
}

# everywhere LOG STAGE.py ARGS…: on all ranks of all machines.
everywhere() {
    local log=$1 processes=$NPROC
    shift
    [[ $1 != generate.py ]] || processes=$GENERATE_NPROC
    if ((processes == 1)) && [[ -z $TORCHRUN_ARGS ]]; then
        stage "$log" "$PYTHON" "$@"
    else
        stage "$log" "$PYTHON" "$LAUNCHER" --nproc_per_node "$processes" \
            ${TORCHRUN_ARGS:---standalone} "$@"
    fi
}

# once LOG OUTPUT SCRIPT.py ARGS…: in one process, on the first machine; the others wait for OUTPUT.
once() {
    local log=$1 output=$2
    shift 2
    if ((NODE_RANK == 0)); then
        stage "$log" "$PYTHON" "$@"
    else
        [[ -e $output ]] || echo "waiting for the first machine's $output"
        until [[ -e $output ]]; do sleep 1; done
    fi
}

# ---- Scoring and evaluation ----------------------------------------------------------------------

# Held-out answers are drawn from the policy itself, however training samples: KL is estimated by them.
PLAIN_SAMPLING="--temperature 1 --top_p 1 --top_k 0 --min_p 0"

opponent=() # of judge.py: in training answers meet each other; evaluate sets it

# score LOGS OUTPUT [ARGS of score.py…]: ${candidates[@]} with the rewards that were set. The judge
# adds its reward to the others, so it comes last.
score() {
    local logs=$1 output=$2 inputs=("${candidates[@]}") scored
    shift 2
    if ((${#rewards[@]} + $#)); then
        scored=$output
        [[ -z $JUDGE ]] || scored=${output%.jsonl}.unjudged.jsonl
        everywhere "$logs/score.log" score.py --candidates "${inputs[@]}" --output "$scored" \
            "${rewards[@]}" "$@" $SCORE_ARGS
        inputs=("$scored")
    fi
    [[ -z $JUDGE ]] || ask_judge "$logs" "$output" "${inputs[@]}"
}

# evaluate FOLDER POLICY [ARGS of score.py…]: the same held-out prompts, temperature, seeds and, for
# a judge, opponent for every policy. Of repeated flags the last one counts.
evaluate() {
    local folder=$1 policy=$2
    local opponent=(--opponent "${OPPONENT:-$RUN/iter_00/eval/candidates.jsonl}") # for ask_judge
    shift 2
    everywhere "$folder/logs/generate.log" generate.py --model "$policy" \
        --prompts "$RUN/heldout.jsonl" --output "$folder/eval/candidates.jsonl" \
        --num_samples "$EVAL_SAMPLES" --seed "$SEED" $GENERATE_ARGS $PLAIN_SAMPLING $EVAL_ARGS
    candidates=("$folder/eval/candidates.jsonl")
    score "$folder/logs" "$folder/eval/scored.jsonl" "${watched[@]}" "$@"
}

# ---- The judge -----------------------------------------------------------------------------------

# ask_judge LOGS OUTPUT INPUTS…
ask_judge() {
    local logs=$1 output=$2 url=$JUDGE_URL port
    shift 2
    if [[ -z $url ]]; then
        port=$(free_port)
        url=http://127.0.0.1:$port/v1
        [[ -e $output ]] || serve_judge "$logs/judge_server.log" "$port"
    fi
    everywhere "$logs/judge.log" judge.py --candidates "$@" --output "$output" \
        --judge_url "$url" --judge_model "$JUDGE" "${opponent[@]}" $JUDGE_ARGS
    stop_judge
}

free_port() {
    "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# serve_judge LOG PORT: start JUDGE's server and wait until it answers. stop_judge frees the GPUs for
# the next stage.
judge=
serve_judge() {
    local log=$1 port=$2 copies=()
    ((gpus < 2)) || [[ $JUDGE_SERVER_ARGS == *parallel* ]] || copies=(--data-parallel-size "$gpus")
    # What `vllm serve` runs; that command does not exist in vLLM's build for CPUs.
    set -- "$PYTHON" -m vllm.entrypoints.openai.api_server --host 127.0.0.1 --port "$port" \
        --model "$JUDGE" --gpu-memory-utilization 0.6 --max-model-len auto "${copies[@]}" \
        $JUDGE_SERVER_ARGS
    note "$log" "$* &"
    # A process group of its own, to be stopped as a whole: while it starts, the server itself may
    # miss a signal.
    set -m
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
