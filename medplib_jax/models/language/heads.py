"""Projections into attention heads and back, for a TPU without a copy between them.

The kernel of a TPU's attention takes heads one after the other, [B, H, L, K]. A product whose result is [B, L, H * K]
is in another order in memory, so each of queries, keys, values and their gradients would be copied once. Here the
product itself has heads.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from medplib_jax.batch import Array
from medplib_jax.models.layers import THIN, Linear, adapter_product
from medplib_jax.models.precision import einsum
from medplib_jax.models.rng import dropout
from medplib_jax.models.target import is_for_tpu


def into_heads(linear: Linear, x_BxLxD: Array, width: int, rng: Array | None) -> Array:
    """`linear` of x as heads of this width, [B, L, H, K]."""
    if not _has_heads(linear, x_BxLxD):
        return rearrange(linear(x_BxLxD, rng=rng), "B L (H K) -> B L H K", K=width)
    kernel_DxHxK = rearrange(linear.kernel[...].astype(x_BxLxD.dtype), "D (H K) -> D H K", K=width)
    y_BxLxHxK = einsum("bld,dhk->blhk", x_BxLxD, kernel_DxHxK)
    if linear.lora_a is not None:
        low = adapter_product(dropout(x_BxLxD, linear.lora_dropout, rng), linear.lora_a[...])
        low = checkpoint_name(linear.lora_scale * low, "low")
        b_RxHxK = rearrange(linear.lora_b[...].astype(low.dtype), "R (H K) -> R H K", K=width)
        y_BxLxHxK += _thin_heads(low, b_RxHxK)
    # Rounded here: unrounded sums would be kept beside the rounded ones that are multiplied next.
    return jax.lax.optimization_barrier(y_BxLxHxK)


def from_heads(linear: Linear, y_BxLxHxK: Array, rng: Array | None) -> Array:
    """`linear` of all heads of a position, [B, L, D]."""
    if not _has_heads(linear, y_BxLxHxK):
        return linear(rearrange(y_BxLxHxK, "B L H K -> B L (H K)"), rng=rng)
    dtype, width = y_BxLxHxK.dtype, y_BxLxHxK.shape[-1]
    kernel_HxKxD = rearrange(linear.kernel[...].astype(dtype), "(H K) D -> H K D", K=width)
    x_BxLxD = einsum("blhk,hkd->bld", y_BxLxHxK, kernel_HxKxD)
    if linear.lora_a is None:
        return x_BxLxD
    a_HxKxR = rearrange(linear.lora_a[...].astype(dtype), "(H K) R -> H K R", K=width)
    low = einsum("blhk,hkr->blr", dropout(y_BxLxHxK, linear.lora_dropout, rng), a_HxKxR)
    low = checkpoint_name(linear.lora_scale * low, "low")
    return x_BxLxD + adapter_product(low, linear.lora_b[...])


def _has_heads(linear: Linear, x: Array) -> bool:
    """Whether these rows meet a plain kernel on a TPU. New tokens, one position a row, have next to nothing to copy."""
    plain = linear.kernel_scale is None and not linear.by_output and linear.bias is None
    return plain and is_for_tpu(x) and x.shape[1] > 1


@jax.custom_vjp
def _thin_heads(low_BxLxR: Array, b_RxHxK: Array) -> Array:
    """An adapter's second product as heads, as `adapter_product` makes it."""
    if len(b_RxHxK) > THIN:
        return einsum("blr,rhk->blhk", low_BxLxR, b_RxHxK)
    factors, rows = low_BxLxR.astype(jnp.float32), b_RxHxK.astype(jnp.float32)
    return sum(factors[..., i, None, None] * rows[i] for i in range(len(rows))).astype(low_BxLxR.dtype)


def _thin_gradients(saved: tuple[Array, Array], dy_BxLxHxK: Array) -> tuple[Array, Array]:
    low_BxLxR, b_RxHxK = saved
    return einsum("blhk,rhk->blr", dy_BxLxHxK, b_RxHxK), einsum("blr,blhk->rhk", low_BxLxR, dy_BxLxHxK)


_thin_heads.defvjp(lambda low, b: (_thin_heads(low, b), (low, b)), _thin_gradients)
