"""csrc/ built with AddressSanitizer, then with UndefinedBehaviorSanitizer, under the operations' tests and odd calls.

    python tests/campaigns/sanitizers.py [--only address|undefined] [--count 300] [--seed S]

Needs CMake, GCC and its sanitizers. The package is copied to a temporary folder with the instrumented library in it;
there run the test files below, on every instruction set, and `--count` calls of illegal_calls.py. A report of a
sanitizer ends the process it is in: the tests have then failed, or that call has crashed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPERATIONS = (
    *("select_routes", "routed_modules", "ensemble_linear", "routed_network"),
    *("layer_chain", "expert_sum", "module_levels", "task_linear"),
)
TESTS = [*(f"tests/ops/test_{name}.py" for name in OPERATIONS), "tests/learning/test_update.py"]
# A report must end the process: what goes on after one is easily overlooked. Leaks are Python's and torch's.
OPTIONS = {
    "address": ("ASAN_OPTIONS", "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1"),
    "undefined": ("UBSAN_OPTIONS", "print_stacktrace=1:abort_on_error=1"),
}
FLAGS = {
    "address": "-fsanitize=address",
    # torch's own classes are not instrumented, so their run-time types cannot be checked.
    "undefined": "-fsanitize=undefined,float-cast-overflow -fno-sanitize=vptr -fno-sanitize-recover=all",
}
RUNTIME = {"address": "libasan.so", "undefined": "libubsan.so"}


def build(sanitizer: str, folder: Path) -> None:
    """The package and its tests in `folder`, with the instrumented library."""
    for name in ("d2r_fast", "kernels", "tests", "benches"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"), symlinks=True
        )
    shutil.copy(ROOT / "pyproject.toml", folder)
    if not (folder / "d2r_fast/kernels").exists():
        (folder / "d2r_fast/kernels").symlink_to("../kernels")
    # Instrumented code hides from GCC that what it warns of cannot happen.
    flags = f"{FLAGS[sanitizer]} -fno-omit-frame-pointer -g1 -Wno-maybe-uninitialized"
    settings = [f"-DCMAKE_CXX_FLAGS={flags}", "-DCMAKE_CXX_COMPILER=g++"]
    made = folder / "build"
    subprocess.run(
        ["cmake", "-S", str(ROOT / "csrc"), "-B", str(made), *settings], check=True, stdout=subprocess.DEVNULL
    )
    subprocess.run(
        ["cmake", "--build", str(made), "--parallel", str(os.cpu_count() or 1)], check=True, stdout=subprocess.DEVNULL
    )
    shutil.copy(made / "_cpu.so", folder / "d2r_fast")


def environment(sanitizer: str, folder: Path) -> dict[str, str]:
    def library(name: str) -> str:
        found = subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
        return found.stdout.strip()

    # Without the C++ runtime there from the start, AddressSanitizer does not find what it wraps around an exception.
    preload = f"{library(RUNTIME[sanitizer])} {library('libstdc++.so.6')}"
    own = {"LD_PRELOAD": preload, "PYTHONPATH": str(folder), "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    variable, options = OPTIONS[sanitizer]
    # To a file: pytest, which holds what is printed until a test is over, does not outlive a report.
    return os.environ | own | {variable: f"{options}:log_path={folder / 'report'}"}


def check(sanitizer: str, count: int, seed: int) -> tuple[int, int, int]:
    """Tests passed, calls tried, findings."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(sanitizer, folder)
        env = environment(sanitizer, folder)
        loaded = "from d2r_fast.ops.cpp.library import LIBRARY, instruction_sets as i; print(LIBRARY, *i())"
        subprocess.run([sys.executable, "-c", loaded], check=True, cwd=folder, env=env)
        # A compiled graph starts a compiler, which has its own ideas about what is preloaded.
        tests = [
            sys.executable,
            "-m",
            "pytest",
            *TESTS,
            "-q",
            "-p",
            "no:cacheprovider",
            "--durations=0",
            "-k",
            "not compile",
        ]
        ran = subprocess.run(tests, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        passed = re.search(r"(\d+) passed", ran.stdout)
        findings = 0 if ran.returncode == 0 and passed else 1
        if findings:
            print(f"{sanitizer}: pytest ended with {ran.returncode}\n{ran.stdout[-3000:]}", flush=True)
        calls = [sys.executable, "tests/campaigns/illegal_calls.py", f"--count={count}", f"--seed={seed}"]
        ran = subprocess.run(calls, cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
        print(ran.stdout, end="", flush=True)
        findings += ran.returncode != 0
        tried = re.search(r"tried (\d+)", ran.stdout)
        for report in sorted(folder.glob("report*")):
            findings += 1
            print(report.read_text(errors="replace")[:6000], flush=True)
        return int(passed[1]) if passed else 0, int(tried[1]) if tried else 0, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(FLAGS))
    parser.add_argument("--count", type=int, default=300, help="calls of illegal_calls.py")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    failed = 0
    for sanitizer in [a.only] if a.only else sorted(FLAGS):
        passed, tried, findings = check(sanitizer, a.count, a.seed)
        print(f"{sanitizer}: {passed} tests passed, {tried} calls tried, findings {findings}", flush=True)
        failed += findings
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
