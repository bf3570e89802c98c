"""Masks drawn over pictures: translucent with solid outlines, in colours that colour-blind readers tell apart."""

from collections.abc import Sequence

import numpy as np

PALETTE = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
)  # Okabe and Ito: told apart by colour-blind readers


def rgb(colour):
    """The bytes of "#rrggbb", float32 [3]."""
    return np.frombuffer(bytes.fromhex(colour[1:]), np.uint8).astype(np.float32)


def overlay(
    picture: np.ndarray, masks: Sequence[np.ndarray], colours: Sequence[str], opacity: float = 0.4
) -> np.ndarray:
    """The picture uint8 [H, W, 3] under translucent masks with solid outlines.

    Masks bool [h, w] are stretched to it (nearest).
    """
    shown = picture.astype(np.float32)
    for number, mask in enumerate(masks):
        colour = rgb(colours[number % len(colours)])
        inside = _stretched(mask, picture.shape[:2])
        shown[inside] += opacity * (colour - shown[inside])
        shown[inside & ~_eroded(inside)] = colour
    return np.round(shown).astype(np.uint8)


def outline(picture: np.ndarray, masks: Sequence[np.ndarray], colour: str = "#ffffff") -> np.ndarray:
    """`picture` with a thin line around each mask, as `overlay` stretches them."""
    shown = picture.copy()
    for mask in masks:
        inside = _stretched(mask, picture.shape[:2])
        shown[inside & ~_eroded(inside, steps=1)] = rgb(colour)
    return shown


def _stretched(mask, size):
    """The mask at the picture's size (h, w), by nearest neighbours."""
    rows, columns = (np.arange(to) * have // to for to, have in zip(size, mask.shape, strict=True))
    return np.asarray(mask, bool)[rows[:, None], columns]


def _eroded(mask, steps=2):
    """The mask without its outermost `steps` pixels (4-neighbours; beyond the picture counts as outside)."""
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask
