"""The figures of a sweep, one flat row each: value, interval, and the difference to the baseline with its test."""

import csv
import dataclasses
import io
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import false_discovery_control
from tqdm import tqdm

from medplib_jax.evaluate.kinds import find_kind
from medplib_jax.evaluate.metrics import Statistic, values
from medplib_jax.evaluate.metrics.catalogue import describe, in_order, main_metric
from medplib_jax.evaluate.metrics.resampling import bootstrap, grouped, intervals, paired_p_values
from medplib_jax.evaluate.report.sweep_load import STRUCTURE, ScoredCell, Sweep
from medplib_jax.evaluate.result import TaskEntry

ALL, MEAN = "all", "modality_mean"  # beside the modalities' names
# What each field of a figure means, in report.json, too.
FIELDS = {
    "checkpoint": "name of the checkpoint",
    "run": "the training run that it belongs to",
    "step": "its training step, or null",
    "task": "name of the task (annotation file)",
    "kind": "grounding, region, vqa, refer_box or another of evaluate/kinds",
    "protocol": "exact or reference: how the questions were asked and the answers scored",
    "metric": "name of the metric, see `metrics`",
    "main": "whether this metric stands for the task in the overview",
    "modality": f"{ALL}: over all records; {MEAN}: mean over modalities; else of that modality alone, or "
    f"of what is asked about ({STRUCTURE}NAME)",
    "value": "the metric, in [0, 1] or in its unit, see `metrics`",
    "low": "lower end of its 95 % bootstrap interval (patients resampled where they are known, else images), or null "
    "where there is only one",
    "high": "upper end",
    "records": "how many records count in it (modality_mean: how many modalities)",
    "images": "how many pictures (or sets of them) these records are about",
    "patients": "of how many patients, or null where they are not known",
    "baseline": "the checkpoint compared with, or null",
    "delta": "value minus the baseline's, both on the records that both have",
    "delta_low": "lower end of its 95 % bootstrap interval (the same ones resampled for both)",
    "delta_high": "upper end",
    "paired": "how many records both have",
    "p": "two-sided p of a permutation test that exchanges the two answers patient by patient (image by image where "
    "they are not known): of all metrics over all records, of main metrics by modality, too",
    "q": "p after Benjamini and Hochberg (false discovery rate) over all tests of its family in this report: the main "
    "metrics of the protocol over all records, its other metrics, and those by modality",
}


@dataclasses.dataclass
class Figure:
    """One number of the report, see FIELDS."""

    checkpoint: str
    run: str
    step: int | None
    task: str
    kind: str
    protocol: str
    metric: str
    main: bool
    modality: str
    value: float
    low: float | None
    high: float | None
    records: int
    images: int
    patients: int | None
    baseline: str | None = None
    delta: float | None = None
    delta_low: float | None = None
    delta_high: float | None = None
    paired: int | None = None
    p: float | None = None
    q: float | None = None

    @property
    def key(self) -> "Key":
        return self.metric, self.modality

    @property
    def family(self) -> tuple[str, str]:
        """Which tests are corrected together."""
        return self.protocol, "modality" if self.modality != ALL else "main" if self.main else "other"

    @property
    def significant(self) -> bool:
        return self.q is not None and self.q < 0.05

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIELDS}


def compare(sweep: Sweep) -> list[Figure]:
    """Every figure of a sweep.

    The same folder always gives the same figures: seeds follow from the names of task and protocol.
    """
    figures = []
    for task, protocol, cells in tqdm(sweep.columns, desc="comparing", unit="task"):
        figures += _Column(sweep, task, protocol, cells).figures()
    families: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        if figure.p is not None:
            families.setdefault(figure.family, []).append(figure)
    for tested in families.values():
        for figure, q in zip(tested, false_discovery_control([figure.p for figure in tested]), strict=True):
            figure.q = float(q)
    return figures


