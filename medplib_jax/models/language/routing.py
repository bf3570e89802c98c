"""Which experts a token goes to: two routing rules, and the loss that balances them.

A routing rule turns router probabilities into `Routing`: `dropless` keeps every token, `capacity` is DeepSpeed 0.13.1's
rule. The tokens that compete for an expert's capacity are all those of a (micro-)batch, on whichever devices they are:
no mesh changes which are dropped. DeepSpeed lets the tokens of each rank compete among themselves, so its numbers are
these where it runs on one rank. On more its experts take ceil(factor * tokens / E) of every rank.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from medplib_jax.batch import Array
from medplib_jax.models.precision import product


@flax.struct.dataclass
class Routing:
    """Which experts a token goes to. A dropped choice has weight 0 and `kept` False. S tokens, k choices."""

    expert: Int[Array, "S k"]
    weight: Float[Array, "S k"]
    kept: Bool[Array, "S k"]


def expert_capacity(num_tokens: int, num_experts: int, factor: float, min_capacity: int) -> int:
    """Tokens per expert by DeepSpeed's rule (`sharded_moe._capacity`): rounded to float32 before ceil."""
    return max(math.ceil(np.float32(num_tokens / num_experts) * np.float32(factor)), min_capacity)


def route_dropless(probs_SxE: Array, top_k: int) -> Routing:
    """The k likeliest experts, none dropped, weighted by their probabilities, for k > 1 divided by their sum."""
    expert = probs_SxE.argmax(-1, keepdims=True).astype(jnp.int32) if top_k == 1 else jax.lax.top_k(probs_SxE, top_k)[1]
    weight = _pick(probs_SxE, expert)
    if top_k > 1:
        weight = weight / weight.sum(-1, keepdims=True)
    return Routing(expert, weight, jnp.ones(expert.shape, bool))


def route_capacity(probs_SxE: Array, logits_SxE: Array, top_k: int, capacity: int, noise_SxE: Array | None) -> Routing:
    """DeepSpeed 0.13.1 `top1gating` (uniform noise on tokens) and `top2gating` (Gumbel noise on second choices).

    Without noise, the tokens that come first survive (top-1), and the second choice is the second likeliest (top-2).
    """
    if top_k == 1:
        return _route_top1(probs_SxE, capacity, noise_SxE)
    return _route_top2(probs_SxE, logits_SxE, capacity, noise_SxE)


def _route_top1(probs, capacity, noise):
    num_tokens, num_experts = probs.shape
    expert = probs.argmax(-1)
    member = jax.nn.one_hot(expert, num_experts, dtype=bool)
    priority = jnp.where(member, 0.0 if noise is None else noise, -1.0)
    rank = jnp.argsort(jnp.argsort(-priority, axis=0, stable=True), axis=0)
    kept = (member & (rank < capacity)).any(-1)
    expert, kept = expert[:, None], kept[:, None]
    return Routing(expert, _pick(probs, expert) * kept, kept)


def _route_top2(probs, logits, capacity, noise):
    num_experts = probs.shape[1]
    first = probs.argmax(-1)
    first_mask = jax.nn.one_hot(first, num_experts, dtype=jnp.int32)
    second = jnp.where(first_mask > 0, -jnp.inf, logits if noise is None else logits + noise).argmax(-1)
    second_mask = jax.nn.one_hot(second, num_experts, dtype=jnp.int32)
    queue_first = ((jnp.cumsum(first_mask, 0) - 1) * first_mask).sum(-1)
    queue_second = ((jnp.cumsum(second_mask, 0) - 1 + first_mask.sum(0)) * second_mask).sum(-1)
    expert = jnp.stack([first, second], -1)
    kept = jnp.stack([queue_first, queue_second], -1) < capacity
    weight = _pick(probs, expert) * kept
    return Routing(expert, weight / jnp.maximum(weight.sum(-1, keepdims=True), jnp.finfo(jnp.float32).eps), kept)


def _pick(probs_SxE: Array, expert_Sxk: Array) -> Array:
    """The chosen experts' probabilities [S, k], as a masked sum: its gradient needs no scatter."""
    return (jax.nn.one_hot(expert_Sxk, probs_SxE.shape[1]) * probs_SxE[:, None, :]).sum(-1)


def load_balancing_loss(probs_SxE: Array, first_choice_S: Array, count_S: Array) -> Array:
    """E * sum_e mean(probability of e) * mean(first choice is e) over the tokens that count.

    GShard, equation 4; DeepSpeed's l_aux.
    """
    num_experts = probs_SxE.shape[1]
    share = count_S / jnp.maximum(count_S.sum(), 1)
    chosen = jax.nn.one_hot(first_choice_S, num_experts)
    return num_experts * jnp.sum(product(share, probs_SxE) * product(share, chosen))
