"""VQA-RAD as on OSF: "VQA_RAD Dataset Public.json" beside "VQA_RAD Image Folder/".

Test: phrase types that begin with "test".

The form on the Hugging Face hub (Parquet) is read as well; it has lost the answer types, so that only yes and no count
as closed.
"""

import os
from collections.abc import Callable, Iterator

from medplib_jax.datasets.importers.example import ImportedExample, json_rows, parquet_example, parquet_rows, text

_FILE = "VQA_RAD Dataset Public.json"


def read(root: str) -> Iterator[Callable[[], ImportedExample]]:
    if not os.path.isfile(os.path.join(root, _FILE)) and os.path.isdir(os.path.join(root, "data")):
        for place, split, row in parquet_rows(root):
            yield lambda place=place, split=split, row=row: parquet_example(place, split, row)
        return
    for place, row in json_rows(root, _FILE):
        yield lambda place=place, row=row: _example(place, row)


def _example(place, row) -> ImportedExample:
    question, answer = text(row, "question", place), text(row, "answer", place)
    split = "test" if text(row, "phrase_type", place).startswith("test") else "train"
    image = f"VQA_RAD Image Folder/{text(row, 'image_name', place)}"
    return ImportedExample(place, image, split, ((question, answer),), "", text(row, "answer_type", place).lower())
