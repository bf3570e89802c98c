"""The figures of the pages, by matplotlib."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from medplib_jax.report.pictures import PALETTE, readable


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
                axis.text(left[row] + part[row] / 2, row, f"{part[row]:.0%}", ha="center", va="center", fontsize=7, color=readable(colour))
            left += part
        axis.set(title=f"{router.kinds[kind]} tokens", xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "50 %", "100 %"])
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
