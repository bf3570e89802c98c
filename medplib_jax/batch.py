"""Arrays and trees that pass between the parts, and the axis alphabet used in every tensor name.

Axis letters (suffix of a tensor name, e.g. `hidden_BxLxD`; also the dimension names in jaxtyping annotations):

    B batch       L sequence      D model width   H heads         K head width   F mlp width
    E experts     C capacity      V vocabulary    N images per example           P patches per image
    T visual features per example (N*P image vectors, then R region vectors, then X*Q vectors of examples' masks)
    X masks of examples per example, read by the mask encoder         Q vectors per such mask
    R regions per example         S sampled points per region     M masks per example
    h w grid of a feature map or low-resolution mask              I J mask canvas (rows, columns)
"""

from typing import Any

import flax.struct
import jax
from flax import traverse_util
from jaxtyping import Bool, Float, Int, UInt8

Params = dict[str, Any]  # nested dict of arrays, keyed like the module attributes
Array = jax.Array


@flax.struct.dataclass
class Batch:
    """One batch of static shape.

    Host code (`data/`) decides every index; pixels stay uint8 until they reach the device.
    """

    tokens: Int[Array, "B L"]  # token ids; 0 at padding and where a visual feature is spliced in
    valid: Bool[Array, "B L"]  # True on real positions (text and spliced features); padding is on the right
    targets: Int[Array, "B L"]  # targets[t] is the token that position t must predict
    loss_weights: Float[Array, "B L"]  # 1 where targets count, else 0
    feature_index: Int[Array, "B L"]  # which of the T visual features stands here; -1: the token's embedding
    clip_pixels: UInt8[Array, "B N Ic Ic 3"]  # padded to a square with CLIP's mean colour
    sam_pixels: UInt8[Array, "B Is Is 3"]  # longest side resized, centred; padding is zeroed after normalisation
    sam_box: Int[Array, "B 4"]  # (top, left, height, width) of the picture on the SAM canvas
    region_points: Float[Array, "B R S 2"]  # (x, y) in [0, 1) on the padded square image
    region_point_valid: Bool[Array, "B R S"]
    region_image: Int[Array, "B R"]  # which of the N images the region lies on
    seg_position: Int[Array, "B M"]  # position that PREDICTS the m-th <SEG>; 0 where mask_valid is False
    mask_valid: Bool[Array, "B M"]
    gt_masks: UInt8[Array, "B M I J"]  # 0/1, at original size in the top-left corner of the canvas
    mask_size: Int[Array, "B 2"]  # (height, width) of the picture on the mask canvas
    record: Int[Array, " B"]  # index of the (first) record in its source, -1 for a filler row
    segment: Int[Array, "B L"] | None = (
        None  # conversation of the row: 1, 2, ..., 0 at padding; None: one conversation a row
    )
    example_masks: UInt8[Array, "B X Ie Ie"] | None = None  # 0/1, padded to a square; None: no mask encoder reads any


def flatten(params: Params) -> dict[str, Any]:
    """{"a/b/c": leaf}, in the order of insertion."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: dict[str, Any]) -> Params:
    """Inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def combine(first: Params, second: Params) -> Params:
    """The union of two trees that share no leaf, such as trainable and frozen parameters.

    ValueError where both hold the same one.
    """
    first, second = flatten(first), flatten(second)
    if shared := sorted(first.keys() & second.keys()):
        raise ValueError(f"parameter {shared[0]} is in both trees")
    return unflatten(first | second)
