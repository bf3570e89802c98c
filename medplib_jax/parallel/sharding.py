"""From logical axis names to shardings, by the rules of a config (`ShardingConfig`).

Rows of a batch are always spread over `BATCH_AXES`; the rules say where parameters go. They are an argument of every
function that needs them and a field of the models, which may be None as long as everything lives on one device. Three
errors are loud: a logical axis without a rule, a mesh axis that two dimensions want, and a dimension that its mesh axes
do not divide.
"""

import math
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medplib_jax.batch import Params
from medplib_jax.config.experiment import ExperimentConfig, ShardingConfig
from medplib_jax.config.model import ModelConfig

BATCH_AXES = ("data", "fsdp", "expert")


def mesh_axes(rules: ShardingConfig | None, name: str) -> tuple[str, ...]:
    """The mesh axes over which the rules spread a logical axis. ValueError for a model that was made without rules."""
    if rules is None:
        raise ValueError("a model on a mesh of several devices needs sharding rules, but was made without any")
    return rules.mesh_axes(name)


def partition_spec(
    path: str, axes: tuple[str | None, ...], shape: tuple[int, ...], rules: ShardingConfig | None, mesh: Mesh
) -> PartitionSpec:
    """The PartitionSpec of one parameter. Raises ValueError naming `path` on a name without a rule, a mesh axis that
    two dimensions want, or a dimension that its mesh axes do not divide."""
    if len(axes) != len(shape):
        raise ValueError(f"{path}: {len(axes)} logical axes {axes} for shape {shape}")
    used: dict[str, str] = {}
    spec = []
    for name, size in zip(axes, shape, strict=True):
        if name is not None and name not in ShardingConfig.names():
            raise ValueError(
                f"{path}: no sharding rule for logical axis {name!r}; rules exist for {ShardingConfig.names()}"
            )
        target = () if name is None else mesh_axes(rules, name)
        for axis in target:
            if axis in used:
                both = f"sharding.{used[axis]} and sharding.{name}"
                raise ValueError(f"{path}: {both} both map a dimension of it to mesh axis {axis!r}")
            used[axis] = str(name)
        parts = axis_size(mesh, target)
        if size % parts:
            raise ValueError(
                f"{path}: dimension {name!r} of size {size} is not divisible by {parts}, "
                f"the mesh axes of sharding.{name} ({', '.join(target)})"
            )
        spec.append(target[0] if len(target) == 1 else target or None)
    return PartitionSpec(*spec)


