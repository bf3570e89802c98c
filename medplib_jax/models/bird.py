"""BiRD (Huang et al., MICCAI 2024):

Qwen-VL that refers and grounds with boxes in text. A ViT sees, 256 queries resample what it saw, and Qwen reads and
answers.
"""

from typing import Any

from einops import rearrange

from medplib_jax.batch import Array, Batch
from medplib_jax.config.experiment import ShardingConfig
from medplib_jax.config.model import ModelConfig
from medplib_jax.models.language.llama import Llama
from medplib_jax.models.layers import LayerNorm, Linear, Rngs
from medplib_jax.models.vision.clip import normalise_clip
from medplib_jax.models.vision.qwen_vit import EPS, QwenVit, Resampler
from medplib_jax.models.whole import WholeModel
from medplib_jax.parallel.sharding import shard_rows


class Bird(WholeModel):
    """Qwen-VL (Bai et al. 2023).

    The visual vectors stand between `<img>` and `</img>`, as many as there are queries.
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
        self.vit = QwenVit(config.vit, config.remat, rngs)
        self.resampler = Resampler(config.vit, width, rngs)
        self.post_norm = LayerNorm(width, eps=EPS, rngs=rngs)
        self.proj = Linear(width, width, axes=("vision", "vision_out"), bias=False, rngs=rngs)
        self.llm = Llama(config, rngs, rules, unstacked_layers, unstacked_experts)

    def see(self, clip_pixels_BxNxIxIx3: Array) -> tuple[Array, dict[str, Any]]:
        """The resampled vectors of all pictures, [B * N, Q, D]."""
        pixels = rearrange(clip_pixels_BxNxIxIx3, "b n i j c -> (b n) i j c")
        return self.resample(normalise_clip(pixels).astype(self.config.dtype))

    def visual_features(self, batch: Batch, seen: Array | None = None) -> tuple[Array, dict[str, Any]]:
        """The N * Q vectors of the pictures [B, N*Q, D]; `out` names what the stages between gave."""
        vectors_BNxQxD, out = (seen, {}) if seen is not None else self.see(batch.clip_pixels)
        features = rearrange(vectors_BNxQxD, "(b n) q d -> b (n q) d", b=len(batch.tokens))
        return shard_rows(features), out | {"visual": features}

    def resample(self, pixels_BNxIxIx3: Array) -> tuple[Array, dict[str, Any]]:
        """`see` of normalised pixels."""
        patches_BNxPxC, out = self.vit(pixels_BNxIxIx3)
        pooled_BNxQxD, resampled = self.resampler(shard_rows(patches_BNxPxC))
        normed_BNxQxD = self.post_norm(pooled_BNxQxD)
        return shard_rows(self.proj(normed_BNxQxD)), out | resampled | {"post_norm": normed_BNxQxD}
