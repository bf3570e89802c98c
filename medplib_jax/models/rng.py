"""Keys that may be absent, and dropout."""

import jax
import jax.numpy as jnp

from medplib_jax.batch import Array
from medplib_jax.models.target import is_for_tpu


def split_rng(rng: Array | None, count: int):
    """`count` keys, or as many Nones when there is no key."""
    return [None] * count if rng is None else jax.random.split(rng, count)


def dropout(x: Array, rate: float, rng: Array | None) -> Array:
    """Inverted dropout; the identity without an rng or at rate 0. The rate is rounded to 16 bits: drawing is what costs
    on a CPU, and a word serves two values."""
    if rng is None or rate == 0.0:
        return x
    dropped = round(rate * 2**16)
    return jnp.where(_sixteen_bits(rng, x) >= dropped, x * (2**16 / (2**16 - dropped)), 0).astype(x.dtype)


def _sixteen_bits(rng: Array, x: Array) -> Array:
    if is_for_tpu(x):  # where drawing is cheap and taking words apart moves them through memory
        return jax.random.bits(rng, x.shape, jnp.uint16)
    words = jax.random.bits(rng, (*x.shape[:-1], -(-x.shape[-1] // 2)), jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
