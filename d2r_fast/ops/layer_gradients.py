"""What a launch of `d2r_fast.kernels.network_gradient` computes, in numbers that say where things lie."""

from typing import NamedTuple


class Rows(NamedTuple):
    """The gradient in front of a layer's ReLU, [B,width].

    outside  whether it lies in the tensor of the last layer's, or where all others do
    at       where it begins
    y_at     where the layer's output begins, if a ReLU is behind it: the gradient counts where that is above 0;
             -1: there is none
    """

    outside: bool
    at: int
    width: int
    y_at: int


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
