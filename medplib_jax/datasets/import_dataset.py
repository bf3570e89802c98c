"""Imports a public dataset into MeCoVQA's form, for training, assembling and the audit.

COMMAND
    python -m medplib_jax.datasets.import_dataset --dataset slake_en --source Slake1.0        # into data/slake_en

Writes images/ (hard links where the disk allows), DATASET_{train,validation,test}.json, manifest.json with the counts,
and skipped.jsonl, which names every record that was left out and why.
"""

import argparse
import os
import sys
from collections.abc import Collection
from typing import Any

from tqdm import tqdm

from medplib_jax.data import images
from medplib_jax.data.errors import DataError
from medplib_jax.data.records import check_complete, find_file, parse_record
from medplib_jax.datasets import modalities
from medplib_jax.datasets.command import finish, parse
from medplib_jax.datasets.files import Folder, files_below
from medplib_jax.datasets.importers import ALONGSIDE, READERS
from medplib_jax.datasets.importers.example import ImportedExample
from medplib_jax.datasets.qa.folder import image_reference

SPLITS = ("train", "validation", "test")
_TABLES = (".json", ".jsonl", ".csv", ".parquet", ".txt")


def import_dataset(dataset: str, source: str, out: str) -> dict[str, Any]:
    """Makes the dataset `out`; returns its manifest.

    DataError when `source` does not hold the dataset, or nothing of it can be used.
    """
    records, problems, read = {split: [] for split in SPLITS}, [], set()
    with Folder(out, dataset, source) as folder:
        pictures = _Pictures(source, folder)
        for make in tqdm(READERS[dataset](source), desc=dataset, unit="record"):
            try:
                example = make()
                read.add(example.place[0])
                records[example.split].append(_record(example, pictures, out))
            except DataError as error:
                problems.append(error)
                read.add(error.file)
        if not any(records.values()):
            raise problems[0] if problems else DataError(source, None, "dataset is empty", "records", "none")
        counts = {split: len(made) for split, made in records.items() if made}
        manifest = {"dataset": dataset, "records": counts, "images": len(pictures.sources)}
        manifest |= folder.write_problems(problems)
        manifest["files_not_read"] = _not_read(source, read, ALONGSIDE.get(dataset, ()))
        for split, made in records.items():
            if made:
                folder.write_json(f"{dataset}_{split}.json", made)
        folder.write_json("manifest.json", manifest)
    return manifest


def _not_read(source: str, read: Collection[str], alongside: Collection[str]) -> list[str]:
    """Tables below the source from which no record came.

    Other parts of the dataset, or files of another name than the reader looks for.
    """
    known = {os.path.realpath(path) for path in read}
    found = [name for name in files_below(source) if name.lower().endswith(_TABLES)]
    found = [name for name in found if os.path.basename(name) not in alongside]
    return [name for name in found if os.path.realpath(os.path.join(source, name)) not in known]


class _Pictures:
    """Puts images into the new dataset, each once."""

    def __init__(self, source: str, folder: Folder):
        self._source, self._folder = source, folder
        self.sources: dict[str, str] = {}  # reference -> image of the source

    def add(self, example: ImportedExample) -> str:
        """The image's reference.

        DataError when it is missing, outside the source, unreadable, or shares its name with another one.
        """
        reference = image_reference(example.image, modalities.prefix_of(example.modality))
        if (known := self.sources.get(reference)) is not None:
            if known != example.image:
                raise DataError(*example.place, "image name is not unique", known, example.image)
            return reference
        if example.content is None:
            path = find_file(self._source, example.image)
            images.load_pixels(path)
            self._folder.link(path, reference)
        else:
            images.load_pixels(images.Blob(example.image, example.content))
            self._folder.write(reference, example.content)
        self.sources[reference] = example.image
        return reference


def _record(example: ImportedExample, pictures: _Pictures, out: str) -> dict[str, Any]:
    messages = []
    for question, answer in example.turns:
        messages += [
            {"from": "human", "value": question if messages else f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ]
    raw = {"conversations": messages}
    if example.answer_type:
        raw["answer_type"] = example.answer_type
    if example.candidates:
        raw["candidates"] = list(example.candidates)
    try:
        raw = {"image": pictures.add(example), **raw}
    except DataError as error:
        raise error if error.record is not None else error.in_record(*example.place) from error
    check_complete(parse_record(raw, *example.place, out))
    return raw


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, choices=sorted(READERS))
    parser.add_argument("--source", required=True, help="the unpacked dataset's folder")
    parser.add_argument("--out", default="", help="folder to write; data/DATASET by default, where the configs look")
    arguments = parse(parser)
    out = arguments.out or os.path.join("data", arguments.dataset)
    return finish(lambda: import_dataset(arguments.dataset, arguments.source, out))


if __name__ == "__main__":
    sys.exit(main())
