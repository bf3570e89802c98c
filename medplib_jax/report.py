"""One page about a run: loss curves, metrics, what each stage brought, where the router sends tokens, and a gallery of held-out examples.

`write_report` turns a `ReportData` (numpy arrays and python values, no jax) into `report.html` beside PNG files. Answers come from a model and
questions from a data file: everything is escaped. Nothing is fetched from a network.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import markupsafe
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from medplib_jax.data import images, regions
from medplib_jax.data.sources import REGION, Record

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe and Ito: told apart by colour-blind readers
REGION_COLOUR = "#00e5ff"
THUMBNAIL = 224  # pixels of the longest side


@dataclasses.dataclass(frozen=True)
class Example:
    """One held-out question with its answer. Masks are bool [h, w] of any size with the image's aspect; the i-th <SEG> belongs to the i-th mask.

    `task` groups the gallery ("grounding" always shows truth and prediction, even when both are empty). `scores` are in [0, 1].
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
class Router:
    """Where tokens go: `share` [layers, kinds, experts], fractions that sum to 1 over experts (NaN: kind not seen)."""

    layers: Sequence[int]
    kinds: Sequence[str]
    experts: Sequence[str]
    share: np.ndarray


@dataclasses.dataclass(frozen=True)
class ReportData:
    """All that a report shows; empty parts are left out of the page.

    facts: name -> value. curves: stage -> {"step": [...], "loss": [...], other terms: [...]}. tables: title -> row -> column -> number or text.
    stages: metric -> stage -> value in [0, 1], in the order of the bars.
    """

    title: str
    facts: Mapping[str, object] = dataclasses.field(default_factory=dict)
    curves: Mapping[str, Mapping[str, Sequence[float]]] = dataclasses.field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Mapping[str, object]]] = dataclasses.field(default_factory=dict)
    stages: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    router: Router | None = None
    examples: Sequence[Example] = ()


