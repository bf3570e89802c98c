"""What a user would run instead: MedPLIB as a plain PyTorch program, on transformers' own CLIP, LLaMA and SAM.

The mixture of experts is computed as the original does (DeepSpeed 0.13.1 `sharded_moe`: softmax gate, capacity, random
token selection, one-hot dispatch by einsum), adapters as PEFT does, frozen towers without gradients, attention by
PyTorch's fused kernels. It takes the parameters of a `medplib_jax` model (`load`), so that both sides compute the same
numbers.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache, LlamaConfig, LlamaForCausalLM, SamVisionConfig
from transformers.initialization import no_init_weights
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamVisionEncoder

from medplib_jax.config.model import ClipConfig, LlmConfig, LoraConfig, MaskConfig, ModelConfig, MoeConfig
from medplib_jax.models.masks import sam
from medplib_jax.models.vision import clip

# Names of the original's tensors (as `convert` writes them) -> those of the modules below.
NAMES = (
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "clip."),
    (r"^model\.mm_projector\.", "projector."),
    (r"^model\.region_fea_adapter\.", "region."),
    (r"^model\.text_hidden_fcs\.0\.", "seg_mlp."),
    (r"\.mlp\.deepspeed_moe\.gate\.wg\.", ".mlp.router."),
    (r"\.mlp\.deepspeed_moe\.experts\.deepspeed_experts\.", ".mlp.experts."),
    (r"^(model\.(embed_tokens|layers|norm)|lm_head)\.", r"llm.\1."),
    (r"^model\.visual_model\.image_encoder\.", "encoder."),
    (r"^model\.visual_model\.mask_decoder\.", "decoder."),
    (r"^model\.visual_model\.prompt_encoder\.no_mask_embed\.weight", "no_mask_embed"),
    (r"^model\.visual_model\.prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix", "position_gaussian"),
    (r"^encoder\.blocks\.", "encoder.layers."),
    (r"(encoder\.layers\.\d+)\.mlp\.lin", r"\1.mlp.mlp.lin"),
    (r"\.Adapter\.", ".mlp.adapter."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"neck\.0", "neck.conv1"),
    (r"neck\.1", "neck.layer_norm1"),
    (r"neck\.2", "neck.conv2"),
    (r"neck\.3", "neck.layer_norm2"),
    (r"((?:en|de)coder\..*\.)norm(\d)", r"\1layer_norm\2"),
    (r"norm_final_attn", "layer_norm_final_attn"),
    (r"output_upscaling\.0", "upscale_conv1"),
    (r"output_upscaling\.1", "upscale_layer_norm"),
    (r"output_upscaling\.3", "upscale_conv2"),
    (r"((mlps\.\d+|head)\.)layers\.0", r"\1proj_in"),
    (r"((mlps\.\d+|head)\.)layers\.2", r"\1proj_out"),
    (r"((mlps\.\d+|head)\.)layers\.1", r"\1layers.0"),
)
UNUSED = ("model.visual_model.prompt_encoder.",)  # points, boxes and masks as prompts


class AdaptedLinear(nn.Linear):
    """A linear layer with a low-rank adapter beside it (PEFT)."""

    def __init__(self, in_dim: int, out_dim: int, rank: int, lora: LoraConfig):
        super().__init__(in_dim, out_dim, bias=False)
        self.lora_A, self.lora_B = (nn.Linear(a, b, bias=False) for a, b in ((in_dim, rank), (rank, out_dim)))
        self.dropout, self.scale = nn.Dropout(lora.dropout), lora.scale

    def forward(self, x):
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(self.dropout(x)))


def linear(name: str, in_dim: int, out_dim: int, lora: LoraConfig) -> nn.Linear:
    rank = lora.rank_of(name)
    return AdaptedLinear(in_dim, out_dim, rank, lora) if rank else nn.Linear(in_dim, out_dim, bias=False)


class Expert(nn.Module):
    def __init__(self, llm: LlmConfig, lora: LoraConfig):
        super().__init__()
        self.gate_proj = linear("gate", llm.hidden_size, llm.mlp_dim, lora)
        self.up_proj = linear("up", llm.hidden_size, llm.mlp_dim, lora)
        self.down_proj = linear("down", llm.mlp_dim, llm.hidden_size, lora)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TopOneMixture(nn.Module):
    """DeepSpeed's `top1gating` and `MOELayer`."""

    def __init__(self, llm: LlmConfig, moe: MoeConfig, lora: LoraConfig):
        super().__init__()
        self.router = nn.Linear(llm.hidden_size, moe.num_experts, bias=False)
        self.experts = nn.ModuleList([Expert(llm, lora) for _ in range(moe.num_experts)])
        self.moe = moe

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        combine = self.gate(tokens.float()).to(x.dtype)
        chunks = torch.einsum("sec,sd->ecd", combine.bool().to(x.dtype), tokens)
        outputs = torch.stack([expert(chunk) for expert, chunk in zip(self.experts, chunks, strict=True)])
        return torch.einsum("sec,ecd->sd", combine, outputs).reshape(x.shape)

    def gate(self, tokens):
        """Combine weights [S, E, C]."""
        count, experts = tokens.shape[0], self.moe.num_experts
        factor = self.moe.capacity_factor if self.training else self.moe.eval_capacity_factor
        capacity = min(max(math.ceil(count / experts * factor), self.moe.min_capacity), count)
        gates = F.softmax(F.linear(tokens, self.router.weight.float()), dim=1)
        mask = F.one_hot(gates.argmax(1), experts).to(gates.dtype)
        chosen = torch.topk(mask * torch.rand_like(mask), k=capacity, dim=0)[1]
        mask = mask * torch.zeros_like(mask).scatter_(0, chosen, 1)
        place = ((torch.cumsum(mask, 0) - 1) * mask).sum(1).long()
        return torch.einsum("se,sc->sec", gates * mask, F.one_hot(place, capacity).to(gates.dtype))


