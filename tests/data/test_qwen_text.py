"""Qwen-VL's text: ids, labels and boxes against the original's, and what is refused."""

import gzip
import json
import pickle

import numpy as np
import pytest

from medplib_jax.data import boxes, chatml
from medplib_jax.data.boxes import Box
from medplib_jax.data.errors import DataError
from medplib_jax.data.qwen_tokenizer import QwenTokenizer
from medplib_jax.data.records import parse_record
from medplib_jax.data.tokenizers import load_tokenizer
from tests.convert import qwen_vl_text_checks as text_checks
from tests.paths import GOLDEN

FOLDER = GOLDEN / "qwen_vl"


def read(name):
    return json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def tokenizer():
    return QwenTokenizer.load(str(FOLDER), 16)


def within_bars(rows):
    rows = list(rows)
    assert rows and not [row for row in rows if row.error > row.bar]


@pytest.mark.parametrize("span", [16, 256])
def test_ids_labels_and_prompts_are_the_originals(span):
    within_bars(text_checks.check_text(read("conversation")[f"span_{span}"], QwenTokenizer.load(str(FOLDER), span)))


def test_training_examples_are_those_of_birds_own_code(tokenizer):
    within_bars(text_checks.check_examples(read("bird"), tokenizer))


def test_boxes_of_answers_and_their_pixels_are_the_originals():
    within_bars(text_checks.check_boxes(read("conversation")["boxes"]))


def test_what_is_scored_of_a_raw_response_is_what_birds_scripts_score():
    assert [[raw, chatml.extract_answer(raw)] for raw, _ in read("metrics")["extract_information"]] == read("metrics")[
        "extract_information"
    ]


def test_both_tokenizers_have_one_interface(tokenizer):
    ours, theirs = load_tokenizer(str(FOLDER)), load_tokenizer(str(GOLDEN / "tokenizer"))
    for name in ("encode", "decode", "vocab_size", "fingerprint", "bos_id", "pad_id", "stop_ids", "seg_id"):
        assert hasattr(ours, name) and hasattr(theirs, name)
    assert ours.vocab_size == 640 and ours.stop_ids == (416, 417, 418)
    assert pickle.loads(pickle.dumps(tokenizer)).encode("<ref>liver</ref>") == tokenizer.encode("<ref>liver</ref>")


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"IQ== x\n", "line 1"), (b"IQ== 1\n", "ranks 0 to 0"), (b"IQ== 0\n", "255 bytes have no rank, first 0")],
)
def test_a_file_that_is_no_table_of_ranks_is_refused(content, what, tmp_path):
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=what):
        QwenTokenizer.load(str(tmp_path))


def grit_record(*turns, **fields):
    return parse_record({"id": "ct_1", "conversations": [list(turn) for turn in turns], **fields}, "grit.json", 3, "/")


QUESTION = "Picture 1: <img>images/ct_1.png</img>\nWhere is <ref>the liver</ref>?"
ANSWER = "<ref>the liver</ref><box>(102,215),(640,731)</box>"
LIMITS = {"template": "chatml", "image_tokens": 16, "max_images": 2, "max_length": 400}


def test_a_med_grit_record_is_read_as_it_is(tokenizer):
    record = grit_record((QUESTION, ANSWER), ("And <ref>it</ref>?", "Gone."))
    assert record.images == ("images/ct_1.png",) and record.modality == "ct"
    encoded = chatml.encode_conversation(record, tokenizer, **LIMITS)
    as_original = [("user", QUESTION), ("assistant", ANSWER), ("user", "And <ref>it</ref>?"), ("assistant", "Gone.")]
    ids, counts = text_checks.as_finetune(as_original, tokenizer)
    seen = encoded.feature_index < 0
    np.testing.assert_array_equal(encoded.tokens[seen], np.array(ids)[seen])
    np.testing.assert_array_equal(encoded.feature_index[~seen], np.arange(16))
    np.testing.assert_array_equal(encoded.loss_weights[:-1], counts[1:])


def test_a_question_ends_where_the_answer_begins(tokenizer):
    record = grit_record((QUESTION, ANSWER))
    encoded = chatml.encode_question(record, tokenizer, **LIMITS)
    assert encoded.answer == ANSWER and tokenizer.decode(encoded.tokens[-8:], skip_special=False).endswith(
        "assistant\n"
    )
    raw = chatml.encode_question(record, tokenizer, **LIMITS | {"template": "qwen_raw"})
    assert tokenizer.decode(raw.tokens[-8:], skip_special=False).endswith("</ref>?")


