"""Imports a public dataset into MeCoVQA's form, for training, assembling and the audit.

COMMAND
    python -m medplib_jax.datasets.import_dataset --dataset slake_en --source Slake1.0 --out data/slake

Writes images/ (hard links where the disk allows), DATASET_{train,validation,test}.json, manifest.json with the counts, and
skipped.jsonl, which names every record that was left out and why.
"""

import argparse
import json
import os
import sys
from collections import Counter
from typing import Any

from tqdm import tqdm

from medplib_jax.data import images
from medplib_jax.data.errors import DataError
from medplib_jax.data.records import check_complete, find_file, parse_record
from medplib_jax.datasets import modalities
from medplib_jax.datasets.command import finish
from medplib_jax.datasets.importers import READERS
from medplib_jax.datasets.importers.example import Example
from medplib_jax.datasets.mecovqa import write_json
from medplib_jax.datasets.place import place, write_bytes
from medplib_jax.datasets.qa.folder import image_reference

SPLITS = ("train", "validation", "test")


def import_dataset(dataset: str, source: str, out: str) -> dict[str, Any]:
    """Makes the dataset `out`; returns its manifest. DataError when `source` does not hold the dataset, or nothing of it can be used."""
    records, problems = {split: [] for split in SPLITS}, []
    pictures = _Pictures(source, out)
    for make in tqdm(READERS[dataset](source), desc=dataset, unit="record"):
        try:
            example = make()
            records[example.split].append(_record(example, pictures, out))
        except DataError as error:
            problems.append(error)
    if not any(records.values()):
        raise problems[0] if problems else DataError(source, None, "dataset is empty", "records", "none")
    counts = {split: len(made) for split, made in records.items() if made}
    manifest = {"dataset": dataset, "records": counts, "images": len(pictures.sources), "skipped": len(problems)}
    manifest["reasons"] = dict(Counter(problem.what for problem in problems).most_common())
    for split, made in records.items():
        if made:
            write_json(os.path.join(out, f"{dataset}_{split}.json"), made)
    with open(os.path.join(out, "skipped.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(problem.as_dict()) + "\n" for problem in problems)
    write_json(os.path.join(out, "manifest.json"), manifest)
    return manifest


class _Pictures:
    """Puts images into the new dataset, each once."""

    def __init__(self, source: str, out: str):
        self._source, self._out = source, out
        self.sources: dict[str, str] = {}  # reference -> image of the source

    def add(self, example: Example) -> str:
        """The image's reference. DataError when it is missing, outside the source, unreadable, or shares its name with another one."""
        reference = image_reference(example.image, modalities.prefix_of(example.modality))
        if (known := self.sources.get(reference)) is not None:
            if known != example.image:
                raise DataError(*example.place, "image name is not unique", known, example.image)
            return reference
        if example.content is None:
            path = find_file(self._source, example.image)
            images.load_pixels(path)
            place(path, self._out, reference)
        else:
            images.load_pixels(images.Blob(example.image, example.content))
            write_bytes(example.content, self._out, reference)
        self.sources[reference] = example.image
        return reference


def _record(example: Example, pictures: _Pictures, out: str) -> dict[str, Any]:
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
    parser.add_argument("--out", required=True, help="folder to write")
    arguments = parser.parse_args()
    return finish(lambda: import_dataset(arguments.dataset, arguments.source, arguments.out))


if __name__ == "__main__":
    sys.exit(main())
