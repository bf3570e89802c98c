"""From logical axis names to shardings: one table, and three loud errors (no rule, same mesh axis twice, indivisible)."""

import math
from collections.abc import Mapping

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medplib_jax.types import Params

BATCH_AXES = ("data", "fsdp")

# Logical axis of a parameter -> mesh axis (or axes), None: not sharded.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "vocab": None,  # 32,267 = 41 x 787 divides by no mesh; the embedding is sharded along its width instead
    "vision": None,  # CLIP and SAM: 0.4 B frozen parameters
    "layers": None,
    "lora_rank": None,
    "norm": None,
}


def partition_spec(path: str, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules=RULES) -> PartitionSpec:
    """The PartitionSpec of one parameter. Raises ValueError naming `path` on a name without a rule, a mesh axis that two
    dimensions want, or a dimension that its mesh axes do not divide."""
    if len(axes) != len(shape):
        raise ValueError(f"{path}: {len(axes)} logical axes {axes} for shape {shape}")
    used: dict[str, str] = {}
    spec = []
    for name, size in zip(axes, shape):
        if name is not None and name not in rules:
            raise ValueError(f"{path}: no sharding rule for logical axis {name!r}; rules exist for {sorted(rules)}")
        target = None if name is None else rules[name]
        for axis in (target,) if isinstance(target, str) else target or ():
            if axis not in mesh.shape:
                raise ValueError(f"{path}: rule {name!r} -> {axis!r}, but the mesh has axes {tuple(mesh.shape)}")
            if axis in used:
                raise ValueError(f"{path}: logical axes {used[axis]!r} and {name!r} are both mapped to mesh axis {axis!r}")
            used[axis] = name
        parts = axis_size(mesh, target)
        if size % parts:
            raise ValueError(f"{path}: dimension {name!r} of size {size} is not divisible by {parts} (mesh axes {target!r})")
        spec.append(target)
    return PartitionSpec(*spec)


def axis_size(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def param_shardings(logical_axes: Params, shapes: Params, mesh: Mesh, rules=RULES) -> Params:
    """A tree of NamedShardings. `logical_axes` has tuples of names, `shapes` anything with `.shape`, in the same nesting."""
    return _walk((), logical_axes, shapes, mesh, rules)


def _walk(path, axes, shapes, mesh, rules):
    if not isinstance(shapes, dict):
        return NamedSharding(mesh, partition_spec("/".join(path), axes, shapes.shape, mesh, rules))
    if set(axes) != set(shapes):
        raise ValueError(f"{'/'.join(path) or 'parameters'}: logical axes and shapes differ in {sorted(set(axes) ^ set(shapes))}")
    return {key: _walk((*path, key), axes[key], shapes[key], mesh, rules) for key in shapes}


def optimizer_shardings(tx: optax.GradientTransformation, shapes: Params, shardings: Params, mesh: Mesh):
    """Shardings of `tx.init(params)`: moments like their parameter, counters replicated.

    `jax.jit(tx.init)` alone would replicate the moments.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    return optax.tree_map_params(
        tx, lambda _, sharding: sharding, jax.eval_shape(tx.init, shapes), shardings, transform_non_params=lambda _: replicated
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over data and fsdp; all else is replicated."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of the global batch this process must load. Processes that are tensor or expert peers load the same ones.

    Raises ValueError when the batch does not divide over the mesh.
    """
    parts = axis_size(mesh, BATCH_AXES)
    if batch_size % parts:
        raise ValueError(f"batch size {batch_size} is not divisible by data x fsdp = {parts}")
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices.values()]))


def put_batch(batch, mesh: Mesh, batch_size: int):
    """Host rows (those of `process_rows`) to global arrays of `batch_size` rows."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:])), batch)
