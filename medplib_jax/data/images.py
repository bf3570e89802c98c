"""Pictures and masks from disk to the uint8 arrays that the model normalises on the device.

Resizing is Pillow's (antialiased) on uint8, bilinear for MedPLIB and bicubic for BiRD: the arrays equal the originals'
exactly.
"""

import dataclasses
import functools
import io

import numpy as np
from PIL import Image, ImageOps

from medplib_jax.data.errors import DataError, Notice, Notices

CLIP_SIDE = 336
CLIP_PAD_COLOUR = (122, 116, 104)  # int(255 * CLIP's mean)
MAX_PIXELS = 2**27  # a larger picture is refused before it is decoded
MIN_SIDE, MAX_ASPECT = 16, 16  # a picture beyond is unusual, and is noted
_ORIENTATION = 0x0112  # the EXIF tag
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP")
_FEW_GREYS = 64  # fewer levels of grey than this are left of a picture of 16 bits: it needs a window
_LISTED = 6  # values in one message
Window = tuple[float, float]  # (centre, width) in a picture's own units: what is shown from black to white


@dataclasses.dataclass(frozen=True)
class Blob:
    """An encoded picture that lies in a larger file; `name` is for messages and unique among blobs of other content."""

    name: str
    content: bytes = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return self.name


def _open(file: str | Blob, notices: Notices | None, upright: bool) -> Image.Image:
    """The decoded picture, turned by its EXIF rotation if asked.

    What is unusual about the file is appended to `notices`.
    """
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
        found = f"{image.width} x {image.height}"
        raise DataError(path, None, "picture is too large", f"at most {MAX_PIXELS} pixels", found)
    if unusual and notices is not None:
        expected = f"8-bit grey or RGB, upright, one frame, sides from {MIN_SIDE} pixels, aspect up to {MAX_ASPECT}"
        notices.append(Notice(path, None, "picture is not plain", expected, unusual))
    return image


def _unusual(image: Image.Image) -> str:
    """What is unusual about a picture file: its pixels, rotation, frames or shape; empty for most."""
    shortest, longest = sorted((image.width, image.height))
    frames = getattr(image, "n_frames", 1)
    found = [
        f"mode {image.mode}" if image.mode not in ("1", "L", "RGB") else "",
        f"EXIF orientation {_orientation(image)}" if _orientation(image) != 1 else "",
        f"{frames} frames" if frames > 1 else "",
        f"{image.width} x {image.height} pixels" if shortest < MIN_SIDE or longest > MAX_ASPECT * shortest else "",
    ]
    return ", ".join(filter(None, found))


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(_ORIENTATION, 1)


def load_image(path: str | Blob, notices: Notices | None = None, window: Window | None = None) -> np.ndarray:
    """RGB uint8 [h, w, 3]. DataError when it cannot be read or is too large; see `load_pixels`."""
    pixels = load_pixels(path, notices, window)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def load_pixels(path: str | Blob, notices: Notices | None = None, window: Window | None = None) -> np.ndarray:
    """A picture's pixels: uint8 [h, w] when it is grey, however it is stored, else RGB [h, w, 3].

    Grey are most CT, MR, X-ray and ultrasound. DataError when it cannot be read or is too large. The file's EXIF
    rotation is applied, as OpenCV does in the original; masks carry none, so that a mask made on the unrotated picture
    is met by the size check of `load_mask`. Alpha is dropped, palettes and CMYK are converted. Grey of 16 bits is shown
    in the window; without one it keeps its high byte. Whatever is not plain 8-bit grey or RGB is noted in `notices`.
    """
    image = _open(path, notices, upright=True)
    if image.mode in _SIXTEEN_BIT:
        return _to_bytes(np.asarray(image, np.int64), str(path), notices, window)
    if image.mode == "F":
        raise DataError(str(path), None, "picture has floating-point pixels", "8 or 16 bits per channel", image.mode)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    rgb = np.asarray(image.convert("RGB"))
    return np.ascontiguousarray(rgb[..., 0]) if _is_grey(rgb) else rgb


def is_sixteen_bit(path: str) -> bool:
    """Whether the picture's pixels are grey of more than 8 bits, for which a window matters.

    False for what is no picture.
    """
    try:
        with Image.open(path) as image:
            return image.mode in _SIXTEEN_BIT
    except Exception:  # decoders raise errors of many types on broken files; who reads the pixels names the reason
        return False


