"""What a run leaves to read: metrics.jsonl and its trackers, skipped records, and how well the time was used."""

import collections
import json
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.data.errors import DataError, Notice
from medplib_jax.train.trackers import TRACKERS, Tracker, check_installed

log = logging.getLogger("medplib_jax.train")

METRICS = "metrics.jsonl"
NUMBERS = ("loss", "ce", "dice", "bce", "focal", "iou", "aux", "grad_norm")  # what a message on a bad loss lists


class MetricWriter:
    """Appends {"step": ..., **metrics} lines to metrics.jsonl and tells `train.trackers` the same, of process 0 only.

    A line is on disk when `write` returns, scalars are with their trackers within seconds, and whenever the context
    ends. Lines of steps after `start_step`, which an interrupted run wrote after its last checkpoint, are removed by
    the first `write`, so that a run that fails before it changes nothing. ValueError for a tracker that is not
    installed.
    """

    def __init__(self, workdir: str, start_step: int, config: ExperimentConfig):
        check_installed(config.train.trackers)
        self._workdir, self._start_step, self._config = epath.Path(workdir), start_step, config
        self._trackers: list[Tracker] | None = None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        for tracker in self._trackers or ():
            tracker.close(failed=kind is not None)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if jax.process_index() > 0:
            return
        if self._trackers is None:
            self._trackers = self._begin()
        with (self._workdir / METRICS).open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for tracker in self._trackers:
            tracker.write(step, metrics)

    def _begin(self) -> list[Tracker]:
        kept = [json.dumps(row) for row in read_metrics(str(self._workdir)) if row["step"] <= self._start_step]
        partial = self._workdir / f"{METRICS}.partial"
        partial.write_text("".join(f"{line}\n" for line in kept))
        partial.replace(self._workdir / METRICS)
        names = self._config.train.trackers
        return [TRACKERS[name](str(self._workdir), self._start_step, self._config) for name in names]


def read_metrics(workdir: str) -> list[dict[str, float]]:
    """The rows of metrics.jsonl in order; a half-written last line is left out."""
    path = epath.Path(workdir) / METRICS
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


class LateMetrics:
    """Metrics of steps, which wait on the device until the next step is under way.

    Reading a metric waits for its step. Read a step late, it does not stop the device.
    """

    def __init__(self):
        self._waiting: collections.deque = collections.deque()

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """`metrics`: arrays on the device, or numbers."""
        self._waiting.append((step, metrics))

    def ready(self, keep: int) -> Iterator[tuple[int, dict[str, float]]]:
        """(step, metrics) of all but the newest `keep` steps, oldest first."""
        while len(self._waiting) > keep:
            step, metrics = self._waiting.popleft()
            yield step, {name: float(value) for name, value in jax.device_get(metrics).items()}


def check_finite(step: int, row: dict[str, float], records: Iterator[Any]) -> None:
    """FloatingPointError naming step, losses and records (read only then) when loss or gradient is not finite."""
    if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
        return
    terms = ", ".join(f"{name} {row[name]}" for name in NUMBERS)
    names = ", ".join(f"{record.file}[{record.index}]" for record in records)
    raise FloatingPointError(f"step {step}: not finite: {terms}; its batch holds the records {names}")


class SkippedRecords:
    """Names the records that could not be used, and the odd ones that were, in skipped.<process>.jsonl.

    `count` is the number of those that could not be used.
    """

    def __init__(self, workdir: str):
        self._path = epath.Path(workdir) / f"skipped.{jax.process_index()}.jsonl"
        self.count = 0

    def add(self, errors: list[DataError]) -> None:
        self.count += sum(not isinstance(error, Notice) for error in errors)
        if not errors:
            return
        with self._path.open("a") as file:
            for error in errors:
                log.warning("%s %s", "used" if isinstance(error, Notice) else "skipped", error)
                file.write(json.dumps(error.as_dict()) + "\n")


class Clock:
    """Seconds per step, and goodput: the share of the run's wall time in which it trained.

    Start-up, restoring, compiling and evaluation are the rest.
    """

    def __init__(self):
        self._begin = self._last = time.perf_counter()
        self._lost = 0.0

    def begin_training(self) -> None:
        """All time up to now was start-up."""
        self._last = time.perf_counter()
        self._lost = self._last - self._begin

    def lose(self, seconds: float) -> None:
        """Leaves these seconds (of compiling, of evaluation) out of the step's time and out of the goodput."""
        self._lost += seconds
        self._last += seconds

    def seconds_per_step(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed

    def goodput(self) -> float:
        return 1.0 - self._lost / (time.perf_counter() - self._begin)
