#!/usr/bin/env bash
# All tests on one Python and one torch, against the package as pip installs it: a row of docs/matrix.md.
#   bash tools/matrix.sh PYTHON TORCH ENVS [pytest's arguments]      (make matrix PYTHON=... TORCH=... does this)
# Environment, a copy of the tests and the log lie in ENVS, in a folder that python and torch name; the checkout's own
# .venv stays as it is. Torch comes from where pip looks: PIP_INDEX_URL or PIP_FIND_LINKS lead it to a CPU build.
set -euo pipefail
python=$1 torch=$2 envs=$3
shift 3
row=$envs/python$("$python" -c 'import sys; print(*sys.version_info[:2], sep=".")')-torch$torch
mkdir -p "$row"
row=$(realpath "$row")

[ -x "$row/venv/bin/python" ] || "$python" -m venv "$row/venv"
"$row/venv/bin/python" -m pip install --quiet --upgrade pip -c constraints.txt
"$row/venv/bin/python" -m pip install --quiet "torch==$torch" '.[dev]' -c constraints.txt

# Beside the checkout's d2r_fast/, the tests would import that.
rm -rf "$row/suite"
mkdir "$row/suite"
cp -r tests benches examples pyproject.toml "$row/suite"
cd "$row/suite"
unset PYTHONPATH
status=0
"$row/venv/bin/python" -m pytest "$@" 2>&1 | tee "$row/log" || status=$?

"$row/venv/bin/python" - "$row/log" <<'END'
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

import torch

from d2r_fast.ops.cpp.library import instruction_sets

counts = re.findall(r"^=* *(\d+ (?:passed|failed|skipped|error).*?) *=*$", Path(sys.argv[1]).read_text(), re.MULTILINE)
print(
    f"matrix: python {platform.python_version()}, torch {torch.__version__}, triton {metadata.version('triton')}, "
    f"{' '.join(instruction_sets()) or 'no C++ kernels'}: {counts[-1] if counts else 'no test ran'}"
)
END
exit $status
