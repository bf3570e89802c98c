"""From messages to the model's input: the same as `predict` makes, and nothing that a client writes names a file."""

import base64
import io

import chex
import numpy as np
import pytest
from PIL import Image

from medplib_jax.data.pipeline import Loader
from medplib_jax.data.records import Record
from medplib_jax.data.tokenizers import Tokenizer
from medplib_jax.serve.questions import LARGEST_SIDE, Message, PromptMaker, Region
from medplib_jax.serve.refusals import Refused
from tests.evaluate.evaluators import tiny


def encoded(height=20, width=30) -> bytes:
    pixels = np.random.default_rng(height).integers(0, 255, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def picture(content: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(content).decode()}}


def user(*parts) -> Message:
    return Message(
        role="user", content=[{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    )


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    experiment = tiny.make_experiment(folder)
    return PromptMaker(experiment.data, experiment.model, Tokenizer.load(str(folder)), (192, 384), 2, 2)


def loaded(maker, turns, images, contents):
    """What the loader of evaluation makes of the same conversation."""
    record = Record("x", 0, "x", images, turns, contents=contents)
    arrays, _ = Loader([[record]], maker._kept.tokenizer, maker._data, maker._model).load_eval([0], [0], question=True)
    return arrays


def test_a_question_about_a_picture_is_what_the_loader_makes_of_it(maker):
    content = encoded()
    found = maker([user(picture(content), "Where is the lung?")], [])
    expected = loaded(maker, (("human", "<image>\nWhere is the lung?"),), ("a",), {"a": content})
    chex.assert_trees_all_equal({name: getattr(found.batch, name) for name in expected}, expected)
    assert found.size == (20, 30) and found.tokens == expected["valid"].sum()
    assert expected["feature_index"][0, found.head - 1] == 3 and (expected["feature_index"][0, found.head :] < 0).all()


def test_a_picture_that_was_asked_about_is_not_read_again(maker, monkeypatch):
    content, other = encoded(24, 31), encoded(25, 31)
    first = maker([user(picture(content), "Where is the lung?")], [])
    of_other = maker([user(picture(other), "Where is the lung?")], [])
    monkeypatch.setattr("PIL.Image.open", None)
    again = maker([user(picture(content), "Where is the lung?")], [])
    chex.assert_trees_all_equal(again.batch, first.batch)
    twice = maker([user(picture(other), picture(other), "Which one?")], []).batch.clip_pixels[0]
    np.testing.assert_array_equal(twice, of_other.batch.clip_pixels[0, [0, 0]])


def test_regions_of_one_size_are_told_apart_by_what_they_hold(maker):
    def points(row: int) -> np.ndarray:
        rle = {"size": [20, 30], "counts": [row, 5, 600 - row - 5]}
        asked = [user(picture(encoded()), "What is <region>?")]
        return maker(asked, [Region(type="mask", rle=rle)]).batch.region_points

    assert not np.array_equal(points(3), points(300))


def test_a_conversation_keeps_its_turns_and_the_system_message_comes_first(maker):
    content = encoded()
    messages = [
        Message(role="system", content="Be short."),
        user(picture(content), "What organ?"),
        Message(role="assistant", content="It is <SEG>."),
        user("Where is it?"),
    ]
    turns = (("human", "Be short.\n<image>\nWhat organ?"), ("gpt", "It is <SEG>."), ("human", "Where is it?"))
    expected = loaded(maker, turns, ("a",), {"a": content})
    np.testing.assert_array_equal(maker(messages, []).batch.tokens, expected["tokens"])


def test_what_depends_on_a_region_is_not_kept_for_other_questions(maker):
    region, content = Region(type="box", points=[2, 3, 12, 15]), picture(encoded())
    assert maker([user(content, "Look at <region>."), user(content, "What is it?")], [region]).head == 0
    assert maker([user(content, "What is <region>?")], [region]).head > 0


@pytest.mark.parametrize(
    "text", ["What is <region>?", "What is <region></region>?", "What is <region>/etc/passwd</region>?"]
)
def test_a_region_takes_its_place_whatever_stood_there(maker, text):
    content = encoded()
    found = maker([user(picture(content), text)], [Region(type="box", points=[2, 3, 12, 15])])
    reference = "<region>box:2.000,3.000 12.000,15.000</region>"
    expected = loaded(maker, (("human", f"<image>\nWhat is {reference}?"),), ("a",), {"a": content})
    np.testing.assert_array_equal(found.batch.tokens, expected["tokens"])
    np.testing.assert_array_equal(found.batch.region_points, expected["region_points"])


def test_a_mask_as_run_lengths_is_a_region(maker):
    mask = np.zeros((20, 30), bool)
    mask[3:15, 2:12] = True
    runs = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False, append=False))
    counts = np.diff([0, *runs, mask.size]).tolist()
    question = [user(picture(encoded()), "What is it?")]
    drawn = maker(question, [Region(type="mask", rle={"size": [20, 30], "counts": counts})])
    boxed = maker(question, [Region(type="box", points=[2, 3, 12, 15])])
    np.testing.assert_array_equal(drawn.batch.region_points, boxed.batch.region_points)


@pytest.mark.parametrize(
    ("messages", "regions"),
    [
        ([user("What is <region>/etc/passwd</region>?")], []),
        ([user("What is it?")], [Region(type="point", points=[1, 1])]),
        ([user(picture(encoded()), "What is it?")], [Region(type="point", points=[100, 1])]),
        ([user(picture(encoded()), "What is it?")], [Region(type="point", points=[float("nan"), 1])]),
        ([user(picture(encoded()), "What is it?")], [Region(type="box", points=[1, 1, 2])]),
        ([user(picture(encoded()), "What is it?")], [Region(type="mask")]),
        ([user(picture(encoded()), "<region> or <region>?")], [Region(type="point", points=[1, 1])]),
        ([user(picture(encoded()), picture(encoded()), picture(encoded()), "What?")], []),
        ([Message(role="assistant", content="Hello.")], []),
        ([Message(role="system", content="Be short.")], []),
        ([user("")], []),
        ([user("word " * 1000)], []),
        ([user("x" * 30_000)], []),
        ([user("half \ud800")], []),
    ],
)
def test_what_cannot_be_asked_is_refused(maker, messages, regions):
    with pytest.raises(Refused) as found:
        maker(messages, regions)
    assert 400 <= found.value.status < 500 and found.value.message


def test_masks_have_the_size_of_the_picture(maker):
    found = maker([user(picture(encoded(300, 200)), "Where?")], [])
    assert found.batch.mask_size.tolist() == [[300, 200]] and LARGEST_SIDE >= 2048
