"""The official package's environments, reset to a start of one's choice instead of a drawn one."""

import pickle
from typing import Any

import numpy as np

POSITIONS = np.r_[0:3, 4:7, 11:14, 36:39]
"""Hand, first object, second object and goal within an observation, in metres; the rest are angles or seen before."""
START_TOLERANCE = 0.01
"""Metres along an axis up to which two starts are the same."""


class OfficialStarts:
    """One official environment that can be reset to the start that an observation shows.

    A reset places things by a random vector. Where they end up is linear in it (nearly so in a few tasks), so that the
    vector follows from positions by least squares, within the official range.
    """

    def __init__(self, task: str, seed: int):
        from metaworld import ALL_V3_ENVIRONMENTS, Task

        env_class: Any = ALL_V3_ENVIRONMENTS[f"{task}-v3"]
        self.task = task
        self.env = env_class()
        space = self.env._random_reset_space
        self._low, self._high = space.low, space.high
        data = {"rand_vec": self._low, "env_cls": env_class, "partially_observable": False}
        self.env.set_task(Task(env_name=f"{task}-v3", data=pickle.dumps(data)))
        self.env._get_state_rand_vec = self._next_vector
        self._rng = np.random.default_rng(seed)
        # Which parts of the vector move something; none does until it is known.
        self._visible = np.zeros(len(self._low), bool)
        varied = self._high > self._low
        drawn, shown = [], []
        for _ in range(int(varied.sum()) + 5):
            shown.append(self.reset_at(self._draw())[POSITIONS])
            drawn.append(self._vector)
        vectors, positions = np.array(drawn), np.array(shown)
        self._centre, self._origin = vectors.mean(0), positions.mean(0)
        # positions - origin = (vector - centre) @ slope
        self._slope = np.zeros((len(self._low), len(POSITIONS)))
        self._slope[varied] = np.linalg.lstsq((vectors - self._centre)[:, varied], positions - self._origin)[0]
        self._visible = np.abs(self._slope).max(1) > 0.01
        residual = positions - self._origin - (vectors - self._centre) @ self._slope
        # What the simulation pushes about during the reset (disassemble's nut) says little about the vector.
        self._weight = 1 / (1e-7 + np.linalg.norm(residual, axis=0))

    def reset_at(self, vector: np.ndarray) -> np.ndarray:
        """Reset by `vector`, or by one close to it if the task refuses it; returns the first observation [39]."""
        # A reset places things twice, before and after it clears the simulation, and some observations show where they
        # were before. The official benchmarks place them by the same vector both times, so it is settled first.
        self._vector, self._calls, self._settled = vector, 0, False
        self.env.reset_model()
        self._settled = True
        obs, _ = self.env.reset()
        return obs

    def reset_near(self, obs: np.ndarray) -> tuple[np.ndarray, float]:
        """Reset to the possible start nearest to obs [39]; returns the first observation there, and the start error.

        Where a reset makes things collide (disassemble), a hair in the vector can move an object by centimetres, and a
        float32 observation does not tell it. What such a hair does to the official start is taken off the error.
        """
        wanted = obs[POSITIONS].astype(np.float64)
        vector, found, best = self._centre, self._origin, (np.inf, self._centre)
        for _ in range(2):  # the second round corrects the tasks that are not quite linear
            shift = np.linalg.lstsq((self._slope * self._weight).T, (wanted - found) * self._weight, rcond=1e-9)[0]
            first = self.reset_at(np.clip(vector + shift, self._low, self._high))
            vector, found = self._vector, first[POSITIONS]
            error = float(np.abs(found - wanted).max())
            if error < 1e-6:
                return first, error
            if error < best[0]:
                best = error, vector
        error, vector = best
        first = self.reset_at(vector)
        if error <= START_TOLERANCE:
            return first, error
        hairs = self._rng.normal(0, 1e-7, (4, len(vector)))
        moved = [np.abs(self.reset_at(vector + hair)[POSITIONS] - first[POSITIONS]).max() for hair in hairs]
        return self.reset_at(vector), max(0.0, error - float(max(moved)))

    def _next_vector(self) -> np.ndarray:
        # Asked more than once, the task refuses the vector, as putting things too close together, and would go on so.
        # So parts that move nothing are drawn anew; if that does not help for long, the others follow by and by.
        if not self._settled:
            self._calls += 1
            if self._calls > 1000:
                raise RuntimeError(f"{self.task}: found no start that the official environment accepts")
            if self._calls > 1:
                follow = 0.0 if self._calls < 100 else min(1.0, 0.001 * 1.02 ** (self._calls - 100))
                share = np.where(self._visible, follow, 1.0)
                self._vector = (1 - share) * self._vector + share * self._draw()
        return self._vector

    def _draw(self) -> np.ndarray:
        return self._rng.uniform(self._low, self._high)
