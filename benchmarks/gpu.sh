#!/usr/bin/env bash
# On a machine with a CUDA GPU, in under 10 minutes: the same numbers as on the CPU, then the speeds that make sense there.
#
#   make install && bash benchmarks/gpu.sh
#
# TRL is measured beside taurl where its environment can be built (or is named by PEERS), else taurl alone.
# DEVICE=cpu MODEL=FOLDER tries the script itself.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
peers=${PEERS:-$HOME/.cache/taurl/peers}
common=(--device "${DEVICE:-cuda}" --model "${MODEL:-smollm2-135m-instruct}")
$python benchmarks/record.py "The same numbers on a GPU" gpu_correctness.py "${common[@]}"
common+=(--peers "$peers" --write)
if ! PYTHONPATH=benchmarks $python -c 'import sys, pathlib, shared; shared.environment(pathlib.Path(sys.argv[1]))' "$peers"; then
  common+=(--alone)
fi
$python benchmarks/grpo_step.py "${common[@]}" --minutes 1.5 "$@"
$python benchmarks/sft.py "${common[@]}" --minutes 1.5 "$@"
$python benchmarks/preference.py "${common[@]}" --minutes 3 "$@"
