"""Trains a small tokenizer of Qwen's kind:

Byte-pair merges within the words of Qwen's split pattern, written as `qwen.tiktoken`.
"""

import base64
import collections
import itertools
import unicodedata
from collections.abc import Iterable, Iterator

import regex

from medplib_jax.data import chatml
from medplib_jax.data.qwen_tokenizer import PATTERN, QwenTokenizer
from medplib_jax.data.records import Record

MERGES = 512
# the bytes in GPT-2's printable order, as in Qwen's own file: their ranks are what an image's path is written with
_PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1))
BYTES = (*_PRINTABLE, *(byte for byte in range(256) if byte not in _PRINTABLE))


def conversation_texts(records: Iterable[Record]) -> Iterator[str]:
    """What the tokenizer meets of each conversation: ChatML's words and the turns, without pictures."""
    for record in records:
        yield from ("system", chatml.SYSTEM)
        for role, text in record.turns:
            yield {"human": "user", "gpt": "assistant"}[role]
            yield from text.split("<image>")
        yield from ("Picture 1: " for _ in record.images)


def train_ranks(texts: Iterable[str], folder: str, merges: int = MERGES) -> QwenTokenizer:
    """The tokenizer of these texts, saved in `folder`.

    Deterministic: of pairs that are equally frequent the first in byte order is merged. Fewer merges come out when no
    pair occurs twice.
    """
    words: collections.Counter = collections.Counter()
    for text, times in collections.Counter(texts).items():  # most sentences come again and again
        for word in regex.findall(PATTERN, unicodedata.normalize("NFC", text)):
            words[tuple(bytes([byte]) for byte in word.encode())] += times
    tokens = [bytes([byte]) for byte in BYTES]
    for _ in range(merges):
        pairs: collections.Counter = collections.Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        tokens.append(b"".join(best))
        words = collections.Counter({_merged(word, best): count for word, count in words.items()})
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    tokenizer = QwenTokenizer(b"".join(lines))
    tokenizer.save(folder)
    return tokenizer


def _merged(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    joined, place = [], 0
    while place < len(word):
        if word[place : place + 2] == pair:
            joined.append(b"".join(pair))
            place += 2
        else:
            joined.append(word[place])
            place += 1
    return tuple(joined)