def _to_bytes(values: np.ndarray, path: str, notices: Notices | None, window: Window | None) -> np.ndarray:
    """Grey of 16 bits as uint8; a notice when its values span so little that the high byte shows next to nothing."""
    if window:
        centre, width = window
        return np.round(np.clip((values - centre) / width + 0.5, 0, 1) * 255).astype(np.uint8)
    grey = (np.clip(values, 0, 65535) >> 8).astype(np.uint8)
    levels = int(grey.max()) - int(grey.min()) + 1
    if notices is not None and levels < _FEW_GREYS and values.min() < values.max():
        what = f"picture of 16 bits keeps {levels} levels of grey"
        found = f"{values.min()} to {values.max()}"
        notices.append(Notice(path, None, what, "values from 0 to 65535, or a window (centre, width)", found))
    return grey


def _is_grey(rgb: np.ndarray) -> bool:
    """Whether the three channels are one; most coloured pictures show it in a few pixels."""
    return all(np.array_equal(rgb[::n, ::n, 0], rgb[::n, ::n, channel]) for n in (16, 1) for channel in (1, 2))


def load_mask(path: str | Blob, size: tuple[int, int], notices: Notices | None = None) -> np.ndarray:
    """0/1 uint8 [h, w]: 1 where the grey value is at least 1.

    How other files are read, see `_inside`; it is noted in `notices`.

    DataError when it cannot be read, is rotated, or its size is not (h, w).
    """
    image = _open_mask(path, size, notices)
    inside, unusual = _inside(image, path)
    if notices is not None:
        notices += [Notice(str(path), None, *one) for one in unusual]
    return inside.astype(np.uint8)


def load_labels(path: str | Blob, size: tuple[int, int], notices: Notices | None = None) -> np.ndarray:
    """The values of a label map, in which each value marks another thing, int64 [h, w].

    Palette indices, or grey of 8 or 16 bits. DataError for a file of more channels or of lossy compression, else as
    `load_mask`.
    """
    image = _open_mask(path, size, notices)
    if image.mode not in ("1", "L", "P", *_SIXTEEN_BIT) or _is_lossy(image, path):
        found = f"{image.format} of mode {image.mode}"
        raise DataError(str(path), None, "not a label map", "one channel of whole numbers, losslessly stored", found)
    return np.asarray(image).astype(np.int64)


def _open_mask(path: str | Blob, size: tuple[int, int], notices: Notices | None) -> Image.Image:
    image = _open(path, notices, upright=False)
    if (found := (image.height, image.width)) != tuple(size):
        expected = "{} x {} (h x w)".format(*size)
        raise DataError(str(path), None, "mask and picture differ in size", expected, "{} x {}".format(*found))
    if _orientation(image) != 1:
        raise DataError(str(path), None, "mask is rotated by EXIF", "orientation 1", str(_orientation(image)))
    if image.mode == "F":
        raise DataError(str(path), None, "mask has floating-point pixels", "8 or 16 bits", image.mode)
    return image


def _inside(image: Image.Image, path: str | Blob) -> tuple[np.ndarray, list[tuple[str, str, str]]]:
    """bool [h, w] of a mask's inside, and (what, expected, found) of what is unusual about it.

    Inside is what is not black. Transparent pixels are outside; of a mask in one colour only the opacity counts. Lossy
    compression puts a halo of small values around an outline, so that half of the maximum decides. In a palette without
    black the first colour is the background.
    """
    grey = np.asarray(image) if image.mode in _SIXTEEN_BIT else np.asarray(image.convert("L"))
    opaque = _opaque(image)
    if opaque is not None:
        found = f"mode {image.mode} with transparent pixels"
        inside = opaque if grey.min() == grey.max() else opaque & (grey >= 1)
        return inside, [("mask has transparent pixels, which are outside", "grey values", found)]
    values = _values(grey)
    if len(values) > 2 and _is_lossy(image, path):
        half = float(values[-1]) / 2
        found = f"{image.format} of {len(values)} values"
        return grey > half, [(f"lossy mask: values above {half:g} are inside", "a lossless file, such as PNG", found)]
    if len(values) > 1 and values[0] > 0 and image.mode == "P":
        return np.asarray(image) > 0, [("mask has a palette without black: its first colour is outside", "black", "")]
    shown = values[values > 0]
    if len(shown) < 2:
        return grey >= 1, []
    listed = ", ".join(map(str, shown)) if len(shown) <= _LISTED else f"{len(shown)} from {shown[0]} to {shown[-1]}"
    return grey >= 1, [("mask has several values, which are read as one", "0 and one other", listed)]


