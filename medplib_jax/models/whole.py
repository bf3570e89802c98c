"""What every whole model shares: pictures are embedded, a decoder reads and answers, and some draw masks.

Trainer, generator, sweep and converter know a model by `embed(batch)`, `llm`, `config` (what it can do) and, where
`config.draws_masks`, `draw(...)`.
"""

import abc
from typing import Any

import flax.struct
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from medplib_jax.batch import Array, Batch
from medplib_jax.config.experiment import ShardingConfig
from medplib_jax.config.model import ModelConfig
from medplib_jax.models.language.llama import Llama
from medplib_jax.models.layers import Rngs
from medplib_jax.parallel.sharding import shard_lookup, shard_rows


@flax.struct.dataclass
class ModelOutput:
    """What a forward pass returns. `aux` holds named intermediates and MoE metrics."""

    hidden: Float[Array, "B L D"]  # last hidden state, after the final norm
    mask_logits: Float[Array, "B M h w"] | None  # None when the batch has no mask slots (M == 0)
    predicted_iou: Float[Array, "B M"] | None
    aux: dict[str, Any]


class WholeModel(nnx.Module):
    """A vision part of the subclass and a decoder.

    All indices come from the host in `Batch`; nothing here has a data-dependent shape.
    """

    config: ModelConfig
    rules: ShardingConfig | None  # where parameters go on a mesh; None for a model that stays on one device
    llm: Llama

    @abc.abstractmethod
    def __init__(
        self,
        config: ModelConfig,
        rngs: Rngs,
        rules: ShardingConfig | None = None,
        unstacked_layers: bool = False,
        unstacked_experts: bool = False,
    ):
        """`unstacked_layers`, `unstacked_experts`: see `Llama`."""

    @abc.abstractmethod
    def see(self, clip_pixels_BxNxIxIx3: Array) -> tuple[Array, dict[str, Any]]:
        """What the vision part makes of all pictures, [B * N, P, C]. It depends on nothing else, so it can be kept."""

    @abc.abstractmethod
    def visual_features(self, batch: Batch, seen: Array | None = None) -> tuple[Array, dict[str, Any]]:
        """What text positions may be replaced by, [B, T, D], and named intermediates. `seen`: see `embed`."""

    def draw(self, seg_hidden_BxMxD: Array, batch: Batch, viewed: Array | None = None) -> tuple[Array, Array]:
        """Masks from the hidden states that predict <SEG>: float32 logits [B, M, h, w] and predicted IoU [B, M]."""
        raise NotImplementedError(f"{type(self).__name__} draws no masks")

    def __call__(
        self, batch: Batch, *, train: bool = False, rng: Array | None = None
    ) -> tuple[ModelOutput, dict[str, Any]]:
        """A teacher-forced pass.

        `train` selects the training capacity; `rng` turns on dropout and random token priority.
        """
        x_BxLxD, out = self.embed(batch)
        hidden_BxLxD, llm_out = self.llm(x_BxLxD, batch.valid, segment_BxL=batch.segment, train=train, rng=rng)
        out |= llm_out
        mask_logits_BxMxhxw = iou_BxM = None
        if batch.seg_position.shape[1]:
            seg_hidden_BxMxD = jnp.take_along_axis(hidden_BxLxD, batch.seg_position[:, :, None], axis=1)
            mask_logits_BxMxhxw, iou_BxM = self.draw(seg_hidden_BxMxD, batch)
        return ModelOutput(hidden_BxLxD, mask_logits_BxMxhxw, iou_BxM, aux=llm_out), out

    def embed(self, batch: Batch, seen: Array | None = None) -> tuple[Array, dict[str, Any]]:
        """Token embeddings with the visual features spliced in, [B, L, D].

        `seen`: what `see` made of the batch's pictures, where it is known already.
        """
        features_BxTxD, out = self.visual_features(batch, seen)
        tokens_BxLxD = shard_rows(shard_lookup(self.llm.embed(batch.tokens), self.rules))
        spliced_BxLxD = jnp.take_along_axis(features_BxTxD, jnp.maximum(batch.feature_index, 0)[:, :, None], axis=1)
        x_BxLxD = jnp.where(
            (batch.feature_index >= 0)[:, :, None], spliced_BxLxD.astype(tokens_BxLxD.dtype), tokens_BxLxD
        )
        return x_BxLxD, out | {"embeddings": x_BxLxD}
