"""A cache that is filled before the run serves all of it."""

import dataclasses
import pathlib

import numpy as np
import pytest
from PIL import Image

from medplib_jax.config.experiment import DataConfig
from medplib_jax.config.model import ClipConfig, MaskConfig, ModelConfig, RegionConfig
from medplib_jax.data import images
from medplib_jax.data.errors import DataError
from medplib_jax.data.pipeline import make_loader
from medplib_jax.datasets.fill_cache import fill_cache
from tests.datasets import collection
from tests.paths import GOLDEN

MODEL = ModelConfig(clip=ClipConfig(image_size=28), mask=MaskConfig(image_size=32), region=RegionConfig(max_points=16))


@pytest.fixture
def data(tmp_path):
    root = collection.make_images(tmp_path) / "SAMed2Dv1"
    mask = f"masks/{collection.CT.format(2, 2)}--0001_000.png"
    collection.write(root, "train.json", [collection.region(0), collection.vqa(1), collection.grounding(2, mask)])
    return DataConfig(
        sources=(str(root / "train.json"),),
        tokenizer=str(GOLDEN / "tokenizer"),
        bucket_lengths=(640,),
        batch_size=2,
        mask_canvas=32,
        workers=0,
        cache=str(tmp_path / "cache"),
    )


def batches(data):
    loader = make_loader(data, MODEL)
    plan, _ = loader.plan(0)
    return [loader.load_batch(plan, step, range(2)) for step in range(plan.steps_per_epoch)]


def refuse(*arguments):
    raise AssertionError("a file was decoded")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_decodes_nothing_that_was_prepared(data, monkeypatch, workers):
    expected = batches(dataclasses.replace(data, cache=""))
    assert fill_cache(data, MODEL, workers) == {"records": 3, "unusable": 0, "odd": 0}
    monkeypatch.setattr(images, "load_pixels", refuse)
    monkeypatch.setattr(images, "load_mask", refuse)
    for (found, _), (wanted, _) in zip(batches(data), expected, strict=True):
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array)


def test_bad_and_odd_records_are_counted_and_named(data, caplog):
    root = pathlib.Path(data.sources[0]).parent
    Image.new("RGBA", collection.SIZE[::-1]).save(root / "images" / f"{collection.CT.format(1, 1)}.png")
    (root / "images" / f"{collection.CT.format(0, 0)}.png").write_bytes(b"")
    with pytest.raises(DataError, match="train.json, record 0: picture cannot be read"):
        fill_cache(data, MODEL, 0)
    assert fill_cache(dataclasses.replace(data, on_error="skip"), MODEL, 0) == {"records": 3, "unusable": 1, "odd": 1}
    assert "record 0: picture cannot be read" in caplog.text and "used" in caplog.text


def test_a_folder_is_needed(data):
    with pytest.raises(ValueError, match="data.cache is empty"):
        fill_cache(dataclasses.replace(data, cache=""), MODEL, 0)
