"""The Triton kernels' own tests on an emulated device: their sm_90 code, instruction by instruction, without a GPU.

    python tests/ptx/check_kernels.py [--json FILE] [-- PYTEST ARGUMENTS]

Compiles each launch as the just-in-time compiler would, and runs its PTX thread by thread, so that what only shows
between threads shows: a race, a barrier that some threads miss, a copy read before it is awaited, an address outside an
allocation, memory that nobody wrote; and results are held against the tests' float64 references. One line a test that
fails and a finding, a table of the kernels, and counts at the end; its exit status is 0 if nothing was found. It takes
eight minutes on one core; `-- -k WORD` runs a part.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parents[1]
FILES = [f"kernels/test_{name}_kernels.py" for name in ("triton", "linear", "update")]
FILES += ["kernels/test_layered_update.py", "ptx/more_sizes.py"]


def check(arguments: Sequence[str]) -> int:
    """Run the tests with these arguments of pytest; its exit status."""
    # Read when a kernel is defined; and the tests choose a GPU if there is one.
    os.environ |= {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    sys.path.insert(0, str(TESTS))
    import pytest

    files = [] if any(".py" in argument for argument in arguments) else [str(TESTS / name) for name in FILES]
    return int(pytest.main(["-q", "-p", "ptx.plugin", "-p", "no:cacheprovider", "--tb=line", *files, *arguments]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the table here as well")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    arguments = parser.parse_args()
    status = check(arguments.pytest)
    from ptx.plugin import messages, seen

    for message in messages:
        print(message)
    form = "{:36} {:9} {:>6} {:>9} {:>18} {:>9}"
    print(form.format("kernel", "precision", "tests", "launches", "warp instructions", "findings"))
    for key, row in sorted(seen.items()):
        print(form.format(*key, *row))
    print(f"{sum(row.launches for row in seen.values())} launches, findings {len(messages)}, tests' status {status}")
    if arguments.json is not None:
        rows = [{"kernel": kernel, "precision": p} | row._asdict() for (kernel, p), row in sorted(seen.items())]
        lines = ",\n".join(json.dumps(row) for row in rows)
        arguments.json.write_text(f'{{"command": "python tests/ptx/check_kernels.py", "rows": [\n{lines}\n]}}\n')
    return int(status != 0 or bool(messages))


if __name__ == "__main__":
    sys.exit(main())
