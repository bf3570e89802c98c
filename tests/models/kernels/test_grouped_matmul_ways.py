"""Which way grouped products go on which device and JAX, and that all ways give the same."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from medplib_jax.aot import flops as executed
from medplib_jax.aot.flops import count_flops
from medplib_jax.models.kernels import grouped_matmul_mosaic as mosaic
from medplib_jax.models.kernels import grouped_matmul_tpu, grouped_matmul_triton
from medplib_jax.models.kernels.grouped_matmul import default_way, grouped_matmul
from medplib_jax.models.target import made_for
from tests.models.kernels.test_grouped_matmul import arrays, reference
from tests.paths import ROOT

TRITON = "jax.experimental.pallas.triton"
HOPPER = ("gpu", "NVIDIA H200")


def shapes(rows=512, inner=256, outer=512, dtype="bfloat16"):
    return jax.ShapeDtypeStruct((rows, inner), dtype), jax.ShapeDtypeStruct((2, inner, outer), dtype)


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, TRITON, None)
    monkeypatch.delattr(pallas, "triton")
    monkeypatch.delitem(sys.modules, grouped_matmul_triton.__name__)


@pytest.mark.parametrize(
    ("device", "arrays", "way"),
    [
        (("tpu", "TPU v5 lite"), {}, "tpu"),
        (("cpu", "cpu"), {}, "blocks"),
        (HOPPER, {}, "triton"),
        (HOPPER, {"inner": 8}, "blocks"),
        (("gpu", "NVIDIA A100-SXM4-80GB"), {"dtype": "int8"}, "triton"),
    ],
)
def test_the_default_by_platform_and_shape(device, arrays, way):
    with made_for(*device):
        assert default_way(*shapes(**arrays)) == way


@pytest.mark.parametrize(
    ("kind", "arrays", "way"),
    [
        ("NVIDIA H100 80GB HBM3", {}, "mosaic"),
        ("NVIDIA H200", {"dtype": "float16"}, "mosaic"),
        ("NVIDIA H200", {"dtype": "int8"}, "blocks"),
        ("NVIDIA H200", {"dtype": "float32"}, "blocks"),
        ("NVIDIA H200", {"inner": 192}, "blocks"),
        ("NVIDIA H200", {"rows": 100}, "blocks"),
        ("NVIDIA A100-SXM4-80GB", {}, "blocks"),
        ("NVIDIA B200", {}, "blocks"),
    ],
)
def test_the_default_of_a_jax_without_triton(without_triton, kind, arrays, way):
    with made_for("gpu", kind):
        assert default_way(*shapes(**arrays)) == way


def test_the_package_is_imported_without_triton():
    code = f"""
import sys
sys.modules["{TRITON}"] = None
import medplib_jax.benchmarks.grouped  # which imports the models, training and aot
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("device", "way", "dtype", "why"),
    [
        (
            HOPPER,
            "mosaic",
            "float32",
            "on NVIDIA H200 by way='mosaic': it multiplies bfloat16 and float16, not float32",
        ),
        (("gpu", "NVIDIA A100-SXM4-80GB"), "mosaic", "bfloat16", "it is for H100 and H200"),
        (("cpu", "cpu"), "triton", "bfloat16", "a cpu has blocks, xla"),
        (HOPPER, "trition", "bfloat16", "a gpu has triton, mosaic, blocks, xla"),
    ],
)
def test_a_way_that_cannot_be_taken_is_refused_before_anything_runs(device, way, dtype, why):
    with made_for(*device), pytest.raises(ValueError, match=why):
        jax.eval_shape(lambda x, w, sizes: grouped_matmul(x, w, sizes, False, way), *shapes(dtype=dtype), jnp.ones(2))


def test_a_way_that_jax_no_longer_has_is_refused(without_triton):
    with made_for(*HOPPER), pytest.raises(ValueError, match=f"JAX {jax.__version__} does not have it"):
        jax.eval_shape(lambda x, w, sizes: grouped_matmul(x, w, sizes, False, "triton"), *shapes(), jnp.ones(2))


