"""What is shown of an answer while it is drawn adds up to the answer, and ends before a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medplib_jax.decode.masks import mask_labels
from medplib_jax.serve.answers import AnswerText

WORDS = ["The", " liver", " is", " ", "<SEG>", ".", "\n", "E", "N", "D", "END", " caf", "é", "肝"]


def decode(tokens) -> str:
    return "".join(WORDS[token] for token in tokens)


def shown(tokens, stops, chunk):
    text = AnswerText(decode, stops)
    pieces = []
    for end in range(chunk, len(tokens), chunk):
        pieces.append(text.update(tokens[:end], ended=False))
        if text.stopped:
            return "".join(pieces), text
    pieces.append(text.update(tokens, ended=True))
    return "".join(pieces), text


@given(st.lists(st.integers(0, len(WORDS) - 1), max_size=30), st.integers(1, 5))
def test_pieces_add_up_to_the_text(tokens, chunk):
    assert shown(tokens, (), chunk)[0] == decode(tokens).strip()


@given(st.lists(st.integers(0, len(WORDS) - 1), max_size=30), st.integers(1, 5))
def test_nothing_of_a_stop_string_or_after_it_is_shown(tokens, chunk):
    pieces, text = shown(tokens, ("END",), chunk)
    whole = decode(tokens).lstrip()
    assert pieces == (whole[: whole.find("END")].strip() if "END" in whole else whole.strip())
    assert text.stopped == ("END" in whole)


def test_half_a_character_waits_for_its_other_half():
    texts = {1: "caf\ufffd", 2: "café"}
    text = AnswerText(lambda tokens: texts[len(tokens)])
    assert text.update([0], ended=False) == "caf"
    assert text.update([0, 1], ended=True) == "é"


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        ("The liver is <SEG>.", ["liver"]),
        ("Here is the left kidney <SEG> and the spleen <SEG>.", ["left kidney", "spleen"]),
        ("It is <SEG>.", ["mask 1"]),
        ("<SEG>", ["mask 1"]),
        ("There is no tumour.", []),
    ],
)
def test_masks_are_called_by_the_words_before_them(answer, labels):
    assert mask_labels(answer) == labels
