"""A scan's slices as the pictures that a model sees."""

import dataclasses
import functools

import numpy as np

from medplib_jax.data.errors import DataError
from medplib_jax.volumes.geometry import Cut, cut
from medplib_jax.volumes.volume import Volume
from medplib_jax.volumes.windows import PERCENTILE, PERCENTILES, Tone, Windows, centred


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The slices of a plane in order; each is made when it is asked for. tones: one, or three for R, G and B."""

    volume: Volume
    cut: Cut
    tones: tuple[Tone, ...]

    def __len__(self) -> int:
        return len(self.cut)

    def __getitem__(self, number: int) -> np.ndarray:
        """uint8 [h, w], or [h, w, 3] in colour."""
        plane = self.cut.reoriented(self.volume.values)[number]
        return self.cut.picture(shown(plane, self.tones, self.volume.inverted))


def pictures(volume: Volume, plane: str = "acquired", windows: Windows | None = None) -> Pictures:
    """windows None: the file's own, else percentiles of the whole scan.

    DataError as from `cut`, and without any value.
    """
    return Pictures(volume, cut(volume, plane), () if volume.is_colour else tones_of(volume, windows))


def tones_of(volume: Volume, windows: Windows | None) -> tuple[Tone, ...]:
    """What turns a scan's values into grey."""
    percentile = functools.cache(lambda: _percentile_tone(volume))
    if windows is None:
        return (volume.tone or percentile(),)
    return tuple(percentile() if window == PERCENTILE else centred(*window) for window in windows)


def _percentile_tone(volume: Volume) -> Tone:
    values = volume.values
    known = values if values.dtype.kind in "biu" else values[np.isfinite(values)]
    if not known.size:
        raise DataError(volume.file, None, "scan has no value", "a finite number", "none")
    low, high = np.percentile(known, PERCENTILES)
    return Tone(float(low), float(high))


def shown(plane: np.ndarray, tones: tuple[Tone, ...], inverted: bool) -> np.ndarray:
    """A picture of values [h, w]: uint8 [h, w], or [h, w, 3] for three tones.

    One in colour, [h, w, 3], stays as it is.
    """
    if plane.ndim == 3:
        return plane
    grey = [255 - tone(plane) if inverted else tone(plane) for tone in tones]
    return grey[0] if len(grey) == 1 else np.stack(grey, axis=-1)
