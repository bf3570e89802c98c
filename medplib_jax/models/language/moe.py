"""Mixture of SwiGLU experts: fp32 router, two routing rules behind one interface, and the paths that compute experts.

| tokens of a device | experts        | platform | mesh               | path                                           |
| ------------------ | -------------- | -------- | ------------------ | ---------------------------------------------- |
| many               | `Experts`      | any      | one device         | sorted by expert, `grouped_matmul`             |
| many               | `Experts`      | any      | experts not spread | the same on every device's rows (`_on_mesh`)   |
| any                | `Experts`      | any      | experts spread     | rows travel (`expert_exchange`), then the same |
| few                | `Experts`      | any      | experts not spread | every expert on every token (`_few`)           |
| 1                  | `Experts`      | any      | experts not spread | the chosen experts' weights alone (`_one`)     |
| many               | `ExpertsApart` | CPU      | one device         | sorted by expert, blocks of rows per expert    |
| many               | `ExpertsApart` | CPU      | other              | weights stacked, then `Experts`                |
| few                | `ExpertsApart` | CPU      | any                | every expert on every token                    |
| 1 in all           | `ExpertsApart` | CPU      | any                | a switch over the experts                      |

One with adapters counts as few. Few are up to FEW_TOKENS. A token costs top_k experts' FLOPs whatever the number of
experts, except among few tokens.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from medplib_jax.batch import Array, Params
from medplib_jax.config.experiment import ShardingConfig
from medplib_jax.config.model import LlmConfig, LoraConfig, MoeConfig
from medplib_jax.models.kernels.grouped_matmul import grouped_matmul
from medplib_jax.models.kernels.grouped_matmul_blocks import grouped_matmul_apart
from medplib_jax.models.language.expert_exchange import axis_product, permute_rows, sort_by_expert, with_exchange
from medplib_jax.models.language.routing import (
    Routing,
    expert_capacity,
    load_balancing_loss,
    route_capacity,
    route_dropless,
)
from medplib_jax.models.layers import (
    Linear,
    Rngs,
    abstract_module,
    adapter_axes,
    adapter_product,
    adapter_products,
    bind,
    in_column_blocks,
    logical_axes,
    matmul,
    matmul_by_output,
    param,
    params_of,
    swiglu,
    widens_on_cpu,
)
from medplib_jax.models.precision import einsum, product
from medplib_jax.models.quantize import by_integers, dequantize_params, quantize_linear, scale_of_rows
from medplib_jax.models.rng import dropout, split_rng
from medplib_jax.models.target import is_for_tpu
from medplib_jax.parallel.sharding import activation_axes, axis_size, mesh_axes, partition_spec, row_axes

# Up to this many tokens every expert runs on every token: reading the weights is then what costs. A TPU multiplies 240
# times and more while it reads one weight.
FEW_TOKENS, FEW_TOKENS_TPU = 16, 128


class ExpertLinear(nnx.Module):
    """One linear layer per expert: kernel [E, in, out], optional low-rank adapters [E, in, r] and [E, r, out]."""

    def __init__(
        self,
        num_experts: int,
        in_dim: int,
        out_dim: int,
        axes: tuple[str, str],
        lora: LoraConfig,
        lora_rank: int,
        rngs: Rngs,
    ):
        self.kernel = param(rngs, (num_experts, in_dim, out_dim), ("expert", *axes), std=1 / math.sqrt(in_dim))
        self.kernel_scale, self.narrow_rows = None, False  # of an 8-bit kernel, see quantize.py
        self.spread: tuple[str, ...] = ()  # mesh axes over which the inner width is, inside `Experts._on_mesh`
        self.by_output = False  # the kernel is [E, out, in], see decode/layout.py and `_transposed`
        self.lora_scale, self.lora_dropout = lora.scale, lora.dropout
        shape_a, shape_b = (num_experts, in_dim, lora_rank), (num_experts, lora_rank, out_dim)
        axis_a, axis_b = adapter_axes(axes)
        self.lora_a = (
            param(rngs, shape_a, ("expert", axis_a, "lora_rank"), std=1 / math.sqrt(3 * in_dim)) if lora_rank else None
        )
        self.lora_b = param(rngs, shape_b, ("expert", "lora_rank", axis_b)) if lora_rank else None

    def sorted_rows(self, x_SxD: Array, sizes_E: Array, member_SxE: Array, rng: Array | None) -> Array:
        """Rows sorted by expert, `sizes_E` of each; `member_SxE` says the same row by row. [S, in] -> [S, out]."""
        if self.narrow_rows:
            scales = scale_of_rows(member_SxE, self.kernel_scale[...])
            return self._by_integers(lambda x, w: grouped_matmul(x, w, sizes_E, self.by_output), x_SxD, scales)
        kernel = self.kernel[...] if self.kernel_scale is None else self._plain_kernel(x_SxD.dtype)
        y = checkpoint_name(grouped_matmul(x_SxD, kernel, sizes_E, self.by_output), "grouped_matmul")
        if self.lora_a is None:
            return y
        # All experts' adapters at once, of width E * r: to mask them to each row's expert costs less than sorting.
        low = adapter_products(dropout(x_SxD, self.lora_dropout, rng), self.lora_a[...])
        mine = jnp.repeat(member_SxE, self.lora_a.shape[2], axis=1)
        low = checkpoint_name(self.lora_scale * jnp.where(mine, low, 0), "low")  # scaled while it is narrow
        return y + adapter_product(low, rearrange(self.lora_b[...], "e r f -> (e r) f"))

    def every_expert(self, x_ExSxD: Array, rng: Array | None) -> Array:
        """[E, S, in] -> [E, S, out]."""
        axes = (0, 2, 1) if self.by_output else (0, 1, 2)
        if self.narrow_rows:
            scales = self.kernel_scale[...][:, None]
            return self._by_integers(lambda x, w: product(x, w.transpose(axes), jnp.int32), x_ExSxD, scales)
        y = product(x_ExSxD, self._plain_kernel(x_ExSxD.dtype).transpose(axes))
        if self.lora_a is None:
            return y
        low = product(dropout(x_ExSxD, self.lora_dropout, rng), self.lora_a[...].astype(y.dtype))
        return y + self.lora_scale * product(low, self.lora_b[...].astype(y.dtype))

    def of_expert(self, x_1xD: Array, expert: Array) -> Array:
        """One row through one expert without adapters. [1, in] -> [1, out]."""
        multiply = matmul_by_output if self.by_output else matmul
        if self.narrow_rows:
            scale = self.kernel_scale[...][expert]
            return self._by_integers(lambda x, w: multiply(x, w[expert], jnp.int32), x_1xD, scale)
        y = multiply(x_1xD, self.kernel[...][expert], jnp.float32)
        return (y if self.kernel_scale is None else y * self.kernel_scale[...][expert]).astype(x_1xD.dtype)

    def _by_integers(self, multiply: Callable[[Array, Array], Array], x: Array, scales: Array) -> Array:
        return by_integers(lambda x: multiply(x, self.kernel[...]), x, scales, spread=self.spread)

    def _plain_kernel(self, dtype) -> Array:
        if self.kernel_scale is None:
            return self.kernel[...].astype(dtype)
        return (self.kernel[...] * jnp.expand_dims(self.kernel_scale[...], 2 if self.by_output else 1)).astype(dtype)


class Experts(nnx.Module):
    """E SwiGLU MLPs with stacked weights."""

    def __init__(
        self, num_experts: int, llm: LlmConfig, lora: LoraConfig, rngs: Rngs, rules: ShardingConfig | None = None
    ):
        D, F = llm.hidden_size, llm.mlp_dim
        self.rules = rules
        self.gate = ExpertLinear(num_experts, D, F, ("embed", "mlp"), lora, lora.rank_of("gate"), rngs)
        self.up = ExpertLinear(num_experts, D, F, ("embed", "mlp"), lora, lora.rank_of("up"), rngs)
        self.down = ExpertLinear(num_experts, F, D, ("mlp", "embed"), lora, lora.rank_of("down"), rngs)

    def __call__(self, x_SxD: Array, routing: Routing, rng: Array | None) -> Array:
        """sum_k weight_k * expert_k(x), [S, D]. Arrays that live on a mesh are computed where they are (`_on_mesh`)."""
        mesh = jax.typeof(x_SxD).sharding.mesh
        return self._local(x_SxD, routing, rng, ()) if mesh.size <= 1 else self._on_mesh(mesh, x_SxD, routing, rng)

    def _on_mesh(self, mesh, x_SxD, routing, rng):
        """Every device routes its own rows, and sorts them without the others.

        What the parameters' sharding means for it is decided per logical axis. `expert`: rows travel to the devices
        that hold their experts and back, if the mesh axes carry rows. `mlp`: a device computes a slice of the experts'
        width and these add up, if the mesh axes carry none. All other axes are gathered before the products, and their
        gradients scattered back.
        """
        rows, rules = row_axes(x_SxD.shape[0], mesh), self.rules
        params, axes = params_of(self), logical_axes(self)
        names = jax.tree.map(lambda array, names: names[-array.ndim :], params, axes)
        specs = jax.tree.map(lambda x, names: partition_spec("moe/experts", names, x.shape, rules, mesh), params, names)
        exchanged = mesh_axes(rules, "expert") if set(mesh_axes(rules, "expert")) <= set(rows or ()) else ()
        exchanged = exchanged if axis_size(mesh, exchanged) > 1 else ()
        sliced = activation_axes(rules, "mlp", rows)
        kept = ({"expert"} if exchanged else set()) | ({"mlp"} if sliced else set())
        different = (*(rows or ()), *sliced)
        by_columns = [name for name in names if self._gathers_columns(names[name]["kernel"], kept, mesh)]

        def local(params, x, routing, rng):
            params = jax.tree.map(lambda p: _narrow(p, x.dtype), params)
            params, here = _transposed(params, names, by_columns)
            params = jax.tree.map(lambda p, names: _gather(p, names, kept, rules), params, here)
            if rng is not None and different:  # devices that compute the same thing must draw the same
                rng = jax.random.fold_in(rng, jax.lax.axis_index(different))
            experts = bind(self, params)
            for name in by_columns:
                getattr(experts, name).by_output ^= True
            experts.down.spread = sliced
            y = experts._local(x, routing, rng, exchanged)
            return jax.lax.psum(y, sliced) if sliced else y

        in_specs = (specs, PartitionSpec(rows), PartitionSpec(rows), PartitionSpec())
        run = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(rows), check_vma=False)
        return run(params, x_SxD, routing, rng)

    def _gathers_columns(self, names, kept: set[str], mesh) -> bool:
        """Whether devices hold columns of a kernel whose whole they compute with."""
        return names[-1] not in kept and axis_size(mesh, mesh_axes(self.rules, names[-1])) > 1

    def _local(self, x_SxD, routing, rng, exchanged):
        """On one device's tokens. `exchanged`: mesh axes over which the experts are spread, none if all are here."""
        rngs = split_rng(rng, 3)
        adapted = any(linear.lora_a is not None for linear in (self.gate, self.up, self.down))
        if x_SxD.shape[0] == 1 and not adapted and not exchanged:
            return self._one(x_SxD, routing)
        if x_SxD.shape[0] <= (FEW_TOKENS_TPU if is_for_tpu(x_SxD) else FEW_TOKENS) and not exchanged:
            return self._few(x_SxD, routing, rngs)
        num_experts = self.gate.kernel.shape[0] * axis_product(exchanged)
        x_NxD, expert_N = _choices(x_SxD, routing, num_experts)
        if exchanged:
            y_NxD = with_exchange(
                lambda x, expert: self._sorted(x, expert, rngs), x_NxD, expert_N, num_experts, exchanged
            )
        else:
            y_NxD = self._sorted(x_NxD, expert_N, rngs)
        return _weighted_sum(checkpoint_name(y_NxD, "experts"), routing)

    def _one(self, x_1xD, routing):
        """One token of an answer: nothing but its experts' weights is read."""

        def run(expert):
            h = swiglu(self.gate.of_expert(x_1xD, expert), self.up.of_expert(x_1xD, expert))
            return self.down.of_expert(h, expert)

        weight_k = routing.weight[0].astype(x_1xD.dtype)
        return sum(weight_k[i] * run(routing.expert[0, i]) for i in range(len(weight_k)))

    def _few(self, x_SxD, routing, rngs):
        num_experts = self.gate.kernel.shape[0]
        x_ExSxD = jnp.broadcast_to(x_SxD, (num_experts, *x_SxD.shape))
        h = swiglu(self.gate.every_expert(x_ExSxD, rngs[0]), self.up.every_expert(x_ExSxD, rngs[1]))
        weight_SxE = (jax.nn.one_hot(routing.expert, num_experts) * routing.weight[:, :, None]).sum(1)
        return einsum("esd,se->sd", self.down.every_expert(h, rngs[2]), weight_SxE.astype(x_SxD.dtype))

    def _sorted(self, x_NxD, expert_N, rngs):
        """Each row through its expert; expert E is none and gives zero."""
        order, inverse, member = sort_by_expert(expert_N, self.gate.kernel.shape[0])
        sizes = member.sum(0, dtype=jnp.int32)
        x = permute_rows(x_NxD, order, inverse)
        gate = checkpoint_name(self.gate.sorted_rows(x, sizes, member, rngs[0]), "gate")
        h = swiglu(gate, checkpoint_name(self.up.sorted_rows(x, sizes, member, rngs[1]), "up"))
        return permute_rows(self.down.sorted_rows(h, sizes, member, rngs[2]), inverse, order)


