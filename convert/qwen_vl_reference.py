"""Qwen-VL in a few functions of plain PyTorch, straight from the names and shapes of a checkpoint's files: the other
side of `convert.check` for BiRD. Float32, evaluation only, one sequence without padding.

Sources: Qwen-VL-Chat's modeling_qwen.py and visual.py.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from medplib_jax.batch import Batch
from medplib_jax.models.vision.clip import normalise_clip

from .torch_reference import TorchReference

_SIGHT = "transformer.visual."
_POOL = _SIGHT + "attn_pool."
_EPS = 1e-6


class QwenReference(TorchReference):
    """`TorchReference` of Qwen-VL's tensors."""

    def read(self, batch: Batch) -> dict[str, np.ndarray]:
        """The pictures' features [N * Q, D] and the logits [L, V] of the one row of a batch."""
        pixels = torch.from_numpy(np.array(normalise_clip(batch.clip_pixels[0]))).permute(0, 3, 1, 2)
        features = self.see(pixels).flatten(0, 1)
        index = torch.from_numpy(np.asarray(batch.feature_index[0])).long()
        words = self.weight("transformer.wte.weight")[torch.from_numpy(np.asarray(batch.tokens[0])).long()]
        x = torch.where((index >= 0)[:, None], features[index.clamp(min=0)], words)
        logits = self.linear(self.language(x[None])[0], "lm_head")
        return {"features": features.numpy(), "logits": logits.numpy()}

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [N, 3, I, I] -> [N, Q, D]."""
        vit = self.config.vit
        x = F.conv2d(pixels, self.weight(_SIGHT + "conv1.weight"), stride=vit.patch_size).flatten(2).mT
        x = self.layer_norm(x + self._positions(_SIGHT + "positional_embedding"), _SIGHT + "ln_pre", _EPS)
        for i in range(vit.num_layers):
            name = f"{_SIGHT}transformer.resblocks.{i}."
            h = self.linear(self.layer_norm(x, name + "ln_1", _EPS), name + "attn.in_proj")
            q, k, v = h.unflatten(-1, (vit.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
            x = x + self.linear(_attend(q, k, v).flatten(2), name + "attn.out_proj")
            h = self.linear(self.layer_norm(x, name + "ln_2", _EPS), name + "mlp.c_fc")
            x = x + self.linear(F.gelu(h), name + "mlp.c_proj")
        return self.layer_norm(self._resample(x), _SIGHT + "ln_post", _EPS) @ self.weight(_SIGHT + "proj")

    def _resample(self, x: torch.Tensor) -> torch.Tensor:
        kv = self.linear(x, _POOL + "kv_proj") if _POOL + "kv_proj.weight" in self.tensors else x
        kv = self.layer_norm(kv, _POOL + "ln_kv", _EPS)
        query = self.layer_norm(self.weight(_POOL + "query"), _POOL + "ln_q", _EPS) + self.weight(_POOL + "pos_embed")
        weights = self.weight(_POOL + "attn.in_proj_weight").chunk(3)
        biases = self.weight(_POOL + "attn.in_proj_bias").chunk(3)
        inputs = query.expand(len(x), -1, -1), kv + self._positions(_POOL + "pos_embed"), kv
        heads = query.shape[-1] // self.config.vit.resampler_head_dim
        q, k, v = (
            F.linear(one, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)
            for one, weight, bias in zip(inputs, weights, biases, strict=True)
        )
        return self.linear(_attend(q, k, v).flatten(2), _POOL + "attn.out_proj")

    def _positions(self, name: str) -> torch.Tensor:
        table, grid = self.weight(name), self.config.vit.grid
        side = math.isqrt(len(table))
        if side == grid:
            return table
        square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        return F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)[0].flatten(1).mT

    def language(self, x: torch.Tensor) -> torch.Tensor:
        """Embeddings of one sequence without padding [1, L, D] -> hidden states after the final norm."""
        llm, length = self.config.llm, x.shape[1]
        K, trained = llm.head_dim, llm.trained_length
        alpha = max(2 ** math.ceil(math.log2(length / trained) + 1) - 1, 1) if trained and llm.ntk else 1
        base = llm.rope_theta * alpha ** (K / (K - 2))
        angles = (torch.arange(length).float()[:, None] / base ** (torch.arange(0, K, 2).float() / K)).repeat(1, 2)
        numbers = torch.arange(1, length + 1).float().clamp(min=trained or length)
        scale = torch.log(numbers) / math.log(trained) if trained and llm.log_n else torch.ones(length)
        mask = torch.full((length, length), -torch.inf).triu(1)
        for i in range(llm.num_layers):
            name = f"transformer.h.{i}."
            h = self.linear(self.rms(x, name + "ln_1"), name + "attn.c_attn")
            q, k, v = h.unflatten(-1, (3, llm.num_heads, K)).permute(2, 0, 3, 1, 4)
            q, k = _rotate(q, angles) * scale[:, None], _rotate(k, angles)
            x = x + self.linear(_attend(q, k, v, mask).flatten(2), name + "attn.c_proj")
            h = self.rms(x, name + "ln_2")
            h = self.linear(h, name + "mlp.w1") * F.silu(self.linear(h, name + "mlp.w2"))
            x = x + self.linear(h, name + "mlp.c_proj")
        return self.rms(x, "transformer.ln_f")


def _attend(q, k, v, mask=0.0) -> torch.Tensor:
    """[B, H, T, K] each -> [B, T, H, K]."""
    return (torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) + mask, -1) @ v).transpose(1, 2)


def _rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
