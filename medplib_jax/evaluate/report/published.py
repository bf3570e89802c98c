"""Figures measured elsewhere (published.json), and which task of a sweep each belongs to."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path

from medplib_jax.evaluate.result import TaskEntry


@dataclasses.dataclass(frozen=True)
class Published:
    """One source's figures on one task: `values` in [0, 1] by modality, as in a sweep's figures.

    `records` and `content` are the published test set's: how many it has, and the SHA-256 of its annotation file in the
    versions that are known.
    """

    label: str
    cite: str
    how: str
    group: str
    task: str
    metric: str
    kind: str
    name: re.Pattern
    values: Mapping[str, float]
    records: int | None = None
    content: frozenset[str] = frozenset()

    @property
    def origin(self) -> str:
        return f"{self.label}: {self.cite}; {self.how}"

    def bears_name_of(self, task: TaskEntry) -> bool:
        return task.kind == self.kind and self.name.search((task.part or task.name).lower()) is not None

    def belongs_to(self, task: TaskEntry) -> bool:
        """Whether the task is the published test set, by the content of its annotation file."""
        return self.bears_name_of(task) and task.content in self.content

    def caveat(self, task: TaskEntry) -> str:
        """Why the figure does not stand beside a task of this name; empty when it does."""
        if self.belongs_to(task):
            return ""
        if self.records is not None and self.records != task.records:
            return (
                f"not compared with {task.name}: the published test set has {self.records:,} records, "
                f"{task.name} has {task.records:,}"
            )
        content = f"SHA-256 {task.content[:16]}…" if task.content else "of unknown content"
        return f"not compared with {task.name}: its annotation file ({content}) is not known to be the published one"


@functools.cache
def published() -> tuple[Published, ...]:
    """All of published.json."""
    raw = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    found = []
    for entry in raw["figures"]:
        source, task = raw["sources"][entry["source"]], raw["tasks"][entry["task"]]
        values = {modality: value / 100 for modality, value in entry["values"].items()}
        found.append(
            Published(
                source["label"],
                source["cite"],
                source["how"],
                raw["groups"][task["kind"]],
                task["label"],
                task["metric"],
                task["kind"],
                re.compile(task["name"]),
                values,
                task.get("records"),
                frozenset(task.get("sha256", ())),
            )
        )
    return tuple(found)
