"""Recorded inputs of the original program as a `Batch`: the splicing that its forward pass does, done on the host."""

from collections.abc import Mapping

import numpy as np

from medplib_jax.batch import Batch
from medplib_jax.models.masks.sam import MEAN, STD

IMAGE, REGION, IGNORED = -200, -300, -100
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SAM_SIDE = 256


def golden_batch(z: Mapping[str, np.ndarray], seg_id: int, num_patches: int) -> Batch:
    """The batch that the arrays `input_ids`, `labels`, `attention_mask`, `images_clip` (or `images_clip_0`, ... for
    several pictures a row), `images`, masks and regions describe.

    A batch without labels (a prompt) has zero loss weights; one without `images` has black SAM pixels (and the whole
    canvas as its box, unless `sam_box` is given)."""
    ids = z["input_ids"]
    labels = z.get("labels", np.full_like(ids, IGNORED))
    has_region = z.get("valid_region", np.zeros(len(ids), bool))
    masks = [z[f"region_mask_{i}"][0] for i in range(int(has_region.sum()))]
    regions = {row: masks[i] for i, row in enumerate(np.flatnonzero(has_region))}
    pictures = _pictures(z, ids)
    total = pictures.shape[1] * num_patches
    rows = [
        _splice(ids[i], labels[i], z["attention_mask"][i].astype(bool), num_patches, total, i in regions)
        for i in range(len(ids))
    ]
    lengths = {len(row["tokens"]) for row in rows}
    length, region_slots = max(lengths), (1 if regions else 0) + (len(lengths) > 1)
    # Rows of fewer image tokens end in zero vectors, which an expert's capacity counts: what a region without points
    # is.
    padding = {"feature_index": total + region_slots - 1 if len(lengths) > 1 else -1}
    text = {name: np.stack([_pad(row[name], length, padding.get(name, 0)) for row in rows]) for name in rows[0]}
    merged = text.pop("labels")
    targets = np.where(merged[:, 1:] == IGNORED, 0, merged[:, 1:])
    counted = (merged[:, 1:] != IGNORED) & text["valid"][:, 1:]
    text["targets"], text["loss_weights"] = _pad(targets, length, 0), _pad(counted.astype(np.float32), length, 0)
    return Batch(
        **text,
        clip_pixels=pictures,
        **_sam_pixels(z, len(ids)),
        **_region_points(regions, len(ids), region_slots),
        **_masks(z, text["tokens"], seg_id),
        record=np.arange(len(ids), dtype=np.int32),
    )


def _pictures(z: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """CLIP's pixels [B, N, Ic, Ic, 3]. The original hands the batch's pictures out to the image tokens one after the
    other."""
    given = z["images_clip"] if "images_clip" in z else np.concatenate([z[f"images_clip_{i}"] for i in range(len(ids))])
    pictures = iter(_to_uint8(given, np.multiply(CLIP_MEAN, 255), np.multiply(CLIP_STD, 255)))
    counts = (ids == IMAGE).sum(1)
    pixels = np.zeros((len(ids), max(counts), given.shape[2], given.shape[3], 3), np.uint8)
    for row, count in enumerate(counts):
        for place in range(count):
            pixels[row, place] = next(pictures)
    return pixels


def _splice(ids, labels, attended, num_patches, total, has_region) -> dict[str, np.ndarray]:
    """One row with each image token opened to `num_patches` positions, of `total` features; a region that is not there
    is left out."""
    tokens, row_labels, valid, index, seen = [], [], [], [], 0
    for token, label, on in zip(ids, labels, attended, strict=True):
        if token == REGION and not has_region:
            continue
        feature = {IMAGE: range(seen, seen + num_patches), REGION: (total,)}.get(int(token), (-1,))
        seen += num_patches * (token == IMAGE)
        tokens += [max(int(token), 0)] * len(feature)
        row_labels += [int(label)] * len(feature)
        valid += [bool(on)] * len(feature)
        index += feature
    kinds = {"tokens": np.int32, "labels": np.int32, "valid": bool, "feature_index": np.int32}
    return {
        name: np.array(values, kind)
        for (name, kind), values in zip(kinds.items(), (tokens, row_labels, valid, index), strict=True)
    }


def _pad(x: np.ndarray, length: int, value) -> np.ndarray:
    width = [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])]
    return np.pad(x, width, constant_values=value)


def _to_uint8(images_BxCxHxW: np.ndarray, mean, std) -> np.ndarray:
    """Undoes the normalisation exactly: the originals were whole numbers."""
    values = images_BxCxHxW.transpose(0, 2, 3, 1) * np.float32(std) + np.float32(mean)
    if np.abs(values - np.rint(values)).max() > 0.01:
        raise ValueError("the recorded image is not a normalised uint8 one")
    return np.rint(values).astype(np.uint8)


def _sam_pixels(z: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    if "images" not in z:
        box = z.get("sam_box", np.tile(np.int32([0, 0, SAM_SIDE, SAM_SIDE]), (count, 1)))
        return {"sam_pixels": np.zeros((count, SAM_SIDE, SAM_SIDE, 3), np.uint8), "sam_box": box}
    images, boxes = z["images"], []
    for image in images:
        spans = [np.flatnonzero((image != 0).any(axis)) for axis in ((0, 2), (0, 1))]
        boxes.append([spans[0][0], spans[1][0], np.ptp(spans[0]) + 1, np.ptp(spans[1]) + 1])
    padding = (images == 0).all(1)[..., None]
    pixels = _to_uint8(
        np.where(padding.transpose(0, 3, 1, 2), -np.divide(MEAN, STD)[:, None, None].astype(np.float32), images),
        MEAN,
        STD,
    )
    return {"sam_pixels": pixels, "sam_box": np.array(boxes, np.int32)}


def _region_points(regions: dict[int, np.ndarray], count: int, slots: int) -> dict[str, np.ndarray]:
    most = max([int(mask.sum()) for mask in regions.values()], default=0)
    points, valid = np.zeros((count, slots, most, 2), np.float32), np.zeros((count, slots, most), bool)
    for row, mask in regions.items():
        cells = np.argwhere(mask)
        points[row, 0, : len(cells)] = (cells / mask.shape)[:, ::-1]
        valid[row, 0, : len(cells)] = True
    return {"region_points": points, "region_point_valid": valid, "region_image": np.zeros((count, slots), np.int32)}


def _masks(z: Mapping[str, np.ndarray], tokens_BxL: np.ndarray, seg_id: int) -> dict[str, np.ndarray]:
    count = len(tokens_BxL)
    per_row = z.get("valid_mask_counts", np.ones(count, int) if "gt_mask_0" in z else np.zeros(count, int))
    slots = int(per_row.max(initial=0))
    truths = [z[f"gt_mask_{i}"] for i in range(int(per_row.sum()))]
    canvas = np.max([truth.shape for truth in truths], axis=0, initial=1) if truths else (1, 1)
    position, valid = np.zeros((count, slots), np.int32), np.arange(slots) < per_row[:, None]
    gt, size = np.zeros((count, slots, *canvas), np.uint8), np.ones((count, 2), np.int32)
    for truth, (row, slot) in zip(truths, np.argwhere(valid), strict=True):
        position[row, slot] = np.flatnonzero(tokens_BxL[row] == seg_id)[slot] - 1
        gt[row, slot, : truth.shape[0], : truth.shape[1]] = truth
        size[row] = truth.shape
    return {"seg_position": position, "mask_valid": valid, "gt_masks": gt, "mask_size": size}
