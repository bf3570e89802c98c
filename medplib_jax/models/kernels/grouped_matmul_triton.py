"""Grouped products on a GPU: one Pallas kernel in Triton, whose programs each compute a tile of one group's rows.

XLA has no such product for NVIDIA GPUs: it multiplies every row with every group's matrix and keeps one result.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from medplib_jax.batch import Array

ROWS = 128  # of a tile
DEPTH_BYTES = 128  # of a tile's factors along the summed axis, per stage of the pipeline: one line of the cache
STAGES = 3
NEIGHBOURS = 8  # row tiles that run together, so that their columns of the matrix are read from the cache
WIDE_TILES = ("A100", "H100", "H200", "B200")  # have the 147 KB of shared memory that three stages of 128 x 256 take
MULTIPLE = 16  # sides of the matrix unit


def obstacle(x_SxD: Array, w_ExDxF: Array, _device) -> str:
    """Why these products cannot be computed, or nothing. Tiles leave no remainder, Triton's indices have 32 bits."""
    sides = w_ExDxF.shape[1:]
    if any(size % MULTIPLE for size in sides):
        return f"matrices of {sides[0]} x {sides[1]} are not multiples of {MULTIPLE}"
    too_many = max(w_ExDxF.size, x_SxD.shape[0] * max(sides)) >= 2**31
    return "an array has more values than 32 bits count" if too_many else ""


def multiply(x_SxD: Array, w_ExDxF: Array, sizes_E: Array, *, transpose: bool, device) -> Array:
    """The first sizes[0] rows of x times w[0], the next times w[1], ...; other rows give zero.

    Sums are float32, the result has x's dtype; of int8 both are int32.
    With `transpose`, times w[e].T. `device` (`platform`, `device_kind`) is what the program will run on; on a CPU it is
    interpreted.
    """
    w_ExDxF = w_ExDxF.astype(x_SxD.dtype)
    (rows, inner), outer = x_SxD.shape, w_ExDxF.shape[1 if transpose else 2]
    tile_of = _largest_tile(device)
    depth, columns = tile_of(inner, DEPTH_BYTES // x_SxD.dtype.itemsize), tile_of(outer, 256)
    group_T, start_T, stop_T = row_tiles(sizes_E, rows)
    tiles = (len(group_T), outer // columns)
    kernel = functools.partial(_multiply_kernel, tiles=tiles, depth=depth, columns=columns, transpose=transpose)
    out_type = jnp.int32 if x_SxD.dtype == jnp.int8 else x_SxD.dtype
    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, outer), out_type),
        grid=(math.prod(tiles),),
        name="gmm_triton",
        **_how(device, 2 * rows * inner * outer),
    )
    return call(group_T, start_T, stop_T, x_SxD, w_ExDxF)


def weight_gradient(x_SxD: Array, dy_SxF: Array, sizes_E: Array, *, device) -> Array:
    """x_e.T @ dy_e of every group's rows, [E, D, F] float32."""
    (rows, inner), outer = x_SxD.shape, dy_SxF.shape[1]
    tile_of = _largest_tile(device)
    height, columns = tile_of(inner, ROWS), tile_of(outer, 256)
    stop_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    kernel = functools.partial(
        _weight_gradient_kernel, height=height, columns=columns, depth=DEPTH_BYTES // x_SxD.dtype.itemsize
    )
    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((len(sizes_E), inner, outer), jnp.float32),
        grid=(inner // height, outer // columns, len(sizes_E)),
        name="tgmm_triton",
        **_how(device, 2 * rows * inner * outer),
    )
    return call(stop_E - sizes_E.astype(jnp.int32), stop_E, x_SxD, dy_SxF)


