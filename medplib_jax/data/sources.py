"""Annotation files in MeCoVQA's form and assembled TFDS datasets, record by record."""

import abc
import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from medplib_jax.data.cache import fingerprint
from medplib_jax.data.errors import DataError
from medplib_jax.data.records import Record, parse_record

_READERS = 8  # files that are read at a time


class Source(Sequence[Record]):
    """Records that are read one by one. `file` is their name in messages."""

    file: str
    root: str  # where the records' paths start

    @property
    @abc.abstractmethod
    def fingerprint(self) -> tuple:
        """Changes with the file or dataset that holds the records; the pictures that they name have fingerprints of
        their own.
        """


class MecovqaSource(Source):
    """Records of one annotation file (see `read_records`).

    A record is {"image", "conversations": [{"from", "value"}, ...], "answer_type", "patient", "structure", "spacing"}.
    "image" may be a list (several `<image>` in the text) or absent, as the keys after "conversations". `root` is where
    its paths start; the file's folder by default.
    """

    def __init__(self, path: str, root: str | None = None):
        self.file, self.root = path, root or os.path.dirname(os.path.abspath(path))
        self._records = read_records(path)

    def __reduce__(self):
        return MecovqaSource, (self.file, self.root)  # worker processes read the file themselves

    @property
    def fingerprint(self) -> tuple:
        return fingerprint(self.file)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return parse_record(self._records[index], self.file, index, self.root)


class TfdsSource(Source):
    """Records of one split of a dataset made by `datasets.assemble`, with their pictures.

    `name`: dataset folder # split ("train").
    """

    def __init__(self, name: str):
        self.file = name
        self.root, split = (name, "") if os.path.isdir(name) else name.rsplit("#", 1)
        try:
            import tensorflow_datasets as tfds  # only who reads such a dataset needs it

            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            as_source = tfds.builder_from_directory(self.root).as_data_source
            self._examples = as_source(split=split or "train", deserialize_method=raw)  # pyright: ignore
        except Exception as error:  # the library raises errors of many types
            expected = "FOLDER#SPLIT of an assembled dataset"
            raise DataError(name, None, "dataset cannot be read", expected, str(error)) from error

    def __reduce__(self):
        return TfdsSource, (self.file,)

    @property
    def fingerprint(self) -> tuple:
        return self.file, *(fingerprint(os.path.join(self.root, name)) for name in sorted(os.listdir(self.root)))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Record:
        if index >= len(self):
            raise IndexError(index)  # at which a loop over a sequence ends
        try:
            example = _parse_example(self._examples[index])
        except Exception as error:
            raise DataError(
                self.file, index, "record cannot be read", "an example of the dataset", str(error)
            ) from error
        turns = zip(example["conversations/from"], example["conversations/value"], strict=True)
        raw = {
            "image": example["image_name"][0].decode(),
            "conversations": [{"from": role.decode(), "value": text.decode()} for role, text in turns],
            "answer_type": example["answer_type"][0].decode(),
            "patient": example.get("patient", (b"",))[0].decode(),
            "structure": example.get("structure", (b"",))[0].decode() or None,
            **{name: json.loads(example.get(name, (b"",))[0] or b"null") for name in ("spacing", "volume")},
        }
        contents = {name.decode(): mask for name, mask in zip(example["mask_names"], example["masks"], strict=True)}
        contents[raw["image"]] = example["image"][0]
        return dataclasses.replace(parse_record(raw, self.file, index, self.root), contents=contents)


def _parse_example(serialized: bytes) -> dict[str, Sequence[bytes]]:
    """The lists of a tf.train.Example. TFDS's own way, through its features, takes half a millisecond more."""
    from tensorflow_datasets.proto import tf_example_pb2

    Example = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]  # made when the module is imported
    features = Example.FromString(serialized).features.feature
    return {name: features[name].bytes_list.value for name in features}


def open_source(name: str, root: str | None = None) -> Source:
    """The source of that name in a config: an annotation file, or FOLDER#SPLIT of an assembled dataset.

    `root`: see `MecovqaSource`.

    A `#` in the path of a file or folder that is there belongs to the path.
    """
    return TfdsSource(name) if is_dataset(name) else MecovqaSource(name, root)


def data_root(file: str) -> str:
    """Where a file's paths start: its folder, or the nearest of the two above that holds `images`, as for MeCoVQA's
    test/*.json and for grit/test/*.json of `write_qa`.
    """
    folder = os.path.dirname(os.path.realpath(file))
    above = os.path.dirname(folder)
    candidates = (folder, above, os.path.dirname(above))
    return next((one for one in candidates if os.path.isdir(os.path.join(one, "images"))), folder)


def is_dataset(name: str) -> bool:
    """Whether a source of that name is an assembled dataset, and not an annotation file."""
    return os.path.isdir(name) or ("#" in name and not os.path.isfile(name))


def is_there(name: str) -> bool:
    """Whether the file, or the folder of the dataset, of a source's name exists."""
    return os.path.exists(name) or ("#" in name and os.path.isdir(name.rsplit("#", 1)[0]))


def read_records(path: str) -> list[Any]:
    """The unchecked records of an annotation file.

    It holds a JSON list, or JSON lines in a .jsonl, in UTF-8 with or without a byte order mark. DataError when it
    cannot be read.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        if path.lower().endswith(".jsonl") and not text.lstrip().startswith("["):
            return [_parse_line(line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        records = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        expected = "a JSON list of records, or JSON lines in a .jsonl"
        raise DataError(path, None, "annotation file cannot be read", expected, str(error)) from error
    if not isinstance(records, list):
        raise DataError(path, None, "not a list of records", "a JSON list", type(records).__name__)
    return records


def _parse_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def digest(source: Source, records: Iterable[int]) -> str:
    """16 hex digits that change with any of these records and with the content of any file that they name.

    A file that cannot be found counts as such. Reads every file once, several at a time.
    """
    total, files = hashlib.blake2b(digest_size=8), {}
    for index in records:
        try:
            record = source[index]
        except DataError as error:
            total.update(repr((index, error.what, error.found)).encode())
            continue
        total.update(repr((index, record.images, record.turns, record.answer_type)).encode())
        total.update(repr(record.examples).encode() if record.examples else b"")
        total.update(repr((record.patient, record.structure)).encode() if record.patient or record.structure else b"")
        total.update(repr((record.spacing, record.volume)).encode() if record.spacing else b"")
        if record.contents is None:
            files |= dict.fromkeys(record.references, record)
        else:
            total.update(repr(sorted(record.contents.items())).encode())
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        for one in pool.map(_file_digest, files.values(), files):
            total.update(one)
    return total.hexdigest()


def _file_digest(record: Record, reference: str) -> bytes:
    try:
        with open(record.path(reference), "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except (DataError, OSError):
        return b"cannot be read"
