"""Masks drawn over pictures: translucent with solid outlines, in colours that colour-blind readers tell apart."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

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


def draw_boxes(
    picture: np.ndarray, boxes: Sequence[tuple[int, int, int, int]], labels: Sequence[str], colours: Sequence[str]
) -> np.ndarray:
    """`picture` uint8 [H, W, 3] with the outlines of boxes (x1, y1, x2, y2 in pixels), each with its label above or
    inside it.
    """
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    width = max(1, round(max(picture.shape[:2]) / 200))
    for number, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        colour = colours[number % len(colours)]
        x1, x2 = sorted(box[::2])
        y1, y2 = sorted(box[1::2])
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=width)
        if label:
            place = draw.textbbox((x1, y1), label)
            lift = min(y1, place[3] - place[1] + 2)
            draw.rectangle(
                (x1, y1 - lift, x1 + place[2] - place[0] + 2, y1 - lift + place[3] - place[1] + 4), fill=colour
            )
            draw.text((x1 + 1, y1 - lift), label, fill="#ffffff")
    return np.asarray(image)


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