def row_tiles(sizes_E: Array, rows: int) -> tuple[Array, Array, Array]:
    """(group, first row, row after the last) of every tile, int32 [T]. Tiles of a group follow each other.

    Rows of no group are group E. As many tiles as any sizes may need: those left over hold no rows.
    """
    sizes = jnp.append(sizes_E, rows - sizes_E.sum()).astype(jnp.int32)
    stops, tiles = jnp.cumsum(sizes), -(-sizes // ROWS)
    index_T = jnp.arange(rows // ROWS + len(sizes), dtype=jnp.int32)
    ended_T = (index_T[:, None] >= jnp.cumsum(tiles)).sum(1, dtype=jnp.int32)  # groups before it
    group_T = jnp.minimum(ended_T, len(sizes) - 1)
    within_T = index_T - (jnp.cumsum(tiles) - tiles)[group_T]
    start_T = (stops - sizes)[group_T] + within_T * ROWS
    return group_T, start_T, jnp.minimum(start_T + ROWS, stops[group_T])


def _largest_tile(device):
    most = 256 if any(name in device.device_kind for name in WIDE_TILES) else 128
    return lambda size, limit: math.gcd(size, min(limit, most))


def _how(device, flops: int) -> dict:
    cost = pl.CostEstimate(flops=flops, bytes_accessed=0, transcendentals=0)
    return {
        "compiler_params": plgpu.CompilerParams(num_warps=8, num_stages=STAGES),
        "interpret": device.platform != "gpu",
        "cost_estimate": cost,
    }


def _multiply_kernel(group_ref, start_ref, stop_ref, x_ref, w_ref, y_ref, *, tiles, depth, columns, transpose):
    row_tile, column_tile = _near(pl.program_id(0), *tiles)
    start, stop, group = start_ref[row_tile], stop_ref[row_tile], group_ref[row_tile]
    row = start + jnp.arange(ROWS)
    inside = jnp.minimum(row, x_ref.shape[0] - 1)[:, None]  # rows past the tile's own are computed and not kept
    column = column_tile * columns + jnp.arange(columns)
    sum_type = jnp.int32 if x_ref.dtype == jnp.int8 else jnp.float32
    has_matrix = group < w_ref.shape[0]
    group = jnp.minimum(group, w_ref.shape[0] - 1)

    @pl.when(start < stop)
    def _():
        def step(i, total):
            k = i * depth + jnp.arange(depth)
            x = x_ref[inside, k[None, :]]
            w = w_ref[group, column[None, :], k[:, None]] if transpose else w_ref[group, k[:, None], column[None, :]]
            return total + jnp.dot(x, w, preferred_element_type=sum_type)

        trips = has_matrix.astype(jnp.int32) * (x_ref.shape[1] // depth)
        y = jax.lax.fori_loop(0, trips, step, jnp.zeros((ROWS, columns), sum_type))
        plgpu.store(y_ref.at[row[:, None], column[None, :]], y.astype(y_ref.dtype), mask=(row < stop)[:, None])


def _near(program, row_tiles: int, column_tiles: int):
    """Programs in the order in which they start: NEIGHBOURS row tiles for one column tile, then for the next."""
    band, within = jax.lax.div(program, NEIGHBOURS * column_tiles), jax.lax.rem(program, NEIGHBOURS * column_tiles)
    height = jnp.minimum(row_tiles - band * NEIGHBOURS, NEIGHBOURS)
    return band * NEIGHBOURS + jax.lax.rem(within, height), jax.lax.div(within, height)


def _weight_gradient_kernel(start_ref, stop_ref, x_ref, dy_ref, dw_ref, *, height, columns, depth):
    group = pl.program_id(2)
    start, stop = start_ref[group], stop_ref[group]
    inner = pl.program_id(0) * height + jnp.arange(height)
    column = pl.program_id(1) * columns + jnp.arange(columns)

    def step(i, total):
        row = start + i * depth + jnp.arange(depth)
        inside, keep = jnp.minimum(row, x_ref.shape[0] - 1), row < stop
        x = plgpu.load(x_ref.at[inside[None, :], inner[:, None]], mask=keep[None, :], other=0)
        dy = plgpu.load(dy_ref.at[inside[:, None], column[None, :]], mask=keep[:, None], other=0)
        return total + jnp.dot(x, dy, preferred_element_type=jnp.float32)

    trips = jax.lax.div(stop - start + depth - 1, depth)
    dw_ref[group, inner[:, None], column[None, :]] = jax.lax.fori_loop(
        0, trips, step, jnp.zeros((height, columns), jnp.float32)
    )
