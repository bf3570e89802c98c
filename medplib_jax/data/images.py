"""Pictures and masks from disk to the uint8 arrays that the model normalises on the device.

Resizing is Pillow's bilinear (antialiased) on uint8, as torchvision does it in the original: the arrays equal the original's exactly.
"""

import dataclasses
import functools
import io

import numpy as np
from PIL import Image, ImageOps

from medplib_jax.data.errors import DataError, Notice

CLIP_PAD_COLOUR = (122, 116, 104)  # int(255 * CLIP's mean)
MAX_PIXELS = 2**27  # a larger picture is refused before it is decoded
MIN_SIDE, MAX_ASPECT = 16, 16  # a picture beyond is unusual, and is noted
_ORIENTATION = 0x0112  # the EXIF tag
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


@dataclasses.dataclass(frozen=True)
class Blob:
    """An encoded picture that lies in a larger file; `name` is for messages and unique among blobs of other content."""

    name: str
    content: bytes = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return self.name


def _open(file: str | Blob, notices: list[Notice] | None, upright: bool) -> Image.Image:
    """The decoded picture, turned by its EXIF rotation if asked; what is unusual about the file is appended to `notices`."""
    path = str(file)
    try:
        image = Image.open(io.BytesIO(file.content) if isinstance(file, Blob) else file)
        too_large = image.width * image.height > MAX_PIXELS
        if not too_large:
            image.load()
            unusual = _unusual(image)
            image = ImageOps.exif_transpose(image) if upright else image
    except Exception as error:  # decoders raise errors of many types on broken files
        raise DataError(path, None, "picture cannot be read", "an image file", str(error)) from error
    if too_large:
        raise DataError(
            path, None, "picture is too large", f"at most {MAX_PIXELS} pixels", f"{image.width} x {image.height}"
        )
    if unusual and notices is not None:
        expected = f"8-bit grey or RGB, upright, one frame, sides from {MIN_SIDE} pixels, aspect up to {MAX_ASPECT}"
        notices.append(Notice(path, None, "picture is not plain", expected, unusual))
    return image


def _unusual(image: Image.Image) -> str:
    """What is unusual about a picture file: its pixels, rotation, frames or shape; empty for most."""
    shortest, longest = sorted((image.width, image.height))
    found = [
        f"mode {image.mode}" if image.mode not in ("1", "L", "RGB") else "",
        f"EXIF orientation {_orientation(image)}" if _orientation(image) != 1 else "",
        f"{image.n_frames} frames" if getattr(image, "n_frames", 1) > 1 else "",
        f"{image.width} x {image.height} pixels" if shortest < MIN_SIDE or longest > MAX_ASPECT * shortest else "",
    ]
    return ", ".join(filter(None, found))


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(_ORIENTATION, 1)


def load_image(path: str | Blob, notices: list[Notice] | None = None) -> np.ndarray:
    """RGB uint8 [h, w, 3]. DataError when it cannot be read or is too large; see `load_pixels`."""
    pixels = load_pixels(path, notices)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def load_pixels(path: str | Blob, notices: list[Notice] | None = None) -> np.ndarray:
    """uint8 [h, w] when the picture is grey, however it is stored (most CT, MR, X-ray and ultrasound), else RGB [h, w, 3].

    DataError when it cannot be read or is too large. The file's EXIF rotation is applied (as OpenCV does in the original; masks carry none,
    so a mask made on the unrotated picture is met by the size check of `load_mask`). Alpha is dropped, 16-bit grey keeps its high byte, palettes and CMYK are converted: whatever
    is not plain 8-bit grey or RGB is noted in `notices`.
    """
    image = _open(path, notices, upright=True)
    if image.mode in _SIXTEEN_BIT or image.mode == "I":
        image = Image.fromarray((np.clip(np.asarray(image, np.int64), 0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise DataError(str(path), None, "picture has floating-point pixels", "8 or 16 bits per channel", image.mode)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    rgb = np.asarray(image.convert("RGB"))
    return np.ascontiguousarray(rgb[..., 0]) if _is_grey(rgb) else rgb


def _is_grey(rgb: np.ndarray) -> bool:
    """Whether the three channels are one; most coloured pictures show it in a few pixels."""
    return all(np.array_equal(rgb[::n, ::n, 0], rgb[::n, ::n, channel]) for n in (16, 1) for channel in (1, 2))


def load_mask(path: str | Blob, size: tuple[int, int], notices: list[Notice] | None = None) -> np.ndarray:
    """0/1 uint8 [h, w]: 1 where the grey value is at least 1. DataError when it cannot be read, is rotated, or its size is not (h, w)."""
    image = _open(path, notices, upright=False)
    if (found := (image.height, image.width)) != tuple(size):
        raise DataError(
            str(path),
            None,
            "mask and picture differ in size",
            "{} x {} (h x w)".format(*size),
            "{} x {}".format(*found),
        )
    if _orientation(image) != 1:
        raise DataError(str(path), None, "mask is rotated by EXIF", "orientation 1", str(_orientation(image)))
    if image.mode == "F":
        raise DataError(str(path), None, "mask has floating-point pixels", "8 or 16 bits", image.mode)
    grey = np.asarray(image) if image.mode in (*_SIXTEEN_BIT, "I") else np.asarray(image.convert("L"))
    return (grey >= 1).astype(np.uint8)


def fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(h, w) with the longest side made `side`, rounded half up as segment-anything's `get_preprocess_shape`; at least 1."""
    scale = side / max(size)
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def to_canvas(
    pixels: np.ndarray, side: int, colour: tuple[int, ...] | int
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Longest side resized to `side`, centred on a square of `colour` (odd rests: the smaller half first).

    Takes uint8 [h, w] or [h, w, 3]; returns uint8 [side, side, 3] for a colour of three, else [side, side], and the picture's box (top,
    left, height, width). Resizing one channel of grey and copying it gives what resizing three gives, in less time.
    """
    height, width = fit(pixels.shape[:2], side)
    top, left = (side - height) // 2, (side - width) // 2
    canvas = np.empty((side, side, *np.shape(colour)), np.uint8)
    if (height, width) != (side, side):
        canvas[0] = colour
        canvas[1:] = canvas[0]  # whole rows: faster than pixel by pixel
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    canvas[top : top + height, left : left + width] = resized.convert("RGB") if canvas.ndim == 3 else resized
    return canvas, (top, left, height, width)


clip_pixels = functools.partial(to_canvas, colour=CLIP_PAD_COLOUR)  # (pixels, side) -> canvas, box
sam_pixels = functools.partial(to_canvas, colour=(0, 0, 0))


def mask_on_canvas(mask: np.ndarray, side: int) -> np.ndarray:
    """The mask itself, or, when it does not fit a canvas of this side, shrunk (nearest) until its longest side does."""
    if max(mask.shape) <= side:
        return mask
    height, width = fit(mask.shape, side)
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
