#!/usr/bin/env bash
# On a machine with a GPU: build csrc, then one part, or several, of what only a GPU can show.
#
#   bash tools/gpu.sh OUT PART...     OUT/PART.tar.gz then holds every log, table, JSON and picture of the part
#
#   warm      compiles what update times, by many processes at once; beside tests, in the background
#   tests     GPU tests, the Triton kernels on the device, golden vectors, errors by precision: two minutes
#   cpu       the CPU's tests, for the sake of instruction sets that other machines lack
#   update    every kernel of the updates, MT10's against the reference, the linear layers against torch's: two minutes
#   benches   the update of MT50, the operation, acting, memory
#   sanitize  what the Triton kernels compile to there, and compute-sanitizer over them at small sizes
#   train     mt10-rand for four minutes, interrupted and resumed; mt50-rand for one
#   rates     steps/s, updates/s and idle shares of MT10 and MT50; environment steps alone
#
# What comes first matters most, and the archive is written after every step, so that a call that is cut off has shown
# what it could. A step that fails or takes too long is told, and the next one goes on.
# Needs a Python with torch, triton, numpy, pytest, hypothesis, psutil and matplotlib, and CMake; train, rates and some
# tests also EnvPool, Meta-World, Gymnasium, tyro, cattrs and tensorboard. Uses a copy of the tree and installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
usage="usage: tools/gpu.sh OUT warm|tests|cpu|update|benches|sanitize|train|rates ..."
out=${1:?$usage}
shift
: "${1:?$usage}"
mkdir -p "$out"
out=$(realpath "$out")

# As an installed package has it: d2r_fast.kernels is kernels/. A copy of the tree gives that without installing.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
cp -r d2r_fast tests benches examples csrc kernels setup.py README.md "$site/"
rm -rf "$site/d2r_fast/kernels"
cp -r kernels "$site/d2r_fast/kernels"
cd "$site"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
failed=()

# step NAME SECONDS LINES COMMAND...: run it, show the last LINES of what it says, and keep everything.
step() {
  local name=$1 limit=$2 lines=$3 begin=$SECONDS status=0
  shift 3
  timeout -k 10 "$limit" "$@" > "$results/$name.txt" 2>&1 || status=$?
  echo "== $name: $((SECONDS - begin)) s, exit status $status"
  tail -n "$lines" "$results/$name.txt"
  if [ "$status" != 0 ]; then failed+=("$name"); fi
  tar -C "$results" -czf "$out/$part.tar.gz" .
}

# in_background NAME SECONDS COMMAND...: as step, beside what follows; `wait` for all of them.
in_background() {
  local name=$1 limit=$2
  shift 2
  timeout -k 10 "$limit" "$@" > "$results/$name.txt" 2>&1 &
}

# Found in Triton's cache later.
warm() {
  local suite precision
  for suite in mt10 mt50; do
    for precision in tf32 bf16 float32; do
      in_background "${suite}_$precision" 200 python3 benches/update_kernels.py --suites "$suite" \
        --precisions "$precision" --rounds 1
    done
  done
  in_background linear_layers 200 python3 benches/linear_layers.py --rounds 1
  wait
}

tests() {
  local check backend dtype vectors
  # All at once: nothing here is timed, every shape is a kernel to compile, and a kernel that faults takes only the rest
  # of its own process with it.
  step tests 230 60 python3 -m pytest -q -n 12 -rfE --tb=short -p no:cacheprovider tests/gpu \
    tests/kernels/test_triton_kernels.py tests/kernels/test_update_kernels.py tests/kernels/test_linear_kernels.py \
    tests/kernels/test_layered_update.py
  wait
  for check in "reference float64" "reference float32" "triton float32"; do
    read -r backend dtype <<< "$check"
    for vectors in golden golden_baselines; do
      in_background "${vectors}_${backend}_$dtype" 60 \
        python3 tests/check_golden.py "tests/$vectors" --device cuda --backend "$backend" --dtype "$dtype"
    done
  done
  step precision_error 60 8 \
    python3 benches/precision_error.py --device cuda --json "$results/precision_error_cuda.json"
  wait
  tail -n 1 "$results"/golden*.txt
}

# The CPU's tests, for the sake of instruction sets that other machines lack.
cpu() {
  step cpu_tests 300 30 python3 -m pytest -q -n 14 -rfE --tb=short -p no:cacheprovider tests/ops tests/nets tests/nn \
    tests/learning
}

# update_step SUITE: all precisions, and traces of the last.
update_step() {
  step "update_step_$1" 120 90 python3 benches/update_step.py --suite "$1" --device cuda --rounds 200 \
    --precisions float32,tf32,bf16 --json "$results/update_step_$1_cuda.json" \
    --profile "$results/update_step_$1.trace.json"
}

update() {
  step update_kernels 120 120 python3 benches/update_kernels.py --suites mt10,mt50 --precisions float32,tf32,bf16 \
    --json "$results/update_kernels.json"
  update_step mt10
  step linear_layers 60 24 python3 benches/linear_layers.py --json "$results/linear_layers_cuda.json"
}

