#!/usr/bin/env bash
# What only a GPU can measure, in three phases of at most nine and a half minutes each on one H200:
#
#     bash bench/gpu.sh A    ceilings, the GPU tests, the log-prob kernel, attention
#     bash bench/gpu.sh B    a training step against TRL at Qwen2.5's 0.5B and 1.5B
#     bash bench/gpu.sh C    memory, offload, a step's profile, the audit, the demo interrupted
#
#     bash bench/gpu.sh A --rehearse    the same steps with small shapes, on a CPU
#     bash bench/gpu.sh A --list        names, seconds and commands, and nothing runs
#
# A phase leaves PHASE.summary.txt (each step, its seconds, its headlines beside what was predicted)
# and PHASE.log (all output); B leaves its tables, too. It needs torch 2.11 or later, Triton,
# transformers and pytest, and no vLLM. No step stops the others: each runs under `timeout`, and the
# seconds of a phase add up to 570 at most.
#
#     OUT      folder of the results; default bench/results/gpu-NAME-DATE
#     WHEELS   folder of wheels of what we are compared with, for a machine without a network:
#              trl, datasets, dill, multiprocess, liger-kernel, cut-cross-entropy.
#              What is missing is left out of the tables
#     PYTHON   default: python3
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. bench/steps.sh

