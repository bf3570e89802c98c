"""The programs that run on a pod (training step, teacher-forced pass, generation), with shapes in place of arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medplib_jax.batch import Batch, Params
from medplib_jax.config.experiment import DataConfig, ExperimentConfig
from medplib_jax.config.model import ENCODED_MASK_SIDE, LoraConfig, ModelConfig
from medplib_jax.decode.generator import Decoder
from medplib_jax.decode.layout import decoding_model
from medplib_jax.models.layers import bind, model_shardings, params_of
from medplib_jax.models.whole import WholeModel
from medplib_jax.parallel.compilation import compiler_options
from medplib_jax.parallel.sharding import row_axes
from medplib_jax.train.losses import divisors, total_loss
from medplib_jax.train.optim import make_optimizer, make_schedule, partition
from medplib_jax.train.step import abstract_model, make_state, make_train_step, state_shardings

PROGRAMS = ("train", "eval", "decode")
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


def make_program(kind: str, config: ExperimentConfig, mesh: Mesh, rows: int, length: int) -> Program:
    """One of PROGRAMS for a batch of `rows` x `length` positions.

    For generation these include the `eval.max_new_tokens` new ones.
    """
    if kind not in PROGRAMS:
        raise ValueError(f"program {kind!r} is not one of {PROGRAMS}")
    limit = config.model.llm.max_positions
    if not 0 < length <= limit:
        raise ValueError(f"length {length} is outside [1, model.llm.max_positions={limit}]")
    return {"train": _train, "eval": _eval, "decode": _decode}[kind](config, mesh, rows, length)


def _train(config: ExperimentConfig, mesh: Mesh, rows: int, length: int) -> Program:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows))
    model = abstract_model(config.model, config.sharding)
    trainable, _ = partition(params_of(model), config.optim.trainable)
    schedule = make_schedule(config.optim, STEPS, STEPS)
    tx = make_optimizer(config.optim, schedule, trainable)
    shardings = state_shardings(model, config, tx, mesh)
    state = _placed(jax.eval_shape(lambda params: make_state(params, config, tx), params_of(model)), shardings)
    batch = abstract_batch(config.data, config.model, mesh, rows, length)
    step = make_train_step(model, config, tx, schedule)
    jit = {"donate_argnums": 0, "out_shardings": (shardings, None), "compiler_options": compiler_options(mesh)}
    return Program(step, (state, batch), jit, rows * length)


def _eval(config: ExperimentConfig, mesh: Mesh, rows: int, length: int) -> Program:
    """Losses of answers that are given, as the router's probe and scoring by likelihood compute them."""
    config = _for_evaluation(config)
    model = abstract_model(config.model, config.sharding)

    def score(params: Params, batch: Batch):
        output, _ = bind(model, params)(batch)
        head = params["llm"]["head"]["kernel"]
        return total_loss(output, head, batch, config.loss, config.model, divisors(batch), model.rules)[1]

    batch = abstract_batch(config.data, config.model, mesh, rows, length)
    return Program(score, (_evaluated(model, config, mesh), batch), {}, rows * length)


def _decode(config: ExperimentConfig, mesh: Mesh, rows: int, length: int) -> Program:
    """Prompt to answer and masks, every answer as long as it may be."""
    config = _for_evaluation(config)
    model, new_tokens = decoding_model(config.model, mesh, config.sharding), config.eval.max_new_tokens
    if length <= new_tokens:
        raise ValueError(f"length {length} leaves no room for a prompt: eval.max_new_tokens is {new_tokens}")
    ends = {
        "stop_ids": (2,),
        "seg_id": config.model.llm.vocab_size - 1,
    }  # any will do: values do not change the program
    decoder = Decoder(model, **ends, max_new_tokens=new_tokens, max_masks=config.data.max_masks, original_masks=False)

    def answer(params: Params, batch: Batch, limits_B: jax.Array, steps: jax.Array):
        slots = decoder.prefill(params, batch, limits_B, draws=None, seen=None, room=new_tokens)
        slots = decoder.decode(params, slots, 0, steps)
        masks = decoder.draw(params, decoder.prompts(slots)[0], batch, None) if config.data.max_masks else None
        return slots.tokens, slots.lengths, masks

    batch = abstract_batch(config.data, config.model, mesh, rows, length - new_tokens)
    steps = _placed(jax.ShapeDtypeStruct((), jnp.int32), NamedSharding(mesh, PartitionSpec()))
    args = _evaluated(model, config, mesh), batch, batch.record, steps
    return Program(answer, args, {"compiler_options": compiler_options(mesh)}, rows * new_tokens, new_tokens)


def _for_evaluation(config: ExperimentConfig) -> ExperimentConfig:
    """Adapters are merged, nothing is kept for a backward pass."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, lora=LoraConfig(), remat="none"))


def _evaluated(model: WholeModel, config: ExperimentConfig, mesh: Mesh) -> Params:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, config.model.dtype), params_of(model))
    return _placed(shapes, model_shardings(model, mesh))


def _placed(shapes, shardings):
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
