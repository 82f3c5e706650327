"""Frames and files of videos; the episodes in them are those of the official environments."""

import importlib.util
import itertools
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from d2r_fast.analysis import video
from d2r_fast.analysis.video import RAN, SOLVED, draw_cell, frames, grid_shape, picture_size, write_video
from d2r_fast.envs import ALL_TASKS
from d2r_fast.envs.official_worker import make_envs
from d2r_fast.evaluation import film as filming
from d2r_fast.evaluation.film import Shot, WatchedPolicy, choose_renderer, film
from d2r_fast.nets.agent import Agent

TASKS = ("reach", "drawer-close", "push")


@pytest.fixture(scope="module")
def renders() -> None:
    try:
        choose_renderer()
    except ImportError as error:
        pytest.skip(str(error))


def shot(size: int, n_frames: int, n_modules: int = 4, success: bool = False) -> Shot:
    active = np.arange(n_modules) % 2 == np.arange(n_frames)[:, None] % 2
    picture = np.full((n_frames, size, size, 3), 128, np.uint8)
    return Shot(picture, np.arange(1, n_frames + 1), np.full(n_frames, success), active)


def has(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture == colour).all(-1).sum())


def test_a_cell_shows_modules_and_success():
    size = 96
    plain = np.asarray(draw_cell("reach", shot(size, 2), 0))
    assert plain.shape[1] == size and plain.shape[0] > size
    assert has(plain, SOLVED) == 0
    one = shot(size, 1)
    ran = [np.zeros((1, 4), bool), one.active, np.ones((1, 4), bool)]
    filled = [has(np.asarray(draw_cell("reach", one._replace(active=active), 0)), RAN) for active in ran]
    assert 0 < filled[0] < filled[1] < filled[2]  # an outline, two of four filled, all filled
    assert has(np.asarray(draw_cell("reach", shot(size, 1, 0), 0)), RAN) == 0  # no routes
    solved = np.asarray(draw_cell("reach", shot(size, 1, success=True), 0))
    assert has(solved, SOLVED) > 2 * size
    assert (plain[size // 2] == 128).mean() > 0.9  # the picture itself is left alone


def test_grids_leave_little_empty():
    assert [grid_shape(n) for n in (1, 2, 3, 4, 10, 50)] == [(1, 1), (2, 1), (2, 2), (2, 2), (5, 2), (10, 5)]
    for n in range(1, 51):
        columns, rows = grid_shape(n)
        assert n <= columns * rows <= n + 3


@pytest.mark.parametrize("n_tasks", [1, 3, 10, 50])
def test_grids_hold_every_task_and_fit_a_screen(n_tasks):
    tasks = ALL_TASKS[:n_tasks]
    shots = [shot(picture_size(n_tasks), 1, 16, success=k == n_tasks - 1) for k in range(n_tasks)]
    (picture,) = frames(tasks, shots)
    assert picture.shape[0] % 2 == picture.shape[1] % 2 == 0
    assert picture.shape[0] <= 1200 and picture.shape[1] <= 1920
    grey = (picture == 128).all(-1).sum() / shots[0].picture.shape[1] ** 2
    assert n_tasks - 1 < grey + 0.1 * n_tasks <= 1.1 * n_tasks
    assert has(picture, SOLVED) > 0


def read(path: Path) -> list[np.ndarray]:
    """The pictures of an mp4 or a GIF."""
    if path.suffix == ".gif":
        with Image.open(path) as image:
            return [np.asarray(image.convert("RGB")) for _ in _each(image)]
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return [np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader]


def _each(image: Image.Image):
    for f in range(image.n_frames):
        image.seek(f)
        yield f


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_files_hold_the_pictures(tmp_path, suffix):
    if suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        pytest.skip("mp4 needs imageio-ffmpeg")
    pictures = [np.full((64, 96, 3), 60 * f, np.uint8) for f in range(4)]
    for picture in pictures:
        picture[:32] = (200, 30, 30)
    path = tmp_path / f"video{suffix}"
    write_video(path, iter(pictures), 10)
    found = read(path)
    assert len(found) == 4
    for want, got in zip(pictures, found, strict=True):
        assert got.shape == want.shape
        assert np.abs(got.astype(int) - want).mean() < 12
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "video.gif"
    path.write_bytes(b"old")
    broken = itertools.chain([np.zeros((8, 8, 3), np.uint8)], (1 / 0 for _ in "a"))
    with pytest.raises(ZeroDivisionError):
        write_video(path, broken, 10)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_an_encoder_that_is_missing_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r"pip install 'd2r_fast\[video\]'"):
        video.check_encoder(Path("a.mp4"))
    video.check_encoder(Path("a.gif"))
    with pytest.raises(ValueError, match=r"ends in \.mp4 or \.gif, got a\.avi"):
        video.check_encoder(Path("a.avi"))


def test_a_machine_that_cannot_render_is_told_what_to_install(monkeypatch):
    def no_library(*args, **options):
        return subprocess.CompletedProcess(args, 1, "", "Traceback\nImportError: no libEGL.so\n")

    monkeypatch.setattr(filming.subprocess, "run", no_library)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    with pytest.raises(ImportError) as told:
        choose_renderer()
    for part in ("egl (ImportError: no libEGL.so), osmesa (", "libegl1", "libosmesa6"):
        assert part in str(told.value)
    assert "\n" not in str(told.value)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with pytest.raises(ImportError, match="tried MUJOCO_GL=osmesa \\("):
        choose_renderer()


def test_the_film_is_of_the_official_episodes(renders):
    torch.manual_seed(7)
    agent = Agent(39, 4, len(TASKS), tiny.NET)
    before = os.environ.get("MUJOCO_GL")
    (taken,) = film(WatchedPolicy(agent.actor), TASKS, [1], 2, 5, "random", 3, 64, 2, "corner4", 1)
    assert os.environ.get("MUJOCO_GL") == before
    assert taken.step.tolist() == [2, 4, 5] * 2
    assert taken.picture.shape == (6, 64, 64, 3) and taken.picture.std() > 20
    assert (taken.picture[0] != taken.picture[3]).any()  # another episode

    policy = WatchedPolicy(agent.actor)
    spec = {"tasks": TASKS[1:2], "envs_per_task": 1, "episode_length": 5, "goals": "random"}
    env = make_envs(spec | {"seed": 4, "worker": 0, "n_workers": 1}, SimpleNamespace(row=[0]))[0]
    active = []
    for _ in range(2):
        obs = env.reset()
        for _ in range(5):
            action = policy.eval_action(np.concatenate([obs, [0, 1, 0]])[None].astype(np.float32))
            obs = env.env.step(action[0])[0]
            active.append(policy.active[0])
    assert taken.active.tolist() == [active[i].tolist() for i in (1, 3, 4, 6, 8, 9)]
