"""The GPU's kernels, interpreted, against one product per group; and that they are what is sent to a GPU."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medplib_jax.aot.flops import count_flops
from medplib_jax.models import target
from medplib_jax.models.kernels import grouped_matmul as dispatch
from medplib_jax.models.kernels import grouped_matmul_triton as gpu
from tests.models.kernels.test_grouped_matmul import arrays, reference

CPU = types.SimpleNamespace(platform="cpu", device_kind="cpu")  # on which kernels are interpreted


@functools.partial(jax.jit, static_argnames="wide")
def products(x, w, dy, sizes, wide):
    device = types.SimpleNamespace(platform="cpu", device_kind="NVIDIA H200") if wide else CPU
    multiply = functools.partial(gpu.multiply, device=device)
    return (
        multiply(x, w, sizes, transpose=False),
        multiply(dy, w, sizes, transpose=True),
        gpu.weight_gradient(x, dy, sizes, device=device),
    )


@settings(max_examples=20)
@given(
    st.lists(st.integers(0, 700), min_size=3, max_size=3), st.sampled_from([(256, False), (300, True), (513, False)])
)
def test_tiles_equal_one_product_per_group(cuts, shape):
    rows, wide = shape
    sizes = np.diff(np.minimum(np.sort(cuts), rows), prepend=0)  # rows beyond the last cut belong to no group
    x, w, dy = arrays(rows, 3, 48, 256)
    for ours, theirs in zip(products(x, w, dy, sizes, wide), reference(x, w, dy, sizes), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_integers_of_8_bits_are_summed_in_32():
    sizes, rng = np.array([70, 0, 200]), np.random.default_rng(0)
    x, w = (rng.integers(-127, 128, shape, np.int8) for shape in ((300, 48), (3, 48, 256)))
    multiply = jax.jit(functools.partial(gpu.multiply, transpose=False, device=CPU))
    expected, *_ = reference(x.astype(np.int32), w.astype(np.int32), np.zeros((300, 256), np.int32), sizes)
    np.testing.assert_array_equal(multiply(x, w, sizes), expected)


@given(st.lists(st.integers(0, 900), min_size=1, max_size=6), st.integers(0, 300))
@settings(max_examples=25)
def test_every_row_lies_in_one_tile_of_its_group(sizes, rest):
    rows = sum(sizes) + rest
    group_T, start_T, stop_T = map(np.asarray, gpu.row_tiles(jnp.array(sizes, jnp.int32), rows))
    covered = [
        (row, group) for group, start, stop in zip(group_T, start_T, stop_T, strict=True) for row in range(start, stop)
    ]
    assert sorted(covered) == list(enumerate(np.repeat(np.arange(len(sizes) + 1), [*sizes, rest])))
    assert (stop_T - start_T).max(initial=0) <= gpu.ROWS


@pytest.mark.parametrize("tiles", [(1, 1), (8, 3), (19, 5), (83, 43)])
def test_each_pair_of_tiles_has_one_program(tiles):
    pairs = [
        gpu._near(jnp.int32(program), *tiles) for program in range(0, tiles[0] * tiles[1], 7 if tiles[0] > 50 else 1)
    ]
    assert len(set((int(row), int(column)) for row, column in pairs)) == len(pairs)
    assert all(row < tiles[0] and column < tiles[1] for row, column in pairs)


def test_what_tiles_do_not_cover_goes_to_blocks():
    def obstacle(rows, *matrices):
        x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, matrices[1]), matrices))
        return gpu.obstacle(x, w, CPU)

    assert obstacle(10240, 8, 4096, 11008) == ""
    assert obstacle(64, 2, 100, 64) == "matrices of 100 x 64 are not multiples of 16"
    assert "32 bits" in obstacle(2**18, 2, 4096, 11008), "2.9e9 values"


def test_a_gpu_gets_the_kernels(monkeypatch):
    """As far as the program that is sent to it; there is none here to run it."""
    for module in (dispatch, target):
        monkeypatch.setattr(
            module, "target_device", lambda _: types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
        )
    x, w, sizes = (
        jax.ShapeDtypeStruct((512, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 64, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((2,), jnp.int32),
    )

    def loss(x, w, sizes):
        return dispatch.grouped_matmul(x, w, sizes).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss, (0, 1))).trace(x, w, sizes).lower(lowering_platforms=("cuda",)).as_text()
    assert "gmm_triton" in text and "tgmm_triton" in text and "stablehlo.while" not in text


def test_results_stay_in_the_mesh_and_gradients_of_frozen_weights_are_dropped(monkeypatch):
    for module in (dispatch, target):
        monkeypatch.setattr(
            module, "target_device", lambda _: types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
        )
    rows = NamedSharding(Mesh(np.array(jax.devices()[:1]), "data"), PartitionSpec())
    x, w, sizes = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for shape, dtype in (((512, 64), "bfloat16"), ((2, 64, 64), "bfloat16"), ((2,), "int32"))
    )

    def loss(x, w, sizes):
        y = dispatch.grouped_matmul(x, w, sizes)
        assert jax.typeof(y).sharding.mesh == jax.typeof(x).sharding.mesh
        return jnp.square(y.astype(jnp.float32)).sum()

    product = 2 * 512 * 64 * 64
    assert count_flops(jax.jit(jax.grad(loss, (0, 1))).trace(x, w, sizes).jaxpr.jaxpr) == 3 * product
    assert (
        count_flops(jax.jit(lambda *args: jax.grad(loss, (0, 1))(*args)[0]).trace(x, w, sizes).jaxpr.jaxpr)
        == 2 * product
    )
