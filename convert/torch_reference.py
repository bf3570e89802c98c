"""The model in a few functions of plain PyTorch, straight from the names and shapes of a checkpoint's files: the other
side of `convert.check`. Float32, evaluation only, one read of each tensor per pass, nothing shared with the JAX model
but sizes.

Sources: medplib_arch.py, medplib_moe_llama.py (transformers 4.31 LLaMA, DeepSpeed 0.13.1 MoE), segment_anything_med2d.
"""

import math

import ml_dtypes
import torch
import torch.nn.functional as F

from medplib_jax.config.model import ModelConfig

from .torch_files import Tensor

_CLIP = "model.vision_tower.vision_tower.vision_model."
_SAM = "model.visual_model."


class TorchReference:
    """`tensors`: canonical name -> tensor of a file; adapters beside a weight are added to it with
    `config.lora.scale`."""

    def __init__(self, tensors: dict[str, Tensor], config: ModelConfig):
        self.tensors, self.config = tensors, config

    def weight(self, name: str) -> torch.Tensor:
        values = self._read(name)
        stem = name.removesuffix(".weight")
        if stem + ".lora_A.weight" in self.tensors:
            values = values + self.config.lora.scale * (
                self._read(stem + ".lora_B.weight") @ self._read(stem + ".lora_A.weight")
            )
        return values

    def _read(self, name: str) -> torch.Tensor:
        array = self.tensors[name].read()
        return torch.from_numpy(array.astype("float32") if array.dtype == ml_dtypes.bfloat16 else array.copy()).float()

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(
            x, self.weight(name + ".weight"), self.weight(name + ".bias") if name + ".bias" in self.tensors else None
        )

    def layer_norm(self, x: torch.Tensor, name: str, eps: float = 1e-5) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight(name + ".weight"), self.weight(name + ".bias"), eps)

    # CLIP, projector, regions

    def clip(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [B, 3, I, I] -> features of the selected layer without the class token [B, P, C]."""
        config = self.config.clip
        patches = (
            F.conv2d(pixels, self.weight(_CLIP + "embeddings.patch_embedding.weight"), stride=config.patch_size)
            .flatten(2)
            .mT
        )
        start = self.weight(_CLIP + "embeddings.class_embedding").expand(len(patches), 1, -1)
        x = torch.cat([start, patches], 1) + self.weight(_CLIP + "embeddings.position_embedding.weight")
        x = self.layer_norm(x, _CLIP + "pre_layrnorm", config.layer_norm_eps)
        for i in range(config.num_layers + 1 + config.select_layer):
            name = f"{_CLIP}encoder.layers.{i}."
            h = self.layer_norm(x, name + "layer_norm1", config.layer_norm_eps)
            x = x + self.attention(h, h, h, name + "self_attn.", config.num_heads)
            h = self.linear(self.layer_norm(x, name + "layer_norm2", config.layer_norm_eps), name + "mlp.fc1")
            x = x + self.linear(h * torch.sigmoid(1.702 * h), name + "mlp.fc2")
        return x[:, 1:]

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(F.gelu(self.linear(features, "model.mm_projector.0")), "model.mm_projector.2")

    def attention(self, q, k, v, name: str, heads: int) -> torch.Tensor:
        def split(x, kind):
            return self.linear(x, f"{name}{kind}_proj").unflatten(-1, (heads, -1)).transpose(1, 2)

        q, k, v = split(q, "q"), split(k, "k"), split(v, "v")
        weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
        return self.linear((weights @ v).transpose(1, 2).flatten(2), name + "out_proj")

    # LLaMA with experts

    def language(self, x: torch.Tensor) -> torch.Tensor:
        """Embeddings of one sequence without padding [1, L, D] -> hidden states after the final norm."""
        config, length = self.config.llm, x.shape[1]
        inverse = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angles = (torch.arange(length).float()[:, None] * inverse).repeat(1, 2)
        mask = torch.full((length, length), -torch.inf).triu(1)
        for i in range(config.num_layers):
            name = f"model.layers.{i}."
            x = x + self._causal(self.rms(x, name + "input_layernorm"), name + "self_attn.", angles, mask)
            h = self.rms(x, name + "post_attention_layernorm")
            x = x + (self._mixture(h, name + "mlp.") if i in self.config.moe_layers else self._swiglu(h, name + "mlp."))
        return self.rms(x, "model.norm")

    def rms(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.weight(name + ".weight") * (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.llm.rms_norm_eps)
        )

    def _causal(self, x, name: str, angles, mask) -> torch.Tensor:
        config = self.config.llm
        q, k, v = (
            self.linear(x, f"{name}{kind}_proj").unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for kind in "qkv"
        )

        def rotate(t):
            first, second = t.chunk(2, -1)
            return t * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

        k, v = (t.repeat_interleave(config.num_heads // config.num_kv_heads, 1) for t in (rotate(k), v))
        weights = torch.softmax(rotate(q) @ k.mT / math.sqrt(config.head_dim) + mask, -1)
        return self.linear((weights @ v).transpose(1, 2).flatten(2), name + "o_proj")

    def _swiglu(self, x, name: str) -> torch.Tensor:
        return self.linear(
            F.silu(self.linear(x, name + "gate_proj")) * self.linear(x, name + "up_proj"), name + "down_proj"
        )

    def _mixture(self, x, name: str) -> torch.Tensor:
        """Without a capacity: the original's own at inference drops nothing with two experts."""
        moe, prefix = self.config.moe, name + "deepspeed_moe."
        probabilities = torch.softmax(self.linear(x, prefix + "gate.wg"), -1)
        gates, chosen = probabilities.topk(moe.top_k, -1)
        gates = gates if moe.top_k == 1 else gates / gates.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for expert in range(moe.num_experts):
            rows, slots = torch.nonzero(chosen[0] == expert, as_tuple=True)
            y[0, rows] += gates[0, rows, slots, None] * self._swiglu(
                x[0, rows], f"{prefix}experts.deepspeed_experts.{expert}."
            )
        if moe.residual:
            mix = torch.softmax(self.linear(x, name + "coefficient"), -1)
            y = y * mix[..., :1] + self._swiglu(x, name + "mlp.") * mix[..., 1:]
        return y

    # SAM-Med2D

    def prompt(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(F.relu(self.linear(hidden, "model.text_hidden_fcs.0.0")), "model.text_hidden_fcs.0.2")

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [B, 3, I, I] -> embedding [B, C, h, w]."""
        config, name = self.config.mask, _SAM + "image_encoder."
        x = F.conv2d(
            pixels,
            self.weight(name + "patch_embed.proj.weight"),
            self.weight(name + "patch_embed.proj.bias"),
            stride=config.patch_size,
        )
        x = x.permute(0, 2, 3, 1) + self.weight(name + "pos_embed")
        for i in range(config.num_layers):
            block = f"{name}blocks.{i}."
            window = config.grid if i in config.global_layers else config.window_size
            x = x + self._windows(self.layer_norm(x, block + "norm1", 1e-6), block + "attn.", window)
            h = self.layer_norm(x, block + "norm2", 1e-6)
            x = x + self.linear(F.gelu(self.linear(h, block + "mlp.lin1")), block + "mlp.lin2")
            x = x + self._adapter(h, block + "Adapter.") if config.adapter else x
        x = self._norm_2d(F.conv2d(x.permute(0, 3, 1, 2), self.weight(name + "neck.0.weight")), name + "neck.1")
        return self._norm_2d(F.conv2d(x, self.weight(name + "neck.2.weight"), padding=1), name + "neck.3")

    def _norm_2d(self, x, name: str) -> torch.Tensor:
        return self.layer_norm(x.permute(0, 2, 3, 1), name, 1e-6).permute(0, 3, 1, 2)

    def _windows(self, x, name: str, window: int) -> torch.Tensor:
        batch, height, width, dim = x.shape
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        rows, columns = x.shape[1] // window, x.shape[2] // window
        tiles = x.reshape(batch, rows, window, columns, window, dim).transpose(2, 3).reshape(-1, window * window, dim)
        tiles = self._relative_attention(tiles, name, window)
        x = (
            tiles.reshape(batch, rows, columns, window, window, dim)
            .transpose(2, 3)
            .reshape(batch, rows * window, columns * window, dim)
        )
        return x[:, :height, :width]

    def _relative_attention(self, x, name: str, side: int) -> torch.Tensor:
        q, k, v = self.linear(x, name + "qkv").unflatten(-1, (3, self.config.mask.num_heads, -1)).permute(2, 0, 3, 1, 4)
        offsets = torch.arange(side)[:, None] - torch.arange(side) + side - 1
        grid = q.unflatten(2, (side, side))
        of_rows = torch.einsum("bnhwc,hkc->bnhwk", grid, self.weight(name + "rel_pos_h")[offsets])
        of_columns = torch.einsum("bnhwc,wkc->bnhwk", grid, self.weight(name + "rel_pos_w")[offsets])
        bias = (of_rows[..., :, None] + of_columns[..., None, :]).flatten(4).flatten(2, 3)
        weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) + bias, -1)
        return self.linear((weights @ v).transpose(1, 2).flatten(2), name + "proj")

    def _adapter(self, x, name: str) -> torch.Tensor:
        squeezed = self.linear(F.relu(self.linear(x.mean((1, 2)), name + "channel.0")), name + "channel.2")
        scaled = (x * torch.sigmoid(squeezed)[:, None, None]).permute(0, 3, 1, 2)
        spatial = F.relu(F.conv2d(scaled, self.weight(name + "spatial.0.weight"), stride=2, padding=1))
        spatial = F.relu(F.conv_transpose2d(spatial, self.weight(name + "spatial.2.weight"), stride=2, padding=1))
        return self.layer_norm(x + spatial.permute(0, 2, 3, 1), name + "norm")

    def decode_mask(self, embedding: torch.Tensor, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedding [1, C, h, w] and prompt [1, C] -> mask logits [4h, 4w] and predicted IoU."""
        config, name = self.config.mask, _SAM + "mask_decoder."
        _, channels, height, width = embedding.shape
        embedding = embedding + self.weight(_SAM + "prompt_encoder.no_mask_embed.weight")[:, :, None, None]
        keys, position = embedding.flatten(2).mT, self._positions(height, width)
        tokens = torch.cat([self.weight(name + "iou_token.weight"), self.weight(name + "mask_tokens.weight"), prompt])[
            None
        ]
        queries = tokens
        for i in range(config.decoder_layers):
            queries, keys = self._two_way(
                f"{name}transformer.layers.{i}.", queries, keys, tokens, position, first=i == 0
            )
        final = self.attention(
            queries + tokens,
            keys + position,
            keys,
            name + "transformer.final_attn_token_to_image.",
            config.decoder_heads,
        )
        queries = self.layer_norm(queries + final, name + "transformer.norm_final_attn")
        x = self._upscale(keys.mT.reshape(1, channels, height, width), name + "output_upscaling.0")
        x = F.gelu(self._upscale(F.gelu(self._norm_2d(x, name + "output_upscaling.1")), name + "output_upscaling.3"))
        weights = self._mlp(queries[:, 1], name + "output_hypernetworks_mlps.0.layers.", 3)
        iou = self._mlp(queries[:, 0], name + "iou_prediction_head.layers.", config.iou_head_layers)
        return torch.einsum("bc,bchw->hw", weights, x), iou[0, 0]

    def _positions(self, height: int, width: int) -> torch.Tensor:
        rows, columns = torch.meshgrid(
            (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
        )
        gaussian = self.weight(_SAM + "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix")
        angles = 2 * math.pi * ((2 * torch.stack([columns, rows], -1) - 1) @ gaussian)
        return torch.cat([angles.sin(), angles.cos()], -1).flatten(0, 1)[None]

    def _two_way(self, name: str, queries, keys, tokens, position, *, first: bool):
        heads = self.config.mask.decoder_heads
        with_tokens = queries if first else queries + tokens
        own = self.attention(with_tokens, with_tokens, queries, name + "self_attn.", heads)
        queries = self.layer_norm(own if first else queries + own, name + "norm1")
        seen = self.attention(queries + tokens, keys + position, keys, name + "cross_attn_token_to_image.", heads)
        queries = self.layer_norm(queries + seen, name + "norm2")
        queries = self.layer_norm(
            queries + self.linear(F.relu(self.linear(queries, name + "mlp.lin1")), name + "mlp.lin2"), name + "norm3"
        )
        told = self.attention(keys + position, queries + tokens, queries, name + "cross_attn_image_to_token.", heads)
        return queries, self.layer_norm(keys + told, name + "norm4")

    def _upscale(self, x, name: str) -> torch.Tensor:
        return F.conv_transpose2d(x, self.weight(name + ".weight"), self.weight(name + ".bias"), stride=2)

    def _mlp(self, x, name: str, layers: int) -> torch.Tensor:
        for i in range(layers):
            x = self.linear(x, f"{name}{i}")
            x = F.relu(x) if i + 1 < layers else x
        return x
