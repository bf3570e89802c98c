"""PathVQA as Parquet, the form on the Hugging Face hub: data/{train,validation,test}-*.parquet with image {bytes}, question, answer.

The authors' own archive holds pickle files, which can run code when they are read; they are not supported.
"""

import hashlib
import pathlib
from collections.abc import Callable, Iterator

import pyarrow
import pyarrow.parquet

from medplib_jax.data.build.importers.example import Example, answer_type, text
from medplib_jax.data.errors import DataError


def read(root: str) -> Iterator[Callable[[], Example]]:
    files = [(split, path) for split in ("train", "validation", "test") for path in sorted(pathlib.Path(root, "data").glob(f"{split}-*.parquet"))]
    if not files:
        raise DataError(root, None, "dataset not found", "data/train-*.parquet (pickle files are not read)", "none")
    for split, path in files:
        try:
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(64, columns=["image", "question", "answer"])
            rows = (row for batch in batches for row in batch.to_pylist())
            for index, row in enumerate(rows):
                yield lambda place=(str(path), index), row=row, split=split: _example(place, row, split)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(str(path), None, "table cannot be read", "Parquet with image, question, answer", str(error)) from error


def _example(place, row, split) -> Example:
    question, answer = text(row, "question", place), text(row, "answer", place)
    content = (row["image"] or {}).get("bytes")
    if not content:
        raise DataError(*place, "no image", "its bytes", repr(row["image"]))
    name = hashlib.sha256(content).hexdigest()[:16] + (".png" if content[:4] == b"\x89PNG" else ".jpg")
    return Example(place, name, split, ((question, answer),), "histopathology", answer_type(answer), content=content)
