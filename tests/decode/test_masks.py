"""Masks drawn tile by tile are those that are drawn whole."""

import jax.numpy as jnp
import numpy as np
import pytest

from medplib_jax.config.model import MaskConfig
from medplib_jax.decode.masks import TILE, PictureMasks, binarise
from medplib_jax.models.masks.unpad import resample_to_canvas
from tests.helpers import random_batch, tiny_experiment

SIZES = ((TILE + 90, 41), (37, TILE + 1))


@pytest.mark.parametrize("unpad", ["exact", "reference"])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_the_whole(unpad, size):
    prompt = random_batch(tiny_experiment())
    prompt = prompt.replace(sam_box=np.array([[2, 4, 28, 24]], np.int32))
    logits = np.random.default_rng(0).standard_normal((2, 8, 8), np.float32)
    found = PictureMasks(MaskConfig(image_size=32, unpad=unpad), 0.3)(logits, prompt.sam_box, size)
    whole, _ = resample_to_canvas(
        jnp.asarray(logits[None]),
        prompt.sam_box,
        np.array([size], np.int32),
        canvas=(max(size), max(size)),
        sam_size=32,
        mode=unpad,
    )
    expected = np.asarray(binarise(whole, 0.3))[0, :, : size[0], : size[1]]
    assert found.shape == expected.shape and expected.any() and not expected.all()
    np.testing.assert_array_equal(found, expected)
