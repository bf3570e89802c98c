"""Where a training step's time goes: each part compiled and timed by itself, forward and backward as in the step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from medplib_jax.batch import combine
from medplib_jax.benchmarks.measure import Table, interleave
from medplib_jax.benchmarks.workload import example_batch
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.models.language.attention import attend_within, rotary_tables
from medplib_jax.models.layers import bind, draw_params, scan_layers
from medplib_jax.models.remat import remat
from medplib_jax.models.vision.clip import normalise_clip
from medplib_jax.train.losses import token_cross_entropy
from medplib_jax.train.optim import make_optimizer, partition
from medplib_jax.train.step import abstract_model


def measure(config: ExperimentConfig, rounds: int) -> Table:
    """Parts overlap a little (projections of attention run in one, norms in two) and leave out what joins them, so they need not add up."""
    programs = {name: _compiled(run, arguments) for name, (run, arguments) in parts(config).items()}
    for run in programs.values():
        run()
    table = Table(
        f"Parts of a training step, {config.model.llm.num_layers} layers", ("part", "median s", "spread", "share")
    )
    samples = interleave(programs, rounds)
    total = sum(found.median for found in samples.values())
    for name, found in samples.items():
        table.rows.append(
            (name, f"{found.median:.4f}", f"{100 * found.spread:.0f} %", f"{100 * found.median / total:.0f} %")
        )
        table.flat[f"parts.{name.replace(' ', '_')}.seconds"] = found.median
    return table


def _compiled(run: Callable, arguments: tuple) -> Callable[[], Any]:
    program = jax.jit(run).lower(*arguments).compile()
    return lambda: jax.block_until_ready(program(*arguments))


def parts(config: ExperimentConfig) -> dict[str, tuple[Callable, tuple]]:
    """{part: (function, arguments)}. Gradients are taken of what trains, and of what lies before it."""
    model = abstract_model(config.model)
    trainable, frozen = partition(jax.tree.map(jnp.asarray, draw_params(model, 0)), config.optim.trainable)
    frozen = jax.tree.map(lambda x: x.astype(config.optim.frozen_dtype), frozen)
    batch = jax.device_put(example_batch(config))
    B, L = batch.tokens.shape
    x = jax.random.normal(jax.random.key(0), (B, L, config.model.llm.hidden_size), jnp.dtype(config.model.dtype))
    seg_hidden = x[:, : config.data.max_masks]
    schedule = optax.constant_schedule(config.optim.lr)
    tx = make_optimizer(config.optim, schedule, trainable)

    def clip(frozen, trainable):
        pixels = normalise_clip(batch.clip_pixels[:, 0]).astype(config.model.dtype)
        return bind(model, combine(trainable, frozen)).clip(pixels)[0]

    def of_decoder(body):
        """The gradient of a scan over the decoder's layers or their experts."""

        def loss(trainable, x, frozen):
            llm = bind(model, combine(trainable, frozen)).llm
            return jnp.mean(jnp.square(body(llm, x).astype(jnp.float32)))

        return jax.grad(loss, argnums=(0, 1))

    def attention(llm, x):
        tables = rotary_tables(jnp.arange(L)[None], config.model.llm.head_dim, config.model.llm.rope_theta)

        def layer(layer, x, _):
            q, k, v = layer.attn.project(layer.input_norm(x), tables, None)
            return x + layer.attn.output(attend_within(q, k, v, batch.valid), None), None

        return scan_layers(llm.layers, layer, x, unroll=config.model.scan_unroll, wrap=remat(config.model.remat))[0]

    def experts(llm, x):
        def layer(mlp, x, rng):
            return x + mlp(x, batch.valid, train=True, rng=rng)[0], None

        rngs = jax.random.split(jax.random.key(1), config.model.llm.num_layers)
        return scan_layers(llm.moe, layer, x, rngs, unroll=config.model.scan_unroll, wrap=remat(config.model.remat))[0]

    def masks(trainable, seg_hidden, frozen):
        logits, _ = bind(model, combine(trainable, frozen)).draw(seg_hidden, batch)
        return jnp.mean(jnp.square(logits.astype(jnp.float32)))

    def head(trainable, x, frozen):
        kernel = combine(trainable, frozen)["llm"]["head"]["kernel"]
        return token_cross_entropy(x, kernel, batch.targets, batch.loss_weights, config.loss.ce_chunk)[0]

    def update(grads, state, trainable):
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    return {
        "CLIP": (clip, (frozen, trainable)),
        "LLM attention": (of_decoder(attention), (trainable, x, frozen)),
        "experts": (of_decoder(experts), (trainable, x, frozen)),
        "SAM and masks": (jax.grad(masks, argnums=(0, 1)), (trainable, seg_hidden, frozen)),
        "head and loss": (jax.grad(head, argnums=(0, 1)), (trainable, x, frozen)),
        "optimizer": (update, (trainable, tx.init(trainable), trainable)),
    }
