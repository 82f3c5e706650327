"""Both variants of the benchmark of linear layers compute the same."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
from linear_layers import by_torch, by_triton, error, make_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-5), ("bf16", 0.03)])
def test_both_are_near_float64_and_tell_a_precision(precision, limit):
    case = make_case(2, 40, 30, 20, DEVICE)
    truth = by_torch(tuple(v.double() for v in case), "float32")
    for run in (by_torch, by_triton):
        found = error(run(case, precision), truth)
        assert (1e-3 if precision == "bf16" else 0) < found < limit
