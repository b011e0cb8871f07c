#!/usr/bin/env bash
# Run the CUDA tests and all measurements on a GPU, in about half an hour on one H200 (estimated).
#     bash tools/gpu.sh [edu_fineweb10B]        # shards written by fineweb.py; default: the text of the demo
#     bash tools/gpu.sh input.txt tests train   # only these parts
# Tables are printed; JSON files and traces are written to $OUT (default: out/bench-gpu). A part that fails does not
# stop the others; the last line names the failed parts.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
trap 'exit 130' INT
data=${1:-input.txt}
wanted=" ${*:2} "
out=${OUT:-out/bench-gpu}
step="--models gpt2 --tokenizer=gpt2 --data=$data --T=1024 --total_batch_size=524288 --steps=3"
sample="--tokenizer=gpt2 --B 1 8 64 --uncached_stride=16"
failed=()
parts="tests train sample choices muon compiled hellaswag"

for name in $wanted; do
  [[ " $parts " = *" $name "* ]] || { echo "unknown part $name: expected some of $parts"; exit 2; }
done

part() {  # name, command: run the command if the part is wanted
  [[ $wanted = "  " || $wanted = *" $1 "* ]] || return 0
  echo "== $* (after $SECONDS s)"
  "${@:2}" || failed+=("$1")
}

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv || exit 1
bench="python -m tools.bench"
part tests python -m pytest -m gpu                                          # exact resume, kernels, micro-batch size
part train $bench train $step --B 16 32 64 --repeats=4 --profile --out_dir=$out    # tokens/s, MFU, time shares
part sample $bench sample $sample --compile=False --out_dir=$out
part choices $bench choices $step --B 32 --repeats=3 --out_dir=$out
part muon $bench train $step --B 32 --repeats=3 --optimizer=muon --out_dir=$out/muon
part compiled $bench sample $sample --compile --out_dir=$out/compiled
part hellaswag $bench hellaswag --rows=1000 --out_dir=$out
[ ${#failed[@]} -eq 0 ] && echo "all parts passed" || { printf 'failed: %s\n' "${failed[*]}"; exit 1; }
