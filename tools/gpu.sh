#!/usr/bin/env bash
# On a machine with a GPU: all GPU tests and golden vectors, results under $OUT (or the folder given).
#
#   bash tools/gpu.sh [OUT]
#
# Needs a Python with torch, numpy and pytest; uses the tree as it stands, nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:?usage: tools/gpu.sh OUT}}
mkdir -p "$out"

# As an installed package has it: d2r_fast.kernels is kernels/. A copy of the tree gives that without installing.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
cp -r d2r_fast tests "$site/"
cp -r kernels "$site/d2r_fast/kernels"
out=$(realpath "$out")
cd "$site"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"

python3 -c 'import torch; assert torch.cuda.is_available(), "no GPU: torch finds none"; print(torch.__version__, torch.cuda.get_device_name())' \
  | tee "$out/machine.txt"
status=0
python3 -m pytest -q -p no:cacheprovider tests/test_gpu.py 2>&1 | tee "$out/gpu_tests.txt" || status=1
# The kernels on the device, and what they compile to with the Triton of this machine.
python3 -m pytest -q -p no:cacheprovider tests/test_triton_kernels.py tests/test_triton_compile.py 2>&1 \
  | tee "$out/triton_tests.txt" || status=1
python3 -m d2r_fast.kernels.compile_report --json "$out/triton_sm90.json" | tee "$out/triton_sm90.txt" || status=1
for dtype in float64 float32; do
  python3 tests/check_golden.py tests/golden --device cuda --dtype "$dtype" > "$out/golden_$dtype.txt" || status=1
  tail -1 "$out/golden_$dtype.txt"
done
exit $status
