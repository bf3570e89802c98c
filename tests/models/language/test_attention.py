"""The attention kernels of TPUs, interpreted, and of GPUs against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medplib_jax.config.experiment import MeshConfig, ShardingConfig
from medplib_jax.models.language import attention
from medplib_jax.models.language.attention import (
    attend_within,
    fused_attention,
    rotary_frequencies,
    rotary_tables,
    rotate,
    splash_block,
    suits_cudnn,
)
from medplib_jax.models.target import made_for
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.parallel.sharding import batch_sharding

LENGTHS = np.array([200, 131])
PADDED = np.arange(200) < LENGTHS[:, None]
PACKED = np.where(PADDED, 1 + (np.arange(200) >= 60) + (np.arange(200) >= 90), 0)  # three conversations in a row


def random_qkv(heads=4, kv_heads=2):
    keys = jax.random.split(jax.random.key(0), 3)
    counts = zip(keys, (heads, kv_heads, kv_heads), strict=True)
    return tuple(jax.random.normal(key, (2, 200, count, 128)) for key, count in counts)


def value_and_gradients(function, q, k, v):
    """Of what valid positions see; padding may differ."""

    def loss(q, k, v):
        y = jnp.where(PADDED[:, :, None, None], function(q, k, v), 0)
        return jnp.sum(jnp.sin(y) * jnp.arange(200)[:, None, None] / 100), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return y, *gradients


@pytest.mark.parametrize("segments", [None, PACKED], ids=["padded", "packed"])
def test_splash_attention(segments):
    q, k, v = random_qkv()
    expected = value_and_gradients(lambda q, k, v: attend_within(q, k, v, PADDED, segments), q, k, v)
    kernel_segments = jnp.asarray(PADDED.astype(np.int32) if segments is None else segments)
    actual = value_and_gradients(lambda q, k, v: attention._splash(q, k, v, kernel_segments, None), q, k, v)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(
    "rules",
    [
        ShardingConfig(),
        ShardingConfig(kv_heads=""),
        ShardingConfig(heads=""),
        ShardingConfig(heads="", kv_heads=""),
        ShardingConfig(heads="data", kv_heads="data"),
        ShardingConfig(kv_heads="data"),
    ],
    ids=lambda rules: f"heads={rules.heads or None}-kv_heads={rules.kv_heads or None}",
)
def test_splash_attention_on_a_mesh(rules):
    """Each device must hold the keys of its own query heads, however the rules spread both."""
    q, k, v = random_qkv()
    expected = attend_within(q, k, v, PADDED)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    placed = jax.device_put((q, k, v, PADDED.astype(np.int32)), batch_sharding(mesh))
    actual = jax.jit(attention._splash, static_argnums=4)(*placed, rules)
    np.testing.assert_allclose(np.asarray(actual)[PADDED], np.asarray(expected)[PADDED], atol=2e-5)


def test_blocks_are_as_wide_as_the_length_allows():
    assert [splash_block(length) for length in (1, 128, 129, 1664, 2048)] == [128, 128, 256, 256, 512]


def test_fused_attention_needs_no_mask_of_padding():
    q, k, v = random_qkv()
    expected = value_and_gradients(lambda q, k, v: attend_within(q, k, v, PADDED), q, k, v)
    actual = value_and_gradients(lambda q, k, v: fused_attention(q, k, v, "xla"), q, k, v)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_gpu_gets_cudnn(monkeypatch):
    """As far as the program that is sent to the GPU; there is none here to run it."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda *_: False)
    monkeypatch.setattr(attention, "is_for_gpu", lambda _: True)
    queries, keys = (jax.ShapeDtypeStruct((2, 768, heads, 128), jnp.bfloat16) for heads in (4, 2))
    assert suits_cudnn(queries) and not suits_cudnn(jax.ShapeDtypeStruct((2, 768, 4, 128), jnp.float32))

    def loss(q, k, v):
        return attend_within(q, k, v, jnp.ones((2, 768), bool)).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(queries, keys, keys).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tpu_rotates_as_a_cpu_does(dtype):
    """It multiplies by a matrix of 0, 1 and -1 in place of splitting heads."""
    x, weights = jax.random.normal(jax.random.key(0), (2, 2, 24, 3, 128), dtype)
    tables = rotary_tables(jnp.tile(jnp.arange(24), (2, 1)), rotary_frequencies(128, 1e4))

    def rotated(x):
        y = rotate(x, tables)
        return (y * weights).astype(jnp.float32).sum(), y

    expected = jax.grad(rotated, has_aux=True)(x)
    with made_for("tpu"):
        found = jax.grad(rotated, has_aux=True)(x)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == x.dtype
        np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (one, other)), rtol=1e-6, atol=1e-6)
