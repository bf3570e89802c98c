"""How well a mask of a volume meets the true one: Dice, surface distances in mm, and instances.

Two definitions of a surface are in use, and their figures differ (by up to 0.38 in NSD on thick slices), so each has
its name:

- `surface_scores`: surface elements, as DeepMind's surface-distance has them (Nikolov et al. 2018, arXiv:1809.04430).
  Between eight voxels that are not all alike lies a piece of surface, marching cubes with its vertices halfway between
  voxels. Each piece counts with its area in mm2.
- `monai_scores`: surface voxels, as MONAI has them: voxels of the mask with one of the six neighbours outside; each
  counts the same.

`contour_scores` has the first definition for one picture, whose pieces of outline count with their length in mm.

Masks are bool [x, y, z], of a picture [h, w]; spacing is in mm in the order of the axes.

Empty volumes, as these programs have them. Both masks empty: Dice, NSD and mean distances are not a number, Hausdorff
distances infinite (not a number for MONAI). One of them empty: Dice and NSD are 0, distances infinite (MONAI: hd95 not
a number, and Dice when the true mask is empty). `summary` says how such volumes count in a mean.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Mapping

import numpy as np
from scipy import ndimage

NAN, INF = math.nan, math.inf
HAUSDORFF_PERCENT = 95
_DIRECTIONS = np.array([(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)], np.float64)


def dice(truth: np.ndarray, prediction: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|); not a number when both are empty."""
    total = int(truth.sum()) + int(prediction.sum())
    return 2 * int((truth & prediction).sum()) / total if total else NAN


def surface_scores(truth: np.ndarray, prediction: np.ndarray, spacing, tolerances: Iterable[float]) -> dict[str, float]:
    """By surface elements, in mm: "nsd_<tolerance>mm" for each tolerance, "hd95", "hd", "assd" and its two directions.

    nsd: share of both surfaces' area that lies within the tolerance of the other (normalised surface Dice). hd95, hd:
    95th percentile and maximum, the larger of the two directions. assd: mean distance over the area of both surfaces.
    """
    truth, prediction, spacing = *_cropped(truth, prediction), np.asarray(spacing, np.float64)
    areas = [_surface_areas(mask, spacing) for mask in (truth, prediction)]
    return _scores(areas, spacing, tolerances, _weighted_percentile)


def monai_scores(truth: np.ndarray, prediction: np.ndarray, spacing, tolerances: Iterable[float]) -> dict[str, float]:
    """As `surface_scores`, by MONAI's surface voxels, which count the same; "dice" with its rule for empty masks."""
    truth, prediction, spacing = *_cropped(truth, prediction), np.asarray(spacing, np.float64)
    weights = [(mask & ~ndimage.binary_erosion(mask)).astype(np.float64) for mask in (truth, prediction)]
    return {"dice": dice(truth, prediction) if truth.any() else NAN} | _scores(
        weights, spacing, tolerances, _percentile
    )


def contour_scores(truth: np.ndarray, prediction: np.ndarray, spacing, tolerances: Iterable[float]) -> dict[str, float]:
    """`surface_scores` of two masks bool [h, w] of one picture. spacing: mm between its rows and between its columns.

    Between four pixels that are not all alike lies a piece of outline. It is the side of a column of voxels 1 mm high.
    """
    slabs = (np.repeat(mask[1:2], 2, axis=0) for mask in _cropped(truth[None], prediction[None]))
    lengths = [_surface_areas(slab, np.array([1.0, *spacing]))[0] for slab in slabs]
    return _scores(lengths, np.asarray(spacing, np.float64), tolerances, _weighted_percentile)


def instance_f1(truth: np.ndarray, prediction: np.ndarray, overlap: float = 0.5) -> float:
    """F1 of connected parts (26 neighbours). A part is found when its IoU with one of the other is above `overlap`.

    From an overlap of 0.5 on, at most one part fits. Not a number when both masks are empty.
    """
    if overlap < 0.5:
        raise ValueError(f"expected an overlap of at least 0.5, found {overlap}")
    (parts, count), (others, other_count) = (ndimage.label(mask, np.ones((3, 3, 3))) for mask in (truth, prediction))
    if not count + other_count:
        return NAN
    table = np.bincount(parts.ravel() * (other_count + 1) + others.ravel(), minlength=(count + 1) * (other_count + 1))
    table = table.reshape(count + 1, other_count + 1)
    shared = table[1:, 1:]
    union = table[1:].sum(1)[:, None] + table[:, 1:].sum(0)[None] - shared
    return 2 * int((shared > overlap * union).sum()) / (count + other_count)


def volume_scores(truth: np.ndarray, prediction: np.ndarray, spacing, tolerance: float) -> dict[str, float]:
    """All scores of one structure in one volume, MONAI's with "monai_" before their names."""
    scores = {"dice": dice(truth, prediction), "instance_f1": instance_f1(truth, prediction)}
    scores |= surface_scores(truth, prediction, spacing, [tolerance])
    return scores | {
        f"monai_{name}": value for name, value in monai_scores(truth, prediction, spacing, [tolerance]).items()
    }


