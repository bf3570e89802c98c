"""How the next token of an answer is drawn."""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt32

from medplib_jax.batch import Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Temperature 0 is greedy; top_p keeps the smallest set of tokens with that probability.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is outside (0, 1]")


GREEDY = Sampling()


@flax.struct.dataclass
class Draws:
    """How the next token of each row is drawn."""

    keys: UInt32[Array, "B 2"]  # one per answer: its draws depend on nothing else
    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]


def answer_draws(samplings: Sequence[Sampling], seeds: Sequence[int], records: Sequence[int]) -> Draws:
    """Draws for one answer per row, each from its own sampling, seed and record."""
    if all(sampling.temperature == 0 for sampling in samplings):
        keys = np.zeros((len(samplings), 2), np.uint32)  # which nothing is drawn from
    else:
        keys = _keys(np.asarray(seeds, np.uint32), np.asarray(records, np.int32))
    values = np.array([(sampling.temperature, sampling.top_p) for sampling in samplings], np.float32)
    return Draws(keys, values[:, 0], values[:, 1])


@jax.jit
def _keys(seeds_B: Array, records_B: Array) -> Array:
    """uint32 [B, 2]"""
    fold = jax.vmap(lambda seed, record: jax.random.fold_in(jax.random.key(seed), record))
    return jax.random.key_data(fold(seeds_B, records_B))


def draw_token(logits_BxV: Array, draws: Draws | None, place_B: Array) -> Array:
    """The token at `place_B` of each row's answer, int32[B].

    The likeliest one without draws or at temperature 0, else by nucleus sampling (Holtzman et al., 2020).
    """
    likeliest_B = logits_BxV.argmax(-1).astype(jnp.int32)
    if draws is None:
        return likeliest_B
    sampled_B = jax.lax.cond(
        (draws.temperature > 0).any(), lambda: _sample(logits_BxV, draws, place_B), lambda: likeliest_B
    )
    return jnp.where(draws.temperature > 0, sampled_B, likeliest_B)


def _sample(logits_BxV: Array, draws: Draws, place_B: Array) -> Array:
    scaled_BxV = logits_BxV / jnp.where(draws.temperature > 0, draws.temperature, 1.0)[:, None]
    descending = jnp.flip(jnp.sort(scaled_BxV, axis=-1), axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of everything likelier; 0 for the likeliest
    smallest_kept = jnp.where(before < draws.top_p[:, None], descending, jnp.inf).min(-1, keepdims=True)
    kept_BxV = jnp.where((scaled_BxV >= smallest_kept) | (draws.top_p >= 1.0)[:, None], scaled_BxV, -jnp.inf)
    keys_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(draws.keys), place_B)
    return jax.vmap(jax.random.categorical)(keys_B, kept_BxV).astype(jnp.int32)
