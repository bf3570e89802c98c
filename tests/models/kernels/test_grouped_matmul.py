"""Grouped products against one product per group, for every way the rows can be spread over the groups."""

import types

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from medplib_jax.models.kernels import grouped_matmul_tpu as tpu
from medplib_jax.models.kernels.grouped_matmul import grouped_matmul

V5E = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")


def reference(x, w, dy, sizes):
    """The product, and the gradients to x and w, group by group in numpy."""
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    start = 0
    for e, size in enumerate(sizes):
        rows = slice(start, start := start + size)
        y[rows], dx[rows], dw[e] = x[rows] @ w[e], dy[rows] @ w[e].T, x[rows].T @ dy[rows]
    return y, dx, dw


def arrays(rows, groups, inner, outer):
    draw = np.random.default_rng(rows).standard_normal
    return tuple(draw(shape).astype(np.float32) for shape in ((rows, inner), (groups, inner, outer), (rows, outer)))


@jax.jit
def value_and_gradients(x, w, dy, sizes):
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    return y, *pull(dy)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 1200), min_size=3, max_size=3), st.sampled_from([31, 32, 1200]))
def test_blocks_equal_one_product_per_group(cuts, rows):
    sizes = np.diff(np.minimum(np.sort(cuts), rows), prepend=0)  # rows beyond the last cut belong to no group
    x, w, dy = arrays(rows, 3, 12, 20)
    for ours, theirs in zip(value_and_gradients(x, w, dy, sizes), reference(x, w, dy, sizes), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_tpu_kernel_interpreted():
    sizes = jnp.array([70, 0, 150])
    x, w, dy = arrays(256, 3, 128, 256)
    y, dx, dw = reference(x, w, dy, sizes.tolist())
    with pltpu.force_tpu_interpret_mode():
        np.testing.assert_allclose(tpu.multiply(x, w, sizes, transpose=False, device=V5E), y, atol=1e-3)
        np.testing.assert_allclose(tpu.multiply(dy, w, sizes, transpose=True, device=V5E), dx, atol=1e-3)
        np.testing.assert_allclose(tpu.weight_gradient(x, dy, sizes), dw, atol=1e-3)


def test_transposed_matrices_give_the_same_and_have_gradients():
    sizes = jnp.array([70, 0, 90])
    x, w, dy = arrays(200, 3, 12, 20)
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, True), x, jnp.asarray(w.swapaxes(1, 2)))
    dx, dw = pull(dy)
    for ours, theirs in zip((y, dx, dw.swapaxes(1, 2)), reference(x, w, dy, sizes.tolist()), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