class Adapter(nn.Module):
    """SAM-Med2D's adapter."""

    def __init__(self, width: int):
        super().__init__()
        self.channel = nn.Sequential(
            nn.Linear(width, width // 4, bias=False), nn.ReLU(), nn.Linear(width // 4, width, bias=False), nn.Sigmoid()
        )
        down, up = nn.Conv2d(width, width, 3, 2, 1, bias=False), nn.ConvTranspose2d(width, width, 4, 2, 1, bias=False)
        self.spatial = nn.Sequential(down, nn.ReLU(), up, nn.ReLU())
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        scaled = (x * self.channel(x.mean((1, 2)))[:, None, None]).permute(0, 3, 1, 2)
        return self.norm(x + self.spatial(scaled).permute(0, 2, 3, 1))


class MlpAndAdapter(nn.Module):
    def __init__(self, mlp: nn.Module, width: int):
        super().__init__()
        self.mlp, self.adapter = mlp, Adapter(width)

    def forward(self, x):
        return self.mlp(x) + self.adapter(x)


def two_linear(in_dim: int, mlp_dim: int, out_dim: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, mlp_dim), activation, nn.Linear(mlp_dim, out_dim))


def mask_encoder(config: MaskConfig) -> SamVisionEncoder:
    encoder = SamVisionEncoder(
        SamVisionConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            window_size=config.window_size,
            global_attn_indexes=list(config.global_layers),
            output_channels=config.out_dim,
            mlp_dim=4 * config.hidden_size,
        )
    )
    for layer in encoder.layers if config.adapter else ():
        layer.mlp = MlpAndAdapter(layer.mlp, config.hidden_size)
    return encoder


def vision_tower(config: ClipConfig) -> CLIPVisionModel:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
        )
    )


