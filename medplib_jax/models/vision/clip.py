"""CLIP's vision tower: pixels to patch features (Radford et al. 2021), those of hidden_states[-2] in the original."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from medplib_jax.batch import Array
from medplib_jax.config.model import ClipConfig
from medplib_jax.models.layers import LayerNorm, Linear, Mlp, Rngs, param, quick_gelu, scan_layers, stack_layers
from medplib_jax.models.vision.transformer import Conv, merge_heads, softmax_attention, split_heads

# Initial values for a tower that starts from nothing: patches first keep to themselves, attention looks at few of them,
# and a patch's place counts as much as its pixels. With all of these it learns what is visible from a third of the
# images.
RESIDUAL_GAIN, QUERY_GAIN, PIXEL_GAIN = 0.1, 2.0, 0.3

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def normalise_clip(pixels: Array) -> Array:
    """uint8 pixels [..., 3] -> float32 (x / 255 - mean) / std, CLIPImageProcessor's rescale and normalise."""
    return (pixels.astype(jnp.float32) / 255 - np.float32(MEAN)) / np.float32(STD)


class ClipAttention(nnx.Module):
    def __init__(self, config: ClipConfig, rngs: Rngs):
        width = config.hidden_size
        self.q = Linear(width, width, axes=("vision", "heads"), gain=QUERY_GAIN, rngs=rngs)
        self.k = Linear(width, width, axes=("vision", "heads"), gain=QUERY_GAIN, rngs=rngs)
        self.v = Linear(width, width, axes=("vision", "heads"), rngs=rngs)
        self.o = Linear(width, width, axes=("heads", "vision"), gain=RESIDUAL_GAIN, rngs=rngs)
        self.heads = config.num_heads
        self.scale = (width // config.num_heads) ** -0.5

    def __call__(self, x: Array) -> Array:
        q, k, v = (split_heads(projection(x), self.heads) for projection in (self.q, self.k, self.v))
        return self.o(merge_heads(softmax_attention(q * self.scale, k, v)))


class ClipLayer(nnx.Module):
    def __init__(self, config: ClipConfig, rngs: Rngs):
        self.norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, rngs=rngs)
        self.attn = ClipAttention(config, rngs)
        self.norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, rngs=rngs)
        self.mlp = Mlp(
            config.hidden_size,
            config.mlp_dim,
            config.hidden_size,
            quick_gelu,
            axis="vision",
            out_gain=RESIDUAL_GAIN,
            rngs=rngs,
        )

    def __call__(self, x: Array) -> Array:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ClipVisionTower(nnx.Module):
    """All layers are kept; only those up to `select_layer` are computed. `post_norm` is kept for conversion alone."""

    def __init__(self, config: ClipConfig, rngs: Rngs):
        width, patch = config.hidden_size, config.patch_size
        self.patch_embed = Conv(
            3, width, patch, stride=patch, bias=False, axes=(None, "vision"), gain=PIXEL_GAIN, rngs=rngs
        )
        self.class_embed = param(rngs, (width,), ("vision",), std=width**-0.5)
        # As large as the patches' embeddings: pre_norm removes each patch's scale, and with it a small position and the
        # brightness.
        self.position_embed = param(rngs, (1 + config.num_patches, width), (None, "vision"), std=0.5)
        self.pre_norm = LayerNorm(width, eps=config.layer_norm_eps, rngs=rngs)
        self.post_norm = LayerNorm(width, eps=config.layer_norm_eps, rngs=rngs)
        self.layers = stack_layers(lambda layer_rngs: ClipLayer(config, layer_rngs), config.num_layers, rngs)
        self.config = config

    def __call__(self, pixels_BxIxIx3: Array) -> tuple[Array, dict]:
        """Normalised pixels (any leading axis) -> features_BxPxC in the pixels' dtype, P = (I / patch)^2.

        `out` has 'embeddings' [B, 1+P, C] (before the first layer) and 'class_token' [B, C].
        """
        batch = pixels_BxIxIx3.shape[0]
        patches = rearrange(self.patch_embed(pixels_BxIxIx3), "B h w C -> B (h w) C")
        class_token = jnp.broadcast_to(self.class_embed[...].astype(patches.dtype), (batch, 1, patches.shape[-1]))
        embeddings = jnp.concatenate([class_token, patches], axis=1) + self.position_embed[...].astype(patches.dtype)
        embeddings = self.pre_norm(embeddings)
        x, _ = scan_layers(self._computed_layers(), lambda layer, x, _: (layer(x), None), embeddings)
        return x[:, 1:], {"embeddings": embeddings, "class_token": x[:, 0]}

    def _computed_layers(self) -> nnx.Module:
        graphdef, state = nnx.split(self.layers)
        return nnx.merge(graphdef, jax.tree.map(lambda stacked: stacked[: self.config.computed_layers], state))
