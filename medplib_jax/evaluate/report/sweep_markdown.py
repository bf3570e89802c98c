"""A sweep's report for a terminal: Markdown whose columns are aligned in plain text, too."""

import textwrap
import unicodedata
from collections.abc import Sequence

from medplib_jax.evaluate.report.comparisons import MEAN
from medplib_jax.evaluate.report.paths import shorten
from medplib_jax.evaluate.report.pictures import DRAWINGS
from medplib_jax.evaluate.report.protocols import SUMMARY, settings
from medplib_jax.evaluate.report.reproduction import reproduction
from medplib_jax.evaluate.report.sweep_load import Sweep
from medplib_jax.evaluate.report.sweep_tables import ReportTable, TableRow, Tables

WIDTH = 118  # characters of a table's line, beyond which its columns are split into several tables


def to_markdown(sweep: Sweep, tables: Tables, notes: Sequence[str]) -> str:
    """Overview, each task's metrics and modalities (main metric), skipped records."""
    lines = [
        "# Evaluation sweep",
        "",
        *_wrapped(
            "Figures are in percent where no unit is named; `±` is the half width of the 95 % bootstrap interval "
            "(patients resampled where they are known, else images)."
        ),
    ]
    if sweep.baseline:
        lines += _wrapped(
            f"Differences are to `{sweep.baseline}`; `*` marks a false discovery rate below 5 % (paired permutation "
            "test)."
        )
    lines += [line for note in notes for line in ("", *_wrapped(f"- {note}"))]
    overview = tables.overview()
    for protocol in sweep.protocols:
        cells = [cell for cell in sweep.cells if cell.protocol == protocol]
        lines += [
            "",
            f"## Overview, protocol {protocol}",
            "",
            *_wrapped(f"The protocol {SUMMARY[protocol]}; {settings(cells)}."),
            "",
        ]
        lines += _table(_only(overview, protocol, lambda column: column.scope != MEAN), metric=True)
    for task in sweep.tasks:
        protocols = [protocol for protocol in sweep.protocols if sweep.column(task.name, protocol)]
        if not protocols:
            continue
        lines += ["", f"## {task.name}", "", f"{task.kind}, {task.records:,} records, `{shorten(task.file)}`"]
        lines += ["", f"**{DRAWINGS}**"] if task.generated else []
        by_modality = tables.modalities(task)[:1]
        for protocol in protocols:
            for table in (tables.metrics(task), *by_modality):
                lines += [
                    "",
                    *_wrapped(f"{table.title}, protocol {protocol}: {settings(sweep.column(task.name, protocol))}"),
                    "",
                ]
                lines += _table(_only(table, protocol, lambda column: True))
    skipped = [(cell, error) for cell in sweep.cells for error in cell.entry.skipped]
    if skipped:
        lines += ["", "## Skipped records", ""]
        named = dict.fromkeys(
            f"- {cell.task}: {shorten(error['file'])}, record {error['record']}: {error['what']}"
            for cell, error in skipped
        )
        lines += [line for name in named for line in _wrapped(name)]
    lines += ["", "## Reproduction", ""]
    lines += [line for fact in reproduction(sweep) for line in _wrapped(f"- {': '.join(filter(None, fact))}")]
    return "\n".join(lines) + "\n"


def _only(table: ReportTable, protocol: str, wanted) -> ReportTable:
    """The table's columns of one protocol."""
    places = [i for i, column in enumerate(table.columns) if column.protocol == protocol and wanted(column)]

    def pick(rows):
        picked = [
            TableRow(row.name, row.note, tuple(row.entries[i] for i in places), row.run, row.baseline) for row in rows
        ]
        return tuple(row for row in picked if any(row.entries))

    elsewhere = pick(table.elsewhere)
    return ReportTable(
        table.title,
        tuple(table.columns[i] for i in places),
        pick(table.rows),
        elsewhere,
        table.notes,
        next(iter(pick([table.counts])), None) if table.counts else None,
        pick(table.naive),
    )


def _table(table: ReportTable, metric: bool = False) -> list[str]:
    head = [[column.title, column.metric] if metric else [column.title] for column in table.columns]
    titles = ["checkpoint", *(" ".join(filter(None, words)) for words in head)]
    body = [[_name(row), *(_text(entry) for entry in row.entries)] for row in table.rows]
    body += [[f"(no model) {row.name}", *(_text(entry) for entry in row.entries)] for row in table.naive]
    body += [[f"(elsewhere) {row.name}", *(_text(entry) for entry in row.entries)] for row in table.elsewhere]
    if table.counts:
        body.append([table.counts.name, *(_text(entry) for entry in table.counts.entries)])
    lines = []
    for part in _parts([titles, *body]):
        widths = [max(_width(line[i]) for line in part) for i in range(len(part[0]))]
        rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
        for line in (part[0], rule, *part[1:]):
            cells = [
                _pad(line[0], widths[0]),
                *(_pad(text, width, right=True) for text, width in zip(line[1:], widths[1:], strict=True)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    notes = [line for note in table.notes for line in _wrapped(f"- {note}")]
    return [*lines[:-1], *(["", *notes] if notes else [])]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        subsequent_indent="  " if text.startswith("- ") else "",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _parts(lines: list[list[str]]) -> list[list[list[str]]]:
    """The table split by columns so that no part is wider than WIDTH; each begins with the names."""
    widths = [max(_width(line[i]) for line in lines) + 3 for i in range(len(lines[0]))]
    parts, used = [[0]], widths[0]
    for i in range(1, len(widths)):
        if used + widths[i] > WIDTH and len(parts[-1]) > 1:
            parts.append([0])
            used = widths[0]
        parts[-1].append(i)
        used += widths[i]
    return [[[line[i] for i in part] for line in lines] for part in parts]


def _name(row: TableRow) -> str:
    return _plain(row.name) + (" (baseline)" if row.baseline else "")


def _text(entry) -> str:
    if entry is None:
        return "–"
    low, _, high = entry.interval.partition("–")
    spread = f" ±{(float(high) - float(low)) / 2:.1f}" if high else ""
    return entry.value + spread + (f" {entry.delta}" if entry.delta else "")


def _plain(text: str) -> str:
    """A name that cannot break a table's line."""
    return text.replace("|", "/").replace("\n", " ")


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _pad(text: str, width: int, right: bool = False) -> str:
    fill = " " * (width - _width(text))
    return fill + text if right else text + fill
