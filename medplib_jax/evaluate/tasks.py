"""What a sweep asks: annotation files and what each of them holds."""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from medplib_jax.config.sweep import TASK_PARTS, TaskConfig
from medplib_jax.data import splits
from medplib_jax.data.errors import DataError
from medplib_jax.data.records import MASK, REGION
from medplib_jax.data.sources import MecovqaSource
from medplib_jax.data.splits import is_held_out

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Task:
    """One annotation file, read once. Slots are what its questions (images, regions) and answers (masks) need at most."""

    config: TaskConfig
    kind: str
    source: MecovqaSource
    digest: str  # of the file's content
    records: tuple[int, ...]  # what is asked, unusable records included
    skipped: dict[int, DataError]  # those of them that cannot be used
    images: int
    regions: int
    masks: int

    @property
    def name(self) -> str:
        return self.config.name

    def as_dict(self) -> dict:
        found = {
            "name": self.name,
            "kind": self.kind,
            "part": self.config.part,
            "file": self.source.file,
            "root": self.source.root,
        }
        return found | {"records": len(self.records), "source": self.config.about}


def read_task(config: TaskConfig, limit: int, on_error: str) -> Task:
    """Reads every record of a task's file once. An unusable one is raised or, with `on_error` skip, kept with its reason.

    kind, unless given: grounding when any answer has a mask, region when any question has a region, else vqa. limit: usable records, 0 for all.
    """
    file = Path(config.file).resolve()
    source = MecovqaSource(str(file), config.root or str(data_root(file)))
    records, skipped, usable = [], {}, 0
    images = regions = masks = 0
    for index in range(len(source)):
        if limit and usable == limit:
            break
        records.append(index)
        try:
            record = source[index]
            if record.turns[-1][0] != "gpt":
                raise record.error("question without an expected answer", "a gpt turn at the end", record.turns[-1][1])
        except DataError as error:
            if on_error == "raise":
                raise
            skipped[index] = error
            continue
        usable += 1
        images = max(images, len(record.images))
        regions = max(regions, sum(len(REGION.findall(text)) for _, text in record.turns))
        masks = max(masks, len(MASK.findall(record.turns[-1][1])))
    if config.kind == "refer_box" and not config.part:
        raise ValueError(f"task {config.name}: kind refer_box needs a part, one of {TASK_PARTS}")
    if not usable:
        raise ValueError(f"{file}: no usable record, {len(skipped)} skipped")
    found = "grounding" if masks else "region" if regions else "vqa"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return Task(config, config.kind or found, source, digest, tuple(records), skipped, images, regions, masks)


def find_tasks(configs: Sequence[TaskConfig], limit: int, on_error: str, missing: str) -> list[Task]:
    """The tasks that are there. With `missing` skip, one without a file is named and left out; ValueError when none is left, or for two of one name."""
    tasks = []
    for config in configs:
        if not os.path.isfile(config.file) and missing == "skip":
            log.warning("task %s is left out: %s is missing", config.name, config.file)
            continue
        tasks.append(read_task(config, limit, on_error))
    if not tasks:
        raise ValueError(f"no task: none of {[config.file for config in configs]} is there")
    names = [task.name for task in tasks]
    for task in tasks:
        if names.count(task.name) > 1:
            raise ValueError(f"{task.source.file}: more than one task would be called {task.name!r}")
    return tasks


def folder_tasks(*sources: str | os.PathLike) -> tuple[TaskConfig, ...]:
    """A task for each annotation file, given alone or in a data folder (see `annotation_files`), called by its name; with the data folder's name before it
    where names repeat."""
    files = [file for source in sources for file in annotation_files(source)]
    stems = [file.stem for file in files]
    names = [
        stem if stems.count(stem) == 1 else f"{data_root(file).name}-{stem}"
        for stem, file in zip(stems, files, strict=True)
    ]
    return tuple(TaskConfig(name, str(file)) for name, file in zip(names, files, strict=True))


def annotation_files(path: str | os.PathLike) -> list[Path]:
    """The file itself, or a data folder's files of records: those in its `test` folder, else its own, the held-out ones if names tell.

    FileNotFoundError without any.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    files = _records_in(path / "test") or _records_in(path)
    files = [file for file in files if is_held_out(file.name)] or files
    if not files:
        raise FileNotFoundError(
            f"{path}: expected an annotation file or a folder with *.json or test/*.json, found none"
        )
    return files


def _records_in(folder: Path) -> list[Path]:
    files, others = splits.annotation_files(str(folder))
    for other in others:
        log.warning("%s is not a list of records and is left out", other)
    return [Path(file) for file in files]


def data_root(file: Path) -> Path:
    """Where a file's paths start: its folder, or the one above when only that holds `images`, as in MeCoVQA's train and test folders."""
    folder = file.resolve().parent
    return folder.parent if (folder.parent / "images").is_dir() and not (folder / "images").is_dir() else folder
