"""The report page: what it shows, that it is safe with any text, and that wrong input is named."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medplib_jax.data.errors import DataError
from medplib_jax.data.overlay import PALETTE, overlay
from medplib_jax.data.records import parse_record
from medplib_jax.evaluate import report
from medplib_jax.evaluate.report import pictures, plots
from tests.evaluate.report.tags import Tags

NASTY = "<script>alert('x')</script> & \"quoted\" <img src=x onerror=alert(1)>"


def picture(folder, name="scan.png", size=(40, 30)):
    path = folder / name
    Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(path)
    return path


def disc(height=30, width=40, radius=8, shift=0):
    y, x = np.mgrid[:height, :width]
    return (y - height / 2) ** 2 + (x - width / 2 - shift) ** 2 < radius**2


def full_report(folder):
    steps = np.arange(0, 200, 10)
    path = picture(folder)
    examples = [
        report.ReportExample(
            path,
            "grounding",
            "ct",
            "<image>\nPlease segment the liver and the tumor.",
            "Sure, the liver is <SEG> and the tumor is <SEG>.",
            "Sure, the liver is <SEG> and the tumor is <SEG>.",
            {"dice": 0.91},
            [disc(), disc(shift=8)],
            [disc(shift=2), disc(shift=9)],
        ),
        report.ReportExample(
            path,
            "grounding",
            "ct",
            "Please segment the cyst.",
            "No, the cyst is not present.",
            "No, the cyst is not present.",
            {"no target": 1.0},
        ),
        report.ReportExample(
            path,
            "region",
            "mr",
            "What is <region>masks/a.png</region>?",
            NASTY,
            "tumor",
            {"accuracy": 0.0},
            region_masks=[disc()],
        ),
        report.ReportExample(path, "vqa", NASTY, NASTY, "Yes", "Yes", {"accuracy": float("nan")}),
    ]
    return report.ReportData(
        title=f"Run {NASTY}",
        facts={"device": "cpu", "parameters": 1234567, "seconds": 61.25, NASTY: NASTY, "resumed": True},
        curves={
            "I align": {"step": steps, "loss": np.exp(-steps / 50)},
            "III grounding": {"step": steps, "loss": 1 / (1 + steps), "dice": np.full(20, np.nan)},
        },
        tables={"Grounding": {"ct": {"mDice": 0.8125, "n": 12}, "mr": {"mDice": None, NASTY: "text"}}},
        stages={"mDice": {"before": 0.1, "stage III": 0.8}, "closed": {"before": 0.5, "stage IV": 0.9}},
        router=report.Router([0, 2], ["text", "image", "SEG"], ["grounding", "language"], np.full((2, 3, 2), 0.5)),
        examples=examples,
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    path = report.write_report(full_report(folder), folder / "out")
    return path, path.read_text(encoding="utf-8")


def test_every_picture_is_there_and_no_network_is_needed(page):
    path, text = page
    sources = re.findall(r'<img src="([^"]+)"', text)
    assert len(sources) == 3 + 3 + 3 + 1 + 1
    for source in sources:
        with Image.open(path.parent / source) as image:
            assert min(image.size) > 50
    assert not re.search(r"https?://|//cdn|@import|<link", text)


def test_untrusted_text_is_escaped_everywhere(page):
    _, text = page
    found = Tags(text).found
    assert [tag for tag, _ in found].count("script") == 1 and len([tag for tag, _ in found if tag == "img"]) == 11
    assert not [attributes for _, attributes in found if any(name.startswith("on") for name in attributes)]
    assert text.count("alert(&#39;x&#39;)") >= 7  # title twice, fact, column, modality, question, answer


def test_values_are_shown(page):
    _, text = page
    for shown in (
        "1,234,567",
        "61.250",
        "0.812",
        "–",
        "dice 0.910",
        "prediction: no mask",
        "truth: no mask",
        ">SEG</span>",
        ">region</span>",
        "yes",
    ):
        assert shown in text, shown
    assert "masks/a.png" not in text and 'href="#router"' in text


def test_empty_parts_are_left_out(tmp_path):
    text = report.write_report(report.ReportData("Nothing yet"), tmp_path).read_text()
    assert "<section" not in text and "<script" not in text and "Nothing yet" in text
    assert not list((tmp_path / "figures").iterdir())


def test_overlay_colours_the_mask_and_nothing_else():
    base = np.full((20, 20, 3), 100, np.uint8)
    mask = np.zeros((10, 10), bool)
    mask[2:8, 2:8] = True
    shown = overlay(base, [mask], ["#ff0000"])
    inside = np.zeros((20, 20), bool)
    inside[4:16, 4:16] = True
    assert (shown[~inside] == 100).all() and (shown[inside] != 100).any(axis=-1).all()
    np.testing.assert_array_equal(shown[4, 4], (255, 0, 0))  # outline
    np.testing.assert_array_equal(shown[10, 10], (162, 60, 60))  # 0.4 of the colour
    np.testing.assert_array_equal(base, 100)


def test_second_mask_has_the_colour_of_its_token():
    marked = str(pictures.mark_tokens("the liver is <SEG><mask>masks/a.png</mask> and the tumor is <SEG>."))
    assert re.findall(r"background:(#\w+)", marked) == list(PALETTE[:2])
    assert "masks/a.png" not in marked
    one = np.ones((8, 8), bool)
    shown = overlay(np.zeros((8, 8, 3), np.uint8), [~one, one], PALETTE)
    assert tuple(shown[0, 0]) == tuple(bytes.fromhex(PALETTE[1][1:]))


@settings(max_examples=30)
@given(st.text(alphabet="<>SEG/regionmask&\"' ab\n", max_size=40))
def test_marked_text_opens_only_our_spans(text):
    marked = str(pictures.mark_tokens(text))
    assert set(re.findall(r"</?[^>]*>", marked)) <= {
        '<span class="token region">',
        "</span>",
        *(f'<span class="token" style="background:{colour}">' for colour in PALETTE),
    }


@settings(max_examples=20)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=100))
def test_running_mean_against_a_loop(values):
    values = np.array(values)
    half = max(1, len(values) // 40)
    expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))]
    np.testing.assert_allclose(plots.running_mean(values), expected, atol=1e-9)


def test_running_mean_skips_nan():
    np.testing.assert_allclose(plots.running_mean(np.array([1.0, np.nan, 3.0])), [1, 2, 3])
    assert np.isnan(plots.running_mean(np.array([np.nan, np.nan]))).all()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"curves": {"I": {"loss": [1.0]}}}, "curves of 'I' must hold 'step'"),
        ({"curves": {"I": {"step": [1, 2], "loss": [1.0]}}}, "one length.*'loss': 1"),
        ({"router": report.Router([0], ["text"], ["a", "b"], np.ones((1, 2, 1)))}, r"\(1, 1, 2\), found \(1, 2, 1\)"),
    ],
)
def test_wrong_input_is_named(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        report.write_report(report.ReportData("x", **wrong), tmp_path)


def test_missing_image_is_named(tmp_path):
    example = report.ReportExample(tmp_path / "gone.png", "vqa", "ct", "?", "a", "a")
    with pytest.raises(DataError, match="gone.png"):
        report.write_report(report.ReportData("x", examples=[example]), tmp_path)


def test_regions_of_a_record(tmp_path):
    Image.fromarray(disc().astype(np.uint8) * 255).save(tmp_path / "m.png")
    question = "<image>\nIs <region>m.png</region> like <region>box:2,3,12,13</region>?"
    raw = {"image": "scan.png", "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "No"}]}
    from_file, drawn = report.region_masks(parse_record(raw, "a.json", 0, str(tmp_path)), (30, 40))
    np.testing.assert_array_equal(from_file, disc())
    assert drawn.shape == (30, 40) and drawn[5, 5] and not drawn[20, 30]