def axis_size(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Devices along one entry of a PartitionSpec."""
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def param_shardings(logical_axes: Params, shapes: Params, rules: ShardingConfig | None, mesh: Mesh) -> Params:
    """A tree of NamedShardings, for tuples of names and for leaves with `.shape` in the same nesting."""
    return _walk((), logical_axes, shapes, rules, mesh)


def _walk(path, axes, shapes, rules, mesh) -> Any:
    if not isinstance(shapes, dict):
        if rules is None and mesh.size == 1:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, partition_spec("/".join(path), axes, shapes.shape, rules, mesh))
    if set(axes) != set(shapes):
        raise ValueError(
            f"{'/'.join(path) or 'parameters'}: logical axes and shapes differ in {sorted(set(axes) ^ set(shapes))}"
        )
    return {key: _walk((*path, key), axes[key], shapes[key], rules, mesh) for key in shapes}


def check_fits(config: ExperimentConfig, mesh: Mesh) -> None:
    """ValueError for rows, heads or experts that the mesh cannot share out evenly: no parameter's shape shows it."""
    rows, parts = config.data.batch_size, config.optim.accumulate
    if rows % parts:
        raise ValueError(f"data.batch_size {rows} is not a multiple of optim.accumulate {parts}")
    _check_share("data.batch_size / optim.accumulate", rows // parts, BATCH_AXES, mesh)
    check_model_fits(config.model, config.sharding, mesh)


def check_model_fits(model: ModelConfig, rules: ShardingConfig | None, mesh: Mesh) -> None:
    """ValueError when the mesh cannot share out heads or experts evenly. A model without rules fits one device only."""
    if mesh.size == 1:
        return
    _check_share("model.llm.num_heads", model.llm.num_heads, mesh_axes(rules, "heads"), mesh)
    _check_share("model.llm.num_kv_heads", model.llm.num_kv_heads, mesh_axes(rules, "kv_heads"), mesh)
    if model.moe_layers:
        _check_share("model.moe.num_experts", model.moe.num_experts, mesh_axes(rules, "expert"), mesh)


def _check_share(name: str, count: int, axes: tuple[str, ...], mesh: Mesh) -> None:
    if count % axis_size(mesh, axes):
        described = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
        raise ValueError(f"{name} {count} cannot be shared out evenly over the mesh's {described}")


def optimizer_shardings(tx: optax.GradientTransformation, shapes: Params, shardings: Params, mesh: Mesh):
    """Shardings of `tx.init(params)`: moments like their parameter, counters replicated.

    `jax.jit(tx.init)` alone would replicate the moments.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    return optax.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, shapes),
        shardings,
        transform_non_params=lambda _: replicated,
    )


def shard_rows(x: jax.Array) -> jax.Array:
    """`x` with its first axis spread over BATCH_AXES and nothing else sharded, where it lives on a mesh.

    A lookup in an embedding that is sharded along its width comes out sharded along the width. The compiler would carry
    that through all layers, with the rows of the whole batch on every device.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.size <= 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(row_axes(x.shape[0], mesh))))


def shard_lookup(x: jax.Array, rules: ShardingConfig | None) -> jax.Array:
    """Embeddings that were looked up, [rows, ..., width], with the width over the mesh axes of `embed` as in the table.

    The rows lie over the rest of BATCH_AXES.

    It is the step between the sharding of the table and `shard_rows`. Without it the gradient, which goes the other
    way, would be whole on every device.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.size <= 1 or row_axes(x.shape[0], mesh) is None:
        return x
    width = mesh_axes(rules, "embed")
    rows = tuple(axis for axis in BATCH_AXES if axis not in width)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(rows, *[None] * (x.ndim - 2), width)))


def shard_param(array: jax.Array, axes: tuple[str | None, ...], rules: ShardingConfig | None) -> jax.Array:
    """A parameter, or one layer of a stack of them, sharded by the rules; unchanged where it lives on one device."""
    mesh = jax.typeof(array).sharding.mesh
    if mesh.size <= 1:
        return array
    spec = partition_spec("layer", axes[-array.ndim :], array.shape, rules, mesh)
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))


def row_axes(rows: int, mesh) -> tuple[str, ...] | None:
    """Mesh axes over which `rows` rows are spread: BATCH_AXES, or none when these do not divide them."""
    return None if rows % axis_size(mesh, BATCH_AXES) else BATCH_AXES


def activation_axes(rules: ShardingConfig | None, name: str, rows: tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes of an activation along a logical axis: those of the rule, or none if some of them carry its rows.

    Devices along an axis that carries rows hold different rows. They cannot hold parts of the same one.
    """
    axes = mesh_axes(rules, name)
    return axes if set(axes).isdisjoint(rows or ()) else ()


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over data, fsdp and expert; all else is replicated."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of the global batch this process must load. Processes that are tensor peers load the same ones.

    Raises ValueError when the batch does not divide over the mesh.
    """
    parts = axis_size(mesh, BATCH_AXES)
    if batch_size % parts:
        raise ValueError(f"batch size {batch_size} is not divisible by {' x '.join(BATCH_AXES)} = {parts}")
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices.values()]))


def put_batch(batch, mesh: Mesh, batch_size: int):
    """Host rows (those of `process_rows`) to global arrays of `batch_size` rows."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:])), batch
    )
