"""Pictures and masks from strangers: checked before they are decoded, and answers' masks on their way out."""

import base64
import binascii
import io
import re

import numpy as np
from PIL import Image

from medplib_jax.data.errors import DataError
from medplib_jax.data.images import Blob, load_image
from medplib_jax.data.polygons import polygons
from medplib_jax.data.rle import decode_rle, encode_rle
from medplib_jax.serve.refusals import Refused

MAX_PIXELS = 2**25
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


def read_data_url(url: str, parameter: str) -> bytes:
    """The bytes of a picture in a `data:image/...;base64,` URL.

    Refused: any other URL (the server fetches nothing), broken base64.
    """
    found = _DATA_URL.match(url)
    if not found:
        raise Refused(400, "expected a picture as data:image/...;base64,... (this server fetches no URL)", parameter)
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except binascii.Error as error:
        raise Refused(400, f"the picture's base64 cannot be read: {error}", parameter) from error


def check_picture(content: bytes, parameter: str) -> tuple[int, int]:
    """(height, width) of an encoded picture. Refused: other formats than `FORMATS`, more than `MAX_PIXELS`, damaged
    files.

    The header is read first: what it promises decides, before anything is decoded.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            size = image.height, image.width
    except Image.DecompressionBombError as error:
        raise Refused(413, f"the picture has more than {MAX_PIXELS} pixels", parameter) from error
    except Exception as error:  # decoders raise errors of many types on broken files
        raise Refused(400, f"the picture cannot be read; expected one of {', '.join(FORMATS)}", parameter) from error
    if size[0] * size[1] > MAX_PIXELS:
        raise Refused(413, f"the picture has {size[1]} x {size[0]} pixels, more than {MAX_PIXELS}", parameter)
    try:
        return load_image(Blob(parameter, content)).shape[:2]  # upright, which may exchange the sides
    except DataError as error:
        raise Refused(400, f"the picture cannot be read: {error.found or error.what}", parameter) from error


def read_mask(rle: dict, parameter: str) -> bytes:
    """A PNG of 0 and 255 from run lengths; see `check_rle`."""
    return png(decode_rle(check_rle(rle, parameter)))


def check_rle(rle: dict, parameter: str) -> dict:
    """Run lengths {"size": [h, w], "counts": [...]}, columns first, beginning with a run of zeros (as in COCO).

    Refused: what is not that, or fills another number of pixels.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not (_are_counts(size, 2) and _are_counts(counts, None)) or size[0] * size[1] > MAX_PIXELS:
        raise Refused(400, 'expected {"size": [h, w], "counts": [run lengths]}', parameter)
    if sum(counts) != size[0] * size[1]:
        raise Refused(400, f"the runs fill {sum(counts)} of {size[0]} x {size[1]} pixels", parameter)
    return rle


def _are_counts(values: object, count: int | None) -> bool:
    """Whether it is a list of `count` (None: any number of) whole numbers that are not negative."""
    if not isinstance(values, list) or (count is not None and len(values) != count):
        return False
    return all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_PIXELS for value in values)


def encoded(pixels: np.ndarray) -> bytes:
    """A PNG file of uint8 [h, w] or [h, w, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def png(mask: np.ndarray) -> bytes:
    """A PNG file of 0 and 255 from a boolean mask [h, w]."""
    return encoded(mask.astype(np.uint8) * 255)


def describe_mask(mask: np.ndarray, label: str, predicted_iou: float) -> dict:
    """A mask as JSON: its label, PNG, run lengths, polygons, area in pixels, box (x0, y0, x1, y1; x1 and y1 outside)
    and predicted IoU.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1] if len(rows) else None
    return {
        "label": label,
        "png": base64.b64encode(png(mask)).decode(),
        "rle": encode_rle(mask),
        "polygons": polygons(mask),
        "area": int(mask.sum()),
        "box": box,
        "predicted_iou": round(float(predicted_iou), 4),
    }
