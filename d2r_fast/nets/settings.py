"""What the settings of every network have in common; each network's own stand in its file."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from d2r_fast.ops.backends import Backend, Precision, choose_backend

Role = Literal["actor", "critic"]
"""What a network is for: some published codes start the two differently."""


def require(condition: bool, message: str) -> None:
    """ValueError with `message` unless `condition`."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class NetConfigBase(ABC):
    """Settings that every network has; actor and critics share them.

    kind  the name that chooses it: `--net KIND`, "kind" in config.json
    """

    kind: ClassVar[str]

    backend: Backend = "auto"
    """What runs the network's operations: the fastest that can, or one of those that `d2r info` lists."""
    precision: Precision = "float32"
    """What operands of matrix products are rounded to; weights and sums stay float32."""

    @abstractmethod
    def make(self, n_in: int, n_out: int, n_tasks: int, n_nets: int, role: Role) -> Any:
        """E = n_nets networks with these settings, initial values drawn from torch's global stream."""

    @property
    @abstractmethod
    def widest(self) -> int:
        """Width of the widest layer that backend must be able to run."""

    @property
    def n_logits(self) -> int:
        """R, routing logits a row: route i has i of them, i = 1..N. 0 where no routes are chosen."""
        return 0

    @property
    def route_shape(self) -> tuple[int, int]:
        """(N, K) of the routes that a row took, for the replay to keep. (0, 0) where no routes are chosen."""
        return 0, 0

    @property
    def has_task_weights(self) -> bool:
        """Whether the network is a sum of parameter sets, weighted by task, as `nets/paco.py`."""
        return False

    def check_runs_on(self, device: torch.device) -> None:
        """ValueError: `backend` cannot run there, or not at these widths or in this precision; says why."""
        try:
            choose_backend(self.backend, torch.empty(0, device=device), self.widest, self.precision)
        except ValueError as error:
            raise ValueError(f"net.{error}") from None

    def require_positive(self, *names: str) -> None:
        """ValueError unless these fields hold a size, or sizes, of at least 1."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, tuple):
                good = len(value) > 0 and min(value) >= 1
                require(good, f"net.{name}: expected one or more positive widths, got {value}")
            else:
                require(value >= 1, f"net.{name}: expected at least 1, got {value}")
