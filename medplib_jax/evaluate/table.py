"""A sweep's figures as a table for a paper: CSV, LaTeX (booktabs) or Markdown.

COMMAND
    python -m medplib_jax.evaluate.table --workdir runs/sweep --tasks 'MeCoVQA*' --metrics mDice,mIoU --format latex

Rows are checkpoints, columns are tasks, metrics and modalities, with their 95 % intervals. The CSV has one
line per figure with all that report.json knows of it, unrounded. `--seeds` makes one row of the checkpoints whose names
differ in nothing but what a pattern finds, for instance `--seeds='-seed\\d+'`: the mean over them and its standard
deviation.
"""

import argparse
import fnmatch
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from medplib_jax.evaluate.metrics.catalogue import describe, in_order
from medplib_jax.evaluate.report.comparisons import ALL, MEAN, Figure, compare, to_csv
from medplib_jax.evaluate.report.pictures import DRAWINGS
from medplib_jax.evaluate.report.sweep_load import Sweep, load_sweep
from medplib_jax.evaluate.report.sweep_tables import MODALITY_TITLES, Tables, counts_of, entry

_LATEX = {char: f"\\{char}" for char in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "²": r"\textsuperscript{2}",
}


def select(
    figures: Sequence[Figure], *, tasks: str, metrics: str, checkpoints: str, protocol: str, modality: str
) -> list[Figure]:
    """The figures of comma-separated patterns of names; metrics empty: the main metric of each task.

    ValueError when there is none, with the names that there are.
    """

    def wanted(name: str, patterns: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern.strip()) for pattern in patterns.split(","))

    found = [
        figure
        for figure in figures
        if wanted(figure.task, tasks)
        and wanted(figure.checkpoint, checkpoints)
        and (wanted(figure.metric, metrics) if metrics else figure.main)
        and figure.protocol == protocol
        and wanted(figure.modality, modality)
    ]
    if not found:
        there = {
            name: sorted({getattr(figure, name) for figure in figures})
            for name in ("task", "metric", "checkpoint", "protocol", "modality")
        }
        raise ValueError(f"no figure is selected; there are {there}")
    return found


COLUMNS = 12  # of a tabular; TeX itself ends at 256
Place = tuple[str, str, str]  # task, metric and modality of a column


