"""The benchmark of what a call costs: that it makes every call in every checkout, not how long they take."""

import call_overhead
import pytest
import torch


@pytest.mark.parametrize("operation", call_overhead.OPERATIONS)
def test_a_call_runs_the_operation_and_with_a_gradient_the_gradient_of_every_input(operation):
    before = call_overhead.make_call(operation, "fwd")()
    assert isinstance(before, torch.Tensor) and not before.requires_grad
    gradients = call_overhead.make_call(operation, "fwd+bwd")()
    n_inputs = {"ensemble_linear": 3, "select_routes": 1, "routed_modules": 4, "routed_network": 17}
    assert len(gradients) == n_inputs[operation]
    assert all(g.isfinite().all() for g in gradients)


def test_two_checkouts_take_turns():
    here = call_overhead.HERE.parents[1]
    rows = call_overhead.measure_pairs(here, here, rounds=1, n_calls=1)
    assert [(row["operation"], row["direction"]) for row in rows] == [
        (operation, direction) for operation in call_overhead.OPERATIONS for direction in call_overhead.DIRECTIONS
    ]
    assert all(row["us"] > 0 and row["against_us"] > 0 and row["ratio"] > 0 for row in rows)


def test_one_checkout_has_no_ratio():
    rows = call_overhead.measure_pairs(call_overhead.HERE.parents[1], None, rounds=0, n_calls=1)
    assert all(set(row) == {"operation", "direction", "us"} for row in rows)


def test_a_process_that_cannot_import_the_package_is_told(tmp_path):
    (tmp_path / "d2r_fast").mkdir()
    (tmp_path / "d2r_fast" / "__init__.py").write_text("raise ImportError('broken')\n")
    with pytest.raises(RuntimeError, match="ended before it answered"):
        call_overhead.measure_pairs(call_overhead.HERE.parents[1], tmp_path, rounds=0, n_calls=1)
