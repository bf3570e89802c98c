"""Pictures as vectors for retrieval: the mean of CLIP's patches, as the original's `ImageRAGEncoder` takes it."""

import dataclasses

import jax.numpy as jnp

from medplib_jax.batch import Array
from medplib_jax.config.model import ClipConfig
from medplib_jax.models.layers import Rngs
from medplib_jax.models.vision.clip import ClipVisionTower, normalise_clip


def retrieval_tower(config: ClipConfig, rngs: Rngs) -> ClipVisionTower:
    """CLIP read at its last layer, where the decoder reads an earlier one; the parameters are the same."""
    return ClipVisionTower(dataclasses.replace(config, select_layer=-1), rngs)


def picture_vectors(tower: ClipVisionTower, pixels_BxIxIx3: Array) -> Array:
    """Unit vectors float32 [B, C], whose products are cosines: the mean over patches of the last hidden states."""
    patches_BxPxC, _ = tower(normalise_clip(pixels_BxIxIx3))
    mean_BxC = patches_BxPxC.mean(1)
    return mean_BxC / jnp.linalg.norm(mean_BxC, axis=-1, keepdims=True)
