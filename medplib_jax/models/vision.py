"""What the vision models share: convolutions as matrix products, and softmax attention.

Every convolution here has a stride or a size at which one large product over gathered pixels is faster on the CPU than
`lax.conv_general_dilated`, forward and backward, and no slower on an accelerator.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from medplib_jax.models.layers import Rngs, param
from medplib_jax.types import Array


class Conv(nnx.Module):
    """2-D convolution [..., h, w, in] -> [..., h', w', out], kernel [k, k, in, out] (PyTorch's is [out, in, k, k])."""

    def __init__(
        self, in_dim: int, out_dim: int, size: int, *, rngs: Rngs, stride: int = 1, padding: int = 0, bias: bool = True,
        axes: tuple[str | None, str | None] = (None, None),
    ):
        self.kernel = param(rngs, (size, size, in_dim, out_dim), (None, None, *axes), std=1 / math.sqrt(size * size * in_dim))
        self.bias = param(rngs, (out_dim,), (axes[1],)) if bias else None
        self.size, self.stride, self.padding = size, stride, padding

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].astype(x.dtype)
        y = _patches(x, self.size, self.stride, self.padding) @ kernel.reshape(-1, kernel.shape[-1])
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def _patches(x: Array, size: int, stride: int, padding: int) -> Array:
    """The pixels under each position of a size x size kernel: [..., h, w, c] -> [..., h', w', size * size * c]."""
    *lead, height, width, channels = x.shape
    if size == stride and not padding:  # patches do not overlap: only a transpose
        rows, columns = height // size, width // size
        tiles = x.reshape(*lead, rows, size, columns, size, channels)
        return jnp.swapaxes(tiles, -4, -3).reshape(*lead, rows, columns, size * size * channels)
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(padding, padding)] * 2 + [(0, 0)])
    rows, columns = ((side + 2 * padding - size) // stride + 1 for side in (height, width))
    shifted = [
        x[..., i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride, :]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(shifted, axis=-1)


class ConvTranspose(nnx.Module):
    """2-D transposed convolution [..., h, w, in] -> [..., s*h, s*w, out]: y[s*i - p + k] += x[i] @ kernel[k], with p = (size - s) / 2.

    kernel is [k, k, in, out]; PyTorch's `ConvTranspose2d` keeps [in, out, k, k]. The size is a multiple of the stride s.
    """

    def __init__(self, in_dim: int, out_dim: int, size: int, *, rngs: Rngs, stride: int, bias: bool = True):
        self.kernel = param(rngs, (size, size, in_dim, out_dim), (None, None, None, None), std=stride / (size * math.sqrt(in_dim)))
        self.bias = param(rngs, (out_dim,), (None,)) if bias else None
        self.size, self.stride = size, stride

    def __call__(self, x: Array) -> Array:
        *lead, height, width, in_dim = x.shape
        stride, overlap, margin = self.stride, self.size // self.stride, (self.size - self.stride) // 2
        kernel = self.kernel[...].astype(x.dtype).transpose(2, 0, 1, 3)
        out_dim = kernel.shape[-1]
        spread = (x @ kernel.reshape(in_dim, -1)).reshape(*lead, height, width, overlap, stride, overlap, stride, out_dim)
        y = 0
        for i in range(overlap):
            for j in range(overlap):  # each stride x stride part of the kernel tiles the output, shifted by whole strides
                part = spread[..., i, :, j, :, :].swapaxes(-4, -3).reshape(*lead, height * stride, width * stride, out_dim)
                y += _shift(_shift(part, i * stride - margin, -3), j * stride - margin, -2)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def _shift(x: Array, by: int, axis: int) -> Array:
    """x moved by `by` along an axis of unchanged length; zeros move in."""
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (by, -by, 0)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), widths)


def split_heads(x: Array, heads: int) -> Array:
    """[..., T, H*K] -> [..., H, T, K]."""
    return x.reshape(*x.shape[:-1], heads, -1).swapaxes(-3, -2)


def merge_heads(x: Array) -> Array:
    """[..., H, T, K] -> [..., T, H*K]."""
    x = x.swapaxes(-3, -2)
    return x.reshape(*x.shape[:-2], -1)


def softmax_attention(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T) v for q [..., T, K], k [..., S, K], v [..., S, V]; leading axes broadcast, softmax in float32.

    The caller scales q. `jax.nn.dot_product_attention` does not take a v narrower than k, nor broadcast leading axes.
    """
    scores = jnp.matmul(q, k.swapaxes(-2, -1), preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v
