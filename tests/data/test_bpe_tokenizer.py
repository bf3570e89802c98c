"""Byte-level BPE with MedPLIB's tokens: transformers' ids, and what prompts need."""

import itertools
import json
import pickle

import pytest
import tokenizers
import transformers

from medplib_jax.data.prompts import encode_conversation
from medplib_jax.data.records import parse_record
from medplib_jax.data.tokenizers import ADDED_TOKENS, load_tokenizer

TEXTS = ["The left kidney is 3.5 cm long; naïve μ-rays 肝", "is there a tumor?\nNo, it's   absent.", " It is", "<b>"]


def write_bpe(folder, config=None):
    """A small tokenizer of SmolLM2's kind: digits alone, bytes, <|endoftext|> at both ends."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, level])
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs = " ".join("".join(pair) for pair in itertools.product("aeioubdgklmn", repeat=2))  # enough to learn
    core.train_from_iterator([*TEXTS * 3, "A chat between a user and an assistant. USER: ASSISTANT:", pairs], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    written = {"eos_token": "<|endoftext|>", "bos_token": {"content": "<|endoftext|>"}} if config is None else config
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_bpe(tmp_path_factory.mktemp("bpe"))


def test_ids_are_those_of_transformers(folder):
    ours = load_tokenizer(str(folder))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in TEXTS:
        space = "" if text[0] == " " else " "
        assert ours.encode(text) == theirs.encode(space + text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == space + text
    assert ours.vocab_size == len(theirs) + len(ADDED_TOKENS) and ours.seg_id == len(theirs)


def test_added_tokens_are_one_id_each_and_survive_decoding(folder):
    ours = load_tokenizer(str(folder))
    assert [ours.encode(token) for token in ADDED_TOKENS] == [[ours.seg_id + i] for i in range(len(ADDED_TOKENS))]
    ids = [*ours.encode("It is <SEG>."), ours.eos_id]
    assert ids.count(ours.seg_id) == 1 and ours.decode(ids).strip() == "It is <SEG>."


def test_a_saved_copy_and_one_in_another_process_are_the_same(folder, tmp_path):
    ours = load_tokenizer(str(folder))
    ours.save(str(tmp_path))
    for again in (load_tokenizer(str(tmp_path)), pickle.loads(pickle.dumps(ours))):
        assert again.encode("<SEG> kidney") == ours.encode("<SEG> kidney")
        assert (again.vocab_size, again.fingerprint, again.eos_id) == (ours.vocab_size, ours.fingerprint, ours.eos_id)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.convert_tokens_to_ids(["<SEG>", "<im_end>"]) == [ours.seg_id, ours.vocab_size - 1]


def test_a_conversation_has_its_answer_image_and_region(folder):
    ours = load_tokenizer(str(folder))
    turns = [
        {"from": "human", "value": "<image>\nWhat is <region>box:1,1,5,5</region>?"},
        {"from": "gpt", "value": "It is <SEG>.<mask>m.png</mask>"},
    ]
    record = parse_record({"image": "ct_1.png", "conversations": turns}, "f", 0, "")
    found = encode_conversation(record, ours, template="v1", image_tokens=4, max_images=1, max_length=300)
    answer = found.targets[found.loss_weights > 0]
    assert answer.tolist() == [*ours.encode("It is <SEG>."), ours.eos_id]
    assert (found.feature_index >= 0).sum() == 4 + 1 and len(found.seg_positions) == 1


def test_ids_with_a_hole_are_refused(folder, tmp_path):
    """MedPLIB's tokens would get ids that others have, or that lie beyond the rows of the embedding."""
    model = json.loads((folder / "tokenizer.json").read_text())
    last = max(model["model"]["vocab"], key=model["model"]["vocab"].get)
    model["model"]["vocab"][last] += 5
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    with pytest.raises(ValueError, match="tokenizer.json: expected ids from 0 on without a hole, found none with id"):
        load_tokenizer(str(tmp_path))


def test_what_is_no_such_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer_config.json: expected eos_token"):
        load_tokenizer(str(write_bpe(tmp_path / "a", config={})))
    with pytest.raises(ValueError, match="'</s>' begins or ends a row and is not in the vocabulary"):
        load_tokenizer(str(write_bpe(tmp_path / "b", config={"eos_token": "</s>"})))
    (tmp_path / "c").mkdir()
    (tmp_path / "c/tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(ValueError, match="expected byte-level BPE, found another kind"):
        load_tokenizer(str(tmp_path / "c"))
