"""The thin layer over NNX: initial values, stacking, and products that must equal their plain form."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from medplib_jax.models import layers
from medplib_jax.models.layers import (
    Mlp,
    Rngs,
    abstract_module,
    adapter_product,
    bind,
    draw_params,
    gelu,
    logical_axes,
    matmul,
    params_of,
    scan_layers,
    softmax_average,
    stack_layers,
    swiglu,
)
from medplib_jax.models.rng import dropout
from medplib_jax.models.target import made_for


def make(rngs):
    return stack_layers(lambda r: Mlp(4, 8, 4, gelu, rngs=r), 3, rngs)


def test_drawn_parameters_have_the_shapes_and_spread_of_the_modules_own():
    module = abstract_module(make)
    drawn, own = draw_params(module, 0), params_of(make(Rngs(0)))
    assert jax.tree.map(np.shape, drawn) == jax.tree.map(jnp.shape, own)
    np.testing.assert_allclose(drawn["fc1"]["kernel"].std(), 4**-0.5, rtol=0.3)
    assert not drawn["fc1"]["bias"].any()
    assert not np.array_equal(drawn["fc1"]["kernel"], draw_params(module, 1)["fc1"]["kernel"])
    np.testing.assert_array_equal(drawn["fc1"]["kernel"], draw_params(module, 0)["fc1"]["kernel"])


def test_stacked_layers_scan_like_a_loop_and_name_their_axes():
    module = abstract_module(make)
    params, x = draw_params(module, 0), jnp.ones((2, 4))
    scanned, _ = scan_layers(bind(module, params), lambda layer, carry, _: (carry + layer(carry), None), x)
    single = abstract_module(lambda r: Mlp(4, 8, 4, gelu, rngs=r))
    for i in range(3):
        x = x + bind(single, jax.tree.map(lambda a, i=i: a[i], params))(x)
    np.testing.assert_allclose(scanned, x, rtol=1e-5)
    assert logical_axes(module)["fc1"]["kernel"] == ("layers", "embed", "mlp")


def test_products_equal_their_plain_form():
    keys = jax.random.split(jax.random.key(0), 4)
    x, kernel = jax.random.normal(keys[0], (2, 3, 5)), jax.random.normal(keys[1], (5, 7))
    np.testing.assert_allclose(matmul(x, kernel), x @ kernel, rtol=1e-5, atol=1e-5)
    scores, v = 50 * jax.random.normal(keys[2], (2, 3, 6)), jax.random.normal(keys[3], (2, 6, 4))
    np.testing.assert_allclose(softmax_average(scores, v), jax.nn.softmax(scores) @ v, rtol=1e-5, atol=1e-5)


def test_dropout_keeps_the_share_and_the_mean():
    x = jnp.ones((400, 501))  # odd: a word serves two values
    kept = dropout(x, 0.05, jax.random.key(0))
    assert set(np.unique(kept)) == {0.0, np.float32(2**16 / (2**16 - round(0.05 * 2**16)))}
    assert abs(float((kept == 0).mean()) - 0.05) < 0.003 and abs(float(kept.mean()) - 1) < 0.003
    assert dropout(x, 0.05, None) is x and dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
def test_no_narrow_kernel_is_written_out_whole_on_a_cpu(rows, dtype, monkeypatch):
    monkeypatch.setattr(layers, "LARGE", 0)
    monkeypatch.setattr(layers, "BLOCK", 8)
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((1, rows, 48), np.float32), rng.integers(-127, 128, (48, 20)).astype(dtype)
    np.testing.assert_allclose(matmul(x, kernel), x @ kernel.astype(np.float32), rtol=1e-5, atol=1e-4)
    results = _results(jax.make_jaxpr(matmul)(x, kernel).jaxpr)
    shapes = {result.aval.shape for result in results if result.aval.dtype == jnp.float32}
    assert kernel.shape not in shapes and {1: (48,), 5: (5, 5)}[rows] in shapes
    table, index = kernel.astype(jnp.bfloat16), jnp.array([[3, 0]])
    np.testing.assert_array_equal(layers.take_rows(table, index), table[np.array([[3, 0]])])


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
def test_nor_by_the_compiler(rows, dtype, monkeypatch):
    monkeypatch.setattr(layers, "LARGE", 0)
    monkeypatch.setattr(layers, "BLOCK", 64)
    x, kernels = jnp.ones((rows, 512)), [jnp.ones((512, 512), dtype)] * 3

    def run(x, kernels):
        def token(_, x):
            return functools.reduce(matmul, kernels, x) / 512**3

        return jax.lax.fori_loop(0, 4, token, x)

    compiled = compiled_as_for_users(run, x, kernels)
    assert compiled.memory_analysis().temp_size_in_bytes < kernels[0].nbytes
    np.testing.assert_allclose(compiled(x, kernels), np.ones_like(x))


def test_a_loop_that_looks_rows_up_holds_no_copy_of_the_table(monkeypatch):
    monkeypatch.setattr(layers, "LARGE", 0)
    table = jnp.tile(jnp.arange(512, dtype=jnp.bfloat16)[:, None] % 256, (1, 512))

    def run(table, index):
        return jax.lax.fori_loop(0, 4, lambda _, index: layers.take_rows(table, index)[:, 0].astype(int) + 1, index)

    compiled = compiled_as_for_users(run, table, jnp.array([3]))
    assert compiled.memory_analysis().temp_size_in_bytes < table.nbytes / 4
    np.testing.assert_array_equal(compiled(table, jnp.array([3])), [7])


def test_a_narrow_kernel_has_its_gradient(monkeypatch):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((1, 48), np.float32), jnp.asarray(rng.standard_normal((48, 20)), jnp.bfloat16)
    gradients = jax.grad(lambda x, kernel: (matmul(x, kernel) ** 2).sum(), (0, 1))
    expected = gradients(x, kernel)
    monkeypatch.setattr(layers, "LARGE", 0)
    for found, one in zip(gradients(x, kernel), expected, strict=True):
        np.testing.assert_allclose(np.float32(found), np.float32(one), rtol=2e-2, atol=1e-2)
    table = jax.grad(lambda table: layers.take_rows(table, jnp.array([3, 0, 3])).astype(jnp.float32).sum())(kernel)
    np.testing.assert_array_equal(table[:5, 0], [1, 0, 0, 2, 0])


def compiled_as_for_users(function, *arguments):
    """With the fusions that the tests' flags switch off (conftest.py), and which copy arrays."""
    switched_off = "fusion_emitters=false" in os.environ["XLA_FLAGS"]
    options = {"xla_cpu_use_fusion_emitters": True} if switched_off else {}
    return jax.jit(function).lower(*arguments).compile(options)


