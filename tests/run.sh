#!/usr/bin/env bash
# All checks, on a fresh machine with Python 3.11 and pip: makes .venv, installs what is pinned, lints,
# tests.
#
#     bash tests/run.sh                  everything that runs without a GPU, and what needs one where
#                                        there is one; as many workers as cores, at most 4
#     bash tests/run.sh --quick          every stage once, in less than two minutes
#     bash tests/run.sh tests/test_x.py  any pytest arguments
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/environment.sh
install requirements.txt
install requirements-dev.txt
install_vllm

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# Two processes of two threads each on two cores run ten times slower than two of one.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
cores=$(env --unset OMP_NUM_THREADS nproc) # nproc listens to OMP_NUM_THREADS
workers=$((cores < 4 ? cores : 4))
# Tests of a file that share a model or an engine run in one worker.
exec "$PYTHON" -m pytest --numprocesses "$workers" --dist loadscope "$@"
