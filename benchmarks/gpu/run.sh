#!/usr/bin/env bash
# Everything that this project measures on a GPU, in one command, within seven minutes.
#
#   benchmarks/gpu/run.sh [--dry-run] [--budget SECONDS] [--out FOLDER]
#
# Needs a CUDA device, torch 2.11 and Triton 3.4 or later, and pytest for the tests; nothing is installed. Peers that
# are installed (transformers, Liger, ScatterMoE, SonicMoE, MegaBlocks, DeepSpeed) are measured too. Steps run in order
# of worth, each with a time-out of its own, until the budget is spent; what did not fit is said. JSON and logs go into
# FOLDER. --dry-run makes every step that needs no GPU, in small, and says what would run.
set -uo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/benchmarks/gpu
budget=400 out='' dry=
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=1 ;;
    --budget) shift; budget=${1:-} ;;
    --out) shift; out=${1:-} ;;
    *) echo "run.sh: unknown option $1; known: --dry-run, --budget SECONDS, --out FOLDER" >&2; exit 2 ;;
  esac
  shift
done
case $budget in '' | *[!0-9]*) echo "run.sh: --budget is a number of seconds, not '$budget'" >&2; exit 2 ;; esac
out=${out:-$PWD/gpu_$(date +%Y%m%d_%H%M%S)}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$root" || exit 2
python=${PYTHON:-python3}
command -v "$python" > /dev/null || python=python
export PYTHONPATH=$root:$root/benchmarks:$here PYTHONUNBUFFERED=1
: > "$out/steps.jsonl"
SECONDS=0

# step NAME SECONDS COMMAND...: run it within its own time and what is left of the budget, and note how it ended
step() {
  local name=$1 most=$2 left=$((budget - SECONDS)) began=$SECONDS code=0
  shift 2
  if grep "^${name%_parts}: " "$out/missing.txt" > "$out/reason.txt"; then
    echo "== $(cat "$out/reason.txt")"
    echo "{\"step\": \"$name\", \"seconds\": 0, \"code\": -1}" >> "$out/steps.jsonl"
    return
  fi
  if [ "$left" -lt 10 ]; then
    echo "== $name: did not fit into the budget of $budget s"
    echo "{\"step\": \"$name\", \"seconds\": 0, \"code\": null}" >> "$out/steps.jsonl"
    return
  fi
  [ "$most" -lt "$left" ] || most=$left
  echo "== $name, at most $most s: $*"
  timeout -k 5 "$most" "$@" 2>&1 | tee "$out/$name.log" || code=$?
  [ "$code" -ne 124 ] || echo "== $name: ended by its time-out of $most s"
  echo "{\"step\": \"$name\", \"seconds\": $((SECONDS - began)), \"code\": $code}" >> "$out/steps.jsonl"
}

# say NAME COMMAND...: what a step would run on a GPU
say() { echo "== $1 would run: ${*:2}"; }

pytest=("$python" -m pytest -q -p no:cacheprovider -o addopts= --strict-markers --confcutdir=tests/kernels)
tests=(-m "gpu and not slow and not real" tests/kernels)
"$python" -c 'import xdist' 2> /dev/null && parallel=(-n 8) || parallel=()
kernels=("$python" benchmarks/kernel_speed.py)

"$python" "$here/environment.py" --out "$out/environment.json" --missing "$out/missing.txt" || exit 2
if [ -n "$dry" ]; then
  budget=600
  step tests 120 "${pytest[@]}" --collect-only "${tests[@]}"
  step kernels 120 "${kernels[@]}" --dry-run
  step layer 120 "$python" benchmarks/layer.py --shapes tiny --repetitions 2 --out "$out/layer.json"
  step determinism 120 "$python" "$here/determinism.py" --device cpu --shapes tiny --runs 3 --out "$out/determinism.json"
  step memory 120 "$python" benchmarks/memory.py --shapes tiny --out "$out/memory.json"
  step step 120 "$python" -c 'import step; step.ours(False)'
  say kernels_parts "${kernels[@]}" --dtypes bf16 fp16 fp32
  echo "== summary of an example, whose figures are made up"
  "$python" "$here/summary.py" "$here/example"
  grep -q '"code": [1-9]' "$out/steps.jsonl" && exit 1
  exit 0
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "run.sh: torch sees no CUDA device; --dry-run needs none" >&2
  exit 2
fi
nvidia-smi > "$out/nvidia_smi.txt" 2>&1 || true
step tests 120 "${pytest[@]}" "${parallel[@]}" --junitxml="$out/tests.xml" "${tests[@]}"
step kernels 80 "${kernels[@]}" --whole --dtypes bf16 --seconds 60 --out "$out/kernels.json"
step layer 70 "$python" benchmarks/layer.py --device cuda --dtypes pure_bf16 bf16 fp32 --repetitions 20 --out "$out/layer.json"
step determinism 40 "$python" "$here/determinism.py" --out "$out/determinism.json"
step memory 40 "$python" benchmarks/memory.py --device cuda --out "$out/memory.json"
step step 60 "$python" benchmarks/step.py --device cuda --repetitions 20 --out "$out/step.json"
step kernels_parts 150 "${kernels[@]}" --seconds 120 --out "$out/kernels_parts.json"
"$python" "$here/summary.py" "$out" | tee "$out/summary.txt"
exit "${PIPESTATUS[0]}"
