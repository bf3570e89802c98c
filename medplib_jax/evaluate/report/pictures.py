"""Colours, overlays and small pieces of text that every page uses."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import markupsafe
import numpy as np
from PIL import Image, ImageDraw

from medplib_jax.data import images, regions
from medplib_jax.data.overlay import PALETTE, rgb
from medplib_jax.data.records import REGION

REGION_COLOUR = "#00e5ff"
THUMBNAIL = 224  # pixels of the longest side
DRAWINGS = "Drawings made by a program, not images of patients."


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


def open_thumbnail(path: str | Path | images.Blob) -> np.ndarray:
    """RGB uint8 [h, w, 3], enlarged or shrunk to THUMBNAIL pixels on its longest side."""
    picture = Image.fromarray(images.load_image(path if isinstance(path, images.Blob) else str(path)))
    scale = THUMBNAIL / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def mark_drawing(picture: np.ndarray) -> np.ndarray:
    """The picture uint8 [h, w, 3] with the word "drawing" in its lower left corner."""
    shown = Image.fromarray(picture)
    place = (3, picture.shape[0] - 13)
    ImageDraw.Draw(shown).text(place, "drawing", fill="white", stroke_width=1, stroke_fill="black")
    return np.asarray(shown)


def marked_regions(question: str, find: Callable[[str], str | images.Blob], size: tuple[int, int]) -> list[np.ndarray]:
    """The regions that a question marks, bool [h, w] at the image's `size` (h, w); `find` gives the file of a mask that
    it refers to.
    """
    found = []
    for reference in REGION.findall(question):
        mask = regions.draw(reference, size) if regions.is_shape(reference) else images.load_mask(find(reference), size)
        found.append(np.asarray(mask) > 0)
    return found


def plain_text(text: str) -> str:
    """What people read of a turn: without `<image>` and the paths of masks; regions are [region]."""
    plain = re.sub(r"<mask>.*?</mask>", "", text.replace("<image>", "").replace("\n", " "))
    return re.sub(r"<region>.*?</region>", "[region]", plain).strip()


def mark_tokens(text: str) -> markupsafe.Markup:
    """Escaped text for the page: `<image>` and mask paths are dropped, regions and <SEG> become labels, the latter in
    their mask's colour.
    """
    plain = re.sub(r"<mask>.*?</mask>", "", text.replace("<image>", "").replace("\n", " "))
    marked, masks = markupsafe.Markup(), 0
    for part in re.split(r"(<region>.*?</region>|<SEG>)", plain.strip()):
        if part == "<SEG>":
            marked += markupsafe.Markup('<span class="token" style="background:{}">SEG</span>').format(
                PALETTE[masks % len(PALETTE)]
            )
            masks += 1
        elif part.startswith("<region>") and part.endswith("</region>"):
            marked += markupsafe.Markup('<span class="token region">region</span>')
        else:
            marked += part
    return marked


def readable(background):
    """Black or white, whichever stands out more."""
    return "black" if np.dot(rgb(background), (0.299, 0.587, 0.114)) > 127 else "white"
