"""The training step: pure functions over plain pytrees, and the only place that takes gradients."""

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medplib_jax.batch import Array, Batch, Params, combine, flatten, unflatten
from medplib_jax.config.experiment import ExperimentConfig, ShardingConfig
from medplib_jax.config.model import ModelConfig
from medplib_jax.models.families import build_model
from medplib_jax.models.layers import abstract_module, bind, logical_axes, model_shardings, params_of
from medplib_jax.models.whole import WholeModel
from medplib_jax.parallel.compilation import compiler_options, release_memory
from medplib_jax.parallel.processes import wait_for_others
from medplib_jax.parallel.sharding import check_fits, optimizer_shardings, shard_param
from medplib_jax.train.losses import divisors, loss_sums, total_loss
from medplib_jax.train.optim import CONSTANT, partition
from medplib_jax.train.state import TrainState

log = logging.getLogger(__name__)

Metrics = dict[str, Array]


@functools.lru_cache(maxsize=8)
def abstract_model(config: ModelConfig, rules: ShardingConfig | None = None) -> WholeModel:
    """The model with shapes in place of arrays; read-only, because equal configs share it."""
    return abstract_module(lambda rngs: build_model(config, rngs, rules))


def place(params: Params, shardings: Params) -> Params:
    """Host arrays, the same in every process, to global arrays. (`device_put` would send all of them around to
    compare them.)
    """
    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), params, shardings
    )


def make_state(params: Params, config: ExperimentConfig, tx: optax.GradientTransformation) -> TrainState:
    """Step 0: trainable parameters (float32) with their moments, and frozen ones (`optim.frozen_dtype`).

    Constants stay in float32.
    """
    trainable, frozen = partition(params, config.optim.trainable)
    frozen = unflatten(
        {
            path: x if CONSTANT.search(path) else x.astype(config.optim.frozen_dtype)
            for path, x in flatten(frozen).items()
        }
    )
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, tx.init(trainable))


def state_shardings(
    model: WholeModel, config: ExperimentConfig, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """A TrainState of NamedShardings: moments lie where their parameter lies. Raises ValueError for a mesh that does
    not fit.
    """
    check_fits(config, mesh)
    shapes, _ = partition(params_of(model), config.optim.trainable)
    trainable, frozen = partition(model_shardings(model, mesh), config.optim.trainable)
    return TrainState(
        NamedSharding(mesh, PartitionSpec()), trainable, frozen, optimizer_shardings(tx, shapes, trainable, mesh)
    )


@flax.struct.dataclass
class Knobs:
    """What a training step takes beside its state and its batch: another value of it is no other program.

    `schedule`: step -> learning rate, a pytree of its numbers. `seed`: what all random draws depend on.
    """

    schedule: Callable[[Array], Array]
    seed: int

    def arrays(self) -> "Knobs":
        """With NumPy arrays in place of numbers, in the types in which a program takes them."""
        seed = np.uint32(self.seed % 2**32)  # all that `jax.random.key` uses of a larger one
        return jax.tree.map(lambda x: np.asarray(x, jnp.result_type(x)), self.replace(seed=seed))


def make_train_step(
    model: WholeModel, config: ExperimentConfig, tx: optax.GradientTransformation
) -> Callable[[TrainState, Batch, Knobs], tuple[TrainState, Metrics]]:
    """(state, batch, knobs) -> (state, metrics).

    With `optim.accumulate` > 1 the batch is worked off in that many parts, whose gradients add up to the whole batch's.
    Randomness depends on (seed, step) only.
    """

    def micro_loss(trainable: Params, frozen: Params, batch: Batch, rng: Array, divide_by):
        # so that each gradient is added up where its parameter lies, and never whole on every device
        params = jax.tree.map(
            lambda array, axes: shard_param(array, axes, model.rules), combine(trainable, frozen), logical_axes(model)
        )
        output, _ = bind(model, params)(batch, train=True, rng=rng)
        head = params["llm"]["head"]["kernel"]
        loss, metrics = total_loss(output, head, batch, config.loss, config.model, divide_by, model.rules)
        return loss, metrics | router_metrics(output.aux, config.optim.accumulate)

    gradient, tx = jax.value_and_grad(micro_loss, has_aux=True), optax.with_extra_args_support(tx)

    def gradients(state: TrainState, batch: Batch, rng: Array) -> tuple[Params, Metrics]:
        parts = config.optim.accumulate
        divide_by = divisors(batch, parts)
        if parts == 1:
            (_, metrics), grads = gradient(state.trainable, state.frozen, batch, rng, divide_by)
            return grads, metrics

        def add(total: Params, inputs):
            micro_batch, index = inputs
            (_, metrics), grads = gradient(
                state.trainable, state.frozen, micro_batch, jax.random.fold_in(rng, index), divide_by
            )
            return jax.tree.map(jnp.add, total, grads), metrics

        zeros = jax.tree.map(jnp.zeros_like, state.trainable)
        grads, metrics = jax.lax.scan(add, zeros, (split_batch(batch, parts), jnp.arange(parts)))
        return grads, jax.tree.map(lambda x: x.sum(0), metrics)

    def train_step(state: TrainState, batch: Batch, knobs: Knobs) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(knobs.seed), state.step)
        grads, metrics = gradients(state, batch, rng)
        rate = knobs.schedule(state.step)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable, rate=rate)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics |= {
            "grad_norm": optax.global_norm(grads),
            "lr": rate,
            "tokens": batch.valid.sum(),
            "target_tokens": batch.loss_weights.sum(),
            "masks": batch.mask_valid.sum(),
        }
        return state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state), metrics

    return train_step


