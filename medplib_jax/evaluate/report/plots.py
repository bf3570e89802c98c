"""The figures of the pages, by matplotlib, and how they become part of a page."""

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import markupsafe
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from medplib_jax.data.overlay import PALETTE
from medplib_jax.evaluate.report.pictures import readable

_INK = "#010203"  # stands for the page's text colour

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,  # as journals want it
    "svg.hashsalt": "medplib_jax",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def style():
    """A context in which figures are drawn (and saved) in the page's colour of text; names are shown as they are,
    without TeX.
    """
    return matplotlib.rc_context(_STYLE)


def as_svg(figure: Figure) -> markupsafe.Markup:
    """The figure, drawn under `style`, as an element of the page that follows the reader's light or dark colours."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    return markupsafe.Markup(
        re.sub(r' id="[a-z.]+[0-9]*_[0-9]+"', "", text)
    )  # ids of parts, which repeat from figure to figure


@dataclasses.dataclass(frozen=True)
class Charts:
    """The charts of a report, which stand in its page and, for a paper, as PDF and SVG in a folder."""

    folder: Path

    def show(self, figure: Figure, name: str) -> markupsafe.Markup:
        """Saves a figure, drawn under `style`, as NAME.pdf and NAME.svg; returns the element of the page."""
        self.folder.mkdir(exist_ok=True)
        stem = str(self.folder / re.sub(r"[^\w.-]", "_", name))
        figure.savefig(f"{stem}.pdf", bbox_inches="tight", metadata={"CreationDate": None})
        figure.savefig(f"{stem}.svg", bbox_inches="tight", metadata={"Date": None})
        return as_svg(figure)


@dataclasses.dataclass(frozen=True)
class Router:
    """Where tokens go: `share` [layers, kinds, experts], fractions that sum to 1 over experts (NaN: kind not seen)."""

    layers: Sequence[int]
    kinds: Sequence[str]
    experts: Sequence[str]
    share: np.ndarray


def draw_curves(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """One panel per stage: every series faintly as recorded, strongly as a running mean."""
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (stage, series) in zip(axes, curves.items(), strict=False):
        steps = np.asarray(series["step"])
        for colour, (name, values) in zip(
            _cycle(), ((name, values) for name, values in series.items() if name != "step"), strict=False
        ):
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
    start, stop = (
        np.maximum(np.arange(len(values)) - half, 0),
        np.minimum(np.arange(len(values)) + half + 1, len(values)),
    )
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
        bars = axis.bar(
            np.arange(len(stages)) + (number - (len(names) - 1) / 2) * width,
            heights,
            width * 0.92,
            color=colour,
            label=stage,
        )
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
                axis.text(
                    left[row] + part[row] / 2,
                    row,
                    f"{part[row]:.0%}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=readable(colour),
                )
            left += part
        axis.set(
            title=f"{router.kinds[kind]} tokens", xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "50 %", "100 %"]
        )
        axis.set_yticks(rows, [f"layer {layer}" for layer in router.layers])
        _tidy(axis)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    return figure


def _cycle():
    while True:
        yield from PALETTE


def _tidy(axis):
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.2)
    axis.tick_params(labelsize=8)


@dataclasses.dataclass(frozen=True)
class Line:
    """A metric over training steps with its interval; `dashed` tells a second protocol from the first."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: int
    dashed: bool = False


def draw_steps(lines: Sequence[Line], ylabel: str) -> Figure:
    """One line per training run, its interval as a band. Values are fractions, shown in percent."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.subplots()
    for line in lines:
        colour = PALETTE[line.colour % len(PALETTE)]
        percent = {name: 100 * np.array(getattr(line, name), float) for name in ("values", "low", "high")}
        axis.fill_between(
            line.steps, percent["low"], percent["high"], color=colour, alpha=0.07 if line.dashed else 0.15, linewidth=0
        )
        axis.plot(
            line.steps,
            percent["values"],
            color=colour,
            marker="o",
            markersize=4,
            linewidth=1.8,
            label=line.label,
            linestyle="--" if line.dashed else "-",
        )
    axis.set(xlabel="training step", ylabel=f"{ylabel} (%)")
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=len(lines) if len(lines) < 5 else 3)
    _tidy(axis)
    return figure


def draw_router_map(
    layers: Sequence[int], columns: Sequence[tuple[str, str]], share: np.ndarray, expert: str
) -> Figure:
    """Share of tokens [layers, columns] that one expert receives; a column is (kind of token, modality), kinds stand
    together.
    """
    figure = Figure(figsize=(0.24 * len(columns) + 1.8, 0.17 * len(layers) + 1.9), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(share, cmap="RdBu_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axis.set_xticks(range(len(columns)), [modality for _, modality in columns], rotation=90, fontsize=7)
    axis.set_yticks(
        range(0, len(layers), max(1, len(layers) // 16)),
        [str(layer) for layer in layers[:: max(1, len(layers) // 16)]],
        fontsize=7,
    )
    axis.set_ylabel("layer", fontsize=8)
    kinds = [kind for kind, _ in columns]
    for kind in dict.fromkeys(kinds):
        first, count = kinds.index(kind), kinds.count(kind)
        axis.text(first + (count - 1) / 2, -0.8, kind, ha="center", va="bottom", fontsize=8)
        if first:
            axis.axvline(first - 0.5, color=_INK, linewidth=1)
    axis.tick_params(length=2)
    bar = figure.colorbar(image, ax=axis, ticks=[0, 0.5, 1], fraction=0.05, pad=0.01, aspect=12)
    bar.ax.set_yticklabels(["0", "50 %", "100 %"], fontsize=7)
    bar.set_label(f"share of {expert}", fontsize=8)
    return figure
