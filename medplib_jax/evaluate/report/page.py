"""One page about a run: loss curves, metrics, what each stage brought, where the router sends tokens, and a gallery of
held-out examples.

`write_report` turns a `ReportData` (numpy arrays and python values, no jax) into `report.html` beside PNG files.
Answers come from a model and questions from a data file: everything is escaped. Nothing is fetched from a network.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from medplib_jax.data.overlay import PALETTE, overlay
from medplib_jax.data.records import Record
from medplib_jax.evaluate.report.pictures import (
    DRAWINGS,
    REGION_COLOUR,
    format_value,
    mark_drawing,
    mark_tokens,
    marked_regions,
    open_thumbnail,
)
from medplib_jax.evaluate.report.plots import Router, draw_curves, draw_router, draw_stages


@dataclasses.dataclass(frozen=True)
class ReportExample:
    """One held-out question with its answer. Masks are bool [h, w] of any size with the image's aspect; the i-th <SEG>
    belongs to the i-th mask.

    `task` groups the gallery ("grounding" always shows truth and prediction, even when both are empty). `scores` are in
    [0, 1].
    """

    image: str | Path
    task: str
    modality: str
    question: str
    answer: str
    expected: str
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    true_masks: Sequence[np.ndarray] = ()
    masks: Sequence[np.ndarray] = ()
    region_masks: Sequence[np.ndarray] = ()


@dataclasses.dataclass(frozen=True)
class ReportData:
    """All that a report shows; empty parts are left out of the page.

    facts: name -> value. curves: stage -> {"step": [...], "loss": [...], other terms: [...]}. tables: title -> row ->
    column -> number or text. stages: metric -> stage -> value in [0, 1], in the order of the bars.
    """

    title: str
    facts: Mapping[str, object] = dataclasses.field(default_factory=dict)
    curves: Mapping[str, Mapping[str, Sequence[float]]] = dataclasses.field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Mapping[str, object]]] = dataclasses.field(default_factory=dict)
    stages: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    router: Router | None = None
    examples: Sequence[ReportExample] = ()
    drawings: bool = False  # the examples' pictures are drawings, not images of patients


def write_report(data: ReportData, out_dir: str | Path) -> Path:
    """Write `out_dir`/report.html with its pictures and return its path.

    Raises ValueError when a curve's series differ in length or the router's array has another shape than its names,
    DataError for an image that cannot be read.
    """
    _check(data)
    out = Path(out_dir)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    (out / "examples").mkdir(exist_ok=True)
    drawn = {"curves": draw_curves(data.curves)} if data.curves else {}
    drawn |= {"stages": draw_stages(data.stages)} if data.stages else {}
    drawn |= {"router": draw_router(data.router)} if data.router else {}
    figures = {name: f"figures/{name}.png" for name in drawn}
    for name, figure in drawn.items():
        figure.savefig(out / figures[name], dpi=150, bbox_inches="tight")
    cards = [_card(out, number, example, data.drawings) for number, example in enumerate(data.examples)]
    page = template("page.html").render(
        title=data.title,
        facts={name: format_value(value) for name, value in data.facts.items()},
        tables=[_table(title, rows) for title, rows in data.tables.items()],
        figures=figures,
        cards=cards,
        tasks=sorted({card["task"] for card in cards}),
        modalities=sorted({card["modality"] for card in cards}),
        region_colour=REGION_COLOUR,
        drawings=DRAWINGS if data.drawings else "",
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _check(data):
    for stage, series in data.curves.items():
        lengths = {name: len(values) for name, values in series.items()}
        if "step" not in lengths or len(set(lengths.values())) != 1:
            raise ValueError(f"report: curves of {stage!r} must hold 'step' and be of one length, found {lengths}")
    if data.router:
        expected = (len(data.router.layers), len(data.router.kinds), len(data.router.experts))
        if np.shape(data.router.share) != expected:
            raise ValueError(
                f"report: router.share must be [layers, kinds, experts] = {expected}, "
                f"found {np.shape(data.router.share)}"
            )


def template(name: str) -> jinja2.Template:
    """A template of this package; everything that it shows is escaped, and a name that it does not know is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__name__.rpartition(".")[0]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _table(title, rows):
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    cells = {name: [format_value(row.get(column)) for column in columns] for name, row in rows.items()}
    return {"title": title, "columns": columns, "rows": cells}


def region_masks(record: Record, size: tuple[int, int]) -> list[np.ndarray]:
    """The regions in a record's last question, bool [h, w] at the image's `size` (h, w), for a `ReportExample`."""
    return marked_regions(record.turns[-2][1], record.path, size)


def _card(out: Path, number: int, example: ReportExample, drawing: bool) -> dict[str, Any]:
    """What the template needs of one example; writes its pictures."""
    picture = open_thumbnail(example.image)
    shown = {}
    if example.region_masks:
        shown["region"] = overlay(picture, example.region_masks, (REGION_COLOUR,))
    else:
        shown["image"] = picture
    if example.task == "grounding" or example.masks or example.true_masks:
        shown["truth" if example.true_masks else "truth: no mask"] = overlay(picture, example.true_masks, PALETTE)
        shown["prediction" if example.masks else "prediction: no mask"] = overlay(picture, example.masks, PALETTE)
    panels = []
    for caption, pixels in shown.items():
        file = f"examples/{number:03d}_{caption.split(':')[0]}.png"
        Image.fromarray(mark_drawing(pixels) if drawing else pixels).save(out / file)
        panels.append({"caption": caption, "file": file, "height": pixels.shape[0], "width": pixels.shape[1]})
    scores = [
        {"name": name, "value": format_value(value), "level": _level(value)} for name, value in example.scores.items()
    ]
    return {
        "task": example.task,
        "modality": example.modality,
        "panels": panels,
        "scores": scores,
        "question": mark_tokens(example.question),
        "answer": mark_tokens(example.answer),
        "expected": mark_tokens(example.expected),
    }


def _level(score):
    if score is None or math.isnan(score):
        return "unknown"
    return "good" if score >= 0.75 else "fair" if score >= 0.5 else "poor"
