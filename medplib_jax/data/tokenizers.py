"""The LLaMA SentencePiece tokenizer with MedPLIB's added tokens.

It has the arithmetic of the original's slow, legacy tokenizer. The `transformers` package no longer has that tokenizer:
its LLaMA tokenizer is the fast one, which neither strips the text around added tokens nor starts every chunk with a
dummy space, so its ids differ. Here the two rules are written out on `sentencepiece`.
"""

import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Sequence

import sentencepiece

from medplib_jax.data.bpe_tokenizer import BPE_FILE, BpeTokenizer
from medplib_jax.data.qwen_tokenizer import RANKS_FILE, QwenTokenizer

ADDED_TOKENS = (
    *("<SEG>", "<ref>", "</ref>", "<region>", "</region>", "<sr>", "</sr>", "<mask>", "</mask>"),
    *(f"<gen_{i}>" for i in range(1, 257)),
    *("<im_start>", "<im_end>"),
)
CONTROL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2
MODEL_FILE, ADDED_FILE = "tokenizer.model", "added_tokens.json"
_SPLIT = re.compile("(" + "|".join(map(re.escape, (*ADDED_TOKENS, *CONTROL_TOKENS))) + ")")


class Tokenizer:
    """Text to ids and back. The added tokens follow the SentencePiece vocabulary; padding is `<unk>`, id 0."""

    unk_id, bos_id, eos_id, pad_id = 0, 1, 2, 0
    stop_ids = (eos_id,)  # an answer ends before any of these

    def __init__(self, model: bytes):
        self._model = model
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        # the sentences around every question come again and again
        self._encode_chunk = functools.lru_cache(maxsize=1024)(lambda chunk: tuple(self._pieces.encode(chunk)))
        first = self._pieces.get_piece_size()
        self._added = {token: first + i for i, token in enumerate(ADDED_TOKENS)}
        self._control = {token: i for i, token in enumerate(CONTROL_TOKENS)}
        self._token_of = {i: token for token, i in (self._added | self._control).items()}
        self.vocab_size = first + len(ADDED_TOKENS)
        self.seg_id = self._added["<SEG>"]
        self.region_ids = (self._added["<region>"], self._added["</region>"])

    def __reduce__(self):
        return Tokenizer, (self._model,)

    @property
    def fingerprint(self) -> str:
        """Changes with the vocabulary."""
        return hashlib.blake2b(self._model, digest_size=16).hexdigest()

    @classmethod
    def load(cls, folder: str) -> "Tokenizer":
        """Reads `tokenizer.model` and, when present, `added_tokens.json` of a checkpoint folder.

        ValueError when the model does not have LLaMA's control ids, or when the file of added tokens gives one of
        MedPLIB's another id.
        """
        path = os.path.join(folder, MODEL_FILE)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such tokenizer model")
        with open(path, "rb") as file:
            model = file.read()
        try:
            pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:
            raise ValueError(f"{path}: not a SentencePiece model: {error}") from error
        found = tuple(pieces.id_to_piece(i) for i in range(min(3, pieces.get_piece_size())))
        if found != CONTROL_TOKENS:
            raise ValueError(
                f"{path}: not a LLaMA tokenizer: expected the pieces {CONTROL_TOKENS} at ids 0, 1, 2, found {found}"
            )
        tokenizer = cls(model)
        tokenizer._check_added(os.path.join(folder, ADDED_FILE))
        return tokenizer

    def _check_added(self, path: str) -> None:
        if not os.path.isfile(path):
            return
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        expected = self._added
        known = expected | self._control
        for token in (*expected, *found):
            if token not in known:
                raise ValueError(f"{path}: token {token!r} (id {found[token]}) is not one of MedPLIB's added tokens")
            if found.get(token, None if token in expected else known[token]) != known[token]:
                raise ValueError(f"{path}: token {token!r}: expected id {known[token]}, found {found.get(token)}")

    def save(self, folder: str) -> None:
        """Writes both files, so that `load` (and the original's tokenizer) can read the folder."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, MODEL_FILE), "wb") as file:
            file.write(self._model)
        with open(os.path.join(folder, ADDED_FILE), "w", encoding="utf-8") as file:
            json.dump(self._added, file, indent=1)

    def encode(self, text: str) -> list[int]:
        """Ids without `<s>`.

        Text next to an added token loses its spaces there; every chunk gets SentencePiece's dummy space.
        """
        chunks = _SPLIT.split(text)  # odd entries are added or control tokens
        ids = []
        for i, chunk in enumerate(chunks):
            if i % 2:
                ids.append(self._added.get(chunk, self._control.get(chunk)))
                continue
            if i > 0 and chunks[i - 1] in self._added:
                chunk = chunk.lstrip()
            if i + 1 < len(chunks) and chunks[i + 1] in self._added:
                chunk = chunk.rstrip()
            if chunk:
                ids.extend(self._encode_chunk(chunk))
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of the ids.

        Parts around added tokens are joined by spaces; `skip_special` leaves out `<s>`, `</s>` and `<unk>`.
        """
        parts, run = [], []
        for i in map(int, ids):
            if self._token_of.get(i) in self._added:
                parts += [self._decode_run(run), self._token_of[i]] if run else [self._token_of[i]]
                run = []
            elif not (skip_special and i in (self.unk_id, self.bos_id, self.eos_id)):
                run.append(i)
        return " ".join([*parts, self._decode_run(run)] if run else parts)

    def _decode_run(self, ids: list[int]) -> str:
        """A run without added tokens. As in the original, a space precedes the text that ends in a control token."""
        text, pieces, after_control = "", [], False
        for position, i in enumerate(ids):
            if i not in (self.unk_id, self.bos_id, self.eos_id):
                pieces.append(i)
                after_control = False
                continue
            text += " " if position and not after_control else ""
            text += self._pieces.decode(pieces) + self._token_of[i]
            pieces, after_control = [], True
        return text + self._pieces.decode(pieces)


AnyTokenizer = Tokenizer | QwenTokenizer | BpeTokenizer


def load_tokenizer(folder: str) -> AnyTokenizer:
    """The tokenizer whose files a folder holds:

    LLaMA's or a byte-level BPE with MedPLIB's tokens, or Qwen's. All have `encode`, `decode`, `vocab_size` (the rows of
    the model's embedding), `fingerprint` and the ids that the model needs: `bos_id` (begins a row that holds nothing
    else), `pad_id`, `stop_ids` and `seg_id` (-1 where there is no <SEG>).
    """
    if os.path.isfile(os.path.join(folder, RANKS_FILE)):
        return QwenTokenizer.load(folder)
    if not os.path.isfile(os.path.join(folder, MODEL_FILE)) and os.path.isfile(os.path.join(folder, BPE_FILE)):
        return BpeTokenizer.load(folder, ADDED_TOKENS)
    return Tokenizer.load(folder)


def train_tokenizer(texts: Iterable[str], folder: str, vocab_size: int) -> Tokenizer:
    """Trains a small tokenizer of LLaMA's kind, saves it and returns it.

    BPE with byte fallback and split digits, no normalisation. Deterministic. `vocab_size` counts the SentencePiece
    pieces; at least 259 plus the characters of the texts. Fewer come out when the texts do not hold enough.
    """

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        hard_vocab_limit=False,
        num_threads=1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    tokenizer = Tokenizer(model.getvalue())
    tokenizer.save(folder)
    return tokenizer
