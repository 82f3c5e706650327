"""Hammer's scene with its goal where it stays, for EnvPool, made from the assets installed with it.

EnvPool writes the goal's place in the world into the model, where the site's place in its parent is expected. In the
installed scene the parent is the box, so every reset moves the goal by the box's position. A site of the world body has
the same coordinates in both, and (0.24, 0.74, 0.11) is where the box holds the goal.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ASSETS = Path("mujoco/metaworld/assets")
_SCENE = _ASSETS / "sawyer_xyz" / "sawyer_hammer.xml"
_SCENE_SHA256 = "6859b228be52aaa5d124dcc57271324ad62495f11d947c18cb1378290d03f754"
_LINKED = ("objects", "scene", "textures")
"""What the scene includes or EnvPool may look for beside it: links into the installed assets, not copies."""

_BOX = '        <body name="box" '
_GOAL_IN_BOX = '          <site name="goal" pos="0 -0.11 0.11" size="0.005" rgba="0 0.8 0 1"/>\n'
_GOAL_IN_WORLD = '        <site name="goal" pos="0.24 0.74 0.11" size="0.005" rgba="0 0.8 0 1"/>\n'


def hammer_base_path() -> str:
    """EnvPool's `base_path` for hammer: a folder with the corrected scene, in the user's cache, made where missing.

    Held against the installed assets at every call, and mended where it differs. Processes may do so at the same time.
    RuntimeError: the installed scene is not the one this correction was made for. OSError: the cache cannot be written.
    """
    from envpool.registration import asset_base_path

    installed = Path(asset_base_path("envpool_assets", str(_ASSETS)))
    original = (installed / _SCENE).read_bytes()
    if hashlib.sha256(original).hexdigest() != _SCENE_SHA256:
        raise RuntimeError(
            f"{installed / _SCENE}: expected the scene of envpool_assets 0.3.0 (SHA-256 {_SCENE_SHA256[:12]}...), got "
            'another, for which hammer has no correction; use engine="official" for this task'
        )
    corrected = original.replace(_GOAL_IN_BOX.encode(), b"").replace(_BOX.encode(), (_GOAL_IN_WORLD + _BOX).encode())

    # The installed assets' place is part of the key because the links lead there: two environments, two folders.
    key = hashlib.sha256(os.fsencode(installed) + b"\0" + corrected).hexdigest()[:16]
    base = _cache_dir() / f"hammer-{key}"
    try:
        _mend(base, installed, corrected)
    except OSError as error:
        raise OSError(f"cannot write {base} ({error}): set XDG_CACHE_HOME to a folder that can be written") from error
    return str(base)


def _cache_dir() -> Path:
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rules: a relative path is to be ignored.
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "d2r_fast"


def _mend(base: Path, installed: Path, corrected: bytes) -> None:
    # Each piece is put in place whole and at once. So a reader never meets half a file, and when two processes both
    # write a piece, the second replaces it by its equal.
    scene = base / _SCENE
    scene.parent.mkdir(parents=True, exist_ok=True)
    for name in _LINKED:
        link, target = base / _ASSETS / name, installed / _ASSETS / name
        if not link.is_symlink() or os.readlink(link) != str(target):
            with _put_whole(link) as fresh:
                fresh.symlink_to(target)
    if scene.is_symlink() or not scene.is_file() or scene.read_bytes() != corrected:
        with _put_whole(scene) as fresh:
            fresh.write_bytes(corrected)


@contextmanager
def _put_whole(at: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=at.parent) as folder:
        fresh = Path(folder) / at.name
        yield fresh
        fresh.replace(at)
