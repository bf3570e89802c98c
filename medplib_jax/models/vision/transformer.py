"""What the vision models share: convolutions and softmax attention."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
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
    """2-D transposed convolution [..., h, w, in] -> [..., s*h, s*w, out].

    y[s*i - p + k] += x[i] @ kernel[k], with p = (size - s) / 2.
    kernel is [k, k, in, out]; PyTorch's `ConvTranspose2d` keeps [in, out, k, k]. The size is a multiple of the stride
    s. Each input pixel yields an s x s tile of outputs from `size / s` neighbours, so this is a plain convolution of
    stride 1 with s * s times the channels, whose gradients XLA computes ten times faster on the CPU than those of a
    dilated one.
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
        kernel = rearrange(
            self.kernel[...].astype(x.dtype), "(t s) (u r) i o -> t s u r i o", t=taps, s=stride, u=taps, r=stride
        )
        kernel = rearrange(jnp.flip(kernel, (0, 2)), "t s u r i o -> t u i (s r o)")
        y = rearrange(_convolve(x, kernel, 1, taps - 1), "... h w (s r o) -> ... (h s) (w r) o", s=stride, r=stride)
        margin = (size - stride) // 2
        y = y[..., margin : y.shape[-3] - margin, margin : y.shape[-2] - margin, :]
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def _convolve(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """x [..., h, w, in] with kernel [k, k, in, out]. Patches that do not overlap are a reshape and one product.

    The padding is an operation of its own: given to the convolution, XLA computes the kernel's gradient ten times
    slower on the CPU.
    """
    *lead, height, width, channels = x.shape
    size = kernel.shape[0]
    if size == stride and not padding:
        tiles = rearrange(x, "... (h s) (w r) c -> ... h w (s r c)", s=size, r=size)
        return product(tiles, rearrange(kernel, "s r c o -> (s r c) o"))
    x = jnp.pad(x.reshape(-1, height, width, channels), [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision_of(x)
    )
    return y.reshape(*lead, *y.shape[1:])


def split_heads(x: Array, heads: int) -> Array:
    """[..., T, H*K] -> [..., H, T, K]."""
    return rearrange(x, "... T (H K) -> ... H T K", H=heads)


def merge_heads(x: Array) -> Array:
    """[..., H, T, K] -> [..., T, H*K]."""
    return rearrange(x, "... H T K -> ... T (H K)")


def softmax_attention(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T) v for q [..., T, K], k [..., S, K], v [..., S, V]; leading axes broadcast, softmax in float32.

    The caller scales q. `jax.nn.dot_product_attention` does not take a v narrower than k, nor broadcast leading axes.
    """
    scores = product(q, k.swapaxes(-2, -1), jnp.float32)
    return softmax_average(scores, v)
