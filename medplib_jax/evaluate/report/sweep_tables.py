"""The tables of a sweep as the page and the Markdown show them: rows are checkpoints, columns tasks, metrics or
modalities.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from medplib_jax.evaluate.metrics.catalogue import describe, in_order
from medplib_jax.evaluate.report.comparisons import ALL, MEAN, Figure
from medplib_jax.evaluate.report.published import Published, published
from medplib_jax.evaluate.report.sweep_load import STRUCTURE, Sweep
from medplib_jax.evaluate.result import TaskEntry

EIGHT_BITS = {
    "int8": "int8 weights",
    "kv": "int8 KV cache",
    "int8+kv": "int8 weights and KV cache",
    "w8a8": "int8 weights and activations",
    "w8a8+kv": "int8 weights, activations and KV cache",
}
REWARD_SILENCE = ("no_target_accuracy", "false_mask_rate", "existence_specificity", "gIoU")
MODALITY_TITLES = {ALL: "all records", MEAN: "mean over modalities"}


@dataclasses.dataclass(frozen=True)
class Column:
    """`scope` is "all" or "modality_mean" in the overview, where one of the two is shown, else empty."""

    title: str
    metric: str
    protocol: str
    scope: str = ""
    task: str = ""
    explained: str = ""


@dataclasses.dataclass(frozen=True)
class TableEntry:
    """One cell: percents as text.

    `mark` is "up", "down" or "" for a significant difference to the baseline, `best` the column's best.
    """

    sort: float
    value: str
    interval: str = ""
    delta: str = ""
    mark: str = ""
    best: bool = False
    hint: str = ""


@dataclasses.dataclass(frozen=True)
class TableRow:
    """`entries` are the columns' cells, None where nothing was measured. `note` stands under the name."""

    name: str
    note: str
    entries: tuple[TableEntry | None, ...]
    run: str = ""
    baseline: bool = False


