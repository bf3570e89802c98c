"""PMC-VQA, version 1: train.csv, test.csv (or test_clean.csv alone) beside images/; four choices, the answer by its letter.

Columns: Figure_path, Question, Choice A ... Choice D ("A:..."), Answer_label.
"""

import os
import re
from collections.abc import Callable, Iterator

from medplib_jax.data.build.importers.example import Example, csv_rows, existing, text
from medplib_jax.data.errors import DataError

_LETTER = re.compile(r"^\s*[A-D]\s*:\s*")


def read(root: str) -> Iterator[Callable[[], Example]]:
    names = existing(root, ("train.csv", "test.csv", "test_clean.csv"))
    for name in names:
        if name == "test_clean.csv" and "test.csv" in names:  # a part of test.csv
            continue
        for place, row in csv_rows(root, name):
            yield lambda place=place, row=row, split=os.path.splitext(name)[0].split("_")[0]: _example(place, row, split)


def _example(place, row, split) -> Example:
    choices = {letter: _LETTER.sub("", text(row, f"Choice {letter}", place)) for letter in "ABCD"}
    label = text(row, "Answer_label", place)
    if label not in choices:
        raise DataError(*place, "unknown answer label", "A to D", repr(label))
    options = "\n".join(f"{letter}. {choice}" for letter, choice in choices.items())
    turn = f"{text(row, 'Question', place)}\n{options}", choices[label]
    return Example(place, f"images/{text(row, 'Figure_path', place)}", split, (turn,), "", "closed", tuple(choices.values()))
