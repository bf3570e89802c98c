"""8-bit kernels and activations: what they hold, how close the model stays, and what they take."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from medplib_jax.batch import flatten
from medplib_jax.config.experiment import MeshConfig, ShardingConfig
from medplib_jax.config.model import LoraConfig
from medplib_jax.decode.layout import decoding_model, to_decoding_layout
from medplib_jax.models.language.moe import Experts, ExpertsApart
from medplib_jax.models.language.routing import Routing
from medplib_jax.models.layers import Linear, abstract_module, bind, draw_params, logical_axes, params_of
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.models.quantize import dequantize_params, num_bytes, quantize_kernel, quantize_linear
from medplib_jax.models.target import made_for
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.parallel.sharding import batch_sharding, param_shardings
from tests.helpers import MODEL, random_batch, tiny_experiment

MODEL = dataclasses.replace(MODEL, lora=LoraConfig())


@pytest.fixture(scope="module")
def params():
    return draw_params(abstract_module(functools.partial(MedPLIB, MODEL)), 1)


def test_kernels_keep_their_values_to_half_a_step(params):
    plain, quantized = to_decoding_layout(MODEL, params), to_decoding_layout(MODEL, params, quantize="int8")
    back, scales = flatten(dequantize_params(quantized, jnp.float32)), flatten(quantized)
    for path, kernel in flatten(plain).items():
        step = scales.get(path.replace("/kernel", "/kernel_scale")) if path.endswith("/kernel") else None
        if step is None:
            np.testing.assert_array_equal(back[path], kernel)
        else:
            assert scales[path].dtype == jnp.int8
            assert (np.abs(back[path] - kernel) <= 0.501 * np.asarray(step)[..., None, :]).all(), path
    kinds = {path.split("/")[0] for path, leaf in scales.items() if leaf.dtype == jnp.int8}
    assert kinds == {"llm", "clip", "projector"} and not any(
        "router" in path for path in scales if scales[path].dtype == jnp.int8
    )
    assert num_bytes(quantized) < num_bytes(plain)


def test_the_model_computes_with_them(params):
    """Hidden states and a prefill over many tokens, equal to those of the dequantised weights."""
    batch = random_batch(tiny_experiment(model=MODEL), 16)
    model, quantized = decoding_model(MODEL, quantize="int8"), to_decoding_layout(MODEL, params, quantize="int8")
    assert jax.tree.structure(params_of(model)) == jax.tree.structure(quantized)
    plain = decoding_model(MODEL)

    def hidden(model, params):
        output, _ = jax.jit(lambda params: bind(model, params)(batch))(params)
        return output.hidden

    expected = hidden(plain, dequantize_params(quantized, jnp.float32))
    np.testing.assert_allclose(hidden(model, quantized), expected, rtol=1e-3, atol=1e-4)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="int4"):
        decoding_model(MODEL, quantize="int4")
    with pytest.raises(ValueError, match="'int8\\+w8a8' is not one of"):
        decoding_model(MODEL, quantize="int8+w8a8")


def reference(x, kernel):
    """x [S, D] @ kernel [D, F] by integers, in numpy: the product, and how far it may be from that of the floats."""
    row_scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    narrow, scale = quantize_kernel(kernel)
    rows = np.rint(x / row_scale).astype(np.int32)
    y = (rows @ narrow.astype(np.int32)).astype(np.float32) * row_scale * scale
    bound = 0.5 * (row_scale * np.abs(kernel).sum(0) + np.abs(x).sum(-1, keepdims=True) * scale)
    return y, bound + 0.25 * len(kernel) * row_scale * scale


@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 48), (5, 48), (1, 2048), (3, 2048)])  # 2,048: read row by row
def test_rows_of_8_bits_multiply_as_integers(rows, width, by_output):
    linear = abstract_module(lambda rngs: Linear(width, width, axes=("embed", "mlp"), bias=False, rngs=rngs))
    quantize_linear(linear, rows=True)
    linear.by_output = by_output
    draw = np.random.default_rng(0).standard_normal
    x, kernel = draw((rows, width), np.float32), draw((width, width), np.float32)
    narrow, scale = quantize_kernel(kernel)
    params = {"kernel": narrow.T if by_output else narrow, "kernel_scale": scale}
    found = jax.jit(lambda params, x: bind(linear, params)(x))(params, x)
    expected, bound = reference(x, kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert (np.abs(found - x @ kernel) <= 1.01 * bound).all()


@pytest.fixture(scope="module")
def mixture():
    """Two experts' kernels, rows that go to them, and what these give; the last row goes to none."""
    llm, rng = MODEL.llm, np.random.default_rng(0)
    sizes = {"gate": (llm.hidden_size, llm.mlp_dim), "up": (llm.hidden_size, llm.mlp_dim)}
    sizes["down"] = sizes["gate"][::-1]
    kernels = {name: rng.standard_normal((2, *shape), np.float32) for name, shape in sizes.items()}
    x = rng.standard_normal((160, llm.hidden_size), np.float32)
    expert = np.arange(160) % 3 % 2
    routing = Routing(*(jnp.asarray(a[:, None]) for a in (expert, np.ones(160, np.float32), np.arange(160) < 159)))

    def of(e):
        gate, up = (reference(x, kernels[name][e])[0] for name in ("gate", "up"))
        return reference(np.asarray(jax.nn.silu(gate)) * up, kernels["down"][e])[0]

    y = np.where((expert == 0)[:, None], of(0), of(1)) * (np.arange(160) < 159)[:, None]
    narrow = {
        name: dict(zip(("kernel", "kernel_scale"), quantize_kernel(k), strict=True)) for name, k in kernels.items()
    }
    return narrow, x, routing, y


