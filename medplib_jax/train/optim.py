"""AdamW with clipping; what trains and how fast is chosen by regular expressions over parameter paths."""

import math
import re
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import optax

from medplib_jax.batch import Array, Params, flatten, unflatten
from medplib_jax.config.experiment import OptimConfig

# Constants that are stored with the parameters. They never train (weight decay would shrink them) and stay float32.
CONSTANT = re.compile(r"(^|/)position_gaussian$")


def partition(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
    """(trainable, frozen): trainable are the leaves whose path some pattern is found in, but for `CONSTANT`.

    Raises ValueError for a pattern that matches nothing: it is misspelt, or the model lacks that part.
    """
    flat = flatten(params)
    matched = {pattern: {path for path in flat if re.search(pattern, path)} for pattern in patterns}
    for pattern, paths in matched.items():
        if not paths:
            raise ValueError(f"optim.trainable pattern {pattern!r} matches no parameter; parts are {sorted(params)}")
    chosen = {path for path in set().union(*matched.values()) if not CONSTANT.search(path)}
    trainable = {path: leaf for path, leaf in flat.items() if path in chosen}
    frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten(trainable), unflatten(frozen)


def warmup_steps(config: OptimConfig, epoch_steps: int) -> int:
    """`optim.warmup` is a share of ONE epoch; at least 2, as DeepSpeed's scheduler has it."""
    return max(2, int(config.warmup * epoch_steps))


@flax.struct.dataclass
class Schedule:
    """step -> learning rate, float32. Its numbers are a program's arguments: to change them compiles nothing anew.

    `warmup`: steps of the rise from 0. `total`: the step at which it is 0 again. `kind`: see `make_schedule`.
    """

    lr: float
    warmup: int
    total: int
    kind: str = flax.struct.field(pytree_node=False)

    def __call__(self, step: Array) -> Array:
        if self.kind == "reference":
            rate = jnp.where(step == 0, self.lr, self._linear(step - 1))
        else:
            rate = self._cosine(step) if self.kind == "cosine" else self._linear(step)
        return jnp.float32(rate)

    def _linear(self, step: Array) -> Array:
        falling = jnp.maximum(0.0, (self.total - step) / jnp.maximum(1, self.total - self.warmup))
        return self.lr * jnp.where(step < self.warmup, step / self.warmup, falling)

    def _cosine(self, step: Array) -> Array:
        done = jnp.clip((step - self.warmup) / jnp.maximum(1, self.total - self.warmup), 0.0, 1.0)
        rising = step / jnp.maximum(1, self.warmup)
        return self.lr * jnp.where(step < self.warmup, rising, 0.5 * (1 + jnp.cos(math.pi * done)))


def make_schedule(config: OptimConfig, total_steps: int, epoch_steps: int) -> Schedule:
    """From 0 up over the warm-up, then linearly to 0 at `total_steps`.

    `cosine` (transformers' get_cosine_schedule_with_warmup): the warm-up is ceil(share of the run), then half a cosine
    falls to 0.
    `reference` is the original's (DeepSpeed WarmupDecayLR, stepped after the optimizer): the first update runs at the
    full rate, and every later one is late by one step. Golden: opt_step.json.
    """
    of_run = config.schedule == "cosine"
    warmup = math.ceil(config.warmup * total_steps) if of_run else warmup_steps(config, epoch_steps)
    return Schedule(config.lr, warmup, total_steps, config.schedule)


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


def scale_by_rate() -> optax.GradientTransformationExtraArgs:
    """Multiplies each update by -`rate`, an argument of `update`. Its state counts the steps, as optax's schedules."""

    def update(updates, state, params=None, *, rate, **_):
        scaled = jax.tree.map(lambda update: -rate * update, updates)
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(lambda _: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), update)


def make_optimizer(config: OptimConfig, trainable: Params) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, then AdamW (decoupled decay, as torch.optim.AdamW), then the factor of each path.

    `update` takes the learning rate as `rate`. The chain is always the same, so that a resumed run may change any of
    its numbers. `trainable` says which paths there are.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decay_mask(config, trainable) if config.no_decay else None),
        scale_by_rate(),
        scale_by_tree(lr_factors(config, trainable)),
    )
