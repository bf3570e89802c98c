"""What masks and metadata prove about an image: which names are there, where, how large, and which lie apart."""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from medplib_jax.datasets.mecovqa import stem, unite
from medplib_jax.datasets.modalities import LABELS
from medplib_jax.datasets.qa.grid import Box

SIDE_WORDS = frozenset("left right upper lower top bottom middle centre center above below superior inferior".split())


@dataclasses.dataclass(frozen=True)
class Target:
    """One visible name."""

    name: str
    masks: tuple[str, ...]  # references of its instances
    merged: str  # reference of their union; the instance itself when it is alone
    box: Box  # of the union, pixels
    boxes: tuple[Box, ...]  # of the instances
    centre: tuple[float, float]  # (x, y) of the union's mean pixel, in [0, 1]
    area: float  # share of the image
    size: tuple[int, int]  # (h, w) of the image

    @property
    def relative_box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 of the union as shares of the image."""
        height, width = self.size
        return self.box[0] / width, self.box[1] / height, self.box[2] / width, self.box[3] / height

    @property
    def has_side_word(self) -> bool:
        """Whether the name itself speaks of a place ("left kidney" is the patient's left, not the image's)."""
        return not SIDE_WORDS.isdisjoint(self.name.lower().replace("-", " ").split())

    @property
    def place(self) -> str:
        """The cell of the 3 x 3 parts of the image in which the centre lies."""
        x, y = (min(2, int(3 * value)) for value in self.centre)
        return (
            ("upper left", "upper middle", "upper right"),
            ("middle left", "centre", "middle right"),
            ("lower left", "lower middle", "lower right"),
        )[y][x]

    @property
    def is_compact(self) -> bool:
        """Whether one part of the image can be called its place."""
        x0, y0, x1, y1 = self.relative_box
        return max(x1 - x0, y1 - y0) <= 0.6


@dataclasses.dataclass(frozen=True)
class ImageFacts:
    """What is known of one image. `absent`: names that are not in it, where the masks are complete."""

    image: str  # reference
    size: tuple[int, int]  # (h, w)
    modality: str  # prefix of the file name
    targets: tuple[Target, ...]
    touching: frozenset[frozenset[str]]  # pairs of names whose masks share a pixel
    absent: tuple[str, ...] = ()
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    patient: str = ""  # whose images must not be torn between splits
    spacing: tuple[float, float] | None = None  # mm between rows and between columns, where known

    @property
    def label(self) -> str:
        """The modality in a sentence; empty when unknown."""
        return LABELS.get(self.modality, "")

    def apart(self, first: Target, second: Target) -> bool:
        """Whether no pixel belongs to both."""
        return frozenset((first.name, second.name)) not in self.touching

    def pairs_apart(self) -> list[tuple[Target, Target]]:
        return [pair for pair in itertools.combinations(self.targets, 2) if self.apart(*pair)]

    def generator(self, seed: int, purpose: str) -> np.random.Generator:
        """Random numbers for one purpose; they depend on the seed and the image's name alone."""
        digest = hashlib.sha256(f"{purpose} {stem(self.image)}".encode()).digest()
        return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])


def measure(
    named: Mapping[str, Sequence[np.ndarray]], references: Mapping[str, tuple[tuple[str, ...], str]]
) -> tuple[tuple[Target, ...], frozenset]:
    """Targets and touching pairs of an image.

    named: each name's 0/1 masks uint8 [h, w], none empty. references: (instances, union) of each name.
    """
    united = {name: unite(masks).astype(bool) for name, masks in named.items()}
    targets = tuple(
        _target(name, mask, tuple(map(_box, named[name])), *references[name]) for name, mask in united.items()
    )
    touching = frozenset(
        frozenset(pair) for pair in itertools.combinations(united, 2) if (united[pair[0]] & united[pair[1]]).any()
    )
    return targets, touching


def _target(name: str, mask: np.ndarray, boxes: tuple[Box, ...], masks: tuple[str, ...], merged: str) -> Target:
    rows, columns = np.nonzero(mask)
    height, width = mask.shape
    centre = (float((columns.mean() + 0.5) / width), float((rows.mean() + 0.5) / height))
    return Target(name, masks, merged, _box(mask), boxes, centre, len(rows) / mask.size, mask.shape)


def _box(mask: np.ndarray) -> Box:
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