def decoder(config: ModelConfig) -> LlamaForCausalLM:
    """LLaMA with adapters and mixtures in the places that the config names."""
    llm, lora = config.llm, config.lora
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=llm.vocab_size,
            hidden_size=llm.hidden_size,
            num_hidden_layers=llm.num_layers,
            num_attention_heads=llm.num_heads,
            num_key_value_heads=llm.num_kv_heads,
            intermediate_size=llm.mlp_dim,
            rms_norm_eps=llm.rms_norm_eps,
            max_position_embeddings=llm.max_positions,
        )
    )
    for index, layer in enumerate(model.model.layers):
        for name in "qkvo":
            old = getattr(layer.self_attn, f"{name}_proj")
            setattr(layer.self_attn, f"{name}_proj", linear(name, old.in_features, old.out_features, lora))
        layer.mlp = TopOneMixture(llm, config.moe, lora) if index in config.moe_layers else Expert(llm, lora)
    return model


def mask_decoder(config: MaskConfig) -> SamMaskDecoder:
    return SamMaskDecoder(
        SamMaskDecoderConfig(
            hidden_size=config.out_dim,
            mlp_dim=config.decoder_mlp_dim,
            num_hidden_layers=config.decoder_layers,
            num_attention_heads=config.decoder_heads,
            iou_head_hidden_dim=config.iou_head_dim,
            iou_head_depth=config.iou_head_layers,
            num_multimask_outputs=config.num_multimask,
            layer_norm_eps=1e-5,
            attn_implementation="sdpa",
        )
    )


