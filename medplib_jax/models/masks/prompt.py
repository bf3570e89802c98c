"""SAM's prompt encoder (Kirillov et al. 2023): points, boxes, text and masks as what the mask decoder attends to."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from medplib_jax.batch import Array
from medplib_jax.config.model import MaskConfig
from medplib_jax.models.layers import LayerNorm, Rngs, gelu, param
from medplib_jax.models.precision import product
from medplib_jax.models.vision.transformer import Conv

EPS = 1e-6
NEGATIVE, POSITIVE, BOX_START, BOX_END = range(4)  # rows of point_embed


class PromptEncoder(nnx.Module):
    def __init__(self, config: MaskConfig, rngs: Rngs):
        width, mask_width = config.out_dim, config.mask_in_dim
        self.position_gaussian = param(rngs, (2, width // 2), (None, None), std=1.0)
        self.point_embed = param(rngs, (4, width), (None, None), std=1.0)
        self.not_a_point_embed = param(rngs, (width,), (None,), std=1.0)
        self.no_mask_embed = param(rngs, (width,), (None,), std=1.0)
        self.mask_conv1 = Conv(1, mask_width // 4, 2, stride=2, rngs=rngs)
        self.mask_norm1 = LayerNorm(mask_width // 4, eps=EPS, rngs=rngs)
        self.mask_conv2 = Conv(mask_width // 4, mask_width, 2, stride=2, rngs=rngs)
        self.mask_norm2 = LayerNorm(mask_width, eps=EPS, rngs=rngs)
        self.mask_conv3 = Conv(mask_width, width, 1, rngs=rngs)
        self.image_size, self.grid = config.image_size, config.grid

    def points(self, points_BxQx2: Array, labels_BxQ: Array) -> Array:
        """(x, y) points in pixels of SAM's canvas, labels 1 (object), 0 (background) or -1 (no point) -> [B, Q, C]."""
        embedded = self._position((points_BxQx2 + 0.5) / self.image_size)
        label = labels_BxQ[..., None]
        embedded = jnp.where(label == -1, self.not_a_point_embed[...], embedded)
        embedded = embedded + jnp.where(label == 0, self.point_embed[NEGATIVE], 0)
        return embedded + jnp.where(label == 1, self.point_embed[POSITIVE], 0)

    def boxes(self, boxes_Bx4: Array) -> Array:
        """(x0, y0, x1, y1) in pixels of SAM's canvas -> [B, 2, C], one vector per corner."""
        corners = (boxes_Bx4.reshape(-1, 2, 2) + 0.5) / self.image_size
        return self._position(corners) + self.point_embed[...][BOX_START : BOX_END + 1]

    def sparse(
        self,
        *,
        points: Array | None = None,
        labels: Array | None = None,
        boxes: Array | None = None,
        text: Array | None = None,
    ) -> Array:
        """All prompts that become tokens, in SAM's order, [B, Q, C].

        They are points [B, Q', 2] with labels [B, Q'], boxes [B, 4] and text [B, Q', C].
        Points without a box are followed by a 'no point'. Raises ValueError without any prompt.
        """
        tokens = []
        if points is not None:
            tokens.append(self.points(points, labels))
            if boxes is None:
                nowhere = self.not_a_point_embed[...]
                tokens.append(jnp.broadcast_to(nowhere, (points.shape[0], 1, len(nowhere))))
        if boxes is not None:
            tokens.append(self.boxes(boxes))
        if text is not None:
            tokens.append(text)
        if not tokens:
            raise ValueError("a sparse prompt needs points, boxes or text")
        return jnp.concatenate(tokens, axis=1)

    def dense(self, masks_Bx4hx4w: Array | None = None) -> Array:
        """Mask logits [B, 4h, 4w] -> [B, h, w, C]; without masks the learned 'no mask', [1, 1, 1, C]."""
        if masks_Bx4hx4w is None:
            return self.no_mask_embed[...][None, None, None]
        x = gelu(self.mask_norm1(self.mask_conv1(masks_Bx4hx4w[..., None])))
        return self.mask_conv3(gelu(self.mask_norm2(self.mask_conv2(x))))

    def grid_position(self) -> Array:
        """The positional encoding of the image embedding's cells, float32 [h, w, C]."""
        centres = (np.arange(self.grid, dtype=np.float32) + 0.5) / self.grid
        return self._position(np.stack(np.meshgrid(centres, centres), axis=-1))

    def _position(self, coordinates: Array) -> Array:
        """(x, y) in [0, 1], [..., 2] -> random Fourier features [..., C]. The frequencies are fixed: no gradient."""
        phase = 2 * jnp.pi * product(2 * coordinates - 1, jax.lax.stop_gradient(self.position_gaussian[...]))
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
