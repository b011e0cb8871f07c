#!/usr/bin/env bash
# All that is to be measured on a GPU, in one command: first that the CUDA path is right, then how fast it is.
#     bash bench/gpu.sh [edu_fineweb10B]        # shards of fineweb.py; without them, the demo's text
#     bash bench/gpu.sh input.txt tests train   # of it only what is named
# Tables on standard output, json and traces in $OUT, or else out/bench-gpu. Half an hour on one H200 (estimated).
# A measurement that fails does not end the others; the last line names those that did.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
trap 'exit 130' INT
data=${1:-input.txt}
wanted=" ${*:2} "
out=${OUT:-out/bench-gpu}
step="--models gpt2 --tokenizer=gpt2 --data=$data --T=1024 --total_batch_size=524288 --steps=3"
sample="--tokenizer=gpt2 --B 1 8 64 --stride=16"
failed=()
parts="tests train sample choices muon data compiled hellaswag"

for name in $wanted; do
  [[ " $parts " = *" $name "* ]] || { echo "nothing is called $name: expected of $parts"; exit 2; }
done

measure() {
  [[ $wanted = "  " || $wanted = *" $1 "* ]] || return 0
  echo "== $* (after $SECONDS s)"
  "${@:2}" || failed+=("$1")
}

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv || exit 1
measure tests python -m pytest -m gpu                          # exact resume, kernels, fitting B
measure train python bench.py train $step --B 16 32 64 --repeats=4 --profile --out_dir=$out  # tokens/s, MFU, shares
measure sample python bench.py sample $sample --compile=False --out_dir=$out
measure choices python bench.py choices $step --B 32 --repeats=3 --out_dir=$out              # each made otherwise
measure muon python bench.py train $step --B 32 --repeats=3 --optimizer=muon --out_dir=$out/muon
measure data python bench.py data $step --out_dir=$out
measure compiled python bench.py sample $sample --compile --out_dir=$out/compiled
measure hellaswag python bench.py hellaswag --rows=1000 --out_dir=$out                      # `python hellaswag.py` fetches its rows
[ ${#failed[@]} -eq 0 ] && echo "all measured" || { printf 'failed: %s\n' "${failed[*]}"; exit 1; }