def to_csv(figures: Sequence[Figure]) -> str:
    """One line per figure, its fields as in report.json, unrounded."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(FIELDS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(figure.as_dict() for figure in figures)
    return file.getvalue()


Key = tuple[str, str]  # (metric, modality)


@dataclasses.dataclass(frozen=True)
class Count:
    """What a figure counts. `groups`: what is resampled, patients where they are known, else images."""

    records: int
    images: int
    patients: int | None
    groups: int

    @classmethod
    def of(cls, cell: ScoredCell, rows: np.ndarray) -> "Count":
        images, groups, patients = (
            {values[row] for row in rows} for values in (cell.images, cell.groups, cell.patients)
        )
        return cls(len(rows), len(images), None if "" in patients else len(patients), len(groups))


class _Column:
    """The checkpoints' answers to one task under one protocol, summed up image by image over the union of their
    records.
    """

    def __init__(self, sweep: Sweep, task: TaskEntry, protocol: str, cells: Sequence[ScoredCell]):
        self.task, self.protocol, self.cells = task, protocol, cells
        self.checkpoints = {checkpoint.name: checkpoint for checkpoint in sweep.checkpoints}
        self.baseline = next((cell for cell in cells if cell.checkpoint == sweep.baseline), None)
        self.naive = sweep.naive  # beside which the others stand; no question that a test answers
        self.seed = zlib.crc32(f"{task.name}/{protocol}".encode())
        names = in_order({name for cell in cells for name in values(cell.statistics)})
        self.main = main_metric(names, find_kind(task.kind, task.part).main)
        groups = {ALL: sorted({group for cell in cells for group in cell.groups})}
        for cell in cells:
            for part in cell.parts:
                groups.setdefault(part, []).extend(cell.groups[n] for n in np.flatnonzero(cell.part(part)))
        self.group_of = {group: number for number, group in enumerate(groups[ALL])}
        self.members = {
            modality: np.unique([self.group_of[group] for group in groups[modality]])
            for modality in (ALL, *sorted(groups.keys() - {ALL}))
        }
        self.modalities = [name for name in self.members if name != ALL and not name.startswith(STRUCTURE)]

    def figures(self) -> list[Figure]:
        measured = {cell.checkpoint: self._measure(cell) for cell in self.cells}
        resampled = self._resample(measured)
        figures = []
        for cell in self.cells:
            checkpoint, found = self.checkpoints[cell.checkpoint], self._values(measured[cell.checkpoint])
            counted = self._counted(cell)
            spread = intervals(np.stack([resampled[cell.checkpoint][key] for key in found], axis=1))
            for (key, value), (low, high) in zip(found.items(), spread.T.tolist(), strict=True):
                count = counted[key]
                low, high = (low, high) if count.groups > 1 else (np.nan, np.nan)
                figures.append(
                    Figure(
                        checkpoint.name,
                        checkpoint.run,
                        checkpoint.step,
                        self.task.name,
                        self.task.kind,
                        self.protocol,
                        key[0],
                        key[0] == self.main,
                        key[1],
                        value,
                        _known(low),
                        _known(high),
                        count.records,
                        count.images,
                        count.patients,
                    )
                )
        if self.baseline is not None:
            self._add_deltas(self.baseline, figures, measured, resampled)
        return figures

    @staticmethod
    def _tested(figure: Figure) -> bool:
        return figure.modality == ALL or (figure.main and figure.modality != MEAN)

    def _measure(self, cell: ScoredCell, records: np.ndarray | None = None) -> dict[Key, Statistic]:
        """Statistics by group (patient or image), of all and of each modality; those that count nothing are left out.

        records: bool [N], only of these rows.
        """
        group_N = np.array([self.group_of[group] for group in cell.groups])
        chosen_N = np.ones(len(group_N), bool) if records is None else records
        measured = {}
        for modality, members in self.members.items():
            rows = chosen_N if modality == ALL else chosen_N & cell.part(modality)
            for name in in_order(cell.statistics):
                if modality.startswith(STRUCTURE) and not describe(name).by_modality:
                    continue
                by_group = grouped(cell.statistics[name][rows], group_N[rows], len(self.group_of))
                measured[name, modality] = by_group[members]
        return {key: statistic for key, statistic in measured.items() if not np.isnan(statistic.value())}

    def _counted(self, cell: ScoredCell) -> dict[Key, "Count"]:
        """What counts in each figure; in a mean over modalities `records` are the modalities."""
        counted, known = {}, {}  # most metrics count the same rows
        for name, statistic in cell.statistics.items():
            weighs_N = statistic.parts[:, -1] != 0  # the last part is a weight
            for modality in self.members:
                rows = weighs_N if modality == ALL else weighs_N & cell.part(modality)
                pattern = rows.tobytes()
                known[pattern] = known.get(pattern) or Count.of(cell, np.flatnonzero(rows))
                counted[name, modality] = known[pattern]
            each = [counted[name, modality].records for modality in self.modalities]
            counted[name, MEAN] = dataclasses.replace(counted[name, ALL], records=sum(count > 0 for count in each))
        return counted

    def _values(self, measured: Mapping[Key, Statistic]) -> dict[Key, float]:
        """The value of every statistic, and the means over modalities."""
        found = {key: statistic.value() for key, statistic in measured.items()}
        for metric, at_least in [
            (metric, statistic.modalities) for (metric, modality), statistic in measured.items() if modality == ALL
        ]:
            each = [found[metric, name] for name in self.modalities if (metric, name) in found]
            found[metric, MEAN] = sum(each) / max(len(each), at_least)
        return found

    def _resample(self, measured: Mapping[str, Mapping[Key, Statistic]]) -> dict[str, dict[Key, np.ndarray]]:
        """Bootstrap values [R] of every figure of every checkpoint; one draw of images for all of them."""
        keys = [
            [(name, key) for name, found in measured.items() for key in found if key[1] == modality]
            for modality in self.members
        ]
        keys = [block for block in keys if block]
        blocks = [(self.members[block[0][1][1]], [measured[name][key] for name, key in block]) for block in keys]
        resampled: dict[str, dict[Key, np.ndarray]] = {name: {} for name in measured}
        for block, values_RxN in zip(keys, bootstrap(blocks, len(self.group_of), self.seed), strict=True):
            for (name, key), values_R in zip(block, values_RxN.T, strict=True):
                resampled[name][key] = values_R
        for name, found in measured.items():
            for metric, at_least in [
                (metric, statistic.modalities) for (metric, modality), statistic in found.items() if modality == ALL
            ]:
                each = np.stack(
                    [resampled[name][metric, modality] for modality in self.modalities if (metric, modality) in found]
                )
                resampled[name][metric, MEAN] = np.nansum(each, axis=0) / np.maximum(
                    (~np.isnan(each)).sum(0), max(at_least, 1)
                )
        return resampled

    def _add_deltas(self, base: ScoredCell, figures: list[Figure], measured, resampled) -> None:
        """Differences to the baseline on the records that both have.

        Both are measured anew where one lacks a record of the other.
        """
        tests: dict[str, list[tuple[Figure, tuple[Statistic, Statistic]]]] = {modality: [] for modality in self.members}
        for cell in self.cells:
            if cell is base:
                continue
            pair, draws = (measured[cell.checkpoint], measured[base.checkpoint]), resampled
            common = np.intersect1d(cell.records, base.records)
            if not len(cell.records) == len(common) == len(base.records):
                pair = tuple(self._measure(one, np.isin(one.records, common)) for one in (cell, base))
                draws = self._resample(dict(zip((cell.checkpoint, base.checkpoint), pair, strict=True)))
            ours, theirs = (self._values(found) for found in pair)
            shown = [
                figure
                for figure in figures
                if figure.checkpoint == cell.checkpoint and figure.key in ours and figure.key in theirs
            ]
            spread = intervals(
                np.stack(
                    [draws[cell.checkpoint][figure.key] - draws[base.checkpoint][figure.key] for figure in shown],
                    axis=1,
                )
            )
            for figure, (low, high) in zip(shown, spread.T.tolist(), strict=True):
                figure.baseline, figure.paired, figure.delta = (
                    base.checkpoint,
                    len(common),
                    ours[figure.key] - theirs[figure.key],
                )
                figure.delta_low, figure.delta_high = _known(low), _known(high)
                if cell.checkpoint not in self.naive and self._tested(figure):
                    tests[figure.modality].append((figure, (pair[0][figure.key], pair[1][figure.key])))
        tests = {modality: found for modality, found in tests.items() if found}
        blocks = [(self.members[modality], [pair for _, pair in found]) for modality, found in tests.items()]
        for found, p_values in zip(
            tests.values(), paired_p_values(blocks, len(self.group_of), self.seed + 1), strict=True
        ):
            for (figure, _), p in zip(found, p_values, strict=True):
                figure.p = p


def _known(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if np.isnan(value) else value
