"""The recorded vectors of the published implementation, and the command that checks them."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from check_golden import LIMIT, check_directory, main
from conftest import cpp_backends

from d2r_fast.ops.backends import availability

GOLDEN = Path(__file__).parents[1] / "golden"
BASELINES = Path(__file__).parents[1] / "golden_baselines"
SMALL = GOLDEN / "network_greedy_train.npz"


def run_main(monkeypatch, capsys, *args):
    """Exit code and last printed line of `python tests/check_golden.py ARGS`."""
    monkeypatch.setattr(sys, "argv", ["check_golden.py", *map(str, args)])
    code = main()
    return code, capsys.readouterr().out.splitlines()[-1]


def tamper(source: Path, target: Path, name: str, at: tuple[int, ...], value: float) -> None:
    """Copy a vector with one number of one array replaced by the sum of itself and `value`."""
    with np.load(source, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    arrays[name][at] += value
    np.savez(target, **arrays)


# Triton's interpreter is slow, and float64 says more than float32.
on_every_backend = pytest.mark.parametrize(
    ("dtype", "backend"),
    [(d, b) for d in ("float64", "float32") for b in ("reference", *cpp_backends())] + [("float64", "triton")],
    indirect=["backend"],
)


@on_every_backend
@pytest.mark.parametrize(
    ("vectors", "least", "least_in_short"),
    [(GOLDEN, (11, 475), (9, 250)), (BASELINES, (16, 1093), (9, 274))],
    ids=["d2r", "baselines"],
)
def test_recorded_vectors(vectors, least, least_in_short, dtype, backend, tmp_path):
    if backend == "triton" and not availability()["triton"].startswith("ready (interpreted"):
        pytest.skip("on a GPU tests/gpu/test_gpu.py checks them; elsewhere Triton must be installed")
    if backend == "triton":
        # In short, for all take two minutes (`TRITON_INTERPRET=1 python tests/check_golden.py DIR --backend triton`):
        # one of each other network's two, and the update with an extreme task, which for the rest is a plain one.
        less = shutil.ignore_patterns("*_2.npz", "update_plain.npz", "update_terminal.npz")
        vectors, least = shutil.copytree(vectors, tmp_path / "vectors", ignore=less), least_in_short
    lines = []
    done = check_directory(vectors, dtype, lines.append, backend=backend)
    print(f"{done.n_files} files, {done.n_quantities} quantities, worst {done.worst:.2e}")
    assert LIMIT == {"float64": 1e-9, "float32": 1e-4}
    assert done.worst <= LIMIT[dtype]
    assert not done.beyond
    assert done.n_files == len(list(vectors.glob("*.npz"))) >= least[0]
    assert done.n_quantities == len(lines) >= least[1]
    assert {line.split()[0] for line in lines} == {path.name for path in vectors.glob("*.npz")}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_command_reports_and_exits_with_0(dtype, tmp_path, monkeypatch, capsys):
    shutil.copy(SMALL, tmp_path)
    code, last = run_main(monkeypatch, capsys, tmp_path, "--dtype", dtype)
    assert code == 0
    n_quantities, worst = re.fullmatch(r"1 files, (\d+) quantities, worst (\d\.\d\de[+-]\d\d)", last).groups()
    assert int(n_quantities) > 15
    assert float(worst) <= LIMIT[dtype]


def test_command_exits_with_1_on_an_empty_directory(tmp_path, monkeypatch, capsys):
    assert run_main(monkeypatch, capsys, tmp_path) == (1, "0 files, 0 quantities, worst 0.00e+00")


@pytest.mark.parametrize(
    ("file", "name", "at", "value"),
    [
        ("network_greedy_train.npz", "out", (3, 2), 1e-7),
        ("network_greedy_train.npz", "out", (3, 2), float("nan")),
        ("network_greedy_train.npz", "param/depth_route_net.module_fcs.2.weight", (1, 1), 1e-3),
        ("network_greedy_train.npz", "grad/base.fc0.weight", (0, 0), 1e-2),
        ("update_plain.npz", "after/target2/last.bias", (0,), 1e-7),
        ("update_plain.npz", "grad_norm/critic1", (), 1e-4),
        ("moore_2.npz", "grad_obs", (3, 2), 3e-9),  # as far as its norms with and without their epsilon
        ("paco_1.npz", "grad/task.bias", (1,), 1e-6),
        ("soft_modules_2.npz", "aux/gates.3", (1, 2), 1e-7),
        ("paco_reset_1.npz", "weight_after", (0, 1), 1e-7),
    ],
)
def test_command_exits_with_1_on_a_tampered_vector(file, name, at, value, tmp_path, monkeypatch, capsys):
    source = next(folder / file for folder in (GOLDEN, BASELINES) if (folder / file).exists())
    tamper(source, tmp_path / file, name, at, value)
    code, last = run_main(monkeypatch, capsys, tmp_path)
    assert code == 1
    assert re.fullmatch(r"1 files, \d+ quantities, worst (inf|\d\.\d\de[+-]\d\d)", last)


def test_a_missing_directory_and_an_unknown_vector_are_errors(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, capsys, tmp_path / "nowhere")
    assert stopped.value.code == 2
    shutil.copy(SMALL, tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"other\.npz: expected a name that starts with network_ or update_ or "):
        run_main(monkeypatch, capsys, tmp_path)
