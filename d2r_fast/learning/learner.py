"""Runs updates: draws a batch and noise, makes the update, keeps metrics on the device until asked for them.

On a GPU one update, from the draw of its rows to the targets' step, is one captured graph.
"""

import math

import torch
from torch import Tensor

from d2r_fast.config import RunConfig
from d2r_fast.host.memory import keep_freed_memory
from d2r_fast.learning.captured import Captured
from d2r_fast.learning.finite import first_not_finite
from d2r_fast.learning.replay import Replay
from d2r_fast.learning.saved_state import count, describe, field
from d2r_fast.learning.shares import Shares
from d2r_fast.learning.update import Update, draw
from d2r_fast.nets.agent import N_CRITICS, Agent

_CUDA_STATE = 16  # bytes of a stream's state on a GPU
# The rows of `Metrics.losses`.
LOSS_NAMES = ("loss/alpha", "loss/actor", "loss/critic", "loss/left_out", "policy/entropy", "policy/alpha")


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
    """Owns what an update needs besides the agent, and the learner's random stream. The agent's parameters live in flat
    buffers from then on. On the CPU the process then keeps what updates free.

    shares: those that make the same updates; of the B rows that `cfg` asks for, `n_rows` are then drawn here.
    """

    def __init__(
        self,
        agent: Agent,
        replay: Replay,
        cfg: RunConfig,
        seed: int,
        shares: Shares | None = None,
        n_rows: int | None = None,
    ):
        if replay.device.type == "cpu":
            keep_freed_memory()
        self.agent, self._replay, self._cfg = agent, replay, cfg
        self._shares, self._n_rows = shares, n_rows or cfg.batch_size
        self.update = Update(agent, cfg.sac, shares)
        self.generator = torch.Generator(replay.device).manual_seed(seed)
        self.updates = 0
        # Written in place, for a captured update knows their addresses.
        like = self.update.flat.values
        self._sums = [like.new_zeros(len(LOSS_NAMES), agent.n_tasks), like.new_zeros(self.update.flat.n_networks)]
        self._task = replay.tasks_of(self._n_rows).repeat(2)
        self._summed = 0
        self._one_update = Captured(self._update, self.generator, "updates", cfg.cuda_graph)
        self._made = torch.cuda.Event() if replay.device.type == "cuda" else None  # of the last call of `run`

    def run(self, n_updates: int) -> None:
        """Make `n_updates` updates. On a GPU they may be under way on return, but those of the call before are made:
        it always has work, and whoever stops or looks at the clock between two calls is never far ahead of it."""
        for _ in range(n_updates):
            self._one_update()
            self._summed += 1
            self.updates += 1
        if self._made is not None:
            before, self._made = self._made, torch.cuda.Event()
            self._made.record()
            before.synchronize()

    def wait(self) -> None:
        """Until all updates are made."""
        if self._made is not None:
            self._made.synchronize()

    def _update(self) -> None:
        rows = self._replay.sample_rows(self._n_rows, self.generator)
        draws = draw(self.agent, rows, self._task, self.generator, self._cfg.sac)
        torch._foreach_add_(self._sums, list(self.update.step(rows, self._task, draws)))

    def take_metrics(self) -> dict[str, list[float]]:
        """Means since the last call, a list a metric (one number a task, network, or one). Synchronises the device.

        FloatingPointError: as `require_finite`.
        """
        means = self.require_finite()
        for total in self._sums:
            total.zero_()
        self._summed = 0
        return means

    def require_finite(self) -> dict[str, list[float]]:
        """As `take_metrics`, but the updates count for the next `take_metrics` too.

        FloatingPointError: a metric, or what an update changes, is not finite; the agent is then worth nothing.
        """
        summed = self._summed
        means: dict[str, list[float]] = {}
        if summed > 0:
            averages = [total / summed for total in self._sums]
            if self._shares is not None:
                self._shares.average(averages[0])  # norms are the same everywhere
            losses, norms = (total.tolist() for total in averages)
            means = dict(zip(LOSS_NAMES, losses, strict=True))
            means |= {
                "grad_norm/actor": norms[:1],
                "grad_norm/critic": norms[1 : 1 + N_CRITICS],
                "grad_norm/alpha": norms[-1:],
            }
        bad = (
            f"{name}[{i}] is {value}"
            for name, values in means.items()
            for i, value in enumerate(values)
            if not math.isfinite(value)
        )
        first = next(bad, None) or first_not_finite(self.tensors())
        if first is not None:
            when = f"updates {self.updates - summed + 1}..{self.updates}" if summed else f"after {self.updates} updates"
            raise FloatingPointError(
                f"{when}: {first}; training has diverged (a lower learning rate or reward scale may help)"
            )
        return means

    def tensors(self) -> dict[str, Tensor]:
        """All that an update changes: the agent's parameters and buffers, and Adam's moments of each parameter."""
        return {**self.agent.state_dict(), **self.update.moments()}

    def state_dict(self) -> dict[str, object]:
        return {
            "optimiser": self.update.state_dict(),
            "generator": self.generator.get_state(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` gave. ValueError: it is of another agent."""
        updates, saved = count(state, "updates"), field(state, "optimiser", dict)
        self.update.load_state_dict(saved)
        restore_generator(self.generator, state.get("generator"))
        self.updates = updates