def _results(jaxpr):
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for inner in jaxprs_in_params(equation.params):
            yield from _results(inner)


def value_and_gradients(function, *args):
    y, back = jax.vjp(function, *args)
    return y, *back(jnp.cos(y))


@pytest.mark.parametrize("inner, outer", [(8, 96), (96, 8), (32, 96)])
def test_an_adapters_product_made_for_a_tpu_is_the_product(inner, outer):
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = jax.random.normal(keys[0], (2, 5, inner)), jax.random.normal(keys[1], (inner, outer))
    with made_for("tpu"):
        actual = value_and_gradients(adapter_product, x, w)
    for found, expected in zip(actual, value_and_gradients(matmul, x, w), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_narrow_product_made_for_a_tpu_is_no_product_of_matrices():
    with made_for("tpu"):
        narrow, wide = (jax.make_jaxpr(adapter_product)(jnp.ones((4, n)), jnp.ones((n, 64))) for n in (16, 17))
    assert "dot_general" not in str(narrow) and "dot_general" in str(wide)


def test_swiglu_made_for_a_tpu_has_the_same_gradients():
    gate, up = jax.random.normal(jax.random.key(0), (2, 6, 40))
    with made_for("tpu"):
        actual = value_and_gradients(swiglu, gate, up)
    for found, expected in zip(actual, value_and_gradients(swiglu, gate, up), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
