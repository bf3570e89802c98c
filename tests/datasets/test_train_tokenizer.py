"""A tokenizer for a folder of one's own."""

import json

import pytest

from medplib_jax.data.tokenizers import Tokenizer
from medplib_jax.datasets.train_tokenizer import build_tokenizer, training_text

TURNS = [
    {"from": "human", "value": "<image>\nWhere is the spleen in <region>masks/a.png</region>?"},
    {"from": "gpt", "value": "Here is the spleen <SEG>.<mask>masks/a.png</mask>"},
]


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([{"image": "a.png", "conversations": TURNS}] * 20))
    return str(file)


def test_the_text_holds_words_but_no_paths_and_tags(source):
    text = " ".join(training_text([source]))
    assert "spleen" in text and "USER:" in text
    assert "png" not in text and "<" not in text


def test_saved_tokenizer_reads_every_word_back(source, tmp_path):
    built = build_tokenizer([source], str(tmp_path / "tokenizer"), 400)
    loaded = Tokenizer.load(str(tmp_path / "tokenizer"))
    assert loaded.vocab_size == built.vocab_size
    assert loaded.decode(loaded.encode("Where is the spleen?")) == "Where is the spleen?"


def test_a_file_of_another_form_is_named(tmp_path):
    file = tmp_path / "other.json"
    file.write_text('[{"question": "?"}]')
    with pytest.raises(ValueError, match="other.json"):
        list(training_text([str(file)]))


def test_a_manifest_between_the_sources_is_left_out_by_name(source, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text('{"records": 20}')
    text = list(training_text([source, str(tmp_path / "manifest.json")]))
    assert text == list(training_text([source])) and "manifest.json" in capsys.readouterr().err
