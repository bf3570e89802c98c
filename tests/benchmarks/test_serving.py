"""The measurements of serving and of reading scans, in small."""

import numpy as np
import pytest
from PIL import Image

from medplib_jax.benchmarks import scan_reading, serving
from tests.evaluate.evaluators import tiny


def test_both_readers_read_the_same_scan():
    found = scan_reading.measure(slices=4, side=32, rounds=1)
    assert found["seconds_over_simpleitk"] > 0 and found["SimpleITK.seconds"] > 0


@pytest.mark.slow
def test_a_server_under_load_answers_as_predict_does(tmp_path):
    tiny.write_checkpoint(tmp_path / "run")
    pictures = [str(tmp_path / f"{number}.png") for number in range(serving.FIRST_TOKENS)]
    for number, path in enumerate(pictures):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (40, 30, 3), np.uint8)).save(path)
    found = serving.measure(str(tmp_path / "run"), pictures, clients=8, seconds=8)
    assert found["one.wrong"] == found["many.wrong"] == 0 and found["many.right"] > 0
