"""Stylised medical images with exact masks.

Eight modality looks, their anatomy and findings, as one table and one painter. Nothing here pretends to be clinical. A
structure has a typical place, shape, brightness and texture inside its modality and varies around them, so that a small
model can learn from pixels which names are visible and where. Coordinates are fractions: x of the width, y of the
height, (0, 0) at the top left.
"""

import dataclasses

import numpy as np
from PIL import Image

MIN_STRUCTURE_AREA = 0.025  # visible share of the image, per instance
MIN_FINDING_AREA = 0.015
MIN_VISIBLE = 0.7  # share of a structure that later things may not cover; findings stay whole


@dataclasses.dataclass(frozen=True)
class Look:
    """How the inside is painted: base colour (1 or 3 channels in [0, 1]), texture name, optional rim colour."""

    colour: tuple[float, ...]
    texture: str = "plain"
    rim: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Structure:
    """Normal anatomy: centre and half axes are typical values, `pair` allows a second instance mirrored at x = 0.5."""

    name: str
    look: Look
    centre: tuple[float, float]
    size: tuple[float, float]
    angle: float = 0.0  # degrees
    bend: float = 0.0  # curvature of the long axis
    power: float = 2.0  # exponent of the superellipse: 2 round, 4 box-like
    pair: bool = False
    anywhere: bool = False  # no typical place (skin): the centre is drawn from the modality's field


@dataclasses.dataclass(frozen=True)
class Finding:
    """Abnormality: lies anywhere in the modality's field; `irregular` roughens its outline."""

    name: str
    look: Look
    irregular: float = 0.15


@dataclasses.dataclass(frozen=True)
class Modality:
    """One look.

    `prefix` begins file names, `label` is the word in questions, `field` = centre and half axes of where findings lie.
    """

    prefix: str
    label: str
    structures: tuple[Structure, ...]
    findings: tuple[Finding, ...]
    field: tuple[float, float, float, float] = (0.5, 0.5, 0.3, 0.3)


@dataclasses.dataclass(frozen=True)
class Instance:
    """One visible thing: its name, whether it is a finding, and its visible pixels bool[H, W]."""

    name: str
    finding: bool
    mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scene:
    """A painted image uint8[H, W] or [H, W, 3] and everything visible in it."""

    modality: Modality
    image: np.ndarray
    instances: tuple[Instance, ...]


def gray(value, texture="plain", rim=None):
    return Look((value,), texture, None if rim is None else (rim,))


# Colours laid over a grey image, as by a perfusion map, Doppler flow or computer-aided detection.
HOT, COLD = Look((0.95, 0.35, 0.1), rim=(0.95, 0.85, 0.2)), Look((0.1, 0.25, 0.85), rim=(0.2, 0.75, 0.85))

