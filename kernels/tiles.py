"""What kernels share: sources of a route, one product, a tile of a linear layer and of its gradient, sums over
threads."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def at_place(ptr, place_ptr, net, column, WIDTH: tl.constexpr):
    """A matrix with rows of that width, which begins behind `ptr` as row `net` of a table [networks,3] says. With rows
    of a multiple of 16 bytes so does it, and the compiler is to know it: an access is as wide as what it starts at."""
    ALIGNED: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    place = tl.load(place_ptr + net * 3 + column)
    if WIDTH % ALIGNED == 0:
        place = place // ALIGNED * ALIGNED
    return ptr + place


@triton.jit
def mix_sources(
    h_ptr, index_ptr, gate_ptr, slot, row, wanted, route, col, n_rows, D: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """x = sum_k gate_k * h[source_k] of one route, [rows,cols]; 0 where a row is not wanted or a column not below D.

    `h_ptr` is at a network [N,B,D], `slot` at each row's first slot of the route. Route i has min(K, i) used slots;
    the others are not read, so a row that no longer wants a module costs no traffic and meets no unwritten memory.
    """
    x = tl.zeros((slot.shape[0], col.shape[0]), h_ptr.dtype.element_ty)
    for k in tl.range(0, K, loop_unroll_factor=K if K <= 4 else 1):  # unrolled, many slots compile for minutes
        used = tl.where(route > k, wanted, False)
        source = tl.load(index_ptr + slot + k, mask=used, other=0)
        gate = tl.load(gate_ptr + slot + k, mask=used, other=0.0)
        at = (source.to(tl.int64) * n_rows + row) * D
        h = tl.load(h_ptr + at[:, None] + col[None, :], mask=used[:, None] & (col < D)[None, :], other=0.0)
        x += gate[:, None] * h
    return x


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b in the products' precision; the total stays in its own type (float32).

    A float32 product is the sum of three of tf32, of either operand's upper and lower bits: nearly as exact as one by
    multiply-adds (`benches/precision_error.py`), on units that are many times as fast.
    """
    if PRECISION == "bf16":
        a = a.to(tl.bfloat16)
        b = b.to(tl.bfloat16)
        if INTERPRETED:  # the interpreter's product takes the bits of a bfloat16 for an integer
            a = a.to(total.dtype)
            b = b.to(total.dtype)
    if PRECISION == "float32" and not INTERPRETED:
        return tl.dot(a, b, total, input_precision="tf32x3", out_dtype=total.dtype)
    return tl.dot(a, b, total, input_precision="tf32" if PRECISION == "tf32" else "ieee", out_dtype=total.dtype)


@triton.jit
def by_rows(a):
    """`a` [rows,cols] itself, in the layout of loads and stores: a row lies in one warp, next to each other.

    What a product gives stays as tensor cores left it, and so does all that is computed with it: each load or store
    beside it then goes through shared memory, with two barriers, to be laid out alike. A gather along rows is laid out
    by rows; this one takes every number from where it is, so that only the product itself goes there.
    """
    col = tl.arange(0, a.shape[1])[None, :]
    return tl.gather(a, tl.broadcast_to(col, a.shape), 1)


@triton.jit
def to_tf32(a):
    """float32 rounded to the 10 bits of tf32, to nearest and ties away from zero: a tensor core just drops the others.

    Half of the last bit kept is added to the bits, of whatever sign. A NaN stays one: its bits could run over to 0.
    """
    bits = a.to(tl.int32, bitcast=True)
    return tl.where(a == a, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), a)


@triton.jit
def rounded_product(a, b, total, PRECISION: tl.constexpr):
    """As `product`, with operands rounded to nearest in tf32 too."""
    if PRECISION == "tf32" and a.dtype == tl.float32:
        a = to_tf32(a)
        b = to_tf32(b)
    return product(a, b, total, PRECISION)


@triton.jit
def zeros_for(ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A sum that goes to `ptr`, [ROWS,COLS]: of its type, but in float32 for bfloat16."""
    if ptr.dtype.element_ty == tl.bfloat16:
        total = tl.zeros((ROWS, COLS), tl.float32)
    else:
        total = tl.zeros((ROWS, COLS), ptr.dtype.element_ty)
    return total


@triton.jit
def block(tile, n, BLOCK: tl.constexpr, begin=0):
    """Places of a block (int64, because they are multiplied by widths), and which of them exist."""
    at = begin + tile * BLOCK + tl.arange(0, BLOCK)
    return at.to(tl.int64), at < n


@triton.jit
def load_tile(ptr, first, exists, second, width, stride):
    """Rows `first`, columns `second` of a matrix of that width; 0 where there are none."""
    mask = exists[:, None] & (second < width)[None, :]
    return tl.load(ptr + (first * stride)[:, None] + second[None, :], mask=mask, other=0.0)


@triton.jit
def load_d_z(d_y_ptr, y_ptr, row, inside, out, N_OUT: tl.constexpr):
    """The gradient in front of the ReLU that gave y, [rows,outs]: d_y where y is above 0; both [B,out]. None: there is
    no ReLU."""
    d_z = load_tile(d_y_ptr, row, inside, out, N_OUT, N_OUT)
    if y_ptr is not None:
        d_z = in_front_of_relu(d_z, y_ptr, row, inside, out, N_OUT)
    return d_z


@triton.jit
def in_front_of_relu(d_y, y_ptr, row, inside, col, WIDTH: tl.constexpr):
    """d_y, rows and columns of a gradient [B,WIDTH], where the ReLU's output y is above 0; else 0."""
    y = load_tile(y_ptr, row, inside, col, WIDTH, WIDTH).to(d_y.dtype)  # the interpreter compares a bfloat16's bits
    return tl.where(y > 0, d_y, 0.0)


@triton.jit
def linear_tile(
    z, x_ptr, row, inside, weight_ptr, out, exists, n_in, x_stride,
    N_IN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """z + x W^T of some rows and outputs, [rows,outs]. x has n_in features, of at most N_IN, and its rows lie x_stride
    apart."""
    for start in range(0, N_IN, BLOCK_DEPTH):
        feature = start + tl.arange(0, BLOCK_DEPTH)
        x = load_tile(x_ptr, row, inside, feature, n_in, x_stride)
        weight = load_tile(weight_ptr, out, exists, feature, n_in, n_in)
        z = rounded_product(x, tl.trans(weight), z, PRECISION)
    return z


@triton.jit
def linear_tile_backward(
    d_x, d_y_ptr, y_ptr, row, inside, weight_ptr, feature, n_in,
    N_OUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """d_x + d_z W of some rows and input features, [rows,ins]; d_z from d_y and y as `load_d_z`."""
    for start in range(0, N_OUT, BLOCK_DEPTH):
        out = start + tl.arange(0, BLOCK_DEPTH)
        d_z = load_d_z(d_y_ptr, y_ptr, row, inside, out, N_OUT)
        weight = load_tile(weight_ptr, out, out < N_OUT, feature, n_in, n_in)
        d_x = rounded_product(d_z, weight, d_x, PRECISION)
    return d_x


@triton.jit
def sum_products(a, b, axis: tl.constexpr):
    """Sum of a * b along an axis, with the same bits in every thread that holds it.

    Two threads add by swapping values, each its own to the other's. Were its own a plain product, the compiler would
    contract it into that addition: rounded in the thread that receives it, unrounded in the one that made it, and so
    two sums. An fma is contracted no further, and its + 0 cannot be dropped: it turns a -0 into a 0.
    """
    return tl.sum(tl.fma(a, b, 0.0), axis)
