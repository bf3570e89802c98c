"""Answers and masks: greedy or sampled decoding in a fixed number of slots, each with its part of a static KV cache.

An answer that ends frees its slot for the next prompt while the others go on (continuous batching; Yu et al., Orca, OSDI 2022), so that
one long answer does not hold a batch. What a row computes depends on that row alone: experts drop nothing, random draws come from the
record's own key, and all shapes are fixed, so the answer is the same whatever shares the batch.
"""

import dataclasses
import threading

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from medplib_jax.batch import Array, Batch, Params
from medplib_jax.config.model import ModelConfig
from medplib_jax.decode_layout import decoding_model, is_laid_out, lay_out
from medplib_jax.models.language.attention import KVCache
from medplib_jax.models.language.llama import init_cache
from medplib_jax.models.layers import bind
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.parallel.compilation import compiler_options
from medplib_jax.parallel.mesh import one_device
from medplib_jax.parallel.sharding import BATCH_AXES, axis_size, batch_sharding, mesh_axes
from medplib_jax.routing import count_choices, token_kinds


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
    choices: Int[Array, "B n kinds E"] | None = None  # tokens of each kind (`routing.TOKEN_KINDS`) per expert and MoE layer; None without experts


@flax.struct.dataclass
class Slots:
    """Answers in the making, one per slot."""

    cache: KVCache
    hidden: Float[Array, "S D"]  # state that predicts the next token
    previous: Float[Array, "S D"]  # the state before that; of an answer that ended, before the one that predicted its last token
    active: Bool[Array, "S"]
    limits: Int[Array, "S"]  # most tokens of the answer
    records: Int[Array, "S"]  # of which the random draws depend
    tokens: Int[Array, "S T"]
    lengths: Int[Array, "S"]
    seg_hidden: Float[Array, "S M D"]
    seg_count: Int[Array, "S"]
    choices: Int[Array, "S n kinds E"] | None


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The pure functions of decoding, with what is fixed for all answers."""

    model: MedPLIB
    eos_id: int
    seg_id: int
    max_new_tokens: int
    max_masks: int
    sampling: Sampling
    original_masks: bool

    def empty(self, like: Slots, slots: int, room: int) -> Slots:
        """`slots` slots in which nothing happens, for prompts of the length of `like` and answers of `room` tokens."""
        zeros = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype), like.replace(cache=None))
        values = like.cache.v[0]
        return zeros.replace(cache=init_cache(self.model.config, slots, values.shape[2] + room, values.dtype))

    def prefill(self, params: Params, batch: Batch, limits_B: Array, room: int) -> Slots:
        """Runs right-padded prompts [B, L] of different lengths; the cache has L + room positions. Filler rows are not active."""
        model = bind(self.model, params)
        B, L = batch.tokens.shape
        x_BxLxD, _ = model.embed(batch)
        hidden_BxLxD, out = model.llm(x_BxLxD, batch.valid, new_cache=L + room)
        last_B = batch.valid.sum(-1) - 1
        seg_hidden = jnp.zeros((B, self.max_masks, x_BxLxD.shape[-1]), hidden_BxLxD.dtype)
        seg_count = jnp.zeros(B, jnp.int32)
        if self.original_masks:
            said_BxL = batch.tokens == self.seg_id
            seg_count = said_BxL.any(-1).astype(jnp.int32)
            seg_hidden = seg_hidden.at[:, 0].set(_at(hidden_BxLxD, jnp.maximum(said_BxL.argmax(-1) - 1, 0)))
        choices = None
        if model.config.moe_layers:
            num_image_features = batch.clip_pixels.shape[1] * model.config.clip.num_patches
            kinds_BxL = token_kinds(batch.tokens, batch.feature_index, batch.valid, num_image_features, self.seg_id)
            choices = count_choices(out["expert_index"], kinds_BxL, model.config.moe.num_experts)
        return Slots(
            cache=out["cache"],
            hidden=_at(hidden_BxLxD, last_B),
            previous=_at(hidden_BxLxD, jnp.maximum(last_B - 1, 0)),
            active=(batch.record >= 0) & (limits_B > 0),
            limits=limits_B,
            records=batch.record,
            tokens=jnp.zeros((B, self.max_new_tokens), jnp.int32),
            lengths=jnp.zeros(B, jnp.int32),
            seg_hidden=seg_hidden,
            seg_count=seg_count,
            choices=choices,
        )

    def decode(self, params: Params, slots: Slots, keep: Array, seed: Array) -> Slots:
        """Draws tokens until no more than `keep` slots are active.

        The cache of a single slot goes round the loop without the axis of slots: XLA drops that axis for products, and what would be written
        with it and read without it is copied, four times its size per token.
        """
        model = bind(self.model, params)
        fold, unfold = (_without_rows, _with_rows) if len(slots.active) == 1 else (_same, _same)

        def advance(slots: Slots) -> Slots:
            return fold(self._advance(model, unfold(slots), seed))

        return unfold(jax.lax.while_loop(lambda slots: slots.active.sum() > keep, advance, fold(slots)))

    def _advance(self, model: MedPLIB, slots: Slots, seed: Array) -> Slots:
        """Draws one token per active slot and runs it through the decoder."""
        token_S = draw_token(model.llm.logits(slots.hidden), _keys(seed, slots) if self.sampling.temperature else None, self.sampling)
        drawn_S = slots.active & (token_S != self.eos_id)
        token_S = jnp.where(drawn_S, token_S, 0)
        rows, place = jnp.arange(len(token_S)), jnp.minimum(slots.lengths, self.max_new_tokens - 1)
        lengths = slots.lengths + drawn_S
        active = drawn_S & (lengths < slots.limits)
        seg_S = drawn_S & (token_S == self.seg_id)
        slot_SxM = (jnp.arange(self.max_masks) == slots.seg_count[:, None]) & seg_S[:, None]
        hidden_Sx1xD, out = model.llm(model.llm.embed(token_S[:, None]), drawn_S[:, None], cache=slots.cache)
        choices = slots.choices
        if choices is not None:
            kinds_Sx1 = token_kinds(token_S[:, None], jnp.full((len(rows), 1), -1), drawn_S[:, None], 0, self.seg_id)
            choices = choices + count_choices(out["expert_index"], kinds_Sx1, model.config.moe.num_experts)
        return slots.replace(
            cache=out["cache"],
            hidden=hidden_Sx1xD[:, 0],
            previous=jnp.where(active[:, None], slots.hidden, slots.previous),
            active=active,
            tokens=slots.tokens.at[rows, place].set(jnp.where(drawn_S, token_S, slots.tokens[rows, place])),
            lengths=lengths,
            seg_hidden=jnp.where(slot_SxM[:, :, None], slots.hidden[:, None], slots.seg_hidden),
            seg_count=slots.seg_count + seg_S,
            choices=choices,
        )

    def prompts(self, slots: Slots) -> tuple[Array, Array]:
        """What the masks of ended answers are drawn from: states [S, M, D] and bool [S, M], which of them exist."""
        valid_SxM = jnp.arange(self.max_masks) < slots.seg_count[:, None]
        if not self.original_masks:
            return slots.seg_hidden, valid_SxM
        without = slots.seg_count == 0
        first = jnp.where(without[:, None], slots.previous, slots.seg_hidden[:, 0])
        return slots.seg_hidden.at[:, 0].set(first), valid_SxM.at[:, 0].set(True)

    def draw(self, params: Params, seg_hidden_BxMxD: Array, batch: Batch) -> tuple[Array, Array]:
        return bind(self.model, params).draw(seg_hidden_BxMxD, batch)


class Generator:
    """Generates answers, for a batch at once or step by step for a stream of prompts (`stream.py`). Compiles once per prompt length and batch size.

    `max_masks` is the number of masks drawn per answer; a `<SEG>` beyond it stays in the text without a mask. With `original_masks` one
    mask is drawn as the original does (model/MedPLIB.py evaluate): from the first `<SEG>` of prompt and answer, and where there is none
    from the second last state. `params` are a checkpoint's, or laid out already (`lay_out`). `mesh`: devices of
    this process that share the work (its data and fsdp axes) and hold the parameters. `quantize`: see `decode_layout.decoding_model`.
    """

    def __init__(
        self, config: ModelConfig, params: Params, *, eos_id: int, seg_id: int, max_new_tokens: int, max_masks: int,
        sampling: Sampling = Sampling(), original_masks: bool = False, mesh: Mesh | None = None, quantize: str = "",
    ):  # fmt: skip
        if original_masks and max_masks != 1:
            raise ValueError(f"the original draws one mask per answer, not {max_masks}")
        self.mesh = mesh or one_device()
        model = decoding_model(config, quantize, self.mesh)
        self._decoder = decoder = Decoder(model, eos_id, seg_id, max_new_tokens, max_masks, sampling, original_masks)
        self.params = params if is_laid_out(params) else lay_out(config, params, self.mesh, quantize)
        self._rows = batch_sharding(self.mesh)
        self._dispatch = threading.Lock()  # of programs that several threads ask for, so that each is compiled once
        slots, options = self._slot_shardings(), compiler_options(self.mesh)
        self._prefill = jax.jit(decoder.prefill, static_argnames="room", out_shardings=slots, compiler_options=options)
        self._decode = jax.jit(decoder.decode, donate_argnums=1, out_shardings=slots, compiler_options=options)
        self._insert = jax.jit(_insert, donate_argnums=0, out_shardings=slots)
        self._empty = jax.jit(decoder.empty, static_argnums=(1, 2), out_shardings=slots)
        self._prompts = jax.jit(decoder.prompts)
        self._draw = jax.jit(decoder.draw)

    def _slot_shardings(self) -> Slots:
        """Slots lie where their rows are computed, keys and values where their heads are."""
        fields = {field.name: self._rows for field in dataclasses.fields(Slots)}
        buffers = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES, mesh_axes("kv_heads")))
        fields["cache"] = KVCache(buffers, buffers, self._rows)
        return Slots(**fields | ({} if self._decoder.model.config.moe_layers else {"choices": None}))

    def __call__(self, batch: Batch, seed: int = 0) -> Generation:
        """The answers to a batch of prompts, all of them drawn before any is returned."""
        rows = len(batch.record)
        batch = _fill(batch, -rows % axis_size(self.mesh, BATCH_AXES))
        limits = np.full(len(batch.record), self._decoder.max_new_tokens, np.int32)
        slots = self._prefill(self.params, self._put(batch), self._put(limits), room=self._decoder.max_new_tokens)
        slots = self._decode(self.params, slots, 0, seed)
        seg_hidden, mask_valid = self._prompts(slots)
        mask_logits, predicted_iou = self._draw(self.params, seg_hidden, self._put(batch)) if self._decoder.max_masks else (None, None)
        return jax.tree.map(lambda x: x[:rows], Generation(slots.tokens, slots.lengths, mask_valid, mask_logits, predicted_iou, slots.choices))

    @property
    def max_new_tokens(self) -> int:
        return self._decoder.max_new_tokens

    @property
    def mask_grid(self) -> int:
        """Side of the masks' logits."""
        return self._decoder.model.config.mask.mask_grid

    def start(self, slots: Slots | None, prompts: Batch, limits_P: np.ndarray, index_DxR: np.ndarray, num_slots: int) -> Slots:
        """Runs prompts and puts row r of device d into that device's slot `index[d, r]`, beyond its slots: nowhere. Slots None: all are empty."""
        with self._dispatch:
            new = self._prefill(self.params, self._put(prompts), self._put(limits_P), room=0)
            slots = self._empty(new, num_slots, self._decoder.max_new_tokens) if slots is None else slots
            return self._insert(slots, new, self._put(index_DxR))

    def advance(self, slots: Slots, keep: int, seed: int) -> tuple[Slots, Array, Array]:
        """Draws tokens until no more than `keep` slots are active. Also what the masks are drawn from, states [S, M, D] and bool [S, M]."""
        with self._dispatch:
            slots = self._decode(self.params, slots, keep, seed)
            return slots, *self._prompts(slots)

    def masks(self, seg_hidden_BxMxD: np.ndarray, batch: Batch) -> tuple[Array, Array]:
        """Mask logits [B, M, h, w] and predicted IoU [B, M]."""
        with self._dispatch:
            return self._draw(self.params, self._put(seg_hidden_BxMxD), self._put(batch))

    def _put(self, tree):
        return jax.device_put(tree, self._rows)


