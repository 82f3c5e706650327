"""Files that a command was asked to leave."""

from pathlib import Path

from d2r_fast.host.files import naming


def write_output(path: Path, text: str) -> None:
    """Write what a command was asked to leave at `path`, which may also be a pipe. OSError, naming it."""
    with naming(path):
        path.write_text(text, encoding="utf-8")


def check_output(path: Path | None) -> None:
    """OSError if no file can be written at `path`: better before a long measurement than behind it."""
    if path is not None:
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
