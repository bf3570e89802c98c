"""The training step as a program that can be compiled before there are parameters or data."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medplib_jax.batch import Batch
from medplib_jax.config.experiment import DataConfig, ExperimentConfig
from medplib_jax.config.model import ENCODED_MASK_SIDE, ModelConfig
from medplib_jax.models.layers import params_of
from medplib_jax.parallel.compilation import compiler_options
from medplib_jax.parallel.sharding import row_axes
from medplib_jax.train.optim import make_optimizer, make_schedule, partition
from medplib_jax.train.step import Knobs, abstract_model, make_state, make_train_step, state_shardings

STEPS = 1000  # of the schedule; no program depends on how many


@dataclasses.dataclass(frozen=True)
class Program:
    """`function(*args)`, its abstract arguments, and how it is compiled.

    `tokens`: positions it works off, or new ones it generates.
    """

    function: Callable
    args: tuple[Any, ...]
    jit: dict[str, Any]
    tokens: int
    loop_trips: int = 1  # of a loop that says nothing of its end

    def trace(self):
        return jax.jit(self.function, **self.jit).trace(*self.args)


def train_program(config: ExperimentConfig, mesh: Mesh, rows: int, length: int) -> Program:
    """The training step on a batch of `rows` x `length` positions."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows))
    model = abstract_model(config.model, config.sharding)
    trainable, _ = partition(params_of(model), config.optim.trainable)
    tx = make_optimizer(config.optim, trainable)
    shardings = state_shardings(model, config, tx, mesh)
    state = placed(jax.eval_shape(lambda params: make_state(params, config, tx), params_of(model)), shardings)
    batch = abstract_batch(config.data, config.model, mesh, rows, length)
    step = make_train_step(model, config, tx)
    knobs = Knobs(make_schedule(config.optim, STEPS, STEPS), config.train.seed)
    knobs = placed(knobs.arrays(), NamedSharding(mesh, PartitionSpec()))
    jit = {"donate_argnums": 0, "out_shardings": (shardings, None), "compiler_options": compiler_options(mesh)}
    return Program(step, (state, batch, knobs), jit, rows * length)


def peak_bytes(compiled, platform: str) -> int:
    """Bytes that a compiled program needs on each device.

    Temporaries of a GPU's or CPU's are one piece of memory, gaps included, which the compiler's own peak leaves out.
    """
    memory = compiled.memory_analysis()
    if platform == "tpu":
        return memory.peak_memory_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


def placed(shapes, shardings):
    """Shapes with shardings: a tree of them, or one for all."""
    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings), shapes)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )


def abstract_batch(data: DataConfig, model: ModelConfig, mesh: Mesh, rows: int, length: int) -> Batch:
    """The shapes of the batches that `data.pipeline` makes."""
    images, regions, points, masks = data.max_images, data.max_regions, model.region.max_points, data.max_masks
    clip, sam, canvas = model.image_size, model.mask_image_size, data.mask_canvas
    shown = (ENCODED_MASK_SIDE, ENCODED_MASK_SIDE)
    sharding = NamedSharding(mesh, PartitionSpec(row_axes(rows, mesh)))

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

    return Batch(
        tokens=array(length),
        valid=array(length, dtype=bool),
        targets=array(length),
        loss_weights=array(length, dtype=jnp.float32),
        feature_index=array(length),
        clip_pixels=array(images, clip, clip, 3, dtype=jnp.uint8),
        sam_pixels=array(sam, sam, 3, dtype=jnp.uint8),
        sam_box=array(4),
        region_points=array(regions, points, 2, dtype=jnp.float32),
        region_point_valid=array(regions, points, dtype=bool),
        region_image=array(regions),
        seg_position=array(masks),
        mask_valid=array(masks, dtype=bool),
        gt_masks=array(masks, canvas, canvas, dtype=jnp.uint8),
        mask_size=array(2),
        record=array(),
        segment=array(length) if data.pack else None,
        example_masks=array(images - 1, *shown, dtype=jnp.uint8) if model.icl.mask_tokens and images > 1 else None,
    )