def draw_token(logits_BxV: Array, key_B: Array | None, sampling: Sampling) -> Array:
    """The next token per row, int32[B]: argmax at temperature 0, else nucleus sampling (Holtzman et al., 2020) with each row's own key."""
    if sampling.temperature == 0.0:
        return logits_BxV.argmax(-1).astype(jnp.int32)
    logits_BxV = logits_BxV / sampling.temperature
    if sampling.top_p < 1.0:
        descending = jnp.flip(jnp.sort(logits_BxV, axis=-1), axis=-1)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # probability of everything likelier; 0 for the likeliest
        smallest_kept = jnp.where(before < sampling.top_p, descending, jnp.inf).min(-1, keepdims=True)
        logits_BxV = jnp.where(logits_BxV >= smallest_kept, logits_BxV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(key_B, logits_BxV).astype(jnp.int32)


def _keys(seed: Array, slots: Slots) -> Array:
    """A key per row, from its record and the place of the next token."""
    draw = jax.vmap(lambda record, place: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), record), place))
    return draw(slots.records, slots.lengths)


def _without_rows(slots: Slots) -> Slots:
    return slots.replace(cache=slots.cache.replace(k=tuple(k[0] for k in slots.cache.k), v=tuple(v[0] for v in slots.cache.v)))


