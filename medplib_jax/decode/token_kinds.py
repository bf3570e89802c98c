"""Which experts tokens of each kind chose: kinds of the positions of a batch, and counts (the original's
model/eval/vis_gate.py, with more kinds).
"""

import jax.numpy as jnp

from medplib_jax.batch import Array

TOKEN_KINDS = ("text", "image", "region", "SEG")


def token_kinds(tokens_BxL: Array, feature_index_BxL: Array, valid_BxL: Array, regions: range, seg_id: int) -> Array:
    """int32 [B, L]: index into TOKEN_KINDS, -1 at padding.

    The features `regions` are regions, all others come from pictures or from examples' masks.
    """
    kinds = jnp.where(tokens_BxL == seg_id, TOKEN_KINDS.index("SEG"), TOKEN_KINDS.index("text"))
    kinds = jnp.where(feature_index_BxL >= 0, TOKEN_KINDS.index("image"), kinds)
    is_region = (feature_index_BxL >= regions.start) & (feature_index_BxL < regions.stop)
    kinds = jnp.where(is_region, TOKEN_KINDS.index("region"), kinds)
    return jnp.where(valid_BxL, kinds, -1)


def count_choices(expert_index: Array, kinds_BxL: Array, num_experts: int) -> Array:
    """How often each expert was chosen, every one of a token's k choices counted: expert_index int [n, B, L, k] ->
    int32 [B, n, kinds, E].
    """
    is_kind = (kinds_BxL[..., None] == jnp.arange(len(TOKEN_KINDS))).astype(jnp.int32)
    is_chosen = (expert_index[..., None] == jnp.arange(num_experts)).sum(-2, dtype=jnp.int32)
    return jnp.einsum("blt,nble->bnte", is_kind, is_chosen)
