"""What a model is shown of a record's examples (MedPLIB-ICL): text, pictures under their masks, masks.

After the original's `ICLLazySupervisedDataset`; every picture keeps its place in the text.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from medplib_jax.config.model import ENCODED_MASK_SIDE, IclConfig
from medplib_jax.data.icl_form import EXAMPLES, question_turns
from medplib_jax.data.images import to_canvas
from medplib_jax.data.records import Record
from medplib_jax.data.sources import Source

OVERLAY_COLOUR, OVERLAY_OPACITY = (118, 158, 224), 0.55
_SHOWN = {
    "overlay": "Example {0}: <image>\nThe blue overlay is the reference segmentation mask.\n",
    "separate": "Example {0} image: <image>\nExample {0} mask: <image>\n",
}


class View(NamedTuple):
    """One `<image>` of a text: a picture, a picture under its mask, a mask as a picture, or one for the encoder."""

    image: str
    mask: str = ""
    kind: Literal["picture", "overlay", "mask", "encoded"] = "picture"


def with_examples(record: Record, examples: Sequence[tuple[str, str]]) -> Record:
    """The record's picture and target after these (image, mask) pairs, in the original's words; none: no example."""
    return dataclasses.replace(record, examples=tuple(examples), turns=question_turns(record.target_mask))


class WithShots(Source):
    """Records with at most `shots` of their examples, all asked in the original's words."""

    def __init__(self, source: Source, shots: int):
        self.file, self.root, self._source, self._shots = source.file, source.root, source, shots

    def __reduce__(self):
        return WithShots, (self._source, self._shots)

    @property
    def fingerprint(self) -> tuple:
        return *self._source.fingerprint, self._shots

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]
        if record.examples is None:
            raise record.error("record without examples", "icl_examples, or image1, mask1, ...", "an ordinary record")
        if record.target_mask is None:
            raise record.error("record without a target", "target_mask", "none")
        return with_examples(record, record.examples[: self._shots])


def views(record: Record, config: IclConfig) -> tuple[View, ...]:
    """What the `<image>` of a record stand for: examples, then its own pictures."""
    shown = []
    for image, mask in record.examples or ():
        if config.masks == "overlay":
            shown.append(View(image, mask, "overlay"))
        else:
            shown += [View(image), View(image, mask, "encoded" if config.mask_tokens else "mask")]
    return (*shown, *map(View, record.images))


def spelled_out(record: Record, config: IclConfig) -> Record:
    """The record with a text that names what is shown.

    A conversation that names fewer pictures is replaced by the original's words. DataError for one that names more.
    """
    if record.examples is None:
        return record
    needed = len(views(record, config))
    shown = "".join(_SHOWN[config.masks].format(i) for i in range(1, 1 + len(record.examples)))
    named = sum(text.replace(EXAMPLES, shown).count("<image>") for _, text in record.turns)
    if named > needed:
        raise record.error("images and <image> do not pair up", f"{needed} <image> with examples", str(named))
    turns = record.turns if named == needed else question_turns(record.target_mask)
    return dataclasses.replace(record, turns=tuple((role, text.replace(EXAMPLES, shown)) for role, text in turns))


def overlaid(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """RGB uint8 [h, w, 3] of a picture (grey or RGB) with its mask painted over it, fractions cut off."""
    rgb = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    mixed = rgb * (1 - OVERLAY_OPACITY) + np.array(OVERLAY_COLOUR, np.float64) * OVERLAY_OPACITY
    return np.where(mask[..., None] > 0, mixed.astype(np.uint8), rgb)


def mask_picture(mask: np.ndarray) -> np.ndarray:
    """The mask as a picture, black and white."""
    return mask * np.uint8(255)


def encoder_mask(mask: np.ndarray) -> np.ndarray:
    """A mask as the mask encoder reads it, 0/1 uint8 [336, 336]: resized as a picture, 1 where that is not black."""
    canvas, _ = to_canvas(mask_picture(mask), ENCODED_MASK_SIDE, 0)
    return (canvas > 0).astype(np.uint8)
