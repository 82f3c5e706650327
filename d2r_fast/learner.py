"""Runs updates: draws a batch and noise, calls `sac.update`, keeps metrics on the device until asked for them.

On a GPU one update, from the draw of its rows to the targets' step, is one captured graph.
"""

import math

import torch
from torch import Tensor

from d2r_fast import sac
from d2r_fast.captured import Captured
from d2r_fast.checkpoint import check_tensors, count, describe, field
from d2r_fast.config import RunConfig
from d2r_fast.finite import first_not_finite
from d2r_fast.memory import keep_freed_memory
from d2r_fast.policy import Agent
from d2r_fast.replay import Replay

_CUDA_STATE = 16  # bytes of a stream's state on a GPU


def restore_generator(generator: torch.Generator, state: object) -> None:
    """Set a random stream to a saved state. One saved on the other kind of device cannot be continued here: the
    stream then stays as it was seeded. ValueError: it is no state of a stream."""
    mine = generator.get_state()
    sizes = {len(mine), len(torch.Generator().get_state()), _CUDA_STATE}
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1 or len(state) not in sizes:
        raise ValueError(f"generator: expected the state of a random stream, got {describe(state)}")
    if state.shape == mine.shape:
        try:
            generator.set_state(state)
        except RuntimeError as error:
            raise ValueError(f"generator: {str(error).splitlines()[0]}") from error


class Learner:
    """Owns the optimiser and the learner's random stream. On the CPU the process then keeps what updates free."""

    def __init__(self, agent: Agent, replay: Replay, cfg: RunConfig, seed: int):
        if replay.device.type == "cpu":
            keep_freed_memory()
        self.agent, self._replay, self._cfg = agent, replay, cfg
        self.optimiser = sac.make_optimiser(agent, cfg.sac)
        self.generator = torch.Generator(replay.device).manual_seed(seed)
        self.updates = 0
        self._sums: dict[str, Tensor] = {}  # written in place, for a captured update knows their addresses
        self._summed = 0
        self._one_update = Captured(self._update, self.generator, "updates", cfg.cuda_graph)

    def run(self, n_updates: int) -> None:
        """Make `n_updates` updates."""
        for _ in range(n_updates):
            self._one_update()
            self._summed += 1
            self.updates += 1

    def _update(self) -> None:
        batch = self._replay.sample(self._cfg.batch_size, self.generator)
        draws = sac.draw(self.agent, batch, self.generator)
        metrics = sac.update(self.agent, self.optimiser, batch, draws, self._cfg.sac)
        for name, value in metrics.items():
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value.clone()

    def take_metrics(self) -> dict[str, list[float]]:
        """Means since the last call, a list a metric (one number a task, network, or one). Synchronises the device.

        FloatingPointError: as `require_finite`.
        """
        means = self.require_finite()
        for total in self._sums.values():
            total.zero_()
        self._summed = 0
        return means

    def require_finite(self) -> dict[str, list[float]]:
        """As `take_metrics`, but the updates count for the next `take_metrics` too.

        FloatingPointError: a metric, or what an update changes, is not finite; the agent is then worth nothing.
        """
        count = self._summed
        means = {}
        if count > 0:
            means = {name: (total / count).reshape(-1).tolist() for name, total in self._sums.items()}
        bad = (
            f"{name}[{i}] is {value}"
            for name, values in means.items()
            for i, value in enumerate(values)
            if not math.isfinite(value)
        )
        first = next(bad, None) or first_not_finite(self.tensors())
        if first is not None:
            when = f"updates {self.updates - count + 1}..{self.updates}" if count else f"after {self.updates} updates"
            raise FloatingPointError(
                f"{when}: {first}; training has diverged (a lower learning rate or reward scale may help)"
            )
        return means

    def tensors(self) -> dict[str, Tensor]:
        """All that an update changes: the agent's parameters and buffers, and the optimiser's moments of each."""
        moments = {
            f"{name}: Adam's {moment}": value
            for name, parameter in self.agent.named_parameters()
            for moment, value in self.optimiser.state.get(parameter, {}).items()
        }
        return {**self.agent.state_dict(), **moments}

    def state_dict(self) -> dict[str, object]:
        return {
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` gave, but for the optimiser's settings: those are the configuration's.

        ValueError: it is of another agent or of other settings.
        """
        updates, saved = count(state, "updates"), field(state, "optimiser", dict)
        own = self.optimiser.state_dict()["param_groups"]
        _check_optimiser(saved, self.optimiser)
        restore_generator(self.generator, state.get("generator"))
        # With moments at other addresses than a captured update's.
        self.optimiser.load_state_dict({"state": saved["state"], "param_groups": own})
        self._one_update.forget()
        self.updates = updates


def _check_optimiser(saved: dict, optimiser: torch.optim.Optimizer) -> None:
    """ValueError unless `saved` has the settings of `optimiser`, and a step and moments for its parameters."""
    own = optimiser.state_dict()["param_groups"]
    groups = field(saved, "param_groups", list)
    if len(groups) != len(own):
        raise ValueError(f"optimiser.param_groups: expected {len(own)}, got {len(groups)}")
    for i, (group, mine) in enumerate(zip(groups, own, strict=True)):
        if not isinstance(group, dict):
            raise ValueError(f"optimiser.param_groups[{i}]: expected dict, got {describe(group)}")
        # Another version of torch may have other settings; `capturable` is the device's.
        for name in {"params", "lr", "betas", "eps"} | (group.keys() & mine.keys() - {"capturable"}):
            if repr(group.get(name)) != repr(mine[name]):
                raise ValueError(
                    f"optimiser.param_groups[{i}]: expected {name} {mine[name]}, got {describe(group.get(name))}"
                )
    moments = field(saved, "state", dict)
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    if moments and list(moments) != list(range(len(parameters))):  # before the first update there are none
        raise ValueError(f"optimiser.state: expected one for each of {len(parameters)} parameters, got {len(moments)}")
    for i in moments:
        like = {"step": torch.zeros(()), "exp_avg": parameters[i], "exp_avg_sq": parameters[i]}
        check_tensors(moments[i], f"optimiser.state[{i}]", like)
