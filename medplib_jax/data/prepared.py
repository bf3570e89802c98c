"""The files that records name as the arrays that a batch holds, kept in memory and on disk for the next time."""

from collections.abc import Callable

import numpy as np

from medplib_jax.config.experiment import DataConfig
from medplib_jax.config.model import ModelConfig
from medplib_jax.data import icl, images, regions
from medplib_jax.data.cache import Arrays, DiskCache, MemoryCache, fingerprint
from medplib_jax.data.errors import DataError, Notice
from medplib_jax.data.images import Blob
from medplib_jax.data.records import Record


class PreparedFiles:
    """Pictures, masks and regions at the sizes of one model. What is odd about a file is noted when it is prepared."""

    def __init__(self, data: DataConfig, model: ModelConfig, memory: MemoryCache, disk: DiskCache | None):
        self._data, self._model, self._memory, self._disk = data, model, memory, disk

    def view(self, record: Record, view: icl.View, notices: list[Notice]) -> Arrays:
        """What an `<image>` stands for: `clip` and `size` of a picture, with `sam` and `sam_box` of one without a mask;
        or `encoded`, a mask for the mask encoder.
        """
        file = record.find(view.image)
        if view.kind == "picture":
            return self._picture(file, notices)
        return self._example(file, record.find(view.mask), view.kind, notices)

    def _picture(self, file: str | Blob, notices: list[Notice]) -> Arrays:
        clip, sam = self._model.image_size, self._model.mask_image_size
        stretches = self._model.stretches

        def make():
            pixels = images.load_pixels(file, notices)
            pixels_sam, box = images.sam_pixels(pixels, sam) if sam else (np.zeros((0, 0, 3), np.uint8), (0,) * 4)
            return {
                "clip": images.stretched(pixels, clip) if stretches else images.clip_pixels(pixels, clip),
                "sam": pixels_sam,
                "sam_box": np.array(box, np.int32),
                "size": np.array(pixels.shape[:2], np.int32),
            }

        return self._cached(("picture", clip, sam, *["stretched"] * stretches), file, make)

    def _example(self, file: str | Blob, mask_file: str | Blob, kind: str, notices: list[Notice]) -> Arrays:
        """An example's mask, painted on its picture, as a picture, or for the encoder.

        DataError when it is empty or of another size than its picture.
        """
        side = self._model.image_size

        def make():
            pixels = images.load_pixels(file, notices)
            mask = images.load_mask(mask_file, pixels.shape[:2], notices)
            if not mask.any():
                raise DataError(str(mask_file), None, "mask of an example is empty", "at least one pixel", "none")
            if kind == "encoded":
                return {"encoded": icl.encoder_mask(mask)}
            shown = icl.overlaid(pixels, mask) if kind == "overlay" else icl.mask_picture(mask)
            return {"clip": images.clip_pixels(shown, side), "size": np.array(mask.shape, np.int32)}

        key = (kind, side, str(mask_file) if self._disk is None else fingerprint(mask_file))
        return self._cached(key, file, make)

    def mask(self, file: str | Blob, size: tuple[int, int], notices: list[Notice]) -> np.ndarray:
        """A target's mask 0/1 uint8, as large as the picture of that size (h, w), or shrunk to the canvas."""
        side = self._data.mask_canvas

        def make():
            mask = images.load_mask(file, size, notices)
            if not mask.any():
                notices.append(Notice(str(file), None, "mask is empty", "at least one pixel", "none"))
            if mask.all():
                notices.append(Notice(str(file), None, "mask covers the whole picture", "a part of it", "all pixels"))
            mask = images.mask_on_canvas(mask, side)
            return {"bits": np.packbits(mask, axis=1), "width": np.array(mask.shape[1], np.int32)}

        packed = self._cached(("mask", side, size), file, make)
        return np.unpackbits(packed["bits"], axis=1, count=int(packed["width"]))

    def region(
        self,
        record: Record,
        reference: str,
        size: tuple[int, int],
        rng: np.random.Generator | None,
        notices: list[Notice],
    ) -> np.ndarray:
        """The points of a region, float32 [n, 2]; with `rng` those of a random part of it."""
        if regions.is_shape(reference):
            cells = regions.grid_cells(regions.draw(reference, size))
        else:
            cells = self._region_cells(record.find(reference), size, notices)
        if rng is not None:
            cells = regions.sub_component(cells, rng, reference=self._data.region_augmentation == "reference")
        return regions.cell_points(cells, self._model.region.max_points)

    def _region_cells(self, file: str | Blob, size: tuple[int, int], notices: list[Notice]) -> np.ndarray:
        def make():
            mask = images.load_mask(file, size, notices)
            if not mask.any():
                raise DataError(str(file), None, "region is empty", "at least one pixel", "none")
            return {"cells": regions.grid_cells(mask)}

        return self._cached(("region", size), file, make)["cells"]

    def _cached(self, key: tuple, file: str | Blob, make: Callable[[], Arrays]) -> Arrays:
        """The value from memory, from disk, or made. What it is made from besides the file stands in the key."""
        disk = self._disk
        if disk is None:
            return self._memory.get((*key, str(file)), make)
        return self._memory.get((*key, str(file)), lambda: disk.get((*key, fingerprint(file)), make))