benches() {
  update_step mt50
  step acting 60 16 python3 benches/acting.py --device cuda --json "$results/acting_cuda.json"
  step update_memory 60 4 python3 benches/update_memory.py --suite mt10 --device cuda --updates 5000 \
    --json "$results/update_memory_mt10_cuda.json"
  step routed_modules 260 90 python3 benches/routed_modules.py --device cuda \
    --json "$results/routed_modules_cuda.json" --plots "$results"
}

sanitize() {
  local tool some
  step compile_report 130 30 python3 -m d2r_fast.kernels.compile_report --json "$results/triton_sm90.json"
  if ! command -v compute-sanitizer > /dev/null; then
    echo "== the rest of sanitize is left out: no compute-sanitizer on the PATH (it comes with the CUDA toolkit)"
    return
  fi
  # Every kernel, with tiles that are full and not, rows sorted and not, in every precision.
  some="(modules_match and (E1-B1- or E2-B17- or E1-B31- or E1-B130-))"
  some+=" or (routes_match and E2-B7-) or (grouping and sorted) or (accurate and nores)"
  # Of the update's own: neither the random segments, which are many, nor the largest replay.
  some+=" or gumbel or (squashed and 33-) or (test_losses and float32) or (the_step and aligned) or rows_are"
  # Of the linear layers: a single row, rows in splits, each precision.
  some+=" or (matches_float64 and (B1- or B600)) or (rounded_to_nearest and relu)"
  # Of an update's networks: parameters and rows that lie elsewhere, all gradients in one launch, the order of rows.
  some+=" or elsewhere or one_launch or tasks_row or stable_sort"
  # Memory straight from the driver, so that a tensor's end is an allocation's end.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    step "$tool" 170 8 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python3 -m pytest -q -x -p no:cacheprovider tests/kernels/test_triton_kernels.py \
      tests/kernels/test_update_kernels.py tests/kernels/test_linear_kernels.py -k "$some"
  done
  # The tests fill fresh memory, which would hide what this one looks for.
  step initcheck 80 8 compute-sanitizer --tool initcheck --error-exitcode 9 \
    python3 benches/precision_error.py --device cuda --rows 40
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

# train_for NAME SECONDS ARGUMENTS...: train, interrupt it as Ctrl-C would; it then saves, reports and ends by itself.
# --foreground: without it timeout signals its whole group, too, and a second SIGINT means to leave at once.
train_for() {
  local name=$1 seconds=$2
  shift 2
  step "$name" $((seconds + 60)) 40 timeout --foreground --preserve-status -s INT -k 50 "$seconds" \
    python3 -c 'import sys; from d2r_fast.cli import main; sys.exit(main(["train", *sys.argv[1:]]))' "$@"
}

train() {
  local run
  train_for train_mt10 240 mt10-rand --run-dir "$site/mt10" --eval.every-chunks 20
  train_for resume_mt10 40 --resume "$site/mt10"
  train_for train_mt50 75 mt50-rand --run-dir "$site/mt50" --eval.every-chunks 1000 --no-checkpoint-replay
  for run in mt10 mt50; do
    if [ -f "$run/metrics.jsonl" ]; then
      mkdir -p "$results/$run"
      cp "$run"/*.json "$run"/*.jsonl "$results/$run/"
      cp "$run"/*.png "$results/$run/" 2> /dev/null || true # a run cut short has none
    fi
  done
  tar -C "$results" -czf "$out/$part.tar.gz" .
}

rates() {
  local suite
  for suite in mt10 mt50; do
    step "training_$suite" 160 12 python3 benches/training.py --suite "$suite" --device cuda --seconds 80 \
      --json "$results/training_${suite}_cuda.json"
  done
  step rollout_mt10 100 12 python3 benches/rollout.py --suite mt10 --seconds 0.5 --repeats 2 --envs-per-task 1,4 \
    --json "$results/rollout_mt10.json"
  step rollout_mt50 100 12 python3 benches/rollout.py --suite mt50 --seconds 0.5 --repeats 2 --envs-per-task 1 \
    --json "$results/rollout_mt50.json"
}

for part in "$@"; do
  case $part in
    warm | tests | cpu | update | benches | sanitize | train | rates) ;;
    *) echo "$usage" >&2 && exit 2 ;;
  esac
  results=$(mktemp -d -p "$site")
  step machine 60 6 python3 -c 'import torch, triton; assert torch.cuda.is_available(), "no GPU: torch finds none"
print(torch.__version__, triton.__version__, torch.cuda.get_device_name())'
  if [ "${#failed[@]}" != 0 ]; then break; fi
  if [ "$part" != warm ] && ! [ -f d2r_fast/_cpu.so ]; then step build 90 5 python3 setup.py -q build_ext --inplace; fi
  "$part"
done
if [ "${#failed[@]}" != 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
