"""The policies in agents/: small, readable, and as good as their tables say, as far as a few episodes can tell."""

from pathlib import Path

import pytest

from d2r_fast.cli import main
from d2r_fast.training.saved_run import read_saved_run

AGENTS = Path(__file__).parents[2] / "agents"
FOLDERS = sorted(path.parent for path in AGENTS.glob("*/policy.json"))
pytestmark = pytest.mark.skipif(not FOLDERS, reason="agents/ lies in the checkout, and the tests are elsewhere")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_policy_is_read_and_its_table_is_its_own(folder):
    saved = read_saved_run(folder)
    table = (AGENTS / "README.md").read_text()
    assert f"| {folder.name} (seed {saved.cfg.seed}, " in table
    assert all(f"| {task} |" in table for task in saved.cfg.task_names)


def test_the_quick_policy_closes_drawers(capsys, tmp_path):
    assert main(["eval", str(AGENTS / "quick"), "--episodes", "8"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("drawer-close")]
    assert float(line.split()[1]) >= 0.75


def test_all_of_them_are_a_small_download():
    assert sum(path.stat().st_size for path in AGENTS.rglob("*") if path.is_file()) < 5 * 2**20
