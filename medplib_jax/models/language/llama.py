"""LLaMA decoder whose MLPs may be mixtures of experts: a scan over stacked layers, or a loop over them for decoding."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from medplib_jax.batch import Array
from medplib_jax.config.experiment import ShardingConfig
from medplib_jax.config.model import ModelConfig
from medplib_jax.models.language.attention import (
    Attention,
    KVCache,
    Positions,
    attend_cached,
    attend_within,
    begin_cache,
    extend_cache,
    rotary_frequencies,
    rotary_tables,
    segment_positions,
)
from medplib_jax.models.language.long_context import log_n, ntk_frequencies, ntk_index
from medplib_jax.models.language.moe import MoeMlp, SwiGlu
from medplib_jax.models.layers import (
    Linear,
    RmsNorm,
    Rngs,
    layer_at,
    list_layers,
    param,
    scan_plan,
    stack_layers,
    take_rows,
)
from medplib_jax.models.remat import remat
from medplib_jax.models.rng import split_rng
from medplib_jax.parallel.sharding import shard_param, shard_rows

PADDING = 0  # token id


class Embedding(nnx.Module):
    """Token embeddings [V, D]. Token 0 stands at padding: its row never trains, as that of LLaMA's `padding_idx`."""

    def __init__(self, vocab_size: int, dim: int, dtype: str, rngs: Rngs):
        # Unit size, as what the layers add: a small embedding would drown in the first attention's output and the token
        # be forgotten.
        self.embedding = param(rngs, (vocab_size, dim), ("vocab", "embed"), std=1.0)
        self.dtype = dtype

    def __call__(self, tokens_BxL: Array) -> Array:
        x_BxLxD = take_rows(self.embedding[...], tokens_BxL)
        x_BxLxD = jnp.where((tokens_BxL == PADDING)[..., None], jax.lax.stop_gradient(x_BxLxD), x_BxLxD)
        return x_BxLxD.astype(self.dtype)


class DecoderLayer(nnx.Module):
    """What every decoder layer has: two norms and attention. Its MLP, one of two kinds, lives in another stack."""

    def __init__(self, config: ModelConfig, rngs: Rngs):
        self.input_norm = RmsNorm(config.llm.hidden_size, eps=config.llm.rms_norm_eps, rngs=rngs)
        self.attn = Attention(config.llm, config.lora, rngs)
        self.post_norm = RmsNorm(config.llm.hidden_size, eps=config.llm.rms_norm_eps, rngs=rngs)


