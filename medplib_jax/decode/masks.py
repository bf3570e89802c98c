"""From mask logits to masks of the picture's size."""

import functools
import itertools
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from medplib_jax.batch import Array, Batch
from medplib_jax.config.model import MaskConfig
from medplib_jax.decode.slots import Generation
from medplib_jax.models.masks.unpad import resample_to_canvas

SEG = "<SEG>"
MaskDrawer = Callable[[Batch, Generation], np.ndarray]
_FILES = re.compile(r"mask_\d+\.png|masks\.geojson|boxes\.json")  # of an answer about a picture
TILE = 512  # side of what is drawn at once


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


class PictureMasks:
    """Draws masks at their picture's size, tile by tile: one program, whatever the size, number and threshold."""

    def __init__(self, config: MaskConfig, threshold: float):
        self._config, self._threshold = config, threshold

    def __call__(self, logits_Mxhxw: np.ndarray, sam_box_1x4: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """bool [M, height, width] of a picture of this `size`, where the probability is over the threshold."""
        drawn = np.zeros((len(logits_Mxhxw), *size), bool)
        lowest, whole = _logit(self._threshold), np.array([size], np.int32)
        for m, top, left in itertools.product(range(len(drawn)), range(0, size[0], TILE), range(0, size[1], TILE)):
            corner, part = np.array((top, left), np.int32), drawn[m, top : top + TILE, left : left + TILE]
            logits = np.asarray(logits_Mxhxw[None, m : m + 1], np.float32)
            tile = _tile(
                logits, sam_box_1x4, whole, corner, lowest, sam_size=self._config.image_size, mode=self._config.unpad
            )
            part[:] = np.asarray(tile)[0, 0, : part.shape[0], : part.shape[1]]
        return drawn


@functools.partial(jax.jit, static_argnames=("sam_size", "mode"))
def _tile(logits, sam_box, size, corner, lowest, *, sam_size: int, mode: str) -> Array:
    """bool [1, 1, TILE, TILE] of a mask from `corner` on."""
    shape = {"canvas": (TILE, TILE), "corner": corner}
    return resample_to_canvas(logits, sam_box, size, **shape, sam_size=sam_size, mode=mode)[0] > lowest


def binarise(logits: np.ndarray, threshold: float) -> np.ndarray:
    """True where sigmoid(logits) > threshold, without computing the sigmoid. threshold in (0, 1)."""
    return logits > _logit(threshold)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def remove_answer(folder: str | os.PathLike) -> None:
    """Removes the masks and boxes of an earlier answer from a folder."""
    for path in Path(folder).iterdir():
        if _FILES.fullmatch(path.name):
            path.unlink()


def mask_labels(text: str) -> list[str]:
    """A name for each `<SEG>` of an answer:

    The words before it in its sentence, without articles and verbs around them.
    """
    labels = []
    for number, part in enumerate(text.split(SEG)[:-1], 1):
        phrase = re.split(r"[.,;:!?]|\band\b", part)[-1]
        phrase = re.sub(
            r"^\s*(?:(?:it|this|here|there|yes|sure|the|an?|is|are)\b\s*)+", "", phrase, flags=re.IGNORECASE
        )
        phrase = re.sub(
            r"(?:\s+|^)(?:is|are|as|at|in|segmented|shown|marked|here)*\s*$", "", phrase, flags=re.IGNORECASE
        )
        labels.append(phrase.strip() or f"mask {number}")
    return labels
