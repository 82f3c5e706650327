"""Independent random streams of one seed."""

import numpy as np

NETWORKS, LEARNER, ACTING, TRAIN_ENVS, EVAL_ENVS, EVAL_COMMAND = range(6)


def stream_seed(seed: int, stream: int, epoch: int = 0) -> int:
    """A seed below 2**30 for one of a run's random streams; `epoch` counts restarts of that stream."""
    return int(np.random.SeedSequence(seed, spawn_key=(stream, epoch)).generate_state(1)[0]) >> 2
