"""MeCoVQA from its published annotation files and the SA-Med2D-20M images.


Takes the JSON files as they are published: adds missing suffixes, unites the masks of a class where the annotations ask
for masks_merged/ (which SA-Med2D-20M does not have), and leaves out what cannot be used, each record by name. Writes

    OUT/mecovqa/CONFIG/1.0.0/    TFDS dataset in ArrayRecord shards; configs complex, region, grounding, zeroshot
    OUT/masks_merged/            the united masks
    OUT/manifest.json            counts by config, split and reason; how to read the dataset
    OUT/problems.jsonl           every record that was left out or repaired, by name
    OUT/missing.txt              every file that was not there

Every example holds its picture, so the dataset takes the space of as many pictures as there are records. Read it with
`tfds.data_source("mecovqa/grounding", data_dir=OUT)`, or train on it with
data.sources=("OUT/mecovqa/grounding/1.0.0#train",). The same command again continues an interrupted run, and takes in
images that were missing before. Annotation files with other names are sorted by what they hold: answers with masks are
grounding, questions with regions are region, others complex.
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from medplib_jax.data.errors import DataError
from medplib_jax.data.sources import read_records
from medplib_jax.data.splits import annotation_files, is_held_out
from medplib_jax.datasets.assemble import records as assemble_records
from medplib_jax.datasets.assemble import shards as assemble_shards
from medplib_jax.datasets.files import Folder, age_of, code_version
from medplib_jax.datasets.mecovqa import merged_name, read_class_names
from medplib_jax.datasets.processes import Keeping, Workers, map_shards

PUBLISHED = {
    "train/MeCoVQA-Complex.json": ("complex", "train"),
    "train/MeCoVQA-Complex_local+Region.json": ("region", "train"),
    "train/MeCoVQA-Grounding.json": ("grounding", "train"),
    "test/MeCoVQA_Complex_VQA_test.json": ("complex", "test"),
    "test/MeCoVQA_Region_VQA_test.json": ("region", "test"),
    "test/MeCoVQA_Grounding_test.json": ("grounding", "test"),
} | {
    f"zeroshot4grounding/{name}.json": ("zeroshot", name)
    for name in ("endoscopy", "fundus", "mr", "pet", "ultrasound", "xray")
}
RECORDS_PER_SHARD = 1000
_MERGED = re.compile(r"masks_merged[/\\][^<>\"]+")
_INSTANCE = re.compile(r"(.+)_[0-9]{3}\.png")


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """The records of one shard, with all that a worker process needs."""

    config: str
    split: str
    shard: int
    file: str  # of the annotations, relative to their folder
    first: int  # index of the first record in the file
    records: list[Any]
    root: str
    folder: Folder
    instances: dict[str, tuple[str, ...]]
    names: dict[tuple[str, int], str]

    @property
    def name(self) -> str:
        """The shard before it is published, below `folder`; beside it lies a note of what became of its records."""
        return f".shards/{self.config}-{self.split}-{self.shard:05d}.array_record"

    @property
    def path(self) -> str:
        return os.path.join(self.folder.path, self.name)

    @property
    def fingerprint(self) -> str:
        """Changes when the shard must be written anew; what the collection's files say beside, see `finished`."""
        names = sorted([*key, name] for key, name in self.names.items())
        made_of = [self.records, sorted(self.instances.items()), self.file, self.first, self.root, names]
        content = json.dumps([*made_of, code_version()])
        return hashlib.sha256(content.encode()).hexdigest()


def assemble(annotations: str, images: str, out: str, workers: Workers) -> dict[str, Any]:
    """Does what the module says, and returns the manifest.

    DataError when an annotation file or the image folder cannot be read.
    """
    root = find_collection(images)
    files, others = find_annotations(annotations, out)
    loaded = {
        file: read_records(os.path.join(annotations, file)) for file in tqdm(files, desc="annotations", unit=" files")
    }
    plan = {file: PUBLISHED.get(file) or guess(file, loaded[file]) for file in files}
    instances = find_instances(root, loaded.values())
    absent = [file for file in PUBLISHED if file not in plan] if any(file in PUBLISHED for file in plan) else []
    with Folder(out, "assemble", annotations, root) as folder:
        for partial in pathlib.Path(out, ".shards").glob("*.tmp"):  # of a run that was killed
            partial.unlink()
        tasks = list(make_tasks(plan, loaded, root, folder, instances, read_class_names(root)))
        notes = run(tasks, workers)
        shards = collections.defaultdict(lambda: collections.defaultdict(list))
        for task, note in zip(tasks, notes, strict=True):
            if note["written"]:
                shards[task.config][task.split].append((task.path, note["written"]))
        places = {config: assemble_shards.publish(folder, config, splits) for config, splits in shards.items()}
        return write_manifest(folder, tasks, notes, places, absent, others)


