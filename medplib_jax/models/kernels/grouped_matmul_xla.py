"""Grouped products as XLA has them (`jax.lax.ragged_dot`): off TPUs all rows meet all matrices."""

import jax
import jax.numpy as jnp

from medplib_jax.batch import Array
from medplib_jax.models.precision import precision_of

ROWS_SUMMED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=()
)


def multiply(x_SxD: Array, w: Array, sizes_E: Array, *, transpose: bool, **_) -> Array:
    """As `grouped_matmul`."""
    w_ExDxF = (w.swapaxes(1, 2) if transpose else w).astype(x_SxD.dtype)
    out_type = jnp.int32 if x_SxD.dtype == jnp.int8 else x_SxD.dtype
    return jax.lax.ragged_dot(x_SxD, w_ExDxF, sizes_E, precision_of(x_SxD), out_type)


def weight_gradient(x_SxD: Array, dy_SxF: Array, sizes_E: Array, **_) -> Array:
    """x_e.T @ dy_e of every group's rows, [E, D, F] float32."""
    return jax.lax.ragged_dot_general(
        x_SxD, dy_SxF, sizes_E, ROWS_SUMMED, precision=precision_of(x_SxD), preferred_element_type=jnp.float32
    )