def _with_rows(slots: Slots) -> Slots:
    return slots.replace(cache=slots.cache.replace(k=tuple(k[None] for k in slots.cache.k), v=tuple(v[None] for v in slots.cache.v)))


def _same(slots: Slots) -> Slots:
    return slots


def _at(hidden_BxLxD: Array, position_B: Array) -> Array:
    return jnp.take_along_axis(hidden_BxLxD, position_B[:, None, None], axis=1)[:, 0]


def _insert(slots: Slots, new: Slots, index_DxR: Array) -> Slots:
    """Row r of device d of `new` into that device's slot `index[d, r]`; an index beyond its slots: nowhere. The rows of `new` may be shorter."""

    def put(old, rows):
        corner = tuple(slice(size) for size in rows.shape[1:])
        place = jax.vmap(lambda old, rows, index: old.at[index, *corner].set(rows, mode="drop"))
        apart = (x.reshape(len(index_DxR), len(x) // len(index_DxR), *x.shape[1:]) for x in (old, rows))
        return place(*apart, index_DxR).reshape(old.shape)

    return jax.tree.map(put, slots, new)


def _fill(batch: Batch, extra: int) -> Batch:
    """The batch with filler rows behind it."""
    if not extra:
        return batch
    padded = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], extra, axis=0)]), batch)
    padded.record[len(batch.record) :] = -1
    return padded
