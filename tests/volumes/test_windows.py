"""Windows: named ones, percentiles, three as R, G and B."""

import numpy as np
import pytest

from medplib_jax.data.errors import DataError
from medplib_jax.volumes.pictures import shown, tones_of
from medplib_jax.volumes.volume import Volume
from medplib_jax.volumes.windows import Tone, parse_window


def scan(values, tone=None):
    return Volume(values, np.eye(4), "x", tone=tone)


VALUES = np.array([[-1000, -160, 40], [240, 400, 3000]])


@pytest.mark.parametrize(
    "text, black_below, white_from",
    [
        ("soft_tissue", -160, 240),
        ("lung", -910, 590),
        ("brain", 0, 80),
        ("bone", -500, 1300),
        ("liver", -45, 105),
        ("40,400", -160, 240),
    ],
)
def test_windows_by_name(text, black_below, white_from):
    (tone,) = tones_of(scan(VALUES, Tone(0, 1)), parse_window(text))
    assert (tone.low, tone.high) == (black_below, white_from)


def test_three_windows_are_three_colours():
    tones = tones_of(scan(VALUES), parse_window("lung/soft_tissue/bone"))
    picture = shown(VALUES, tones, False)
    assert picture.shape == (2, 3, 3) and picture[0, 2].tolist() == [162, 128, 76]


def test_percentiles_are_of_the_whole_scan_and_know_no_nan():
    values = np.concatenate([np.arange(1001.0), [np.nan, np.inf]])
    (tone,) = tones_of(scan(values, Tone(0, 1)), parse_window("percentile"))
    assert (tone.low, tone.high) == (5, 995) and tones_of(scan(values), None) == (tone,)
    assert tones_of(scan(values, Tone(3, 4)), None) == (Tone(3, 4),)
    assert shown(values[None], (tone,), False)[0, -2:].tolist() == [0, 255]


@pytest.mark.parametrize("text", ["", "abc", "40", "40,0", "40,-1", "nan,3", "lung/bone", "lung/bone/x"])
def test_other_windows_are_refused(text):
    with pytest.raises(ValueError, match="--window: expected"):
        parse_window(text)


def test_a_scan_without_a_value_is_named():
    with pytest.raises(DataError, match="scan has no value"):
        tones_of(scan(np.full((2, 2, 2), np.nan)), None)