def find_collection(images: str) -> str:
    """The folder that holds images/: the one given, or SAMed2Dv1/ in it. DataError when there is none."""
    for root in (images, os.path.join(images, "SAMed2Dv1")):
        if os.path.isdir(os.path.join(root, "images")):
            return os.path.realpath(root)
    raise DataError(images, None, "not a folder of images", "images/ or SAMed2Dv1/images/ in it", "neither")


def find_annotations(folder: str, out: str) -> tuple[list[str], list[str]]:
    """Annotation files below the folder, and JSON files of other kinds, relative to it.

    What lies in `out` does not count. DataError when there is none to use.
    """
    inside = os.path.relpath(out, folder) + "/"
    found, others = (
        [name for name in (_relative(path, folder) for path in paths) if not name.startswith(inside)]
        for paths in annotation_files(folder, deep=True)
    )
    broken = [name for name in others if name in PUBLISHED]  # which will be named when they are read
    if not found + broken:
        raise DataError(folder, None, "no annotation file", "*.json or *.jsonl in it or below", "none")
    return sorted(found + broken), [name for name in others if name not in PUBLISHED]


def _relative(path: str, folder: str) -> str:
    return os.path.relpath(path, folder).replace(os.sep, "/")


def guess(file: str, records: list[Any]) -> tuple[str, str]:
    """Config and split of a file with an unknown name."""
    text = json.dumps(records[:1000])
    config = "grounding" if "<mask>" in text else "region" if "<region>" in text else "complex"
    return config, "test" if is_held_out(file) else "train"


def find_instances(root: str, files: Iterable[list[Any]]) -> dict[str, tuple[str, ...]]:
    """For every masks_merged/ that the annotations name: its instances' names in masks/. One pass over that folder."""
    wanted = {merged_name(match) for records in files for text in _texts(records) for match in _MERGED.findall(text)}
    found = collections.defaultdict(list)
    if wanted and os.path.isdir(os.path.join(root, "masks")):
        with os.scandir(os.path.join(root, "masks")) as entries:
            for entry in tqdm(entries, desc="masks", unit=" files", mininterval=1.0):
                match = _INSTANCE.fullmatch(entry.name)
                if match and (name := f"masks_merged/{match[1]}_merged.png") in wanted:
                    found[name].append(entry.name)
    return {name: tuple(sorted(names)) for name, names in found.items()}


def _texts(records: list[Any]) -> Iterator[str]:
    for record in records:
        turns = record.get("conversations") if isinstance(record, dict) else None
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict) and isinstance(turn.get("value"), str):
                yield turn["value"]


def make_tasks(plan, loaded, root: str, folder: Folder, instances, names) -> Iterator[ShardTask]:
    """The shards, in the order of files and records."""
    counts = collections.Counter()
    for file, (config, split) in plan.items():
        for first in range(0, len(loaded[file]), RECORDS_PER_SHARD):
            records = loaded[file][first : first + RECORDS_PER_SHARD]
            wanted = {merged_name(match) for text in _texts(records) for match in _MERGED.findall(text)}
            own = {name: instances[name] for name in sorted(wanted & instances.keys())}
            yield ShardTask(config, split, counts[config, split], file, first, records, root, folder, own, names)
            counts[config, split] += 1


def run(tasks: list[ShardTask], workers: Workers) -> list[dict[str, Any]]:
    """The note of each shard, in order; shards that are there already are not written again."""
    notes = [finished(task) for task in tasks]
    todo = [i for i, note in enumerate(notes) if note is None]
    total, left = (sum(len(task.records) for task in some) for some in (tasks, [tasks[i] for i in todo]))
    with tqdm(total=total, initial=total - left, desc="assemble", unit=" records") as bar:
        for i, note in zip(todo, _build([tasks[i] for i in todo], workers), strict=True):
            tasks[i].folder.keep([f"{tasks[i].name}.json", *note["made"]])
            notes[i] = note
            bar.update(len(tasks[i].records))
    return notes


def _build(tasks: list[ShardTask], workers: Workers) -> Iterator[dict[str, Any]]:
    """The note of each shard. One that is finished is known by its note, so that Beam keeps nothing else of it."""
    if tasks:
        yield from map_shards(build_shard, tasks, workers, Keeping(os.path.join(tasks[0].folder.path, ".beam")))