MODALITIES = (
    Modality(
        "ct",
        "CT",
        (
            Structure("liver", gray(0.66), (0.27, 0.42), (0.155, 0.16), angle=-20, power=2.4),
            Structure("spleen", gray(0.05), (0.81, 0.45), (0.095, 0.14), angle=20),
            Structure("stomach", gray(0.85, "stripes"), (0.57, 0.31), (0.13, 0.105), angle=15, bend=0.3),
            Structure("kidney", gray(0.9, "rings"), (0.26, 0.72), (0.1, 0.115), angle=25, pair=True),
            Structure("spine", gray(1.0), (0.5, 0.75), (0.105, 0.11), power=5),
        ),
        (Finding("tumor", HOT, 0.1), Finding("cyst", COLD, 0.0)),
        (0.5, 0.52, 0.28, 0.26),
    ),
    Modality(
        "mr",
        "MR",
        (
            Structure("ventricle", gray(0.0, rim=0.9), (0.5, 0.45), (0.1, 0.14), bend=0.5),
            Structure("cerebellum", gray(0.72, "stripes"), (0.5, 0.77), (0.2, 0.11)),
            Structure("eye", gray(0.95, "rings"), (0.3, 0.19), (0.1, 0.1), pair=True),
        ),
        (Finding("tumor", HOT, 0.15), Finding("hemorrhage", COLD, 0.2)),
        (0.5, 0.52, 0.26, 0.22),
    ),
    Modality(
        "x_ray",
        "X-ray",
        (
            Structure("lung", gray(0.1), (0.25, 0.46), (0.135, 0.25), angle=6, power=2.4, pair=True),
            Structure("heart", gray(0.9), (0.55, 0.62), (0.14, 0.13), angle=25),
            Structure("spine", gray(0.75, "stripes"), (0.5, 0.28), (0.075, 0.2), power=5),
        ),
        (Finding("nodule", HOT, 0.0), Finding("infiltrate", COLD, 0.3)),
        (0.5, 0.5, 0.3, 0.3),
    ),
    Modality(
        "pet",
        "PET",
        (
            Structure("brain", gray(0.72), (0.5, 0.17), (0.125, 0.115)),
            Structure("heart", gray(0.7, "stripes"), (0.6, 0.42), (0.1, 0.1), angle=20),
            Structure("liver", gray(0.45), (0.36, 0.58), (0.14, 0.105), angle=-10),
            Structure("bladder", gray(0.9), (0.5, 0.85), (0.115, 0.1)),
        ),
        (Finding("lesion", gray(1.0), 0.1), Finding("tumor", gray(1.0, "rings"), 0.1)),
        (0.5, 0.56, 0.22, 0.26),
    ),
    Modality(
        "ultrasound",
        "ultrasound",
        (
            Structure("liver", gray(0.6, "grain"), (0.36, 0.44), (0.15, 0.15), angle=-15),
            Structure("gallbladder", gray(0.0, rim=0.8), (0.64, 0.4), (0.09, 0.145), angle=-20),
            Structure("kidney", gray(0.8, "rings"), (0.56, 0.75), (0.18, 0.11), angle=5, bend=0.25),
        ),
        (Finding("stone", gray(1.0), 0.05), Finding("tumor", HOT, 0.1)),
        (0.5, 0.6, 0.24, 0.22),
    ),
    Modality(
        "fundus",
        "fundus",
        (
            Structure("optic disc", Look((1.0, 0.85, 0.55), rim=(1.0, 0.65, 0.3)), (0.24, 0.48), (0.105, 0.11)),
            Structure("macula", Look((0.1, 0.25, 0.1)), (0.58, 0.5), (0.11, 0.115)),
            Structure("vessel", Look((0.62, 0.03, 0.1)), (0.52, 0.22), (0.27, 0.065), bend=-0.35),
        ),
        (Finding("hemorrhage", Look((0.3, 0.0, 0.32)), 0.3), Finding("exudate", Look((1.0, 0.98, 0.3), "grain"), 0.3)),
        (0.54, 0.56, 0.27, 0.27),
    ),
    Modality(
        "dermoscopy",
        "dermoscopy",
        (
            Structure("nevus", Look((0.5, 0.29, 0.17), "rings"), (0.5, 0.5), (0.14, 0.13), anywhere=True),
            Structure("freckle", Look((0.78, 0.52, 0.3)), (0.5, 0.5), (0.13, 0.12), anywhere=True),
            Structure("scar", Look((1.0, 0.97, 1.0)), (0.5, 0.5), (0.2, 0.075), angle=30, anywhere=True),
        ),
        (
            Finding("melanoma", Look((0.1, 0.08, 0.14), "grain"), 0.35),
            Finding("angioma", Look((0.85, 0.08, 0.12)), 0.05),
        ),
        (0.5, 0.5, 0.33, 0.33),
    ),
    Modality(
        "endoscopy",
        "endoscopy",
        (
            Structure("lumen", Look((0.1, 0.02, 0.03)), (0.5, 0.46), (0.15, 0.15)),
            Structure("fold", Look((1.0, 0.72, 0.62), "stripes"), (0.5, 0.8), (0.25, 0.075), bend=-0.25),
            Structure("vessel", Look((0.38, 0.22, 0.5)), (0.25, 0.36), (0.075, 0.2), angle=20, bend=0.2),
        ),
        (
            Finding("polyp", Look((0.25, 0.6, 0.5), rim=(0.1, 0.35, 0.3)), 0.0),
            Finding("ulcer", Look((0.95, 0.93, 0.6), rim=(0.75, 0.1, 0.1)), 0.2),
        ),
        (0.5, 0.5, 0.28, 0.28),
    ),
)


