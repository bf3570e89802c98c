"""SAM's mask decoder (Kirillov et al. 2023): prompt tokens and image attend to each other, then masks are read out."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from medplib_jax.batch import Array
from medplib_jax.config.model import MaskConfig
from medplib_jax.models.layers import LayerNorm, Linear, Mlp, Rngs, gelu, param
from medplib_jax.models.precision import einsum
from medplib_jax.models.vision.transformer import ConvTranspose, merge_heads, softmax_attention, split_heads

EPS = 1e-5
UPSCALE_EPS = 1e-6


class CrossAttention(nnx.Module):
    """Attention at width `inner`. Leading axes broadcast, so one image serves many prompts without copies."""

    def __init__(self, width: int, inner: int, heads: int, rngs: Rngs):
        self.q = Linear(width, inner, axes=("vision", "heads"), rngs=rngs)
        self.k = Linear(width, inner, axes=("vision", "heads"), rngs=rngs)
        self.v = Linear(width, inner, axes=("vision", "heads"), rngs=rngs)
        self.o = Linear(inner, width, axes=("heads", "vision"), rngs=rngs)
        self.heads, self.scale = heads, (inner // heads) ** -0.5

    def __call__(self, q: Array, k: Array, v: Array) -> Array:
        q, k, v = (split_heads(project(x), self.heads) for project, x in ((self.q, q), (self.k, k), (self.v, v)))
        return self.o(merge_heads(softmax_attention(q * self.scale, k, v)))


class TwoWayBlock(nnx.Module):
    def __init__(self, config: MaskConfig, rngs: Rngs):
        width, inner, heads = config.out_dim, config.out_dim // 2, config.decoder_heads
        self.self_attn = CrossAttention(width, width, heads, rngs)
        self.cross_token_to_image = CrossAttention(width, inner, heads, rngs)
        self.cross_image_to_token = CrossAttention(width, inner, heads, rngs)
        self.mlp = Mlp(width, config.decoder_mlp_dim, width, jax.nn.relu, axis="vision", rngs=rngs)
        self.norm1, self.norm2, self.norm3, self.norm4 = (LayerNorm(width, eps=EPS, rngs=rngs) for _ in range(4))

    def __call__(
        self, tokens: Array, image: Array, token_position: Array, image_position: Array, *, first: bool
    ) -> tuple[Array, Array]:
        """The first block's self-attention has no positions and no residual."""
        if first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            placed = tokens + token_position
            tokens = tokens + self.self_attn(placed, placed, tokens)
        tokens = self.norm1(tokens)
        placed_image = image + image_position
        tokens = self.norm2(tokens + self.cross_token_to_image(tokens + token_position, placed_image, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_image_to_token(placed_image, tokens + token_position, tokens))
        return tokens, image


class TwoWayTransformer(nnx.Module):
    def __init__(self, config: MaskConfig, rngs: Rngs):
        self.layers = nnx.List([TwoWayBlock(config, rngs) for _ in range(config.decoder_layers)])
        self.final_attn = CrossAttention(config.out_dim, config.out_dim // 2, config.decoder_heads, rngs)
        self.final_norm = LayerNorm(config.out_dim, eps=EPS, rngs=rngs)

    def __call__(self, tokens_BxMxQxC: Array, image: Array, image_position: Array) -> tuple[Array, Array]:
        """image [B, 1 or M, h*w, C], image_position [h*w, C] -> tokens [B, M, Q, C], image [B, M, h*w, C]."""
        tokens = tokens_BxMxQxC  # they are also their own positions
        for i, layer in enumerate(self.layers):
            tokens, image = layer(tokens, image, tokens_BxMxQxC, image_position, first=i == 0)
        attended = self.final_attn(tokens + tokens_BxMxQxC, image + image_position, image)
        return self.final_norm(tokens + attended), image


class Perceptron(nnx.Module):
    """Linear layers with ReLU between."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int, rngs: Rngs):
        widths = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        self.layers = nnx.List([Linear(a, b, axes=(None, None), rngs=rngs) for a, b in itertools.pairwise(widths)])

    def __call__(self, x: Array) -> Array:
        for layer in list(self.layers)[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class MaskDecoder(nnx.Module):
    def __init__(self, config: MaskConfig, rngs: Rngs):
        width, num_tokens = config.out_dim, config.num_multimask + 1
        self.iou_token = param(rngs, (width,), (None,), std=1.0)
        self.mask_tokens = param(rngs, (num_tokens, width), (None, None), std=1.0)
        self.transformer = TwoWayTransformer(config, rngs)
        self.upscale1 = ConvTranspose(width, width // 4, 2, stride=2, rngs=rngs)
        self.upscale_norm = LayerNorm(width // 4, eps=UPSCALE_EPS, rngs=rngs)
        self.upscale2 = ConvTranspose(width // 4, width // 8, 2, stride=2, rngs=rngs)
        self.hypernetworks = nnx.List([Perceptron(width, width, width // 8, 3, rngs) for _ in range(num_tokens)])
        self.iou_head = Perceptron(width, config.iou_head_dim, num_tokens, config.iou_head_layers, rngs)

    def __call__(
        self,
        embedding_BxhxwxC: Array,
        grid_position_hxwxC: Array,
        sparse_BxMxQxC: Array,
        dense: Array,
        *,
        multimask: bool = False,
    ) -> tuple[Array, Array]:
        """One mask per prompt: logits [B, M, 4h, 4w] and predicted IoU [B, M]. With `multimask` three, [B, M, 3, ...].

        `dense` [B or 1, h, w, C] (or broadcastable) is added to the image embedding. The embedding is shared by an
        image's M prompts until the first block lets the image attend to the tokens.
        """
        batch, height, width, dim = embedding_BxhxwxC.shape
        num_masks, dtype = sparse_BxMxQxC.shape[1], embedding_BxhxwxC.dtype
        own = jnp.concatenate([self.iou_token[...][None], self.mask_tokens[...]]).astype(dtype)
        own = jnp.broadcast_to(own, (batch, num_masks, *own.shape))
        tokens = jnp.concatenate([own, sparse_BxMxQxC.astype(dtype)], axis=2)
        image = (embedding_BxhxwxC + dense.astype(dtype)).reshape(batch, 1, height * width, dim)
        tokens, image = self.transformer(tokens, image, grid_position_hxwxC.reshape(-1, dim).astype(dtype))

        image = image.reshape(batch, num_masks, height, width, dim)
        upscaled = gelu(self.upscale2(gelu(self.upscale_norm(self.upscale1(image)))))
        picked = range(1, len(self.hypernetworks)) if multimask else range(1)
        filters = jnp.stack([self.hypernetworks[i](tokens[:, :, 1 + i]) for i in picked], axis=2)
        masks = einsum("bmtc,bmhwc->bmthw", filters, upscaled)
        iou = self.iou_head(tokens[:, :, 0])[:, :, picked.start : picked.stop]
        return (masks, iou) if multimask else (masks[:, :, 0], iou[:, :, 0])
