"""The tables of a sweep as the page and the Markdown show them: rows are checkpoints, columns tasks, metrics or modalities."""

import dataclasses
from collections.abc import Iterable, Sequence

from medplib_jax.evaluate.metrics.catalogue import BY_MODALITY, describe, in_order
from medplib_jax.evaluate.report.comparisons import ALL, MEAN, Figure
from medplib_jax.evaluate.report.published import Published, published
from medplib_jax.evaluate.report.sweep_load import Sweep, Task

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
class Entry:
    """One cell: percents as text. `mark` is "up", "down" or "" for a significant difference to the baseline, `best` the column's best."""

    sort: float
    value: str
    interval: str = ""
    delta: str = ""
    mark: str = ""
    best: bool = False
    hint: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """`entries` are the columns' cells, None where nothing was measured. `note` stands under the name."""

    name: str
    note: str
    entries: tuple[Entry | None, ...]
    run: str = ""
    baseline: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """`elsewhere` are rows of figures measured by others, `notes` say where they are from and what speaks against comparing."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    elsewhere: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def entry(figure: Figure, best: bool) -> Entry:
    lower_is_better = describe(figure.metric).better == "lower"
    interval = "" if figure.low is None else f"{percent(figure.low)}–{percent(figure.high)}"
    delta, mark = "", ""
    hint = [f"{figure.records:,} {'modalities' if figure.modality == MEAN else 'records'}"]
    if figure.delta is not None:
        delta = f"{100 * figure.delta:+.1f}" + ("*" if figure.significant else "")
        if figure.significant:
            mark = "up" if (figure.delta > 0) != lower_is_better else "down"
        hint.append(f"{100 * figure.delta:+.2f} to {figure.baseline} on {figure.paired:,} common records")
        if figure.delta_low is not None:
            hint.append(
                f"95 % interval of the difference {100 * figure.delta_low:+.2f} to {100 * figure.delta_high:+.2f}"
            )
        if figure.p is not None:
            hint.append(f"p {figure.p:.4f}, q {figure.q:.4f}")
    return Entry(figure.value, percent(figure.value), interval, delta, mark, best, "; ".join(hint))


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
        self._best: dict[tuple[str, str, str, str], float] = {}  # of each column
        self._seen: dict[tuple[str, str], dict[str, set[str]]] = {}  # protocols and modalities of each (task, metric)
        for (_, task, protocol, metric, modality), figure in self.figures.items():
            better = min if describe(metric).better == "lower" else max
            column = task, protocol, metric, modality
            self._best[column] = better(figure.value, self._best.get(column, figure.value))
            seen = self._seen.setdefault((task, metric), {"protocols": set(), "modalities": set()})
            seen["protocols"].add(protocol)
            seen["modalities"].add(modality)

    def overview(self) -> Table:
        """Checkpoints x tasks, each task by its main metric."""
        columns, keys = [], []
        for task, protocol, _ in self.sweep.columns:
            metric = self.main[task.name, protocol]
            for scope in (ALL, MEAN):
                columns.append(
                    Column(task.name, describe(metric).label, protocol, scope, task.name, describe(metric).meaning)
                )
                keys.append((task.name, protocol, metric, scope))
        return Table("Overview", tuple(columns), self._rows(keys))

    def metrics(self, task: Task) -> Table:
        """Checkpoints x every metric of one task, over all records."""
        keys = [
            (task.name, protocol, metric, ALL)
            for metric in self._metrics(task)
            for protocol in self._protocols(task, metric)
        ]
        columns = [
            Column(describe(metric).label, "", protocol, explained=describe(metric).meaning)
            for _, protocol, metric, _ in keys
        ]
        return Table("All metrics, all records", tuple(columns), self._rows(keys))

    def modalities(self, task: Task) -> list[Table]:
        """Checkpoints x modalities, one table for each of the metrics that are worth it, the main one first."""
        names = [metric for metric in self._metrics(task) if metric in BY_MODALITY]
        main = {self.main.get((task.name, protocol)) for protocol in self.sweep.protocols}
        names.sort(key=lambda metric: metric not in main)
        return [self._by_modality(task, metric) for metric in names]

    def _by_modality(self, task: Task, metric: str) -> Table:
        modalities = [ALL, MEAN, *sorted(self._seen[task.name, metric]["modalities"] - {ALL, MEAN})]
        keys = [
            (task.name, protocol, metric, modality)
            for modality in modalities
            for protocol in self._protocols(task, metric)
        ]
        columns = [Column(MODALITY_TITLES.get(modality, modality), "", protocol) for _, protocol, _, modality in keys]
        others = [figure for figure in published() if figure.metric == metric and figure.belongs_to(task)]
        notes = [*(figure.origin for figure in others), *(figure.caveat(task) for figure in others)]
        rows = tuple(self._elsewhere(figure, keys) for figure in others)
        return Table(
            describe(metric).label, tuple(columns), self._rows(keys), rows, tuple(dict.fromkeys(filter(None, notes)))
        )

    def beside_published(self) -> list[Table]:
        """One table per kind of task: the published figures, and over them those of this sweep's tasks of the same name."""
        return [
            self._beside([figure for figure in published() if figure.kind == kind])
            for kind in dict.fromkeys(figure.kind for figure in published())
        ]

    def _beside(self, figures: Sequence[Published]) -> Table:
        places = list(dict.fromkeys((figure.task, modality) for figure in figures for modality in figure.values))
        columns = [Column(task, MODALITY_TITLES.get(modality, modality), "") for task, modality in places]
        keys = []
        for task, modality in places:
            metric, ours = next((figure.metric, self._namesake(figure)) for figure in figures if figure.task == task)
            keys.append((ours.name if ours else "", self.nearest, metric, modality))
        sources: dict[str, dict[tuple[str, str], float]] = {}
        for figure in figures:
            sources.setdefault(figure.label, {}).update(
                {(figure.task, modality): value for modality, value in figure.values.items()}
            )
        elsewhere = [
            Row(
                label,
                "",
                tuple(Entry(values[place], percent(values[place], 2)) if place in values else None for place in places),
            )
            for label, values in sources.items()
        ]
        notes = [figure.origin for figure in figures]
        notes += [
            f"{figure.task}: {caveat}"
            for figure in figures
            if (ours := self._namesake(figure)) and (caveat := figure.caveat(ours))
        ]
        return Table(figures[0].group, tuple(columns), self._rows(keys), tuple(elsewhere), tuple(dict.fromkeys(notes)))

    def _namesake(self, figure: Published) -> Task | None:
        return next((task for task in self.sweep.tasks if figure.belongs_to(task)), None)

    def _elsewhere(self, figure: Published, keys) -> Row:
        values = [
            figure.values.get(modality) if protocol == self.nearest else None for _, protocol, _, modality in keys
        ]
        return Row(
            figure.label, "", tuple(None if value is None else Entry(value, percent(value, 2)) for value in values)
        )

    def _rows(self, keys: Iterable[tuple[str, str, str, str]]) -> tuple[Row, ...]:
        keys = list(keys)
        rows = []
        for checkpoint in self.sweep.checkpoints:
            figures = [self.figures.get((checkpoint.name, *key)) for key in keys]
            if not any(figures):
                continue
            entries = tuple(
                figure and entry(figure, figure.value == self._best[key])
                for figure, key in zip(figures, keys, strict=True)
            )
            steps = "" if checkpoint.step is None else f"step {checkpoint.step:,}"
            weights = f"{checkpoint.quantize} weights" if checkpoint.quantize else ""
            note = ", ".join(filter(None, [steps, checkpoint.kind if checkpoint.kind != "jax" else "", weights]))
            rows.append(Row(checkpoint.name, note, entries, checkpoint.run, checkpoint.name == self.sweep.baseline))
        return tuple(rows)

    def _metrics(self, task: Task) -> list[str]:
        return in_order([metric for name, metric in self._seen if name == task.name])

    def _protocols(self, task: Task, metric: str) -> list[str]:
        return [protocol for protocol in self.sweep.protocols if protocol in self._seen[task.name, metric]["protocols"]]
