"""A process that steps environments of the official metaworld package for `OfficialEnvs`: python -P THIS_FILE JSON.

It runs as a file and imports nothing of d2r_fast, for d2r_fast imports torch. numpy is all that the parent needs of it.

Over the socket comes one byte a round, RESET or STEP; back goes one byte DONE, or FAILED and the traceback. The numbers
travel in shared memory. Row r is environment r % n of task r // n; worker w has the rows w, w + W, w + 2W, ..., so that
each worker has its share of every task and none waits for the one with the slow tasks.
"""

import copy
import json
import mmap
import os
import socket
import sys
import threading
import time
import traceback
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np

RESET, STEP, DONE, FAILED = b"R", b"S", b"D", b"F"
N_GOALS = 50
"""Goals a task in the package's benchmarks."""


def shared_arrays(memory: mmap.mmap | None, n_rows: int, n_workers: int) -> tuple[SimpleNamespace, int]:
    """The arrays of `memory`, by name, and the bytes they take; without `memory` only the latter."""
    fields = {
        "row": (np.int64, (n_workers,)),  # what each worker is at: tells whose simulation killed it
        "action": (np.float32, (n_rows, 4)),
        "obs": (np.float32, (n_rows, 39)),
        "next_obs": (np.float32, (n_rows, 39)),
        "reward": (np.float32, (n_rows,)),
        "truncated": (np.bool_, (n_rows,)),
        "success": (np.bool_, (n_rows,)),
    }
    arrays, at = SimpleNamespace(), 0
    for name, (dtype, shape) in fields.items():
        count = int(np.prod(shape))
        if memory is not None:
            setattr(arrays, name, np.frombuffer(memory, dtype, count, at).reshape(shape))
        at += count * np.dtype(dtype).itemsize
    return arrays, at


def main() -> None:
    spec = json.loads(sys.argv[1])
    threading.Thread(target=leave_with_parent, args=(spec["parent"],), daemon=True).start()
    control = socket.socket(fileno=spec["socket"])
    n_rows = len(spec["tasks"]) * spec["envs_per_task"]
    _, n_bytes = shared_arrays(None, n_rows, spec["n_workers"])
    shared, _ = shared_arrays(mmap.mmap(spec["memory"], n_bytes), n_rows, spec["n_workers"])
    try:
        serve(control, shared, make_envs(spec, shared), spec)
    except ConnectionError:
        pass  # the parent is gone
    except Exception:
        control.sendall(FAILED + traceback.format_exc().encode())


