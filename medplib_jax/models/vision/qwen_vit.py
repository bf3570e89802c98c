"""Qwen-VL's vision tower and resampler (Qwen-VL-Chat's visual.py):

Pixels to a fixed number of vectors as wide as the decoder.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from medplib_jax.batch import Array
from medplib_jax.config.model import QwenVisionConfig
from medplib_jax.models.layers import (
    Identity,
    LayerNorm,
    Linear,
    Mlp,
    Rngs,
    gelu,
    layer_at,
    param,
    scan_layers,
    stack_layers,
)
from medplib_jax.models.remat import remat
from medplib_jax.models.vision.transformer import Conv, merge_heads, softmax_attention, split_heads

EPS = 1e-6  # of every layer norm of the visual part
BICUBIC = -0.75  # the cubic's coefficient in PyTorch's interpolate

# Initial values for a tower that starts from nothing, as CLIP's here.
RESIDUAL_GAIN, PIXEL_GAIN = 0.1, 0.3
# Sines and cosines of neighbours differ little: without it a new resampler averages the whole picture for every query.
OWN_PLACE_GAIN = 24.0


class QwenVit(nnx.Module):
    """The ViT without class token: all patches' states after the last block, which no norm follows."""

    def __init__(self, config: QwenVisionConfig, remat_name: str, rngs: Rngs):
        width, patch = config.hidden_size, config.patch_size
        self.patch_embed = Conv(
            3, width, patch, stride=patch, bias=False, axes=(None, "vision"), gain=PIXEL_GAIN, rngs=rngs
        )
        self.position_embed = param(
            rngs, (config.position_grid**2, width), (None, "vision"), value=SinCos(config.position_grid, width)
        )
        self.pre_norm = LayerNorm(width, eps=EPS, rngs=rngs)
        self.layers = stack_layers(lambda layer_rngs: VitBlock(config, layer_rngs), config.num_layers, rngs)
        self.config, self.remat_name = config, remat_name

    def __call__(self, pixels_BxIxIx3: Array) -> tuple[Array, dict[str, Any]]:
        """Normalised pixels (any leading axis) -> [B, P, C] in the pixels' dtype, P = (I / patch)^2, row by row."""
        patches_BxhxwxC = self.patch_embed(pixels_BxIxIx3)
        positions_PxC = resize_table(self.position_embed[...], self.config.grid)
        x = rearrange(patches_BxhxwxC, "b h w c -> b (h w) c") + positions_PxC.astype(patches_BxhxwxC.dtype)
        first = self.pre_norm(x)
        x, _ = scan_layers(self.layers, lambda layer, x, _: (layer(x), None), first, wrap=remat(self.remat_name))
        return x, {"patches": patches_BxhxwxC, "pre_norm": first, "positions": positions_PxC}


