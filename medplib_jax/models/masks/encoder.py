"""SAM-Med2D's image encoder (Cheng et al. 2023): a ViTDet with windows, relative positions and adapters."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from medplib_jax.batch import Array
from medplib_jax.config.model import MaskConfig
from medplib_jax.models.layers import LayerNorm, Linear, Mlp, Rngs, gelu, matmul, param, scan_plan
from medplib_jax.models.precision import einsum, product
from medplib_jax.models.target import target_device
from medplib_jax.models.vision.transformer import Conv, ConvTranspose, softmax_attention

EPS = 1e-6
ADAPTER_EPS = 1e-5  # the adapter alone keeps PyTorch's default


class WindowAttention(nnx.Module):
    """Self-attention within windows; a window as large as the grid makes it global.

    Windows at the lower and right edge reach beyond the grid. As in the original the cells out there take part as keys
    (they are zero, so their projection is the bias); their queries would be thrown away and are not computed. Relative
    positions (decomposed in rows and columns) ride in the product of queries and keys: the query's row and column terms
    are appended to q, one-hot coordinates to k.
    """

    def __init__(self, width: int, heads: int, window: int, rngs: Rngs):
        self.qkv = Linear(width, 3 * width, axes=("vision", None), rngs=rngs)
        self.proj = Linear(width, width, axes=(None, "vision"), rngs=rngs)
        self.rel_pos_h = param(rngs, (2 * window - 1, width // heads), (None, None), std=0.02)
        self.rel_pos_w = param(rngs, (2 * window - 1, width // heads), (None, None), std=0.02)
        self.heads, self.window = heads, window

    def __call__(self, x_BxhxwxC: Array) -> Array:
        q, k, v = self._project(x_BxhxwxC)
        strips = []
        for rows, tile_h in _tilings(q.shape[2], self.window):
            strip = []
            for columns, tile_w in _tilings(q.shape[3], self.window):
                tiles = _tiles(q[:, :, rows, columns], tile_h, tile_w)
                whole = _whole(rows, self.window), _whole(columns, self.window)
                keys, values = (_tiles(x[:, :, *whole], self.window, self.window) for x in (k, v))
                strip.append(
                    _untile(softmax_attention(tiles, keys, values), tile_h, tile_w, q[:, :, rows, columns].shape)
                )
            strips.append(jnp.concatenate(strip, axis=2))
        return self.proj(jnp.concatenate(strips, axis=1))

    def _project(self, x_BxhxwxC: Array) -> tuple[Array, Array, Array]:
        """q [B, H, h, w, K + 2 window], scaled and extended. On whole windows k, as wide, and v [B, H, h', w', K]."""
        batch, height, width, _ = x_BxhxwxC.shape
        dtype, window = x_BxhxwxC.dtype, self.window
        beyond = [(0, 0), (0, -height % window), (0, -width % window), (0, 0)]
        qkv = jnp.pad(matmul(x_BxhxwxC, self.qkv.kernel[...]), beyond) + self.qkv.bias[...].astype(dtype)
        q, k, v = rearrange(qkv, "B h w (three H K) -> three B H h w K", three=3, H=self.heads)
        q = q[:, :, :height, :width]
        row_terms = einsum("bHijk,iak->bHija", q, _relative(self.rel_pos_h[...], height, window).astype(dtype))
        column_terms = einsum("bHijk,jak->bHija", q, _relative(self.rel_pos_w[...], width, window).astype(dtype))
        q = jnp.concatenate([q * q.shape[-1] ** -0.5, row_terms, column_terms], axis=-1)
        coordinates = jnp.broadcast_to(
            _one_hot_coordinates(*k.shape[2:4], window).astype(dtype), (*k.shape[:-1], 2 * window)
        )
        return q, jnp.concatenate([k, coordinates], axis=-1), v


def _relative(table: Array, cells: int, window: int) -> Array:
    """Per cell and key of its window the table's row for their offset, [cells, window, K].

    It is a product, so that its gradient needs no scatter.
    """
    offset = (np.arange(cells) % window)[:, None] - np.arange(window) + window - 1
    return product(np.eye(len(table), dtype=np.float32)[offset], table)


def _one_hot_coordinates(height: int, width: int, window: int) -> Array:
    """[height, width, 2 * window]: one-hot row, then one-hot column of every cell within its window."""
    rows, columns = (np.eye(window, dtype=np.float32)[np.arange(size) % window] for size in (height, width))
    shape = (height, width, window)
    return jnp.concatenate([jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns, shape)], axis=-1)


def _tilings(size: int, window: int) -> list[tuple[slice, int]]:
    """An axis as whole windows, then the rest: (slice, length of a tile in it)."""
    whole = size // window * window
    return [
        (slice(start, stop), tile)
        for start, stop, tile in ((0, whole, window), (whole, size, size - whole))
        if start < stop
    ]


def _whole(part: slice, window: int) -> slice:
    """The slice, on to the end of its last window."""
    return slice(part.start, part.stop + (part.start - part.stop) % window)


def _tiles(x: Array, tile_h: int, tile_w: int) -> Array:
    """[B, H, h, w, K] -> [B * tiles, H, tile_h * tile_w, K]."""
    return rearrange(x, "B H (h i) (w j) K -> (B h w) H (i j) K", i=tile_h, j=tile_w)


def _untile(x: Array, tile_h: int, tile_w: int, shape: tuple[int, ...]) -> Array:
    """[B * tiles, H, tile_h * tile_w, K] -> [B, h, w, H * K]: `_tiles` undone, heads joined. shape: (B, H, h, w)."""
    tiles = {"h": shape[2] // tile_h, "w": shape[3] // tile_w}
    return rearrange(x, "(B h w) H (i j) K -> B (h i) (w j) (H K)", **tiles, i=tile_h, j=tile_w)


class Adapter(nnx.Module):
    """SAM-Med2D's adapter: channel attention, then a convolution down and up again, residual, norm."""

    def __init__(self, width: int, rngs: Rngs):
        self.channel1 = Linear(width, width // 4, axes=("vision", None), bias=False, rngs=rngs)
        self.channel2 = Linear(width // 4, width, axes=(None, "vision"), bias=False, rngs=rngs)
        self.spatial1 = Conv(width, width, 3, stride=2, padding=1, bias=False, axes=("vision", None), rngs=rngs)
        self.spatial2 = ConvTranspose(width, width, 4, stride=2, bias=False, rngs=rngs)
        self.norm = LayerNorm(width, eps=ADAPTER_EPS, rngs=rngs)

    def __call__(self, x_BxhxwxC: Array) -> Array:
        pooled = x_BxhxwxC.mean((1, 2), keepdims=True)
        channel = jax.nn.sigmoid(self.channel2(jax.nn.relu(self.channel1(pooled)))) * x_BxhxwxC
        spatial = jax.nn.relu(self.spatial2(jax.nn.relu(self.spatial1(channel))))
        return self.norm(x_BxhxwxC + spatial)


class Block(nnx.Module):
    def __init__(self, config: MaskConfig, window: int, rngs: Rngs):
        width = config.hidden_size
        self.norm1 = LayerNorm(width, eps=EPS, rngs=rngs)
        self.attn = WindowAttention(width, config.num_heads, window, rngs)
        self.norm2 = LayerNorm(width, eps=EPS, rngs=rngs)
        self.mlp = Mlp(width, 4 * width, width, gelu, axis="vision", rngs=rngs)
        self.adapter = Adapter(width, rngs) if config.adapter else None

    def __call__(self, x_BxhxwxC: Array) -> Array:
        x = x_BxhxwxC + self.attn(self.norm1(x_BxhxwxC))
        normed = self.norm2(x)
        x = x + self.mlp(normed)
        return x if self.adapter is None else x + self.adapter(normed)


class Neck(nnx.Module):
    """To the width of the mask decoder."""

    def __init__(self, in_dim: int, out_dim: int, rngs: Rngs):
        self.conv1 = Conv(in_dim, out_dim, 1, bias=False, axes=("vision", None), rngs=rngs)
        self.norm1 = LayerNorm(out_dim, eps=EPS, rngs=rngs)
        self.conv2 = Conv(out_dim, out_dim, 3, padding=1, bias=False, rngs=rngs)
        self.norm2 = LayerNorm(out_dim, eps=EPS, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))))


