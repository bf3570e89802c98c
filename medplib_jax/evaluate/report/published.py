"""Figures measured elsewhere (published.json), and which task of a sweep each belongs to."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path

from medplib_jax.evaluate.report.sweep_load import Task


@dataclasses.dataclass(frozen=True)
class Published:
    """One source's figures on one task: `values` in [0, 1] by modality, as in a sweep's figures. `records`: of the published test set, if known."""

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

    @property
    def origin(self) -> str:
        return f"{self.label}: {self.cite}; {self.how}"

    def belongs_to(self, task: Task) -> bool:
        """By the task's name alone: whether it holds the same records, nobody knows but the user (see `caveat`)."""
        return task.kind == self.kind and self.name.search((task.part or task.name).lower()) is not None

    def caveat(self, task: Task) -> str:
        """What speaks against comparing; empty when the number of records is the same or not known."""
        if self.records is None or self.records == task.records:
            return ""
        return f"the published test set has {self.records:,} records, {task.name} has {task.records:,}: not the same"


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
            )
        )
    return tuple(found)
