"""The Triton linear layers against float64: on the GPU if there is one, else in Triton's interpreter."""

import math
from itertools import accumulate, product

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
import triton
import triton.language as tl

from d2r_fast.kernels import ensemble_linear as linear
from d2r_fast.kernels import layers, network_gradient, settings
from d2r_fast.kernels.tiles import to_tf32
from d2r_fast.ops.backends import INTERPRETED, PRECISIONS
from d2r_fast.ops.layer_gradients import Product, Rows, Sum

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # NumPy's, of what the interpreter computes
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter takes float64, which tells a wrong term from rounding; a device takes float32.
DTYPE, TOLERANCE = (torch.float64, 1e-12) if INTERPRETED else (torch.float32, 1e-5)
NAMES = ("y", "d_x", "d_weight", "d_bias")


def nearest(value, precision):
    """float32 rounded to the operands' precision, to nearest, in float64. Triton's interpreter only cuts bf16 off."""
    if precision == "bf16" and INTERPRETED:
        return (value.view(torch.int32) & -0x10000).view(torch.float32).double()
    if precision == "bf16":
        return value.bfloat16().double()
    if precision == "tf32":
        bits = value.view(torch.int32)
        return ((bits + 0x1000) & -0x2000).view(torch.float32).double()
    return value.double()


def make_case(e, b, n_in, n_out, shared=False, dtype=DTYPE):
    """x, weight, bias, d_y; no output lies near the kink of the ReLU, where rounding would decide."""
    x = torch.randn((b, n_in) if shared else (e, b, n_in), dtype=dtype)
    weight = torch.randn(e, n_out, n_in, dtype=dtype) / n_in**0.5
    bias = torch.where(torch.rand(e, n_out) > 0.5, 9.0, -9.0).to(dtype)
    d_y = torch.randn(e, b, n_out, dtype=dtype)
    return [v.to(DEVICE) for v in (x, weight, bias, d_y)]


def run(case, relu, precision="float32"):
    x, weight, bias, d_y = case
    y = linear.forward(x, weight, bias, relu, precision)
    return dict(zip(NAMES, (y, *linear.backward(d_y, x, weight, y, relu, precision, True, True)), strict=True))


def truth_of(case, relu, precision="float32"):
    """Network by network, of rounded operands."""
    x, weight, bias, d_y = case
    w, rows = nearest(weight, precision), nearest(x, precision).expand(len(weight), *x.shape[-2:])
    y = rows @ w.mT + bias.double()[:, None]
    d_z = torch.where(y > 0, d_y, 0) if relu else d_y
    rounded = nearest(d_z, precision)
    d_x = rounded @ w
    d_x = d_x.sum(0) if x.dim() == 2 else d_x
    values = (y.clamp(min=0) if relu else y, d_x, rounded.mT @ rows, d_z.double().sum(1))
    return dict(zip(NAMES, values, strict=True))


def assert_agree(ours, truth, tolerance):
    for name, value in truth.items():
        assert ours[name].shape == value.shape, name
        if value.numel():
            error = (ours[name].double() - value).abs().max().item()
            assert error <= tolerance * max(1.0, value.abs().max().item()), (name, error)


tiles = pytest.mark.parametrize(
    ("precision", "n_enough"),
    [("float32", 1), *product(("tf32", "bf16"), (10**9, 6, 1))],
    ids=["float32", *(f"{p}-{tile}_tiles" for p, tile in product(("tf32", "bf16"), ("small", "middle", "large")))],
)
"""With how many programs of a launch tiles are larger; those of float32 hardly ever are."""
SIZES = [(1, 1, 1, 1), (2, 300, 43, 100), (2, 70, 130, 65), (1, 67, 64, 136), (3, 65, 128, 1), (1, 12, 10, 33)]
SIZES += [(2, 600, 17, 9), (2, 64, 64, 64)]


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize(("e", "b", "n_in", "n_out"), SIZES, ids=["E{}-B{}-{}to{}".format(*s) for s in SIZES])
def test_matches_float64(e, b, n_in, n_out, shared, relu):
    case = make_case(e, b, n_in, n_out, shared)
    ours = run(case, relu)
    assert_agree(ours, truth_of(case, relu), TOLERANCE)
    again = run(case, relu)
    assert all(torch.equal(ours[name], again[name]) for name in NAMES)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@tiles
