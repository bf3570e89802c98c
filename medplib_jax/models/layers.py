"""The layers that every model is made of, stacks of them for scan, and the bridge to plain parameter trees."""

import dataclasses
import functools
import math
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from medplib_jax.batch import Array, Params
from medplib_jax.models.precision import einsum, product
from medplib_jax.models.quantize import by_integers
from medplib_jax.models.rng import dropout
from medplib_jax.models.target import is_for_tpu, target_device
from medplib_jax.parallel.sharding import param_shardings

Rngs = nnx.Rngs
ROWS_AT_ONCE = 16  # of a narrow kernel; 8 and 32 are slower
BLOCK = 1024  # columns of a narrow kernel that are widened at once, at the most
LARGE = 2**22  # values of a kernel whose widening costs
THIN = 16  # inner width up to which an adapter's product on a TPU is a sum


class _ShapesOnly:
    """In place of `Rngs` where only shapes are wanted: to trace random draws would take most of the time."""


def param(
    rngs: Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    std: float | None = None,
    value: float | Callable[[], np.ndarray] = 0.0,
) -> nnx.Param:
    """A float32 parameter with logical axis names:

    Normal with `std`, or `value` when std is None, a constant or a (hashable) function that yields the array.
    """
    if len(shape) != len(axes):
        raise ValueError(f"{len(shape)} dimensions but {len(axes)} logical axes: {shape} {axes}")
    if isinstance(rngs, _ShapesOnly):
        initial = jnp.zeros(shape)
    elif std is None:
        initial = jnp.asarray(_values(shape, value))
    else:
        initial = std * jax.random.normal(rngs.params(), shape)
    return nnx.Param(initial, axes=axes, std=std, constant=value)


def _values(shape: tuple[int, ...], value: float | Callable[[], np.ndarray]) -> np.ndarray:
    """The initial values; those of a function are repeated along the leading axis of stacked layers."""
    return np.broadcast_to(np.asarray(value() if callable(value) else value, np.float32), shape).copy()


@dataclasses.dataclass(frozen=True)
class Identity:
    """Initial values of a projection that at first changes nothing, float32 [dim, dim]."""

    dim: int

    def __call__(self) -> np.ndarray:
        return np.eye(self.dim, dtype=np.float32)


class Linear(nnx.Module):
    """x @ kernel (+ bias), with an optional low-rank adapter: + scale * dropout(x) @ lora_a @ lora_b.

    kernel is [in, out]; PyTorch's is [out, in]. `axes` are the kernel's logical axes. `gain` scales its initial values,
    or `initial` gives them. The product runs in x's dtype.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        axes: tuple[str | None, str | None],
        rngs: Rngs,
        bias: bool = True,
        gain: float = 1.0,
        initial: Callable[[], np.ndarray] | None = None,
        lora=None,
        lora_rank: int = 0,
    ):
        std = None if initial else gain / math.sqrt(in_dim)
        self.kernel = param(rngs, (in_dim, out_dim), axes, std=std, value=initial or 0.0)
        self.kernel_scale, self.narrow_rows = None, False  # of an 8-bit kernel, see quantize.py
        self.by_output = False  # the kernel is [out, in], see decode/layout.py
        self.bias = param(rngs, (out_dim,), (axes[1],)) if bias else None
        self.lora_scale, self.lora_dropout = (lora.scale, lora.dropout) if lora_rank else (0.0, 0.0)
        axis_a, axis_b = adapter_axes(axes)
        self.lora_a = (
            param(rngs, (in_dim, lora_rank), (axis_a, "lora_rank"), std=1 / math.sqrt(3 * in_dim))
            if lora_rank
            else None
        )
        self.lora_b = param(rngs, (lora_rank, out_dim), ("lora_rank", axis_b)) if lora_rank else None

    def __call__(self, x: Array, *, rng: Array | None = None) -> Array:
        """x [..., in] -> [..., out]. `rng` turns on the adapter's dropout."""
        y = self.product(x)
        if self.lora_a is not None:
            low = adapter_product(dropout(x, self.lora_dropout, rng), self.lora_a[...])
            low = checkpoint_name(self.lora_scale * low, "low")  # scaled while it is narrow
            y = y + adapter_product(low, self.lora_b[...])
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def product(self, x: Array, dtype=None) -> Array:
        """x @ kernel alone, in `dtype` (default: x's)."""
        multiply = matmul_by_output if self.by_output else matmul
        if self.narrow_rows:
            return by_integers(lambda x: multiply(x, self.kernel[...], jnp.int32), x, self.kernel_scale[...], dtype)
        y = multiply(x, self.kernel[...], dtype)
        return y if self.kernel_scale is None else y * self.kernel_scale[...].astype(y.dtype)


