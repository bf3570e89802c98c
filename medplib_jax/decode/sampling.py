"""How the next token of an answer is drawn."""

import dataclasses

import jax
import jax.numpy as jnp

from medplib_jax.batch import Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 is greedy; top_p keeps the smallest set of tokens with that probability."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is outside (0, 1]")


def draw_token(logits_BxV: Array, key_B: Array | None, sampling: Sampling) -> Array:
    """The next token per row, int32[B]: argmax at temperature 0, else nucleus sampling (Holtzman et al., 2020) with each row's own key."""
    if sampling.temperature == 0.0:
        return logits_BxV.argmax(-1).astype(jnp.int32)
    logits_BxV = logits_BxV / sampling.temperature
    if sampling.top_p < 1.0:
        descending = jnp.flip(jnp.sort(logits_BxV, axis=-1), axis=-1)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = (
            jnp.cumsum(probabilities, axis=-1) - probabilities
        )  # probability of everything likelier; 0 for the likeliest
        smallest_kept = jnp.where(before < sampling.top_p, descending, jnp.inf).min(-1, keepdims=True)
        logits_BxV = jnp.where(logits_BxV >= smallest_kept, logits_BxV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(key_B, logits_BxV).astype(jnp.int32)
