"""Episodes on the official environments as pictures, rendered without a display in worker processes."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from d2r_fast.envs import WorkerError
from d2r_fast.envs.metaworld import Goals
from d2r_fast.evaluation.policies import GreedyPolicy
from d2r_fast.evaluation.workers import worker_pool
from d2r_fast.ops import Routes, unpack_active

Camera = Literal["corner", "corner2", "corner3", "corner4", "topview", "behindGripper", "gripperPOV"]
"""The scenes' cameras."""

# Renders a sphere; MuJoCo decides at its import, and may end the process over a library that is missing.
_TRIAL = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    assert renderer.render().any()
print("rendered")
"""


class Shot(NamedTuple):
    """F pictures of one task's episodes, one episode after another."""

    picture: np.ndarray  # [F,size,size,3] uint8
    step: np.ndarray  # [F] within the episode, from 1
    success: np.ndarray  # [F] bool, at any step of the episode so far
    active: np.ndarray  # [F,N] bool, modules that the step ran; N is 0 without routes


class WatchedPolicy(GreedyPolicy):
    """A greedy policy that shows what its last step ran."""

    active = np.zeros((1, 0), bool)  # [rows,N]

    def count(self, task: Tensor, routes: Routes) -> None:
        super().count(task, routes)
        self.active = unpack_active(routes.active[0], self._ran.shape[1]).cpu().numpy()


def choose_renderer() -> str:
    """What MuJoCo can render with here, without a display: MUJOCO_GL where that is set, else "egl" or "osmesa".

    ImportError: nothing; the message says how to install it.
    """
    asked = os.environ.get("MUJOCO_GL")
    failed = []
    for name in (asked,) if asked else ("egl", "osmesa"):
        trial = subprocess.run(
            [sys.executable, "-c", _TRIAL], env=os.environ | {"MUJOCO_GL": name}, capture_output=True, text=True
        )
        if "rendered" in trial.stdout:
            return name
        said = [line for line in trial.stderr.splitlines() if line and line[0].isalpha() and ": " in line]
        failed.append(f"{name} ({said[0] if said else f'exit status {trial.returncode}'})")
    raise ImportError(
        f"MuJoCo cannot render without a display: tried MUJOCO_GL={', '.join(failed)}; on Debian or Ubuntu "
        "apt-get install libegl1 libgl1-mesa-dri gives EGL, apt-get install libosmesa6 OSMesa"
    )


def film(
    policy: WatchedPolicy,
    tasks: Sequence[str],
    shown: Sequence[int],
    episodes: int,
    episode_length: int,
    goals: Goals,
    seed: int,
    size: int,
    every: int,
    camera: Camera,
    n_workers: int,
    finished: Callable[[], object] = lambda: None,
) -> list[Shot]:
    """Play `episodes` of each of the tasks at positions `shown` among those the policy knows, with a picture of `size`
    pixels a side for every `every` steps and for an episode's last. Equal arguments give equal episodes.

    finished: called once a task.
    ImportError: as `choose_renderer`. WorkerError, naming the task: a worker failed.
    """
    renderer, before = choose_renderer(), os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = renderer  # read by the workers, when they import MuJoCo
    frozen = pickle.dumps(policy)
    shots: dict[int, Shot] = {}
    try:
        with worker_pool(min(n_workers, len(shown))) as pool:
            arguments = (len(tasks), episodes, episode_length, goals, seed, size, every, camera)
            jobs = {pool.submit(_film_task, frozen, tasks[k], k, *arguments): k for k in shown}
            for job in as_completed(jobs):
                if (error := job.exception()) is not None:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise WorkerError(f"filming {tasks[jobs[job]]} failed: {error!r}") from error
                shots[jobs[job]] = job.result()
                finished()
    finally:
        if before is None:
            del os.environ["MUJOCO_GL"]
        else:
            os.environ["MUJOCO_GL"] = before
    return [shots[k] for k in shown]


def _film_task(
    frozen: bytes,
    task: str,
    k: int,
    n_tasks: int,
    episodes: int,
    episode_length: int,
    goals: Goals,
    seed: int,
    size: int,
    every: int,
    camera: Camera,
) -> Shot:
    """In a worker: the shot of the task at position k."""
    import mujoco

    from d2r_fast.envs.official_worker import make_envs

    policy: WatchedPolicy = pickle.loads(frozen)
    spec = {"tasks": (task,), "envs_per_task": 1, "episode_length": episode_length, "goals": goals}
    # As OfficialEnvs: one goal a task depends on the task alone.
    spec |= {"seed": 0 if goals == "fixed" else seed + k, "worker": 0, "n_workers": 1}
    env = make_envs(spec, SimpleNamespace(row=[0]))[0]
    taken: list[tuple[Any, ...]] = []
    # The scenes' corner cameras hang upside down.
    turns = 2 if camera.startswith("corner") else 0
    with mujoco.Renderer(env.env.model, size, size) as renderer:
        for costly in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[costly] = False
        for _ in range(episodes):
            obs, success = env.reset(), False
            for step in range(1, episode_length + 1):
                rows = np.concatenate([obs, np.eye(n_tasks)[k]])[None].astype(np.float32)
                obs, _, _, _, info = env.env.step(policy.eval_action(rows)[0])
                success = success or bool(info["success"])
                if step % every == 0 or step == episode_length:
                    renderer.update_scene(env.env.data, camera)
                    taken.append((np.rot90(renderer.render(), turns), step, success, policy.active[0]))
    picture, steps, successes, active = zip(*taken, strict=True)
    return Shot(np.stack(picture), np.array(steps), np.array(successes), np.stack(active))