def _values(grey: np.ndarray) -> np.ndarray:
    """The values in a mask, ascending. Most masks have two, which is found in a tenth of the time."""
    if np.count_nonzero(grey) == np.count_nonzero(grey == grey.max()):
        return np.unique([grey.min(), grey.max()])
    return np.unique(grey)


def _opaque(image: Image.Image) -> np.ndarray | None:
    """Where a picture with transparent pixels is at least half opaque, bool [h, w].

    None when its opacity is the same everywhere.
    """
    if not image.has_transparency_data:
        return None
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    return None if alpha.min() == alpha.max() else alpha > alpha.max() / 2


def _is_lossy(image: Image.Image, path: str | Blob) -> bool:
    """Whether a file's format changes values; WebP does, unless its pixels are in a VP8L chunk."""
    if image.format != "WEBP":
        return image.format in _LOSSY
    if isinstance(path, Blob):
        return b"VP8L" not in path.content
    with open(path, "rb") as file:
        return b"VP8L" not in file.read()


def fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The size (h, w) with the longest side made `side`; at least 1.

    Rounded half up, as segment-anything's `get_preprocess_shape`.
    """
    scale = side / max(size)
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def to_canvas(
    pixels: np.ndarray, side: int, colour: tuple[int, ...] | int
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Longest side resized to `side`, centred on a square of `colour` (odd rests: the smaller half first).

    Takes uint8 [h, w] or [h, w, 3]; returns uint8 [side, side, 3] for a colour of three, else [side, side], and the
    picture's box (top, left, height, width). Resizing one channel of grey and copying it gives what resizing three
    gives, in less time.
    """
    height, width = fit(pixels.shape[:2], side)
    top, left = (side - height) // 2, (side - width) // 2
    canvas = np.empty((side, side, *np.shape(colour)), np.uint8)
    if (height, width) != (side, side):
        canvas[0] = colour
        canvas[1:] = canvas[0]  # whole rows: faster than pixel by pixel
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    canvas[top : top + height, left : left + width] = np.asarray(
        resized.convert("RGB") if canvas.ndim == 3 else resized
    )
    return canvas, (top, left, height, width)


def clip_pixels(pixels: np.ndarray, side: int) -> np.ndarray:
    """CLIP's input, uint8 [side, side, 3].

    The picture lies on a canvas of 336 pixels, which is resized (bicubic) for another side. So does the original, whose
    CLIPImageProcessor gets the padded canvas whatever the size of the tower.
    """
    canvas, _ = to_canvas(pixels, CLIP_SIDE, CLIP_PAD_COLOUR)
    if side == CLIP_SIDE:
        return canvas
    return np.asarray(Image.fromarray(canvas).resize((side, side), Image.Resampling.BICUBIC))


def stretched(pixels: np.ndarray, side: int) -> np.ndarray:
    """uint8 [h, w] or [h, w, 3] resized to [side, side, 3], its aspect not kept:

    Pillow's bicubic, as Qwen-VL prepares pictures.
    """
    resized = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(resized.convert("RGB"))


def cropped(pixels: np.ndarray, side: int) -> np.ndarray:
    """The centre of the picture, its shortest side resized (bicubic) to `side`, uint8 [side, side, 3].

    CLIPImageProcessor's own way, in which the original embeds pictures for retrieval.
    """
    height, width = pixels.shape[:2]
    longest = int(side * max(height, width) / min(height, width))
    size = (side, longest) if height >= width else (longest, side)
    resized = np.asarray(Image.fromarray(pixels).convert("RGB").resize(size, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - side) // 2, (resized.shape[1] - side) // 2
    return resized[top : top + side, left : left + side]


sam_pixels = functools.partial(to_canvas, colour=(0, 0, 0))


def mask_on_canvas(mask: np.ndarray, side: int) -> np.ndarray:
    """The mask itself, or, when it does not fit a canvas of this side, shrunk (nearest) until its longest side does."""
    if max(mask.shape) <= side:
        return mask
    height, width = fit(mask.shape, side)
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
