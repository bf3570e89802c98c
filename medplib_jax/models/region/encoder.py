"""A region of the image becomes one token: CLIP features under its points, at the width of the language model."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from medplib_jax.batch import Array
from medplib_jax.config.model import ClipConfig, RegionConfig
from medplib_jax.models.layers import Linear, Rngs
from medplib_jax.models.precision import einsum
from medplib_jax.models.region.geometry import GeometrySampler, repeat_points
from medplib_jax.parallel.sharding import shard_rows


def point_weights(points_BxRxSx2: Array, grid: int) -> Array:
    """Weights [B, R, S, P] of the patches in `grid_sample(2p - 1, align_corners=True)` at (x, y) points in [0, 1)."""
    columns, rows = (_axis_weights(points_BxRxSx2[..., axis], grid) for axis in (0, 1))
    return rearrange(rows[..., :, None] * columns[..., None, :], "... h w -> ... (h w)")


def mean_weights(points_BxRxSx2: Array, valid_BxRxS: Array, grid: int) -> Array:
    """Mean of `point_weights` over a region's valid points, [B, R, P]; 0 without any."""
    columns, rows = (_axis_weights(points_BxRxSx2[..., axis], grid) for axis in (0, 1))
    total = einsum("brsi,brsj->brij", rows * valid_BxRxS[..., None], columns)
    count = jnp.maximum(valid_BxRxS.sum(-1, keepdims=True), 1)
    return rearrange(total, "B R h w -> B R (h w)") / count


def _axis_weights(coordinates: Array, size: int) -> Array:
    return jnp.maximum(1 - jnp.abs(coordinates.astype(jnp.float32)[..., None] * (size - 1) - jnp.arange(size)), 0)


class RegionEncoder(nnx.Module):
    """'mean' sampler: the mean of the adapted features at the points (medplib_arch.py `extract_region_feature`).

    Adapter, sampling and mean are linear and the weights of a point sum to 1, so the mean is taken first, as one
    product over the patches, and the adapter runs once per region instead of once per patch. 'geometry' sampler: see
    `GeometrySampler`; it reads the features directly, and the adapter stays for the checkpoints that hold both.
    """

    def __init__(self, config: RegionConfig, clip: ClipConfig, llm_dim: int, rngs: Rngs):
        self.adapter = Linear(clip.hidden_size, llm_dim, axes=("vision", "embed"), rngs=rngs)
        is_geometric = config.sampler == "geometry"
        self.geometry = GeometrySampler(clip.hidden_size, llm_dim, config.pooling, rngs) if is_geometric else None
        self.grid, self.max_points = clip.grid, config.max_points

    def __call__(
        self, clip_features_BxNxPxC: Array, region_points_BxRxSx2: Array, valid_BxRxS: Array, region_image_BxR: Array
    ) -> tuple[Array, dict]:
        """features, (x, y) points in [0, 1) and their image of the N -> region_BxRxD, 0 for a region without points.

        Computed in float32. `out` has 'pooled' [B, R, C], the mean of the raw features (absent with the geometry-aware
        sampler).
        """
        features = clip_features_BxNxPxC.astype(jnp.float32)
        on_image = jax.nn.one_hot(region_image_BxR, features.shape[1], dtype=jnp.float32)
        if self.geometry is not None:
            region, out = (
                self._geometric(einsum("brn,bnpc->brpc", on_image, features), region_points_BxRxSx2, valid_BxRxS),
                {},
            )
        else:
            pooled = einsum(
                "brn,brp,bnpc->brc", on_image, mean_weights(region_points_BxRxSx2, valid_BxRxS, self.grid), features
            )
            region, out = shard_rows(self.adapter(pooled)), {"pooled": pooled}
        return (region * valid_BxRxS.any(-1, keepdims=True)).astype(clip_features_BxNxPxC.dtype), out

    def _geometric(self, features_BxRxPxC: Array, points_BxRxSx2: Array, valid_BxRxS: Array) -> Array:
        chosen = repeat_points(valid_BxRxS, self.max_points)
        points = jnp.take_along_axis(points_BxRxSx2, chosen[..., None], axis=2)
        sampled = einsum("brsp,brpc->brsc", point_weights(points, self.grid), features_BxRxPxC)
        rows_columns = rearrange(points[..., ::-1], "B R S two -> (B R) S two")
        region = self.geometry(rearrange(sampled, "B R S C -> (B R) S C"), rows_columns)
        return rearrange(region, "(B R) D -> B R D", B=len(points))
