"""Fewer tokens for examples: pictures pooled along their patches, masks through a small encoder of their own.

After MedPLIB-ICL's `TokenCompressor` and `MaskTokenEncoder`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from medplib_jax.batch import Array
from medplib_jax.config.model import IclConfig
from medplib_jax.models.layers import LayerNorm, Linear, Rngs, gelu
from medplib_jax.models.precision import einsum
from medplib_jax.models.vision.transformer import Conv

MASK_CHANNELS = (64, 128, 256, 256)  # of its convolutions, each of which halves the side
EPS = 1e-5


def pooling_weights(size: int, count: int) -> np.ndarray:
    """float32 [count, size]: each row averages its share of a sequence, as PyTorch's `AdaptiveAvgPool1d`.

    Share i is [floor(i * size / count), ceil((i + 1) * size / count)), so that neighbours may overlap.
    """
    index, places = np.arange(count)[:, None], np.arange(size)
    first, end = index * size // count, -(-(index + 1) * size // count)
    return ((places >= first) & (places < end)) / (end - first).astype(np.float32)


def pool(x_BxPxD: Array, count: int) -> Array:
    """Means of `count` consecutive shares of the P positions, [B, count, D]; averaged in float32."""
    weights = pooling_weights(x_BxPxD.shape[1], count)
    return einsum("tp,bpd->btd", weights, x_BxPxD.astype(jnp.float32)).astype(x_BxPxD.dtype)


class TokenCompressor(nnx.Module):
    """A picture's projected patches [B, P, D] to fewer tokens [B, count, D]: pooled in row order, normed, projected."""

    def __init__(self, width: int, count: int, rngs: Rngs):
        self.norm = LayerNorm(width, eps=EPS, rngs=rngs)
        self.proj = Linear(width, width, axes=("embed", None), rngs=rngs)
        self.count = count

    def __call__(self, x_BxPxD: Array) -> Array:
        return self.proj(self.norm(pool(x_BxPxD, self.count)))


class MaskEncoder(nnx.Module):
    """Masks 0/1 [B, 336, 336] to tokens [B, count, D]: four convolutions of stride 2, pooled in row order."""

    def __init__(self, width: int, count: int, rngs: Rngs):
        one, two, three, four = MASK_CHANNELS
        self.conv1 = Conv(1, one, 3, stride=2, padding=1, rngs=rngs)
        self.conv2 = Conv(one, two, 3, stride=2, padding=1, rngs=rngs)
        self.conv3 = Conv(two, three, 3, stride=2, padding=1, rngs=rngs)
        self.conv4 = Conv(three, four, 3, stride=2, padding=1, rngs=rngs)
        self.proj = Linear(four, width, axes=("vision", "embed"), rngs=rngs)
        self.norm = LayerNorm(width, eps=EPS, rngs=rngs)
        self.count = count

    def __call__(self, masks_BxIxI: Array, dtype) -> Array:
        # The TPU compiler (libtpu 0.0.42) dies of the first kernel's gradient when it sees through the conversion.
        x = jax.lax.optimization_barrier(masks_BxIxI[..., None].astype(dtype))
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = gelu(conv(x))
        return self.norm(self.proj(pool(rearrange(x, "B h w C -> B (h w) C"), self.count)))


class ExampleReader(nnx.Module):
    """The modules that `IclConfig` asks for; the other one is None."""

    def __init__(self, config: IclConfig, width: int, rngs: Rngs):
        self.compressor = TokenCompressor(width, config.compressed_tokens, rngs) if config.compressed_tokens else None
        self.mask_encoder = MaskEncoder(width, config.mask_tokens, rngs) if config.mask_tokens else None