def _choices(x_SxD: Array, routing: Routing, num_experts: int) -> tuple[Array, Array]:
    """A row per choice, [S * k, D], and its expert; dropped choices go to expert `num_experts`, which is none."""
    expert_N = jnp.where(routing.kept, routing.expert, num_experts).reshape(-1)
    return jnp.repeat(x_SxD, routing.expert.shape[1], axis=0), expert_N


def _weighted_sum(y_NxD: Array, routing: Routing) -> Array:
    # The barrier keeps the weight's gradient, a sum over the width, from being computed for every expert.
    weight_Sxk = jax.lax.optimization_barrier(routing.weight).astype(y_NxD.dtype)
    return (y_NxD.reshape(*weight_Sxk.shape, -1) * weight_Sxk[:, :, None]).sum(1)


def _narrow(array: Array, dtype) -> Array:
    """A kernel in the type of its product, before it travels; one of 8 bits and its scale [E, out] as they are."""
    return array if array.dtype == jnp.int8 or array.ndim == 2 else array.astype(dtype)


def _transposed(params: Params, names: Params, modules: list[str]) -> tuple[Params, Params]:
    """Parameters and their logical axes with the kernels of these modules transposed.

    Rows that are gathered lie one behind the other as they come. Columns would be copied into their places.
    """

    def swap(one: Params, kernel: Callable) -> Params:
        return one | {name: one[name] | {"kernel": kernel(one[name]["kernel"])} for name in modules}

    return swap(params, lambda x: x.swapaxes(-1, -2)), swap(names, lambda axes: (*axes[:-2], axes[-1], axes[-2]))


