"""Recorded inputs of the original program as a `Batch`: the splicing that its forward pass does, done on the host."""

from collections.abc import Mapping

import numpy as np

from medplib_jax.batch import Batch
from medplib_jax.models.masks.sam import MEAN, STD

IMAGE, REGION, IGNORED = -200, -300, -100
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SAM_SIDE = 256


def golden_batch(z: Mapping[str, np.ndarray], seg_id: int, num_patches: int, mask_tokens: int = 0) -> Batch:
    """The batch that the arrays `input_ids`, `labels`, `attention_mask`, `images_clip` (or `images_clip_0`, ... for
    several pictures a row), `images`, masks and regions describe.

    Where `token_is_mask` says so, an image token stands for the `mask_tokens` of one of the `mask_images`.

    A batch without labels (a prompt) has zero loss weights; one without `images` has black SAM pixels (and the whole
    canvas as its box, unless `sam_box` is given)."""
    ids = z["input_ids"]
    labels = z.get("labels", np.full_like(ids, IGNORED))
    has_region = z.get("valid_region", np.zeros(len(ids), bool))
    masks = [z[f"region_mask_{i}"][0] for i in range(int(has_region.sum()))]
    regions = {row: masks[i] for i, row in enumerate(np.flatnonzero(has_region))}
    shown = _shown(z, ids)
    pictures, encoded = _slots(_pictures(z, ids), shown, False), _slots(_encoded_masks(z, ids), shown, True)
    lengths = {
        (row != REGION).sum() + (i in regions) + np.where(kinds, mask_tokens - 1, num_patches - 1).sum()
        for i, (row, kinds) in enumerate(zip(ids, shown, strict=True))
    }
    length, region_slots = int(max(lengths)), (1 if regions else 0) + (len(lengths) > 1)
    total = pictures.shape[1] * num_patches
    spans = {False: (0, num_patches), True: (total + region_slots, mask_tokens)}
    rows = [
        _splice(ids[i], labels[i], z["attention_mask"][i].astype(bool), shown[i], spans, total if i in regions else -1)
        for i in range(len(ids))
    ]
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
        example_masks=encoded if mask_tokens else None,
    )


def _shown(z: Mapping[str, np.ndarray], ids: np.ndarray) -> list[np.ndarray]:
    """Of each row, whether its image tokens stand for masks, bool [n].

    The original hands the batch's features out to the image tokens one after the other.
    """
    counts = (ids == IMAGE).sum(1)
    kinds = z.get("token_is_mask", np.zeros(counts.sum(), bool))[: counts.sum()]
    return np.split(kinds, np.cumsum(counts)[:-1])


def _slots(given: np.ndarray, shown: list[np.ndarray], kind: bool) -> np.ndarray:
    """The pictures (or masks) that each row shows, [B, slots, ...], zeros beyond them."""
    counts = [int((row == kind).sum()) for row in shown]
    slots = np.zeros((len(shown), max(counts), *given.shape[1:]), np.uint8)
    for row, (count, start) in enumerate(zip(counts, np.cumsum([0, *counts[:-1]]), strict=True)):
        slots[row, :count] = given[start : start + count]
    return slots


def _of_rows(z: Mapping[str, np.ndarray], name: str, ids: np.ndarray) -> list[np.ndarray]:
    """The array of that name, or those of the rows that have one."""
    return [z[name]] if name in z else [z[f"{name}_{i}"] for i in range(len(ids)) if f"{name}_{i}" in z]


def _encoded_masks(z: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    found = _of_rows(z, "mask_images", ids)
    return np.concatenate(found)[:, 0] if found else np.zeros((0, 1, 1), np.uint8)


def _pictures(z: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """CLIP's pixels of all pictures of the batch, uint8 [n, Ic, Ic, 3]."""
    given = np.concatenate(_of_rows(z, "images_clip", ids))
    return _to_uint8(given, np.multiply(CLIP_MEAN, 255), np.multiply(CLIP_STD, 255))


def _splice(ids, labels, attended, shown, spans, region) -> dict[str, np.ndarray]:
    """One row with each image token opened to the features that it stands for. A region that is not there (-1) is left
    out. `spans`: the first feature and the number of features of a picture (False) and of a mask (True)."""
    tokens, row_labels, valid, index, kinds, seen = [], [], [], [], iter(shown.tolist()), {False: 0, True: 0}
    for token, label, on in zip(ids, labels, attended, strict=True):
        if token == REGION and region < 0:
            continue
        feature = (region,) if token == REGION else (-1,)
        if token == IMAGE:
            kind = next(kinds)
            first, width = spans[kind]
            feature = range(first + width * seen[kind], first + width * (seen[kind] + 1))
            seen[kind] += 1
        tokens += [max(int(token), 0)] * len(feature)
        row_labels += [int(label)] * len(feature)
        valid += [bool(on)] * len(feature)
        index += feature
    columns = {"tokens": np.int32, "labels": np.int32, "valid": bool, "feature_index": np.int32}
    return {
        name: np.array(values, kind)
        for (name, kind), values in zip(columns.items(), (tokens, row_labels, valid, index), strict=True)
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
