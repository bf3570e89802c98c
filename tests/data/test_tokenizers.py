"""The tokenizer against the original's ids and texts, and its files."""

import json
import pickle
import shutil

import pytest

from medplib_jax.data.tokenizers import ADDED_TOKENS, Tokenizer, train_tokenizer
from tests.paths import GOLDEN

TOKENIZER = GOLDEN / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(str(TOKENIZER))


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "conversation.json").read_text())


def test_ids_equal_the_originals(tokenizer, golden):
    for case in golden["strings"]:
        assert tokenizer.encode(case["text"]) == case["ids_nospecial"], case["text"]


def test_text_equals_the_originals(tokenizer, golden):
    for case in golden["decode"]:
        assert tokenizer.decode(case["ids"], skip_special=False) == case["text"]
        assert tokenizer.decode(case["ids"]) == case["text_skip"]


def test_sizes_and_control_ids_equal_the_originals(tokenizer, golden):
    special = golden["special"]
    found = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id)
    assert found == tuple(special[name] for name in ("bos", "eos", "unk", "pad"))
    assert tokenizer.vocab_size == special["len"]
    assert [tokenizer.seg_id] == special["seg"]


def test_save_and_pickle_keep_the_tokenizer(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path))
    text = "The <SEG> of 3 肝 <gen_256>"
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == json.loads(
        (TOKENIZER / "added_tokens.json").read_text()
    )
    assert (
        Tokenizer.load(str(tmp_path)).encode(text)
        == tokenizer.encode(text)
        == pickle.loads(pickle.dumps(tokenizer)).encode(text)
    )


def test_added_tokens_are_optional(tokenizer, tmp_path):
    shutil.copy(TOKENIZER / "tokenizer.model", tmp_path)
    assert Tokenizer.load(str(tmp_path)).encode("<SEG>") == tokenizer.encode("<SEG>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"<SEG>": 401}, "'<SEG>': expected id 400, found 401"),
        ({"<SEG>": None}, "'<SEG>': expected id 400, found None"),
        ({"<pad>": 667}, "'<pad>' .id 667. is not one of"),
    ],
)
def test_other_added_tokens_are_refused(tmp_path, change, message):
    shutil.copy(TOKENIZER / "tokenizer.model", tmp_path)
    added = json.loads((TOKENIZER / "added_tokens.json").read_text()) | change
    (tmp_path / "added_tokens.json").write_text(json.dumps({token: i for token, i in added.items() if i is not None}))
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(str(tmp_path))


def test_missing_or_broken_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer.load(str(tmp_path))


def test_a_model_without_llamas_control_ids_is_refused(tmp_path):
    import sentencepiece

    texts = iter(["a tumour in the left lung"] * 3)
    options = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2, "pad_id": 0, "unk_id": 3}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_prefix=str(tmp_path / "tokenizer"), **options
    )
    with pytest.raises(ValueError, match="not a LLaMA tokenizer"):
        Tokenizer.load(str(tmp_path))


def test_training_is_deterministic_and_round_trips_any_text(tmp_path):
    texts = ["Is there a lesion in the left lung?", "Sure, the liver is <SEG>.", "USER: ASSISTANT: 12 cm"] * 4
    first = train_tokenizer(texts, str(tmp_path / "a"), 320)
    train_tokenizer(texts, str(tmp_path / "b"), 320)
    assert (tmp_path / "a" / "tokenizer.model").read_bytes() == (tmp_path / "b" / "tokenizer.model").read_bytes()
    assert first.vocab_size <= 320 + len(ADDED_TOKENS)
    assert Tokenizer.load(str(tmp_path / "a")).encode("lesion") == first.encode("lesion")
    unseen = "Größe 3,5 cm — 肝脏 😀"
    assert first.decode(first.encode(unseen)) == unseen
    assert len(first.encode("12")) == 1 + 2  # the dummy space, then digit by digit
