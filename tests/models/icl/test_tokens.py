"""The modules that read examples against PyTorch's with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional

from medplib_jax.config.model import IclConfig
from medplib_jax.models.icl.tokens import ExampleReader, MaskEncoder, TokenCompressor, pool
from medplib_jax.models.layers import params_of

WIDTH = 12


def torch_of(array):
    return torch.from_numpy(np.array(array))


def norm_of(x, norm):
    return functional.layer_norm(x, (WIDTH,), torch_of(norm.scale[...]), torch_of(norm.bias[...]))


def linear_of(x, linear):
    return functional.linear(x, torch_of(linear.kernel[...]).T, torch_of(linear.bias[...]))


def pooled(x, count):
    return functional.adaptive_avg_pool1d(x.transpose(1, 2), count).transpose(1, 2)


def randomised(module):
    """The module with no parameter at its initial constant."""
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(module)
    state = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), state)
    return nnx.merge(graphdef, state)


@pytest.mark.parametrize(("size", "count"), [(576, 256), (441, 64), (16, 7), (7, 7), (4, 9)])
def test_shares_are_averaged_as_pytorch_does(size, count):
    x = np.random.default_rng(1).standard_normal((2, size, WIDTH), np.float32)
    np.testing.assert_allclose(pool(jnp.asarray(x), count), pooled(torch.from_numpy(x), count), atol=2e-6)


def test_the_compressor_equals_pytorchs():
    module = randomised(TokenCompressor(WIDTH, 5, nnx.Rngs(0)))
    x = np.random.default_rng(2).standard_normal((3, 16, WIDTH), np.float32)
    expected = linear_of(norm_of(pooled(torch.from_numpy(x), 5), module.norm), module.proj)
    np.testing.assert_allclose(module(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_the_mask_encoder_equals_pytorchs():
    module = MaskEncoder(WIDTH, 6, nnx.Rngs(0))
    masks = (np.random.default_rng(3).random((2, 336, 336)) < 0.3).astype(np.uint8)
    x = torch.from_numpy(masks).float()[:, None]
    for conv in (module.conv1, module.conv2, module.conv3, module.conv4):
        kernel = torch_of(conv.kernel[...]).permute(3, 2, 0, 1)
        x = functional.gelu(functional.conv2d(x, kernel, torch_of(conv.bias[...]), stride=2, padding=1))
    assert x.shape[2:] == (21, 21)
    expected = norm_of(linear_of(pooled(x.flatten(2).transpose(1, 2), 6), module.proj), module.norm)
    np.testing.assert_allclose(module(jnp.asarray(masks), jnp.float32), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (IclConfig(compressed_tokens=5), {"compressor"}),
        (IclConfig("separate", mask_tokens=6), {"mask_encoder"}),
        (IclConfig("separate", 5, 6), {"compressor", "mask_encoder"}),
    ],
)
def test_a_model_has_the_modules_that_its_config_names(config, parts):
    assert set(params_of(ExampleReader(config, WIDTH, nnx.Rngs(0)))) == parts


def test_an_encoder_for_masks_that_are_painted_is_refused():
    with pytest.raises(ValueError, match="icl.mask_tokens 6: an encoder reads masks that are shown 'separate'"):
        IclConfig("overlay", mask_tokens=6)
