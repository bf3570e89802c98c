"""Grouped products of a TPU that read every matrix once: the whole inner width of a tile lies in the chip's memory.

The kernel that ships with JAX (megablox) sums over tiles of a wide inner width, and reads a matrix anew for each tile
of rows: 128 products per byte, where a v5e computes 240 and a v6e 560 while it reads one. Here a column block of a
matrix stays for all rows of its group, and the rows are read once per column block. The visits of row tiles are
megablox's: a tile on the border of two groups is visited by both.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata, tgmm

from medplib_jax.batch import Array
from medplib_jax.models.precision import precision_of

ROW_TILE, LANES = 128, 128
SMALL_MEMORY = ("TPU v2", "TPU v3", "TPU v4")  # 16 MiB near the matrix units
LARGE_MEMORY = ("TPU v5 lite", "TPU v5e", "TPU v6")  # 128 MiB; all others have 64 or more
UNROLLED, STEP = 10 * 2**20, 512  # products of a row at most in one piece of code: more would compile for minutes
SPARE = 2**21  # beside the blocks, for what the compiler adds


def memory_limit(device_kind: str) -> int:
    """Bytes of the memory near the matrix units that a kernel may take."""
    if device_kind.startswith(SMALL_MEMORY):
        return 14 * 2**20
    return (104 if device_kind.startswith(LARGE_MEMORY) else 48) * 2**20


def column_block(inner: int, outer: int, itemsize: int, device_kind: str) -> int:
    """Columns of a matrix [inner, outer] that are in the chip's memory at a time, a multiple of `_columns_at_once`.

    Two blocks of each array are: one is computed with while the next one travels. float32 is multiplied in parts of
    bfloat16, which take as much again. The result is summed in float32, that of integers in int32.
    """
    copies = 4 if itemsize == 4 else 2
    limit = memory_limit(device_kind) - SPARE
    per_column = copies * itemsize * (inner + ROW_TILE) + 2 * 4 * ROW_TILE
    room = (limit - copies * itemsize * inner * ROW_TILE) // per_column

    def equal_blocks(unit: int) -> int:
        most = max(room // unit, 1) * unit
        return math.ceil(outer / math.ceil(outer / most) / unit) * unit

    columns = equal_blocks(LANES)
    return columns if _columns_at_once(inner, columns) == columns else equal_blocks(STEP)


def _columns_at_once(inner: int, columns: int) -> int:
    """Columns that are multiplied in one piece of code; a block of more goes through it several times."""
    return columns if inner * columns <= UNROLLED else STEP


def multiply(x_SxD: Array, w: Array, sizes_E: Array, *, transpose: bool, device) -> Array:
    """As `grouped_matmul`, by `gmm`."""
    rows = _pad_rows(x_SxD)
    groups = _with_rest(sizes_E, rows.shape[0])
    y = gmm(rows, w.astype(x_SxD.dtype), groups, transpose=transpose, device_kind=device.device_kind)
    return y[: x_SxD.shape[0]]


def weight_gradient(x_SxD: Array, dy_SxF: Array, sizes_E: Array, **_) -> Array:
    """x_e.T @ dy_e of every group's rows, [E, D, F] float32, by JAX's megablox."""
    rows, grads = _pad_rows(x_SxD), _pad_rows(dy_SxF)
    sizes = _with_rest(sizes_E, rows.shape[0])
    return tgmm(rows.T, grads, sizes, jnp.float32, _gradient_tiling, num_actual_groups=len(sizes_E))


def _gradient_tiling(rows: int, inner: int, outer: int) -> tuple[int, int, int]:
    return ROW_TILE, min(inner, 512), min(outer, 512)


def _pad_rows(x: Array) -> Array:
    return jnp.pad(x, ((0, -x.shape[0] % ROW_TILE), (0, 0)))


def _with_rest(sizes: Array, rows: int) -> Array:
    """Appends the rows that belong to no group as a last group without a matrix: the kernel zeroes it."""
    return jnp.append(sizes, rows - sizes.sum()).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("transpose", "device_kind"))  # which gives the kernel its name
def gmm(x_SxD: Array, w: Array, sizes_G: Array, *, transpose: bool, device_kind: str) -> Array:
    """Rows sorted by group times w [E, D, F], or [E, F, D] if `transpose`, in x's dtype [S, F]; int8 gives int32.

    S is a multiple of ROW_TILE. `sizes_G` sum to S: those of E groups, and behind them rows that give zero.
    """
    rows, inner = x_SxD.shape
    groups, outer = w.shape[0], w.shape[1 if transpose else 2]
    columns = column_block(inner, outer, x_SxD.dtype.itemsize, device_kind)
    visits, num_visits = make_group_metadata(
        group_sizes=sizes_G,
        m=rows,
        tm=ROW_TILE,
        start_group=jnp.int32(0),
        num_nonzero_groups=groups,
        visit_empty_groups=False,
    )
    block = (None, columns, inner) if transpose else (None, inner, columns)

    def matrix(n, i, visits):
        return (visits[1][i], n, 0) if transpose else (visits[1][i], 0, n)

    y_SxF = pl.pallas_call(
        functools.partial(_tile, transpose=transpose),
        name="gmm",
        out_shape=jax.ShapeDtypeStruct((rows, outer), jnp.int32 if x_SxD.dtype == jnp.int8 else x_SxD.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(math.ceil(outer / columns), num_visits),
            in_specs=[
                pl.BlockSpec((ROW_TILE, inner), lambda n, i, visits: (visits[2][i], 0)),
                pl.BlockSpec(block, matrix),
            ],
            out_specs=pl.BlockSpec((ROW_TILE, columns), lambda n, i, visits: (visits[2][i], n)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=memory_limit(device_kind)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inner * outer,
            bytes_accessed=(x_SxD.size * math.ceil(outer / columns) + w.size + rows * outer) * x_SxD.dtype.itemsize,
            transcendentals=0,
        ),
    )(visits, x_SxD, w)
    return jnp.where((jnp.arange(rows) < sizes_G[:groups].sum())[:, None], y_SxF, 0)


def _tile(visits, x_ref, w_ref, y_ref, *, transpose: bool):
    """One visit of a tile of rows by a group, which writes its own rows."""
    starts, group_ids, tiles = visits
    i = pl.program_id(1)
    group = group_ids[i]
    x, width = x_ref[...], y_ref.shape[1]
    at_once = _columns_at_once(x.shape[1], width)
    sum_type = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    row = jax.lax.broadcasted_iota(jnp.int32, (ROW_TILE, at_once), 0) + tiles[i] * ROW_TILE
    own = (row >= starts[group]) & (row < starts[group + 1])

    def multiply(part, _):
        columns = pl.ds(part * at_once, at_once)
        w = w_ref[columns, :] if transpose else w_ref[:, columns]
        y = jax.lax.dot_general(
            x, w, (((1,), (1 if transpose else 0,)), ((), ())), precision_of(x), preferred_element_type=sum_type
        )
        y_ref[:, columns] = jnp.where(own, y, y_ref[:, columns].astype(sum_type)).astype(y_ref.dtype)

    jax.lax.fori_loop(0, width // at_once, multiply, None)
