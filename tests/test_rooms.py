"""The package's rooms: what each is for stands in its `__init__.py`, and imports run downwards only."""

import ast
from pathlib import Path

import pytest

import d2r_fast

PACKAGE = Path(d2r_fast.__file__).parent

# Each may import those below it, and itself. A run's settings stand above networks, environments and operations, which
# say what a setting may be.
ROOMS = (
    "__main__ cli",
    "commands",
    "sweeps",
    "analysis",
    "training",
    "evaluation",
    "learning",
    "config_args",
    "config_json",
    "presets",
    "config",
    "nets",
    "envs",
    "nn",
    "ops kernels",  # an operation looks for its Triton kernels when it first needs them; they know its limits
    "host",
)
# Run by hand, and imported by no file of a room: they look at a whole update.
PROGRAMS = {"kernels/cost.py", "kernels/launches.py"}
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names.split()}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(name: str) -> str:
    """The room of a file's or a module's name within the package."""
    return Path(name.replace(".", "/")).parts[0]


def imported(path: Path) -> set[str]:
    """Rooms that a file imports from, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if node.module == "d2r_fast":
                names |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("d2r_fast."):
                names.add(node.module.removeprefix("d2r_fast."))
        elif isinstance(node, ast.Import):
            names |= {
                alias.name.removeprefix("d2r_fast.") for alias in node.names if alias.name.startswith("d2r_fast.")
            }
    return {room(name) for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    if path.relative_to(PACKAGE).as_posix() in PROGRAMS:
        return
    here = room(path.relative_to(PACKAGE).with_suffix("").as_posix())
    upwards = {name for name in imported(path) if LEVEL[name] < LEVEL[here]}
    assert not upwards


def test_every_room_says_what_it_is_for():
    for folder in {path.parent for path in FILES} - {PACKAGE}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))), folder


def test_an_import_upwards_is_seen(tmp_path):
    path = tmp_path / "file.py"
    path.write_text(
        "import d2r_fast.training.trainer\nfrom d2r_fast import cli\n\ndef f():\n    from d2r_fast.ops import x\n"
    )
    assert imported(path) == {"training", "cli", "ops"}