def write_report(data: ReportData, out_dir: str | Path) -> Path:
    """Write `out_dir`/report.html with its pictures and return its path.

    Raises ValueError when a curve's series differ in length or the router's array has another shape than its names, DataError for an image that
    cannot be read.
    """
    _check(data)
    out = Path(out_dir)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    (out / "examples").mkdir(exist_ok=True)
    figures = {}
    for name, content, draw in (("curves", data.curves, draw_curves), ("stages", data.stages, draw_stages), ("router", data.router, draw_router)):
        if content:
            figures[name] = f"figures/{name}.png"
            draw(content).savefig(out / figures[name], dpi=150, bbox_inches="tight")
    cards = [_card(out, number, example) for number, example in enumerate(data.examples)]
    page = _template().render(
        title=data.title,
        facts={name: format_value(value) for name, value in data.facts.items()},
        tables=[_table(title, rows) for title, rows in data.tables.items()],
        figures=figures,
        cards=cards,
        tasks=sorted({card["task"] for card in cards}),
        modalities=sorted({card["modality"] for card in cards}),
        region_colour=REGION_COLOUR,
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
            raise ValueError(f"report: router.share must be [layers, kinds, experts] = {expected}, found {np.shape(data.router.share)}")


def _template():
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report_template.html")


def format_value(value: object) -> str:
    """Numbers for people: three decimals below 100, thousands separated, a dash for None and NaN."""
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def _table(title, rows):
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    cells = {name: [format_value(row.get(column)) for column in columns] for name, row in rows.items()}
    return {"title": title, "columns": columns, "rows": cells}


def draw_curves(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """One panel per stage: every series faintly as recorded, strongly as a running mean."""
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (stage, series) in zip(axes, curves.items(), strict=False):
        steps = np.asarray(series["step"])
        for colour, (name, values) in zip(_cycle(), ((name, values) for name, values in series.items() if name != "step"), strict=False):
            values = np.asarray(values, float)
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(steps, running_mean(values), color=colour, linewidth=1.8, label=name)
        axis.set(title=stage, xlabel="step", ylabel="loss")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=8)
        _tidy(axis)
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    return figure


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the series [n], shorter at its ends; NaN does not spread."""
    half = max(1, len(values) // 40)
    known = np.concatenate([[0], np.cumsum(~np.isnan(values))])
    sums = np.concatenate([[0], np.cumsum(np.nan_to_num(values))])
    start, stop = np.maximum(np.arange(len(values)) - half, 0), np.minimum(np.arange(len(values)) + half + 1, len(values))
    counts = known[stop] - known[start]
    return np.where(counts > 0, (sums[stop] - sums[start]) / np.maximum(counts, 1), np.nan)


def draw_stages(stages: Mapping[str, Mapping[str, float]]) -> Figure:
    """Grouped bars: one group per metric, one bar per stage."""
    names = list(dict.fromkeys(stage for values in stages.values() for stage in values))
    figure = Figure(figsize=(max(6.0, 0.45 * len(stages) * (len(names) + 1)), 3.4), layout="constrained")
    axis = figure.subplots()
    width = 0.84 / len(names)
    for number, (colour, stage) in enumerate(zip(_cycle(), names, strict=False)):
        heights = [values.get(stage, np.nan) for values in stages.values()]
        bars = axis.bar(np.arange(len(stages)) + (number - (len(names) - 1) / 2) * width, heights, width * 0.92, color=colour, label=stage)
        axis.bar_label(bars, ["" if np.isnan(height) else f"{height:.2f}" for height in heights], fontsize=7, padding=1)
    axis.set_xticks(np.arange(len(stages)), list(stages))
    axis.set_ylim(0, 1.1)
    axis.legend(frameon=False, fontsize=8, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _tidy(axis)
    return figure


def draw_router(router: Router) -> Figure:
    """One panel per kind of token: for every MoE layer a bar split by expert."""
    kinds = len(router.kinds)
    figure = Figure(figsize=(2.7 * kinds + 0.6, 0.35 * len(router.layers) + 1.5), layout="constrained")
    axes = figure.subplots(1, kinds, squeeze=False, sharey=True).ravel()
    rows = np.arange(len(router.layers))
    share = np.asarray(router.share, float)
    for kind, axis in enumerate(axes):
        left = np.zeros(len(rows))
        for colour, (expert, name) in zip(_cycle(), enumerate(router.experts), strict=False):
            part = np.nan_to_num(share[:, kind, expert])
            axis.barh(rows, part, left=left, color=colour, label=name, height=0.8)
            for row in np.flatnonzero(part > 0.12):
                axis.text(left[row] + part[row] / 2, row, f"{part[row]:.0%}", ha="center", va="center", fontsize=7, color=_readable(colour))
            left += part
        axis.set(title=f"{router.kinds[kind]} tokens", xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "50 %", "100 %"])
        axis.set_yticks(rows, [f"layer {layer}" for layer in router.layers])
        _tidy(axis)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    return figure


def _readable(background):
    """Black or white, whichever stands out more."""
    return "black" if np.dot(_rgb(background), (0.299, 0.587, 0.114)) > 127 else "white"


def _rgb(colour):
    """The bytes of "#rrggbb", float32 [3]."""
    return np.frombuffer(bytes.fromhex(colour[1:]), np.uint8).astype(np.float32)


def _cycle():
    while True:
        yield from PALETTE


def _tidy(axis):
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.2)
    axis.tick_params(labelsize=8)


def region_masks(record: Record, size: tuple[int, int]) -> list[np.ndarray]:
    """The regions in a record's last question, bool [h, w] at the image's `size` (h, w), for `Example.region_masks`."""
    found = []
    for reference in REGION.findall(record.turns[-2][1]):
        mask = regions.draw(reference, size) if regions.is_shape(reference) else images.load_mask(record.path(reference), size)
        found.append(np.asarray(mask) > 0)
    return found


def _card(out, number, example):
    """What the template needs of one example; writes its pictures."""
    picture = _open(example.image)
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
        Image.fromarray(pixels).save(out / file)
        panels.append({"caption": caption, "file": file, "height": pixels.shape[0], "width": pixels.shape[1]})
    scores = [{"name": name, "value": format_value(value), "level": _level(value)} for name, value in example.scores.items()]
    return {
        "task": example.task, "modality": example.modality, "panels": panels, "scores": scores,
        "question": mark_tokens(example.question), "answer": mark_tokens(example.answer), "expected": mark_tokens(example.expected),
    }  # fmt: skip


def _level(score):
    if score is None or math.isnan(score):
        return "unknown"
    return "good" if score >= 0.75 else "fair" if score >= 0.5 else "poor"


def _open(path):
    """RGB uint8 [h, w, 3], enlarged or shrunk to THUMBNAIL pixels on its longest side."""
    picture = Image.fromarray(images.load_image(str(path)))
    scale = THUMBNAIL / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))


def overlay(picture: np.ndarray, masks: Sequence[np.ndarray], colours: Sequence[str], opacity: float = 0.4) -> np.ndarray:
    """`picture` uint8 [H, W, 3] under translucent masks with solid outlines; masks bool [h, w] are stretched to it (nearest)."""
    shown = picture.astype(np.float32)
    height, width = picture.shape[:2]
    for number, mask in enumerate(masks):
        colour = _rgb(colours[number % len(colours)])
        rows, columns = np.arange(height) * mask.shape[0] // height, np.arange(width) * mask.shape[1] // width
        inside = np.asarray(mask, bool)[rows[:, None], columns]
        shown[inside] += opacity * (colour - shown[inside])
        shown[inside & ~_eroded(inside)] = colour
    return np.round(shown).astype(np.uint8)


def _eroded(mask, steps=2):
    """The mask without its outermost `steps` pixels (4-neighbours; beyond the picture counts as outside)."""
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def mark_tokens(text: str) -> markupsafe.Markup:
    """Escaped text for the page: `<image>` and mask paths are dropped, regions and <SEG> become labels, the latter in their mask's colour."""
    plain = re.sub(r"<mask>.*?</mask>", "", text.replace("<image>", "").replace("\n", " "))
    marked, masks = markupsafe.Markup(), 0
    for part in re.split(r"(<region>.*?</region>|<SEG>)", plain.strip()):
        if part == "<SEG>":
            marked += markupsafe.Markup('<span class="token" style="background:{}">SEG</span>').format(PALETTE[masks % len(PALETTE)])
            masks += 1
        elif part.startswith("<region>") and part.endswith("</region>"):
            marked += markupsafe.Markup('<span class="token region">region</span>')
        else:
            marked += part
    return marked
