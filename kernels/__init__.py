"""Triton kernels of d2r_fast, one file an operation, named as in `d2r_fast.ops`."""
