"""What an update asks of those that make it with other rows of the same batch (`d2r_fast.training.ranks` has them)."""

from typing import Protocol

from torch import Tensor


class Shares(Protocol):
    """R processes, each with an equal share of every task's rows. All call the same methods in the same order; on a GPU
    a captured update may hold the calls."""

    def average(self, tensor: Tensor) -> None:
        """Replace it by its mean over all shares, the same bits in each."""

    def from_first(self, tensor: Tensor) -> None:
        """Replace it by what the first share has."""