def finished(task: ShardTask) -> dict[str, Any] | None:
    """The note of a shard that need not be written again: it is there, and made of the same records, files and code."""
    try:
        with open(task.path + ".json", encoding="utf-8") as file:
            note = json.load(file)
    except (OSError, ValueError):
        return None
    if note.get("fingerprint") != task.fingerprint:
        return None
    same = all(age_of(task.root, name) == age for name, age in note["files"].items())
    there = all(os.path.exists(os.path.join(task.folder.path, name)) for name in note["made"])
    if not same or not there:
        return None
    task.folder.keep([f"{task.name}.json", *note["made"]])
    return note


def build_shard(task: ShardTask) -> dict[str, Any]:
    """Writes the shard and the note of what became of its records."""
    files = assemble_records.Files(task.root, task.folder, task.instances, task.names)
    written, problems = 0, []
    with assemble_shards.ShardWriter(task.folder.claim(task.name)) as writer:
        for index, raw in enumerate(task.records, task.first):
            try:
                example, repairs = assemble_records.prepare(raw, task.file, index, files)
            except DataError as error:
                problems.append({"action": "left out", **error.as_dict()})
                continue
            writer.write(example)
            written += 1
            problems += [
                {"action": "repaired", "file": task.file, "record": index, "what": what}
                for what in dict.fromkeys(repairs)
            ]
    note = {"fingerprint": task.fingerprint, "written": written, "problems": problems, "missing": sorted(files.missing)}
    note |= {"files": files.ages, "made": [task.name, *sorted(files.made)]}
    task.folder.write_json(f"{task.name}.json", note)
    return note


def write_manifest(
    folder: Folder, tasks, notes, places: dict[str, str], absent: list[str], others: list[str]
) -> dict[str, Any]:
    splits = collections.defaultdict(collections.Counter)
    actions = {"left out": collections.Counter(), "repaired": collections.Counter()}
    for task, note in zip(tasks, notes, strict=True):
        counts = splits[f"{task.config}/{task.split}"]
        left_out = [problem for problem in note["problems"] if problem["action"] == "left out"]
        counts.update(records=len(task.records), written=note["written"], left_out=len(left_out))
        for problem in note["problems"]:
            actions[problem["action"]][_kind(problem["what"])] += 1
    missing = sorted({name for note in notes for name in note["missing"]})
    manifest = {
        "records": sum(counts["records"] for counts in splits.values()),
        "written": sum(counts["written"] for counts in splits.values()),
        "splits": {name: dict(counts) for name, counts in splits.items()},
        "left_out": dict(actions["left out"].most_common()),
        "repaired": dict(actions["repaired"].most_common()),
        "missing_files": len(missing),
        "missing_by_folder": dict(collections.Counter(_place(name) for name in missing).most_common()),
        "annotation_files_absent": absent,
        "files_of_another_kind": others,
        "sources": [f"{place}#{split}" for config, place in places.items() for split in _splits_of(config, splits)],
    }
    folder.write_json("manifest.json", manifest)
    folder.write_lines("missing.txt", missing)
    folder.write_lines("problems.jsonl", (json.dumps(problem) for note in notes for problem in note["problems"]))
    return manifest


def _splits_of(config: str, splits) -> list[str]:
    return [
        name.split("/")[1] for name, counts in splits.items() if name.startswith(f"{config}/") and counts["written"]
    ]


def _kind(what: str) -> str:
    """The problem without the name of the file."""
    return what.split(" (")[0]


def _place(name: str) -> str:
    """Folder and collection of a missing file, such as "images/ct_00--AbdomenCT1K"."""
    return "--".join(name.split("--")[:2]) if "--" in name else os.path.dirname(name)


def describe(manifest: dict[str, Any], out: str) -> str:
    """What a person wants to know at the end of a run."""
    lines = [
        f"{name:24} {counts['written']:>8} of {counts['records']} records"
        for name, counts in manifest["splits"].items()
    ]
    for title in ("repaired", "left_out"):
        lines += [f"{title.replace('_', ' '):10} {count:>8}  {what}" for what, count in manifest[title].items()]
    if manifest["missing_files"]:
        listed = os.path.join(out, "missing.txt")
        lines.append(f"{manifest['missing_files']} files are missing; they are listed in {listed}. By collection:")
        lines += [f"  {count:>8}  {place}" for place, count in list(manifest["missing_by_folder"].items())[:20]]
        lines.append("When they are there, the same command takes them in.")
    lines += [f"annotation file absent: {file}" for file in manifest["annotation_files_absent"]]
    lines += [f"not a list of records: {file}" for file in manifest["files_of_another_kind"]]
    for source in manifest["sources"]:
        config, split = source.split(os.sep)[-2], source.rsplit("#", 1)[1]
        lines.append(f"{'evaluate' if config == 'zeroshot' or is_held_out(split) else 'train'} on: {source}")
    return "\n".join(lines)
