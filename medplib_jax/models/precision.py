"""Products whose precision is said: float32 factors are multiplied as float32.

Left to itself a TPU multiplies float32 matrices in one bfloat16 pass and a GPU in TF32, both without a word. A bfloat16
model keeps float32 for what needs it (router, coordinates, mask resampling, region pooling), so these products say
HIGHEST; so do all of a float32 model.
"""

import jax
import jax.numpy as jnp

from medplib_jax.batch import Array

HIGHEST = jax.lax.Precision.HIGHEST


def precision_of(*factors: Array) -> jax.lax.Precision | None:
    """HIGHEST if a factor is float32. Else the default: products of bfloat16 factors are exact, their sum float32."""
    return HIGHEST if any(jnp.result_type(factor) == jnp.float32 for factor in factors) else None


def product(x: Array, y: Array, dtype=None) -> Array:
    """x @ y, the result in `dtype` (default: that of the factors)."""
    return jnp.matmul(x, y, precision=precision_of(x, y), preferred_element_type=dtype)


def einsum(pattern: str, *factors: Array) -> Array:
    """`jnp.einsum`."""
    return jnp.einsum(pattern, *factors, precision=precision_of(*factors))
