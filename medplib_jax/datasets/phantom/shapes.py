"""Generated pictures for in-context segmentation: shapes whose place every patient of a kind has in common.

A kind of picture is a fixed arrangement of shapes, as anatomy is: each has its form, place, size and brightness, of
which a patient's picture varies all but the form. Nothing but an example tells which of a picture's shapes is meant.
Some forms can be kept for testing, so that no training picture holds them.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

FORMS = ("disc", "ellipse", "square", "triangle", "bar", "ring")
HELD_OUT_FORMS = ("star", "cross", "crescent")
SIDE, SCALE = 112, 4  # of pictures; shapes are drawn so many times larger
CELLS, SHAPES = 3, 4  # places along a side; shapes in a picture


class Placed(NamedTuple):
    """A shape of a kind, or of one patient: centre and radius as shares of the side, radians, grey value."""

    form: str
    x: float
    y: float
    radius: float
    angle: float
    grey: float


def make_kind(forms: Sequence[str], rng: np.random.Generator) -> tuple[Placed, ...]:
    """An arrangement of SHAPES shapes of these forms, each in a cell of its own."""
    cells = rng.permutation(CELLS * CELLS)[:SHAPES]
    return tuple(
        Placed(
            form=forms[rng.integers(len(forms))],
            x=(cell % CELLS + 0.5 + rng.uniform(-0.15, 0.15)) / CELLS,
            y=(cell // CELLS + 0.5 + rng.uniform(-0.15, 0.15)) / CELLS,
            radius=rng.uniform(0.1, 0.14),
            angle=rng.uniform(0, 2 * math.pi),
            grey=rng.uniform(130, 230),
        )
        for cell in cells
    )


def vary(shape: Placed, rng: np.random.Generator) -> Placed:
    """The shape as one patient has it."""
    return shape._replace(
        x=shape.x + rng.uniform(-0.03, 0.03),
        y=shape.y + rng.uniform(-0.03, 0.03),
        radius=shape.radius * rng.uniform(0.9, 1.1),
        angle=shape.angle + rng.uniform(-0.4, 0.4),
        grey=shape.grey + rng.uniform(-15, 15),
    )


def draw_mask(shape: Placed) -> np.ndarray:
    """Which pixels are inside, bool [SIDE, SIDE]."""
    size = SIDE * SCALE
    image = Image.new("L", (size, size))
    draw, radius = ImageDraw.Draw(image), shape.radius * size
    centre = np.array([shape.x, shape.y]) * size

    def around(offset: float = 0.0, scale: float = 1.0) -> tuple[float, ...]:
        x, y = centre + offset * radius * np.array([math.cos(shape.angle), math.sin(shape.angle)])
        return (x - scale * radius, y - scale * radius, x + scale * radius, y + scale * radius)

    if shape.form in ("disc", "ring", "crescent"):
        draw.ellipse(around(), fill=1)
        if shape.form == "ring":
            draw.ellipse(around(scale=0.5), fill=0)
        if shape.form == "crescent":
            draw.ellipse(around(offset=0.6, scale=0.8), fill=0)
    else:
        draw.polygon([tuple(point) for point in centre + radius * _outline(shape.form, shape.angle)], fill=1)
    pixels = np.asarray(image).reshape(SIDE, SCALE, SIDE, SCALE)
    return pixels.mean((1, 3)) >= 0.5


def _outline(form: str, angle: float) -> np.ndarray:
    """The corners of a form of radius 1, [n, 2]."""
    if form == "ellipse":
        turns = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        points = np.stack([np.cos(turns), 0.55 * np.sin(turns)], axis=1)
    elif form in ("square", "triangle"):
        corners = {"square": 4, "triangle": 3}[form]
        turns = np.arange(corners) * 2 * math.pi / corners
        points = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    elif form == "bar":
        points = np.array([(-1, -0.35), (1, -0.35), (1, 0.35), (-1, 0.35)])
    elif form == "star":
        turns, radii = np.arange(10) * math.pi / 5, np.tile([1, 0.45], 5)
        points = radii[:, None] * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    else:  # a cross
        a, b = 1.0, 0.35
        points = np.array(
            [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]
        )
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return points @ turn


def draw_picture(shapes: Sequence[Placed], masks: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A grey picture of the shapes on a dim, uneven ground, uint8 [SIDE, SIDE]."""
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
    picture = 50 + 25 * np.sin(3 * rows + rng.uniform(0, 6)) * np.cos(3 * columns + rng.uniform(0, 6))
    for shape, mask in zip(shapes, masks, strict=True):
        picture = np.where(mask, shape.grey, picture)
    blurred = Image.fromarray(np.uint8(np.clip(picture, 0, 255))).filter(ImageFilter.GaussianBlur(0.7))
    return np.uint8(np.clip(np.asarray(blurred, np.float32) + rng.normal(0, 6, picture.shape), 0, 255))


def generate_shapes(out: Path, kinds: int, patients: int, forms: Sequence[str], seed: int) -> None:
    """Writes a folder of pairs: `patients` pictures of each of `kinds` arrangements, with the masks of every shape.

    A structure is named after its form, kind and number: "star k003 1".
    """
    for kind in range(kinds):
        rng = np.random.default_rng([seed, kind])
        arrangement = make_kind(forms, rng)
        for patient in range(patients):
            name = f"mr_00--shapes--k{kind:03d}p{patient:02d}--2d_none"
            shapes = [vary(shape, rng) for shape in arrangement]
            masks = [draw_mask(shape) for shape in shapes]
            _save(out / "images" / f"{name}.png", draw_picture(shapes, masks, rng))
            for number, (shape, mask) in enumerate(zip(shapes, masks, strict=True)):
                _save(out / "masks" / name / f"{shape.form}_k{kind:03d}-{number}.png", np.uint8(mask) * 255)


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1)
