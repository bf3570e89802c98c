"""What the vision models share: convolutions and softmax attention."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from medplib_jax.batch import Array
from medplib_jax.models.layers import Rngs, param, softmax_average
from medplib_jax.models.precision import precision_of, product


class Conv(nnx.Module):
    """2-D convolution [..., h, w, in] -> [..., h', w', out], kernel [k, k, in, out] (PyTorch's is [out, in, k, k])."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        size: int,
        *,
        rngs: Rngs,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        axes: tuple[str | None, str | None] = (None, None),
        gain: float = 1.0,
    ):
        self.kernel = param(
            rngs, (size, size, in_dim, out_dim), (None, None, *axes), std=gain / math.sqrt(size * size * in_dim)
        )
        self.bias = param(rngs, (out_dim,), (axes[1],)) if bias else None
        self.stride, self.padding = stride, padding

    def __call__(self, x: Array) -> Array:
        y = _convolve(x, self.kernel[...].astype(x.dtype), self.stride, self.padding)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class ConvTranspose(nnx.Module):
    """2-D transposed convolution [..., h, w, in] -> [..., s*h, s*w, out]: y[s*i - p + k] += x[i] @ kernel[k], with p = (size - s) / 2.

    kernel is [k, k, in, out]; PyTorch's `ConvTranspose2d` keeps [in, out, k, k]. The size is a multiple of the stride s.
    Each input pixel yields an s x s tile of outputs from `size / s` neighbours, so this is a plain convolution of stride 1 with s * s
    times the channels, whose gradients XLA computes ten times faster on the CPU than those of a dilated one.
    """

    def __init__(self, in_dim: int, out_dim: int, size: int, *, rngs: Rngs, stride: int, bias: bool = True):
        self.kernel = param(
            rngs, (size, size, in_dim, out_dim), (None, None, None, None), std=stride / (size * math.sqrt(in_dim))
        )
        self.bias = param(rngs, (out_dim,), (None,)) if bias else None
        self.stride = stride

    def __call__(self, x: Array) -> Array:
        size, _, in_dim, out_dim = self.kernel.shape
        stride, taps = self.stride, size // self.stride
        kernel = self.kernel[...].astype(x.dtype).reshape(taps, stride, taps, stride, in_dim, out_dim)
        kernel = jnp.flip(kernel, (0, 2)).transpose(0, 2, 4, 1, 3, 5).reshape(taps, taps, in_dim, -1)
        y = _convolve(x, kernel, 1, taps - 1)
        *lead, rows, columns, _ = y.shape
        y = y.reshape(*lead, rows, columns, stride, stride, out_dim).swapaxes(-4, -3)
        y = y.reshape(*lead, rows * stride, columns * stride, out_dim)
        margin = (size - stride) // 2
        y = y[..., margin : rows * stride - margin, margin : columns * stride - margin, :]
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def _convolve(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """x [..., h, w, in] with kernel [k, k, in, out]. Patches that do not overlap are a reshape and one product.

    The padding is an operation of its own: given to the convolution, XLA computes the kernel's gradient ten times slower on the CPU.
    """
    *lead, height, width, channels = x.shape
    size, out_dim = kernel.shape[0], kernel.shape[-1]
    if size == stride and not padding:
        tiles = x.reshape(*lead, height // size, size, width // size, size, channels).swapaxes(-4, -3)
        return product(tiles.reshape(*lead, height // size, width // size, -1), kernel.reshape(-1, out_dim))
    x = jnp.pad(x.reshape(-1, height, width, channels), [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision_of(x)
    )
    return y.reshape(*lead, *y.shape[1:])


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
    scores = product(q, k.swapaxes(-2, -1), jnp.float32)
    return softmax_average(scores, v)
