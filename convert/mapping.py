"""The one table of names: which PyTorch tensor is which part of which JAX parameter. Both directions come from it.

A row is (PyTorch pattern, JAX path, layout). A field in braces stands for an index. If the field is also in the JAX
path, each index has a parameter of its own; if not, the tensors are stacked on leading axes, in the order of the
fields. What values a field takes is decided by `indices(config)`. `[q,k,v]` in both names stands for one row per
alternative. Rows whose JAX path a model does not have are not used (say, SAM's adapters in a model without them)."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping

import einops
import numpy as np

from medplib_jax.config.model import ModelConfig

Shape = tuple[int, ...]
Table = tuple[tuple[str, str, "Layout"], ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one PyTorch tensor lies in the JAX parameter: permute (empty: as it is), then drop leading axes of size 1."""

    order: tuple[int, ...] = ()
    drop: int = 0

    def of(self, config: ModelConfig) -> "Layout":
        """The layout for one model."""
        return self

    def to_jax(self, tensor: np.ndarray) -> np.ndarray:
        """A view in the JAX layout; nothing is copied."""
        tensor = tensor.transpose(self.order) if self.order else tensor
        return tensor[(0,) * self.drop]

    def to_torch(self, tensor: np.ndarray) -> np.ndarray:
        """The inverse view."""
        tensor = tensor[(None,) * self.drop]
        return tensor.transpose(np.argsort(self.order)) if self.order else tensor

    def torch_shape(self, shape: Shape) -> Shape:
        """The PyTorch shape of a tensor of this JAX shape."""
        full = (1,) * self.drop + tuple(shape)
        return tuple(full[i] for i in np.argsort(self.order)) if self.order else full

    def jax_shape(self, shape: Shape) -> Shape:
        """The JAX shape of a tensor of this PyTorch shape."""
        return tuple(shape[i] for i in self.order or range(len(shape)))[self.drop :]


@dataclasses.dataclass(frozen=True)
class Regrouped(Layout):
    """A layout that takes an axis apart:

    The two sides as einops patterns, `sizes` of what an axis is made of. `heads` stands for the decoder's, until a
    model is known (`of`).
    """

    torch: str = ""
    jax: str = ""
    sizes: tuple[tuple[str, int], ...] = ()

    def of(self, config: ModelConfig) -> "Regrouped":
        return dataclasses.replace(
            self, sizes=(*self.sizes, *[("heads", config.llm.num_heads)] * ("heads" in self.jax))
        )

    def to_jax(self, tensor: np.ndarray) -> np.ndarray:
        return einops.rearrange(tensor, f"{self.torch} -> {self.jax}", **dict(self.sizes))

    def to_torch(self, tensor: np.ndarray) -> np.ndarray:
        return einops.rearrange(tensor, f"{self.jax} -> {self.torch}", **dict(self.sizes))

    def torch_shape(self, shape: Shape) -> Shape:
        return _regrouped_shape(self.jax, self.torch, shape, self.sizes)

    def jax_shape(self, shape: Shape) -> Shape:
        return _regrouped_shape(self.torch, self.jax, shape, self.sizes)