class PaperTable:
    """Rows (checkpoints, or groups of seeds) and columns (task, metric, modality) of figures of one protocol."""

    def __init__(self, sweep: Sweep, tables: Tables, figures: Sequence[Figure], seeds: str = ""):
        self._tables, self._seeds, self._baseline = tables, seeds, sweep.baseline
        self.columns: list[Place] = []
        for task in sweep.tasks:
            found = {(one.metric, one.modality) for one in figures if one.task == task.name}
            modalities = sorted({name for _, name in found}, key=lambda name: (name != ALL, name != MEAN, name))
            for metric in in_order({name for name, _ in found}):
                self.columns += [(task.name, metric, name) for name in modalities if (metric, name) in found]
        self._many = len({modality for *_, modality in self.columns}) > 1
        self._figures = {(one.checkpoint, one.task, one.metric, one.modality): one for one in figures}
        named = {figure.checkpoint for figure in figures}
        self.rows: dict[str, list[str]] = {}  # name: its checkpoints
        for name in (checkpoint.name for checkpoint in sweep.checkpoints):
            if name in named:
                self.rows.setdefault(re.sub(seeds, "", name) if seeds else name, []).append(name)
        self.notes = self._notes(sweep)

    def _notes(self, sweep: Sweep) -> list[str]:
        """What the figures are about, a line for each task."""
        drawn = {task.name for task in sweep.tasks if task.generated}
        notes = [
            "Percent where no unit is named, with 95 % bootstrap intervals (patients resampled where they are known, "
            "else images)."
        ]
        if self._seeds:
            notes = ["Percent where no unit is named: mean over seeds and their deviation; in brackets how many seeds."]
        if sweep.baseline and not self._seeds:
            notes.append(
                f"*: differs from {sweep.baseline}, false discovery rate below 5 % (paired permutation tests, "
                "Benjamini and Hochberg)."
            )
        if guesses := ", ".join(name for name in self.rows if name in sweep.naive):
            notes.append(f"Answers without a model: {guesses}.")
        for task in dict.fromkeys(task for task, *_ in self.columns):
            notes.append(f"{task}: {self._counts(task)}.{f' {DRAWINGS}' if task in drawn else ''}")
        return notes

    def _counts(self, task: str) -> str:
        """What a task's figures are about; metric by metric where these differ."""
        of_metrics: dict[str, list[str]] = {}
        for metric in dict.fromkeys(metric for name, metric, _ in self.columns if name == task):
            figures = (one for one in self._figures.values() if (one.task, one.metric) == (task, metric))
            counts = " or ".join(dict.fromkeys(map(counts_of, figures)))
            of_metrics.setdefault(counts, []).append(describe(metric).title)
        if len(of_metrics) == 1:
            return next(iter(of_metrics))
        return "; ".join(f"{', '.join(titles)}: {counts}" for counts, titles in of_metrics.items())

    def title(self, place: Place) -> str:
        _, metric, modality = place
        titles = [describe(metric).title, MODALITY_TITLES.get(modality, modality)] if self._many else []
        return ", ".join(titles) or describe(metric).title

    def cells(self, row: str) -> list[tuple[str, str, bool]]:
        """(value, interval or deviation, whether it is the best of its column) of a row, dashes where nothing is."""
        return [self._cell([self._figures.get((name, *place)) for name in self.rows[row]]) for place in self.columns]

    def _cell(self, figures: Sequence[Figure | None]) -> tuple[str, str, bool]:
        known = [figure for figure in figures if figure]
        if not known:
            return "–", "", False
        if not self._seeds:
            shown = entry(known[0], self._tables.is_best(known[0]))
            return shown.value + ("*" if known[0].significant else ""), shown.interval, shown.best
        values, metric = [figure.value for figure in known], describe(known[0].metric)
        spread = f" ± {metric.show(statistics.stdev(values))}" if len(values) > 1 else ""
        return metric.show(statistics.fmean(values)) + spread, str(len(values)), False

    def to_markdown(self) -> str:
        names = [f"{place[0]} {self.title(place)}" for place in self.columns]
        rows = [["checkpoint", *names], ["---", *["---:"] * len(names)]]
        for checkpoint in self.rows:
            cells = [
                (f"**{value}**" if best else value.replace("*", r"\*")) + (f" ({interval})" if interval else "")
                for value, interval, best in self.cells(checkpoint)
            ]
            rows.append([checkpoint, *cells])
        lines = ["| " + " | ".join(text.replace("|", "/") for text in row) + " |" for row in rows]
        return "\n".join([*lines, "", *self.notes]) + "\n"

    def to_latex(self) -> str:
        """A tabular of the package booktabs, several below each other where there are more than COLUMNS columns; the
        notes stand below as comments.
        """
        parts = [self._tabular(range(start, end)) for start, end in _spans(len(self.columns))]
        return "\n\n".join(parts) + "\n" + "".join(f"% {note}\n" for note in self.notes)

    def _tabular(self, places: range) -> str:
        columns = [self.columns[place] for place in places]
        tasks = list(dict.fromkeys(task for task, *_ in columns))
        widths = [sum(task == name for name, *_ in columns) for task in tasks]
        ends = [1 + sum(widths[: i + 1]) for i in range(len(widths))]
        spans = zip(tasks, widths, strict=True)
        heads = [rf"\multicolumn{{{width}}}{{c}}{{{escape(task)}}}" for task, width in spans]
        rules = [rf"\cmidrule(lr){{{end - width + 1}-{end}}}" for end, width in zip(ends, widths, strict=True)]
        titles = ["Checkpoint", *(escape(self.title(place)) for place in columns)]
        cells = {name: self.cells(name) for name in self.rows}
        body = [[escape(name), *(_latex_cell(*row[place]) for place in places)] for name, row in cells.items()]
        lines = [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule", _latex_row(["", *heads]), "".join(rules)]
        lines += [_latex_row(titles), r"\midrule", *map(_latex_row, body), r"\bottomrule", r"\end{tabular}"]
        return "\n".join(lines)


def _spans(count: int) -> list[tuple[int, int]]:
    return [(start, min(start + COLUMNS, count)) for start in range(0, count, COLUMNS)]


def escape(text: str) -> str:
    """A name as LaTeX shows it."""
    return "".join(_LATEX.get(char, char) for char in text)


def _latex_cell(value: str, interval: str, best: bool) -> str:
    shown = value.replace("–", "--").replace("±", r"$\pm$").replace("*", r"$^{*}$")
    shown = rf"\textbf{{{shown}}}" if best else shown
    return shown + (rf" {{\scriptsize ({interval.replace('–', '--')})}}" if interval else "")


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def make_table(workdir: str | Path, kind: str, seeds: str = "", **selection: str) -> str:
    """The table of a sweep's folder. `selection`: see `select`; an empty protocol is the first that was run.

    seeds: a pattern, see above; ValueError for one that cannot be read. The CSV has every figure.
    """
    sweep = load_sweep(workdir)
    figures = compare(sweep)
    selection["protocol"] = selection["protocol"] or next(iter(sweep.protocols), "")
    chosen = select(figures, **selection)
    if kind == "csv":
        return to_csv(chosen)
    try:
        table = PaperTable(sweep, Tables(sweep, figures), chosen, seeds)
    except re.error as error:
        raise ValueError(f"--seeds {seeds!r}: {error}") from error
    return table.to_latex() if kind == "latex" else table.to_markdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", required=True, help="folder of a sweep, with its sweep.json")
    parser.add_argument("--format", choices=("csv", "latex", "markdown"), default="markdown")
    parser.add_argument("--tasks", default="*", help="comma-separated patterns of names")
    parser.add_argument("--metrics", default="", help="patterns, as in report.json; without: each task's main metric")
    parser.add_argument("--checkpoints", default="*", help="patterns of names")
    parser.add_argument("--protocol", default="", help="exact or reference; without: the first that was run")
    parser.add_argument("--modality", default=ALL, help="patterns: all, modality_mean, ct, 'structure: liver', *")
    parser.add_argument("--seeds", default="", help="pattern (regular expression) of what tells seeds apart in names")
    parser.add_argument("--out", type=Path, help="file; without: the terminal")
    arguments = vars(parser.parse_args())
    out, kind = arguments.pop("out"), arguments.pop("format")
    try:
        text = make_table(arguments.pop("workdir"), kind, **arguments)
        print(text, end="") if out is None else out.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
