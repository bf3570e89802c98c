"""What an importer gives for each record of a public dataset, and small readers that importers share."""

import csv
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from medplib_jax.data.errors import DataError
from medplib_jax.data.records import find_file
from medplib_jax.data.sources import read_records

YES_NO = ("yes", "no")


@dataclasses.dataclass(frozen=True)
class ImportedExample:
    """One conversation about one image.

    `place`: annotation file and index, for messages. `image`: relative to the dataset's folder.
    """

    place: tuple[str, int]
    image: str
    split: str  # train, validation or test
    turns: tuple[tuple[str, str], ...]  # (question, answer)
    modality: str = ""  # in the dataset's own word
    answer_type: str = ""  # open, closed or empty
    candidates: tuple[str, ...] = ()
    content: bytes | None = dataclasses.field(
        default=None, repr=False
    )  # the image's file, where it is not one of its own


def answer_type(answer: str) -> str:
    """ "closed" for yes and no, else "open"; for datasets that do not say."""
    return "closed" if answer.strip(" .").casefold() in YES_NO else "open"


def text(row: Any, key: str, place: tuple[str, int]) -> str:
    """A field that must be there, as text. DataError when it is not, or is empty."""
    if not isinstance(row, dict):
        raise DataError(*place, "not a record", "an object", type(row).__name__)
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise DataError(*place, f"no {key}", "text", repr(value))
    return str(value).strip()


def json_rows(root: str, name: str) -> Iterator[tuple[tuple[str, int], Any]]:
    """(place, row) of a JSON list or JSON lines; DataError when the file cannot be read."""
    path = os.path.join(root, name)
    for index, row in enumerate(read_records(path)):
        yield (path, index), row


def parquet_rows(root: str) -> Iterator[tuple[tuple[str, int], str, Any]]:
    """(place, split, row) of the form on the Hugging Face hub.

    data/{train,validation,test}-*.parquet with image {bytes}, question, answer.
    """
    files = [
        (split, path)
        for split in ("train", "validation", "test")
        for path in sorted(pathlib.Path(root, "data").glob(f"{split}-*.parquet"))
    ]
    if not files:
        raise DataError(root, None, "dataset not found", "data/train-*.parquet", "none")
    for split, path in files:
        try:
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(64, columns=["image", "question", "answer"])
            rows = (row for batch in batches for row in batch.to_pylist())
            for index, row in enumerate(rows):
                yield (str(path), index), split, row
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(
                str(path), None, "table cannot be read", "Parquet with image, question, answer", str(error)
            ) from error


def parquet_example(place: tuple[str, int], split: str, row: Any, modality: str = "") -> ImportedExample:
    """The example of such a row; its picture is named by its content."""
    question, answer = text(row, "question", place), text(row, "answer", place)
    content = (row["image"] or {}).get("bytes")
    if not content:
        raise DataError(*place, "no image", "its bytes", repr(row["image"]))
    name = hashlib.sha256(content).hexdigest()[:16] + (".png" if content[:4] == b"\x89PNG" else ".jpg")
    return ImportedExample(place, name, split, ((question, answer),), modality, answer_type(answer), content=content)


def csv_rows(root: str, name: str) -> Iterator[tuple[tuple[str, int], dict[str, str]]]:
    """(place, row) of a CSV file with a heading."""
    path = os.path.join(root, name)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for index, row in enumerate(csv.DictReader(file)):
                yield (path, index), row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(path, None, "table cannot be read", "CSV in UTF-8", str(error)) from error


def first_existing(root: str, names: Sequence[str]) -> str:
    """The first of the names that is a file below the root; the first of all when none is, for the message."""
    for name in names:
        try:
            find_file(root, name)
            return name
        except DataError:
            continue
    return names[0]


def existing(root: str, names: Sequence[str]) -> list[str]:
    """Those of the files that are there; DataError when none is."""
    found = [name for name in names if os.path.isfile(os.path.join(root, name))]
    if not found:
        raise DataError(root, None, "dataset not found", " or ".join(names), "none of them")
    return found
