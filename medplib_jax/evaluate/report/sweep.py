"""One report about many checkpoints on many tasks: report.html, report.md and report.json of a sweep's folder.

COMMAND
    python -m medplib_jax.evaluate.report.sweep WORKDIR

What is read is described in `sweep_load`, what report.json holds in `comparisons.FIELDS`. Rows come from models and
data files: everything is escaped. Nothing is fetched from a network; the page needs the pictures beside it and no
server.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import markupsafe
import numpy as np

from medplib_jax.data.overlay import PALETTE
from medplib_jax.evaluate.metrics.catalogue import METRICS, describe, in_order
from medplib_jax.evaluate.report.comparisons import ALL, FIELDS, Figure, compare, to_csv
from medplib_jax.evaluate.report.page import template
from medplib_jax.evaluate.report.paths import shorten
from medplib_jax.evaluate.report.pictures import DRAWINGS, REGION_COLOUR
from medplib_jax.evaluate.report.plots import Charts, Line, draw_router_map, draw_steps, style
from medplib_jax.evaluate.report.protocols import DIFFERENCES, SUMMARY, settings
from medplib_jax.evaluate.report.published import published
from medplib_jax.evaluate.report.reproduction import reproduction
from medplib_jax.evaluate.report.sweep_cases import CASES, FOLDER, CaseIndex, write_cases
from medplib_jax.evaluate.report.sweep_load import Sweep, load_sweep
from medplib_jax.evaluate.report.sweep_markdown import to_markdown
from medplib_jax.evaluate.report.sweep_tables import Tables
from medplib_jax.evaluate.result import TaskEntry

FIGURES = "report_figures"  # charts as PDF and SVG
MAX_SKIPPED = 500  # shown in the page; report.json has all
LENGTHS = ("mm", "mm²", "ml")  # units of metrics for which a spacing has to be known


def write_sweep_report(workdir: str | Path, cases: int = CASES) -> Path:
    """Reads `workdir`/sweep.json and the predictions that it names; writes report.html, report.md and report.json and
    returns the first's path.

    Raises FileNotFoundError without a sweep.json or predictions, ValueError for a broken one (see `load_sweep`).
    """
    sweep = load_sweep(workdir)
    figures = compare(sweep)
    tables = Tables(sweep, figures)
    of_cells = (note for cell in sweep.cells for note in cell.notes)
    said = map(shorten, [*map(str, sweep.left_out), *of_cells])
    notes = list(dict.fromkeys(said))  # what all checkpoints lack is said once
    indices = write_cases(sweep, figures, cases)
    charts = Charts(sweep.workdir / FIGURES)
    shutil.rmtree(charts.folder, ignore_errors=True)
    with style():
        page = template("sweep.html").render(
            sweep=sweep,
            overview=tables.overview(),
            tasks=[_task_view(sweep, tables, figures, task, indices.get(task.name), charts) for task in sweep.tasks],
            statements={
                protocol: settings([cell for cell in sweep.cells if cell.protocol == protocol])
                for protocol in sweep.protocols
            },
            summaries=SUMMARY,
            differences=DIFFERENCES,
            beside=tables.beside_published(),
            nearest=tables.nearest,
            none_known=not any(figure.content for figure in published()),
            routers=_routers(sweep, charts),
            charts=FIGURES if charts.folder.exists() else "",
            skipped=_skipped(sweep),
            max_skipped=MAX_SKIPPED,
            notes=notes,
            reproduction=reproduction(sweep),
            shorten=shorten,
            records=sum(len(cell.records) for cell in sweep.cells),
            tests=sum(figure.p is not None for figure in figures),
            measured=any(describe(figure.metric).unit in LENGTHS for figure in figures),
            region_colour=REGION_COLOUR,
            palette=PALETTE,
            folder=FOLDER,
            drawings=DRAWINGS,
        )
    (sweep.workdir / "report.json").write_text(
        json.dumps(_as_json(sweep, figures, notes), indent=1) + "\n", encoding="utf-8"
    )
    (sweep.workdir / "report.csv").write_text(to_csv(figures), encoding="utf-8")
    (sweep.workdir / "report.md").write_text(to_markdown(sweep, tables, notes), encoding="utf-8")
    path = sweep.workdir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _task_view(
    sweep: Sweep, tables: Tables, figures: Sequence[Figure], task: TaskEntry, cases: CaseIndex | None, charts: Charts
) -> dict[str, Any]:
    cells = [cell for cell in sweep.cells if cell.task == task.name]
    return {
        "task": task,
        "statements": {
            protocol: settings(column) for protocol in sweep.protocols if (column := sweep.column(task.name, protocol))
        },
        "metrics": tables.metrics(task) if cells else None,
        "modalities": tables.modalities(task) if cells else [],
        "structures": tables.structures(task) if cells else None,
        "curves": _curves(sweep, figures, task, charts),
        "cases": cases,
        "skipped": len({(error["file"], error["record"]) for cell in cells for error in cell.entry.skipped}),
    }


def _curves(sweep: Sweep, figures: Sequence[Figure], task: TaskEntry, charts: Charts) -> markupsafe.Markup | None:
    """The main metric over the steps of each run that has two checkpoints or more; None without one."""
    lines = []
    shown = [
        (figure.step, figure)
        for figure in figures
        if figure.task == task.name and figure.main and figure.modality == ALL and figure.step is not None
    ]
    runs, first = (
        list(dict.fromkeys(checkpoint.run for checkpoint in sweep.checkpoints)),
        next(iter(sweep.protocols), ""),
    )
    for protocol in sweep.protocols:
        for colour, run in enumerate(runs):
            points = {step: figure for step, figure in shown if (figure.run, figure.protocol) == (run, protocol)}
            if len(points) < 2:
                continue
            label = f"{run} ({protocol})" if len(sweep.protocols) > 1 else run
            ordered = [points[step] for step in sorted(points)]
            low = [np.nan if figure.low is None else figure.low for figure in ordered]
            high = [np.nan if figure.high is None else figure.high for figure in ordered]
            values, dashed = [figure.value for figure in ordered], protocol != first
            lines.append(Line(label, sorted(points), values, low, high, colour, dashed))
    if not lines:
        return None
    return charts.show(draw_steps(lines, describe(shown[0][1].metric).title), f"{task.name}-steps")


def _routers(sweep: Sweep, charts: Charts) -> dict[str, dict[str, Any]]:
    """{checkpoint: picture and token counts}: where tokens go, over all tasks under the first protocol."""
    found = {}
    for checkpoint in sweep.checkpoints:
        routers = [
            cell.entry.router
            for cell in sweep.cells
            if cell.checkpoint == checkpoint.name and cell.protocol == sweep.protocols[0] and cell.entry.router
        ]
        if not routers:
            continue
        layers = routers[0]["layers"]
        totals: dict[tuple[str, str], np.ndarray] = {}
        tokens: dict[str, int] = {}
        for router in routers:
            for modality, split in router["modalities"].items():
                for kind, share in split["share"].items():
                    weighted = np.array(share) * split["tokens"][kind]
                    totals[kind, modality or "none"] = totals.get((kind, modality or "none"), 0.0) + weighted
                    tokens[kind] = tokens.get(kind, 0) + split["tokens"][kind]
        columns = [
            (kind, modality)
            for kind in tokens
            for modality in sorted({modality for _, modality in totals})
            if (kind, modality) in totals
        ]
        share_CxLxE = np.stack([totals[column] / totals[column].sum(-1, keepdims=True) for column in columns])
        experts = range(share_CxLxE.shape[-1] if share_CxLxE.shape[-1] > 2 else 1)  # of two experts, one says it all
        maps = [
            charts.show(
                draw_router_map(layers, columns, share_CxLxE[..., expert].T, f"expert {expert}"),
                f"router-{checkpoint.name}-{expert}",
            )
            for expert in experts
        ]
        found[checkpoint.name] = {"maps": maps, "tokens": tokens, "experts": share_CxLxE.shape[-1]}
    return found


def _skipped(sweep: Sweep) -> list[dict[str, Any]]:
    """Every skipped record once, with the checkpoints that it was skipped for."""
    found: dict[tuple, dict[str, Any]] = {}
    for cell in sweep.cells:
        for error in cell.entry.skipped:
            key = cell.task, error["file"], error["record"], error["what"]
            file = shorten(error["file"])
            line = found.setdefault(key, {"task": cell.task, **error, "file": file, "checkpoints": []})
            if cell.checkpoint not in line["checkpoints"]:
                line["checkpoints"].append(cell.checkpoint)
    return list(found.values())


def _as_json(sweep: Sweep, figures: Sequence[Figure], notes: Sequence[str]) -> dict[str, Any]:
    elsewhere = [
        {
            "source": figure.label,
            "cite": figure.cite,
            "protocol": figure.how,
            "task": figure.task,
            "metric": figure.metric,
            "modality": modality,
            "value": value,
        }
        for figure in published()
        for modality, value in figure.values.items()
    ]
    return {
        "about": "One entry of `figures` per checkpoint, task, protocol, metric and modality; "
        "`fields` says what its values mean.",
        "fields": FIELDS,
        "metrics": {
            name: {"label": metric.label, "meaning": metric.meaning, "better": metric.better, "unit": metric.unit}
            for name in in_order({*METRICS, *(figure.metric for figure in figures)})
            for metric in [describe(name)]
        },
        "protocols": SUMMARY,
        "baseline": sweep.baseline,
        "reproduction": [dict(zip(("what", "which", "value"), fact, strict=True)) for fact in reproduction(sweep)],
        "notes": list(notes),
        "figures": [figure.as_dict() for figure in figures],
        "skipped": _skipped(sweep),
        "elsewhere": elsewhere,
    }


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workdir", help="folder of a sweep, with its sweep.json")
    parser.add_argument("--cases", type=int, default=CASES, help="how many cases get a picture, of all tasks together")
    arguments = parser.parse_args()
    print(write_sweep_report(arguments.workdir, arguments.cases))


if __name__ == "__main__":
    main()