def test_pictures_are_numbered_through_the_turns(tokenizer):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "CT."}]
    turns += [{"from": "human", "value": "And <image>?"}, {"from": "gpt", "value": "MR."}]
    record = parse_record({"image": ["a.png", "b.png"], "conversations": turns}, "f.json", 0, "/")
    encoded = chatml.encode_conversation(record, tokenizer, **LIMITS)
    text = tokenizer.decode(encoded.tokens[encoded.feature_index < 0], skip_special=False)
    assert "Picture 1: <img></img>\nWhat?" in text and "And Picture 2: <img></img>\n?" in text
    assert sorted(encoded.feature_index[encoded.feature_index >= 0]) == list(range(32))


def test_marks_that_someone_typed_are_plain_text(tokenizer):
    record = grit_record((QUESTION + " <|im_start|>", ANSWER))
    encoded = chatml.encode_conversation(record, tokenizer, **LIMITS)
    assert (encoded.tokens == tokenizer.im_start_id).sum() == 3  # system, user, assistant


@pytest.mark.parametrize(
    ("question", "answer", "what"),
    [
        (QUESTION, "<box>(1,2),(3,1000)</box>", "from 0 to 999"),
        (QUESTION, "<box>(9,2),(3,4)</box>", "x1 <= x2"),
        (QUESTION, "<ref>a</ref><box>(1,2),(3,4)", "<box> is not closed"),
        (QUESTION, "<box>(1.5,2),(3,4)</box>", "whole numbers"),
        (QUESTION, "<box>(1,2),(3,4)</ref>", "does not match"),
        ("What is <box>(1,2),(3,4)</box>?", "Liver.", "box without a picture"),
        (QUESTION + " <|im_stop|>", ANSWER, "unknown special token"),
        (QUESTION + " <img>", ANSWER, "picture that is not one of the record's"),
        (QUESTION + " <region>box:1,1,5,5</region>", ANSWER, "region or mask in the text"),
        (QUESTION, "<SEG><mask>masks/a.png</mask>", "region or mask in the text"),
    ],
)
def test_what_would_teach_a_broken_form_is_named(question, answer, what, tokenizer):
    record = grit_record((question, answer))
    with pytest.raises(DataError, match=what) as caught:
        chatml.encode_conversation(record, tokenizer, **LIMITS)
    assert "grit.json, record 3" in str(caught.value)


def test_pictures_that_are_not_there_are_named(tokenizer, tmp_path):
    record = parse_record({"conversations": [[QUESTION, ANSWER]]}, "grit.json", 3, str(tmp_path))
    with pytest.raises(DataError, match="grit.json, record 3: file is missing"):
        record.find(record.images[0])


def test_too_long_or_too_many_is_refused(tokenizer):
    record = grit_record((QUESTION, ANSWER))
    with pytest.raises(DataError, match="text too long; expected at most 50"):
        chatml.encode_conversation(record, tokenizer, **LIMITS | {"max_length": 50})
    with pytest.raises(DataError, match="too many images"):
        chatml.encode_conversation(record, tokenizer, **LIMITS | {"max_images": 0})
    with pytest.raises(ValueError, match="path of 17 bytes, expected at most 16"):
        tokenizer.encode("<img>" + "p" * 17 + "</img>")


def test_boxes_follow_their_phrase():
    text = "<ref>the cysts</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box> and <box>(0,0),(9,9)</box>"
    assert [box.label for box in boxes.parse(text)] == ["the cysts", "the cysts", ""]
    assert boxes.parse(text) == boxes.read(text)


def test_a_region_of_pixels_becomes_a_box_of_thousandths():
    assert boxes.from_pixels((50, 20, 100, 40), 100, 40) == Box(500, 500, 999, 999)
    assert boxes.region_text("point:50,20", 100, 40) == "<ref>this region</ref><box>(500,500),(500,500)</box>"
    with pytest.raises(ValueError, match="expected 0 <= x1 <= x2 <= 100"):
        boxes.region_text("box:50,20,101,40", 100, 40)
    with pytest.raises(ValueError, match="take box:x1,y1,x2,y2 or point:x,y"):
        boxes.region_text("scribble:1,2 3,4", 100, 40)