class Peer(nn.Module):
    """The whole model; `inputs` of its methods come from `to_torch`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        vision, llm, mask = config.clip, config.llm, config.mask
        self.config = config
        self.clip, self.llm = vision_tower(vision), decoder(config)
        self.projector = two_linear(vision.hidden_size, llm.hidden_size, llm.hidden_size, nn.GELU())
        self.region = nn.Linear(vision.hidden_size, llm.hidden_size)
        self.seg_mlp = two_linear(llm.hidden_size, llm.hidden_size, mask.out_dim, nn.ReLU())
        self.encoder, self.decoder = mask_encoder(mask), mask_decoder(mask)
        self.no_mask_embed = nn.Parameter(torch.zeros(1, mask.out_dim), requires_grad=False)
        self.position_gaussian = nn.Parameter(torch.zeros(2, mask.out_dim // 2), requires_grad=False)

    def load(self, tensors: Iterable[tuple[str, str, np.ndarray]], trainable: Sequence[str] = ()) -> "Peer":
        """Takes over parameters, each as (name in the original's files, path in our tree, values).

        Those have gradients whose path some pattern of `trainable` is found in.
        """
        values, with_gradient = {}, set()
        for original, path, value in tensors:
            if (name := _rename(original)).startswith(UNUSED):
                continue
            values[name] = torch.from_numpy(value)
            with_gradient |= {name} if any(re.search(pattern, path) for pattern in trainable) else set()
        self.load_state_dict(values)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in with_gradient)
        return self

    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def embed(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Token embeddings with image and region features in their places, [B, L, D]."""
        with torch.no_grad():
            states = self.clip(inputs["clip_pixels"], output_hidden_states=True).hidden_states
        features = states[self.config.clip.select_layer][:, 1:]
        visual = torch.cat([self.projector(features), self.regions(features, inputs)], 1)
        index = inputs["feature_index"]
        taken = visual.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, visual.shape[-1]))
        return torch.where((index >= 0)[..., None], taken, self.llm.model.embed_tokens(inputs["tokens"]))

    def regions(self, features, inputs):
        """The mean of the adapted features at every region's points, [B, R, D]."""
        grid = self.config.clip.grid
        maps = self.region(features).mT.unflatten(2, (grid, grid))
        sampled = F.grid_sample(maps, 2 * inputs["region_points"] - 1, align_corners=True)
        valid = inputs["region_point_valid"].to(sampled.dtype)
        return ((sampled * valid[:, None]).sum(-1) / valid.sum(-1)[:, None].clamp(min=1)).mT

    def forward(self, inputs: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
        """The training loss; `weights` of ce, dice and bce."""
        output = self.llm.model(inputs_embeds=self.embed(inputs), attention_mask=inputs["valid"])
        logits = self.llm.lm_head(output.last_hidden_state).float()
        ce = F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), ignore_index=-100)
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        masks = self.masks(output.last_hidden_state[rows, inputs["seg_position"]], inputs)
        gt, probability = inputs["gt_masks"].float(), masks.sigmoid()
        bce = F.binary_cross_entropy_with_logits(masks, gt, reduction="none").mean((-2, -1))
        intersection, total = (probability * gt).sum((-2, -1)), probability.sum((-2, -1)) + gt.sum((-2, -1))
        dice = 1 - (2 * intersection + 1e-6) / (total + 1e-6)
        return weights["ce"] * ce + (weights["dice"] * dice + weights["bce"] * bce).sum() / (bce.numel() + 1e-8)

    def masks(self, seg_hidden, inputs):
        """Mask logits [B, M, I, J] at the size of the true masks."""
        with torch.no_grad():
            embedding = self.encoder(inputs["sam_pixels"]).last_hidden_state
        dense = self.no_mask_embed[..., None, None].expand_as(embedding)
        logits, _ = self.decoder(
            embedding, self.positions(), self.seg_mlp(seg_hidden)[:, :, None], dense, multimask_output=False
        )
        return F.interpolate(
            logits[:, :, 0].float(), inputs["gt_masks"].shape[-2:], mode="bilinear", align_corners=False
        )

    def positions(self):
        grid = self.config.mask.grid
        centres = (torch.arange(grid, device=self.position_gaussian.device) + 0.5) / grid
        rows, columns = torch.meshgrid(centres, centres, indexing="ij")
        angles = (
            2
            * math.pi
            * ((2 * torch.stack([columns, rows], -1) - 1).to(self.position_gaussian.dtype) @ self.position_gaussian)
        )
        return torch.cat([angles.sin(), angles.cos()], -1).permute(2, 0, 1)[None]

    @torch.no_grad()
    def generate(self, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> torch.Tensor:
        """Greedy answers [B, new_tokens] with a key-value cache; no end token, so that the work is known."""
        cache, embeds, found = DynamicCache(config=self.llm.config), {"inputs_embeds": self.embed(inputs)}, []
        for _ in range(new_tokens):
            hidden = self.llm.model(**embeds, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
            found.append(self.llm.lm_head(hidden).argmax(-1))
            embeds = {"input_ids": found[-1]}
        return torch.cat(found, 1)


def loaded(config: ModelConfig, tensors: Iterable[tuple[str, str, np.ndarray]], trainable: Sequence[str] = ()) -> Peer:
    """A peer with these parameters (see `Peer.load`). None are drawn before: at 7B's width that takes a minute."""
    with no_init_weights():
        peer = Peer(config)
    return peer.load(tensors, trainable)


def _rename(key: str) -> str:
    for pattern, replacement in NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def to_torch(batch, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A `Batch` of NumPy arrays as the peer takes it.

    Pixels are normalised with channels first, one picture a row; labels are -100 where none count.
    """
    pixels = {
        "clip_pixels": np.asarray(clip.normalise_clip(batch.clip_pixels[:, 0])).transpose(0, 3, 1, 2),
        "sam_pixels": np.asarray(sam.normalise_sam(batch.sam_pixels, batch.sam_box)).transpose(0, 3, 1, 2),
        "region_points": np.asarray(batch.region_points, np.float32),
    }
    indices = {
        "labels": np.where(batch.loss_weights > 0, batch.targets, -100),
        **{name: getattr(batch, name) for name in ("tokens", "feature_index", "seg_position")},
    }
    tensors = {name: torch.tensor(array, dtype=dtype) for name, array in pixels.items()}
    tensors |= {name: torch.tensor(array, dtype=torch.long) for name, array in indices.items()}
    tensors |= {name: torch.tensor(getattr(batch, name)) for name in ("valid", "region_point_valid", "gt_masks")}
    return {name: tensor.to(device) for name, tensor in tensors.items()}