@pytest.mark.parametrize("transposed", [False, True])
def test_xlas_own_way_gives_the_same_and_so_do_its_gradients(transposed):
    sizes = jnp.array([70, 0, 90])
    x, w, dy = arrays(200, 3, 12, 20)  # 40 rows belong to no group
    given = jnp.asarray(w.swapaxes(1, 2) if transposed else w)
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, transposed, "xla"), x, given)
    dx, dw = pull(dy)
    found = y, dx, dw.swapaxes(1, 2) if transposed else dw
    for ours, theirs in zip(found, reference(x, w, dy, sizes.tolist()), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_xlas_own_way_sums_integers_in_32_bits():
    rng, sizes = np.random.default_rng(0), jnp.array([30, 50])
    x, w = (jnp.asarray(rng.integers(-127, 128, shape, np.int8)) for shape in ((90, 64), (2, 64, 32)))
    expected = grouped_matmul(x, w, sizes)
    np.testing.assert_array_equal(grouped_matmul(x, w, sizes, False, "xla"), expected)


def test_gradients_take_the_way_of_the_product_and_flops_are_counted():
    """As far as the programs; there is no such GPU here."""
    x, w = shapes()
    product = 2 * 512 * 256 * 512

    def loss(way, x, w, sizes):
        return grouped_matmul(x, w, sizes, False, way).astype(jnp.float32).sum()

    for way in ("mosaic", "xla", "triton"):
        with made_for(*HOPPER):
            traced = jax.jit(jax.grad(lambda *args, way=way: loss(way, *args), (0, 1))).trace(x, w, jnp.ones(2, int))
        assert count_flops(traced.jaxpr.jaxpr) == 2 * product, way  # the product itself is not needed for a sum's
        assert ("mosaic_tgmm" in str(traced.jaxpr)) == (way == "mosaic")
        assert ("ragged_dot_general" in str(traced.jaxpr)) == (way == "xla")


def test_rows_of_no_group_are_zero_where_jaxs_kernel_leaves_them_unwritten(monkeypatch):
    def unwritten(x, w, *, group_sizes, transpose_rhs, **_):
        y = jax.lax.ragged_dot(x, w.swapaxes(1, 2) if transpose_rhs else w, group_sizes)
        return jnp.where((jnp.arange(len(x)) < group_sizes.sum())[:, None], y, jnp.nan)

    monkeypatch.setattr(mosaic.ragged_dot_mgpu, "ragged_dot", unwritten)
    x, w, dy = arrays(300, 2, 128, 256)
    sizes = jnp.array([100, 150])
    y, dx, _ = reference(x, w, dy, sizes.tolist())
    np.testing.assert_allclose(mosaic.multiply(x, w, sizes, transpose=False), y, atol=1e-3)
    np.testing.assert_allclose(mosaic.multiply(dy, w, sizes, transpose=True), dx, atol=1e-3)


def test_the_matrices_gradient_is_made_for_a_gpu_that_is_not_there():
    """JAX's kernel asks the first device, here a CPU, for its cores; the wrapper names 132."""
    x, dy = (jax.ShapeDtypeStruct((512, size), "bfloat16") for size in (256, 512))
    sizes = jax.ShapeDtypeStruct((2,), "int32")
    tiles = mosaic._tiles(512)
    jaxs = mosaic.transposed_ragged_dot_mgpu.transposed_ragged_dot
    with pytest.raises(AttributeError):  # core_count, of a CPU
        jax.eval_shape(lambda x, dy, sizes: jaxs(x, dy, group_sizes=sizes, **tiles), x, dy, sizes)
    assert jax.eval_shape(mosaic.weight_gradient, x, dy, sizes).shape == (2, 256, 512)
    assert "132" in str(jax.make_jaxpr(mosaic.weight_gradient)(x, dy, sizes))


@pytest.mark.slow
def test_jaxs_kernel_interpreted():
    """The product; its transposed form and the gradient use references that JAX's interpreter does not have yet."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode

    sizes = jnp.array([100, 0, 150])
    x, w, dy = (np.asarray(array, jnp.bfloat16) for array in arrays(300, 3, 128, 256))
    with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)):
        found = np.asarray(mosaic.multiply(x, w, sizes, transpose=False), np.float32)
    expected, *_ = reference(*(np.asarray(array, np.float32) for array in (x, w, dy)), sizes.tolist())
    np.testing.assert_allclose(found, expected, atol=0.2, rtol=0.01)


def test_what_is_counted_is_what_kernels_take_at_a_time():
    assert executed.ROW_TILE == grouped_matmul_triton.ROWS == grouped_matmul_tpu.ROW_TILE == mosaic.TILE
    assert executed.TRITON_DEPTH == grouped_matmul_triton.DEPTH_BYTES // 2 and executed.MOSAIC_DEPTH == mosaic.DEPTH
