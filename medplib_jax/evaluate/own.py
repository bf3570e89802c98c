"""Metrics of one's own: a function of (answer, truth, meta) in one's own file, found by its decorator.

    from medplib_jax.evaluate.own import metric

    @metric("share of answers that are no longer than the expected one")
    def brevity(answer, truth, meta):
        return len(answer.text) <= len(truth.text)

`python -m medplib_jax.evaluate ... --config.metrics=my_metrics.py` scores with it, and `python -m
medplib_jax.evaluate.rescore` scores what an old sweep has answered. The figure is the mean over the records for which
the function returns a number, with the intervals and tests of all others.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medplib_jax.data.rle import decode_rle
from medplib_jax.evaluate.evaluators.predictions import PredictionRow
from medplib_jax.evaluate.metrics.catalogue import METRICS, Metric
from medplib_jax.evaluate.metrics.summary import is_part
from medplib_jax.evaluate.result import MetricEntry

GROUP = "medplib_jax.metrics"  # of entry points: a decorated function, or a module with some
_SIDES = {"answer", "expected", "masks", "true_masks", "boxes", "true_boxes", "router"}


class MetricFailed(ValueError):
    """A metric of the user's cannot be used; the message says which, and on what record."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a record's line: the answer, or the truth."""

    row: PredictionRow
    text: str
    prefix: str = ""

    @functools.cached_property
    def masks(self) -> list[np.ndarray]:
        """bool [height, width] each; empty where nothing is drawn."""
        return [decode_rle(rle) for rle in self.row.get(f"{self.prefix}masks") or ()]

    @functools.cached_property
    def boxes(self) -> np.ndarray:
        """float64 [n, 4], x1 y1 x2 y2 in the text's units."""
        return np.array(self.row.get(f"{self.prefix}boxes") or (), float).reshape(-1, 4)


Function = Callable[[Side, Side, Mapping[str, Any]], float | bool | None]


@dataclasses.dataclass(frozen=True)
class OwnMetric:
    """A metric of the user's. `kinds`: of which kinds of tasks; empty for all."""

    name: str
    function: Function
    described: Metric
    kinds: tuple[str, ...] = ()

    def entry(self) -> MetricEntry:
        file = Path(inspect.getsourcefile(self.function) or "")
        source = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
        return MetricEntry(self.name, **dataclasses.asdict(self.described), file=file.name, content=source)

    def __call__(self, row: PredictionRow, place: Mapping[str, str]) -> float | None:
        """The score of one line. `place`: checkpoint, task, kind and protocol, which `meta` holds, too.

        MetricFailed for a function that fails or returns something else than a number, a truth value or None.
        """
        meta = {name: value for name, value in row.items() if name not in _SIDES} | dict(place)
        try:
            value = self.function(Side(row, row["answer"]), Side(row, row["expected"], "true_"), meta)
            value = value if value is None else float(value)
        except Exception as error:  # whatever a stranger's function raises
            raise MetricFailed(f"{self._where(row, place)}: {type(error).__name__}: {error}") from error
        if value is not None and not math.isfinite(value):
            raise MetricFailed(f"{self._where(row, place)}: expected a finite number or None, found {value}")
        return value

    def _where(self, row: PredictionRow, place: Mapping[str, str]) -> str:
        return f"metric {self.name} of {place['checkpoint']} on {place['task']}, record {row['record']}"


def metric(
    meaning: str, *, label: str = "", better: str = "higher", unit: str = "%", kinds: Sequence[str] = ()
) -> Callable[[Function], Function]:
    """Makes a metric of a function, under the function's name.

    meaning: what reports say of it. better: "higher" or "lower". unit: "%" for values in [0, 1], which are shown in
    percent; any other is shown as it is, "mm" for instance. kinds: of tasks, as "grounding"; all by default. ValueError
    for a name that a metric of the package has, or a score that its metrics are summed from.
    """
    if better not in ("higher", "lower"):
        raise ValueError(f"better: expected higher or lower, found {better!r}")

    def register(function: Function) -> Function:
        name = function.__name__
        if name in METRICS:
            raise ValueError(f"metric {name} is known already: {METRICS[name].meaning}; give yours another name")
        if is_part(name):
            raise ValueError(f"metric {name}: metrics of the package are summed from it; give yours another name")
        described = Metric(label or name.replace("_", " "), meaning, better, by_modality=True, unit=unit)
        vars(function)["own_metric"] = OwnMetric(name, function, described, tuple(kinds))
        return function

    return register


def load_metrics(sources: str) -> list[OwnMetric]:
    """The metrics of comma-separated files and names of installed entry points (group `medplib_jax.metrics`).

    ValueError for one that is not there, that cannot be run, that has none, or for two of one name.
    """
    found: dict[str, OwnMetric] = {}
    for source in filter(None, map(str.strip, sources.split(","))):
        objects = _of_file(Path(source)) if source.endswith(".py") else _of_entry_point(source)
        metrics = [one.own_metric for one in objects if isinstance(getattr(one, "own_metric", None), OwnMetric)]
        if not metrics:
            raise ValueError(f"{source}: no function with @metric(...) in it")
        for one in metrics:
            if found.setdefault(one.name, one) is not one:
                raise ValueError(f"{source}: two metrics are called {one.name}")
    return list(found.values())


def _of_file(path: Path) -> list[Any]:
    spec = importlib.util.spec_from_file_location(f"own_metrics_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"{path}: no such file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a stranger's file raises
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    return list(vars(module).values())


def _of_entry_point(name: str) -> list[Any]:
    points = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    if name not in points:
        there = f"installed are {', '.join(sorted(points))}" if points else "none is installed"
        raise ValueError(f"{name}: expected a file NAME.py or an entry point of {GROUP}, of which {there}")
    loaded = points[name].load()
    return list(vars(loaded).values()) if inspect.ismodule(loaded) else [loaded]
