"""Low-rank adapters as transforms of a parameter tree (Hu et al. 2021): which there are, merging, carrying over base weights."""

from collections.abc import Iterator

import jax.numpy as jnp

from medplib_jax.config import LoraConfig
from medplib_jax.types import Params

_ADAPTER = ("lora_a", "lora_b")


def has_lora(params: Params) -> bool:
    return any(True for _ in lora_paths(params))


def lora_paths(params: Params, prefix: str = "") -> Iterator[str]:
    """Paths (joined by "/") of the layers that carry an adapter."""
    if "lora_a" in params:
        yield prefix.rstrip("/")
    for name, child in params.items():
        if isinstance(child, dict):
            yield from lora_paths(child, f"{prefix}{name}/")


def merge_lora(params: Params, lora: LoraConfig) -> Params:
    """The tree without adapters: kernel + alpha / r * lora_a @ lora_b, summed in float32, in the kernel's dtype.

    Works for plain [in, out], stacked [n, in, out] and expert [n, E, in, out] kernels alike. The given tree is left alone.
    Raises ValueError when the tree's rank is not the configured one.
    """
    merged = {name: merge_lora(child, lora) if isinstance(child, dict) else child for name, child in params.items()}
    if "lora_a" in params:
        a, b = (merged.pop(name) for name in _ADAPTER)
        if a.shape[-1] != lora.rank:
            raise ValueError(f"adapter of shape {a.shape} has rank {a.shape[-1]}, expected lora.rank {lora.rank}")
        update = lora.scale * (a.astype(jnp.float32) @ b.astype(jnp.float32))
        kernel = params["kernel"]
        merged["kernel"] = (kernel.astype(jnp.float32) + update).astype(kernel.dtype)
    return merged


def fill_base(fresh: Params, base: Params) -> Params:
    """`fresh` (a newly initialised tree with adapters) with every other parameter taken from `base` (a tree without them).

    Raises ValueError naming the first path that one tree has and the other lacks, or whose shape differs.
    """
    return _fill(fresh, base, "")


def _fill(fresh, base, path):
    names = set(fresh) - set(_ADAPTER)
    if names != set(base):
        raise ValueError(f"{path or 'parameters'}: expected {sorted(names)}, found {sorted(base)}")
    filled = dict(fresh)
    for name in names:
        here = f"{path}{name}"
        if isinstance(fresh[name], dict):
            filled[name] = _fill(fresh[name], base[name], f"{here}/")
        elif fresh[name].shape != base[name].shape:
            raise ValueError(f"{here}: expected shape {fresh[name].shape}, found {base[name].shape}")
        else:
            filled[name] = base[name]
    return filled
