"""Weights of 8 bits for inference: integers and one scale per output, symmetric (LLM.int8(), Dettmers et al. 2022).

A transform of the module and one of the parameter tree, like `lora.py`. A kernel takes a half of what it takes in
bfloat16. Products run in the activations' type, or (W8A8) on integers: each row of activations is rounded to 8 bits
with a scale of its own while the program runs, products are summed in int32 and scaled back. Such sums are exact, and a
unit for int8 makes twice as many of them as of bfloat16. qwix' `dot_general` does the same, but by its own array type,
which our plain trees would have to be wrapped in.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from medplib_jax.batch import Array, Params

PARTS = ("llm", "clip", "projector", "vit", "resampler", "proj")
ROWS = 128  # of a kernel that are widened at once
KEPT = ("router", "coefficient")  # decide where a token goes: tiny, and in float32 on purpose


def quantize_module(model: nnx.Module, rows: bool = False) -> nnx.Module:
    """The abstract model with 8-bit kernels in its linear layers; changes and returns it.

    With `rows` the decoder's layers round their activations, too; its head, whose logits choose the token, does not.
    """
    for path, module in nnx.iter_modules(model):
        if hasattr(module, "kernel_scale") and path[0] in PARTS and path[-1] not in KEPT:
            quantize_linear(module, rows and path[0] == "llm" and path[-1] != "head")
    return model


def quantize_linear(module: nnx.Module, rows: bool) -> None:
    """Gives an abstract `Linear` or `ExpertLinear` an 8-bit kernel."""
    kernel = module.kernel
    scale_shape, scale_axes = (*kernel.shape[:-2], kernel.shape[-1]), (*kernel.axes[:-2], kernel.axes[-1])
    module.kernel_scale = nnx.data(nnx.Param(jax.ShapeDtypeStruct(scale_shape, jnp.float32), axes=scale_axes))
    module.kernel = nnx.Param(jax.ShapeDtypeStruct(kernel.shape, jnp.int8), axes=kernel.axes)
    module.narrow_rows = rows


def quantize_rows(x: Array, spread: tuple[str, ...] = ()) -> tuple[Array, Array]:
    """int8 of the same shape [..., D] and one float32 scale per row [...]: a row's largest value becomes 127.

    `spread`: mesh axes over which each row is cut into parts, in the body of a `shard_map`.
    """
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1)
    scale = jnp.maximum(jax.lax.pmax(largest, spread) if spread else largest, 1e-12) / 127
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def by_integers(multiply: Callable[[Array], Array], x: Array, kernel_scale: Array, dtype=None, spread=()) -> Array:
    """x [..., S, D] times a kernel of 8 bits, in `dtype` (default: x's).

    `multiply` gives the int32 sums [..., S, F] of rows that were rounded (`quantize_rows`) and the kernel.
    `kernel_scale` is [F], or one for each row.
    """
    rows, row_scale = quantize_rows(x, spread)
    return (multiply(rows) * row_scale[..., None] * kernel_scale).astype(dtype or x.dtype)


def scale_of_rows(member_SxE: Array, scales: Sequence[Array]) -> Array:
    """[S, F]: of each row its own expert's scales [F], zero for a row of none. Sums of masks cost no memory."""
    return sum(jnp.where(member_SxE[:, e, None], scale, 0.0) for e, scale in enumerate(scales))


def quantize_kernel(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [..., in, out] and one float32 scale per output [..., out]; on the host, a few rows at a time."""
    rows = [slice(start, start + ROWS) for start in range(0, kernel.shape[-2], ROWS)]
    largest = np.max([np.abs(kernel[..., part, :].astype(np.float32)).max(-2) for part in rows], axis=0)
    scale = np.maximum(largest, np.float32(1e-12)) / np.float32(127)
    whole = np.empty(kernel.shape, np.int8)
    for part in rows:
        steps = kernel[..., part, :].astype(np.float32)
        steps /= scale[..., None, :]
        whole[..., part, :] = np.rint(steps, out=steps)
    return whole, scale


def dequantize_params(tree: Params, dtype) -> Params:
    """The tree with plain kernels of this type; one without 8-bit kernels is returned as it is."""
    plain = {
        name: dequantize_params(child, dtype) if isinstance(child, dict) else child for name, child in tree.items()
    }
    scale = plain.pop("kernel_scale", None)
    return plain if scale is None else plain | {"kernel": (plain["kernel"] * scale[..., None, :]).astype(dtype)}


def num_bytes(params: Params) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
