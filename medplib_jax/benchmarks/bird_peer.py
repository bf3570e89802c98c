"""What a user of BiRD would run instead: Qwen-VL as a plain PyTorch program, under the names of its released weights.

Attention is PyTorch's fused kernel, what does not train runs without gradients. It takes the parameters of a
`medplib_jax` model (`loaded`), so that both sides compute the same numbers. Sources: Qwen-VL-Chat's modeling_qwen.py
and visual.py.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from medplib_jax.config.model import LlmConfig, ModelConfig, QwenVisionConfig
from medplib_jax.models.vision import clip

EPS = 1e-6


class VitAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.in_proj, self.out_proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x):
        q, k, v = self.in_proj(x).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VitMlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class VitBlock(nn.Module):
    def __init__(self, config: QwenVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.attn, self.mlp = VitAttention(width, config.num_heads), VitMlp(width, config.mlp_dim)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Resampler(nn.Module):
    def __init__(self, config: QwenVisionConfig, width: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(config.num_queries, width))
        self.pos_embed = nn.Parameter(torch.zeros(config.num_queries, width))
        self.kv_proj = nn.Linear(config.hidden_size, width, bias=False) if config.hidden_size != width else None
        self.ln_q, self.ln_kv = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.attn = nn.MultiheadAttention(width, width // config.resampler_head_dim, batch_first=True)
        self.grid = config.grid

    def forward(self, x):
        kv = self.ln_kv(x if self.kv_proj is None else self.kv_proj(x))
        query = (self.ln_q(self.query) + self.pos_embed).expand(len(x), -1, -1)
        return self.attn(query, kv + resized(self.pos_embed, self.grid), kv, need_weights=False)[0]


class Vision(nn.Module):
    def __init__(self, config: QwenVisionConfig, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(config.position_grid**2, config.hidden_size))
        self.ln_pre, self.ln_post = nn.LayerNorm(config.hidden_size, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.ModuleList([VitBlock(config) for _ in range(config.num_layers)])}
        )
        self.attn_pool = Resampler(config, width)
        self.proj = nn.Parameter(torch.zeros(width, width))
        self.grid = config.grid

    def forward(self, pixels):
        with torch.set_grad_enabled(self.conv1.weight.requires_grad):
            x = self.conv1(pixels).flatten(2).mT + resized(self.positional_embedding, self.grid)
            x = self.ln_pre(x)
            for block in self.transformer["resblocks"]:
                x = block(x)
        return self.ln_post(self.attn_pool(x)) @ self.proj


def resized(table: torch.Tensor, grid: int) -> torch.Tensor:
    """Positions [s*s, C] at another grid, bicubic."""
    side = math.isqrt(len(table))
    if side == grid:
        return table
    square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)[0].flatten(1).mT


class Attention(nn.Module):
    def __init__(self, llm: LlmConfig):
        super().__init__()
        self.c_attn = nn.Linear(llm.hidden_size, 3 * llm.hidden_size)
        self.c_proj = nn.Linear(llm.hidden_size, llm.hidden_size, bias=False)
        self.heads = llm.num_heads

    def forward(self, x, tables, cache: list | None):
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotated(q, *tables), rotated(k, *tables)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, llm: LlmConfig):
        super().__init__()
        self.w1, self.w2 = (nn.Linear(llm.hidden_size, llm.mlp_dim, bias=False) for _ in range(2))
        self.c_proj = nn.Linear(llm.mlp_dim, llm.hidden_size, bias=False)

    def forward(self, x):
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class Block(nn.Module):
    def __init__(self, llm: LlmConfig):
        super().__init__()
        self.ln_1, self.ln_2 = (nn.RMSNorm(llm.hidden_size, llm.rms_norm_eps) for _ in range(2))
        self.attn, self.mlp = Attention(llm), Mlp(llm)

    def forward(self, x, tables, cache):
        x = x + self.attn(self.ln_1(x), tables, cache)
        return x + self.mlp(self.ln_2(x))


def rotated(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Peer(nn.Module):
    """The whole model; `inputs` of its methods come from `to_torch`. Rows are full: nothing is padded."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        llm = config.llm
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(llm.vocab_size, llm.hidden_size),
                "h": nn.ModuleList([Block(llm) for _ in range(llm.num_layers)]),
                "ln_f": nn.RMSNorm(llm.hidden_size, llm.rms_norm_eps),
                "visual": Vision(config.vit, llm.hidden_size),
            }
        )
        self.lm_head = nn.Linear(llm.hidden_size, llm.vocab_size, bias=False)
        self.llm = llm

    def load(self, tensors: Iterable[tuple[str, str, np.ndarray]], trainable: Sequence[str] = ()) -> "Peer":
        """Takes over parameters, each as (name in the release's files, path in our tree, values).

        Those have gradients whose path some pattern of `trainable` is found in.
        """
        values, with_gradient = {}, set()
        for name, path, value in tensors:
            values[name] = torch.from_numpy(value)
            with_gradient |= {name} if any(re.search(pattern, path) for pattern in trainable) else set()
        self.load_state_dict(values)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in with_gradient)
        return self

    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def embed(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Token embeddings with the pictures' vectors in their places, [B, L, D]."""
        visual, index = self.transformer["visual"](inputs["clip_pixels"]), inputs["feature_index"]
        taken = visual.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, visual.shape[-1]))
        return torch.where((index >= 0)[..., None], taken, self.transformer["wte"](inputs["tokens"]))

    def hidden(self, x: torch.Tensor, caches: list[list] | None = None, start: int = 0) -> torch.Tensor:
        """Embeddings at positions from `start` on -> states after the final norm, without scaling of long prompts."""
        width = self.llm.head_dim
        powers = torch.arange(0, width, 2, device=x.device).float() / width
        places = torch.arange(start, start + x.shape[1], device=x.device).float()
        angles = (places[:, None] / self.llm.rope_theta**powers).repeat(1, 2)
        tables = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, block in enumerate(self.transformer["h"]):
            x = block(x, tables, None if caches is None else caches[i])
        return self.transformer["ln_f"](x)

    def forward(self, inputs: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
        """The training loss; `weights` of ce."""
        logits = self.lm_head(self.hidden(self.embed(inputs))).float()
        return weights["ce"] * F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), ignore_index=-100)

    @torch.no_grad()
    def generate(self, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> torch.Tensor:
        """Greedy answers [B, new_tokens] with a key-value cache; no end token, so that the work is known."""
        caches, x, start, found = [[] for _ in self.transformer["h"]], self.embed(inputs), 0, []
        for _ in range(new_tokens):
            found.append(self.lm_head(self.hidden(x, caches, start)[:, -1:]).argmax(-1))
            x, start = self.transformer["wte"](found[-1]), start + x.shape[1]
        return torch.cat(found, 1)


def loaded(config: ModelConfig, tensors: Iterable[tuple[str, str, np.ndarray]], trainable: Sequence[str] = ()) -> Peer:
    """A peer with these parameters (see `Peer.load`)."""
    return Peer(config).load(tensors, trainable)


def to_torch(batch, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A `Batch` of NumPy arrays as the peer takes it, one picture a row; labels are -100 where none count."""
    pixels = np.asarray(clip.normalise_clip(batch.clip_pixels[:, 0])).transpose(0, 3, 1, 2)
    indices = {
        "labels": np.where(batch.loss_weights > 0, batch.targets, -100),
        **{name: getattr(batch, name) for name in ("tokens", "feature_index")},
    }
    tensors = {name: torch.tensor(array, dtype=torch.long) for name, array in indices.items()}
    tensors["clip_pixels"] = torch.tensor(pixels, dtype=dtype)
    return {name: tensor.to(device) for name, tensor in tensors.items()}