def leave_with_parent(parent: int) -> None:
    # The end of the socket's stream is not enough: another child of the parent may hold a copy of its end.
    # PR_SET_PDEATHSIG would strike when the *thread* that made the environments ends.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def make_envs(spec: dict[str, Any], shared: SimpleNamespace) -> dict[int, "Env"]:
    """This worker's environments by row."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    lighten_reward()
    # As the package's benchmarks do: one stream for the goals of all tasks, in the order of the list.
    np.random.seed(spec["seed"])  # noqa: NPY002
    envs = {}
    n, worker, n_workers = spec["envs_per_task"], spec["worker"], spec["n_workers"]
    for k, task in enumerate(spec["tasks"]):
        rows = [row for row in range(k * n, (k + 1) * n) if row % n_workers == worker]
        shared.row[worker] = k * n
        env_class = lighten(ALL_V3_ENVIRONMENTS[f"{task}-v3"])
        goals = None
        if spec["goals"] == "fixed" and rows:
            # Of the seed and the task alone: neither the other tasks nor the number of environments move it.
            np.random.seed(spec["seed"])  # noqa: NPY002
            goals = draw_goals(env_class, 1)
        elif spec["goals"] == "official":
            goals = draw_goals(env_class, N_GOALS)
        for row in rows:
            shared.row[worker] = row
            envs[row] = Env(env_class, spec["seed"] + row, goals, spec["episode_length"])
    read_scene.cache_clear()
    return envs


def draw_goals(env_class: type, count: int) -> np.ndarray:
    """The first `count` goals [count,G] that metaworld's benchmarks make out of numpy's global stream.

    The benchmarks reset an environment for each. Its simulation plays no part in the draw and is left out.
    """
    env = env_class()
    env.do_simulation = lambda ctrl, n_frames: None
    env._freeze_rand_vec = False
    goals = []
    for _ in range(count):
        env.reset()
        goals.append(env._last_rand_vec)
    return np.array(goals)


class Env:
    """One bare environment that begins its episodes by itself; goals None: drawn anew from the continuous range."""

    def __init__(self, env_class: type, seed: int, goals: np.ndarray | None, episode_length: int):
        env: Any = env_class()
        env._set_task_called = True
        env._partially_observable = False
        # It was made for hidden goals, and its bounds would clip a visible one to zero. The next use makes it anew.
        del env.sawyer_observation_space
        env._freeze_rand_vec = True
        env.seeded_rand_vec = True  # draws from the environment's own stream, not from numpy's global one
        env.seed(seed)
        env.max_path_length = episode_length  # one step more would raise
        self.env, self.goals = env, goals

    def reset(self) -> np.ndarray:
        if self.goals is not None:
            # The draw of metaworld's RandomTaskSelectWrapper.
            self.env._last_rand_vec = self.goals[self.env.np_random.choice(len(self.goals))]
        else:
            # The package's reset places everything twice. Drawing anew each time, as it does when not frozen, leaves
            # dial-turn and disassemble with the object of the first draw and the goal of the second.
            self.env._freeze_rand_vec = False
            self.env.reset_model()
            self.env._freeze_rand_vec = True
        return self.env.reset()[0]

    def step(self, row: int, shared: SimpleNamespace) -> None:
        obs, reward, _, truncated, info = self.env.step(shared.action[row])
        shared.next_obs[row] = obs
        shared.reward[row] = reward
        shared.success[row] = info["success"]
        shared.truncated[row] = truncated
        shared.obs[row] = self.reset() if truncated else obs


def serve(control: socket.socket, shared: SimpleNamespace, envs: dict[int, Env], spec: dict[str, Any]) -> None:
    control.sendall(DONE)
    while command := control.recv(1):
        for row, env in envs.items():
            shared.row[spec["worker"]] = row
            if command == STEP:
                env.step(row, shared)
            else:
                shared.obs[row] = env.reset()
        control.sendall(DONE)


@lru_cache(maxsize=1)  # of one task at a time: a scene takes 16 MiB
def read_scene(path: str) -> Any:
    import mujoco

    return mujoco.MjModel.from_xml_path(path)


def lighten(env_class: type) -> Any:
    """`env_class` with its Python made faster where most of the time goes, and every number bitwise the same.

    It must be the official simulation to the last bit: tests/envs/test_official_envs.py compares all tasks.
    """

    class Light(env_class):
        def _initialize_simulation(self):
            import mujoco

            # Reading a scene takes ten times as long as copying it.
            model = copy.copy(read_scene(self.fullpath))
            return model, mujoco.MjData(model)

        def _get_curr_obs_combined_no_goal(self):
            obs = np.zeros(18)
            obs[:3] = self.data.body("hand").xpos
            apart = self.data.body("rightclaw").xpos - self.data.body("leftclaw").xpos
            obs[3] = min(max(np.sqrt(apart.dot(apart)) / 0.1, 0.0), 1.0)
            pos, quat = self._get_pos_objects(), self._get_quat_objects()
            for i in range(len(pos) // 3):
                obs[4 + 7 * i : 7 + 7 * i] = pos[3 * i : 3 * i + 3]
                obs[7 + 7 * i : 11 + 7 * i] = quat[4 * i : 4 * i + 4]
            return obs

        def touching_object(self, object_geom_id):
            left, right = self.data.geom("leftpad_geom").id, self.data.geom("rightpad_geom").id
            contact, force = self.data.contact, self.data.efc_force
            left_force = right_force = 0.0
            for geoms, address in zip(contact.geom.tolist(), contact.efc_address.tolist(), strict=True):
                if object_geom_id in geoms:
                    if left in geoms:
                        left_force += force[address]
                    if right in geoms:
                        right_force += force[address]
            return left_force > 0 and right_force > 0

    # The package's class attributes and messages go by these names.
    Light.__name__, Light.__qualname__ = env_class.__name__, env_class.__qualname__
    module = sys.modules[env_class.__module__]
    if hasattr(module, "Rotation"):
        module.Rotation = LightRotation  # type: ignore[attr-defined]
    return Light


class LightRotation:
    """`scipy.spatial.transform.Rotation.from_matrix(m).as_quat()`, all that metaworld asks of it.

    scipy also checks that `m` is a rotation, which MuJoCo's matrices are.
    """

    def __init__(self, quat: list[float]):
        self._quat = np.array(quat)

    def as_quat(self) -> np.ndarray:
        return self._quat

    @staticmethod
    def from_matrix(matrix: np.ndarray) -> "LightRotation":
        m = matrix.tolist()
        trace = m[0][0] + m[1][1] + m[2][2]
        largest = [m[0][0], m[1][1], m[2][2], trace]
        i = largest.index(max(largest))
        q = [0.0] * 4
        if i == 3:
            q = [m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1], 1 + trace]
        else:
            j, k = (i + 1) % 3, (i + 2) % 3
            q[i] = 1 - trace + 2 * m[i][i]
            q[j] = m[j][i] + m[i][j]
            q[k] = m[k][i] + m[i][k]
            q[3] = m[k][j] - m[j][k]
        norm = (q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]) ** 0.5
        return LightRotation([c / norm for c in q])


def lighten_reward() -> None:
    """`metaworld.utils.reward_utils.tolerance` without array operations on single numbers, bitwise the same."""
    from metaworld.utils import reward_utils

    of_arrays = reward_utils.tolerance

    def tolerance(x, bounds=(0.0, 0.0), margin=0.0, sigmoid="gaussian", value_at_margin=0.1):
        lower, upper = bounds
        if not isinstance(x, float) or not lower <= upper or not margin > 0:
            return of_arrays(x, bounds, margin, sigmoid, value_at_margin)
        if lower <= x <= upper:
            return 1.0
        # numpy's scalar, not Python's float: its power function is the one of the array version.
        distance = np.float64(lower - x if x < lower else x - upper) / margin
        return float(reward_utils._sigmoids(distance, value_at_margin, sigmoid))

    reward_utils.tolerance = tolerance


if __name__ == "__main__":
    main()
