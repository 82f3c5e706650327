"""What README.md and docs/ tell a reader to run, is run here, unless the page says why not."""

import os
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny

from d2r_fast.cli import main
from d2r_fast.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]) if (ROOT / "docs").is_dir() else []
pytestmark = pytest.mark.skipif(not PAGES, reason="the pages lie in the checkout, and the tests are elsewhere")


class Block(NamedTuple):
    """A block of code on a page; `excuse` is what the comment before it gives as the reason not to run it."""

    language: str
    text: str
    excuse: str


def blocks_of(page: Path) -> list[Block]:
    found = re.findall(
        r"^(?:<!-- not run: ([^\n]*?) -->\n+)?```(\w*)\n(.*?)^```$",
        page.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    return [Block(language, text, excuse) for excuse, language, text in found]


def commands(block: Block) -> list[str]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which `runs/mine` is a finished run."""
    where = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        assert Trainer(tiny.RUN, Path("runs/mine"), show_progress=False).run()
    return where


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page, finished_run, monkeypatch, capsys):
    monkeypatch.chdir(finished_run)
    for block in blocks_of(page):
        if block.language != "sh" or block.excuse:
            continue
        for command in commands(block):
            program, *args = shlex.split(command, comments=True)
            assert program in ("d2r", ".venv/bin/d2r"), f"{page.name} tells to run, without an excuse: {command}"
            status: Any
            try:
                status = main(args)
            except SystemExit as end:  # --help
                status = end.code
            assert status in (0, None), f"{page.name}: {command}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs(page, tmp_path, monkeypatch):
    """A page is one program: later blocks see the names of earlier ones."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks_of(page):
        if block.language == "python" and not block.excuse:
            exec(compile(block.text, str(page), "exec"), names)


def test_most_is_run():
    blocks = [block for page in PAGES for block in blocks_of(page)]
    run = [block for block in blocks if block.language in ("sh", "python") and not block.excuse]
    assert sum(len(commands(block)) for block in run if block.language == "sh") >= 9
    assert sum(block.language == "python" for block in run) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:benches|docs|tests|kernels|csrc|tools|examples)/[\w./-]+|d2r_fast/[\w/-]+\.py)`", text)
    paths += [
        os.path.normpath(page.parent.relative_to(ROOT) / link) for link in re.findall(r"\]\((?!http|#)([^)]+)", text)
    ]
    missing = [path for path in paths if not (ROOT / path.partition("#")[0]).exists()]
    assert not missing, f"{page.name} names {missing}"
