"""What EnvPool computes unlike the official package and can be put right from what it returns."""

import numpy as np


def open_gripper_reward(reward: np.ndarray, obs: np.ndarray, near_button: np.ndarray) -> np.ndarray:
    """button-press-topdown-wall's reward as Meta-World 3.1.1 gives it, for an open gripper; EnvPool's is 3.0.0's, for a
    closed one. reward [n]; obs [n,39] that the step led to; near_button [n]: EnvPool's info["grasp_reward"].
    """
    opening = obs[:, 3]
    return reward + 5 * (_hamacher(np.maximum(opening, 0), near_button) - _hamacher(1 - opening, near_button))


def _hamacher(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The Hamacher product ab / (a + b - ab), 0 where both are 0."""
    denominator = a + b - a * b
    return np.divide(a * b, denominator, out=np.zeros_like(denominator), where=denominator > 0)


def first_handle(obs: np.ndarray, elapsed_step: np.ndarray) -> np.ndarray:
    """window-close's observations [n,39], at steps elapsed_step [n], the handle where the official package shows it.

    The official first observation is read before the window has been slid open by 0.2 m along x, and comes up once
    more, as the past, in the second. EnvPool's shows the window open from the start, as do the simulations of both.
    """
    obs = obs.copy()
    obs[elapsed_step == 0, 4] -= 0.2
    obs[elapsed_step <= 1, 18 + 4] -= 0.2
    return obs
