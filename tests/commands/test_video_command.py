"""`d2r video` on a tiny run."""

import contextlib
import io
from pathlib import Path

import pytest
import tiny
from PIL import Image

from d2r_fast import cli
from d2r_fast.evaluation.film import choose_renderer
from d2r_fast.training.trainer import Trainer


def d2r(*args: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(args))
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "run"
    Trainer(tiny.RUN, path, show_progress=False).run()
    return path


def test_a_gif_of_one_task(run_dir, tmp_path):
    try:
        choose_renderer()
    except ImportError as error:
        pytest.skip(str(error))
    out = tmp_path / "video.gif"
    options = ("--tasks", "drawer-close", "--steps", "4", "--size", "64", "--out", str(out))
    code, told, _ = d2r("video", str(run_dir), *options)
    assert code == 0
    assert told.splitlines()[0].split() == ["drawer-close", "0", "of", "1", "episodes", "succeed"]
    assert told.splitlines()[1].startswith(f"video      {out} (0.1 s")
    with Image.open(out) as image:
        assert image.n_frames == 2 and image.width == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "push"], "--tasks: expected tasks of the run (reach, drawer-close), got push"),
        (["--steps", "501"], "--steps: expected 1..500, got 501"),
        (["--episodes", "0"], "--episodes: expected 1..1000, got 0"),
        (["--size", "9"], "--size: expected 64..480, got 9"),
        (["--fps", "nan"], "--fps: expected 1..120, got nan"),
        (["--seed", "-1"], "--seed: expected 0..2**31-51, got -1"),
        (["--out", "a.avi"], "--out: expected a name that ends in .mp4 or .gif, got a.avi"),
    ],
)
def test_options_out_of_range_are_one_line(run_dir, options, message):
    code, out, err = d2r("video", str(run_dir), *options)
    assert (code, out, err) == (1, "", f"d2r video: {message}\n")