class VitBlock(nnx.Module):
    def __init__(self, config: QwenVisionConfig, rngs: Rngs):
        width = config.hidden_size
        self.norm1 = LayerNorm(width, eps=EPS, rngs=rngs)
        self.attn = VitAttention(width, config.num_heads, rngs)
        self.norm2 = LayerNorm(width, eps=EPS, rngs=rngs)
        self.mlp = Mlp(width, config.mlp_dim, width, gelu, axis="vision", out_gain=RESIDUAL_GAIN, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VitAttention(nnx.Module):
    """Self-attention of all patches.

    One projection yields query, key and value of each head side by side, [head][q | k | v][width].
    """

    def __init__(self, width: int, heads: int, rngs: Rngs):
        self.qkv = Linear(width, 3 * width, axes=("vision", "heads"), rngs=rngs)
        self.o = Linear(width, width, axes=("heads", "vision"), gain=RESIDUAL_GAIN, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Array) -> Array:
        q, k, v = rearrange(self.qkv(x), "b p (h c k) -> c b h p k", h=self.heads, c=3)
        return self.o(merge_heads(softmax_attention(q / math.sqrt(q.shape[-1]), k, v)))


class Resampler(nnx.Module):
    """One cross-attention from learned queries to the patches; both have 2-D positions, the values none.

    `positions` lie on the queries' grid, and are interpolated to the patches'. `qkv` are three projections [3, D, D].
    """

    def __init__(self, config: QwenVisionConfig, width: int, rngs: Rngs):
        self.query = param(rngs, (config.num_queries, width), (None, "vision"), std=0.02)
        positions = SinCos(config.query_grid, width, gain=OWN_PLACE_GAIN)
        self.position_embed = param(rngs, (config.num_queries, width), (None, "vision"), value=positions)
        self.kv = (
            None
            if config.hidden_size == width
            else Linear(config.hidden_size, width, axes=("vision", "vision_out"), bias=False, rngs=rngs)
        )
        self.norm_q, self.norm_kv = (LayerNorm(width, eps=EPS, rngs=rngs) for _ in range(2))
        own_place = Identity(width)  # from nothing, a query begins with the patches at its own place
        self.qkv = stack_layers(
            lambda r: Linear(width, width, axes=("vision", "heads"), initial=own_place, rngs=r), 3, rngs
        )
        self.o = Linear(width, width, axes=("heads", "vision"), rngs=rngs)
        self.heads, self.grid = width // config.resampler_head_dim, config.grid

    def __call__(self, patches_BxPxC: Array) -> tuple[Array, dict[str, Any]]:
        """[B, P, C] -> [B, Q, D]; `out` has what enters the attention."""
        value_BxPxD = patches_BxPxC if self.kv is None else self.kv(patches_BxPxC)
        projected, value_BxPxD = value_BxPxD, self.norm_kv(value_BxPxD)
        dtype = value_BxPxD.dtype
        key_positions_PxD = resize_table(self.position_embed[...], self.grid).astype(dtype)
        query_QxD = (self.norm_q(self.query[...]) + self.position_embed[...]).astype(dtype)
        key_BxPxD = value_BxPxD + key_positions_PxD
        q, k, v = (
            split_heads(layer_at(self.qkv, i)(x), self.heads) for i, x in enumerate((query_QxD, key_BxPxD, value_BxPxD))
        )
        y_BxQxD = self.o(merge_heads(softmax_attention(q / math.sqrt(q.shape[-1]), k, v)))
        return y_BxQxD, {"kv": projected, "query": query_QxD, "key": key_BxPxD, "value": value_BxPxD, "pooled": y_BxQxD}


@dataclasses.dataclass(frozen=True)
class SinCos:
    """Initial positions, float32 [grid^2, D]:

    Half of the channels tell the column, half the row; of each half the first half are sines and the rest cosines of
    position * 10000^(-i / (D / 4)). `gain` is a factor on all.
    """

    grid: int
    dim: int
    gain: float = 1.0

    def __call__(self) -> np.ndarray:
        frequencies = 10000.0 ** (-np.arange(self.dim // 4) / (self.dim / 4))
        angles = np.arange(self.grid)[:, None] * frequencies
        axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        rows, columns = np.repeat(axis, self.grid, axis=0), np.tile(axis, (self.grid, 1))
        return (self.gain * np.concatenate([columns, rows], axis=1)).astype(np.float32)


def resize_table(table_SxC: Array, grid: int) -> Array:
    """A square table of positions [s*s, C] at a grid of another side, float32 [grid*grid, C]:

    PyTorch's bicubic `interpolate` without antialiasing (align_corners False).
    """
    side = math.isqrt(len(table_SxC))
    table = table_SxC.astype(jnp.float32)
    if side == grid:
        return table
    weights = bicubic_weights(side, grid)
    table = rearrange(table, "(h w) c -> h w c", h=side)
    resized = jnp.einsum("yh,xw,hwc->yxc", weights, weights, table, precision=jax.lax.Precision.HIGHEST)
    return rearrange(resized, "y x c -> (y x) c")


def bicubic_weights(from_size: int, to_size: int) -> np.ndarray:
    """float32 [to, from]: how much of each sample an interpolated one takes, half-pixel centres, borders repeated."""
    centres = (np.arange(to_size) + 0.5) * from_size / to_size - 0.5
    first = np.floor(centres).astype(int)
    weights = np.zeros((to_size, from_size))
    for tap in range(-1, 3):
        place = np.clip(first + tap, 0, from_size - 1)
        np.add.at(weights, (np.arange(to_size), place), _cubic(np.abs(centres - first - tap)))
    return weights.astype(np.float32)


def _cubic(distance: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981) at distances below 2."""
    a, d = BICUBIC, distance
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    return np.where(d <= 1, near, a * (d**3 - 5 * d**2 + 8 * d - 4))
