"""From the decoder's low-resolution masks back to the picture: SAM's resize and padding undone, on a static canvas.

The original upsamples, cuts and resizes with `F.interpolate(mode="bilinear", align_corners=False)`. Each of these is
linear and separable, so the whole chain is one matrix per axis and example, built on device from the box and the size
of the mask.
"""

import jax.numpy as jnp
import numpy as np

from medplib_jax.batch import Array
from medplib_jax.models.precision import product


def resample_to_canvas(
    mask_logits_BxMxhxw: Array,
    sam_box_Bx4: Array,
    mask_size_Bx2: Array,
    *,
    canvas: tuple[int, int],
    sam_size: int,
    mode: str,
    corner: Array | tuple[int, int] = (0, 0),
) -> tuple[Array, Array]:
    """Mask logits at their original size, in the top-left corner of a canvas (I, J).

    With another `corner` (row, column) the canvas shows what lies from there on.

    sam_box: (top, left, height, width) of the picture on the sam_size x sam_size canvas; mask_size: (height, width) of
    the picture on the mask canvas. Returns float32 logits_BxMxIxJ, 0 outside mask_size, and bool canvas_mask_BxIxJ of
    the pixels that count.

    mode 'exact' scales the logits to SAM's canvas, cuts out the box and resizes. 'reference' reproduces the cut of the
    original (MedPLIB.py `postprocess_masks`), which subtracts the box's size from the grid's, takes half of that
    (negative) number as the start of a Python slice and so cuts one-sided or not at all; the released weights were
    trained with it.
    """
    if mode not in ("exact", "reference"):
        raise ValueError(f"unpad mode {mode!r} is neither 'exact' nor 'reference'")
    weights, inside = [], []
    for axis in (0, 1):
        grid, start, length = mask_logits_BxMxhxw.shape[2 + axis], sam_box_Bx4[:, axis], sam_box_Bx4[:, 2 + axis]
        size, target = mask_size_Bx2[:, axis], corner[axis] + jnp.arange(canvas[axis])
        if mode == "exact":
            whole = (np.full(1, n) for n in (0, grid, sam_size))
            to_sam = _resize_weights(*whole, grid, np.arange(sam_size), np)[0]
            weights.append(product(_resize_weights(start, length, size, sam_size, target, jnp), to_sam))
        else:
            start, length = _reference_slice(grid, length)
            weights.append(_resize_weights(start, length, size, grid, target, jnp))
        inside.append(target < size[:, None])
    rows_BxIxh, columns_BxJxw = weights
    rows_BxMxIxw = product(rows_BxIxh[:, None], mask_logits_BxMxhxw.astype(jnp.float32))
    logits = product(rows_BxMxIxw, columns_BxJxw[:, None].swapaxes(-2, -1))
    return logits, inside[0][:, :, None] & inside[1][:, None, :]


def _resize_weights(start, length, size, in_dim: int, target, xp) -> Array:
    """W[B, T, in_dim]: bilinear resize (half-pixel centres, edges clamped) of in[start:start + length] to `size`.

    Its rows are those of `target` [T], 0 beyond `size`.
    """
    start, length, size = (value[:, None].astype(np.float32) for value in (start, length, size))
    target = target.astype(np.float32)
    source = xp.clip((target + 0.5) * (length / size) - 0.5, 0, length - 1) + start
    weights = xp.maximum(1 - xp.abs(source[..., None] - xp.arange(in_dim, dtype=np.float32)), 0)
    return weights * (target < size)[..., None].astype(np.float32)


def _reference_slice(grid: int, length_B: Array) -> tuple[Array, Array]:
    """(start, length) of `x[pad // 2 : pad // 2 + length]` on `grid` cells, with pad = grid - length.

    A negative start counts from the end.
    """
    start = (grid - length_B) // 2
    stop = jnp.minimum(start + length_B, grid)
    start = jnp.where(start < 0, jnp.maximum(start + grid, 0), start)
    return start, stop - start
