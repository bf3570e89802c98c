"""Grouped products anywhere: loops over blocks of rows, whose trip counts follow the sizes of the groups."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from medplib_jax.batch import Array
from medplib_jax.models.precision import precision_of

# Rows per block, descending. A group takes as many blocks of each size as fit, so that large products run at full speed
# and at most ROW_BLOCKS[-1] - 1 rows per group are computed for nothing.
ROW_BLOCKS = (256, 64, 16)


def multiply(x: Array, w: Array, sizes: Array, *, transpose: bool, **_) -> Array:
    """As `grouped_matmul`, on any device."""
    starts = jnp.cumsum(sizes) - sizes
    out_dim = w.shape[1] if transpose else w.shape[2]
    contract = (((1,), (1 if transpose else 0,)), ((), ()))

    def group(e, out):
        return _multiply_group(x, w[e].astype(x.dtype), starts[e], sizes[e], out, contract)

    return jax.lax.fori_loop(0, w.shape[0], group, jnp.zeros((x.shape[0], out_dim), _result_type(x)))


def weight_gradient(x: Array, dy: Array, sizes: Array, **_) -> Array:
    """x_e.T @ dy_e of every group's rows, [E, D, F] float32."""
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


def grouped_matmul_apart(x_SxD: Array, matrices: Sequence[Array], sizes_E: Array) -> Array:
    """`grouped_matmul` with matrices [D, F] in arrays of their own, in blocks and without gradients."""
    out = jnp.zeros((x_SxD.shape[0], matrices[0].shape[1]), _result_type(x_SxD))
    for start, size, matrix in zip(jnp.cumsum(sizes_E) - sizes_E, sizes_E, matrices, strict=True):
        out = _multiply_group(x_SxD, matrix.astype(x_SxD.dtype), start, size, out, (((1,), (0,)), ((), ())))
    return out


def _multiply_group(x, matrix, start, size, out, contract):
    """`out` with rows [start, start + size) replaced by those of x times the matrix."""

    def block(row, count, keep, out):
        rows = jax.lax.dynamic_slice_in_dim(x, row, count)
        y = jax.lax.dot_general(rows, matrix, contract, precision_of(x), preferred_element_type=out.dtype)
        if keep is not None:
            y = jnp.where(keep, y, jax.lax.dynamic_slice_in_dim(out, row, count))
        return jax.lax.dynamic_update_slice_in_dim(out, y, row, 0)

    return _each_block(start, size, x.shape[0], out, block)


def _result_type(x: Array):
    return jnp.int32 if x.dtype == jnp.int8 else x.dtype


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
