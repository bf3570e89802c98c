"""Answers and masks: greedy or sampled decoding in a fixed number of slots, each with its part of a static KV cache.

An answer that ends frees its slot for the next prompt while the others go on (continuous batching; Yu et al., Orca,
OSDI 2022), so that one long answer does not hold a batch. What a row computes depends on that row alone: experts drop
nothing, random draws come from the record's own key, and all shapes are fixed, so the answer is the same whatever
shares the batch.
"""

import dataclasses
import functools
import threading
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medplib_jax.batch import Array, Batch, Params
from medplib_jax.config.experiment import ShardingConfig
from medplib_jax.config.model import ModelConfig
from medplib_jax.decode.layout import LARGE, decoding_model, in_decoding_layout, to_decoding_layout
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.decode.prefix import run_prefix, run_rest
from medplib_jax.decode.sampling import Draws, answer_draws, draw_token
from medplib_jax.decode.slots import (
    Generation,
    Slots,
    fill_batch,
    insert_rows,
    take_at,
    unchanged,
    with_rows,
    without_rows,
)
from medplib_jax.decode.token_kinds import TOKEN_KINDS, count_choices, token_kinds
from medplib_jax.models.language.attention import KVCache
from medplib_jax.models.language.llama import init_cache
from medplib_jax.models.layers import bind
from medplib_jax.models.quantize import num_bytes
from medplib_jax.models.whole import WholeModel
from medplib_jax.parallel.compilation import compiler_options
from medplib_jax.parallel.mesh import one_device
from medplib_jax.parallel.sharding import BATCH_AXES, activation_axes, axis_size, batch_sharding, check_model_fits


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The pure functions of decoding, with what is fixed for all answers."""

    model: WholeModel
    stop_ids: tuple[int, ...]
    seg_id: int
    options: DecodeOptions

    def empty(self, like: Slots, slots: int, room: int) -> Slots:
        """`slots` slots in which nothing happens, for prompts of the length of `like` and answers of `room` tokens."""
        zeros = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype), like.replace(cache=None))
        dtype = jax.tree.leaves(like.cache.v)[0].dtype
        narrow = self.model.llm.narrow_cache
        cache = init_cache(self.model.config, slots, like.cache.room + room, dtype, narrow)
        return zeros.replace(cache=cache)

    def prefill(
        self, params: Params, batch: Batch, limits_B: Array, draws: Draws | None, seen: Array | None, room: int
    ) -> Slots:
        """Runs right-padded prompts [B, L] of different lengths; the cache has L + room positions.

        `seen`: what `MedPLIB.see` made of the pictures, where it is known already. Filler rows are not active.
        """
        model = bind(self.model, params)
        x_BxLxD, _ = model.embed(batch, seen)
        hidden_BxLxD, out = model.llm(x_BxLxD, batch.valid, new_cache=batch.tokens.shape[1] + room)
        slots = self._begin(batch, hidden_BxLxD, batch.valid, out["cache"], limits_B, draws)
        if self.options.original_masks:
            said_BxL = batch.tokens == self.seg_id
            first = take_at(hidden_BxLxD, jnp.maximum(said_BxL.argmax(-1) - 1, 0))
            seg_hidden = slots.seg_hidden.at[:, 0].set(first)
            slots = slots.replace(seg_hidden=seg_hidden, seg_count=said_BxL.any(-1).astype(jnp.int32))
        if model.config.moe_layers:
            pictures = batch.clip_pixels.shape[1] * model.config.image_tokens
            regions = range(pictures, pictures + batch.region_points.shape[1])
            kinds_BxL = token_kinds(batch.tokens, batch.feature_index, batch.valid, regions, self.seg_id)
            slots = slots.replace(choices=count_choices(out["expert_index"], kinds_BxL, model.config.moe.num_experts))
        return slots

    def prefill_rest(
        self,
        params: Params,
        batch: Batch,
        limits_B: Array,
        draws: Draws | None,
        seen: Array | None,
        prefix: KVCache,
        room: int,
    ) -> Slots:
        """Runs what follows the kept beginnings of prompts, at most `room` positions. `choices` are not counted."""
        hidden_BxRxD, valid_BxR, cache = run_rest(self.model, params, batch, seen, prefix, room)
        return self._begin(batch, hidden_BxRxD, valid_BxR, cache, limits_B, draws)

    def _begin(
        self, batch: Batch, hidden_BxLxD: Array, valid_BxL: Array, cache: KVCache, limits_B: Array, draws: Draws | None
    ) -> Slots:
        """Answers without a token yet, behind prompts whose last hidden states these are."""
        (B, _, D), config = hidden_BxLxD.shape, self.model.config
        last_B = valid_BxL.sum(-1) - 1
        choices = None
        if config.moe_layers:
            kinds = len(TOKEN_KINDS)
            choices = jnp.zeros((B, len(config.moe_layers), kinds, config.moe.num_experts), jnp.int32)
        return Slots(
            cache=cache,
            hidden=take_at(hidden_BxLxD, last_B),
            previous=take_at(hidden_BxLxD, jnp.maximum(last_B - 1, 0)),
            known=jnp.zeros(B, jnp.int32),
            active=(batch.record >= 0) & (limits_B > 0),
            limits=limits_B,
            draws=draws,
            tokens=jnp.zeros((B, self.options.max_new_tokens), jnp.int32),
            lengths=jnp.zeros(B, jnp.int32),
            seg_hidden=jnp.zeros((B, self.options.max_masks, D), hidden_BxLxD.dtype),
            seg_count=jnp.zeros(B, jnp.int32),
            choices=choices,
        )

    def decode(self, params: Params, slots: Slots, keep: Array, steps: Array) -> Slots:
        """Draws at most `steps` tokens per slot, until no more than `keep` slots are active.

        The cache of a single slot goes round the loop without the axis of slots: XLA drops that axis for products, and
        what would be written with it and read without it is copied, four times its size per token.
        """
        model = bind(self.model, params)
        fold, unfold = (without_rows, with_rows) if len(slots.active) == 1 else (unchanged, unchanged)

        def goes_on(carry: tuple[Slots, Array]) -> Array:
            return (carry[0].active.sum() > keep) & (carry[1] < steps)

        def advance(carry: tuple[Slots, Array]) -> tuple[Slots, Array]:
            return fold(self._advance(model, unfold(carry[0]))), carry[1] + 1

        return unfold(jax.lax.while_loop(goes_on, advance, (fold(slots), jnp.int32(0)))[0])

    def _advance(self, model: WholeModel, slots: Slots) -> Slots:
        """Draws one token per active slot and runs it through the decoder."""
        token_S, drawn_S = self._draw_tokens(model, slots)
        token_S = jnp.where(drawn_S, token_S, 0)
        rows, place = jnp.arange(len(token_S)), jnp.minimum(slots.lengths, self.options.max_new_tokens - 1)
        lengths = slots.lengths + drawn_S
        active = drawn_S & (lengths < slots.limits)
        seg_S = drawn_S & (token_S == self.seg_id)
        slot_SxM = (jnp.arange(self.options.max_masks) == slots.seg_count[:, None]) & seg_S[:, None]
        hidden_Sx1xD, out = model.llm(model.llm.embed(token_S[:, None]), drawn_S[:, None], cache=slots.cache)
        choices = slots.choices
        if choices is not None:
            kinds_Sx1 = token_kinds(
                token_S[:, None], jnp.full((len(rows), 1), -1), drawn_S[:, None], range(0), self.seg_id
            )
            choices = choices + count_choices(out["expert_index"], kinds_Sx1, model.config.moe.num_experts)
        return slots.replace(
            cache=out["cache"],
            hidden=hidden_Sx1xD[:, 0],
            previous=jnp.where(active[:, None], slots.hidden, slots.previous),
            known=jnp.zeros_like(slots.known),
            active=active,
            tokens=slots.tokens.at[rows, place].set(jnp.where(drawn_S, token_S, slots.tokens[rows, place])),
            lengths=lengths,
            seg_hidden=jnp.where(slot_SxM[:, :, None], slots.hidden[:, None], slots.seg_hidden),
            seg_count=slots.seg_count + seg_S,
            choices=choices,
        )

    def _draw_tokens(self, model: WholeModel, slots: Slots) -> tuple[Array, Array]:
        """The next token of each slot, int32 [S], and whether its answer goes on with it, bool [S]."""
        token_S = draw_token(model.llm.logits(slots.hidden), slots.draws, slots.lengths)
        token_S = jnp.where(slots.known > 0, slots.known - 1, token_S)
        return token_S, slots.active & (token_S[:, None] != jnp.array(self.stop_ids)).all(-1)

    def peek(self, params: Params, slots: Slots) -> tuple[Slots, Array]:
        token_S, drawn_S = self._draw_tokens(bind(self.model, params), slots)
        return slots.replace(known=token_S + 1), jnp.where(drawn_S, token_S, -1)

    def prompts(self, slots: Slots) -> tuple[Array, Array]:
        """What the masks of ended answers are drawn from: states [S, M, D] and bool [S, M], which of them exist."""
        valid_SxM = jnp.arange(self.options.max_masks) < slots.seg_count[:, None]
        if not self.options.original_masks:
            return slots.seg_hidden, valid_SxM
        without = slots.seg_count == 0
        first = jnp.where(without[:, None], slots.previous, slots.seg_hidden[:, 0])
        return slots.seg_hidden.at[:, 0].set(first), valid_SxM.at[:, 0].set(True)

    def see(self, params: Params, clip_pixels: Array) -> Array:
        return bind(self.model, params).see(clip_pixels)[0]

    def view(self, params: Params, batch: Batch) -> Array:
        return bind(self.model, params).view(batch)

    def draw(self, params: Params, seg_hidden_BxMxD: Array, batch: Batch, viewed: Array | None) -> tuple[Array, Array]:
        return bind(self.model, params).draw(seg_hidden_BxMxD, batch, viewed)


class Generator:
    """Generates answers, for a batch at once or step by step for a stream of prompts (`stream.py`). Compiles once per
    prompt length and batch size.

    An answer ends before a token of `stop_ids`. `params` are a checkpoint's, or those that `to_decoding_layout`
    returned. `mesh`: devices of this process that share the work (its data and fsdp axes) and hold the parameters,
    spread over them by `rules`, which a mesh of several devices needs.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        options: DecodeOptions,
        *,
        stop_ids: Sequence[int],
        seg_id: int,
        mesh: Mesh | None = None,
        rules: ShardingConfig | None = None,
    ):
        self.options = options
        self.mesh = mesh or one_device()
        check_model_fits(config, rules, self.mesh)
        model = decoding_model(config, self.mesh, rules, options.quantize)
        self._decoder = decoder = Decoder(model, tuple(stop_ids), seg_id, options)
        self.params = (
            params
            if in_decoding_layout(params)
            else to_decoding_layout(config, params, self.mesh, rules, options.quantize)
        )
        self._rows = batch_sharding(self.mesh)
        self._dispatch = threading.Lock()  # of programs that several threads ask for, so that each is compiled once
        slots, compiler = self._slot_shardings(), compiler_options(self.mesh)
        frugal = compiler_options(self.mesh, num_bytes(self.params) > LARGE)
        self._prefill = jax.jit(decoder.prefill, static_argnames="room", out_shardings=slots, compiler_options=frugal)
        self._prefill_rest = jax.jit(
            decoder.prefill_rest, static_argnames="room", out_shardings=slots, compiler_options=frugal
        )
        self._prefix = jax.jit(functools.partial(run_prefix, model), static_argnames="room", compiler_options=frugal)
        self._decode = jax.jit(decoder.decode, donate_argnums=1, out_shardings=slots, compiler_options=compiler)
        self._insert = jax.jit(insert_rows, donate_argnums=0, out_shardings=slots)
        self._empty = jax.jit(decoder.empty, static_argnums=(1, 2), out_shardings=slots)
        self._prompts = jax.jit(decoder.prompts)
        self._peek = jax.jit(decoder.peek, donate_argnums=1, out_shardings=(slots, None))
        self._draw = jax.jit(decoder.draw, compiler_options=frugal)
        self._see, self._view = jax.jit(decoder.see), jax.jit(decoder.view, compiler_options=frugal)
        self._release = jax.jit(lambda slots, held: slots.replace(active=slots.active & held), donate_argnums=0)

    def _slot_shardings(self) -> Slots:
        """Slots lie where their rows are computed, keys and values where their heads are."""
        fields = {field.name: self._rows for field in dataclasses.fields(Slots)}
        rules = self._decoder.model.rules
        heads = activation_axes(rules, "kv_heads", BATCH_AXES) if self.mesh.size > 1 else ()
        buffers = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES, heads))
        scaled = self._rows if self._decoder.model.config.llm.trained_length else None
        fields["cache"] = KVCache(buffers, buffers, self._rows, scaled)
        return Slots(**fields | ({} if self._decoder.model.config.moe_layers else {"choices": None}))

    def __call__(self, batch: Batch, seed: int = 0) -> Generation:
        """The answers to a batch of prompts, all of them drawn before any is returned."""
        rows = len(batch.record)
        batch = fill_batch(batch, -rows % axis_size(self.mesh, BATCH_AXES))
        limits = np.full(len(batch.record), self.options.max_new_tokens, np.int32)
        draws = self._put(self.draws(seed, batch.record))
        room = self.options.max_new_tokens
        slots = self._prefill(self.params, self._put(batch), self._put(limits), draws, None, room=room)
        slots = self._decode(self.params, slots, 0, room)
        seg_hidden, mask_valid = self._prompts(slots)
        mask_logits, predicted_iou = (
            self._draw(self.params, seg_hidden, self._put(batch), None) if self.options.max_masks else (None, None)
        )
        return jax.tree.map(
            lambda x: x[:rows],
            Generation(slots.tokens, slots.lengths, mask_valid, mask_logits, predicted_iou, slots.choices),
        )

    @property
    def mask_grid(self) -> int:
        """Side of the masks' logits."""
        return self._decoder.model.config.mask.mask_grid

    def draws(self, seed: int, records: np.ndarray) -> Draws | None:
        """The draws of answers to these records in the generator's own sampling, None for greedy ones."""
        sampling = self.options.sampling
        if sampling.temperature == 0.0:
            return None
        return answer_draws([sampling] * len(records), [seed] * len(records), records)

    def start(
        self,
        slots: Slots | None,
        prompts: Batch,
        limits_P: np.ndarray,
        draws: Draws | None,
        index_DxR: np.ndarray,
        num_slots: int,
        longest: int = 0,
        seen: Array | None = None,
        prefix: KVCache | None = None,
        rest: int = 0,
    ) -> Slots:
        """Runs prompts and puts row r of device d into that device's slot `index[d, r]`, beyond its slots: nowhere.

        Slots None: all are empty; then they are made for prompts of up to `longest` positions (at least these).
        `prefix`: what `begin` made of the prompts' beginnings; at most `rest` positions follow these.
        """
        with self._dispatch:
            rows = self._put((prompts, limits_P, draws))
            if prefix is None:
                new = self._prefill(self.params, *rows, seen, room=0)
            else:
                new = self._prefill_rest(self.params, *rows, seen, prefix, room=rest)
            if slots is None:
                beyond = max(longest, prompts.tokens.shape[1]) - new.cache.room
                slots = self._empty(new, num_slots, beyond + self.options.max_new_tokens)
            return self._insert(slots, new, self._put(index_DxR))

    def begin(self, prompts: Batch, lengths_P: np.ndarray, room: int, seen: Array | None = None) -> KVCache:
        """Keys and values of the first `lengths` <= `room` positions of prompts, which a later `start` may be given."""
        with self._dispatch:
            return self._prefix(self.params, *self._put((prompts, seen, lengths_P)), room=room)

    def advance(self, slots: Slots, keep: int, steps: int | None = None) -> tuple[Slots, Array, Array]:
        """Draws at most `steps` tokens per slot (None: any number), until no more than `keep` slots are active.

        Also what the masks are drawn from, states [S, M, D] and bool [S, M].
        """
        with self._dispatch:
            slots = self._decode(self.params, slots, keep, self.options.max_new_tokens if steps is None else steps)
            return slots, *self._prompts(slots)

    def peek(self, slots: Slots) -> tuple[Slots, Array]:
        """Draws the next tokens, without what it takes to go on behind them.

        Also these tokens, int32 [S]; -1 where an answer ends or none is being made.
        """
        with self._dispatch:
            return self._peek(self.params, slots)

    def release(self, slots: Slots, held_S: np.ndarray) -> Slots:
        """Gives up the answers in the slots that are not held."""
        with self._dispatch:
            return self._release(slots, self._put(held_S))

    def masks(self, seg_hidden_BxMxD: np.ndarray, batch: Batch, viewed: Array | None = None) -> tuple[Array, Array]:
        """Mask logits [B, M, h, w] and predicted IoU [B, M]; `viewed`: what `view` made of the pictures."""
        with self._dispatch:
            return self._draw(self.params, self._put(seg_hidden_BxMxD), self._put(batch), viewed)

    def see(self, batch: Batch) -> Array:
        """The vision tower's features of the batch's pictures, which a later `start` may be given."""
        with self._dispatch:
            return self._see(self.params, self._put(batch.clip_pixels))

    def view(self, batch: Batch) -> Array:
        """The mask encoder's embedding of the batch's pictures, which later `masks` may be given."""
        with self._dispatch:
            return self._view(self.params, self._put(batch))

    def _put(self, tree):
        """Rows where they are computed. To a single device the programs bring what they read, which is faster."""
        return jax.device_put(tree, self._rows) if self.mesh.size > 1 else tree