def _gather(array: Array, names: tuple[str | None, ...], kept: set[str], rules: ShardingConfig | None) -> Array:
    """Undoes the sharding of all logical axes but the `kept` ones."""
    for dimension, name in enumerate(names):
        if name is not None and name not in kept and (axes := mesh_axes(rules, name)):
            array = jax.lax.all_gather(array, axes, axis=dimension, tiled=True)
    return array


class SwiGlu(nnx.Module):
    """LLaMA's MLP: down(silu(gate(x)) * up(x))."""

    def __init__(self, llm: LlmConfig, lora: LoraConfig, rngs: Rngs):
        D, F = llm.hidden_size, llm.mlp_dim

        def linear(name, in_dim, out_dim, axes):
            return Linear(in_dim, out_dim, axes=axes, bias=False, rngs=rngs, lora=lora, lora_rank=lora.rank_of(name))

        self.gate = linear("gate", D, F, ("embed", "mlp"))
        self.up = linear("up", D, F, ("embed", "mlp"))
        self.down = linear("down", F, D, ("mlp", "embed"))

    def __call__(self, x: Array, rng: Array | None = None) -> Array:
        gate_rng, up_rng, down_rng = split_rng(rng, 3)
        gate, up = checkpoint_name(self.gate(x, rng=gate_rng), "gate"), checkpoint_name(self.up(x, rng=up_rng), "up")
        return self.down(swiglu(gate, up), rng=down_rng)


