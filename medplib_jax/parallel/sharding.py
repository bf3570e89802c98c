"""From logical axis names to shardings: one table, and three loud errors (no rule, same mesh axis twice, indivisible)."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medplib_jax.batch import Params
from medplib_jax.config.experiment import ExperimentConfig, ShardingConfig

BATCH_AXES = ("data", "fsdp", "expert")

Rules = Mapping[str, tuple[str, ...]]  # logical axis of a parameter -> mesh axes

_rules: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=ShardingConfig().rules)


@contextlib.contextmanager
def use_rules(rules: Rules) -> Iterator[None]:
    """Within the context programs are traced, and shardings made, by these rules instead of the default ones."""
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes of a logical axis."""
    return _rules.get()[name]


def partition_spec(path: str, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of one parameter. Raises ValueError naming `path` on a name without a rule, a mesh axis that two
    dimensions want, or a dimension that its mesh axes do not divide."""
    if len(axes) != len(shape):
        raise ValueError(f"{path}: {len(axes)} logical axes {axes} for shape {shape}")
    rules = _rules.get()
    used: dict[str, str] = {}
    spec = []
    for name, size in zip(axes, shape):
        if name is not None and name not in rules:
            raise ValueError(f"{path}: no sharding rule for logical axis {name!r}; rules exist for {sorted(rules)}")
        target = () if name is None else rules[name]
        for axis in target:
            if axis not in mesh.shape:
                raise ValueError(f"{path}: rule {name!r} -> {axis!r}, but the mesh has axes {tuple(mesh.shape)}")
            if axis in used:
                raise ValueError(
                    f"{path}: logical axes {used[axis]!r} and {name!r} are both mapped to mesh axis {axis!r}"
                )
            used[axis] = name
        parts = axis_size(mesh, target)
        if size % parts:
            raise ValueError(
                f"{path}: dimension {name!r} of size {size} is not divisible by {parts} (mesh axes {', '.join(target)})"
            )
        spec.append(target[0] if len(target) == 1 else target or None)
    return PartitionSpec(*spec)


def axis_size(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Devices along one entry of a PartitionSpec."""
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def param_shardings(logical_axes: Params, shapes: Params, mesh: Mesh) -> Params:
    """A tree of NamedShardings. `logical_axes` has tuples of names, `shapes` anything with `.shape`, in the same nesting."""
    return _walk((), logical_axes, shapes, mesh)


def _walk(path, axes, shapes, mesh):
    if not isinstance(shapes, dict):
        return NamedSharding(mesh, partition_spec("/".join(path), axes, shapes.shape, mesh))
    if set(axes) != set(shapes):
        raise ValueError(
            f"{'/'.join(path) or 'parameters'}: logical axes and shapes differ in {sorted(set(axes) ^ set(shapes))}"
        )
    return {key: _walk((*path, key), axes[key], shapes[key], mesh) for key in shapes}


def check_fits(config: ExperimentConfig, mesh: Mesh) -> None:
    """ValueError for what the shapes of the parameters do not show: rows, heads and experts that the mesh cannot share out evenly."""
    model, optim, rules = config.model, config.optim, config.sharding.rules
    shares = [("data.batch_size / optim.accumulate", config.data.batch_size // optim.accumulate, BATCH_AXES)]
    shares += [
        ("model.llm.num_heads", model.llm.num_heads, rules["heads"]),
        ("model.llm.num_kv_heads", model.llm.num_kv_heads, rules["kv_heads"]),
    ]
    shares += [("model.moe.num_experts", model.moe.num_experts, rules["expert"])] if model.moe_layers else []
    if config.data.batch_size % optim.accumulate:
        raise ValueError(
            f"data.batch_size {config.data.batch_size} is not a multiple of optim.accumulate {optim.accumulate}"
        )
    for name, count, axes in shares:
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
    """Tells the compiler that the first axis of `x` lies over data, fsdp and expert and nothing else is sharded, where `x` lives on a mesh.

    Without it a lookup in an embedding that is sharded along its width gives every device all rows of a slice of the width, and
    the compiler carries that through all layers.
    """
    mesh = jax.typeof(x).sharding.mesh
    return (
        x
        if mesh.size <= 1
        else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(row_axes(x.shape[0], mesh))))
    )


def shard_width(x: jax.Array) -> jax.Array:
    """Puts a lookup in an embedding that is sharded along its width halfway to `shard_rows`: the width still over the axes of `embed`, the
    rows over the others of theirs. In one step the compiler would keep the whole gradient of the lookup on every device.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.size <= 1 or row_axes(x.shape[0], mesh) is None:
        return x
    width = mesh_axes("embed")
    rows = tuple(axis for axis in BATCH_AXES if axis not in width)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(rows, *[None] * (x.ndim - 2), width)))


def shard_param(array: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A parameter, or one layer of a stack of them, where the rules put it; where it lives on no mesh it stays as it is."""
    mesh = jax.typeof(array).sharding.mesh
    if mesh.size <= 1:
        return array
    return jax.lax.with_sharding_constraint(
        array, NamedSharding(mesh, partition_spec("layer", axes[-array.ndim :], array.shape, mesh))
    )


def row_axes(rows: int, mesh) -> tuple[str, ...] | None:
    """Mesh axes of `rows` rows: data, fsdp and expert, or none when these do not divide them."""
    return None if rows % axis_size(mesh, BATCH_AXES) else BATCH_AXES


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