def test_operands_are_rounded_to_nearest_and_nothing_else_is(precision, n_enough, shared, relu, monkeypatch):
    monkeypatch.setattr(settings, "ENOUGH", n_enough)
    case = make_case(2, 300, 70, 50, shared, torch.float32)
    ours, truth = run(case, relu, precision), truth_of(case, relu, precision)
    assert_agree(ours, truth, 5e-6)
    if precision != "float32":  # operands as they are are further off than that
        unrounded = truth_of(case, relu)
        for name in NAMES[:3]:
            assert (truth[name] - unrounded[name]).abs().max() > 1e-4, name


@triton.jit
def round_kernel(value_ptr, rounded_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(rounded_ptr + at, to_tf32(tl.load(value_ptr + at)))


def test_tf32_is_rounded_to_nearest_and_a_nan_stays_one():
    step = 2.0**-10
    values = {
        1 + step: 1 + step,
        1 + 0.499 * step: 1.0,
        1 + 0.501 * step: 1 + step,
        -1 - 0.501 * step: -1 - step,
        1 + 0.5 * step: 1 + step,
        torch.finfo(torch.float32).max: math.inf,
        math.inf: math.inf,
        -math.inf: -math.inf,
        0.0: 0.0,
    }
    given = torch.tensor([*values, *[0.0] * (16 - len(values))], dtype=torch.float32)
    given[-3:] = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)  # NaNs
    given = given.to(DEVICE)
    rounded = torch.empty_like(given)
    round_kernel[(1,)](given, rounded, BLOCK=16)
    expected = torch.tensor([*values.values()], dtype=torch.float32)
    assert torch.equal(rounded[: len(values)].cpu(), expected)
    assert rounded[-3:].isnan().all()


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_a_diverged_network_shows_in_its_rows_alone(precision):
    case = make_case(2, 40, 30, 20, dtype=torch.float32)
    before = run(case, True, precision)
    case[0][1, 7, 3] = math.nan
    after = run(case, True, precision)
    rest = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    rest[1, 7] = False
    assert after["y"][1, 7].isnan().all()
    assert torch.equal(after["y"][rest], before["y"][rest]) and torch.equal(after["d_x"][rest], before["d_x"][rest])


def test_only_what_is_asked_for():
    x, weight, bias, d_y = make_case(2, 40, 30, 20)
    y = linear.forward(x, weight, bias, True, "float32")
    both = linear.backward(d_y, x, weight, y, True, "float32", True, True)
    d_x, *nothing = linear.backward(d_y, x, weight, y, True, "float32", True, False)
    assert torch.equal(d_x, both[0]) and [v.numel() for v in nothing] == [0, 0]
    nothing, *to_layer = linear.backward(d_y, x, weight, y, True, "float32", False, True)
    assert nothing.numel() == 0 and all(torch.equal(a, b) for a, b in zip(to_layer, both[1:], strict=True))


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_no_rows(shared):
    ours = run(make_case(2, 0, 5, 3, shared), True)
    assert [list(v.shape) for v in ours.values()] == [[2, 0, 3], [0, 5] if shared else [2, 0, 5], [2, 3, 5], [2, 3]]
    assert (ours["d_weight"] == 0).all() and (ours["d_bias"] == 0).all()


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_a_layer_that_reads_nothing(relu):
    x, weight, bias, d_y = make_case(2, 7, 1, 3)
    found = run((x[..., :0], weight[..., :0], bias, d_y), relu)
    y = (bias.relu() if relu else bias)[:, None].expand_as(d_y)
    torch.testing.assert_close(found["y"], y)
    torch.testing.assert_close(found["d_bias"], (d_y * (y > 0) if relu else d_y).sum(1))
    assert found["d_x"].shape == (2, 7, 0) and found["d_weight"].shape == (2, 3, 0)