def summary(scores: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Means over volumes.

    Volumes where nothing was there and nothing was found are left out and counted as "both_empty".

    A volume of which one mask is empty is counted as "one_empty": its Dice, F1 and NSD are 0 and count, its distances
    are left out.
    """
    scores = list(scores)
    some = [one for one in scores if not math.isnan(one["dice"])]
    means = {"volumes": len(scores), "both_empty": len(scores) - len(some)}
    means["one_empty"] = sum(math.isinf(one["hd"]) for one in some)
    for name in scores[0] if scores else ():
        known = [one[name] for one in some if math.isfinite(one[name])]
        means[name] = float(np.mean(known)) if known else NAN
    return means


def _scores(
    weights: list[np.ndarray], spacing: np.ndarray, tolerances: Iterable[float], percentile
) -> dict[str, float]:
    """From the weight of each piece of both surfaces, 0 where there is none."""
    distances = [_distances(*pair, spacing) for pair in (weights, weights[::-1])]
    areas = [weight[weight > 0] for weight in weights]
    both, area = np.concatenate(distances), np.concatenate(areas)
    found = {f"nsd_{t:g}mm": _mean(both <= t, area) for t in tolerances}
    for name, percent in (("hd95", HAUSDORFF_PERCENT), ("hd", 100)):
        ends = [percentile(d, a, percent) for d, a in zip(distances, areas, strict=True) if len(d) or not len(both)]
        found[name] = float(max(ends))
    found |= {"assd": _mean(both, area), "asd_truth_to_prediction": _mean(distances[0], areas[0])}
    return found | {"asd_prediction_to_truth": _mean(distances[1], areas[1])}


def _distances(own: np.ndarray, other: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """mm from each piece of a surface to the nearest of the other; infinite when there is none."""
    if not other.any():
        return np.full(np.count_nonzero(own), INF)
    return ndimage.distance_transform_edt(other == 0, sampling=spacing)[own > 0]


def _mean(values: np.ndarray, areas: np.ndarray) -> float:
    return float((values * areas).sum() / areas.sum()) if len(values) else NAN


def _weighted_percentile(distances: np.ndarray, areas: np.ndarray, percent: float) -> float:
    """The first distance up to which at least this share of the area lies; infinite without a surface."""
    if not len(distances):
        return INF
    order = np.lexsort((areas, distances))
    share = np.cumsum(areas[order]) / areas.sum()
    return distances[order][min(np.searchsorted(share, percent / 100), len(order) - 1)]


def _percentile(distances: np.ndarray, _: np.ndarray, percent: float) -> float:
    if percent == 100 or not len(distances):
        return distances.max() if len(distances) else NAN
    return float(np.percentile(distances, percent)) if np.isfinite(distances).all() else NAN


def _cropped(truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both masks cut to what either holds, with a rim of nothing."""
    if truth.shape != prediction.shape or truth.ndim != 3:
        raise ValueError(f"expected two masks of one shape [x, y, z], found {truth.shape} and {prediction.shape}")
    either = truth.astype(bool) | prediction.astype(bool)
    spans = [np.flatnonzero(either.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    box = tuple(slice(span[0], span[-1] + 1) if len(span) else slice(0) for span in spans)
    return np.pad(truth[box].astype(bool), 1), np.pad(prediction[box].astype(bool), 1)


def _surface_areas(mask: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """mm2 of surface between each eight voxels, float64 of the mask's shape less one."""
    code = np.zeros([size - 1 for size in mask.shape], np.uint8)
    for bit, corner in enumerate(_CORNERS):
        code |= (
            mask[tuple(slice(c, size - 1 + c) for c, size in zip(corner, mask.shape, strict=True))].astype(np.uint8)
            << bit
        )
    faces = np.array([spacing[1] * spacing[2], spacing[0] * spacing[2], spacing[0] * spacing[1]])
    return (_elements() @ np.linalg.norm(_DIRECTIONS * faces, axis=1) / 8)[code]


_CORNERS = tuple(itertools.product((0, 1), repeat=3))  # bit b of a code is the voxel at corner b


@functools.cache
def _elements() -> np.ndarray:
    """int [256, 7]: how much surface faces each of `_DIRECTIONS`, in eighths, for each way of setting eight voxels.

    Voxels that touch by faces share their surface; the rest of marching cubes' 15 cases are sums of these. More than
    four voxels have the surface of those that are missing.
    """
    table = np.zeros((256, 7), int)
    for code in range(256):
        corners = {corner for bit, corner in enumerate(_CORNERS) if code >> bit & 1}
        rest = corners if len(corners) <= 4 else set(_CORNERS) - corners
        while rest:
            part = {rest.pop()}
            while near := {a for a in rest if any(np.abs(np.subtract(a, b)).sum() == 1 for b in part)}:
                part, rest = part | near, rest - near
            table[code] += _part_elements(part)
    return table


def _part_elements(part: set[tuple[int, int, int]]) -> np.ndarray:
    """Of one to four connected corners."""
    edges = [axis for a, b in itertools.combinations(sorted(part), 2) for axis in _shared_edge(a, b)]
    counts = np.bincount(edges, minlength=3)  # edges of the part along each axis
    found = np.zeros(7, int)
    if len(part) == 1:
        found[0] = 1
    elif len(part) == 2:  # a ridge along its edge
        found[1 + edges[0]] = 4
    elif counts.min() == 0:  # three or all of a face
        found[4 + int(counts.argmin())], found[0] = (4, 3) if len(part) == 3 else (8, 0)
    elif any(sum(len(_shared_edge(a, b)) for b in part) == 3 for a in part):  # a corner and its three neighbours
        found[0] = 6
    else:  # a path along three axes
        found[0] = 4
        found[1 + np.array(_ends(part))] = 2
    return found


def _shared_edge(a: tuple[int, ...], b: tuple[int, ...]) -> list[int]:
    """The axis along which two corners are neighbours, if they are."""
    axes = [axis for axis in range(3) if a[axis] != b[axis]]
    return axes if len(axes) == 1 else []


def _ends(part: set[tuple[int, int, int]]) -> list[int]:
    """The axes of the first and last edge of a path."""
    ends = [a for a in part if sum(len(_shared_edge(a, b)) for b in part) == 1]
    return [axis for a in ends for b in part for axis in _shared_edge(a, b)]
