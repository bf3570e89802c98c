"""A region of the image becomes one token: CLIP features under its points, adapted to the width of the language model."""

import jax
import jax.numpy as jnp
from flax import nnx

from medplib_jax.config import ClipConfig, RegionConfig
from medplib_jax.models.layers import Linear, Rngs
from medplib_jax.types import Array


def bilinear_weights(coordinates: Array, size: int) -> Array:
    """Weights [..., size] of `grid_sample(2p - 1, align_corners=True)` along one axis, for p [...] in [0, 1)."""
    return jnp.maximum(1 - jnp.abs(coordinates[..., None] * (size - 1) - jnp.arange(size)), 0)


class RegionEncoder(nnx.Module):
    """Mean of the adapted features at the region's points (medplib_arch.py `extract_region_feature`).

    Adapter, sampling and mean are linear and the weights of a point sum to 1, so the mean is taken first, as one product
    over the patches, and the adapter runs once per region instead of once per patch.
    """

    def __init__(self, config: RegionConfig, clip: ClipConfig, llm_dim: int, rngs: Rngs):
        self.adapter = Linear(clip.hidden_size, llm_dim, axes=("vision", "embed"), rngs=rngs)
        self.grid = clip.grid

    def __call__(self, clip_features_BxNxPxC: Array, region_points_BxRxSx2: Array, valid_BxRxS: Array, region_image_BxR: Array) -> tuple[Array, dict]:
        """features, (x, y) points in [0, 1) and which of the N images they lie on -> region_BxRxD, 0 for a region without points.

        `out` has 'patch_weights' [B, R, P]: how much each patch counts in the mean.
        """
        weights = self.patch_weights(region_points_BxRxSx2, valid_BxRxS)
        num_images = clip_features_BxNxPxC.shape[1]
        chosen = jax.nn.one_hot(region_image_BxR, num_images, dtype=jnp.float32)
        pooled = jnp.einsum("brn,brp,bnpc->brc", chosen, weights, clip_features_BxNxPxC.astype(jnp.float32))
        region = self.adapter(pooled) * valid_BxRxS.any(-1, keepdims=True)
        return region.astype(clip_features_BxNxPxC.dtype), {"patch_weights": weights}

    def patch_weights(self, points_BxRxSx2: Array, valid_BxRxS: Array) -> Array:
        columns, rows = (bilinear_weights(points_BxRxSx2[..., axis].astype(jnp.float32), self.grid) for axis in (0, 1))
        total = jnp.einsum("brsi,brsj->brij", rows * valid_BxRxS[..., None], columns)
        count = jnp.maximum(valid_BxRxS.sum(-1), 1)[..., None]
        return total.reshape(*count.shape[:-1], -1) / count
