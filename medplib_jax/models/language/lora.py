"""Low-rank adapters (Hu et al. 2021) merged into the weights, as a transform of a parameter tree."""

import jax
import jax.numpy as jnp

from medplib_jax.batch import Params
from medplib_jax.config.model import LoraConfig


def merge_lora(params: Params, lora: LoraConfig) -> Params:
    """The tree without adapters: kernel + alpha / r * lora_a @ lora_b, summed in float32, in the kernel's dtype.

    Works for plain [in, out], stacked [n, in, out] and expert [n, E, in, out] kernels alike. The given tree is left
    alone. Raises ValueError when the tree's rank is not the configured one.
    """
    merged = {name: merge_lora(child, lora) if isinstance(child, dict) else child for name, child in params.items()}
    if "lora_a" in params:
        a, b = (merged.pop(name) for name in ("lora_a", "lora_b"))
        if a.shape[-1] != lora.rank:
            raise ValueError(f"adapter of shape {a.shape} has rank {a.shape[-1]}, expected lora.rank {lora.rank}")
        with jax.default_matmul_precision("highest"):  # numpy arrays come here too, and stay on the host
            update = lora.scale * (a.astype(jnp.float32) @ b.astype(jnp.float32))
        kernel = params["kernel"]
        merged["kernel"] = (kernel.astype(jnp.float32) + update).astype(kernel.dtype)
    return merged
