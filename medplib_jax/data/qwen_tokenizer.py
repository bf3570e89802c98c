"""Qwen-VL's tokenizer: tiktoken BPE over `qwen.tiktoken`, special tokens behind its ranks, pictures as spans of ids
(tokenization_qwen.py).

A picture `<img>path</img>` is a span of `image_span` ids between two tags: the UTF-8 byte values of the path, then
`<imgpad>`. The model puts visual vectors there, so only who renders text as the original does meets the path.
"""

import base64
import binascii
import functools
import hashlib
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence

import tiktoken

RANKS_FILE = "qwen.tiktoken"
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EXTRAS = tuple(f"<|extra_{i}|>" for i in range(205))
TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>")
IMAGE_PAD = "<imgpad>"
SPECIALS = (*CHATML, *EXTRAS, *TAGS, IMAGE_PAD)
_ALL = frozenset(SPECIALS)
VOCAB_MULTIPLE = 128  # the embedding's rows are the vocabulary's size, rounded up to this
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PICTURE = re.compile(r"<img>(.*?)</img>", re.DOTALL)


class QwenTokenizer:
    """Text to ids and back.

    Padding and the end are `<|endoftext|>`; an answer also ends at a ChatML mark (`stop_ids`).
    """

    seg_id = -1  # it speaks of no masks
    region_ids = (-1, -1)  # its regions are boxes in the text

    def __init__(self, ranks: bytes, image_span: int = 256):
        self._ranks, self.image_span = ranks, image_span
        table = _parse_ranks(ranks)
        self._special = {token: len(table) + i for i, token in enumerate(SPECIALS)}
        self._core = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=table, special_tokens=self._special)
        # the sentences around every question come again and again
        self._encode_chunk = functools.lru_cache(maxsize=1024)(self._encode_plain)
        self.eos_id = self.pad_id = self.bos_id = self._special[CHATML[0]]
        self.im_start_id, self.im_end_id = (self._special[token] for token in CHATML[1:])
        self.image_ids = (self._special["<img>"], self._special["</img>"])
        self.stop_ids = (self.eos_id, self.im_start_id, self.im_end_id)
        self.vocab_size = VOCAB_MULTIPLE * math.ceil((len(table) + len(SPECIALS)) / VOCAB_MULTIPLE)

    def __reduce__(self):
        return QwenTokenizer, (self._ranks, self.image_span)

    @property
    def fingerprint(self) -> str:
        """Changes with the vocabulary."""
        return hashlib.blake2b(self._ranks, digest_size=16).hexdigest()

    @classmethod
    def load(cls, folder: str, image_span: int = 256) -> "QwenTokenizer":
        """Reads `qwen.tiktoken`. FileNotFoundError without it, ValueError when it is not a table of ranks."""
        path = os.path.join(folder, RANKS_FILE)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such tokenizer file")
        with open(path, "rb") as file:
            ranks = file.read()
        try:
            return cls(ranks, image_span)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, RANKS_FILE), "wb") as file:
            file.write(self._ranks)

    def id_of(self, special: str) -> int:
        """The id of a special token. ValueError for another text."""
        if special not in self._special:
            raise ValueError(f"unknown special token {special!r}")
        return self._special[special]

    def encode(self, text: str, special: Iterable[str] = _ALL) -> list[int]:
        """Ids, with nothing around them. The strings `special` become their ids, other special strings are plain text.

        ValueError for a picture that is not closed, and for a path that is longer than a span. (The original reads
        paths back and fails at the last two lengths; here nothing reads them.)
        """
        text, allowed, ids = unicodedata.normalize("NFC", text), frozenset(special), []
        if "<img>" not in allowed:
            return list(self._encode_chunk(text, allowed))
        pieces = _PICTURE.split(text)  # odd entries are paths
        if any(tag in piece for piece in pieces for tag in ("<img>", "</img>")):
            raise ValueError(f"<img> is not closed: {text!r}")
        for i, piece in enumerate(pieces):
            ids += self._picture(piece) if i % 2 else self._encode_chunk(piece, allowed)
        return ids

    def _encode_plain(self, text: str, allowed: frozenset[str]) -> tuple[int, ...]:
        return tuple(self._core.encode(text, allowed_special=allowed, disallowed_special=()))

    def _picture(self, path: str) -> list[int]:
        content = path.encode()
        if len(content) > self.image_span:
            raise ValueError(f"path of {len(content)} bytes, expected at most {self.image_span}: {path!r}")
        pads = [self._special[IMAGE_PAD]] * (self.image_span - len(content))
        return [self.image_ids[0], *content, *pads, self.image_ids[1]]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of the ids; a picture's span comes back as its path.

        `skip_special` leaves out the marks that are no part of an answer: ChatML's and padding, but not tags, whose
        numbers would be left without meaning.
        """
        ids, hidden = [int(i) for i in ids], {self._special[token] for token in (*CHATML, *EXTRAS, IMAGE_PAD)}
        self._check(ids)
        begin, end = self.image_ids
        parts: list[bytes] = []
        while begin in ids and end in ids[(start := ids.index(begin)) :]:
            stop = ids.index(end, start)
            inside = [i for i in ids[start + 1 : stop] if i < 256]
            parts += [self._text(ids[:start], hidden, skip_special), b"<img>", bytes(inside), b"</img>"]
            ids = ids[stop + 1 :]
        return b"".join([*parts, self._text(ids, hidden, skip_special)]).decode(errors="replace")

    def _check(self, ids: Sequence[int]) -> None:
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(f"id {wrong[0]} is outside the vocabulary of {self.vocab_size}")

    def _text(self, ids: Sequence[int], hidden: set[int], skip_special: bool) -> bytes:
        known = [i for i in ids if i <= self._special[IMAGE_PAD] and not (skip_special and i in hidden)]
        return self._core.decode_bytes(known)


def _parse_ranks(content: bytes) -> dict[bytes, int]:
    """{bytes: rank} of "base64 rank" lines. ValueError unless every byte is there and the ranks are 0, 1, 2, ..."""
    table = {}
    for number, line in enumerate(filter(None, content.splitlines()), 1):
        try:
            token, rank = line.split()
            table[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f'line {number}: expected "base64 rank", found {line[:60]!r}') from error
    if sorted(table.values()) != list(range(len(table))):
        raise ValueError(f"expected the ranks 0 to {len(table) - 1}, each once")
    missing = [byte for byte in range(256) if bytes([byte]) not in table]
    if missing:
        raise ValueError(f"{len(missing)} bytes have no rank, first {missing[0]}")
    return table
