"""Prompts in two parts: the beginning that many prompts share, up to their last picture, and the rest.

The keys and values of a beginning can be kept, so that the next question about a picture runs its own words alone. Both
parts are run by the same programs whether the first one was kept or not, so an answer does not depend on that.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp

from medplib_jax.batch import Array, Batch, Params
from medplib_jax.models.language.attention import KVCache
from medplib_jax.models.layers import bind
from medplib_jax.models.whole import WholeModel

T = TypeVar("T")


def run_prefix(
    model: WholeModel, params: Params, batch: Batch, seen: Array | None, lengths_B: Array, room: int
) -> KVCache:
    """Keys and values of the first `lengths_B` positions of prompts [B, L], in a cache of `room` <= L positions."""
    model = bind(model, params)
    x_BxLxD, _ = model.embed(batch, seen)
    valid_BxP = jnp.arange(room) < lengths_B[:, None]
    _, out = model.llm(x_BxLxD[:, :room], valid_BxP, new_cache=room)
    return out["cache"]


def run_rest(
    model: WholeModel, params: Params, batch: Batch, seen: Array | None, prefix: KVCache, room: int
) -> tuple[Array, Array, KVCache]:
    """The rest of prompts [B, L], at most `room` positions: hidden states [B, room, D], which of them are valid, and a
    cache of at most L positions.
    """
    model = bind(model, params)
    x_BxLxD, _ = model.embed(batch, seen)
    L = x_BxLxD.shape[1]
    index_BxR = prefix.length_B[:, None] + jnp.arange(room)
    valid_BxR = index_BxR < batch.valid.sum(-1, keepdims=True)
    x_BxRxD = jnp.take_along_axis(x_BxLxD, jnp.minimum(index_BxR, L - 1)[:, :, None], axis=1)
    hidden_BxRxD, out = model.llm(x_BxRxD, valid_BxR, cache=_resized(prefix, prefix.room + room))
    return hidden_BxRxD, valid_BxR, _resized(out["cache"], min(L, prefix.room + room))


def _resized(cache: KVCache, length: int) -> KVCache:
    """With room for so many positions; what is cut off holds nothing."""
    beyond = length - cache.room

    def resized(x: Array, axis: int) -> Array:
        if beyond <= 0:
            return jax.lax.slice_in_dim(x, 0, length, axis=axis)
        return jnp.pad(x, [(0, beyond if i == axis else 0) for i in range(x.ndim)])

    # positions lie on the last axis of keys and of scales, on the third of values and of scales
    k = jax.tree.map(lambda x: resized(x, x.ndim - 1), cache.k)
    return cache.replace(k=k, v=jax.tree.map(lambda x: resized(x, 2), cache.v))


def join(rows: list[T]) -> T:
    """Caches, or features, of several rows as those of one batch."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows) if len(rows) > 1 else rows[0]
