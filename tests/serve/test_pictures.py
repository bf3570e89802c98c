"""Pictures and masks from strangers: what is not a picture is refused before it costs anything."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medplib_jax.data.rle import decode_rle
from medplib_jax.serve.pictures import check_picture, describe_mask, read_data_url, read_mask
from medplib_jax.serve.refusals import Refused


def encoded(size=(5, 4), form="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, form)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises this size and holds nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_data_url_is_read():
    content = encoded()
    assert read_data_url("data:image/png;base64," + base64.b64encode(content).decode(), "x") == content
    assert check_picture(content, "x") == (4, 5)


@pytest.mark.parametrize(
    "url", ["http://localhost/a.png", "file:///etc/passwd", "data:text/html;base64,aaaa", "/a.png", ""]
)
def test_no_other_url_is_followed(url):
    with pytest.raises(Refused) as found:
        read_data_url(url, "messages[0]")
    assert found.value.status == 400 and found.value.parameter == "messages[0]"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"GIF89a", 400),
        (b"\x89PNG\r\n\x1a\n", 400),
        (png_header(100_000, 100_000), 413),
        (encoded()[:-20], 400),
    ],
)
def test_what_is_no_picture_or_too_large_is_refused(content, status):
    with pytest.raises(Refused) as found:
        check_picture(content, "x")
    assert found.value.status == status


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_not_an_error(content):
    with pytest.raises(Refused):
        check_picture(content, "x")


@given(st.integers(1, 9), st.integers(1, 9), st.randoms())
def test_a_mask_comes_back_as_it_was_sent(height, width, random):
    mask = np.array([[random.random() < 0.4 for _ in range(width)] for _ in range(height)])
    found = describe_mask(mask, "liver", 0.5)
    assert np.array_equal(decode_rle(found["rle"]), mask) and found["area"] == mask.sum()
    picture = np.asarray(Image.open(io.BytesIO(read_mask(found["rle"], "x"))))
    assert np.array_equal(picture > 0, mask)
    if mask.any():
        x0, y0, x1, y1 = found["box"]
        assert mask[y0:y1, x0:x1].sum() == mask.sum()


@pytest.mark.parametrize(
    "rle",
    [
        {},
        {"size": [2, 2], "counts": [3]},
        {"size": [2], "counts": [2]},
        {"size": [2, 2], "counts": [-1, 5]},
        {"size": [10**6, 10**6], "counts": [10**12]},
        {"size": [2, 2], "counts": "4"},
        {"size": [True, 2], "counts": [2]},
    ],
)
def test_wrong_run_lengths_are_refused(rle):
    with pytest.raises(Refused):
        read_mask(rle, "x")