def experts_of_8_bits(kind):
    experts = abstract_module(lambda rngs: kind(2, MODEL.llm, LoraConfig(), rngs, ShardingConfig()))
    for mlp in experts.each if kind is ExpertsApart else [experts]:
        for linear in (mlp.gate, mlp.up, mlp.down):
            quantize_linear(linear, rows=True)
    return experts


def computed(experts, params, x, routing):
    return jax.jit(lambda params, x, routing: bind(experts, params)(x, routing, None))(params, x, routing)


def assert_near(found, expected):
    """Rounding of float32 may take a value to the next step of 8 bits."""
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("tokens", [1, 9, 160])
def test_experts_multiply_integers_by_every_path(mixture, tokens, platform):
    params, x, routing, y = mixture
    apart = {"each": {str(e): jax.tree.map(lambda a, e=e: a[e], params) for e in range(2)}}
    routing = jax.tree.map(lambda a: a[:tokens], routing)
    with made_for(platform), pltpu.force_tpu_interpret_mode() if platform == "tpu" else contextlib.nullcontext():
        assert_near(computed(experts_of_8_bits(ExpertsApart), apart, x[:tokens], routing), y[:tokens])
        assert_near(computed(experts_of_8_bits(Experts), params, x[:tokens], routing), y[:tokens])


@pytest.mark.parametrize("sizes", [(1, 2, 2, 2), (1, 1, 1, 8)], ids=str)
def test_experts_on_a_mesh_round_rows_as_one_device_does(mixture, sizes):
    """Also where each device has a part of a row: with a scale of its own it would round in finer steps."""
    params, x, routing, _ = mixture
    experts, mesh, rules = experts_of_8_bits(Experts), make_mesh(MeshConfig(*sizes)), ShardingConfig()
    expected = computed(experts, params, x, routing)
    spread = jax.device_put(params, param_shardings(logical_axes(experts), params, rules, mesh))
    found = computed(experts, spread, *jax.device_put((x, routing), batch_sharding(mesh)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_the_decoder_rounds_its_activations_and_stays_close(params):
    quantized = to_decoding_layout(MODEL, params, quantize="int8")
    x = np.random.default_rng(0).standard_normal((1, 8, MODEL.llm.hidden_size), np.float32)

    def hidden(quantize):
        llm = decoding_model(MODEL, quantize=quantize).llm
        return jax.jit(lambda params: bind(llm, params)(x, jnp.ones((1, 8), bool))[0])(quantized["llm"])

    expected, found = hidden("int8"), hidden("w8a8")
    assert 0 < np.abs(found - expected).mean() < 0.05 * np.abs(expected).mean()
    modules = nnx.iter_modules(decoding_model(MODEL, quantize="w8a8"))
    rounding = {path for path, module in modules if getattr(module, "narrow_rows", False)}
    assert {path[0] for path in rounding} == {"llm"}
    assert {path[-1] for path in rounding} == {"q", "k", "v", "o", "gate", "up", "down"}