class ImageEncoder(nnx.Module):
    def __init__(self, config: MaskConfig, rngs: Rngs):
        width, patch = config.hidden_size, config.patch_size
        self.patch_embed = Conv(3, width, patch, stride=patch, axes=(None, "vision"), rngs=rngs)
        self.position_embed = param(rngs, (config.grid, config.grid, width), (None, None, "vision"), std=0.02)
        windows = [config.grid if i in config.global_layers else config.window_size for i in range(config.num_layers)]
        self.blocks = nnx.List([Block(config, window, rngs) for window in windows])
        self.neck = Neck(width, config.out_dim, rngs)

    def __call__(self, pixels_BxIxIx3: Array) -> tuple[Array, dict]:
        """Normalised pixels -> embedding_BxhxwxC (h = I / patch) in the pixels' dtype.

        `out` has 'embedded' (before the first block) and 'blocks' (each block's output).
        """
        embedded = self.patch_embed(pixels_BxIxIx3)
        embedded = embedded + self.position_embed[...].astype(embedded.dtype)
        x, blocks = embedded, []
        for start, period, repeats in scan_plan([block.attn.window for block in self.blocks]):
            x, outputs = _run_blocks(self.blocks[start : start + period * repeats], period, x)
            blocks += outputs
        return self.neck(x), {"embedded": embedded, "blocks": blocks}


def _run_blocks(blocks: Sequence[Block], period: int, x: Array) -> tuple[Array, list[Array]]:
    """(the last block's output, every block's). Blocks that repeat often become a scan: unrolled they are three
    quarters of the whole model's program, and a TPU's compiler takes minutes for them. But a CPU multiplies float32
    only, and would widen the narrower kernels of all blocks before a scan begins."""
    kernel = blocks[0].mlp.fc1.kernel[...]
    widened = kernel.dtype.itemsize < 4 and target_device(x).platform == "cpu"
    if widened or len(blocks) < 3 * period:
        outputs = []
        for block in blocks:
            x = block(x)
            outputs.append(x)
        return x, outputs
    graphdefs = [nnx.split(block)[0] for block in blocks[:period]]
    states = [nnx.split(block)[1] for block in blocks]
    stacked = [jax.tree.map(lambda *rows: jnp.stack(rows), *states[j::period]) for j in range(period)]

    def step(x, states):
        outputs = []
        for graphdef, state in zip(graphdefs, states, strict=True):
            x = nnx.merge(graphdef, state)(x)
            outputs.append(x)
        return x, outputs

    x, outputs = jax.lax.scan(step, x, stacked)
    return x, [outputs[i % period][i // period] for i in range(len(blocks))]