def adapter_axes(axes: tuple[str | None, str | None]) -> tuple[str | None, ...]:
    """Logical axes of an adapter's outer sides.

    Along the model's width it has a name of its own. It is so small that it costs less to keep it whole on every chip
    than to gather it in every layer.
    """
    return tuple("lora_embed" if axis == "embed" else axis for axis in axes)


def matmul(x: Array, kernel: Array, dtype=None) -> Array:
    """x [..., in] @ kernel [in, out] in x's dtype, the result in `dtype` (default: x's).

    It is one product of two matrices. With several batch axes the kernel's gradient takes twice as long on a CPU.
    """
    dtype, rows = dtype or x.dtype, x.reshape(-1, x.shape[-1])
    if widens_on_cpu(x, kernel):
        y = _matmul_narrow(rows, kernel, dtype)
    else:
        y = product(rows, kernel.astype(x.dtype), dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def adapter_product(x: Array, w: Array) -> Array:
    """x [..., in] @ w [in, out] in x's dtype, where one of the two widths is an adapter's rank.

    It computes little and moves much. For a TPU one of a narrow inner width is written as a sum, which its compiler
    fuses with the product that it is added to: its wide result is never in memory. The gradients are made alike.
    """
    return _thin_product(x, w.astype(x.dtype)) if is_for_tpu(x) else matmul(x, w)


def adapter_products(x_SxD: Array, w_ExDxR: Array) -> Array:
    """x with each of E adapters' first matrices, side by side: [S, E * R]."""
    if is_for_tpu(x_SxD):
        return adapter_product(x_SxD, rearrange(w_ExDxR, "e d r -> d (e r)"))
    # With E apart, which a matrix of width E * R is not to the last bit: the gradient's sums have another order.
    return rearrange(einsum("sd,edr->ser", x_SxD, w_ExDxR.astype(x_SxD.dtype)), "s e r -> s (e r)")


@jax.custom_vjp
def _thin_product(x: Array, w: Array) -> Array:
    if len(w) > THIN:
        return matmul(x, w)
    factors, rows = x.astype(jnp.float32), w.astype(jnp.float32)
    return sum(factors[..., i, None] * rows[i] for i in range(len(w))).astype(x.dtype)


def _thin_gradients(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    rows, dy_rows = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
    return _thin_product(dy, w.T), product(rows.T, dy_rows)


_thin_product.defvjp(lambda x, w: (_thin_product(x, w), (x, w)), _thin_gradients)


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up. For a TPU their gradients are written once, together. Left to itself its compiler computes them
    from the wide arrays again in every product that reads them.
    """
    if is_for_tpu(gate):
        gate, up = _gradients_at_once((gate, up))
    return jax.nn.silu(gate) * up


@jax.custom_vjp
def _gradients_at_once(x):
    return x


_gradients_at_once.defvjp(lambda x: (x, None), lambda _, dx: (jax.lax.optimization_barrier(dx),))


def matmul_by_output(x: Array, kernel: Array, dtype=None) -> Array:
    """`matmul` with a kernel [out, in], for decoding on a GPU: the weights of one output are contiguous in memory.

    A single row is multiplied and summed instead of being a matrix product. XLA for GPUs makes one kernel of that,
    fused with its neighbours, which reads each weight once and in the type in which it is stored. A matrix product
    would call a library, for which XLA copies several kernels into one array, or widens them to float32, for every
    token.
    """
    if x.size > x.shape[-1]:
        return matmul(x, rearrange(kernel, "out in -> in out"), dtype)
    y = vector_matmul(x.reshape(-1), kernel).astype(dtype or x.dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[0])


def widens_on_cpu(x: Array, kernel: Array) -> bool:
    """Whether a large kernel of 8 or 16 bits meets x on one CPU. Unless x has 8 bits, too, it multiplies float32, and
    writes the kernel out.

    For a single row that takes ten times as long as reading it. For many rows the kernels of all layers are written out
    at once, as soon as they can be.
    """
    narrow = kernel.dtype in (jnp.int8, jnp.bfloat16) and kernel.size >= LARGE
    return narrow and target_device(x).platform == "cpu" and jax.typeof(x).sharding.mesh.size <= 1


def _matmul_narrow(x_SxD: Array, kernel: Array, dtype) -> Array:
    """`matmul` of [S, in] that never holds a whole kernel in float32."""
    if len(x_SxD) == 1 and x_SxD.size % ROWS_AT_ONCE == 0:
        return vector_matmul_narrow(x_SxD[0], kernel).astype(dtype)[None]
    if x_SxD.dtype == jnp.int8:
        return product(x_SxD, kernel, dtype)
    return in_column_blocks(lambda part: product(x_SxD, part.astype(x_SxD.dtype), dtype), kernel, len(x_SxD), dtype)


def vector_matmul_narrow(x: Array, kernel: Array) -> Array:
    """x [in] @ kernel [in, out] -> [out], a few rows of the kernel at a time in one elementwise loop.

    In float32, for integers in int32.
    """
    x = x.astype(_sum_type(x))

    def add(i, y):
        start = i * ROWS_AT_ONCE
        rows = narrow_slice(kernel, start, ROWS_AT_ONCE, 0)
        factors = jax.lax.dynamic_slice_in_dim(x, start, ROWS_AT_ONCE)
        for j in range(ROWS_AT_ONCE):
            y = y + factors[j] * rows[j].astype(x.dtype)
        return y

    return jax.lax.fori_loop(0, len(x) // ROWS_AT_ONCE, add, jnp.zeros(kernel.shape[1], x.dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def narrow_slice(x: Array, start: Array, size: int, axis: int) -> Array:
    """`size` rows of an axis from `start`, a loop's variable.

    XLA for CPUs would write an array of bfloat16 out as float32 as a whole, before the loop. It leaves integers as they
    are, but would copy them there, too, if their bits did not wait for `start`.
    """
    if x.dtype != jnp.bfloat16:
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis)
    x, start = jax.lax.optimization_barrier((x, start))
    bits = jax.lax.dynamic_slice_in_dim(jax.lax.bitcast_convert_type(x, jnp.uint16), start, size, axis)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@narrow_slice.defjvp
def _narrow_slice_jvp(size, axis, primals, tangents):
    return narrow_slice(*primals, size, axis), jax.lax.dynamic_slice_in_dim(tangents[0], primals[1], size, axis)


def take_rows(table: Array, index: Array) -> Array:
    """table[index]. A CPU looks bfloat16 up as integers: else XLA writes the whole table out as float32 first."""
    return _take_bits(table, index) if widens_on_cpu(index, table) else table[index]


@jax.custom_jvp
def _take_bits(table: Array, index: Array) -> Array:
    table, index = jax.lax.optimization_barrier((table, index))  # as in `narrow_slice`
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(table, jnp.uint16)[index], table.dtype)


@_take_bits.defjvp
def _take_bits_jvp(primals, tangents):  # integers have no gradient
    return _take_bits(*primals), tangents[0][primals[1]]


def in_column_blocks(multiply: Callable[[Params], Array], kernel: Params, rows: int, dtype) -> Array:
    """`multiply(kernel)` [rows, out], worked off in blocks of the last axis of everything in `kernel`."""
    out = jax.tree.leaves(kernel)[0].shape[-1]
    width = max(size for size in range(1, BLOCK + 1) if out % size == 0)

    def step(i, y):
        part = jax.tree.map(lambda x: narrow_slice(x, i * width, width, x.ndim - 1), kernel)
        return jax.lax.dynamic_update_slice_in_dim(y, multiply(part), i * width, axis=1)

    return jax.lax.fori_loop(0, out // width, step, jnp.zeros((rows, out), dtype))


def vector_matmul(x: Array, kernel: Array) -> Array:
    """kernel [out, in] @ x [in] -> float32 [out], int32 for integers, read once."""
    return (x.astype(_sum_type(x)) * kernel.astype(_sum_type(x))).sum(-1)


def _sum_type(x: Array):
    return jnp.int32 if x.dtype == jnp.int8 else jnp.float32


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, statistics in float32."""

    def __init__(self, dim: int, *, eps: float, rngs: Rngs):
        self.scale = param(rngs, (dim,), ("norm",), value=1.0)
        self.bias = param(rngs, (dim,), ("norm",))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


class RmsNorm(nnx.Module):
    """Root-mean-square norm over the last axis, statistics in float32 (LlamaRMSNorm)."""

    def __init__(self, dim: int, *, eps: float, rngs: Rngs):
        self.scale = param(rngs, (dim,), ("norm",), value=1.0)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return (normed * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Mlp(nnx.Module):
    """Two linear layers with an activation between; `axis` is the logical axis of the outer widths, `out_gain` scales
    the second one's initial values."""

    def __init__(
        self,
        in_dim: int,
        mlp_dim: int,
        out_dim: int,
        activation: Callable[[Array], Array],
        *,
        rngs: Rngs,
        axis: str = "embed",
        out_gain: float = 1.0,
    ):
        self.fc1 = Linear(in_dim, mlp_dim, axes=(axis, "mlp"), rngs=rngs)
        self.fc2 = Linear(mlp_dim, out_dim, axes=("mlp", axis), gain=out_gain, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        return self.fc2(self.activation(self.fc1(x)))


def softmax_average(scores: Array, v: Array, scale: Array | None = None) -> Array:
    """softmax(scores) @ v, divided last: scores float32 [..., T, S], v [..., S, V] -> [..., T, V] in v's dtype.

    `scale` [..., 1, S], of each row of v, is multiplied into the weights.

    `jax.nn.softmax` divides the [T, S] weights instead. On a CPU that takes nearly three times as long, gradient
    included.
    """
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    scaled = weights if scale is None else weights * scale
    return (product(scaled.astype(v.dtype), v) / weights.sum(-1, keepdims=True)).astype(v.dtype)


def gelu(x: Array) -> Array:
    """Exact (erf) GELU, as torch.nn.GELU()."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), CLIP's activation."""
    return x * jax.nn.sigmoid(1.702 * x)


def stack_layers(make: Callable[[Rngs], nnx.Module], count: int, rngs: Rngs) -> nnx.Module:
    """`count` copies of a module with every parameter stacked on a leading `layers` axis, ready for `scan_layers`."""
    template = abstract_module(make)
    if isinstance(rngs, _ShapesOnly):
        stacked = jax.vmap(lambda _: params_of(make(rngs)))(jnp.arange(count))
    else:
        stacked = jax.vmap(lambda key: params_of(make(Rngs(key))))(jax.random.split(rngs.params(), count))
    graphdef, state = nnx.split(bind(template, stacked))
    for _, variable in nnx.to_flat_state(state):
        variable.set_metadata(axes=("layers", *variable.axes))
    return nnx.merge(graphdef, state)


def list_layers(make: Callable[[Rngs], nnx.Module], count: int, rngs: Rngs) -> nnx.List:
    """`count` modules with parameters of their own."""
    return nnx.List([make(rngs) for _ in range(count)])


def scan_layers(
    layers: nnx.Module, body: Callable, carry, xs=None, *, unroll: int = 1, wrap: Callable = lambda step: step
):
    """`lax.scan` over stacked layers: body(layer, carry, x) -> (carry, y). `wrap` may be a `jax.checkpoint` policy."""
    graphdef, state = nnx.split(layers)

    def step(carry, inputs):
        layer_state, x = inputs
        return body(nnx.merge(graphdef, layer_state), carry, x)

    return jax.lax.scan(wrap(step), carry, (state, xs), unroll=unroll)


def layer_at(layers: nnx.Module, i: int) -> nnx.Module:
    """Layer i of a list or of a stack."""
    if isinstance(layers, nnx.List):
        return layers[i]
    graphdef, state = nnx.split(layers)
    return nnx.merge(graphdef, jax.tree.map(lambda a: a[i], state))


def scan_plan(kinds: Sequence) -> list[tuple[int, int, int]]:
    """Splits a sequence of layer kinds into (start, period, repeats), each the longest repetition from its start.

    All alike: one entry of period 1. Every second: one entry of period 2. Two halves: two entries of period 1.
    """
    plan, start = [], 0
    while start < len(kinds):
        best = (1, 1)
        for period in range(1, (len(kinds) - start) // 2 + 1):
            repeats = 1
            while kinds[start + repeats * period : start + (repeats + 1) * period] == kinds[start : start + period]:
                repeats += 1
            if repeats > 1 and period * repeats > best[0] * best[1]:
                best = (period, repeats)
        plan.append((start, *best))
        start += best[0] * best[1]
    return plan


def abstract_module(make: Callable[[Rngs], nnx.Module]) -> nnx.Module:
    """The module with shapes in place of arrays: nothing is allocated."""
    return nnx.eval_shape(lambda: make(_ShapesOnly()))


def params_of(module: nnx.Module) -> Params:
    """The module's parameters as a plain nested dict with string keys."""
    return _string_keys(nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def draw_params(module: nnx.Module, seed: int) -> Params:
    """Random float32 NumPy parameters for a (usually abstract) module, distributed as it would draw them itself.

    Drawn on the host, because compiling a program that draws hundreds of arrays takes a minute. A parameter's values
    depend on its path and the seed only.
    """

    def draw(path: tuple, variable: nnx.Param) -> np.ndarray:
        if variable.std is None:
            return _values(variable.shape, variable.constant)
        rng = np.random.default_rng([seed, zlib.crc32("/".join(map(str, path)).encode())])
        return variable.std * rng.standard_normal(variable.shape, np.float32)

    variables = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy draws without holding the interpreter
        values = dict(zip(variables, pool.map(draw, variables, variables.values()), strict=True))
    return _string_keys(nnx.traversals.unflatten_mapping(values))


def logical_axes(module: nnx.Module) -> Params:
    """The logical axis names of every parameter, in the same nesting as `params_of`."""
    axes = {path: variable.axes for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    return _string_keys(nnx.traversals.unflatten_mapping(axes))


def model_shardings(model: nnx.Module, mesh: Mesh) -> Params:
    """Where each parameter of a whole model goes, by the model's own `rules`, in the same nesting as `params_of`."""
    return param_shardings(logical_axes(model), params_of(model), model.rules, mesh)


def bind(module: nnx.Module, params: Params) -> nnx.Module:
    """A module of the same structure that computes with `params`; the given (usually abstract) module is left alone."""
    graphdef, state = nnx.split(module)
    state = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def _string_keys(tree):
    return {str(key): _string_keys(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
