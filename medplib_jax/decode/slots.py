"""The state of decoding:

A fixed number of slots, each with an answer that is being made and its part of the KV cache.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from medplib_jax.batch import Array, Batch
from medplib_jax.decode.sampling import Draws
from medplib_jax.models.language.attention import KVCache


@flax.struct.dataclass
class Generation:
    """Answers of a batch. Tokens after the end (and the end token itself) are 0 and not counted in `lengths`."""

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    mask_valid: Bool[Array, "B M"]  # the m-th <SEG> of the answer exists
    mask_logits: Float[Array, "B M h w"] | None  # None when no mask slots were asked for
    predicted_iou: Float[Array, "B M"] | None
    # Tokens of each kind (`token_kinds.TOKEN_KINDS`) per MoE layer n and expert E; None without experts.
    choices: Int[Array, "B n kinds E"] | None = None

    @property
    def cut_off(self) -> Bool[Array, " B"]:
        """Which answers took all the tokens that there were, and ended without an end token."""
        return self.lengths == self.tokens.shape[1]


@flax.struct.dataclass
class Slots:
    """Answers in the making, one per slot."""

    cache: KVCache
    hidden: Float[Array, "S D"]  # state that predicts the next token
    previous: Float[
        Array, "S D"
    ]  # the state before that; of an answer that ended, before the one that predicted its last token
    known: Int[Array, " S"]  # 1 + the next token where it was drawn before its turn (`peek`), else 0
    active: Bool[Array, " S"]
    limits: Int[Array, " S"]  # most tokens of the answer
    draws: Draws | None  # None: all answers are greedy
    tokens: Int[Array, "S T"]
    lengths: Int[Array, " S"]
    seg_hidden: Float[Array, "S M D"]
    seg_count: Int[Array, " S"]
    choices: Int[Array, "S n kinds E"] | None


def without_rows(slots: Slots) -> Slots:
    """A single slot whose keys and values have no axis of slots."""
    k, v = jax.tree.map(lambda x: x[0], (slots.cache.k, slots.cache.v))
    return slots.replace(cache=slots.cache.replace(k=k, v=v))


def with_rows(slots: Slots) -> Slots:
    """The inverse of `without_rows`."""
    k, v = jax.tree.map(lambda x: x[None], (slots.cache.k, slots.cache.v))
    return slots.replace(cache=slots.cache.replace(k=k, v=v))


def unchanged(slots: Slots) -> Slots:
    return slots


def take_at(hidden_BxLxD: Array, position_B: Array) -> Array:
    return jnp.take_along_axis(hidden_BxLxD, position_B[:, None, None], axis=1)[:, 0]


def insert_rows(slots: Slots, new: Slots, index_DxR: Array) -> Slots:
    """Writes row r of device d of `new` into that device's slot `index[d, r]`.

    A row whose index is beyond the slots is dropped. The rows of `new` may be shorter than the slots.
    """

    def put(old, rows):
        corner = tuple(slice(size) for size in rows.shape[1:])
        place = jax.vmap(lambda old, rows, index: old.at[index, *corner].set(rows, mode="drop"))
        by_device = (x.reshape(len(index_DxR), len(x) // len(index_DxR), *x.shape[1:]) for x in (old, rows))
        return place(*by_device, index_DxR).reshape(old.shape)

    return jax.tree.map(put, slots, new)


def fill_batch(batch: Batch, extra: int) -> Batch:
    """The batch with filler rows behind it."""
    if not extra:
        return batch
    padded = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], extra, axis=0)]), batch)
    padded.record[len(batch.record) :] = -1
    return padded
