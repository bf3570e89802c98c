"""Products of groups of rows with one matrix per group: what a token costs does not depend on the number of groups.

`grouped_matmul(x, w, sizes)`: the first sizes[0] rows of x times w[0], the next sizes[1] rows times w[1], ...; rows
beyond the groups give zero. For a TPU and for a GPU it is a kernel of our own (`grouped_matmul_tpu.py`,
`grouped_matmul_gpu.py`), elsewhere loops over blocks of rows whose trip counts follow the group sizes. The choice is
made when the program is traced: by the mesh that x lives on (so that compiling for a TPU or GPU works without one),
else by the default backend.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from medplib_jax.batch import Array
from medplib_jax.models.precision import precision_of
from medplib_jax.models.target import is_for_gpu, is_for_tpu, target_device

# Rows per block, descending. A group takes as many blocks of each size as fit, so that large products run at full speed
# and at most ROW_BLOCKS[-1] - 1 rows per group are computed for nothing.
ROW_BLOCKS = (256, 64, 16)
TPU_ROW_TILE = 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(x_SxD: Array, w: Array, sizes_E: Array, transposed: bool = False) -> Array:
    """[S, D] rows sorted by group times w [E, D, F], or [E, F, D] if `transposed`, -> [S, F] in x's dtype.

    int8 times int8 gives int32.
    """
    return _multiply(x_SxD, w, sizes_E, transpose=transposed)


def _forward(x_SxD, w, sizes_E, transposed):
    return _multiply(x_SxD, w, sizes_E, transpose=transposed), (x_SxD, w, sizes_E)


def _backward(transposed, residuals, dy_SxF):
    x_SxD, w, sizes_E = residuals
    dx_SxD = _multiply(dy_SxF, w, sizes_E, transpose=not transposed)
    dw = _weight_gradient(*((dy_SxF, x_SxD) if transposed else (x_SxD, dy_SxF)), w, sizes_E).astype(w.dtype)
    return dx_SxD, dw, np.zeros(sizes_E.shape, jax.dtypes.float0)


grouped_matmul.defvjp(_forward, _backward)


def grouped_matmul_apart(x_SxD: Array, matrices: Sequence[Array], sizes_E: Array) -> Array:
    """`grouped_matmul` with matrices [D, F] in arrays of their own, in blocks and without gradients."""
    out = jnp.zeros((x_SxD.shape[0], matrices[0].shape[1]), _result_type(x_SxD))
    for start, size, matrix in zip(jnp.cumsum(sizes_E) - sizes_E, sizes_E, matrices, strict=True):
        out = _multiply_group(x_SxD, matrix.astype(x_SxD.dtype), start, size, out, (((1,), (0,)), ((), ())))
    return out


def _result_type(x: Array):
    return jnp.int32 if x.dtype == jnp.int8 else x.dtype


def _multiply(x, w, sizes, *, transpose):
    if gpu := _gpu_kernels(x, w):
        return gpu.multiply(x, w, sizes, transpose=transpose, device=target_device(x))
    return (_multiply_tpu if is_for_tpu(x) else _multiply_blocks)(x, w, sizes, transpose)


def _weight_gradient(x, dy, w, sizes):
    if gpu := _gpu_kernels(x, w):
        return gpu.weight_gradient(x, dy, sizes, device=target_device(x))
    return (_weight_gradient_tpu if is_for_tpu(x) else _weight_gradient_blocks)(x, dy, sizes)


def _gpu_kernels(x, w):
    """The module of our kernels where they can be used, else None. It is imported late, as the TPU's are."""
    if not is_for_gpu(x):
        return None
    from medplib_jax.models.kernels import grouped_matmul_gpu as gpu

    return gpu if gpu.suits_triton(x.shape[0], w) else None


# ---- blocks of rows ----


