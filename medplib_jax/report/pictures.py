"""Colours, overlays and small pieces of text that every page uses."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import markupsafe
import numpy as np
from PIL import Image

from medplib_jax.data import images, regions
from medplib_jax.data.records import REGION

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe and Ito: told apart by colour-blind readers
REGION_COLOUR = "#00e5ff"
THUMBNAIL = 224  # pixels of the longest side


def format_value(value: object) -> str:
    """Numbers for people: three decimals below 100, thousands separated, a dash for None and NaN."""
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def open_thumbnail(path: str | Path) -> np.ndarray:
    """RGB uint8 [h, w, 3], enlarged or shrunk to THUMBNAIL pixels on its longest side."""
    picture = Image.fromarray(images.load_image(str(path)))
    scale = THUMBNAIL / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))


def overlay(picture: np.ndarray, masks: Sequence[np.ndarray], colours: Sequence[str], opacity: float = 0.4) -> np.ndarray:
    """`picture` uint8 [H, W, 3] under translucent masks with solid outlines; masks bool [h, w] are stretched to it (nearest)."""
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


def marked_regions(question: str, find: Callable[[str], str], size: tuple[int, int]) -> list[np.ndarray]:
    """The regions that a question marks, bool [h, w] at the image's `size` (h, w); `find` gives the file of a mask that it refers to."""
    found = []
    for reference in REGION.findall(question):
        mask = regions.draw(reference, size) if regions.is_shape(reference) else images.load_mask(find(reference), size)
        found.append(np.asarray(mask) > 0)
    return found


def mark_tokens(text: str) -> markupsafe.Markup:
    """Escaped text for the page: `<image>` and mask paths are dropped, regions and <SEG> become labels, the latter in their mask's colour."""
    plain = re.sub(r"<mask>.*?</mask>", "", text.replace("<image>", "").replace("\n", " "))
    marked, masks = markupsafe.Markup(), 0
    for part in re.split(r"(<region>.*?</region>|<SEG>)", plain.strip()):
        if part == "<SEG>":
            marked += markupsafe.Markup('<span class="token" style="background:{}">SEG</span>').format(PALETTE[masks % len(PALETTE)])
            masks += 1
        elif part.startswith("<region>") and part.endswith("</region>"):
            marked += markupsafe.Markup('<span class="token region">region</span>')
        else:
            marked += part
    return marked


def readable(background):
    """Black or white, whichever stands out more."""
    return "black" if np.dot(rgb(background), (0.299, 0.587, 0.114)) > 127 else "white"


def rgb(colour):
    """The bytes of "#rrggbb", float32 [3]."""
    return np.frombuffer(bytes.fromhex(colour[1:]), np.uint8).astype(np.float32)
