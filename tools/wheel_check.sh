#!/usr/bin/env bash
# The wheel of `make wheel` in a fresh environment: core alone, then with the training extra.
#   bash tools/wheel_check.sh PYTHON TORCH ENVS      (make wheel-check PYTHON=... TORCH=... does this)
# It is installed and run in a folder of its own under ENVS, away from the checkout; the folder is removed at the end.
set -euo pipefail
python=$1 torch=$2 envs=$3
wheel=$(realpath dist/*-py3-none-linux_*.whl)
[ -f "$wheel" ] || { echo "expected a wheel in dist/, make wheel builds it" >&2; exit 1; }
mkdir -p "$envs"
folder=$(realpath "$(mktemp -d -p "$envs" wheel-XXXX)")
trap 'rm -rf "$folder"' EXIT
cp -r tests/check_golden.py tests/golden tests/golden_baselines constraints.txt "$folder"
cd "$folder"
unset PYTHONPATH

"$python" -m venv venv
venv/bin/python -m pip install --quiet "torch==$torch" "$wheel" -c constraints.txt
venv/bin/d2r info
if venv/bin/d2r train quick; then
  echo "expected d2r train to need the training extra" >&2
  exit 1
fi
for vectors in golden golden_baselines; do
  venv/bin/python check_golden.py "$vectors" --backend cpp | tail -n 1
  venv/bin/python check_golden.py "$vectors" --backend cpp --dtype float32 | tail -n 1
done
venv/bin/python -m pip install --quiet "$wheel[train]" -c constraints.txt
venv/bin/d2r info
echo "wheel-check: $(basename "$wheel") runs on $(venv/bin/python --version), torch $torch"
