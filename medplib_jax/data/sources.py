"""Annotation files in MeCoVQA's form and assembled TFDS datasets, record by record."""

import dataclasses
import json
import os
from collections.abc import Sequence

from medplib_jax.data.cache import fingerprint
from medplib_jax.data.errors import DataError
from medplib_jax.data.records import Record, parse_record


class MecovqaSource:
    """Records of one JSON file: a list of {"image", "conversations": [{"from", "value"}, ...], "answer_type"}.

    "image" may be a list (several `<image>` in the text) or absent. `root` is where its paths start; the file's folder by default.
    """

    def __init__(self, json_path: str, root: str | None = None):
        self.file, self.root = json_path, root or os.path.dirname(os.path.abspath(json_path))
        try:
            with open(json_path, encoding="utf-8") as file:
                self._records = json.load(file)
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(
                json_path, None, "annotation file cannot be read", "a JSON list of records", str(error)
            ) from error
        if not isinstance(self._records, list):
            raise DataError(json_path, None, "not a list of records", "a JSON list", type(self._records).__name__)

    def __reduce__(self):
        return MecovqaSource, (self.file, self.root)  # worker processes read the file themselves

    @property
    def fingerprint(self) -> tuple:
        """Changes with the file."""
        return fingerprint(self.file)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return parse_record(self._records[index], self.file, index, self.root)


class TfdsSource:
    """Records of one split of a dataset made by `datasets.assemble`, with their pictures. `name`: dataset folder # split ("train")."""

    def __init__(self, name: str):
        self.file = name
        self.root, _, split = name.partition("#")
        try:
            import tensorflow_datasets as tfds  # only who reads such a dataset needs it

            builder, raw = tfds.builder_from_directory(self.root), tfds.decode.DeserializeMethod.RAW_BYTES
            self._examples = builder.as_data_source(split or "train", deserialize_method=raw)
        except Exception as error:  # the library raises errors of many types
            raise DataError(
                name, None, "dataset cannot be read", "FOLDER#SPLIT of an assembled dataset", str(error)
            ) from error

    def __reduce__(self):
        return TfdsSource, (self.file,)

    @property
    def fingerprint(self) -> tuple:
        """Changes with the dataset."""
        return self.file, *(fingerprint(os.path.join(self.root, name)) for name in sorted(os.listdir(self.root)))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Record:
        try:
            example = _parse_example(self._examples[index])
        except IndexError:
            raise
        except Exception as error:
            raise DataError(
                self.file, index, "record cannot be read", "an example of the dataset", str(error)
            ) from error
        turns = zip(example["conversations/from"], example["conversations/value"], strict=True)
        raw = {
            "image": example["image_name"][0].decode(),
            "conversations": [{"from": role.decode(), "value": text.decode()} for role, text in turns],
            "answer_type": example["answer_type"][0].decode(),
        }
        contents = {name.decode(): mask for name, mask in zip(example["mask_names"], example["masks"], strict=True)}
        contents[raw["image"]] = example["image"][0]
        return dataclasses.replace(parse_record(raw, self.file, index, self.root), contents=contents)


def _parse_example(serialized: bytes) -> dict[str, Sequence[bytes]]:
    """The lists of a tf.train.Example. TFDS's own way, through its features, takes half a millisecond more."""
    from tensorflow_datasets.proto import tf_example_pb2

    features = tf_example_pb2.Example.FromString(serialized).features.feature
    return {name: features[name].bytes_list.value for name in features}


def open_source(name: str, root: str | None = None) -> Sequence[Record]:
    """The source of that name in a config: an annotation file, or FOLDER#SPLIT of an assembled dataset. `root`: see `MecovqaSource`."""
    return TfdsSource(name) if "#" in name or os.path.isdir(name) else MecovqaSource(name, root)
