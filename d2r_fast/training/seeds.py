"""Independent random streams of one seed."""

import numpy as np

NETWORKS, LEARNER, ACTING, TRAIN_ENVS, EVAL_ENVS, EVAL_COMMAND = range(6)


def stream_seed(seed: int, stream: int, epoch: int = 0, rank: int = 0) -> int:
    """A seed below 2**30 for one of a run's random streams; `epoch` counts restarts of that stream, `rank` is that of
    the process, of several, that draws from it."""
    key = (stream, epoch, rank) if rank else (stream, epoch)
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0]) >> 2
