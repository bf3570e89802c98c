"""Token ids, labels and indices of spliced features against the original's."""

import json

import numpy as np
import pytest

from medplib_jax.data.errors import DataError
from medplib_jax.data.prompts import encode_conversation, encode_question
from medplib_jax.data.records import Record
from medplib_jax.data.tokenizers import Tokenizer
from tests.paths import GOLDEN

CASES = json.loads((GOLDEN / "conversation.json").read_text())
IMAGE, REGION, IGNORED = -200, -300, -100  # the original's ids


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(str(GOLDEN / "tokenizer"))


def record(turns, images=("a.png",)):
    return Record("records.json", 3, ".", tuple(images), tuple(map(tuple, turns)))


def options(**changes):
    return {"template": "v1", "image_tokens": 4, "max_images": 1, "max_length": 2048} | changes


def original_form(encoded):
    """Ids and labels as the original writes them, for image_tokens=1 and max_images=1."""
    ids = np.select([encoded.feature_index == 0, encoded.feature_index > 0], [IMAGE, REGION], encoded.tokens)
    labels = np.full(len(ids), IGNORED)
    labels[1:] = np.where(encoded.loss_weights[:-1] > 0, encoded.targets[:-1], IGNORED)
    return ids.tolist(), labels.tolist()


@pytest.mark.parametrize("name", [name for name in CASES["conversations"] if not name.endswith("empty_answer")])
def test_ids_and_labels_equal_the_originals(tokenizer, name):
    case = CASES["conversations"][name]
    turns = case["turns"][1:] if case["turns"][0][0] == "gpt" else case["turns"]
    one = record(turns, ("a.png",) if case["has_image"] else ())
    ids, labels = original_form(
        encode_conversation(one, tokenizer, **options(template=name.split("/")[0], image_tokens=1))
    )
    assert ids == case["input_ids"]
    if name.endswith("contains_role"):  # the original masks all labels
        assert [label for label in labels if label != IGNORED] == [*tokenizer.encode("No."), tokenizer.eos_id]
    else:
        assert labels == case["labels"]


@pytest.mark.parametrize("template", ["v1", "llava_v1"])
def test_open_prompt_equals_the_originals(tokenizer, template):
    one = record([("human", "<image>\nWhat is this?"), ("gpt", "It is <SEG>.<mask>m.png</mask>")])
    encoded = encode_question(one, tokenizer, **options(template=template, image_tokens=1))
    assert original_form(encoded)[0] == CASES["open_prompt"][template]["ids"]
    assert not encoded.loss_weights.any()
    assert (encoded.answer, encoded.masks, encoded.seg_positions) == ("It is <SEG>.", ("m.png",), ())


def test_records_of_the_original_program(tokenizer):
    from medplib_jax.data.sources import MecovqaSource

    source = MecovqaSource(str(GOLDEN / "preprocess" / "items.json"))
    arrays = np.load(GOLDEN / "preprocess" / "arrays.npz")
    for one in (source[i] for i in range(len(source))):
        name = one.images[0].removesuffix(".png")
        encoded = encode_conversation(one, tokenizer, **options(template="llava_v1", image_tokens=1))
        ids, labels = original_form(encoded)
        assert ids == arrays[f"{name}_input_ids"].tolist()
        assert labels == arrays[f"{name}_labels"].tolist()
        assert (encoded.regions, encoded.masks) == ((f"{name}_region.png",), (f"{name}_mask.png",))


def test_splicing_widens_images_and_numbers_regions(tokenizer):
    one = record(
        [("human", "<image>\nCompare <region>a.png</region> with <region>point:3,4</region>."), ("gpt", "Same.")]
    )
    encoded = encode_conversation(one, tokenizer, **options())
    start = int(np.flatnonzero(encoded.feature_index == 0)[0])
    np.testing.assert_array_equal(encoded.feature_index[start : start + 4], range(4))
    assert encoded.feature_index[encoded.feature_index >= 4].tolist() == [4, 5]
    assert encoded.regions == ("a.png", "point:3,4")
    assert encoded.region_images == (0, 0)
    assert not encoded.tokens[encoded.feature_index >= 0].any()
    assert encoded.tokens.dtype == encoded.targets.dtype == encoded.feature_index.dtype == np.int32
    np.testing.assert_array_equal(encoded.targets[:-1], encoded.tokens[1:])


def test_several_images_stay_in_place_and_regions_know_theirs(tokenizer):
    turns = [
        ("human", "A: <image> <region>a.png</region> B: <image> <region>b.png</region> <region>c.png</region>"),
        ("gpt", "Yes."),
    ]
    encoded = encode_conversation(record(turns, ("a.png", "b.png")), tokenizer, **options(max_images=3))
    assert encoded.feature_index[encoded.feature_index >= 0].tolist() == [0, 1, 2, 3, 12, 4, 5, 6, 7, 13, 14]
    assert encoded.region_images == (0, 1, 1)


def test_every_seg_of_an_answer_has_its_position_and_mask(tokenizer):
    turns = [
        ("human", "<image>\nSegment both; write <SEG>."),
        ("gpt", "One <SEG><mask>1.png</mask> and <SEG><mask>2.png</mask>."),
        ("human", "And the third?"),
        ("gpt", "<SEG><mask>3.png</mask>"),
    ]
    encoded = encode_conversation(record(turns), tokenizer, **options())
    assert encoded.masks == ("1.png", "2.png", "3.png")
    assert len(encoded.seg_positions) == 3
    assert all(encoded.targets[i] == tokenizer.seg_id and encoded.loss_weights[i] == 1 for i in encoded.seg_positions)


def test_a_question_keeps_the_history_before_it(tokenizer):
    turns = [("human", "<image>\nWhere?"), ("gpt", "Here."), ("human", "Size?"), ("gpt", "2 cm")]
    encoded = encode_question(record(turns), tokenizer, **options(image_tokens=1))
    whole = encode_conversation(record(turns), tokenizer, **options(image_tokens=1))
    np.testing.assert_array_equal(whole.tokens[: len(encoded)], encoded.tokens)
    assert encoded.answer == "2 cm"
    assert tokenizer.decode(encoded.tokens[-9:].tolist()).endswith("Size? ASSISTANT:")


@pytest.mark.parametrize(
    ("turns", "images", "changes", "message"),
    [
        (
            [("human", "<image>\nWhy? " * 9), ("gpt", "So.")],
            ("a.png",),
            {"max_length": 64},
            "text too long; expected at most 64 positions",
        ),
        ([("human", "Why?"), ("gpt", "So.")], ("a.png",), {}, "do not pair up; expected 1 <image>, found 0"),
        ([("human", "<image>"), ("gpt", "So.")], (), {}, "expected 0 <image>, found 1"),
        (
            [("human", "<image> <image>"), ("gpt", "So.")],
            ("a.png", "b.png"),
            {},
            "too many images; expected at most 1, found 2",
        ),
        ([("human", "<region>a.png</region>?"), ("gpt", "So.")], (), {}, "region without an image"),
        ([("human", "<image>\nWhy?")], ("a.png",), {}, "conversation without an answer"),
    ],
)
def test_unusable_text_is_named(tokenizer, turns, images, changes, message):
    with pytest.raises(DataError, match=message) as caught:
        encode_conversation(record(turns, images), tokenizer, **options(**changes))
    assert str(caught.value).startswith("records.json, record 3: ")
