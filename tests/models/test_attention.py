"""The TPU's attention kernel, interpreted, against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medplib_jax.experiment import MeshConfig
from medplib_jax.mesh import make_mesh
from medplib_jax.models import attention
from medplib_jax.models.attention import attend_within, splash_block
from medplib_jax.sharding import batch_sharding

LENGTHS = np.array([200, 131])
PADDED = np.arange(200) < LENGTHS[:, None]
PACKED = np.where(PADDED, 1 + (np.arange(200) >= 60) + (np.arange(200) >= 90), 0)  # three conversations in a row


def random_qkv(heads=4, kv_heads=2):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (2, 200, count, 128)) for key, count in zip(keys, (heads, kv_heads, kv_heads)))


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
    actual = value_and_gradients(lambda q, k, v: attention._splash(q, k, v, kernel_segments), q, k, v)
    for ours, theirs in zip(actual, expected):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_splash_attention_on_a_mesh():
    q, k, v = random_qkv()
    expected = attend_within(q, k, v, PADDED)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    placed = jax.device_put((q, k, v, PADDED.astype(np.int32)), batch_sharding(mesh))
    actual = jax.jit(attention._splash)(*placed)
    np.testing.assert_allclose(np.asarray(actual)[PADDED], np.asarray(expected)[PADDED], atol=2e-5)


def test_blocks_are_as_wide_as_the_length_allows():
    assert [splash_block(length) for length in (1, 128, 129, 1664, 2048)] == [128, 128, 256, 256, 512]
