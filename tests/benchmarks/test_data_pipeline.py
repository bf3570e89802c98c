"""The benchmark of the data pipeline: both sides prepare the same records, and a warm cache is faster."""

import dataclasses

import numpy as np

from medplib_jax.benchmarks import data_pipeline
from medplib_jax.data import pipeline
from tests.datasets import collection
from tests.paths import GOLDEN


def dataset(tmp_path):
    root = collection.make_images(tmp_path) / "SAMed2Dv1"
    records = [collection.region(case) for case in range(4)] + [collection.vqa(case) for case in range(4)]
    collection.write(root, "train.json", records)
    (root / "SAMed2D_v1_class_mapping_id.json").unlink()
    return data_pipeline.config((str(root / "train.json"),), str(root), str(GOLDEN / "tokenizer"), batch_size=4)


def test_both_sides_prepare_the_same_pixels(tmp_path):
    data = dataset(tmp_path)
    loader = pipeline.make_loader(data, data_pipeline.MODEL, data.root)
    ours, _ = loader.load_eval(range(8), range(8), False)
    theirs = next(data_pipeline.torch_batches(dataclasses.replace(data, batch_size=8)))
    mean, std = np.array(data_pipeline.CLIP_MEAN), np.array(data_pipeline.CLIP_STD)
    expected = (ours["clip_pixels"][:, 0] / 255 - mean) / std
    found = theirs["clip"].numpy().transpose(0, 2, 3, 1)
    order = [int(np.argmin([np.abs(one - other).max() for other in expected])) for one in found]
    np.testing.assert_allclose(found, expected[order], atol=1e-5)
    assert theirs["sam"].shape == (8, 3, 256, 256) and sum(map(len, theirs["regions"])) == 4


def test_a_warm_cache_is_faster(tmp_path):
    times = data_pipeline.compare(dataset(tmp_path), rounds=1)
    assert list(times) == [
        "PyTorch DataLoader",
        "no cache",
        "assembled, no cache",
        "disk cache, first epoch",
        "disk cache, later epochs",
    ]
    assert times["disk cache, later epochs"] < times["no cache"]