def make_loss_sums(
    model: WholeModel, config: ExperimentConfig
) -> Callable[[Params, Batch], tuple[dict[str, Array], dict[str, Array]]]:
    """(parameters, batch) -> undivided sums of the loss terms, and what divides them; without dropout or gradients."""

    def sums(params: Params, batch: Batch):
        output, _ = bind(model, params)(batch)
        head = params["llm"]["head"]["kernel"]
        return loss_sums(output, head, batch, config.loss, config.model.mask, model.rules), divisors(batch)

    return sums


def split_batch(batch: Batch, parts: int) -> Batch:
    """[B, ...] -> [parts, B / parts, ...]: part i takes rows i, i + parts, ..., so that every device keeps rows of
    each part.
    """
    return jax.tree.map(lambda x: rearrange(x, "(row part) ... -> part row ...", part=parts), batch)


def router_metrics(aux: dict[str, Any], parts: int) -> Metrics:
    """Share of tokens per expert and of dropped tokens, mean over layers, divided by `parts`; nothing without
    experts.
    """
    if "expert_load" not in aux:
        return {}
    load_E = aux["expert_load"].mean(0) / parts
    return {f"expert_load/{i}": load_E[i] for i in range(load_E.shape[0])} | {"dropped": aux["dropped"].mean() / parts}


class CompiledStep:
    """The training step, compiled ahead once per bucket length; a batch of another shape in the same bucket is an
    error.
    """

    def __init__(self, step: Callable, shardings: TrainState, knobs: Knobs):
        mesh = jax.tree.leaves(shardings)[0].mesh
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._knobs = place(knobs.arrays(), jax.tree.map(lambda _: everywhere, knobs))
        options = compiler_options(mesh)
        self._jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)
        self._compiled: dict[int, Any] = {}  # by bucket length

    def compile(self, state: TrainState, batch: Batch) -> float:
        """Compiles the step for the batch's bucket; returns the seconds it took, 0 when it is compiled already."""
        length = batch.tokens.shape[1]
        if length in self._compiled:
            return 0.0
        start = time.perf_counter()
        self._compiled[length] = self._jitted.lower(state, batch, self._knobs).compile()
        seconds = time.perf_counter() - start
        release_memory()
        wait_for_others(f"compiled_{length}")
        log.info("compiled the step for length %d in %.1f s (%d so far)", length, seconds, len(self._compiled))
        return seconds

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """The next state and the metrics; `state` is gone. A bucket that is new is compiled first."""
        self.compile(state, batch)
        return self._compiled[batch.tokens.shape[1]](state, batch, self._knobs)
