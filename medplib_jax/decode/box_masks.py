"""From boxes to masks: the SAM-Med2D of a MedPLIB checkpoint draws what lies in each box.

So the boxes that one model answers with become masks of another.
"""

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from medplib_jax.batch import Array, Params
from medplib_jax.checkpoint import load_params
from medplib_jax.data import images
from medplib_jax.decode.masks import PictureMasks
from medplib_jax.models.layers import abstract_module, bind
from medplib_jax.models.masks.sam import SamMed2d, normalise_sam

PixelBox = tuple[int, int, int, int]  # x1, y1, x2, y2


class BoxDrawer:
    """The mask part of a checkpoint, of which nothing else is read.

    Raises FileNotFoundError where there is no checkpoint, ValueError for one that draws no masks.
    """

    def __init__(self, checkpoint_dir: str | os.PathLike):
        experiment, params, _ = load_params(checkpoint_dir, part="sam")
        self._config = experiment.model.mask
        self._draw = PictureMasks(self._config, experiment.eval.mask_threshold)
        self._params = jax.tree.map(jnp.asarray, params["sam"])
        sam, dtype = abstract_module(lambda rngs: SamMed2d(self._config, rngs)), experiment.model.dtype

        def encode(params: Params, pixels: Array, sam_box: Array) -> Array:
            return bind(sam, params).encode(normalise_sam(pixels, sam_box).astype(dtype))

        def decode(params: Params, embedding: Array, box: Array) -> tuple[Array, Array]:
            return bind(sam, params).decode_boxes(embedding, box)

        self._encode, self._decode = jax.jit(encode), jax.jit(decode)

    def __call__(
        self, picture: np.ndarray, boxes: Sequence[PixelBox]
    ) -> tuple[tuple[np.ndarray, ...], tuple[float, ...]]:
        """Masks (bool [h, w]) of a picture (RGB uint8 [h, w, 3]), one per box in its pixels, and their predicted IoU.

        A box is cut at the picture's edges, and its corners are put in order.
        """
        if not boxes:
            return (), ()
        size, side = picture.shape[:2], self._config.image_size
        pixels, place = images.sam_pixels(picture, side)
        sam_box = np.array([place], np.int32)
        embedding, masks, ious = self._encode(self._params, pixels[None], sam_box), [], []
        for box in boxes:
            prompt = np.array([_on_canvas(box, size, place)], np.float32)
            logits, iou = self._decode(self._params, embedding, prompt)
            masks.extend(self._draw(np.asarray(logits[0, :1]), sam_box, size))
            ious.append(float(iou[0, 0]))
        return tuple(masks), tuple(ious)


def _on_canvas(box: PixelBox, size: tuple[int, int], place: tuple[int, int, int, int]) -> list[float]:
    """A box of the picture (h, w) on the encoder's canvas, where the picture lies at (top, left, height, width)."""
    (height, width), (top, left, fitted_height, fitted_width) = size, place
    x1, x2 = sorted(min(max(x, 0), width) for x in box[::2])
    y1, y2 = sorted(min(max(y, 0), height) for y in box[1::2])
    across, down = fitted_width / width, fitted_height / height
    return [left + x1 * across, top + y1 * down, left + x2 * across, top + y2 * down]
