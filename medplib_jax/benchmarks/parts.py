"""Where a training step's time goes: each part compiled and timed by itself, forward and backward as in the step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from medplib_jax.batch import Array, Params, combine
from medplib_jax.benchmarks.measure import Table, interleave
from medplib_jax.benchmarks.workload import example_batch
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.models.language.attention import Positions, attend_within, rotary_frequencies, rotary_tables
from medplib_jax.models.layers import bind, draw_params, scan_layers
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.models.remat import remat
from medplib_jax.models.vision.clip import normalise_clip
from medplib_jax.train.losses import token_cross_entropy
from medplib_jax.train.optim import make_optimizer, partition
from medplib_jax.train.step import abstract_model


def measure(config: ExperimentConfig, rounds: int) -> Table:
    """A row per part of the step.

    Parts overlap a little (projections of attention run in one, norms in two) and leave out what joins them, so they
    need not add up.
    """
    programs = {name: _compiled(run, arguments) for name, (run, arguments) in Parts(config).programs().items()}
    for run in programs.values():
        run()
    title = f"Parts of a training step, {config.model.llm.num_layers} layers"
    table = Table(title, ("part", "median s", "spread", "share"))
    samples = interleave(programs, rounds)
    total = sum(found.median for found in samples.values())
    for name, found in samples.items():
        spread, share = f"{100 * found.spread:.0f} %", f"{100 * found.median / total:.0f} %"
        table.rows.append((name, f"{found.median:.4f}", spread, share))
        table.flat[f"parts.{name.replace(' ', '_')}.seconds"] = found.median
    return table


def _compiled(run: Callable, arguments: tuple) -> Callable[[], Any]:
    program = jax.jit(run).lower(*arguments).compile()
    return lambda: jax.block_until_ready(program(*arguments))


class Parts:
    """The parts of a step as functions of the parameters that train, those that do not, and random input."""

    def __init__(self, config: ExperimentConfig):
        self.config, self.model = config, abstract_model(config.model)
        self.batch = jax.device_put(example_batch(config))

    def programs(self) -> dict[str, tuple[Callable, tuple]]:
        """{part: (function, arguments)}. Gradients are taken of what trains, and of what lies before it."""
        config = self.config
        params = jax.tree.map(jnp.asarray, draw_params(self.model, 0))
        trainable, frozen = partition(params, config.optim.trainable)
        frozen = jax.tree.map(lambda x: x.astype(config.optim.frozen_dtype), frozen)
        shape = (*self.batch.tokens.shape, config.model.llm.hidden_size)
        x = jax.random.normal(jax.random.key(0), shape, jnp.dtype(config.model.dtype))
        tx = make_optimizer(config.optim, trainable)

        def update(grads, state, trainable):
            updates, state = tx.update(grads, state, trainable, rate=config.optim.lr)
            return optax.apply_updates(trainable, updates), state

        both, seg_hidden = (0, 1), x[:, : config.data.max_masks]
        return {
            "CLIP": (self.clip, (trainable, frozen)),
            "LLM attention": (jax.grad(self.attention, both), (trainable, x, frozen)),
            "experts": (jax.grad(self.experts, both), (trainable, x, frozen)),
            "SAM and masks": (jax.grad(self.masks, both), (trainable, seg_hidden, frozen)),
            "head and loss": (jax.grad(self.head, both), (trainable, x, frozen)),
            "optimizer": (update, (trainable, tx.init(trainable), trainable)),
        }

    def bound(self, trainable: Params, frozen: Params) -> MedPLIB:
        return bind(self.model, combine(trainable, frozen))

    def clip(self, trainable: Params, frozen: Params) -> Array:
        pixels = normalise_clip(self.batch.clip_pixels[:, 0]).astype(self.config.model.dtype)
        return self.bound(trainable, frozen).clip(pixels)[0]

    def attention(self, trainable: Params, x_BxLxD: Array, frozen: Params) -> Array:
        llm = self.config.model.llm
        frequencies = rotary_frequencies(llm.head_dim, llm.rope_theta)
        positions = Positions(rotary_tables(jnp.arange(x_BxLxD.shape[1])[None], frequencies))

        def layer(layer, x, _):
            q, k, v = layer.attn.project(layer.input_norm(x), positions, None)
            return x + layer.attn.output(attend_within(q, k, v, self.batch.valid), None), None

        return self._mean_square_of(layer, self.bound(trainable, frozen).llm.layers, x_BxLxD)

    def experts(self, trainable: Params, x_BxLxD: Array, frozen: Params) -> Array:
        def layer(mlp, x, rng):
            return x + mlp(x, self.batch.valid, train=True, rng=rng)[0], None

        rngs = jax.random.split(jax.random.key(1), self.config.model.llm.num_layers)
        return self._mean_square_of(layer, self.bound(trainable, frozen).llm.moe, x_BxLxD, rngs)

    def _mean_square_of(self, layer: Callable, stacked, x_BxLxD: Array, *scanned: Array) -> Array:
        """Of what comes out of the stack of layers."""
        model = self.config.model
        y = scan_layers(stacked, layer, x_BxLxD, *scanned, unroll=model.scan_unroll, wrap=remat(model.remat))[0]
        return _mean_square(y)

    def masks(self, trainable: Params, seg_hidden_BxMxD: Array, frozen: Params) -> Array:
        return _mean_square(self.bound(trainable, frozen).draw(seg_hidden_BxMxD, self.batch)[0])

    def head(self, trainable: Params, x_BxLxD: Array, frozen: Params) -> Array:
        kernel, batch = combine(trainable, frozen)["llm"]["head"]["kernel"], self.batch
        return token_cross_entropy(x_BxLxD, kernel, batch.targets, batch.loss_weights, self.config.loss.ce_chunk)[0]


def _mean_square(x: Array) -> Array:
    return jnp.mean(jnp.square(x.astype(jnp.float32)))
