"""Weights of 8 bits for inference: integers and one scale per output, symmetric (LLM.int8(), Dettmers et al. 2022).

A transform of the module and one of the parameter tree, like `lora.py`. Products run in the activations' type, so only
memory changes: a kernel takes a half of what it takes in bfloat16. Libraries that do this (qwix) hook into Flax modules
that own their parameters; here parameters are plain trees that modules are bound to.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from medplib_jax.batch import Params

PARTS = ("llm", "clip", "projector", "vit", "resampler", "proj")
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


def quantize_params(params: Params, like: Params) -> Params:
    """The parameters for `quantize_module`'s model, whose own (abstract) ones are `like`."""
    quantized = {
        name: quantize_params(child, like[name]) if isinstance(child, dict) else child for name, child in params.items()
    }
    if "kernel_scale" not in like:
        return quantized
    kernel = params["kernel"].astype(jnp.float32)
    scale = jnp.maximum(abs(kernel).max(-2), 1e-12) / 127
    return quantized | {"kernel": jnp.round(kernel / scale[..., None, :]).astype(jnp.int8), "kernel_scale": scale}


def dequantize_params(tree: Params, dtype) -> Params:
    """The tree with plain kernels of this type; one without 8-bit kernels is returned as it is."""
    plain = {
        name: dequantize_params(child, dtype) if isinstance(child, dict) else child for name, child in tree.items()
    }
    scale = plain.pop("kernel_scale", None)
    return plain if scale is None else plain | {"kernel": (plain["kernel"] * scale[..., None, :]).astype(dtype)}


def num_bytes(params: Params) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