class Llama(nnx.Module):
    """LLaMA (Touvron et al. 2023) with MedPLIB's mixture of experts in the layers `config.moe_layers`.

    `unstacked_layers`: each layer has parameters of its own, as decoding needs (`decode.layout`). A loop over stacked
    layers inside the loop over tokens would copy all weights for every token. `unstacked_experts`: so do the experts
    of a layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        rngs: Rngs,
        rules: ShardingConfig | None = None,
        unstacked_layers: bool = False,
        unstacked_experts: bool = False,
    ):
        llm, num_layers, num_moe = config.llm, config.llm.num_layers, len(config.moe_layers)
        self.config, self.rules = config, rules
        self.embed = Embedding(llm.vocab_size, llm.hidden_size, config.dtype, rngs)
        several = list_layers if unstacked_layers else stack_layers
        self.layers = several(lambda r: DecoderLayer(config, r), num_layers, rngs)
        self.mlp = (
            several(lambda r: SwiGlu(llm, config.lora, r), num_layers - num_moe, rngs) if num_moe < num_layers else None
        )
        self.moe = (
            several(lambda r: MoeMlp(llm, config.moe, config.lora, r, rules, unstacked_experts), num_moe, rngs)
            if num_moe
            else None
        )
        self.final_norm = RmsNorm(llm.hidden_size, eps=llm.rms_norm_eps, rngs=rngs)
        self.head = Linear(llm.hidden_size, llm.vocab_size, axes=("embed", "vocab"), bias=False, rngs=rngs)
        self.narrow_cache = False  # keys and values of the cache have 8 bits, see decode/layout.py

    def __call__(
        self,
        x_BxLxD: Array,
        valid_BxL: Array,
        *,
        cache: KVCache | None = None,
        new_cache: int = 0,
        segment_BxL: Array | None = None,
        train: bool = False,
        rng: Array | None = None,
        router_noise: Array | None = None,
    ) -> tuple[Array, dict[str, Any]]:
        """Embeddings [B, L, D], padded on the right, to the last hidden state after the final norm, and intermediates.

        With a cache the L new positions continue each row at its own length; `new_cache` makes one of so many positions
        for rows that begin here. With `segment_BxL` (and no cache) a row holds several sequences, one segment number
        each: a position sees its own only, and rotary positions begin anew. `rng` turns on adapter dropout and random
        token priorities; `router_noise` [n_moe, B*L, E] gives the latter explicitly. `out` has, when there are experts:
        router_logits [n_moe, B, L, E], expert_index [n_moe, B, L, k], expert_load [n_moe, E], dropped [n_moe]; always
        aux_loss (sum over layers); and `cache` when one was given or made.
        """
        start_B = jnp.zeros(x_BxLxD.shape[0], jnp.int32) if cache is None else cache.length_B
        index_BxL = start_B[:, None] + jnp.arange(x_BxLxD.shape[1])
        position_BxL = index_BxL if segment_BxL is None else segment_positions(segment_BxL)
        ntk_B = self._ntk(valid_BxL, cache, train)
        positions = self._positions(position_BxL, index_BxL, ntk_B)
        step = _LayerStep(self.config, self.rules, positions, index_BxL, valid_BxL, segment_BxL, train)
        step.new_cache, step.narrow_cache = new_cache, self.narrow_cache
        inputs = {"rng": None if rng is None else jax.random.split(rng, self.config.llm.num_layers)}
        if cache is None and not new_cache and not isinstance(self.layers, nnx.List):
            x_BxLxD, out = self._scan(step, x_BxLxD, inputs, router_noise)
        else:
            x_BxLxD, out = self._one_by_one(step, x_BxLxD, inputs, router_noise, cache)
            if "cache" in out:
                out["cache"] = out["cache"].replace(ntk_B=ntk_B)
        out["aux_loss"] = out["aux_loss"].sum() if self.config.moe_layers else jnp.zeros(())
        return self.final_norm(x_BxLxD), out

    def _ntk(self, valid_BxL: Array, cache: KVCache | None, train: bool) -> Array | None:
        """The stretch of each row's rotary base, that of its prompt; None where nothing is scaled."""
        if train or not self.config.llm.trained_length:
            return None
        return ntk_index(valid_BxL.sum(-1), self.config.llm) if cache is None else cache.ntk_B

    def _positions(self, positions_BxL: Array, index_BxL: Array, ntk_B: Array | None) -> Positions:
        llm = self.config.llm
        if ntk_B is None:
            return Positions(rotary_tables(positions_BxL, rotary_frequencies(llm.head_dim, llm.rope_theta)))
        frequencies = jnp.asarray(ntk_frequencies(llm))[ntk_B][:, None]
        query_scale_BxL = log_n(index_BxL, llm.trained_length) if llm.log_n else None
        return Positions(rotary_tables(positions_BxL, frequencies), query_scale_BxL)

    def _scan(
        self, step: "_LayerStep", x_BxLxD: Array, inputs, router_noise: Array | None
    ) -> tuple[Array, dict[str, Any]]:
        num_layers, moe_layers, metrics = self.config.llm.num_layers, self.config.moe_layers, []
        for start, period, repeats in scan_plan([i in moe_layers for i in range(num_layers)]):
            stop = start + period * repeats
            kinds = [i in moe_layers for i in range(start, stop)]
            first_moe = sum(i < start for i in moe_layers)
            moe_stop, mlp_start = first_moe + sum(kinds), start - first_moe
            stacks = {
                "layers": _rows(self.layers, start, stop, repeats),
                "moe": _rows(self.moe, first_moe, moe_stop, repeats),
                "mlp": _rows(self.mlp, mlp_start, stop - moe_stop, repeats),
            }
            xs = {
                "inputs": _take(inputs, start, stop, repeats),
                "noise": _take(router_noise, first_moe, moe_stop, repeats),
                "params": {name: state for name, (_, state) in stacks.items()},
            }
            graphdefs = {name: graphdef for name, (graphdef, _) in stacks.items()}
            body = step.over(graphdefs, kinds[:period])
            x_BxLxD, ys = jax.lax.scan(
                remat(self.config.remat)(body), x_BxLxD, xs, unroll=min(repeats, self.config.scan_unroll)
            )
            metrics.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys))
        return x_BxLxD, jax.tree.map(
            lambda *parts: jnp.concatenate(parts), *[m for m in metrics if m]
        ) if moe_layers else {}

    def _one_by_one(
        self, step: "_LayerStep", x_BxLxD: Array, inputs, router_noise: Array | None, cache: KVCache | None
    ):
        keys, values, metrics, counts = [], [], [], {"moe": 0, "mlp": 0}
        for i in range(self.config.llm.num_layers):
            kind = "moe" if i in self.config.moe_layers else "mlp"
            mlp, noise_SxE = (
                layer_at(getattr(self, kind), counts[kind]),
                _index(router_noise, counts[kind]) if kind == "moe" else None,
            )
            buffers = None if cache is None else (cache.k[i], cache.v[i])
            x_BxLxD, out, buffers = step.layer(
                layer_at(self.layers, i), mlp, x_BxLxD, _index(inputs, i), noise_SxE, buffers
            )
            counts[kind] += 1
            metrics += [out] if kind == "moe" else []
            if buffers is not None:
                keys.append(buffers[0])
                values.append(buffers[1])
        out = jax.tree.map(lambda *m: jnp.stack(m), *metrics) if metrics else {}
        if keys:
            start_B = 0 if cache is None else cache.length_B
            out["cache"] = KVCache(tuple(keys), tuple(values), start_B + step.valid_BxL.sum(-1, dtype=jnp.int32))
        return x_BxLxD, out

    def logits(self, hidden: Array) -> Array:
        """[..., D] -> float32 [..., V]."""
        return self.head.product(hidden, jnp.float32)


