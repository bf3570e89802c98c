"""Answers and masks from one pass: batched prefill, then greedy or sampled decoding with a static KV cache in one loop."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from medplib_jax.config import ModelConfig
from medplib_jax.models.layers import abstract_module, bind
from medplib_jax.models.llm import init_cache, unstack
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.types import Array, Batch, Params


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


@flax.struct.dataclass
class Generation:
    """Answers of a batch. Tokens after the end (and the end token itself) are 0 and not counted in `lengths`."""

    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    mask_valid: Bool[Array, "B M"]  # the m-th <SEG> of the answer exists
    mask_logits: Float[Array, "B M h w"] | None  # None when no mask slots were asked for
    predicted_iou: Float[Array, "B M"] | None


@flax.struct.dataclass
class _Loop:
    step: Int[Array, ""]
    hidden: Float[Array, "B D"]  # state that predicts the next token
    done: Bool[Array, "B"]
    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    seg_hidden: Float[Array, "B M D"]
    seg_count: Int[Array, "B"]
    cache: object


class Generator:
    """Generates answers to prompt batches. Compiles once per prompt length and batch size.

    `max_masks` is the number of masks drawn per answer; a `<SEG>` beyond it stays in the text without a mask.
    """

    def __init__(self, config: ModelConfig, params: Params, *, eos_id: int, seg_id: int, max_new_tokens: int, max_masks: int, sampling: Sampling = Sampling()):
        self.params = jax.jit(unstack)(params)
        model = abstract_module(functools.partial(MedPLIB, config, stacked=False))
        self._generate = jax.jit(
            lambda params, batch, key: generate(
                bind(model, params), batch, key, eos_id=eos_id, seg_id=seg_id, max_new_tokens=max_new_tokens, max_masks=max_masks, sampling=sampling
            )
        )

    def __call__(self, batch: Batch, seed: int = 0) -> Generation:
        return self._generate(self.params, batch, jax.random.key(seed))


def generate(model: MedPLIB, batch: Batch, key: Array, *, eos_id: int, seg_id: int, max_new_tokens: int, max_masks: int, sampling: Sampling) -> Generation:
    """Prefill with right-padded prompts of different length, decode until every row has ended, then draw the masks.

    The state that predicts a `<SEG>` is kept when the token is drawn, so that masks need no second forward pass.
    """
    loop = jax.lax.while_loop(
        lambda loop: (loop.step < max_new_tokens) & ~loop.done.all(),
        lambda loop: _advance(model, loop, jax.random.fold_in(key, loop.step), eos_id, seg_id, sampling),
        _prefill(model, batch, max_new_tokens, max_masks),
    )
    mask_logits = predicted_iou = None
    if max_masks:
        mask_logits, predicted_iou = model.draw(loop.seg_hidden, batch)
    return Generation(loop.tokens, loop.lengths, jnp.arange(max_masks) < loop.seg_count[:, None], mask_logits, predicted_iou)


def _prefill(model: MedPLIB, batch: Batch, max_new_tokens: int, max_masks: int) -> _Loop:
    B, L = batch.tokens.shape
    x_BxLxD, _ = model.embed(batch)
    cache = init_cache(model.config, B, L + max_new_tokens, x_BxLxD.dtype)
    hidden_BxLxD, out = model.llm(x_BxLxD, batch.valid, cache=cache)
    lengths = batch.valid.sum(-1)
    return _Loop(
        step=jnp.zeros((), jnp.int32),
        hidden=jnp.take_along_axis(hidden_BxLxD, (lengths - 1)[:, None, None], axis=1)[:, 0],
        done=batch.record < 0,  # filler rows
        tokens=jnp.zeros((B, max_new_tokens), jnp.int32),
        lengths=jnp.zeros(B, jnp.int32),
        seg_hidden=jnp.zeros((B, max_masks, hidden_BxLxD.shape[-1]), hidden_BxLxD.dtype),
        seg_count=jnp.zeros(B, jnp.int32),
        cache=out["cache"],
    )


def _advance(model: MedPLIB, loop: _Loop, key: Array, eos_id: int, seg_id: int, sampling: Sampling) -> _Loop:
    """Draws one token per row and runs it through the decoder."""
    token_B = draw_token(model.llm.logits(loop.hidden), key, sampling)
    done_B = loop.done | (token_B == eos_id)
    token_B = jnp.where(done_B, 0, token_B)
    slot_BxM = (jnp.arange(loop.seg_hidden.shape[1]) == loop.seg_count[:, None]) & (token_B == seg_id)[:, None]
    x_Bx1xD = model.llm.embed(token_B[:, None])
    hidden_Bx1xD, out = model.llm(x_Bx1xD, ~done_B[:, None], cache=loop.cache)
    return _Loop(
        step=loop.step + 1,
        hidden=hidden_Bx1xD[:, 0],
        done=done_B,
        tokens=loop.tokens.at[:, loop.step].set(token_B),
        lengths=loop.lengths + ~done_B,
        seg_hidden=jnp.where(slot_BxM[:, :, None], loop.hidden[:, None], loop.seg_hidden),
        seg_count=loop.seg_count + (token_B == seg_id),
        cache=out["cache"],
    )


def draw_token(logits_BxV: Array, key: Array, sampling: Sampling) -> Array:
    """The next token per row, int32[B]: argmax at temperature 0, else nucleus sampling (Holtzman et al., 2020)."""
    if sampling.temperature == 0.0:
        return logits_BxV.argmax(-1).astype(jnp.int32)
    logits_BxV = logits_BxV / sampling.temperature
    if sampling.top_p < 1.0:
        descending = jnp.flip(jnp.sort(logits_BxV, axis=-1), axis=-1)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # probability of everything likelier; 0 for the likeliest
        smallest_kept = jnp.where(before < sampling.top_p, descending, jnp.inf).min(-1, keepdims=True)
        logits_BxV = jnp.where(logits_BxV >= smallest_kept, logits_BxV, -jnp.inf)
    return jax.random.categorical(key, logits_BxV).astype(jnp.int32)
