"""The programs that run on a pod (training step, teacher-forced pass, generation), with shapes in place of arrays."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medplib_jax.batch import Batch, Params, flatten, unflatten
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.config.model import LoraConfig
from medplib_jax.decode.generator import Decoder
from medplib_jax.decode.layout import decoding_model
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.models.layers import bind, model_shardings, params_of
from medplib_jax.models.whole import WholeModel
from medplib_jax.parallel.compilation import compiler_options
from medplib_jax.train.losses import divisors, total_loss
from medplib_jax.train.program import Program, abstract_batch, placed, train_program
from medplib_jax.train.step import abstract_model

PROGRAMS = ("train", "eval", "decode")


def make_program(
    kind: str, config: ExperimentConfig, mesh: Mesh, rows: int, length: int, quantize: str = ""
) -> Program:
    """One of PROGRAMS for a batch of `rows` x `length` positions.

    For generation these include the `eval.max_new_tokens` new ones, and `quantize` (`decode.layout.QUANTIZE`) says what
    has 8 bits.
    """
    if kind not in PROGRAMS:
        raise ValueError(f"program {kind!r} is not one of {PROGRAMS}")
    limit = config.model.llm.max_positions
    if not 0 < length <= limit:
        raise ValueError(f"length {length} is outside [1, model.llm.max_positions={limit}]")
    if kind == "decode":
        return _decode(config, mesh, rows, length, quantize)
    if quantize:
        raise ValueError(f"quantize {quantize!r} is for generation: in program {kind!r} nothing has 8 bits")
    return {"train": train_program, "eval": _eval}[kind](config, mesh, rows, length)


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


def _decode(config: ExperimentConfig, mesh: Mesh, rows: int, length: int, quantize: str) -> Program:
    """Prompt to answer and masks, every answer as long as it may be."""
    config = _for_evaluation(config)
    model, new_tokens = decoding_model(config.model, mesh, config.sharding, quantize), config.eval.max_new_tokens
    if length <= new_tokens:
        raise ValueError(f"length {length} leaves no room for a prompt: eval.max_new_tokens is {new_tokens}")
    ends = {
        "stop_ids": (2,),
        "seg_id": config.model.llm.vocab_size - 1,
    }  # any will do: values do not change the program
    decoder = Decoder(model, **ends, options=DecodeOptions(new_tokens, config.data.max_masks))

    def answer(params: Params, batch: Batch, limits_B: jax.Array, steps: jax.Array):
        slots = decoder.prefill(params, batch, limits_B, draws=None, seen=None, room=new_tokens)
        slots = decoder.decode(params, slots, 0, steps)
        masks = decoder.draw(params, decoder.prompts(slots)[0], batch, None) if config.data.max_masks else None
        return slots.tokens, slots.lengths, masks

    batch = abstract_batch(config.data, config.model, mesh, rows, length - new_tokens)
    steps = placed(jax.ShapeDtypeStruct((), jnp.int32), NamedSharding(mesh, PartitionSpec()))
    args = _evaluated(model, config, mesh), batch, batch.record, steps
    return Program(answer, args, {"compiler_options": compiler_options(mesh)}, rows * new_tokens, new_tokens)


def _for_evaluation(config: ExperimentConfig) -> ExperimentConfig:
    """Adapters are merged, nothing is kept for a backward pass."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, lora=LoraConfig(), remat="none"))


def _evaluated(model: WholeModel, config: ExperimentConfig, mesh: Mesh) -> Params:
    """The model's parameters as checkpoints have them; kernels of 8 bits and their scales as they are."""

    def shape(path: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        narrow = x.dtype == jnp.int8 or path.endswith("/kernel_scale")
        return jax.ShapeDtypeStruct(x.shape, x.dtype if narrow else config.model.dtype)

    shapes = unflatten({path: shape(path, x) for path, x in flatten(params_of(model)).items()})
    return placed(shapes, model_shardings(model, mesh))
