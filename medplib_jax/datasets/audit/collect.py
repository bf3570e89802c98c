"""What is in a dataset, and what is wrong with it, record by record.


DIR is a folder of annotation files in MeCoVQA's form (paths start at DIR) or one that `datasets.assemble` made. Counts
records by split, modality, task and answer type, measures texts and masks, and names every suspicious record: files
missing or unreadable, masks of another size, empty, full or tiny, masks elsewhere than the text says, left and right
swapped, masks with two names or of another class than named, questions asked twice, answers that stand in their
question, held-out pictures or patients that are in the training data, too. Everything whose split, folder or file name
does not say test, val or zeroshot counts as training data.

The process ends with 0 whatever is found; --json holds the figures to decide upon. Lengths are in words without
--tokenizer (the folder of a checkpoint's tokenizer).
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from medplib_jax.data.cache import fingerprint
from medplib_jax.data.errors import DataError
from medplib_jax.data.records import Record
from medplib_jax.data.sources import Source, open_source
from medplib_jax.data.splits import annotation_files, is_held_out
from medplib_jax.data.tokenizers import load_tokenizer
from medplib_jax.datasets.assemble.shards import DATASET, dataset_folder
from medplib_jax.datasets.audit.facts import Reader, RecordFacts, plain
from medplib_jax.datasets.audit.findings import AuditFinding, find
from medplib_jax.datasets.files import age_of, code_version
from medplib_jax.datasets.mecovqa import read_class_names
from medplib_jax.datasets.patients import check_pattern
from medplib_jax.datasets.processes import HERE, Keeping, Workers, map_shards

CHUNK = 200  # records per task of a worker process
AREA_EDGES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # shares of the picture


def audit(
    folder: str, tokenizer: str = "", workers: Workers = HERE, patient: str = "", beam_folder: str = ""
) -> tuple[dict[str, Any], list[RecordFacts]]:
    """The report (see `summarize`) and the facts of every record. beam_folder: what Beam's workers find lies there.

    DataError when the folder holds no dataset or a file cannot be read.
    """
    sources, others = find_sources(folder)
    facts = collect(sources, Reading(folder, tokenizer, patient), workers, beam_folder)
    return {**summarize(facts, find(facts), "tokens" if tokenizer else "words"), "not_read": others}, facts


def find_sources(folder: str) -> tuple[list[str], list[str]]:
    """Names for `open_source`, and JSON files that are not read.

    Sources are splits of an assembled dataset, or annotation files below the folder. DataError when there is nothing to
    read.
    """
    assembled = os.path.join(folder, DATASET)
    if os.path.isdir(assembled):
        import tensorflow_datasets as tfds

        places = [dataset_folder(folder, config) for config in sorted(os.listdir(assembled))]
        return [f"{place}#{split}" for place in places for split in tfds.builder_from_directory(place).info.splits], []
    files, others = annotation_files(folder, deep=True)
    # what `write_qa` puts there in other forms
    beside = tuple(os.path.join(folder, name, "") for name in ("grit", "answers"))
    found = [file for file in files if not file.startswith(beside)]
    if not found:
        expected = f"annotation files *.json or *.jsonl, or {DATASET}/ of an assembled one"
        raise DataError(folder, None, "no dataset", expected, "neither")
    return found, sorted(os.path.relpath(file, folder) for file in {*others, *files} - {*found})


@dataclasses.dataclass(frozen=True)
class Reading:
    """How records are read. tokenizer: its folder; empty: lengths are in words. patient: see `patients.patient_of`."""

    folder: str
    tokenizer: str
    patient: str

    def __post_init__(self):
        check_pattern(self.patient)


def collect(sources: Sequence[str], reading: Reading, workers: Workers, beam_folder: str) -> list[RecordFacts]:
    """Facts of every record of the sources, in order."""
    chunks, folder = [], reading.folder
    for source in sources:
        count = len(open_source(source, folder))
        chunks += [(source, range(first, min(first + CHUNK, count))) for first in range(0, count, CHUNK)]
    if not chunks:
        raise DataError(folder, None, "no records", "at least one", "none")
    read = functools.partial(_read_chunk, reading)
    with tqdm(total=sum(len(indices) for _, indices in chunks), desc="audit", unit=" records") as bar:
        keeping = Keeping(beam_folder, functools.partial(_chunk_key, reading))
        return [one for facts in map_shards(read, chunks, workers, keeping) for one in _counted(facts, bar)]


def _counted(facts: list[RecordFacts], bar: tqdm) -> list[RecordFacts]:
    bar.update(len(facts))
    return facts


def _read_chunk(reading: Reading, chunk: tuple[str, Iterable[int]]) -> list[RecordFacts]:
    source, indices = chunk
    reader = _reader(reading, source)
    return [reader.facts(index) for index in indices]


def _chunk_key(reading: Reading, chunk: tuple[str, Iterable[int]]) -> str:
    """Changes with the records, the files that they name, and how they are read."""
    source, indices = chunk
    records, names = open_source(source, reading.folder), read_class_names(reading.folder)
    tokenizer = sorted(map(fingerprint, Path(reading.tokenizer).glob("*"))) if reading.tokenizer else ()
    files = {name for index in indices for name in _references(records, index)}
    ages = [(name, age_of(records.root, name)) for name in sorted(files)]
    return repr((reading, chunk, records.fingerprint, sorted(names.items()), tokenizer, ages, code_version()))


def _references(records: Source, index: int) -> tuple[str, ...]:
    try:
        record = records[index]
    except DataError:
        return ()
    return () if record.contents is not None else record.references


@functools.lru_cache(maxsize=1)
def _reader(reading: Reading, source: str) -> Reader:
    name = os.path.relpath(source, reading.folder).replace(os.sep, "/")
    records, names = open_source(source, reading.folder), read_class_names(reading.folder)
    return Reader(records, name, is_held_out(name), _measure(reading.tokenizer), names, reading.patient)


def _measure(tokenizer: str):
    if not tokenizer:
        return lambda record: len(_words(record))
    encode = load_tokenizer(tokenizer).encode
    return lambda record: sum(len(encode(plain(text))) for _, text in record.turns)


def _words(record: Record) -> list[str]:
    return [word for _, text in record.turns for word in plain(text).split()]


def summarize(facts: Sequence[RecordFacts], findings: Sequence[AuditFinding], unit: str) -> dict[str, Any]:
    """The report as plain values.

    `records`, `usable`, `pictures`, `suspicious` (with findings), counts, lengths, areas, and `findings` by name.
    """
    usable = [one for one in facts if one.problem is None]
    areas = [mask.area for one in usable for mask in one.masks]
    counts, _ = np.histogram(areas, AREA_EDGES)
    return {
        "records": len(facts),
        "usable": len(usable),
        "pictures": len({one.picture_hash for one in usable} - {""}),
        "suspicious": len({(finding.source, finding.record) for finding in findings}),
        "by_source": _count(one.source for one in facts),
        "by_split": _count("held out" if one.held_out else "training" for one in facts),
        "by_modality": _count(one.modality or "unknown" for one in usable),
        "by_task": _count(one.task for one in usable),
        "by_answer_type": _count(one.answer_type or "not stated" for one in usable),
        "lengths": {"unit": unit, **_spread([one.length for one in usable])},
        "mask_areas": {
            "unit": "share of the picture",
            **_spread(areas),
            "edges": AREA_EDGES,
            "counts": counts.tolist(),
        },
        "finding_counts": _count(finding.kind for finding in findings),
        "findings": [finding.as_dict() for finding in findings],
    }


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(collections.Counter(values).most_common())


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    names = ("min", "p5", "median", "p95", "max")
    return dict(zip(names, map(float, np.quantile(values, (0, 0.05, 0.5, 0.95, 1))), strict=True))


def describe(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    counts = (f"{report[name]} {name}" for name in ("records", "usable", "pictures", "suspicious"))
    lines = [", ".join(counts)]
    for title in ("by_split", "by_modality", "by_task"):
        lines.append(
            f"{title.replace('_', ' '):12} " + ", ".join(f"{name} {count}" for name, count in report[title].items())
        )
    lines += [f"{count:>8}  {kind}" for kind, count in report["finding_counts"].items()]
    lines += [f"not read: {name}" for name in report["not_read"]]
    return "\n".join(lines)
