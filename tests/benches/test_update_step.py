"""The floor and the memory that update_step.py tells."""

from itertools import pairwise

import pytest
from update_step import ACTIONS, OBS, counted_flop, memory_of_updates, variant_of

from d2r_fast.nets.mlp import MlpConfig
from d2r_fast.presets import PRESETS, with_net

QUICK = PRESETS["quick"][1]


def test_counted_arithmetic_of_an_mlp_is_that_of_its_layers() -> None:
    cfg = with_net(QUICK, "mlp")
    assert isinstance(cfg.net, MlpConfig)

    def of_layers(n_in: int, n_out: int) -> list[int]:
        return [a * b for a, b in pairwise((n_in + cfg.n_tasks, *cfg.net.widths, n_out))]

    actor, critic = of_layers(OBS, 2 * ACTIONS), of_layers(OBS + ACTIONS, 1)
    # The actor: forward twice, back once to weights and, but for the first layer, to inputs. Each of two critics: three
    # forward; back once to weights, to the inputs of all layers but the first twice, of the first once: to the action.
    per_row = 4 * sum(actor) - actor[0] + 2 * (6 * sum(critic) - critic[0])
    assert counted_flop(cfg) == 2 * cfg.batch_size * per_row


@pytest.mark.parametrize("kind", ["d2r", "paco"])
def test_memory_is_what_updates_add(kind: str) -> None:
    cfg = variant_of(with_net(QUICK, kind), "reference", "float32")
    assert 1 < memory_of_updates(cfg, "cpu") < 300  # the process itself holds more
