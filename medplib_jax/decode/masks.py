"""From mask logits to masks of the picture's size."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from medplib_jax.batch import Batch
from medplib_jax.decode.slots import Generation
from medplib_jax.models.masks.unpad import resample_to_canvas

MaskDrawer = Callable[[Batch, Generation], np.ndarray]


def mask_drawer(sam_size: int, unpad: str, canvas: int, threshold: float) -> MaskDrawer:
    """A function of prompts and generation: bool masks [B, M, canvas, canvas] of probability over `threshold`, picture
    at the top left.
    """

    @jax.jit
    def on_canvas(mask_logits, sam_box, mask_size):
        logits, _ = resample_to_canvas(
            mask_logits, sam_box, mask_size, canvas=(canvas, canvas), sam_size=sam_size, mode=unpad
        )
        return binarise(logits, threshold)

    return lambda prompts, generation: np.asarray(
        on_canvas(jnp.asarray(generation.mask_logits), prompts.sam_box, prompts.mask_size)
    )


def binarise(logits: np.ndarray, threshold: float) -> np.ndarray:
    """True where sigmoid(logits) > threshold, without computing the sigmoid. threshold in (0, 1)."""
    return logits > math.log(threshold / (1 - threshold))
