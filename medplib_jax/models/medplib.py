"""MedPLIB: CLIP sees, LLaMA with experts reads and answers, SAM-Med2D draws (Huang et al., AAAI 2025, figure 2)."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from medplib_jax.batch import Array, Batch
from medplib_jax.config.experiment import ShardingConfig
from medplib_jax.config.model import ModelConfig
from medplib_jax.models.icl.tokens import ExampleReader
from medplib_jax.models.language.llama import Llama
from medplib_jax.models.layers import Mlp, Rngs, gelu
from medplib_jax.models.masks.sam import SamMed2d, normalise_sam
from medplib_jax.models.region.encoder import RegionEncoder
from medplib_jax.models.vision.clip import ClipVisionTower, normalise_clip
from medplib_jax.models.whole import WholeModel
from medplib_jax.parallel.sharding import shard_rows


class MedPLIB(WholeModel):
    """The whole model.

    `rules`: where parameters go on a mesh; None for a model that stays on one device. `unstacked_layers` and
    `unstacked_experts`: see `Llama`.
    """

    def __init__(
        self,
        config: ModelConfig,
        rngs: Rngs,
        rules: ShardingConfig | None = None,
        unstacked_layers: bool = False,
        unstacked_experts: bool = False,
    ):
        width = config.llm.hidden_size
        self.config, self.rules = config, rules
        self.clip = ClipVisionTower(config.clip, rngs)
        self.projector = Mlp(config.clip.hidden_size, width, width, gelu, rngs=rngs)
        self.region = RegionEncoder(config.region, config.clip, width, rngs)
        self.icl = ExampleReader(config.icl, width, rngs) if config.icl.has_modules else None
        self.llm = Llama(config, rngs, rules, unstacked_layers, unstacked_experts)
        self.seg_mlp = Mlp(width, width, config.mask.out_dim, jax.nn.relu, rngs=rngs)
        self.sam = SamMed2d(config.mask, rngs)

    def see(self, clip_pixels_BxNxIxIx3: Array) -> tuple[Array, dict[str, Any]]:
        """CLIP's patch features of all pictures, [B * N, P, C]. They depend on nothing else, so they can be kept."""
        flat = rearrange(clip_pixels_BxNxIxIx3, "B N I J c -> (B N) I J c")
        return self.clip(normalise_clip(flat).astype(self.config.dtype))

    def visual_features(self, batch: Batch, seen: Array | None = None) -> tuple[Array, dict[str, Any]]:
        """What text positions may be replaced by, [B, T, D].

        They are the N*P tokens of the pictures, then the R region vectors, then the X*Q tokens of examples' masks.
        """
        B, N = batch.clip_pixels.shape[:2]
        clip_BNxPxC, clip_out = (seen, {}) if seen is not None else self.see(batch.clip_pixels)
        image_BNxPxD = self.projector(clip_BNxPxC)
        if self.icl is not None and self.icl.compressor is not None:
            image_BNxPxD = self.icl.compressor(image_BNxPxD)
        features = [shard_rows(rearrange(image_BNxPxD, "(B N) P D -> B (N P) D", B=B))]
        out = {f"clip_{name}": value for name, value in clip_out.items()} | {"clip_features": clip_BNxPxC}
        if batch.region_points.shape[1]:
            clip_BxNxPxC = rearrange(clip_BNxPxC, "(B N) P C -> B N P C", N=N)
            points = (batch.region_points, batch.region_point_valid, batch.region_image)
            out["regions"], _ = self.region(clip_BxNxPxC, *points)
            features.append(out["regions"].astype(features[0].dtype))
        if batch.example_masks is not None:
            features.append(self._masks_read(batch.example_masks, features[0].dtype))
        return jnp.concatenate(features, axis=1), out

    def _masks_read(self, masks_BxXxIxI: Array, dtype) -> Array:
        """The tokens of examples' masks, [B, X * Q, D]."""
        masks_BXxIxI = rearrange(masks_BxXxIxI, "B X I J -> (B X) I J")
        tokens_BXxQxD = self.icl.mask_encoder(masks_BXxIxI, dtype)
        return shard_rows(rearrange(tokens_BXxQxD, "(B X) Q D -> B (X Q) D", B=len(masks_BxXxIxI)))

    def view(self, batch: Batch) -> Array:
        """The mask encoder's embedding of each picture, [B, h, w, C]. It depends on nothing else, so it can be kept."""
        return self.sam.encode(normalise_sam(batch.sam_pixels, batch.sam_box).astype(self.config.dtype))

    def draw(self, seg_hidden_BxMxD: Array, batch: Batch, viewed: Array | None = None) -> tuple[Array, Array]:
        """Masks from the hidden states that predict <SEG>: float32 logits [B, M, h, w] and predicted IoU [B, M].

        `viewed`: what `view` made of the batch's pictures, where it is known already.
        """
        return self.sam.decode(
            shard_rows(self.view(batch) if viewed is None else viewed),
            shard_rows(self.seg_mlp(shard_rows(seg_hidden_BxMxD))),
        )
