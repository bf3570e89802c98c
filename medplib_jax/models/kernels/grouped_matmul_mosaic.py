"""Grouped products on a GPU of the Hopper generation, by the kernels that JAX ships in Mosaic GPU.

They are JAX's successors of its support of Triton. Both leave what belongs to no group unwritten, and sum in float32;
the matrices' gradient is rounded to the rows' type, where the other ways give float32.
"""

import functools
import math
import types

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

from medplib_jax.batch import Array

HOPPER = ("H100", "H200")  # whose matrix unit (`wgmma`) the kernels are written for
CORES = 132  # of both, one program each
TILE, DEPTH = 128, 64  # sides of a tile of the result; rows or columns of the factors that travel at once


def obstacle(x_SxD: Array, w_ExDxF: Array, device) -> str:
    """Why these products cannot be computed here, or nothing."""
    sides = w_ExDxF.shape[1:]
    if not any(name in device.device_kind for name in HOPPER):
        return f"it is for {' and '.join(HOPPER)}"
    if x_SxD.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies bfloat16 and float16, not {x_SxD.dtype}"
    if any(size % TILE for size in sides):
        return f"matrices of {sides[0]} x {sides[1]} are not multiples of {TILE}"
    return f"{x_SxD.shape[0]} rows are less than a tile of {TILE}" if x_SxD.shape[0] < TILE else ""


def multiply(x_SxD: Array, w: Array, sizes_E: Array, *, transpose: bool, **_) -> Array:
    """As `grouped_matmul`."""
    return mosaic_gmm(x_SxD, w.astype(x_SxD.dtype), sizes_E.astype(jnp.int32), transpose)


def weight_gradient(x_SxD: Array, dy_SxF: Array, sizes_E: Array, **_) -> Array:
    """x_e.T @ dy_e of every group's rows, [E, D, F] in x's dtype."""
    return mosaic_tgmm(x_SxD, dy_SxF, sizes_E.astype(jnp.int32))


@functools.partial(jax.jit, static_argnames="transpose")  # its name is that of the kernel, by which FLOPs are counted
def mosaic_gmm(x_SxD: Array, w: Array, sizes_E: Array, transpose: bool) -> Array:
    tiles = _tiles(w.shape[1 if transpose else 2])
    y_SxF = ragged_dot_mgpu.ragged_dot(x_SxD, w, group_sizes=sizes_E, transpose_rhs=transpose, **tiles)
    return jnp.where((jnp.arange(len(x_SxD)) < sizes_E.sum())[:, None], y_SxF, 0)


@jax.jit
def mosaic_tgmm(x_SxD: Array, dy_SxF: Array, sizes_E: Array) -> Array:
    return _transposed_ragged_dot(x_SxD, dy_SxF, group_sizes=sizes_E, **_tiles(dy_SxF.shape[1]))


def _tiles(outer: int) -> dict[str, int]:
    neighbours = math.gcd(outer // TILE, 8)  # column tiles that run together, so that rows are read from the cache
    return {"block_m": TILE, "block_n": TILE, "block_k": DEPTH, "max_concurrent_steps": 4, "grid_block_n": neighbours}


def _for_cores(kernel, cores: int):
    """The kernel made for a GPU of so many cores.

    It asks `jax.devices()[0]` for their number, which is another device when a program is compiled for a GPU that is
    not there.
    """
    names = types.SimpleNamespace(**vars(jax) | {"devices": lambda: [types.SimpleNamespace(core_count=cores)]})
    made = types.FunctionType(kernel.__code__, kernel.__globals__ | {"jax": names})
    made.__kwdefaults__ = kernel.__kwdefaults__
    return made


_transposed_ragged_dot = _for_cores(transposed_ragged_dot_mgpu.transposed_ragged_dot, CORES)
