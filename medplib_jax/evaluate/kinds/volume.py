"""Structures of whole volumes, asked for slice by slice: the masks of a volume's slices are put together and scored.

Records name their `volume` (`data.records.VolumeSlice`) and `structure`. A volume some of whose slices have no answer
is left out of its metrics and counted. The metrics of single slices stand beside them.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medplib_jax.data.records import Record
from medplib_jax.data.rle import decode_rle
from medplib_jax.evaluate.kinds.base import Contents
from medplib_jax.evaluate.kinds.grounding import Grounding
from medplib_jax.evaluate.metrics import Statistic
from medplib_jax.evaluate.metrics.catalogue import Metric
from medplib_jax.evaluate.metrics.masks import NSD, TOLERANCE_MM
from medplib_jax.volumes.metrics import volume_scores

SHARES = ("dice", NSD, "instance_f1")  # 0 where one of truth and prediction is empty
DISTANCES = ("hd95", "assd")  # left out there
_RULE = "of volumes with the structure or a mask"
_BOTH = "of volumes with both the structure and a mask"


class Volume(Grounding):
    """Per volume and structure: Dice, NSD, HD95, ASSD, instance F1 (`volumes.metrics.volume_scores`), error in ml."""

    name = "volume"
    main = ("volume_dice", "volume_no_target_accuracy")
    fields = ("volume", "masks", "true_masks")
    metrics = {
        "volume_dice": Metric("volume Dice", f"mean Dice {_RULE}"),
        f"volume_{NSD}": Metric(f"volume NSD at {TOLERANCE_MM:g} mm", f"mean normalised surface Dice {_RULE}"),
        "volume_instance_f1": Metric("volume instance F1", f"mean F1 of connected parts (IoU above 0.5) {_RULE}"),
        "volume_hd95": Metric("volume HD95", f"mean 95th percentile of surface distances {_BOTH}", "lower", unit="mm"),
        "volume_assd": Metric("volume ASSD", f"mean surface distance {_BOTH}", "lower", unit="mm"),
        "volume_ml_error": Metric("volume error", f"mean difference of the millilitres {_RULE}", "lower", unit="ml"),
        "volume_found": Metric("volume found", "share of volumes with the structure in which anything is drawn"),
        "volume_no_target_accuracy": Metric(
            "volume no-target accuracy", "share of volumes without the structure in which nothing is drawn"
        ),
        "volume_complete": Metric("volume complete", "share of volumes all of whose slices were answered"),
    }

    def claim(self, contents: Contents) -> int:
        return 4 if contents.volumes and contents.masks else 0

    def check(self, prompt, record: Record, loader, protocol: str) -> None:
        if record.volume is None or not record.structure:
            raise record.error("record of no volume", "volume and structure", "neither or one of them")

    def statistics(self, rows: Sequence[Mapping[str, Any]], protocol: str) -> dict[str, Statistic]:
        """Each metric counts for a volume at its first slice, so that patients can be resampled with their volumes."""
        found: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros((len(rows), 2)))
        for places in _by_volume(rows).values():
            for name, value in _scores([rows[place] for place in places]).items():
                found[f"volume_{name}"][places[0]] = value, 1.0
        return super().statistics(rows, protocol) | {name: Statistic(parts) for name, parts in found.items()}


def _by_volume(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[int]]:
    """Where the slices of each (volume, structure) stand, in their order."""
    groups: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for place, row in enumerate(rows):
        groups[row["volume"]["name"], row["structure"]].append(place)
    return {key: sorted(places, key=lambda place: rows[place]["volume"]["slice"]) for key, places in groups.items()}


def _scores(slices: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The scores of one structure of one volume; of one with a missing slice only that."""
    about = slices[0]["volume"]
    if [row["volume"]["slice"] for row in slices] != list(range(about["slices"])):
        return {"complete": 0.0}
    sizes = {tuple(rle["size"]) for row in slices for name in ("masks", "true_masks") for rle in row[name]}
    (size,) = sizes or [tuple(about["size"])]
    truth, drawn = (np.stack([_union(row[name], size) for row in slices]) for name in ("true_masks", "masks"))
    found = {"complete": 1.0}
    if not truth.any():
        found["no_target_accuracy"] = float(not drawn.any())
    else:
        found["found"] = float(drawn.any())
    if not (truth.any() or drawn.any()):
        return found
    shrunk = np.divide(about["size"], size)  # pictures that exceed the mask canvas are
    spacing = np.multiply(about["spacing"], (1.0, *shrunk))  # mm
    scores = volume_scores(truth, drawn, spacing, TOLERANCE_MM)
    found |= {name: scores[name] for name in SHARES}
    found["ml_error"] = abs(float(drawn.sum()) - float(truth.sum())) * float(np.prod(spacing)) / 1000
    return found | ({name: scores[name] for name in DISTANCES} if truth.any() and drawn.any() else {})


def _union(masks: Sequence[dict], size: tuple[int, ...]) -> np.ndarray:
    """All masks of a slice as one."""
    return np.logical_or.reduce([decode_rle(rle) for rle in masks], initial=False) | np.zeros(size, bool)


KINDS = (Volume(),)
