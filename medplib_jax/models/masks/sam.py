"""SAM-Med2D as MedPLIB uses it: encode an image once, then decode one mask per prompt."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from medplib_jax.batch import Array
from medplib_jax.config.model import MaskConfig
from medplib_jax.models.layers import Rngs
from medplib_jax.models.masks.decoder import MaskDecoder
from medplib_jax.models.masks.encoder import ImageEncoder
from medplib_jax.models.masks.prompt import PromptEncoder

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


def normalise_sam(pixels_BxIxIx3: Array, sam_box_Bx4: Array) -> Array:
    """uint8 pixels -> float32 (x - mean) / std, zero outside the box (top, left, height, width).

    The original pads after normalising.
    """
    normalised = (pixels_BxIxIx3.astype(jnp.float32) - np.float32(MEAN)) / np.float32(STD)
    side = jnp.arange(pixels_BxIxIx3.shape[1])
    inside = [
        (side >= sam_box_Bx4[:, i, None]) & (side < (sam_box_Bx4[:, i] + sam_box_Bx4[:, 2 + i])[:, None])
        for i in (0, 1)
    ]
    return jnp.where((inside[0][:, :, None] & inside[1][:, None, :])[..., None], normalised, 0)


class SamMed2d(nnx.Module):
    def __init__(self, config: MaskConfig, rngs: Rngs):
        self.image_encoder = ImageEncoder(config, rngs)
        self.prompt_encoder = PromptEncoder(config, rngs)
        self.mask_decoder = MaskDecoder(config, rngs)

    def encode(self, pixels_BxIxIx3: Array) -> Array:
        """Normalised pixels -> embedding_BxhxwxC."""
        embedding, _ = self.image_encoder(pixels_BxIxIx3)
        return embedding

    def decode(self, embedding_BxhxwxC: Array, text_prompt_BxMxC: Array) -> tuple[Array, Array]:
        """One mask per text prompt: (mask_logits_BxMxhxw at four times the embedding's grid, predicted_iou_BxM)."""
        return self._decode(embedding_BxhxwxC, text_prompt_BxMxC[:, :, None])

    def decode_boxes(self, embedding_1xhxwxC: Array, boxes_Mx4: Array) -> tuple[Array, Array]:
        """`decode` of one picture with boxes for prompts, (x0, y0, x1, y1) in pixels of the encoder's canvas."""
        return self._decode(embedding_1xhxwxC, self.prompt_encoder.boxes(boxes_Mx4)[None])

    def _decode(self, embedding_BxhxwxC: Array, sparse_BxMxQxC: Array) -> tuple[Array, Array]:
        dense = self.prompt_encoder.dense()
        return self.mask_decoder(embedding_BxhxwxC, self.prompt_encoder.grid_position(), sparse_BxMxQxC, dense)