class ExpertsApart(nnx.Module):
    """Experts with arrays of their own, for decoding on a CPU. There a product with one of stacked ones copies it."""

    def __init__(
        self, num_experts: int, llm: LlmConfig, lora: LoraConfig, rngs: Rngs, rules: ShardingConfig | None = None
    ):
        self.each = nnx.List([SwiGlu(llm, lora, rngs) for _ in range(num_experts)])
        self.sizes, self.rules = (num_experts, llm, lora), rules

    def __call__(self, x_SxD: Array, routing: Routing, rng: Array | None) -> Array:
        """As `Experts`. One token reads its own experts' weights only; many tokens are sorted, in stacked weights."""
        mesh = jax.typeof(x_SxD).sharding.mesh
        devices = axis_size(mesh, row_axes(x_SxD.shape[0], mesh)) if mesh.size > 1 else 1
        here = x_SxD.shape[0] // devices  # tokens of one device
        if x_SxD.shape[0] == 1:
            weight_k = routing.weight[0].astype(x_SxD.dtype)
            run = [lambda x, mlp=mlp: mlp(x, rng) for mlp in self.each]
            return sum(weight_k[i] * jax.lax.switch(routing.expert[0, i], run, x_SxD) for i in range(len(weight_k)))
        if here <= FEW_TOKENS:
            weight_SxE = (jax.nn.one_hot(routing.expert, len(self.each)) * routing.weight[:, :, None]).sum(1)
            weight_SxE = weight_SxE.astype(x_SxD.dtype)
            return sum(weight_SxE[:, e, None] * mlp(x_SxD, rng) for e, mlp in enumerate(self.each))
        if mesh.size <= 1:
            return self._sorted(x_SxD, routing)
        return self._stacked(x_SxD.dtype)(x_SxD, routing, rng)

    def _stacked(self, dtype) -> Experts:
        experts = abstract_module(lambda rngs: Experts(*self.sizes, rngs, self.rules))
        params = {e: params_of(mlp) for e, mlp in enumerate(self.each)}
        if self.each[0].gate.narrow_rows:
            for linear in (experts.gate, experts.up, experts.down):
                quantize_linear(linear, rows=True)
        else:
            params = dequantize_params(params, dtype)
        return bind(experts, jax.tree.map(lambda *arrays: jnp.stack(arrays), *params.values()))

    def _sorted(self, x_SxD, routing):
        """Many tokens, without copying the weights side by side. Adapters have been merged."""
        x_NxD, expert_N = _choices(x_SxD, routing, len(self.each))
        order, inverse, member = sort_by_expert(expert_N, len(self.each))

        def grouped(x, params):
            return grouped_matmul_apart(x, [one["kernel"] for one in params.values()], member.sum(0, dtype=jnp.int32))

        def product(name, x):
            params = {e: params_of(getattr(mlp, name)) for e, mlp in enumerate(self.each)}
            if self.each[0].gate.narrow_rows:
                scales = scale_of_rows(member, [one["kernel_scale"] for one in params.values()])
                return by_integers(lambda x: grouped(x, params), x, scales)
            if widens_on_cpu(x, params[0]["kernel"]):
                return in_column_blocks(lambda p: grouped(x, dequantize_params(p, x.dtype)), params, len(x), x.dtype)
            return grouped(x, dequantize_params(params, x.dtype))

        x = permute_rows(x_NxD, order, inverse)
        h = jax.nn.silu(product("gate", x)) * product("up", x)
        return _weighted_sum(permute_rows(product("down", h), inverse, order), routing)


