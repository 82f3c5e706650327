#!/usr/bin/env bash
# On a machine with a GPU: build csrc, run the GPU tests, then the benchmarks; everything lands under $OUT (or the folder given).
#
#   bash tools/gpu.sh [OUT] [tests|benches|all]
#
# Needs a Python with torch, triton, numpy, pytest and hypothesis, and CMake; uses a copy of the tree, installs nothing.
# Tests and benches together take under ten minutes; a call that must be shorter can name one of them.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:?usage: tools/gpu.sh OUT [tests|benches|all]}}
part=${2:-all}
mkdir -p "$out"

# As an installed package has it: d2r_fast.kernels is kernels/. A copy of the tree gives that without installing.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
cp -r d2r_fast tests benches csrc kernels setup.py README.md "$site/"
cp -r kernels "$site/d2r_fast/kernels"
out=$(realpath "$out")
cd "$site"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"

python3 -c 'import torch, triton; assert torch.cuda.is_available(), "no GPU: torch finds none"; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())' \
  | tee "$out/machine.txt"
status=0
python3 setup.py -q build_ext --inplace > "$out/build.txt" 2>&1 || status=1
python3 -c 'from d2r_fast.ops.backends import availability; print(availability())' | tee -a "$out/machine.txt"

if [ "$part" != benches ]; then
  # Each file in its own process: a kernel that faults takes the device with it.
  for tests in test_gpu test_triton_kernels test_triton_compile test_routed_modules test_select_routes test_ensemble_linear; do
    timeout 240 python3 -m pytest -q -p no:cacheprovider "tests/$tests.py" > "$out/$tests.txt" 2>&1 || status=1
    tail -1 "$out/$tests.txt" | sed "s/^/$tests: /"
  done
  python3 -m d2r_fast.kernels.compile_report --json "$out/triton_sm90.json" > "$out/triton_sm90.txt" || status=1
  for check in "reference float64" "reference float32" "triton float32"; do
    read -r backend dtype <<< "$check"
    python3 tests/check_golden.py tests/golden --device cuda --backend "$backend" --dtype "$dtype" \
      > "$out/golden_${backend}_$dtype.txt" || status=1
    echo "golden $check: $(tail -1 "$out/golden_${backend}_$dtype.txt")"
  done
fi

if [ "$part" != tests ]; then
  timeout 240 python3 benches/routed_modules.py --device cuda --json "$out/routed_modules_cuda.json" --plots "$out" \
    > "$out/routed_modules_cuda.txt" 2>&1 || status=1
  cat "$out/routed_modules_cuda.txt"
  for suite in mt10 mt50; do
    timeout 150 python3 benches/update_step.py --suite "$suite" --device cuda --rounds 200 --precisions float32,tf32,bf16 \
      --json "$out/update_step_${suite}_cuda.json" --profile "$out/update_step_$suite.trace.json" \
      > "$out/update_step_$suite.txt" 2>&1 || status=1
    cat "$out/update_step_$suite.txt"
  done
fi
exit $status