class _LayerStep:
    """The body of the scan: one period of decoder layers, with what all layers share."""

    new_cache: int  # positions of the cache to make, 0 for none
    narrow_cache: bool

    def __init__(self, config, rules, positions, index_BxL, valid_BxL, segment_BxL, train):
        self.config, self.rules, self.positions, self.train = config, rules, positions, train
        self.index_BxL, self.valid_BxL, self.segment_BxL = index_BxL, valid_BxL, segment_BxL

    def over(self, graphdefs, kinds: Sequence[bool]):
        """A scan body over layers of these kinds (True: experts); params have a leading axis of the period."""

        def body(x, xs):
            metrics = []
            for j, is_moe in enumerate(kinds):
                among_kind = sum(kind == is_moe for kind in kinds[:j])
                layer = nnx.merge(graphdefs["layers"], _placed(_index(xs["params"]["layers"], j), self.rules))
                name = "moe" if is_moe else "mlp"
                mlp = nnx.merge(graphdefs[name], _placed(_index(xs["params"][name], among_kind), self.rules))
                x, out, _ = self.layer(
                    layer, mlp, x, _index(xs["inputs"], j), _index(xs["noise"], among_kind) if is_moe else None
                )
                metrics += [out] if is_moe else []
            return x, jax.tree.map(lambda *m: jnp.stack(m), *metrics) if metrics else {}

        return body

    def layer(self, layer: DecoderLayer, mlp: SwiGlu | MoeMlp, x, inputs, noise_SxE, buffers=None):
        """One decoder layer: x, the metrics of its experts, and its part of the cache with the new positions."""
        project_rng, output_rng, mlp_rng = split_rng(inputs["rng"], 3)
        q, k, v = layer.attn.project(layer.input_norm(x), self.positions, project_rng)
        if buffers is None:
            y = attend_within(q, k, v, self.valid_BxL, self.segment_BxL, rules=self.rules)
            buffers = begin_cache(k, v, self.new_cache, self.narrow_cache) if self.new_cache else None
        else:
            buffers = extend_cache(*buffers, k, v, self.index_BxL)
            y = attend_cached(q, *buffers, self.index_BxL)
        x = checkpoint_name(shard_rows(x + layer.attn.output(y, output_rng)), "attended")
        h = layer.post_norm(x)
        if isinstance(mlp, SwiGlu):
            return shard_rows(x + mlp(h, mlp_rng)), {}, buffers
        y, out = mlp(h, self.valid_BxL, train=self.train, rng=mlp_rng, noise_SxE=noise_SxE)
        return shard_rows(x + y), out, buffers


def init_cache(config: ModelConfig, batch: int, length: int, dtype, narrow: bool = False) -> KVCache:
    """An empty cache for `length` positions per row, of `dtype`, or `narrow` (8 bits)."""
    nothing = jnp.zeros((batch, 0, config.llm.num_kv_heads, config.llm.head_dim), dtype)
    layers = [begin_cache(nothing, nothing, length, narrow) for _ in range(config.llm.num_layers)]
    keys, values = zip(*layers, strict=True)
    lengths = jnp.zeros(batch, jnp.int32)
    return KVCache(keys, values, lengths, jnp.zeros_like(lengths) if config.llm.trained_length else None)


def _take(tree, start: int, stop: int, repeats: int):
    """Rows start..stop of every leaf, folded to [repeats, rows per repeat, ...]."""
    return jax.tree.map(lambda a: a[start:stop].reshape(repeats, -1, *a.shape[1:]), tree) if stop > start else None


def _rows(stack: nnx.Module | None, start: int, stop: int, repeats: int):
    """The module's structure and the parameters of some of its layers."""
    if stop == start:
        return None, None
    graphdef, state = nnx.split(stack)
    return graphdef, _take(state, start, stop, repeats)


def _placed(state: nnx.State, rules: ShardingConfig | None) -> nnx.State:
    """One layer's parameters, sharded as in their stack. So are their gradients then: left to itself the compiler keeps
    those of all layers whole on every device."""
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state(
        [(path, variable.replace(shard_param(variable[...], variable.axes, rules))) for path, variable in flat]
    )


def _index(tree, i: int):
    return jax.tree.map(lambda a: a[i], tree)