class MoeMlp(nnx.Module):
    """The MLP of a decoder layer as a mixture of experts (paper section 3.3; DeepSpeed `moe.layer.MoE`)."""

    def __init__(
        self,
        llm: LlmConfig,
        moe: MoeConfig,
        lora: LoraConfig,
        rngs: Rngs,
        rules: ShardingConfig | None = None,
        unstacked_experts: bool = False,
    ):
        self.moe = moe
        self.router = Linear(llm.hidden_size, moe.num_experts, axes=("embed", None), bias=False, rngs=rngs)
        self.experts = (ExpertsApart if unstacked_experts else Experts)(moe.num_experts, llm, lora, rngs, rules)
        self.residual = SwiGlu(llm, lora, rngs) if moe.residual else None
        self.coefficient = Linear(llm.hidden_size, 2, axes=("embed", None), rngs=rngs) if moe.residual else None

    def __call__(
        self,
        x_BxLxD: Array,
        valid_BxL: Array,
        *,
        train: bool = False,
        rng: Array | None = None,
        noise_SxE: Array | None = None,
    ) -> tuple[Array, dict[str, Any]]:
        """[B, L, D] -> [B, L, D] in x's dtype, and metrics of this layer.

        `rng` turns on adapter dropout and, for the capacity rule, draws the noise unless `noise_SxE` is given.
        """
        B, L, D = x_BxLxD.shape
        if is_for_tpu(x_BxLxD):  # rounded, and its gradients' sum: in float32 for the router both would be kept
            x_BxLxD = jax.lax.optimization_barrier(x_BxLxD)
        noise_rng, expert_rng, residual_rng = split_rng(rng, 3)
        logits_BxLxE = self.router(x_BxLxD.astype(jnp.float32))
        routing, aux_loss = self._route(
            logits_BxLxE.reshape(B * L, -1), valid_BxL.reshape(-1), train, noise_rng, noise_SxE
        )
        y_BxLxD = self.experts(x_BxLxD.reshape(B * L, D), routing, expert_rng).reshape(B, L, D)
        if self.residual is not None:
            mix = jax.nn.softmax(self.coefficient(x_BxLxD).astype(jnp.float32), axis=-1).astype(y_BxLxD.dtype)
            y_BxLxD = y_BxLxD * mix[..., :1] + self.residual(x_BxLxD, residual_rng) * mix[..., 1:]
        out = {"router_logits": logits_BxLxE, "expert_index": routing.expert.reshape(B, L, -1), "aux_loss": aux_loss}
        return y_BxLxD, out | _load(routing, valid_BxL.reshape(-1), self.moe.num_experts)

    def _route(self, logits_SxE, valid_S, train, rng, noise_SxE):
        probs_SxE = jax.nn.softmax(logits_SxE, axis=-1)
        if self.moe.dispatch == "dropless":
            routing = route_dropless(probs_SxE, self.moe.top_k)
            counted_S = valid_S.astype(jnp.float32)
        else:
            S, E = logits_SxE.shape
            if noise_SxE is None and rng is not None:
                draw = jax.random.uniform if self.moe.top_k == 1 else jax.random.gumbel
                noise_SxE = draw(rng, (S, E))
            factor = (self.moe.capacity_factor if train else self.moe.eval_capacity_factor) * self.moe.top_k
            capacity = expert_capacity(S, E, factor, self.moe.min_capacity)
            routing = route_capacity(probs_SxE, logits_SxE, self.moe.top_k, capacity, noise_SxE)
            counted_S = jnp.ones(S)  # the rule counts padding too
        return routing, load_balancing_loss(probs_SxE, routing.expert[:, 0], counted_S)


def _load(routing: Routing, valid_S: Array, num_experts: int) -> dict[str, Array]:
    """Each expert's share of the valid tokens' choices (before drops), and the share of them that were dropped."""
    share = (valid_S / jnp.maximum(valid_S.sum() * routing.expert.shape[1], 1))[:, None]
    return {
        "expert_load": (jax.nn.one_hot(routing.expert, num_experts) * share[:, :, None]).sum((0, 1)),
        "dropped": jnp.sum(~routing.kept * share),
    }
