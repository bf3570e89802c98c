"""What a sweep asks: annotation files and what each of them holds."""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from medplib_jax.config.sweep import TaskConfig
from medplib_jax.data import splits
from medplib_jax.data.errors import DataError
from medplib_jax.data.icl import WithShots
from medplib_jax.data.records import MASK, REGION
from medplib_jax.data.sources import Source, data_root, digest, is_dataset, is_there, open_source
from medplib_jax.data.splits import is_held_out
from medplib_jax.datasets.phantom.generate import is_phantom
from medplib_jax.evaluate.kinds import Contents, best_fit, find_kind, kinds
from medplib_jax.evaluate.result import LeftOut, TaskEntry
from medplib_jax.parallel.processes import of_process_0

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SweepTask:
    """One annotation file or split of a dataset, read once.

    `images`, `regions`, `masks` and `examples`: how many a record has at most.
    """

    config: TaskConfig
    kind: str
    source: Source
    digest: str  # of every record and of the content of the files that they name
    records: tuple[int, ...]  # what is asked, unusable records included
    skipped: dict[int, DataError]  # those of them that cannot be used
    images: int
    regions: int
    masks: int
    examples: int = 0

    @property
    def name(self) -> str:
        return self.config.name

    def entry(self) -> TaskEntry:
        config, source = self.config, self.source
        file = Path(source.file)  # a dataset's is none
        content = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
        return TaskEntry(
            name=self.name,
            kind=self.kind,
            file=source.file,
            records=len(self.records),
            root=source.root,
            part=config.part,
            source=config.about,
            content=content,
            data=self.digest,
            examples=_training_file(config),
            generated=is_phantom(source.root),
        )


def _training_file(config: TaskConfig) -> str:
    """The file of the training set, where it is said or named like the test set with train for test; else empty."""
    if config.train:
        return os.path.abspath(config.train)
    path = Path(config.file).absolute()
    beside = path.parent.with_name(path.parent.name.replace("test", "train")) / path.name.replace("test", "train")
    return str(beside) if beside != path and is_there(str(beside)) else ""


def _open(config: TaskConfig) -> Source:
    """The records of a task:

    An annotation file, or FOLDER#SPLIT of an assembled dataset, which carries its pictures.
    """
    if is_dataset(config.file):
        return open_source(os.path.abspath(config.file))
    file = Path(config.file).resolve()
    return open_source(str(file), config.root or data_root(str(file)))


class UnusableTask(ValueError):
    """A task whose file holds no record that can be asked."""


def read_task(config: TaskConfig, limit: int, on_error: str) -> SweepTask:
    """Reads every record of a task's file once. An unusable one is raised or, with `on_error` skip, kept with its
    reason.

    kind, unless given: what claims the file's contents most (`kinds.best_fit`): volume when slices of volumes have
    masks, grounding when any answer has one, region when any question has a region, else vqa. limit: usable records, 0
    for all. UnusableTask when there is none.
    """
    if config.kind:
        _check_kind(config)
    source = _open(config)
    source = WithShots(source, config.shots) if config.kind == "icl" else source
    records, skipped, usable = [], {}, 0
    images = regions = masks = examples = volumes = 0
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
        examples = max(examples, len(record.examples or ()))
        regions = max(regions, sum(len(REGION.findall(text)) for _, text in record.turns))
        masks = max(masks, len(MASK.findall(record.turns[-1][1])))
        volumes += record.volume is not None
    if not usable:
        first = f", the first because of {next(iter(skipped.values()))}" if skipped else ""
        raise UnusableTask(f"{source.file}: no usable record, {len(skipped)} skipped{first}")
    kind = config.kind or best_fit(Contents(images, regions, masks, volumes))
    mine = digest(source, range(len(source))) if jax.process_index() == 0 else ""
    shared = of_process_0(f"digest/{config.name}", mine)  # reads every picture: once is enough
    return SweepTask(config, kind, source, shared, tuple(records), skipped, images, regions, masks, examples)


def _check_kind(config: TaskConfig) -> None:
    try:
        find_kind(config.kind, config.part)
    except ValueError as error:
        raise ValueError(f"task {config.name}: {error}") from error


def find_tasks(
    configs: Sequence[TaskConfig], limit: int, on_error: str, missing: str
) -> tuple[list[SweepTask], list[LeftOut]]:
    """The tasks that are there, and those left out: with `missing` skip one without a file, with `on_error` skip one
    without a usable record.

    ValueError when none is left, or for two of one name.
    """
    tasks, left_out = [], []
    names = [config.name for config in configs]
    for config in configs:
        if names.count(config.name) > 1:
            raise ValueError(f"{config.file}: more than one task would be called {config.name!r}")
        if not is_there(config.file) and missing == "skip":
            left_out.append(LeftOut(f"task {config.name}", f"{config.file} is missing"))
            continue
        try:
            tasks.append(read_task(config, limit, on_error))
        except UnusableTask as error:
            if on_error == "raise":
                raise
            left_out.append(LeftOut(f"task {config.name}", str(error), failed=True))
    for left in left_out:
        log.warning("%s", left)
    if not tasks:
        raise ValueError("no task can be asked: " + ("; ".join(map(str, left_out)) or "none was given or selected"))
    return tasks, left_out


def folder_tasks(*sources: str | os.PathLike) -> tuple[TaskConfig, ...]:
    """A task for each annotation file, given alone or in a data folder (see `annotation_files`), called by its name;
    with the data folder's name before it where names repeat. A file called like a part of a kind (VG, ROC, RC, MIA) is
    that part.
    """
    files = [file for source in sources for file in annotation_files(source)]
    stems = [file.stem for file in files]
    names = [
        stem if stems.count(stem) == 1 else f"{os.path.basename(data_root(str(file)))}-{stem}"
        for stem, file in zip(stems, files, strict=True)
    ]
    return tuple(_task(name, file) for name, file in zip(names, files, strict=True))


def _task(name: str, file: Path) -> TaskConfig:
    parts = {kind.part: kind.name for kind in kinds().values() if kind.part}
    part = file.stem if file.stem in parts else ""
    return TaskConfig(name, str(file), kind=parts.get(part, ""), part=part)


def annotation_files(path: str | os.PathLike) -> list[Path]:
    """The file itself, or a data folder's files of records: those in its `test` folder, else its own, the held-out ones
    if names tell.

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