phase=${1:-}
mode=${2:-}
usage="bash bench/gpu.sh A|B|C [--rehearse|--list]"
[[ $phase == [ABC] && $# -le 2 ]] || { echo "$usage" >&2; exit 2; }
[[ -z $mode || $mode == --rehearse || $mode == --list ]] || { echo "$usage" >&2; exit 2; }
[[ $mode != --list ]] || list=1
rehearse=
[[ $mode != --rehearse ]] || rehearse=1

# ---- where things are ----------------------------------------------------------------------------

export PYTHON=${PYTHON:-$(command -v python3)}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
peers=${TMPDIR:-/tmp}/bench_gpu_peers # what WHEELS hold, after the repository on Python's path
export PYTHONPATH=$PWD:$peers${PYTHONPATH:+:$PYTHONPATH}

if [[ -z $list ]]; then
    device=cpu
    if [[ -z $rehearse ]]; then
        device=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())') ||
            { echo "bench/gpu.sh: torch sees no GPU; --rehearse runs on a CPU" >&2; exit 1; }
    fi
    [[ -z $rehearse ]] || OUT=${OUT:-${TMPDIR:-/tmp}/bench_gpu_rehearsal}
    OUT=${OUT:-bench/results/gpu-${device// /_}-$(date +%F)}
    mkdir -p "$OUT"
    summary=$OUT/$phase.summary.txt
    log=$OUT/$phase.log
    : >"$summary" >"$log"
    note "bash bench/gpu.sh $*, $device, $(date -u +%FT%TZ)"
fi
OUT=${OUT:-bench/results/gpu}

# ---- sizes ---------------------------------------------------------------------------------------

# T x D x V of the heads of Qwen2.5 0.5B, 1.5B and 7B, and of Llama 3 8B
heads=(16384x896x151936 16384x1536x151936 16384x3584x151936 16384x4096x128256)
ceilings=()
rounds=(--repeats 5)
attention=()
small=Qwen2.5-0.5B
middle=Qwen2.5-1.5B
train=(--packing prefix --tokens_per_batch 16384 --trl_batch_sizes 16 4 --steps 4)
large=(--shape Qwen2.5-7B --gradient_checkpointing --tokens_per_batch 4096)
offload=(--shape Qwen2.5-1.5B --cpu_offload)
audit=(--backends hf --dtypes bf16 --max_new_tokens 64 256 1024)
epochs=12 # of the demo's training, so that the signal finds it at work
if [[ -n $rehearse ]]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_VISIBLE_DEVICES=
    slower=30
    heads=(96x32x1009 96x48x1009)
    ceilings=(--square 256 --copy_gib 0.01)
    rounds=(--repeats 1)
    attention=(--pairs 1)
    small=small
    middle=small
    tiny=(--pairs 2 --scale 0.05 --tokens_per_batch 96)
    train=("${tiny[@]}" --packing prefix --trl_batch_sizes 2 --steps 2)
    large=(--shape small "${tiny[@]}" --gradient_checkpointing)
    offload=(--shape small "${tiny[@]}") # host memory is all there is
    audit=(--backends hf --dtypes bf16 --max_new_tokens 4 --num_samples 2)
    epochs=4
fi

# ---- the phases ----------------------------------------------------------------------------------

install_peers() {
    if [[ -n $list || -d ${WHEELS:-} ]]; then
        step "install the peers" 25 "$PYTHON" -m pip install --quiet --disable-pip-version-check \
            --no-index --no-deps --upgrade --target "$peers" "${WHEELS:-wheels}"/*.whl
    else
        skip "install the peers" "WHEELS names no folder; those that are installed take part"
    fi
}

A() {
    install_peers
    step "versions" 20 "$PYTHON" -m bench.versions
    step "ceilings and GEMMs" 60 "$PYTHON" -m bench.gemms --shapes "${heads[@]}" "${ceilings[@]}"
    step "GPU tests" 110 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider
    step "log-prob kernel" 150 "$PYTHON" -m bench.kernel --shapes "${heads[@]}" "${rounds[@]}"
    step "tuning" 55 "$PYTHON" -m bench.kernel --tune --shapes "${heads[@]:0:2}" "${rounds[@]}"
    if [[ -n $list ]] || { [[ -z $rehearse ]] && command -v ncu >/dev/null; }; then
        # One launch of the row kernel after the warm-up; the clocks stay as they are.
        step "row kernel under ncu" 45 ncu --clock-control none --kernel-name row_kernel \
            --launch-skip 8 --launch-count 1 --section SpeedOfLight --section Occupancy \
            --section MemoryWorkloadAnalysis --section LaunchStats \
            "$PYTHON" -m bench.kernel --shapes "${heads[0]}" --rows "ours, stash" --repeats 1
        pick "Duration|DRAM Throughput|Memory Throughput|Registers Per Thread|Achieved Occupancy"
    else
        skip "row kernel under ncu" "no ncu, or a rehearsal"
    fi
    step "attention" 40 "$PYTHON" -m bench.attention "${attention[@]}"
}

B() {
    install_peers
    step "0.5B against TRL" 140 "$PYTHON" -m bench.train --shapes "$small" "${train[@]}" \
        --compile --checkpointing off --save "$OUT/B.train-0.5B.txt"
    step "1.5B against TRL" 190 "$PYTHON" -m bench.train --shapes "$middle" "${train[@]}" \
        --compile --checkpointing off --save "$OUT/B.train-1.5B.txt"
    step "1.5B, checkpointing" 110 "$PYTHON" -m bench.train --shapes "$middle" "${train[@]}" \
        --checkpointing on --save "$OUT/B.train-1.5B-checkpointing.txt"
    step "0.5B, checkpointing" 75 "$PYTHON" -m bench.train --shapes "$small" "${train[@]}" \
        --checkpointing on --save "$OUT/B.train-0.5B-checkpointing.txt"
}

C() {
    step "7B's peak memory" 180 "$PYTHON" -m bench.memory "${large[@]}"
    step "CPU offload" 50 "$PYTHON" -m bench.memory "${offload[@]}"
    step "profile of a step" 45 "$PYTHON" -m bench.step_profile --shape "$middle"
    step "profile, compiled" 45 "$PYTHON" -m bench.step_profile --shape "$middle" --compile
    step "audit in bf16" 90 "$PYTHON" -m bench.audit "${audit[@]}"
    step "demo, interrupted" 125 bash bench/interrupt_demo.sh "$epochs"
}

"$phase"
finish
