#!/usr/bin/env bash
# All that is to be measured on a GPU, in one command: first that the CUDA path is right, then how fast it is.
#     bash bench/gpu.sh [edu_fineweb10B]        # shards of fineweb.py; without them, the demo's text
# Tables on standard output, json and a trace in out/bench-gpu. About fifteen minutes on one H200 (estimated).
# A measurement that fails does not end the others; the last line names those that did.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
trap 'exit 130' INT
data=${1:-input.txt}
out=out/bench-gpu
step="--models gpt2 --tokenizer=gpt2 --data=$data --T=1024 --total_batch_size=524288 --steps=3 --out_dir=$out"
failed=()

measure() {
  echo "== $* (after $SECONDS s)"
  "$@" || failed+=("$*")
}

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv || exit 1
measure python -m pytest -m gpu                                               # exact resume, kernels, fitting B
measure python bench.py train $step --B 16 32 64 --repeats=4 --profile        # tokens/s, MFU, shares, memory
measure python bench.py choices $step --B 32 --repeats=3                      # each choice made otherwise
measure python bench.py sample --tokenizer=gpt2 --B 1 8 64 --stride=16 --compile=False --out_dir=$out
measure python bench.py train $step --B 32 --repeats=3 --optimizer=muon --out_dir=$out/muon
measure python bench.py data $step
measure python bench.py sample --tokenizer=gpt2 --B 1 8 64 --stride=16 --compile --out_dir=$out/compiled
if [ -f .cache/hellaswag/hellaswag_val.jsonl ]; then
  measure python bench.py hellaswag --rows=1000 --out_dir=$out
fi
[ ${#failed[@]} -eq 0 ] && echo "all measured" || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
