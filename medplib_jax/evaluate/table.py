"""A sweep's figures as a table for a paper: CSV, LaTeX (booktabs) or Markdown.

COMMAND
    python -m medplib_jax.evaluate.table --workdir runs/sweep --tasks 'MeCoVQA*' --metrics mDice,mIoU --format latex

Rows are checkpoints, columns are tasks and metrics, in percent with their 95 % intervals. The CSV has one line per
figure with all that report.json knows of it, unrounded.
"""

import argparse
import csv
import fnmatch
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from medplib_jax.evaluate.metrics.catalogue import describe, in_order
from medplib_jax.evaluate.report.comparisons import ALL, FIELDS, Figure, compare
from medplib_jax.evaluate.report.pictures import DRAWINGS
from medplib_jax.evaluate.report.sweep_load import Sweep, load_sweep
from medplib_jax.evaluate.report.sweep_tables import Tables, counts_of, percent

_LATEX = {char: f"\\{char}" for char in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
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
        and (figure.protocol, figure.modality) == (protocol, modality)
    ]
    if not found:
        there = {
            name: sorted({getattr(figure, name) for figure in figures})
            for name in ("task", "metric", "checkpoint", "protocol", "modality")
        }
        raise ValueError(f"no figure is selected; there are {there}")
    return found


def to_csv(figures: Sequence[Figure]) -> str:
    """One line per figure, its fields as in report.json, unrounded."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(FIELDS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(figure.as_dict() for figure in figures)
    return file.getvalue()


class PaperTable:
    """Rows (checkpoints) and columns (task, metric) of selected figures of one protocol and modality."""

    def __init__(self, sweep: Sweep, tables: Tables, figures: Sequence[Figure]):
        self._tables = tables
        self._figures = {(figure.checkpoint, figure.task, figure.metric): figure for figure in figures}
        of_task = {task.name: {figure.metric for figure in figures if figure.task == task.name} for task in sweep.tasks}
        self.columns = [(task, metric) for task, metrics in of_task.items() for metric in in_order(metrics)]
        named = {figure.checkpoint for figure in figures}
        self.checkpoints = [checkpoint.name for checkpoint in sweep.checkpoints if checkpoint.name in named]
        self.notes = self._notes(sweep)

    def _notes(self, sweep: Sweep) -> list[str]:
        """What the figures are about, a line for each task."""
        drawn = {task.name for task in sweep.tasks if task.generated}
        notes = ["Percent, with 95 % bootstrap intervals (patients resampled where they are known, else images)."]
        for task in dict.fromkeys(task for task, _ in self.columns):
            counts = dict.fromkeys(counts_of(one) for one in self._figures.values() if one.task == task)
            notes.append(f"{task}: {' or '.join(counts)}.{f' {DRAWINGS}' if task in drawn else ''}")
        return notes

    def cells(self, checkpoint: str) -> list[tuple[str, str, bool]]:
        """(value, interval, whether it is the best of its column) of a row, dashes where nothing was measured."""
        found = []
        for task, metric in self.columns:
            figure = self._figures.get((checkpoint, task, metric))
            if figure is None:
                found.append(("–", "", False))
                continue
            interval = ""
            if figure.low is not None and figure.high is not None:
                interval = f"{percent(figure.low)}–{percent(figure.high)}"
            found.append((percent(figure.value), interval, self._tables.is_best(figure)))
        return found

    def to_markdown(self) -> str:
        names = [f"{task} {describe(metric).label}" for task, metric in self.columns]
        rows = [["checkpoint", *names], ["---", *["---:"] * len(names)]]
        for checkpoint in self.checkpoints:
            cells = [
                (f"**{value}**" if best else value) + (f" ({interval})" if interval else "")
                for value, interval, best in self.cells(checkpoint)
            ]
            rows.append([checkpoint, *cells])
        lines = ["| " + " | ".join(text.replace("|", "/") for text in row) + " |" for row in rows]
        return "\n".join([*lines, "", *self.notes]) + "\n"

    def to_latex(self) -> str:
        """A tabular of the package booktabs; the notes stand below as comments."""
        tasks = list(dict.fromkeys(task for task, _ in self.columns))
        widths = [sum(task == name for name, _ in self.columns) for task in tasks]
        ends = [1 + sum(widths[: i + 1]) for i in range(len(widths))]
        spans = zip(tasks, widths, strict=True)
        heads = [rf"\multicolumn{{{width}}}{{c}}{{{escape(task)}}}" for task, width in spans]
        rules = [rf"\cmidrule(lr){{{end - width + 1}-{end}}}" for end, width in zip(ends, widths, strict=True)]
        rows = [["", *heads], ["Checkpoint", *(escape(describe(metric).label) for _, metric in self.columns)]]
        body = [[escape(name), *(_latex_cell(*cell) for cell in self.cells(name))] for name in self.checkpoints]
        lines = [rf"\begin{{tabular}}{{l{'r' * len(self.columns)}}}", r"\toprule", _latex_row(rows[0]), "".join(rules)]
        lines += [_latex_row(rows[1]), r"\midrule", *map(_latex_row, body), r"\bottomrule", r"\end{tabular}"]
        return "\n".join([*lines, *(f"% {note}" for note in self.notes)]) + "\n"


def escape(text: str) -> str:
    """A name as LaTeX shows it."""
    return "".join(_LATEX.get(char, char) for char in text)


def _latex_cell(value: str, interval: str, best: bool) -> str:
    shown = rf"\textbf{{{value}}}" if best else value.replace("–", "--")
    return shown + (rf" {{\scriptsize ({interval.replace('–', '--')})}}" if interval else "")


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def make_table(workdir: str | Path, kind: str, **selection: str) -> str:
    """The table of a sweep's folder. `selection`: see `select`; an empty protocol is the first that was run."""
    sweep = load_sweep(workdir)
    figures = compare(sweep)
    selection["protocol"] = selection["protocol"] or next(iter(sweep.protocols), "")
    chosen = select(figures, **selection)
    if kind == "csv":
        return to_csv(chosen)
    table = PaperTable(sweep, Tables(sweep, figures), chosen)
    return table.to_latex() if kind == "latex" else table.to_markdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", required=True, help="folder of a sweep, with its sweep.json")
    parser.add_argument("--format", choices=("csv", "latex", "markdown"), default="markdown")
    parser.add_argument("--tasks", default="*", help="comma-separated patterns of names")
    parser.add_argument("--metrics", default="", help="patterns, as in report.json; without: each task's main metric")
    parser.add_argument("--checkpoints", default="*", help="patterns of names")
    parser.add_argument("--protocol", default="", help="exact or reference; without: the first that was run")
    parser.add_argument("--modality", default=ALL, help="all, modality_mean, or a modality")
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