def _regrouped_shape(source: str, target: str, shape: Shape, sizes: tuple[tuple[str, int], ...]) -> Shape:
    """The shape of `rearrange(x, f"{source} -> {target}")` for an x of this shape.

    An axis that does not divide gives a shape that fits nothing.
    """
    known = dict(sizes)
    for axis, size in zip(_axes(source), shape, strict=True):
        unknown = [name for name in axis if name not in known]
        known |= {unknown[0]: size // math.prod(known[name] for name in axis if name in known)} if unknown else {}
    return tuple(math.prod(known[name] for name in axis) for axis in _axes(target))


def _axes(pattern: str) -> list[list[str]]:
    return [part.strip("()").split() for part in re.findall(r"\([^)]*\)|\w+", pattern)]


SAME = Layout()
LINEAR = Layout(order=(1, 0))  # [out, in] -> [in, out]
CONV = Layout(order=(2, 3, 1, 0))  # OIHW -> HWIO
CONV_TRANSPOSE = Layout(order=(2, 3, 0, 1))  # IOHW -> HWIO
CONV_POINT = Layout(order=(2, 1, 0), drop=1)  # [out, in, 1] -> [in, out]
ROW = Layout(drop=1)  # [1, ...] -> [...]

_CLIP = "model.vision_tower.vision_tower.vision_model."
_CLIP_LAYER = _CLIP + "encoder.layers.{vision}."
_LAYER = "model.layers.{layer}."
_EXPERTS = "model.layers.{moe}.mlp.deepspeed_moe."
_DENSE = "model.layers.{dense}.mlp."
_GEOMETRY = "model.region_geo_sampler."
_SAM = "model.visual_model."
_BLOCK = _SAM + "image_encoder.blocks.{block}."
_DECODER = _SAM + "mask_decoder."
_TWO_WAY = _DECODER + "transformer.layers.{decoder}."


def _affine(torch: str, jax: str, layout: Layout) -> tuple:
    return (torch + ".weight", jax + "/kernel", layout), (torch + ".bias", jax + "/bias", SAME)


def _norm(torch: str, jax: str) -> tuple:
    return (torch + ".weight", jax + "/scale", SAME), (torch + ".bias", jax + "/bias", SAME)


MEDPLIB: Table = (
    # CLIP
    (_CLIP + "embeddings.class_embedding", "clip/class_embed", SAME),
    (_CLIP + "embeddings.patch_embedding.weight", "clip/patch_embed/kernel", CONV),
    (_CLIP + "embeddings.position_embedding.weight", "clip/position_embed", SAME),
    *_norm(_CLIP + "pre_layrnorm", "clip/pre_norm"),
    *_norm(_CLIP + "post_layernorm", "clip/post_norm"),
    *_norm(_CLIP_LAYER + "layer_norm[1,2]", "clip/layers/norm[1,2]"),
    *_affine(_CLIP_LAYER + "self_attn.[q,k,v,out]_proj", "clip/layers/attn/[q,k,v,o]", LINEAR),
    *_affine(_CLIP_LAYER + "mlp.fc[1,2]", "clip/layers/mlp/fc[1,2]", LINEAR),
    # between vision and language
    *_affine("model.mm_projector.[0,2]", "projector/fc[1,2]", LINEAR),
    *_affine("model.region_fea_adapter", "region/adapter", LINEAR),
    *_affine(_GEOMETRY + "diff_projector_list.{geometry}", "region/geometry/stages/{geometry}/diff", LINEAR),
    *_affine(
        _GEOMETRY + "agg_projector_list.{geometry}.net.0", "region/geometry/stages/{geometry}/aggregate", CONV_POINT
    ),
    *_norm(_GEOMETRY + "agg_projector_list.{geometry}.norm", "region/geometry/stages/{geometry}/norm"),
    *_affine(_GEOMETRY + "[flatten,dim]_projector", "region/geometry/[flatten,project]", LINEAR),
    # LLaMA, its dense and mixture-of-experts MLPs
    ("model.embed_tokens.weight", "llm/embed/embedding", SAME),
    (_LAYER + "[input,post_attention]_layernorm.weight", "llm/layers/[input,post]_norm/scale", SAME),
    (_LAYER + "self_attn.[q,k,v,o]_proj.weight", "llm/layers/attn/[q,k,v,o]/kernel", LINEAR),
    (_DENSE + "[gate,up,down]_proj.weight", "llm/mlp/[gate,up,down]/kernel", LINEAR),
    (_EXPERTS + "gate.wg.weight", "llm/moe/router/kernel", LINEAR),
    (
        _EXPERTS + "experts.deepspeed_experts.{expert}.[gate,up,down]_proj.weight",
        "llm/moe/experts/[gate,up,down]/kernel",
        LINEAR,
    ),
    ("model.layers.{moe}.mlp.mlp.[gate,up,down]_proj.weight", "llm/moe/residual/[gate,up,down]/kernel", LINEAR),
    *_affine("model.layers.{moe}.mlp.coefficient", "llm/moe/coefficient", LINEAR),
    ("model.norm.weight", "llm/final_norm/scale", SAME),
    ("lm_head.weight", "llm/head/kernel", LINEAR),
    # <SEG> to mask prompt
    *_affine("model.text_hidden_fcs.0.[0,2]", "seg_mlp/fc[1,2]", LINEAR),
    # SAM-Med2D, image encoder
    *_affine(_SAM + "image_encoder.patch_embed.proj", "sam/image_encoder/patch_embed", CONV),
    (_SAM + "image_encoder.pos_embed", "sam/image_encoder/position_embed", ROW),
    *_norm(_BLOCK + "norm[1,2]", "sam/image_encoder/blocks/{block}/norm[1,2]"),
    *_affine(_BLOCK + "attn.[qkv,proj]", "sam/image_encoder/blocks/{block}/attn/[qkv,proj]", LINEAR),
    (_BLOCK + "attn.rel_pos_[h,w]", "sam/image_encoder/blocks/{block}/attn/rel_pos_[h,w]", SAME),
    *_affine(_BLOCK + "mlp.lin[1,2]", "sam/image_encoder/blocks/{block}/mlp/fc[1,2]", LINEAR),
    *_norm(_BLOCK + "Adapter.norm", "sam/image_encoder/blocks/{block}/adapter/norm"),
    (_BLOCK + "Adapter.channel.[0,2].weight", "sam/image_encoder/blocks/{block}/adapter/channel[1,2]/kernel", LINEAR),
    (_BLOCK + "Adapter.spatial.0.weight", "sam/image_encoder/blocks/{block}/adapter/spatial1/kernel", CONV),
    (_BLOCK + "Adapter.spatial.2.weight", "sam/image_encoder/blocks/{block}/adapter/spatial2/kernel", CONV_TRANSPOSE),
    (_SAM + "image_encoder.neck.[0,2].weight", "sam/image_encoder/neck/conv[1,2]/kernel", CONV),
    *_norm(_SAM + "image_encoder.neck.[1,3]", "sam/image_encoder/neck/norm[1,2]"),
    # SAM-Med2D, prompt encoder
    (
        _SAM + "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "sam/prompt_encoder/position_gaussian",
        SAME,
    ),
    (_SAM + "prompt_encoder.point_embeddings.{point}.weight", "sam/prompt_encoder/point_embed", ROW),
    (_SAM + "prompt_encoder.not_a_point_embed.weight", "sam/prompt_encoder/not_a_point_embed", ROW),
    (_SAM + "prompt_encoder.no_mask_embed.weight", "sam/prompt_encoder/no_mask_embed", ROW),
    *_affine(_SAM + "prompt_encoder.mask_downscaling.[0,3,6]", "sam/prompt_encoder/mask_conv[1,2,3]", CONV),
    *_norm(_SAM + "prompt_encoder.mask_downscaling.[1,4]", "sam/prompt_encoder/mask_norm[1,2]"),
    # SAM-Med2D, mask decoder
    (_DECODER + "iou_token.weight", "sam/mask_decoder/iou_token", ROW),
    (_DECODER + "mask_tokens.weight", "sam/mask_decoder/mask_tokens", SAME),
    *_affine(
        _TWO_WAY + "self_attn.[q,k,v,out]_proj",
        "sam/mask_decoder/transformer/layers/{decoder}/self_attn/[q,k,v,o]",
        LINEAR,
    ),
    *_affine(
        _TWO_WAY + "cross_attn_token_to_image.[q,k,v,out]_proj",
        "sam/mask_decoder/transformer/layers/{decoder}/cross_token_to_image/[q,k,v,o]",
        LINEAR,
    ),
    *_affine(
        _TWO_WAY + "cross_attn_image_to_token.[q,k,v,out]_proj",
        "sam/mask_decoder/transformer/layers/{decoder}/cross_image_to_token/[q,k,v,o]",
        LINEAR,
    ),
    *_norm(_TWO_WAY + "norm[1,2,3,4]", "sam/mask_decoder/transformer/layers/{decoder}/norm[1,2,3,4]"),
    *_affine(_TWO_WAY + "mlp.lin[1,2]", "sam/mask_decoder/transformer/layers/{decoder}/mlp/fc[1,2]", LINEAR),
    *_affine(
        _DECODER + "transformer.final_attn_token_to_image.[q,k,v,out]_proj",
        "sam/mask_decoder/transformer/final_attn/[q,k,v,o]",
        LINEAR,
    ),
    *_norm(_DECODER + "transformer.norm_final_attn", "sam/mask_decoder/transformer/final_norm"),
    *_affine(_DECODER + "output_upscaling.[0,3]", "sam/mask_decoder/upscale[1,2]", CONV_TRANSPOSE),
    *_norm(_DECODER + "output_upscaling.1", "sam/mask_decoder/upscale_norm"),
    *_affine(
        _DECODER + "output_hypernetworks_mlps.{mask_token}.layers.{hyper_layer}",
        "sam/mask_decoder/hypernetworks/{mask_token}/layers/{hyper_layer}",
        LINEAR,
    ),
    *_affine(
        _DECODER + "iou_prediction_head.layers.{iou_layer}", "sam/mask_decoder/iou_head/layers/{iou_layer}", LINEAR
    ),
    # in-context-learning modules
    *_norm("model.mm_token_compressor.norm", "icl/compressor/norm"),
    *_affine("model.mm_token_compressor.proj", "icl/compressor/proj", LINEAR),
    *_affine("model.mask_encoder.encoder.[0,2,4,6]", "icl/mask_encoder/conv[1,2,3,4]", CONV),
    *_affine("model.mask_encoder.proj", "icl/mask_encoder/proj", LINEAR),
    *_norm("model.mask_encoder.norm", "icl/mask_encoder/norm"),
)

# Qwen's fused projection is [q | k | v], each with all heads. Here each head's three lie side by side, so that heads
# can be spread over devices.
QKV = Regrouped(torch="(c heads k) d", jax="d (heads c k)", sizes=(("c", 3),))
QKV_BIAS = Regrouped(torch="(c heads k)", jax="(heads c k)", sizes=(("c", 3),))
POOL_QKV = Regrouped(torch="(c o) i", jax="c i o", sizes=(("c", 3),))  # torch's MultiheadAttention
POOL_QKV_BIAS = Regrouped(torch="(c o)", jax="c o", sizes=(("c", 3),))

_QWEN_LAYER = "transformer.h.{layer}."
_SIGHT = "transformer.visual."
_POOL = _SIGHT + "attn_pool."
_SIGHT_BLOCK = _SIGHT + "transformer.resblocks.{vision}."

QWEN_VL: Table = (
    # ViT; its fused projection has each head's three side by side already
    (_SIGHT + "positional_embedding", "vit/position_embed", SAME),
    (_SIGHT + "conv1.weight", "vit/patch_embed/kernel", CONV),
    *_norm(_SIGHT + "ln_pre", "vit/pre_norm"),
    *_norm(_SIGHT_BLOCK + "ln_[1,2]", "vit/layers/norm[1,2]"),
    *_affine(_SIGHT_BLOCK + "attn.[in_proj,out_proj]", "vit/layers/attn/[qkv,o]", LINEAR),
    *_affine(_SIGHT_BLOCK + "mlp.[c_fc,c_proj]", "vit/layers/mlp/[fc1,fc2]", LINEAR),
    # resampler
    (_POOL + "query", "resampler/query", SAME),
    (_POOL + "pos_embed", "resampler/position_embed", SAME),
    (_POOL + "kv_proj.weight", "resampler/kv/kernel", LINEAR),
    *_norm(_POOL + "ln_[q,kv]", "resampler/norm_[q,kv]"),
    (_POOL + "attn.in_proj_weight", "resampler/qkv/kernel", POOL_QKV),
    (_POOL + "attn.in_proj_bias", "resampler/qkv/bias", POOL_QKV_BIAS),
    *_affine(_POOL + "attn.out_proj", "resampler/o", LINEAR),
    *_norm(_SIGHT + "ln_post", "post_norm"),
    (_SIGHT + "proj", "proj/kernel", SAME),
    # Qwen
    ("transformer.wte.weight", "llm/embed/embedding", SAME),
    (_QWEN_LAYER + "ln_[1,2].weight", "llm/layers/[input,post]_norm/scale", SAME),
    (_QWEN_LAYER + "attn.c_attn.weight", "llm/layers/attn/qkv/kernel", QKV),
    (_QWEN_LAYER + "attn.c_attn.bias", "llm/layers/attn/qkv/bias", QKV_BIAS),
    (_QWEN_LAYER + "attn.c_proj.weight", "llm/layers/attn/o/kernel", LINEAR),
    (_QWEN_LAYER + "mlp.[w2,w1,c_proj].weight", "llm/mlp/[gate,up,down]/kernel", LINEAR),
    ("transformer.ln_f.weight", "llm/final_norm/scale", SAME),
    ("lm_head.weight", "llm/head/kernel", LINEAR),
)
TABLES = {"medplib": MEDPLIB, "bird": QWEN_VL}

# Source tensors that are not parameters of the model, and why.
IGNORED: tuple[tuple[str, str], ...] = (
    (r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$", "computed from rope_theta"),
    (r"vision_model\.embeddings\.position_ids$", "0, 1, 2, ..."),
    (r"^(text_model\.|visual_projection\.|text_projection\.|logit_scale$)", "CLIP's text side"),
    (r"visual_model\.pixel_(mean|std)$", "SAM's normalisation constants"),
    (r"^transformer\.rotary_emb\.inv_freq$|\.attn\.masked_bias$", "Qwen's, computed"),
    (r"\.original_module\.weight$", "what an adapter's own copy stands for"),
)

_CLIP_PARTS = r"embeddings\.(?:class|patch|position)_embedding|pre_layrnorm\.|encoder\.layers\.|post_layernorm\."
# Other names of the same tensors, brought to the table's names in this order.
_ALIASES: tuple[tuple[str, str], ...] = (
    (r"^base_model\.model\.", ""),  # PEFT
    (r"\.base_layer\.(weight|bias)$", r".\1"),
    (r"\.(lora_[AB])\.default\.weight$", r".\1.weight"),
    (r"\.modules_to_save\.default\.weight$", ".weight"),
    (r"^transformer\.llm\.", "transformer."),  # BiRD's Paddle checkpoints
    (r"^visual\.(vit\.)?", "transformer.visual."),
    (r"^(vision_model\.)", r"model.vision_tower.vision_tower.\1"),  # a CLIP checkpoint
    # Hugging Face's LLaVA, as transformers 4 and 5 write it, and as its modules are called
    (rf"^(?:model\.)?(?:vision_tower\.)?({_CLIP_PARTS})", r"model.vision_tower.vision_tower.vision_model.\1"),
    (rf"^(?:model\.)?vision_tower\.vision_model\.({_CLIP_PARTS})", r"model.vision_tower.vision_tower.vision_model.\1"),
    (r"^(?:model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^(?:model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^model\.language_model\.", "model."),
    (r"^language_model\.(model\.|lm_head\.)", r"\1"),
    (r"^(image_encoder|prompt_encoder|mask_decoder|pixel_)", r"model.visual_model.\1"),  # a SAM checkpoint
    (r"^(encoder\.[0246]\.|proj\.|norm\.)(weight|bias)$", r"model.mask_encoder.\1\2"),  # the ICL mask encoder alone
)


def canonical(key: str) -> str:
    """The table's name of a source tensor."""
    for pattern, replacement in _ALIASES:
        key = re.sub(pattern, replacement, key)
    return key


def ignored(key: str) -> bool:
    """Whether a (canonical) source tensor is on the list of those that need no place."""
    return any(re.search(pattern, key) for pattern, _ in IGNORED)


def indices(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The values of every field of the table, for one model."""
    layers = tuple(range(config.llm.num_layers))
    if config.family == "bird":
        return {"vision": tuple(range(config.vit.num_layers)), "layer": layers}
    return {
        "vision": tuple(range(config.clip.num_layers)),
        "geometry": (0, 1),
        "layer": layers,
        "moe": config.moe_layers,
        "dense": tuple(i for i in layers if i not in config.moe_layers),
        "expert": tuple(range(config.moe.num_experts)),
        "block": tuple(range(config.mask.num_layers)),
        "point": (0, 1, 2, 3),
        "decoder": tuple(range(config.mask.decoder_layers)),
        "mask_token": tuple(range(config.mask.num_multimask + 1)),
        "hyper_layer": (0, 1, 2),
        "iou_layer": tuple(range(config.mask.iou_head_layers)),
    }


@dataclasses.dataclass(frozen=True)
class Entry:
    """One PyTorch tensor's place: `path` of the JAX parameter, `index` on its leading stacked axes (empty: all of
    it)."""

    key: str
    path: str
    index: tuple[int, ...]
    stack: tuple[int, ...]  # sizes of the stacked axes
    layout: Layout

    def torch_shape(self, param_shape: Shape) -> Shape:
        return self.layout.torch_shape(tuple(param_shape)[len(self.stack) :])

    def param_shape(self, torch_shape: Shape) -> Shape:
        return self.stack + self.layout.jax_shape(tuple(torch_shape))


def entries(config: ModelConfig, paths: Iterable[str]) -> dict[str, Entry]:
    """PyTorch name -> place, for every tensor of the parameters `paths` (joined by "/").

    Raises ValueError when a parameter has no row in the table.
    """
    wanted = set(paths)
    values = indices(config)
    found = {}
    for torch, jax, layout in _rows(config.family):
        layout = layout.of(config)
        fields = re.findall(r"{(\w+)}", torch)
        stacked = [field for field in fields if "{" + field + "}" not in jax]
        sizes = tuple(len(values[field]) for field in stacked)
        for choice in itertools.product(*(enumerate(values[field]) for field in fields)):
            place = dict(zip(fields, choice, strict=True))
            names = {field: number for field, (_, number) in place.items()}
            path = jax.format(**names)
            if path in wanted:
                key = torch.format(**names)
                found[key] = Entry(key, path, tuple(place[field][0] for field in stacked), sizes, layout)
    unknown = wanted - {entry.path for entry in found.values()}
    if unknown:
        raise ValueError(f"no PyTorch name is known for {len(unknown)} parameters: {_some(unknown)}")
    return found


def strict_plan(
    config: ModelConfig, param_shapes: Mapping[str, Shape], torch_shapes: Mapping[str, Shape]
) -> dict[str, Entry]:
    """Places of all source tensors, checked both ways.

    `param_shapes` path -> shape; `torch_shapes` canonical name -> shape. Raises ValueError listing names when a source
    tensor has no place and is not in `IGNORED`, when a parameter is not filled, or when a shape differs."""
    plan = entries(config, param_shapes)
    unused = [key for key in torch_shapes if key not in plan and not ignored(key)]
    missing = [key for key in plan if key not in torch_shapes]
    problems = []
    if unused:
        problems.append(f"{len(unused)} tensors of the source have no place in the model: {_some(unused)}")
    if missing:
        problems.append(f"{len(missing)} tensors of the model are not in the source: {_some(missing)}")
    for key, entry in plan.items():
        if key in torch_shapes and tuple(torch_shapes[key]) != entry.torch_shape(param_shapes[entry.path]):
            problems.append(
                f"{key}: expected shape {entry.torch_shape(param_shapes[entry.path])}, found {tuple(torch_shapes[key])}"
            )
    if problems:
        raise ValueError("\n".join(problems[:12] + [f"and {len(problems) - 12} more"] * (len(problems) > 12)))
    return plan


def unmerged_name(key: str, adapted: bool) -> str:
    """A tensor's name in PEFT's training-time layout; `adapted` says that the tensor has an adapter beside it."""
    key = re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", key)
    return "base_model.model." + (re.sub(r"\.(weight|bias)$", r".base_layer.\1", key) if adapted else key)


@functools.cache
def _rows(family: str) -> Table:
    """The family's table with alternatives written out, and for each kernel of the decoder the two low-rank factors
    beside it.
    """
    rows = []
    for torch, jax, layout in TABLES[family]:
        rows += [(t, j, layout) for t, j in zip(_alternatives(torch), _alternatives(jax), strict=True)]
    for torch, jax, layout in tuple(rows):
        if jax.startswith("llm/") and jax.endswith("/kernel"):
            stem, side = torch.removesuffix("weight"), jax.removesuffix("kernel")
            rows += [
                (stem + "lora_A.weight", side + "lora_a", LINEAR),
                (stem + "lora_B.weight", side + "lora_b", layout),
            ]
    return tuple(rows)


def _alternatives(name: str) -> list[str]:
    match = re.search(r"\[([^]]*)\]", name)
    return [name[: match.start()] + option + name[match.end() :] for option in match[1].split(",")] if match else [name]


def _some(names: Iterable[str], limit: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