def test_any_strides():
    x, weight, bias, d_y = case = make_case(2, 40, 30, 20)
    strided = [x.mT.contiguous().mT, weight.mT.contiguous().mT, bias.T.contiguous().T, d_y.mT.contiguous().mT]
    ours, expected = run(strided, True), run(case, True)
    assert all(torch.equal(ours[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize(("n_in", "n_out"), [(17, 9), (20, 36)], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_networks_whose_parameters_and_rows_lie_elsewhere(precision, n_in, n_out):
    """Three networks within one buffer, back to front; the first and the last share x, columns of a wider one."""
    n = 40
    x, weight, bias, d_y = make_case(3, n, n_in, n_out, dtype=torch.float32)
    x[2] = x[0]
    wide = torch.randn(3, n, n_in + 3, device=DEVICE)
    wide[:, :, :n_in] = x
    size = weight[0].numel() + -(-n_out // 4) * 4
    buffer = torch.randn(3 * size, device=DEVICE)
    at = [2 * size, size, 0]
    for e in range(3):
        buffer[at[e] : at[e] + weight[e].numel()] = weight[e].flatten()
        buffer[at[e] + weight[e].numel() :][:n_out] = bias[e]
    place = torch.tensor([[at[e], at[e] + weight[e].numel(), (e % 2) * wide[0].numel()] for e in range(3)])
    place = place.to(DEVICE)
    y = torch.empty(3, n, n_out, device=DEVICE)
    linear.forward_at(wide, buffer, buffer, place, y, n_in, n_in + 3, True, precision)
    expected = linear.forward(x, weight, bias, True, precision)
    assert torch.equal(y, expected)

    d_x = torch.empty(2, n, n_in, device=DEVICE)  # of the first two alone
    linear.backward_at(d_y[:2], buffer, place, x, d_x, precision)  # as if a ReLU had given x
    of_each = linear.backward(d_y, x, weight, y, False, precision, True, False)[0]
    assert torch.equal(d_x, torch.where(x > 0, of_each, 0)[:2])
    linear.backward_at(d_y, buffer, place, None, d_x[0], precision, range(0, 3, 2))
    torch.testing.assert_close(d_x[0], of_each[0] + of_each[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n_in", "n_out"), [(17, 9), (24, 40)], ids=["unaligned", "aligned"])
def test_what_is_kept_in_bfloat16_gives_the_numbers_that_a_product_rounds(n_in, n_out):
    """Operands that lie in memory as bfloat16, against the same numbers in float32, which products in bf16 round."""
    e, n = 2, 40
    x, weight, bias, d_y = make_case(e, n, n_in, n_out, dtype=torch.float32)
    low_x, low_weight = x.bfloat16(), weight.bfloat16()
    place = [[i * n_out * n_in, i * n_out, i * n * n_in] for i in range(e)]
    place = torch.tensor(place, device=DEVICE)
    y, low_y = torch.empty(e, n, n_out, device=DEVICE), torch.empty(e, n, n_out, device=DEVICE, dtype=torch.bfloat16)
    rounded = [low_x.float(), low_weight.float()]
    linear.forward_at(*rounded, bias, place, y, n_in, n_in, True, "bf16")
    linear.forward_at(low_x, low_weight, bias, place, low_y, n_in, n_in, True, "bf16")
    assert torch.equal(low_y.double(), nearest(y, "bf16"))

    d_x, low_d_x = torch.empty_like(x), torch.empty_like(x)
    linear.backward_at(d_y, rounded[1], place, rounded[0], d_x, "bf16")
    linear.backward_at(d_y, low_weight, place, low_x, low_d_x, "bf16")
    assert torch.equal(low_d_x, d_x)
    d_y = d_y.bfloat16().float()
    lowest_d_x = torch.empty_like(d_x, dtype=torch.bfloat16)
    linear.backward_at(d_y, low_weight, place, low_x, d_x, "bf16")
    linear.backward_at(d_y.bfloat16(), low_weight, place, low_x, lowest_d_x, "bf16")
    assert torch.equal(lowest_d_x.double(), nearest(d_x, "bf16"))

    rows = Rows(0, n_out)
    products = [Product(rows, False, 0, n_in, n_in, 0), Sum(rows, 0, n, n_in * n_out, 1)]
    written = [torch.empty(n_in * n_out + n_out, device=DEVICE) for _ in range(2)]
    for kept, d_z, gradient in zip((rounded[0], low_x), (d_y, d_y.bfloat16()), written, strict=True):
        table = network_gradient.gradient_table(x, products, "bf16", n)
        network_gradient.network_gradient(gradient, table, kept, x, d_z)
    torch.testing.assert_close(*written, rtol=1e-5, atol=1e-5)  # whose instructions may sum in another order


@tiles
def test_gradients_of_all_layers_in_one_launch(precision, n_enough, monkeypatch):
    """Two layers, the rows of two tasks among them: wide and narrow rows, in and outside the buffer, written between
    other numbers."""
    monkeypatch.setattr(settings, "ENOUGH", n_enough)
    n, n_in, hidden, n_out = 70, 10, 68, 72
    x = torch.randn(n, n_in + 1, device=DEVICE)[:, :n_in]
    h = torch.randn(n, hidden, device=DEVICE)
    d_h, d_out = torch.randn(n, hidden, device=DEVICE), torch.randn(n, n_out, device=DEVICE)
    act, d_z = (torch.cat([v.new_zeros(16), v.flatten()]) for v in (h, torch.cat([d_h.flatten(), d_out.flatten()])))
    first, second = Rows(16, hidden), Rows(16 + n * hidden, n_out)
    sizes = {"between": 4, "first": hidden * n_in, "second": hidden * n_out, "bias": n_out + 4, "tasks": 2 * hidden}
    begin = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    gradients = [
        Sum(second, 0, n, begin["bias"], 1),
        Product(first, True, 0, n_in + 1, n_in, begin["first"]),
        *(Sum(first, 35 * t, 35, begin["tasks"] + t, 2) for t in range(2)),
        Product(second, False, 16, hidden, hidden, begin["second"]),
    ]
    table = network_gradient.gradient_table(x, gradients, precision, n)
    written, again = (torch.full((sum(sizes.values()),), 7.0, device=DEVICE) for _ in range(2))
    network_gradient.network_gradient(written, table, act, x, d_z)
    expected = {
        "between": torch.full((4,), 7.0, device=DEVICE),
        "first": nearest(d_h, precision).mT @ nearest(x.contiguous(), precision),
        "second": nearest(d_out, precision).mT @ nearest(h, precision),
        "bias": torch.cat([d_out.double().sum(0), torch.full((4,), 7.0, device=DEVICE)]),
        "tasks": torch.stack([part.double().sum(0) for part in d_h.split(35)], 1),
    }
    for ours, (name, value) in zip(written.split([*sizes.values()]), expected.items(), strict=True):
        torch.testing.assert_close(ours.double(), value.flatten().double(), rtol=1e-5, atol=2e-5, msg=name)
    network_gradient.network_gradient(again, table, act, x, d_z)
    assert torch.equal(again, written)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_base_goes_on_by_its_tasks_row_and_back(precision):
    """f = x W^T + b goes on as f g, g by the task, and as ReLU(f), which a layer of V ReLU(f) reads."""
    e, n, n_in, width, n_out, n_tasks = 2, 37, 20, 130, 9, 3
    dtype = DTYPE if precision == "float32" else torch.float32

    def random(*shape):
        return torch.randn(*shape, device=DEVICE, dtype=dtype)

    parts = {"weight": random(e, width, n_in), "bias": random(e, width), "v": random(e, n_out, width)}
    parts |= {"of_task": random(e, width, n_tasks), "task_bias": random(e, width)}
    buffer = torch.cat([part.flatten() for part in parts.values()])
    begin = dict(zip(parts, accumulate((part.numel() for part in parts.values()), initial=0), strict=False))

    def place(weight, bias, x_width=0):
        """Of both networks; the second one's x comes first."""
        of_net = [[begin[name] + i * parts[name][0].numel() for name in (weight, bias)] for i in range(e)]
        return torch.tensor([[*at, (e - 1 - i) * n * x_width] for i, at in enumerate(of_net)], device=DEVICE)

    x, task = random(e, n, n_in), torch.arange(n, device=DEVICE) % n_tasks
    task[0] = n_tasks  # which does not exist, and adds nothing to the bias
    onehot = (task[:, None] == torch.arange(n_tasks, device=DEVICE)).to(dtype)
    f, scaled, positive, d_f, d_g = (torch.empty(e, n, width, device=DEVICE, dtype=dtype) for _ in range(5))
    of_base, of_task = place("weight", "bias", n_in), place("of_task", "task_bias")
    layers.split_base(x, buffer, buffer, of_base, of_task, task, n_tasks, f, scaled, positive, precision)
    z = nearest(x.flip(0), precision) @ nearest(parts["weight"], precision).mT + parts["bias"][:, None]
    torch.testing.assert_close(f.double(), z.double(), rtol=1e-5, atol=1e-4)
    ours, g = f.clone().requires_grad_(), onehot @ parts["of_task"].mT + parts["task_bias"][:, None]
    g.requires_grad_()
    expected = ours * g, ours.relu()
    torch.testing.assert_close(scaled, expected[0].detach())
    assert torch.equal(positive, expected[1].detach())

    d_y, d_scaled = random(e, n, n_out), random(e, n, width)
    reads = place("v", "bias")
    layers.split_base_backward(d_y, buffer, reads, d_scaled, f, buffer, of_task, task, n_tasks, d_f, d_g, precision)
    d_positive = nearest(d_y, precision) @ nearest(parts["v"], precision)
    truth = torch.autograd.grad(expected, (ours, g), (d_scaled, d_positive.to(dtype)))
    torch.testing.assert_close((d_f, d_g), truth, rtol=1e-5, atol=1e-4)


def test_the_largest_tile_that_leaves_enough_programs():
    """Of the layers of MT10: 1,280 rows, of all critics or of two."""

    def tile(kernel, precision, n_in, n_out, n_nets):
        launch = linear.linear_launch(kernel, precision, n_in, n_out, 1280, n_nets)
        return tuple(value for name, value in launch.items() if name in ("BLOCK_ROWS", "BLOCK_OUT", "BLOCK_IN"))

    assert [tile("fwd", "bf16", 400, 400, n) for n in (1, 2, 6)] == [(64, 64), (64, 128), (128, 128)]
    assert tile("fwd", "tf32", 43, 400, 6) == (64, 64)  # whose rows do not begin at multiples of 16 bytes
    assert tile("bwd", "bf16", 43, 400, 1) == (16, 64)
    assert tile("gradient", "tf32", 400, 400, 6) == (64, 64)
    assert tile("fwd", "float32", 400, 400, 6) == (64, 64) and tile("bwd", "float32", 400, 400, 6) == (32, 64)


def test_value_errors():
    x, weight, bias, _ = make_case(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"triton: expected float32 for x, got torch.float16"):
        linear.forward(x.half(), weight, bias, False, "float32")
    with pytest.raises(ValueError, match=r"precision: expected one of float32, tf32, bf16, got 'fp8'"):
        linear.forward(x, weight, bias, False, "fp8")
