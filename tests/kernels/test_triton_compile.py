"""Every Triton kernel compiles for sm_90 within its limits: registers, shared memory, loads, matrix instructions, sums.

In a process of its own: in this one the kernels may be interpreted. Needs no GPU.
"""

import importlib
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

MODULES = (
    "layers",
    "routed_modules",
    "row_order",
    "weight_gradient",
    "select_routes",
    "ensemble_linear",
    "network_gradient",
)
MODULES += ("gumbel", "squashed_normal", "sac_losses", "replay_rows", "optimiser_step", "module_levels", "expert_sum")
NARROW = ("N5-K2-D16", "N5-K2-D17")
UNALIGNED = ("43to400", "128to1")  # rows that are no multiple of 16 bytes; the size, without "-E" and how many networks


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The compile report's rows, and its table in the test's output."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "d2r_fast.kernels.compile_report", "--short", "--json", str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())["rows"]


def test_every_kernel_is_reported(rows):
    modules = [importlib.import_module(f"d2r_fast.kernels.{name}") for name in MODULES]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {row["kernel"].split()[0] + "_kernel" for row in rows} == kernels
    for size in ("N16-K2-D128", "N32-K4-D256"):
        for precision in ("float32", "tf32", "bf16"):
            assert sum(row["size"] == size and row["precision"] == precision for row in rows) >= 3
    # Rows in order, of which there are more; and the settings for many programs.
    assert {row["kernel"] for row in rows if row["size"] == "N16-K2-D128-E4"} >= {
        "routed_modules_fwd",
        "routed_modules_bwd",
    }
    assert {row["kernel"] for row in rows if row["size"] == "N16-K2-D128-E2-B6400"} == {"routed_modules_bwd"}


def test_registers_and_shared_memory_suffice(rows):
    for row in rows:
        assert row["stack"] <= row["max_stack"], row
        assert row["shared"] <= 227 * 1024, row


def test_loads_are_wide_and_products_use_the_matrix_units(rows):
    for row in rows:
        if row["product"] == "-" or row["size"] in NARROW:
            continue
        assert row["wide_loads"] + row["wide_copies"] >= 4 or row["size"].split("-E")[0] in UNALIGNED, row
        if row["kernel"].startswith("ensemble_linear"):
            assert row["wide_copies"] == row["copies"] or row["size"].split("-E")[0] in UNALIGNED, row
        assert row["product"] != "FFMA", row  # float32's too, as three of tf32


@pytest.mark.parametrize(
    ("kernel", "size", "wide"),
    [
        ("gumbel", "any", 2),
        ("squashed_normal_fwd", "A4", 3),
        ("optimiser_squares", "any", 2),
        ("optimiser_adam", "any", 10),  # two of each of five numbers a parameter
    ],
)
def test_what_is_bound_by_bandwidth_has_wide_loads(rows, kernel, size, wide):
    (row,) = [row for row in rows if (row["kernel"], row["size"]) == (kernel, size)]
    assert row["wide_loads"] >= wide, row


def test_threads_that_share_a_sum_agree_on_it(rows):
    assert {row["size"] for row in rows} >= set(NARROW)
    for row in rows:
        assert row["uneven"] == 0, row


def test_what_threads_write_is_fenced_before_another_warpgroup_multiplies_it(rows):
    for row in rows:
        assert row["late"] == 0, row


@pytest.mark.parametrize(
    ("steps", "late"),
    [
        (("store", "fence", "barrier", "mma"), 0),
        (("store", "barrier", "fence", "mma"), 1),
        (("store", "barrier", "barrier", "fence", "mma", "store", "fence", "barrier", "mma"), 1),
        (("store", "barrier", "store", "fence", "barrier", "mma"), 0),
        (("barrier", "fence", "mma"), 0),  # what was copied
    ],
)
def test_the_report_tells_late_fences(steps, late):
    from d2r_fast.kernels.compile_report import late_fences

    ptx = {
        "store": "st.shared.b32 [%r1], %r2;",
        "barrier": "bar.sync 0;",
        "fence": "fence.proxy.async.shared::cta;",
        "mma": "wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 {%r1}, %rd1, %rd2;",
    }
    assert late_fences("\n".join(ptx[step] for step in steps)) == late


def test_the_report_tells_barriers_by_their_loops():
    from d2r_fast.kernels.compile_report import barriers_by_loop

    bar, mma, back = "\tbar.sync 0;", "\tmma.sync.aligned.m16n8k8;", "\t@%p1 bra \t$L__BB0_{};"
    loop = ["$L__BB0_2:", bar, bar, *[mma] * 4, back.format(2)]
    code = [bar, "$L__BB0_1:", bar, *loop, bar, bar, back.format(1), "$L__BB0_3:", bar, back.format(3), bar]
    assert barriers_by_loop("\n".join(code)) == {"once": 2, "a_pass": 4, "a_chunk": 2}


def test_copies_are_under_way_while_products_are_made(rows):
    """But for walks in tf32 by two stages, one of them under way, which were faster so (kernels/settings.py)."""
    for row in rows:
        if row["copies"] > 0 and not row["size"].startswith("N32-K4-D256"):
            walks = row["kernel"].startswith("routed_modules") and row["precision"] == "tf32"
            assert row["in_flight"] > 0 or walks, row


@pytest.mark.parametrize(
    ("steps", "in_flight"),
    [
        (("commit", "wait 0", "mma", "commit"), 0),  # issued after the product, awaited at once
        (("commit", "commit", "wait 1", "mma", "commit"), 1),
        (("commit", "wait 0", "wgmma", "commit", "wgmma wait"), 1),
        (("commit", "commit", "wait 0"), 0),
    ],
)
def test_the_report_tells_copies_in_flight(steps, in_flight):
    from d2r_fast.kernels.compile_report import copies_in_flight

    code = {
        "commit": "cp.async.commit_group;",
        "wait 0": "cp.async.wait_group \t0;",
        "wait 1": "cp.async.wait_group 1;",
        "mma": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1};",
        "wgmma": "wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 {%r1};",
        "wgmma wait": "wgmma.wait_group.sync.aligned 0;",
    }
    assert copies_in_flight("\n".join(code[step] for step in steps)) == in_flight


@pytest.mark.parametrize(
    ("own", "addition", "uneven"),
    [
        ("mul.f32 %r3, %r1, %r2", "fma.rn.f32 %r5, %r1, %r2, %r4", True),
        ("mul.f32 %r3, %r1, %r2", "add.f32 %r5, %r3, %r4", True),  # ptxas contracts it
        ("mul.rn.f32 %r3, %r1, %r2", "add.f32 %r5, %r3, %r4", False),
        ("fma.rn.f32 %r3, %r1, %r2, 0f00000000", "add.f32 %r5, %r3, %r4", False),
        ("mul.f32 %r3, %r1, %r2", "max.f32 %r5, %r3, %r4", False),
    ],
)
def test_the_report_tells_uneven_sums(own, addition, uneven):
    from d2r_fast.kernels.compile_report import uneven_sums

    assert uneven_sums(f"{own};\nshfl.sync.bfly.b32 \t%r4, %r3, 8, 31, -1;\n{addition};\n") == uneven
