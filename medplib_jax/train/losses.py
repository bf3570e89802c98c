"""Losses as (sum, weight) pairs, so that they reduce exactly over micro-batches and hosts: mean = sum of sums / sum
of weights.

Formulas: MedPLIB model/MedPLIB.py (`sigmoid_ce_loss`, `dice_loss`, `FocalLoss`, `MaskIoULoss`, `model_forward`).
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from medplib_jax.batch import Array, Batch
from medplib_jax.config.experiment import LossConfig, ShardingConfig
from medplib_jax.config.model import MaskConfig, ModelConfig
from medplib_jax.models.masks.unpad import resample_to_canvas
from medplib_jax.models.precision import product
from medplib_jax.models.whole import ModelOutput
from medplib_jax.parallel.sharding import mesh_axes, row_axes

Pair = tuple[Array, Array]

MASK_TERMS = ("dice", "bce", "focal", "iou")


def token_cross_entropy(
    hidden_BxLxD: Array,
    head_kernel_DxV: Array,
    targets_BxL: Array,
    weights_BxL: Array,
    chunk: int,
    rules: ShardingConfig | None = None,
) -> Pair:
    """Sum of weighted next-token cross-entropies and sum of weights, float32. Weights are data: they get no gradient.

    Only positions with a weight meet the head: of a row that is mostly picture, few do. Logits exist for `chunk` such
    positions of each row at a time, and once: the gradients are computed along with the value. `rules` say how a mesh
    keeps the head's gradient.
    """
    weights_BxL = jnp.asarray(weights_BxL, jnp.float32)
    arrays = (*map(jnp.asarray, (hidden_BxLxD, head_kernel_DxV, targets_BxL)), weights_BxL)
    return _cross_entropy(*arrays, min(chunk, weights_BxL.shape[1]), rules), weights_BxL.sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(hidden, kernel, targets, weights, chunk, rules):
    return _on_mesh(hidden, kernel, targets, weights, chunk, rules, False, False)[0]


def _cross_entropy_forward(hidden, kernel, targets, weights, chunk, rules):
    values = (hidden.value, kernel.value, targets.value, weights.value)
    total, (d_hidden, d_kernel) = _on_mesh(*values, chunk, rules, hidden.perturbed, kernel.perturbed)
    return total, (d_hidden, None if d_kernel is None else d_kernel.astype(kernel.value.dtype))


def _cross_entropy_backward(chunk, rules, gradients, d_sum):
    return (
        *(None if gradient is None else (d_sum * gradient).astype(gradient.dtype) for gradient in gradients),
        None,
        None,
    )


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward, symbolic_zeros=True)


def _on_mesh(hidden_BxLxD, kernel_DxV, targets_BxL, weights_BxL, chunk, rules, of_hidden, of_kernel):
    """`_cross_entropy_and_gradients` on a mesh: every device loops over its own rows only.

    The sum and the head's gradient are added up over the devices once, after the loop. The compiler would do so in
    every trip.
    """
    mesh = jax.typeof(hidden_BxLxD).sharding.mesh
    rows = row_axes(len(hidden_BxLxD), mesh) if mesh.size > 1 else None
    if rows is None:
        return _cross_entropy_and_gradients(
            hidden_BxLxD, kernel_DxV, targets_BxL, weights_BxL, chunk, of_hidden, of_kernel
        )
    scattered = tuple(axis for axis in mesh_axes(rules, "embed") if axis in rows)
    kept = tuple(axis for axis in rows if axis not in scattered)

    def local(*arrays):
        total, (d_hidden, d_kernel) = _cross_entropy_and_gradients(*arrays, chunk, of_hidden, of_kernel)
        if of_kernel:
            d_kernel = jax.lax.psum(d_kernel, kept)
            d_kernel = (
                jax.lax.psum_scatter(d_kernel, scattered, scatter_dimension=0, tiled=True) if scattered else d_kernel
            )
        return jax.lax.psum(total, rows), (d_hidden, d_kernel)

    by_row, out_kernel = PartitionSpec(rows), PartitionSpec(scattered or None)
    out_specs = PartitionSpec(), (by_row if of_hidden else None, out_kernel if of_kernel else None)
    in_specs = (by_row, PartitionSpec(), by_row, by_row)
    run = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return run(hidden_BxLxD, kernel_DxV.astype(hidden_BxLxD.dtype), targets_BxL, weights_BxL)


def _cross_entropy_and_gradients(hidden_BxLxD, kernel_DxV, targets_BxL, weights_BxL, chunk, of_hidden, of_kernel):
    """The sum, and its gradients with respect to hidden states and kernel (None where not wanted)."""
    B, L, D = hidden_BxLxD.shape
    order_BxL = jnp.argsort(weights_BxL == 0, axis=1, stable=True)  # positions that count come first
    order_BxL = jnp.pad(order_BxL, ((0, 0), (0, -L % chunk)), constant_values=L)  # L: nowhere
    counted = jnp.max((weights_BxL != 0).sum(1))
    kernel = kernel_DxV.astype(hidden_BxLxD.dtype)

    def step(state):
        i, total, d_hidden, d_kernel = state
        place_Bxc = jax.lax.dynamic_slice_in_dim(order_BxL, i * chunk, chunk, axis=1)
        rows_SxD = _take(hidden_BxLxD, place_Bxc).reshape(-1, D)  # for one product of two matrices, see layers.matmul
        targets_S, weights_S = (_take(x, place_Bxc).reshape(-1) for x in (targets_BxL, weights_BxL))
        logits_SxV = product(rows_SxD, kernel, jnp.float32)
        is_target = (
            jnp.arange(logits_SxV.shape[-1]) == targets_S[:, None]
        )  # unlike a gather it works on a sharded vocabulary
        normaliser_S = jax.nn.logsumexp(logits_SxV, -1)
        total += jnp.sum(weights_S * (normaliser_S - jnp.where(is_target, logits_SxV, 0.0).sum(-1)))
        d_logits = (weights_S[:, None] * (jnp.exp(logits_SxV - normaliser_S[:, None]) - is_target)).astype(
            rows_SxD.dtype
        )
        if of_hidden:
            d_hidden = _put(d_hidden, place_Bxc, product(d_logits, kernel.T).reshape(B, chunk, D))
        if of_kernel:
            d_kernel += product(rows_SxD.T, d_logits, jnp.float32)
        return i + 1, total, d_hidden, d_kernel

    d_hidden = jnp.zeros_like(hidden_BxLxD) if of_hidden else None
    d_kernel = jnp.zeros(kernel.shape, jnp.float32) if of_kernel else None
    start = (jnp.zeros((), jnp.int32), jnp.zeros(()), d_hidden, d_kernel)
    _, total, d_hidden, d_kernel = jax.lax.while_loop(
        lambda state: (state[0] < -(-L // chunk)) & (state[0] * chunk < counted), step, start
    )
    return total, (d_hidden, d_kernel)


# Per row of the batch, so that rows may live on different devices; places beyond the row read 0 and are not written.
_take = jax.vmap(lambda row, place: row.at[place].get(mode="fill", fill_value=0))
_put = jax.vmap(lambda row, place, new: row.at[place].set(new, mode="drop"))


def mask_losses(
    logits_BxMxIxJ: Array, gt_BxMxIxJ: Array, canvas_mask_BxIxJ: Array, predicted_iou_BxM: Array
) -> dict[str, Array]:
    """The four losses of every mask, [B, M] float32 each, over the pixels where `canvas_mask` is 1.

    bce: mean over pixels. dice: 1 - (2 sum pg + 1e-6) / (sum p + sum g + 1e-6). focal: gamma 2, alpha 0.25, mean over
    pixels. iou: (soft IoU with 1e-7 - predicted IoU) squared.
    """
    inside = canvas_mask_BxIxJ[:, None].astype(jnp.float32)
    logits = logits_BxMxIxJ.astype(jnp.float32)
    g = gt_BxMxIxJ.astype(jnp.float32) * inside
    probability = jax.nn.sigmoid(logits)
    p = probability * inside

    def total(x):
        return x.sum((-2, -1))

    pixels = jnp.maximum(total(inside), 1.0)  # a filler row has none
    intersection, sum_p, sum_g = total(p * g), total(p), total(g)
    bce = total((jax.nn.softplus(logits) - logits * g) * inside) / pixels
    dice = 1.0 - (2.0 * intersection + 1e-6) / (sum_p + sum_g + 1e-6)
    positive = 0.25 * g * jnp.square(1.0 - probability) * jnp.log(probability + 1e-12)
    one_minus = jnp.maximum(1.0 - probability, 0.0)  # a fast sigmoid may exceed 1 by one rounding
    negative = 0.75 * (inside - g) * jnp.square(probability) * jnp.log(one_minus + 1e-12)
    focal = -total(positive + negative) / pixels
    soft_iou = (intersection + 1e-7) / (sum_p + sum_g - intersection + 1e-7)
    return {"bce": bce, "dice": dice, "focal": focal, "iou": jnp.square(soft_iou - predicted_iou_BxM)}


def divisors(batch: Batch, micro_batches: int = 1) -> dict[str, Array]:
    """What each sum is divided by: label positions for "ce", masks + 1e-8 for the mask terms, micro-batches for "aux".

    They depend on data alone, so a micro-batch can be scaled by those of the whole batch and its losses and gradients
    add up.
    """
    tokens = jnp.maximum(batch.loss_weights.astype(jnp.float32).sum(), 1.0)
    masks = batch.mask_valid.astype(jnp.float32).sum() + 1e-8
    return {"ce": tokens, "aux": jnp.float32(micro_batches)} | dict.fromkeys(MASK_TERMS, masks)


def loss_sums(
    output: ModelOutput,
    head_kernel_DxV: Array,
    batch: Batch,
    loss: LossConfig,
    mask: MaskConfig,
    rules: ShardingConfig | None = None,
) -> dict[str, Array]:
    """Undivided sums of the terms over the batch: "ce" over tokens, the mask terms over masks (0 without masks),
    "aux" as it is.
    """
    sums = dict.fromkeys(MASK_TERMS, jnp.zeros(())) | {"aux": output.aux.get("aux_loss", jnp.zeros(()))}
    sums["ce"], _ = token_cross_entropy(
        output.hidden, head_kernel_DxV, batch.targets, batch.loss_weights, loss.ce_chunk, rules
    )
    if output.mask_logits is None:
        return sums
    canvas = batch.gt_masks.shape[-2:]
    logits_BxMxIxJ, canvas_mask_BxIxJ = resample_to_canvas(
        output.mask_logits, batch.sam_box, batch.mask_size, canvas=canvas, sam_size=mask.image_size, mode=mask.unpad
    )
    per_mask = mask_losses(logits_BxMxIxJ, batch.gt_masks, canvas_mask_BxIxJ, output.predicted_iou)
    return sums | {name: jnp.sum(jnp.where(batch.mask_valid, per_mask[name], 0.0)) for name in MASK_TERMS}


def total_loss(
    output: ModelOutput,
    head_kernel_DxV: Array,
    batch: Batch,
    loss: LossConfig,
    model: ModelConfig,
    divide_by: dict[str, Array],
    rules: ShardingConfig | None = None,
) -> tuple[Array, dict[str, Array]]:
    """ce * (CE + aux_loss_weight * aux) + dice * Dice + bce * BCE + focal * Focal + iou * IoU, and the unweighted
    terms.

    `divide_by` are the `divisors` of the batch, or of the whole batch when `batch` is a micro-batch of it. `rules`
    are the model's.
    """
    terms = {
        name: value / divide_by[name]
        for name, value in loss_sums(output, head_kernel_DxV, batch, loss, model.mask, rules).items()
    }
    language = loss.ce * (terms["ce"] + model.moe.aux_loss_weight * terms["aux"])
    masks = loss.dice * terms["dice"] + loss.bce * terms["bce"] + loss.focal * terms["focal"] + loss.iou * terms["iou"]
    total = language + masks
    return total, terms | {"loss": total}
