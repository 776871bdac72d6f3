#!/usr/bin/env bash
# On a machine with a CUDA GPU, in under 10 minutes: the same numbers as on the CPU, then the speeds that make sense there.
#
#   make install && bash benchmarks/gpu.sh
#
# TRL is measured beside taurl where its environment can be built (or is named by PEERS), else taurl alone.
# DEVICE=cpu MODEL=FOLDER tries the script itself, and writes nothing into RESULTS.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
device=${DEVICE:-cuda}
peers=${PEERS:-$HOME/.cache/taurl/peers}
common=(--device "$device" --model "${MODEL:-smollm2-135m-instruct}")
if [ "$device" = cpu ]; then
  $python benchmarks/gpu_correctness.py "${common[@]}"
  $python benchmarks/sampling.py --rows 32x64 --rounds 1
else
  $python benchmarks/record.py "The same numbers on a GPU" gpu_correctness.py "${common[@]}"
  $python benchmarks/record.py "Sampling on a GPU" sampling.py --device "$device" --rows 32x64 stops --rounds 3
  common+=(--write)
fi
common+=(--peers "$peers")
build='import pathlib, sys; sys.path.insert(0, "benchmarks"); import shared; shared.environment(pathlib.Path(sys.argv[1]))'
if ! $python -c "$build" "$peers"; then
  common+=(--alone)
fi
$python benchmarks/grpo_step.py "${common[@]}" --minutes 1.5 "$@"
$python benchmarks/sft.py "${common[@]}" --minutes 1.5 "$@"
$python benchmarks/preference.py "${common[@]}" --minutes 3 "$@"
if [ "$device" != cpu ]; then
  $python benchmarks/record.py "Sampling on a GPU, CUDA graphs" sampling.py --device "$device" --cuda-graphs --rows 32x64 --rounds 3
fi
