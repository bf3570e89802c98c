"""AdamW with clipping; what trains and how fast is chosen by regular expressions over parameter paths."""

import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from medplib_jax.batch import Params, flatten, unflatten
from medplib_jax.config.experiment import OptimConfig


def partition(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
    """(trainable, frozen): trainable are the leaves whose path some pattern is found in.

    Raises ValueError for a pattern that matches nothing: it is misspelt, or the model lacks that part.
    """
    flat = flatten(params)
    matched = {pattern: {path for path in flat if re.search(pattern, path)} for pattern in patterns}
    for pattern, paths in matched.items():
        if not paths:
            raise ValueError(f"optim.trainable pattern {pattern!r} matches no parameter; parts are {sorted(params)}")
    chosen = set().union(*matched.values())
    trainable = {path: leaf for path, leaf in flat.items() if path in chosen}
    frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten(trainable), unflatten(frozen)


def warmup_steps(config: OptimConfig, epoch_steps: int) -> int:
    """`optim.warmup` is a share of ONE epoch; at least 2, as DeepSpeed's scheduler has it."""
    return max(2, int(config.warmup * epoch_steps))


def make_schedule(config: OptimConfig, total_steps: int, epoch_steps: int) -> optax.Schedule:
    """step -> learning rate: from 0 up over the warm-up, then linearly to 0 at `total_steps`.

    `cosine` (transformers' get_cosine_schedule_with_warmup): the warm-up is ceil(share of the run), then half a cosine
    falls to 0.
    `reference` is the original's (DeepSpeed WarmupDecayLR, stepped after the optimizer): the first update runs at the
    full rate, and every later one is late by one step. Golden: opt_step.json.
    """
    if config.schedule == "cosine":
        rising = math.ceil(config.warmup * total_steps)

        def cosine(step):
            done = jnp.clip((step - rising) / max(1, total_steps - rising), 0.0, 1.0)
            return config.lr * jnp.where(step < rising, step / max(1, rising), 0.5 * (1 + jnp.cos(math.pi * done)))

        return cosine
    warmup = warmup_steps(config, epoch_steps)

    def exact(step):
        rising = step / warmup
        falling = jnp.maximum(0.0, (total_steps - step) / max(1, total_steps - warmup))
        return config.lr * jnp.where(step < warmup, rising, falling)

    def reference(step):
        return jnp.where(step == 0, config.lr, exact(step - 1))

    return exact if config.schedule == "exact" else reference


def lr_factors(config: OptimConfig, params: Params) -> Params:
    """The factor on the learning rate of each leaf: that of the first matching pattern of `optim.lr_scale`, else 1.

    Raises ValueError for a pattern that matches nothing.
    """
    flat = flatten(params)
    for pattern, _ in config.lr_scale:
        if not any(re.search(pattern, path) for path in flat):
            raise ValueError(f"optim.lr_scale pattern {pattern!r} matches no trainable parameter")
    return unflatten(
        {path: next((f for pattern, f in config.lr_scale if re.search(pattern, path)), 1.0) for path in flat}
    )


def decay_mask(config: OptimConfig, params: Params) -> Params:
    """Which leaves weight decay shrinks. Raises ValueError for a pattern of `optim.no_decay` that matches nothing."""
    flat = flatten(params)
    for pattern in config.no_decay:
        if not any(re.search(pattern, path) for path in flat):
            raise ValueError(f"optim.no_decay pattern {pattern!r} matches no trainable parameter")
    return unflatten({path: not any(re.search(pattern, path) for pattern in config.no_decay) for path in flat})


def scale_by_tree(factors: Params) -> optax.GradientTransformation:
    """Multiplies each update by its leaf's factor."""
    return optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, factors))


def make_optimizer(config: OptimConfig, schedule: optax.Schedule, trainable: Params) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (decoupled decay, as torch.optim.AdamW), then the factor of each path.

    The chain is always the same, so that a resumed run may change any of its numbers. `trainable` says which paths
    there are.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decay_mask(config, trainable) if config.no_decay else None),
        optax.scale_by_learning_rate(schedule),
        scale_by_tree(lr_factors(config, trainable)),
    )
