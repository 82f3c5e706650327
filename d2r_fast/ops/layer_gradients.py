"""What a launch of `d2r_fast.kernels.network_gradient` computes of a pass, in numbers that say where things lie."""

from typing import NamedTuple


class Rows(NamedTuple):
    """The gradient of what a layer gives, [B,width], in front of its ReLU if there is one.

    at  where it begins
    """

    at: int
    width: int


class Product(NamedTuple):
    """A weight's gradient [width,in], written from `to` on: the sum over rows of d_z^T x.

    x_outside  whether x lies in the tensor that the first layer reads, or where all others do
    x_at       where x begins; its rows lie x_stride apart
    """

    d_z: Rows
    x_outside: bool
    x_at: int
    x_stride: int
    n_in: int
    to: int


class Sum(NamedTuple):
    """Sums of the columns of some rows of d_z, written from `to` on, each `stride` from the one before."""

    d_z: Rows
    first_row: int
    n_rows: int
    to: int
    stride: int
