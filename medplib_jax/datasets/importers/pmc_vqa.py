"""PMC-VQA, both versions: four choices, the answer by its letter.

Version 1: train.csv, test.csv (or test_clean.csv alone); version 2: train_2.csv, test_2.csv. Pictures lie in images/ or
figures/, as the archives unpack. Columns: Figure_path, Question, Choice A ... Choice D (" A:..."), the letter in
Answer_label (1) or Answer (2).
"""

import functools
import os
import re
from collections.abc import Callable, Iterator

from medplib_jax.data.errors import DataError
from medplib_jax.datasets.importers.example import ImportedExample, csv_rows, existing, first_existing, text

_LETTER = re.compile(r"^\s*[A-D]\s*:\s*")
_FOLDERS = ("images", "figures", "images_2/figures", "images_2")


def read(
    root: str, files: tuple[str, ...] = ("train.csv", "test.csv", "test_clean.csv"), label: str = "Answer_label"
) -> Iterator[Callable[[], ImportedExample]]:
    """files: of the version; label: the column of the letter."""
    names = existing(root, files)
    for name in names:
        if name == "test_clean.csv" and "test.csv" in names:  # a part of test.csv
            continue
        split = os.path.splitext(name)[0].split("_")[0]
        for place, row in csv_rows(root, name):
            yield lambda place=place, row=row, split=split: _example(root, place, row, split, label)


def _example(root, place, row, split, column) -> ImportedExample:
    choices = {letter: _LETTER.sub("", text(row, f"Choice {letter}", place)) for letter in "ABCD"}
    label = text(row, column, place)
    if label not in choices:
        raise DataError(*place, "unknown answer label", "A to D", repr(label))
    options = "\n".join(f"{letter}. {choice}" for letter, choice in choices.items())
    turn = f"{text(row, 'Question', place)}\n{options}", choices[label]
    figure = text(row, "Figure_path", place)
    image = first_existing(root, [f"{folder}/{figure}" for folder in _FOLDERS])
    return ImportedExample(place, image, split, (turn,), "", "closed", tuple(choices.values()))


read_second = functools.partial(read, files=("train_2.csv", "test_2.csv"), label="Answer")
