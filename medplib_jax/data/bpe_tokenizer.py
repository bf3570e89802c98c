"""Byte-level BPE tokenizers in Hugging Face's form (`tokenizer.json`, as SmolLM2 and LLaMA 3 have one), with MedPLIB's
added tokens behind their vocabulary.
"""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import tokenizers

BPE_FILE, BPE_CONFIG = "tokenizer.json", "tokenizer_config.json"


class BpeTokenizer:
    """Text to ids and back. `bos` and `eos` are the tokens that begin and end a row; padding is `eos`.

    A text that begins with a letter gets a space before it, as SentencePiece gives one to every chunk: the prompts rely
    on it for "ASSISTANT: yes".
    """

    def __init__(self, model: bytes, bos: str, eos: str, added: Sequence[str]):
        self._arguments = model, bos, eos, tuple(added)
        self._core = tokenizers.Tokenizer.from_str(model.decode())
        known = self._core.get_vocab(with_added_tokens=True)
        for token in (bos, eos):
            if token not in known:
                raise ValueError(f"{token!r} begins or ends a row and is not in the vocabulary")
        missing = [token for token in added if token not in known]
        if missing and len(missing) < len(added):
            raise ValueError(f"{missing[0]!r} is not in the vocabulary, and others of MedPLIB's tokens are")
        self._core.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in missing])
        self._encode = functools.lru_cache(maxsize=1024)(self._ids)  # the sentences around questions come again
        self.bos_id, self.eos_id = self._id(bos), self._id(eos)
        self.pad_id, self.stop_ids = self.eos_id, (self.eos_id,)
        ids = self._core.get_vocab(with_added_tokens=True).values()
        self.vocab_size = len(ids)
        if holes := set(range(len(ids))).difference(ids):  # in one an added token gets an id that another one has
            raise ValueError(f"expected ids from 0 on without a hole, found none with id {min(holes)}")
        self.seg_id = self._id("<SEG>")
        self.region_ids = (self._id("<region>"), self._id("</region>"))
        self._added = frozenset(added)

    def __reduce__(self):
        return BpeTokenizer, self._arguments

    @property
    def fingerprint(self) -> str:
        """Changes with the vocabulary."""
        return hashlib.blake2b(self._core.to_str().encode(), digest_size=16).hexdigest()

    @classmethod
    def load(cls, folder: str, added: Sequence[str]) -> "BpeTokenizer":
        """Reads `tokenizer.json` and, for the tokens that begin and end a row, `tokenizer_config.json`.

        ValueError for another kind of tokenizer than byte-level BPE, for ids with a hole, and where no file names these
        tokens.
        """
        path, config = os.path.join(folder, BPE_FILE), os.path.join(folder, BPE_CONFIG)
        with open(path, "rb") as file:
            model = file.read()
        if not is_byte_level(path):
            raise ValueError(f"{path}: expected byte-level BPE, found another kind of tokenizer")
        named = _read(config)
        eos = _content(named.get("eos_token"))
        bos = _content(named.get("bos_token")) or eos
        if not eos or not bos:
            raise ValueError(f"{config}: expected eos_token, the token that ends an answer")
        try:
            return cls(model, bos, eos, added)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, folder: str) -> None:
        """Writes both files, the added tokens among the vocabulary."""
        os.makedirs(folder, exist_ok=True)
        self._core.save(os.path.join(folder, BPE_FILE), pretty=False)
        _, bos, eos, _ = self._arguments
        with open(os.path.join(folder, BPE_CONFIG), "w", encoding="utf-8") as file:
            json.dump(
                {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}, file, indent=1
            )

    def encode(self, text: str) -> list[int]:
        """Ids without anything around them."""
        return list(self._encode(text))

    def _ids(self, text: str) -> tuple[int, ...]:
        begins_with_token = any(text.startswith(token) for token in self._added)
        space = " " if text and not text[0].isspace() and not begins_with_token else ""
        return tuple(self._core.encode(space + text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of the ids; `skip_special` leaves out the model's own marks, not MedPLIB's tokens."""
        return self._core.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def _id(self, token: str) -> int:
        found = self._core.token_to_id(token)
        if found is None:
            raise ValueError(f"{token!r} is not in the vocabulary")
        return found


def is_byte_level(path: str) -> bool:
    """Whether a `tokenizer.json` is such a tokenizer; LLaMA's, Vicuna's and Mistral's are SentencePiece's."""
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    is_bpe = (content.get("model") or {}).get("type") == "BPE"
    return is_bpe and "ByteLevel" in json.dumps([content.get("pre_tokenizer"), content.get("decoder")])


def _read(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _content(token: Any) -> str:
    """A token as tokenizer_config.json writes it: its text, or an object with it."""
    return (token.get("content") if isinstance(token, dict) else token) or ""
