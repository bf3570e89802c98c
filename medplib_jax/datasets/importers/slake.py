"""SLAKE: train.json, validate.json (or validation.json), test.json beside imgs/xmlabN/source.jpg.

Questions are English and Chinese.
"""

import functools
from collections.abc import Callable, Iterator

from medplib_jax.datasets.importers.example import ImportedExample, existing, json_rows, text

_SPLITS = {"train.json": "train", "validate.json": "validation", "validation.json": "validation", "test.json": "test"}


def read(root: str, language: str = "") -> Iterator[Callable[[], ImportedExample]]:
    """language: "en" or "zh" alone; empty: both."""
    for name in existing(root, tuple(_SPLITS)):
        for place, row in json_rows(root, name):
            if not language or not isinstance(row, dict) or row.get("q_lang") == language:
                yield lambda place=place, row=row, split=_SPLITS[name]: _example(place, row, split)


def _example(place, row, split) -> ImportedExample:
    turn = text(row, "question", place), text(row, "answer", place)
    modality = text(row, "modality", place)
    return ImportedExample(
        place, f"imgs/{text(row, 'img_name', place)}", split, (turn,), modality, text(row, "answer_type", place).lower()
    )


read_english = functools.partial(read, language="en")