class Painter:
    """One image in the making: warped coordinates, smooth noise and the canvas float32[H, W, C]."""

    def __init__(self, rng, height, width):
        self.rng, self.height, self.width = rng, height, width
        self.long_side = max(height, width)
        # the whole picture is gently warped: outlines are never perfect ellipses
        self.y = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None] + 0.012 * self.noise(4)
        self.x = ((np.arange(width, dtype=np.float32) + 0.5) / width)[None, :] + 0.012 * self.noise(4)
        self.canvas = None

    def noise(self, cells):
        """Smooth noise float32[H, W], about standard normal, with `cells` bumps along a side."""
        coarse = self.rng.standard_normal((cells, cells), dtype=np.float32)
        return np.asarray(Image.fromarray(coarse).resize((self.width, self.height), Image.Resampling.BICUBIC))

    def level(self, centre, size, angle=0.0, bend=0.0, power=2.0, irregular=0.0):
        """Level function [H, W] (inside < 1) of a bent superellipse, and its local coordinates u, v.

        The coordinates are fractions of the image.
        """
        turn = np.deg2rad(angle)
        dx, dy = self.x - centre[0], self.y - centre[1]
        u = dx * np.float32(np.cos(turn)) + dy * np.float32(np.sin(turn))
        v = dy * np.float32(np.cos(turn)) - dx * np.float32(np.sin(turn))
        along, across, reach = (u, v, size[0]) if size[0] >= size[1] else (v, u, size[1])
        if bend:  # in place: u and v follow the curve, and textures with them
            across += np.float32(bend) * (along * along / reach - reach / 3)
        if power == 2.0:
            rho = np.sqrt((u / size[0]) ** 2 + (v / size[1]) ** 2)
        else:
            rho = (np.abs(u / size[0]) ** power + np.abs(v / size[1]) ** power) ** (1 / power)
        if irregular:  # bounded, so that no part breaks off
            rho = rho * (1 + irregular * np.tanh(self.noise(9)))
        return rho, u, v

    def texture(self, name, rho, u, v):
        """Relative brightness [H, W] around 0."""
        if name == "grain":
            return 0.35 * np.tanh(2 * self.noise(self.long_side // 4))
        if name == "stripes":
            return 0.3 * np.sin(2 * np.pi * (u if np.ptp(u[rho < 1]) > np.ptp(v[rho < 1]) else v) / 0.085)
        if name == "rings":
            return np.where(rho < 0.5, -0.55, 0.0)
        return np.float32(0)

    def paint(self, rho, u, v, radius, look):
        """Blends `look` over the canvas where rho < 1.

        `radius` (pixels) sets the softness of the edge to about one pixel.
        """
        value = np.asarray(look.colour, np.float32) * (1 + self.texture(look.texture, rho, u, v))[..., None]
        alpha = np.clip((1 - rho) * radius + 0.5, 0, 1)[..., None]
        painted = bounding_box(alpha[..., 0] > 0)
        rho, alpha, value = rho[painted], alpha[painted], np.broadcast_to(value, (*rho.shape, value.shape[-1]))[painted]
        if look.rim is not None:
            value = np.where((rho > 0.8)[..., None], np.asarray(look.rim, np.float32), value)
        self.canvas[painted] += alpha * (value - self.canvas[painted])


def bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
    """The smallest rows and columns that hold all of a mask, bool[H, W]."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _ellipse(painter, x, y, a, b, power=2.0):
    return painter.level((x, y), (a, b), power=power)[0]


def _inside(rho, softness=25.0):
    return np.clip((1 - rho) * softness + 0.5, 0, 1)


def _background_ct(painter):
    rho = _ellipse(painter, 0.5, 0.52, 0.47, 0.42, 2.5)
    return (_inside(rho) * np.where(rho > 0.93, 0.62, 0.36 + 0.025 * painter.noise(24)))[..., None]


def _background_mr(painter):
    rho = _ellipse(painter, 0.5, 0.5, 0.46, 0.48)
    gyri = 0.42 + 0.09 * np.sin(7 * painter.noise(8))
    return (_inside(rho) * np.select([rho > 0.94, rho > 0.87], [0.8, 0.08], gyri))[..., None]


def _background_x_ray(painter):
    chest = 0.5 + 0.1 * painter.y
    ribs = 0.07 * np.cos(2 * np.pi * (painter.y - 0.5 * (painter.x - 0.5) ** 2) * 8)
    shoulders = _inside(_ellipse(painter, 0.5, 0.75, 0.52, 0.72, 3.0), 8)
    return (0.12 + shoulders * (chest - 0.12 + ribs + 0.02 * painter.noise(16)))[..., None]


def _background_pet(painter):
    head, torso = _ellipse(painter, 0.5, 0.17, 0.17, 0.16), _ellipse(painter, 0.5, 0.64, 0.32, 0.4, 3.0)
    return (np.maximum(_inside(head, 8), _inside(torso, 8)) * (0.2 + 0.02 * painter.noise(12)))[..., None]


def _fan(painter):
    """Sector of an ultrasound probe above the upper edge: 1 inside, 0 outside."""
    radius = np.hypot(painter.x - 0.5, painter.y + 0.25)
    angle = np.abs(np.arctan2(painter.x - 0.5, painter.y + 0.25))
    return ((angle < 0.6) & (radius > 0.32) & (radius < 1.22)).astype(np.float32)


def _background_ultrasound(painter):
    depth = 0.3 + 0.06 * np.cos(2 * np.pi * 5 * np.hypot(painter.x - 0.5, painter.y + 0.25))
    return depth[..., None]


def _background_fundus(painter):
    rho = _ellipse(painter, 0.5, 0.5, 0.49, 0.49)
    light = (1.05 - 0.35 * rho**2 + 0.03 * painter.noise(8)) * _inside(rho)
    twigs = sum(
        np.abs(painter.y - 0.5 - side * (0.12 + reach * np.sqrt(np.clip(painter.x - 0.2, 0, 1)))) < 0.006
        for side, reach in ((1, 0.3), (1, 0.1), (-1, 0.12), (-1, 0.02))
    )
    return light[..., None] * np.where(twigs[..., None] > 0, (0.62, 0.2, 0.1), (0.85, 0.42, 0.17))


def _background_dermoscopy(painter):
    light = 1 + 0.03 * painter.noise(12) - 0.35 * np.clip(_ellipse(painter, 0.5, 0.5, 0.62, 0.62) - 0.8, 0, 1)
    canvas = light[..., None] * np.asarray((0.93, 0.72, 0.62))
    for _ in range(3):
        turn, offset = painter.rng.uniform(0, np.pi), painter.rng.uniform(-0.3, 0.3)
        line = (painter.x - 0.5) * np.cos(turn) + (painter.y - 0.5) * np.sin(turn) - offset
        canvas[np.abs(line) < 0.004] *= 0.55
    return canvas


def _background_endoscopy(painter):
    rho = _ellipse(painter, 0.5, 0.46, 0.6, 0.6)
    light = 0.95 - 0.35 * np.clip(rho, 0, 1.2) + 0.05 * np.sin(14 * rho + painter.noise(4)) + 0.03 * painter.noise(10)
    return light[..., None] * np.asarray((0.95, 0.5, 0.45))


def _finish_pet(painter):
    """The hot colour map: black, red, yellow, white."""
    value = painter.canvas[..., :1]
    return np.concatenate([value * 2.2, value * 2.2 - 0.8, value * 2.6 - 1.6], axis=-1)


def _finish_ultrasound(painter):
    speckle = (
        1
        + 0.22 * painter.rng.standard_normal((painter.height, painter.width), dtype=np.float32)
        + 0.15 * painter.noise(24)
    )
    return painter.canvas * (speckle * _fan(painter))[..., None]


def _finish_endoscopy(painter):
    frame = _inside(_ellipse(painter, 0.5, 0.5, 0.5, 0.5, 6.0))
    return painter.canvas * frame[..., None]


_BACKGROUNDS = {
    "ct": _background_ct,
    "mr": _background_mr,
    "x_ray": _background_x_ray,
    "pet": _background_pet,
    "ultrasound": _background_ultrasound,
    "fundus": _background_fundus,
    "dermoscopy": _background_dermoscopy,
    "endoscopy": _background_endoscopy,
}
_FINISHES = {"pet": _finish_pet, "ultrasound": _finish_ultrasound, "endoscopy": _finish_endoscopy}


def image_size(rng):
    """(height, width): the long side 96 to 160 pixels, aspect up to 4:3, one image in ten up to 8:5."""
    long_side = int(rng.integers(96, 161))
    short_side = round(long_side / rng.uniform(1.0, 1.6 if rng.random() < 0.1 else 4 / 3))
    return (short_side, long_side) if rng.random() < 0.6 else (long_side, short_side)


def _choose(rng, modality):
    """What is visible: [(structure or finding, number of instances)], structures first.

    Two to four structures, rarely all there are; no finding, one, two of a name or one of each: so that every name is
    often there and often not.
    """
    names = len(modality.structures)
    count = min(names, 4) if rng.random() < 0.2 else int(rng.integers(2, max(names, 3)))
    chosen = [modality.structures[i] for i in sorted(rng.permutation(names)[:count])]
    visible = [(structure, 1 + int(structure.pair and rng.random() < 0.5)) for structure in chosen]
    first, second = rng.permutation(len(modality.findings))[:2]
    kind = rng.random()
    if kind < 0.3:
        return visible
    if kind < 0.5:
        return visible + [(modality.findings[i], 1) for i in sorted((first, second))]
    return visible + [(modality.findings[first], 2 if kind < 0.65 else 1)]


def _place_structure(painter, structure, field, taken, index, flip):
    """Level function, local coordinates and edge radius (pixels) of one instance, varied around its typical place."""
    rng = painter.rng
    size = structure.size * rng.uniform(0.9, 1.15, 2)
    centre = (
        _free_point(rng, field, size, taken) if structure.anywhere else structure.centre + rng.uniform(-0.035, 0.035, 2)
    )
    turn = structure.angle + rng.uniform(-12, 12)
    if structure.pair and (index == 1) != flip:  # the other one of the pair
        centre, turn = (1 - centre[0], centre[1]), -turn
    level = painter.level(centre, size, turn, structure.bend, structure.power)
    return *level, min(size[0] * painter.width, size[1] * painter.height)


def _free_point(rng, field, size, taken):
    """Of some random places in the field, the one whose surrounding box has the smallest sum of `taken`."""
    radius, turn = np.sqrt(rng.random(24)), rng.uniform(0, 2 * np.pi, 24)
    points = zip(field[0] + field[2] * radius * np.cos(turn), field[1] + field[3] * radius * np.sin(turn), strict=True)
    return min(points, key=lambda point: _covered(taken, point, size))


def _place_finding(painter, finding, field, taken):
    """As `_place_structure`, where it covers least of what is `taken` (float[H, W])."""
    rng = painter.rng
    radius = painter.long_side * rng.uniform(0.1, 0.13)
    size = (radius * rng.uniform(0.95, 1.2) / painter.width, radius / painter.height)
    centre = _free_point(rng, field, size, taken)
    return *painter.level(centre, size, irregular=finding.irregular), radius


def _covered(taken, centre, size):
    """Sum of `taken` in the box around an ellipse."""
    height, width = taken.shape
    rows = slice(max(0, int((centre[1] - size[1]) * height)), int((centre[1] + size[1]) * height) + 1)
    columns = slice(max(0, int((centre[0] - size[0]) * width)), int((centre[0] + size[0]) * width) + 1)
    return float(taken[rows, columns].sum())


def _layout(painter, modality, visible):
    """Places of all instances, or None when some would be too small or too much covered by later ones."""
    field = modality.field
    taken = np.zeros((painter.height, painter.width), np.float32)
    placed, masks = [], []
    flip = painter.rng.random() < 0.5
    inside = _fan(painter) > 0 if modality.prefix == "ultrasound" else True
    for thing, count in visible:
        for index in range(count):
            finding = isinstance(thing, Finding)
            place = (
                _place_finding(painter, thing, field, taken)
                if finding
                else _place_structure(painter, thing, field, taken, index, flip)
            )
            mask = (place[0] < 1) & inside
            placed.append((thing, place))
            masks.append(mask)
            taken += mask * (8 if finding else 1)  # two findings keep apart
    shown, later = [], np.zeros(taken.shape, bool)
    for (thing, _), mask in zip(reversed(placed), reversed(masks), strict=True):
        seen = mask & ~later
        finding = isinstance(thing, Finding)
        if (
            seen.mean() < (MIN_FINDING_AREA if finding else MIN_STRUCTURE_AREA)
            or seen.sum() < (0.97 if finding else MIN_VISIBLE) * mask.sum()
        ):
            return None
        shown.append(Instance(thing.name, finding, seen))
        later |= mask
    return placed, tuple(reversed(shown))


def draw_scene(modality: Modality, rng: np.random.Generator) -> Scene:
    """Paint one image of a modality; everything random comes from `rng`."""
    visible = _choose(rng, modality)
    painter = Painter(rng, *image_size(rng))
    layout = None
    while layout is None:  # a few tries at most: typical places hardly overlap
        layout = _layout(painter, modality, visible)
    placed, instances = layout
    background = _BACKGROUNDS[modality.prefix](painter).astype(np.float32)
    channels = max(
        background.shape[-1], *(len(thing.look.colour) for thing, _ in placed)
    )  # a coloured finding colours a grey image
    painter.canvas = np.repeat(background, channels // background.shape[-1], axis=-1)
    for thing, (rho, u, v, radius) in placed:
        painter.paint(rho, u, v, radius, thing.look)
    canvas = _FINISHES.get(modality.prefix, lambda painter: painter.canvas)(painter)
    grain = rng.normal(0, 0.02, canvas.shape[:2]).astype(np.float32)
    canvas = canvas * np.float32(rng.uniform(0.9, 1.08)) + grain[..., None]
    return Scene(modality, np.round(np.clip(canvas, 0, 1) * 255).astype(np.uint8).squeeze(), instances)
