"""Weights of 8 bits for inference: integers and one scale per output, symmetric (LLM.int8(), Dettmers et al. 2022).

A transform of the module and one of the parameter tree, like `lora.py`. Products run in the activations' type, so only
memory changes: a kernel takes a half of what it takes in bfloat16. Libraries that do this (qwix) hook into Flax modules
that own their parameters; here parameters are plain trees that modules are bound to.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from medplib_jax.batch import Params

PARTS = ("llm", "clip", "projector", "vit", "resampler", "proj")
ROWS = 128  # of a kernel that are widened at once
KEPT = ("router", "coefficient")  # decide where a token goes: tiny, and in float32 on purpose


def quantize_module(model: nnx.Module) -> nnx.Module:
    """The abstract model with 8-bit kernels in its linear layers; changes and returns it."""
    for path, module in nnx.iter_modules(model):
        if hasattr(module, "kernel_scale") and path[0] in PARTS and path[-1] not in KEPT:
            kernel = module.kernel
            scale_shape, scale_axes = (*kernel.shape[:-2], kernel.shape[-1]), (*kernel.axes[:-2], kernel.axes[-1])
            module.kernel_scale = nnx.data(nnx.Param(jax.ShapeDtypeStruct(scale_shape, jnp.float32), axes=scale_axes))
            module.kernel = nnx.Param(jax.ShapeDtypeStruct(kernel.shape, jnp.int8), axes=kernel.axes)
    return model


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