@dataclasses.dataclass(frozen=True)
class ReportTable:
    """`elsewhere` are rows of figures measured by others, `notes` say where they are from and what speaks against
    comparing.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    elsewhere: tuple[TableRow, ...] = ()
    notes: tuple[str, ...] = ()
    counts: TableRow | None = None  # how many records, pictures and patients each column is about
    naive: tuple[TableRow, ...] = ()  # answers without a model


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def counts_of(figure: Figure) -> str:
    """What a figure is about, in words."""
    records = f"{figure.records:,} {'modalities' if figure.modality == MEAN else 'records'}"
    patients = "patients not known" if figure.patients is None else f"{figure.patients:,} patients"
    return f"{records}, {figure.images:,} pictures, {patients}"


def entry(figure: Figure, best: bool) -> TableEntry:
    metric = describe(figure.metric)
    lower_is_better = metric.better == "lower"
    interval = ""
    if figure.low is not None and figure.high is not None:
        interval = f"{metric.show(figure.low)}–{metric.show(figure.high)}"
    delta, mark = "", ""
    hint = [counts_of(figure)]
    if figure.delta is not None:
        delta = metric.show(figure.delta, sign="+") + ("*" if figure.significant else "")
        if figure.significant:
            mark = "up" if (figure.delta > 0) != lower_is_better else "down"
        hint.append(f"{metric.show(figure.delta, 2, '+')} to {figure.baseline} on {figure.paired:,} common records")
        if figure.delta_low is not None and figure.delta_high is not None:
            hint.append(
                f"95 % interval of the difference {metric.show(figure.delta_low, 2, '+')} to "
                f"{metric.show(figure.delta_high, 2, '+')}"
            )
        if figure.p is not None:
            hint.append(f"p {figure.p:.4f}, q {figure.q:.4f}")
    return TableEntry(figure.value, metric.show(figure.value), interval, delta, mark, best, "; ".join(hint))


def best_of(figures: Sequence[Figure], drawing: set[tuple[str, str]], naive: Sequence[Figure] = ()) -> str | None:
    """The checkpoint whose figure is the best of a column; None where that means nothing.

    That is where there is nothing to compare, where several share the best value, and where the best of a metric to
    maximise is 0. A model that never draws a mask draws no false one: where metrics reward that, only checkpoints that
    draw some (`drawing`, pairs with their protocol) can be the best. For other metrics the best has to be better than
    each answer without a model (`naive`).
    """
    lower_is_better = describe(figures[0].metric).better == "lower"
    if figures[0].metric in REWARD_SILENCE:
        figures = [figure for figure in figures if (figure.checkpoint, figure.protocol) in drawing]
    if len(figures) < 2:
        return None
    ordered = sorted(figures, key=lambda figure: figure.value, reverse=not lower_is_better)
    best, second = ordered[:2]
    is_nothing = best.value == 0 and not lower_is_better
    if figures[0].metric not in REWARD_SILENCE:
        sign = -1 if lower_is_better else 1
        is_nothing |= any(sign * one.value >= sign * best.value for one in naive)
    return None if is_nothing or best.value == second.value else best.checkpoint


class Tables:
    """Builds the tables of one sweep from its figures."""

    def __init__(self, sweep: Sweep, figures: Sequence[Figure]):
        self.sweep = sweep
        self.figures = {
            (figure.checkpoint, figure.task, figure.protocol, figure.metric, figure.modality): figure
            for figure in figures
        }
        self.nearest = "reference" if "reference" in sweep.protocols else "exact"  # under which figures of others stand
        self.main = {(figure.task, figure.protocol): figure.metric for figure in figures if figure.main}
        self._seen: dict[tuple[str, str], dict[str, set[str]]] = {}  # protocols and modalities of each (task, metric)
        columns: dict[tuple[str, str, str, str], list[Figure]] = {}
        naive: dict[tuple[str, str, str, str], list[Figure]] = {}
        for (_, task, protocol, metric, modality), figure in self.figures.items():
            of = naive if figure.checkpoint in sweep.naive else columns
            of.setdefault((task, protocol, metric, modality), []).append(figure)
            seen = self._seen.setdefault((task, metric), {"protocols": set(), "modalities": set()})
            seen["protocols"].add(protocol)
            seen["modalities"].add(modality)
        drawing = {
            (figure.checkpoint, figure.protocol)
            for figure in figures
            if figure.metric == "hit_rate" and figure.value > 0
        }
        self._best = {  # the checkpoint's name
            column: best_of(found, drawing, naive.get(column, ())) for column, found in columns.items()
        }

    def is_best(self, figure: Figure) -> bool:
        """Whether it is the best of its column in a sense that means something (`best_of`)."""
        best = self._best.get((figure.task, figure.protocol, figure.metric, figure.modality))
        return best == figure.checkpoint

    def overview(self) -> ReportTable:
        """Checkpoints x tasks, each task by its main metric."""
        columns, keys = [], []
        for task, protocol, _ in self.sweep.columns:
            metric = self.main[task.name, protocol]
            for scope in (ALL, MEAN):
                columns.append(
                    Column(task.name, describe(metric).title, protocol, scope, task.name, describe(metric).meaning)
                )
                keys.append((task.name, protocol, metric, scope))
        return ReportTable(
            "Overview", tuple(columns), self._rows(keys), counts=self._counts(keys), naive=self._rows(keys, True)
        )

    def metrics(self, task: TaskEntry) -> ReportTable:
        """Checkpoints x every metric of one task, over all records."""
        keys = [
            (task.name, protocol, metric, ALL)
            for metric in self._metrics(task)
            for protocol in self._protocols(task, metric)
        ]
        columns = [
            Column(describe(metric).title, "", protocol, explained=describe(metric).meaning)
            for _, protocol, metric, _ in keys
        ]
        return ReportTable(
            "All metrics, all records",
            tuple(columns),
            self._rows(keys),
            counts=self._counts(keys),
            naive=self._rows(keys, True),
        )

    def modalities(self, task: TaskEntry) -> list[ReportTable]:
        """Checkpoints x modalities, one table for each of the metrics that are worth it, the main one first."""
        names = [metric for metric in self._metrics(task) if describe(metric).by_modality]
        main = {self.main.get((task.name, protocol)) for protocol in self.sweep.protocols}
        names.sort(key=lambda metric: metric not in main)
        return [self._by_modality(task, metric) for metric in names]

    def structures(self, task: TaskEntry) -> ReportTable | None:
        """Checkpoints x what is asked about, of the main metric; None where no record says it."""
        for metric in self._metrics(task):
            named = sorted(name for name in self._seen[task.name, metric]["modalities"] if name.startswith(STRUCTURE))
            if named and metric in {self.main.get((task.name, protocol)) for protocol in self.sweep.protocols}:
                return self._by_part(task, metric, named)
        return None

    def _by_modality(self, task: TaskEntry, metric: str) -> ReportTable:
        seen = self._seen[task.name, metric]["modalities"] - {ALL, MEAN}
        modalities = [ALL, MEAN, *sorted(name for name in seen if not name.startswith(STRUCTURE))]
        return self._by_part(task, metric, modalities)

    def _by_part(self, task: TaskEntry, metric: str, modalities: Sequence[str]) -> ReportTable:
        keys = [
            (task.name, protocol, metric, modality)
            for modality in modalities
            for protocol in self._protocols(task, metric)
        ]
        columns = [
            Column(MODALITY_TITLES.get(modality, modality.removeprefix(STRUCTURE)), "", protocol)
            for _, protocol, _, modality in keys
        ]
        named = [figure for figure in published() if figure.metric == metric and figure.bears_name_of(task)]
        others = [figure for figure in named if figure.belongs_to(task)]
        notes = [*(figure.origin for figure in others), *(f"{one.label}: {one.caveat(task)}" for one in named)]
        return ReportTable(
            describe(metric).title,
            tuple(columns),
            self._rows(keys),
            tuple(self._elsewhere(figure, keys) for figure in others),
            tuple(dict.fromkeys(note for note in notes if not note.endswith(": "))),
            self._counts(keys),
            self._rows(keys, True),
        )

    def beside_published(self) -> list[ReportTable]:
        """One table per kind of task: the published figures, and over them those of this sweep's checkpoints on the
        published test sets.
        """
        return [
            self._beside([figure for figure in published() if figure.kind == kind])
            for kind in dict.fromkeys(figure.kind for figure in published())
        ]

    def _beside(self, figures: Sequence[Published]) -> ReportTable:
        places = list(dict.fromkeys((figure.task, modality) for figure in figures for modality in figure.values))
        columns = [Column(task, MODALITY_TITLES.get(modality, modality), "") for task, modality in places]
        keys = []
        for task, modality in places:
            metric, ours = next((figure.metric, self._same_data(figure)) for figure in figures if figure.task == task)
            keys.append((ours.name if ours else "", self.nearest, metric, modality))
        sources: dict[str, dict[tuple[str, str], float]] = {}
        for figure in figures:
            sources.setdefault(figure.label, {}).update(
                {(figure.task, modality): value for modality, value in figure.values.items()}
            )
        elsewhere = [
            TableRow(
                label,
                "",
                tuple(
                    TableEntry(values[place], percent(values[place], 2)) if place in values else None
                    for place in places
                ),
            )
            for label, values in sources.items()
        ]
        notes = [figure.origin for figure in figures]
        notes += [
            f"{figure.task}: {figure.caveat(task)}"
            for figure in figures
            for task in self.sweep.tasks
            if figure.bears_name_of(task) and not figure.belongs_to(task)
        ]
        return ReportTable(
            figures[0].group, tuple(columns), self._rows(keys), tuple(elsewhere), tuple(dict.fromkeys(notes))
        )

    def _same_data(self, figure: Published) -> TaskEntry | None:
        return next((task for task in self.sweep.tasks if figure.belongs_to(task)), None)

    def _elsewhere(self, figure: Published, keys) -> TableRow:
        values = [
            figure.values.get(modality) if protocol == self.nearest else None for _, protocol, _, modality in keys
        ]
        return TableRow(
            figure.label, "", tuple(None if value is None else TableEntry(value, percent(value, 2)) for value in values)
        )

    def _rows(self, keys: Iterable[tuple[str, str, str, str]], naive: bool = False) -> tuple[TableRow, ...]:
        """A row for each checkpoint that has a figure; `naive`: for each way of answering without a model instead."""
        keys = list(keys)
        rows = []
        for checkpoint in self.sweep.checkpoints:
            if (checkpoint.name in self.sweep.naive) != naive:
                continue
            figures = [self.figures.get((checkpoint.name, *key)) for key in keys]
            if not any(figures):
                continue
            entries = tuple(figure and entry(figure, self.is_best(figure)) for figure in figures)
            steps = "" if checkpoint.step is None else f"step {checkpoint.step:,}"
            weights = EIGHT_BITS.get(checkpoint.quantize, "")
            note = ", ".join(
                filter(
                    None,
                    [
                        steps,
                        checkpoint.kind if checkpoint.kind == "torch" else "",
                        "no model" if naive else "",
                        weights,
                    ],
                )
            )
            rows.append(
                TableRow(checkpoint.name, note, entries, checkpoint.run, checkpoint.name == self.sweep.baseline)
            )
        return tuple(rows)

    def _counts(self, keys: Sequence[tuple[str, str, str, str]]) -> TableRow:
        """How many records, pictures and patients each column is about; several where checkpoints differ in that."""
        entries = []
        for key in keys:
            figures = [self.figures.get((checkpoint.name, *key)) for checkpoint in self.sweep.checkpoints]
            found = {
                (figure.records, figure.images, figure.patients): counts_of(figure) for figure in figures if figure
            }
            texts = ["/".join("?" if count is None else f"{count:,}" for count in counts) for counts in found]
            most = max((records for records, *_ in found), default=0)
            entries.append(TableEntry(most, " or ".join(texts), hint="; ".join(found.values())) if found else None)
        return TableRow("records/pictures/patients", "", tuple(entries))

    def _metrics(self, task: TaskEntry) -> list[str]:
        return in_order([metric for name, metric in self._seen if name == task.name])

    def _protocols(self, task: TaskEntry, metric: str) -> list[str]:
        return [protocol for protocol in self.sweep.protocols if protocol in self._seen[task.name, metric]["protocols"]]