def _each_block(start: Array, size: Array, num_rows: int, carry, body: Callable):
    """body(row, count, keep [count], carry) -> carry, over blocks that cover rows [start, start + size) of `num_rows`.

    `keep` is None where the block lies inside the range, else it says which of its rows do.
    """
    for count in ROW_BLOCKS:
        count, last = min(count, num_rows), count == ROW_BLOCKS[-1]
        trips = -(-size // count) if last else size // count

        def step(i, carry, count=count, last=last, start=start, size=size):
            row = start + i * count
            if not last:
                return body(row, count, None, carry)
            shifted = jnp.minimum(row, num_rows - count)
            index = shifted + jnp.arange(count)
            return body(shifted, count, ((index >= row) & (index < start + size))[:, None], carry)

        carry = jax.lax.fori_loop(0, trips, step, carry)
        start, size = start + trips * count, size - trips * count
    return carry


def _multiply_blocks(x, w, sizes, transpose):
    starts = jnp.cumsum(sizes) - sizes
    out_dim = w.shape[1] if transpose else w.shape[2]
    contract = (((1,), (1 if transpose else 0,)), ((), ()))

    def group(e, out):
        return _multiply_group(x, w[e].astype(x.dtype), starts[e], sizes[e], out, contract)

    return jax.lax.fori_loop(0, w.shape[0], group, jnp.zeros((x.shape[0], out_dim), _result_type(x)))


def _multiply_group(x, matrix, start, size, out, contract):
    """`out` with rows [start, start + size) replaced by those of x times the matrix."""

    def block(row, count, keep, out):
        rows = jax.lax.dynamic_slice_in_dim(x, row, count)
        y = jax.lax.dot_general(rows, matrix, contract, precision_of(x), preferred_element_type=out.dtype)
        if keep is not None:
            y = jnp.where(keep, y, jax.lax.dynamic_slice_in_dim(out, row, count))
        return jax.lax.dynamic_update_slice_in_dim(out, y, row, 0)

    return _each_block(start, size, x.shape[0], out, block)


def _weight_gradient_blocks(x, dy, sizes):
    starts = jnp.cumsum(sizes) - sizes

    def group(e):
        def block(row, count, keep, total):
            rows, grads = (jax.lax.dynamic_slice_in_dim(a, row, count) for a in (x, dy))
            if keep is not None:
                grads = jnp.where(keep, grads, 0)
            return total + jax.lax.dot_general(
                rows, grads, (((0,), (0,)), ((), ())), precision_of(rows), preferred_element_type=jnp.float32
            )

        return _each_block(starts[e], sizes[e], x.shape[0], jnp.zeros((x.shape[1], dy.shape[1]), jnp.float32), block)

    return jax.lax.map(group, jnp.arange(sizes.shape[0]))


# ---- a TPU's kernels (imported where they are used: a second that other platforms need not spend) ----


def _gradient_tiling(rows: int, inner: int, outer: int) -> tuple[int, int, int]:
    return TPU_ROW_TILE, min(inner, 512), min(outer, 512)


def _pad_rows(x: Array) -> Array:
    return jnp.pad(x, ((0, -x.shape[0] % TPU_ROW_TILE), (0, 0)))


def _with_rest(sizes: Array, rows: int) -> Array:
    """Appends the rows that belong to no group as a last group without a matrix: the kernel zeroes it."""
    return jnp.append(sizes, rows - sizes.sum()).astype(jnp.int32)


def _multiply_tpu(x, w, sizes, transpose):
    from medplib_jax.models.kernels.grouped_matmul_tpu import gmm

    rows, kind = _pad_rows(x), target_device(x).device_kind
    groups = _with_rest(sizes, rows.shape[0])
    y = gmm(rows, w.astype(x.dtype), groups, transpose=transpose, device_kind=kind)
    return y[: x.shape[0]]


def _weight_gradient_tpu(x, dy, sizes):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows, grads = _pad_rows(x), _pad_rows(dy)
    return tgmm(
        rows.T, grads, _with_rest(sizes, rows.shape[0]), jnp.float32, _gradient_tiling, num_actual_groups=sizes.shape[0]
    )
