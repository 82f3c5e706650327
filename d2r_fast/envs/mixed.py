"""Tasks spread over several engines, used as if it were one."""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from d2r_fast.envs.metaworld import OBS_SIZE, CallOrder, MultiTaskEnvs, Step, check_action


class MixedEnvs(MultiTaskEnvs):
    """`parts`, newly made, each with its own of `tasks`; the arrays hold the tasks in the order of `tasks`.

    All parts step at the same time. They belong to this object from here on, which closes them.
    ValueError: the parts' tasks are not `tasks`, or their other sizes differ.
    """

    def __init__(self, tasks: Sequence[str], parts: Sequence[MultiTaskEnvs]):
        served = [task for part in parts for task in part.tasks]
        if sorted(served) != sorted(tasks):
            raise ValueError(f"expected engines for the tasks {sorted(tasks)}, got engines for {sorted(served)}")
        sizes = {(part.envs_per_task, part.episode_length) for part in parts}
        if len(sizes) != 1:
            raise ValueError(f"the engines must agree on (envs_per_task, episode_length), got {sorted(sizes)}")
        self.tasks = tuple(tasks)
        ((self.envs_per_task, self.episode_length),) = sizes
        self._parts = [(part, [self.tasks.index(task) for task in part.tasks]) for part in parts]
        self._order = CallOrder()

    def reset(self) -> np.ndarray:
        self._order.expect("reset", "made", "ready")
        self._order.state = "broken"
        obs = np.empty((self.n_tasks, self.envs_per_task, OBS_SIZE), np.float32)
        for part, rows in self._parts:
            obs[rows] = part.reset()
        self._order.state = "ready"
        return obs

    def send(self, action: np.ndarray) -> None:
        self._order.expect("send", "ready")
        # Here and whole, for no part may step if another refuses.
        check_action(action, self.tasks, self.envs_per_task)
        self._order.state = "broken"
        for part, rows in self._parts:
            part.send(action[rows])
        self._order.state = "stepping"

    def recv(self) -> Step:
        self._order.expect("recv", "stepping")
        self._order.state = "broken"
        steps = [part.recv() for part, _ in self._parts]
        whole = Step(*(np.empty((self.n_tasks, *field.shape[1:]), field.dtype) for field in steps[0]))
        for (_, rows), step in zip(self._parts, steps, strict=True):
            for field, part_field in zip(whole, step, strict=True):
                field[rows] = part_field
        self._order.state = "ready"
        return whole

    def close(self) -> None:
        self._order.state = "closed"
        with ExitStack() as closing:  # closes all of them, even if one fails
            for part, _ in self._parts:
                closing.callback(part.close)
