#!/usr/bin/env bash
# Tests and measurements of NeoGPT on one GPU. Every part takes less than nine minutes and prints its rows as they come.
#     bash tools/gpu.sh PART …       # tests train choices resume muon sample hellaswag
#     DEVICE=cpu bash tools/gpu.sh train    # a dry run with the demo's model
# Tables and JSON files go to $OUT (default: out/bench-gpu). A part that fails does not stop the others.
# Prepare: DATA, shards of at least 10M tokens with GPT-2's vocabulary (default: edu_fineweb10B), for example
#     python fineweb.py --data='books-*.parquet' --shard_size=1000000 --out_dir=.cache/books
# Carry to a machine without network: these shards, HELLASWAG (its validation rows as a .jsonl file),
# TIKTOKEN_CACHE_DIR, and the packages that are missing there (tyro, docstring_parser and typeguard, on PYTHONPATH).
# `python` must be Python 3.11 or newer.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
trap 'exit 130' INT
export PYTHONUNBUFFERED=1
device=${DEVICE:-cuda} data=${DATA:-edu_fineweb10B} hellaswag=${HELLASWAG:-} out=${OUT:-out/bench-gpu}
tokenizer=gpt2 name=gpt2 T=1024 batch=524288 B="32 64" steps=40 kill=25 save=10 muon_steps=100 rows=10042 streams="1 8 64"
if [ "$device" = cpu ]; then  # a dry run of the same commands, with a small model
  tokenizer=bytes name=demo T=256 batch=2048 B=4 steps=8 kill=5 save=2 muon_steps=4 rows=20 streams=2
  data=${DATA:-input.txt} hellaswag=${HELLASWAG:-demo/hellaswag.jsonl}
fi
run="--device=$device --data=$data --tokenizer=$tokenizer --model=$name --T=$T --total_batch_size=$batch"
run="$run --hellaswag_data=$hellaswag --warmup_steps=10"
bench="--device=$device --tokenizer=$tokenizer --models $name --out_dir=$out"
step="$bench --data=$data --T=$T --total_batch_size=$batch --steps=3"

tests() { python -m pytest -m gpu tests/test_generate.py tests/test_train_gpt2.py; }
train() {
  for b in $B; do python -m tools.bench train $step --B $b --repeats=4 --profile --out_dir="$out/B$b" || return 1; done
}
choices() {
  python -m tools.bench choices $step --B ${B%% *} --repeats=4 \
    --only "not deterministic" "fp32 residual" "heads of 128" "vocabulary not padded"
}
resume() {  # a run that is killed and resumed, with another compile cache, against a whole run
  rm -rf "$out/whole" "$out/killed"
  options="$run --max_steps=$steps --eval_every=20 --hellaswag_every=0 --save_every=$save"
  python train_gpt2.py $options --out_dir="$out/whole" || return 1
  python train_gpt2.py $options --out_dir="$out/killed" & pid=$!
  until grep -qs "^$kill train" "$out/killed/log.txt"; do sleep 0.1; kill -0 $pid || return 1; done
  kill -9 $pid; wait $pid
  TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) python train_gpt2.py $options --out_dir="$out/killed" || return 1
  PYTHONPATH="tests:.:${PYTHONPATH:-}" python -c "import harness, pathlib, sys
harness.assert_same_run(*map(pathlib.Path, sys.argv[1:]))
assert 'continuing' in harness.notes(pathlib.Path(sys.argv[1])); print('resumed: the same log and weights, bit for bit')" \
    "$out/killed" "$out/whole"
}
muon() {
  rm -rf "$out/muon"
  python train_gpt2.py $run --optimizer=muon --max_lr=2e-3 --max_steps=$muon_steps --eval_every=50 \
    --hellaswag_every=$muon_steps --hellaswag_rows=$rows --save_every=1000 --out_dir="$out/muon"
}
sample() { python -m tools.bench sample $bench --B $streams --repeats=3; }
hellaswag() { python -m tools.bench hellaswag $bench --data=$hellaswag --rows=$((rows / 10)) --repeats=3; }

[ $# -gt 0 ] || set -- tests train choices resume muon sample hellaswag
mkdir -p "$out"
[ "$device" = cpu ] || nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv || exit 1
failed=()
for part in "$@"; do
  echo "== $part (after $SECONDS s)"
  [ "$(type -t "$part")" = function ] || { echo "unknown part $part"; failed+=("$part"); continue; }
  $part 2>&1 | tee "$out/$part.txt" || failed+=("$part")
done
[ ${#failed[@]} -eq 0 ] && echo "all parts passed" || { printf 'failed: %s\n' "${failed[*]}"; exit 1; }
