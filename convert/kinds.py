"""What a PyTorch checkpoint is, and the model's sizes: from the tensors themselves; from config.json only what no shape
tells."""

import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from convert import mapping
from medplib_jax.config.model import ClipConfig, LlmConfig, LoraConfig, MaskConfig, ModelConfig, MoeConfig, RegionConfig

Shapes = Mapping[str, tuple[int, ...]]
Json = dict[str, Any]

# Parts of the model that a checkpoint of each kind must hold in full.
KINDS = {
    "medplib": ("clip", "projector", "region", "llm", "seg_mlp", "sam"),
    "llava": ("projector", "llm"),
    "clip": ("clip",),
    "sam_med2d": ("sam",),
    "llama": ("llm",),
    "lora": ("llm",),
}
_PART_OF = (
    ("model.vision_tower.", "clip"),
    ("model.mm_projector.", "projector"),
    ("model.region_", "region"),
    ("model.visual_model.", "sam"),
    ("model.text_hidden_fcs.", "seg_mlp"),
    ("model.mm_token_compressor.", "icl"),
    ("model.mask_encoder.", "icl"),
    ("model.", "llm"),
    ("lm_head.", "llm"),
)
_CLIP = "model.vision_tower.vision_tower.vision_model."
_SAM = "model.visual_model."
_MOE = r"model\.layers\.(\d+)\.mlp\.deepspeed_moe\."


def part_of(key: str) -> str | None:
    """The model's part that a (canonical) tensor belongs to."""
    return next((part for prefix, part in _PART_OF if key.startswith(prefix)), None)


def detect_kind(names) -> str:
    """The kind of a checkpoint by its canonical names. ValueError when nothing in it is known."""
    parts = {part_of(name) for name in names if not mapping.ignored(name)}
    if "llm" in parts:
        if any(".lora_A." in name for name in names):
            return "lora"
        return "medplib" if parts & {"sam", "seg_mlp", "region"} else "llava" if "projector" in parts else "llama"
    if parts & {"clip", "sam"}:
        return "clip" if "clip" in parts else "sam_med2d"
    raise ValueError(f"not a checkpoint of a known kind ({', '.join(KINDS)}): it holds {sorted(names)[:5]}")


def read_json(path: pathlib.Path) -> Json:
    """A JSON file's content, {} when there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def detect_config(shapes: Shapes, language: Json, vision: Json, lora_alpha: float) -> ModelConfig:
    """The model's sizes. `shapes` has canonical names; parts that it lacks keep the sizes of MedPLIB-7B.

    `language` and `vision` are the config.json of the language model and of CLIP. Raises ValueError when a size is in
    neither, or when config.json and the tensors disagree."""
    parts = {part_of(key) for key in shapes}
    sizes = {}
    if "clip" in parts:
        sizes["clip"] = _clip(shapes, vision, language)
    if "llm" in parts:
        sizes["llm"], sizes["moe"] = _llm(shapes, language), _moe(shapes, language)
        sizes["lora"] = _lora(shapes, lora_alpha)
    if "sam" in parts:
        sizes["mask"] = _mask(shapes, language)
    sizes["region"] = RegionConfig(
        sampler="geometry" if any(key.startswith("model.region_geo_sampler.") for key in shapes) else "mean",
        max_points=language.get("max_sample_point", 512),
        pooling=language.get("sampler_pooler_mode", "max"),
    )
    return ModelConfig(**sizes)


def _clip(shapes: Shapes, vision: Json, language: Json) -> ClipConfig:
    vision = vision.get("vision_config", vision)
    patch = _shape(shapes, _CLIP + "embeddings.patch_embedding.weight")
    positions = _shape(shapes, _CLIP + "embeddings.position_embedding.weight")[0]
    hidden = patch[0]
    heads = vision.get("num_attention_heads") or (hidden // 64 if hidden % 64 == 0 else None)
    if heads is None:
        raise ValueError(
            f"CLIP of width {hidden}: the number of heads is in no tensor; "
            "give the folder with CLIP's config.json (--config)"
        )
    config = ClipConfig(
        image_size=math.isqrt(positions - 1) * patch[2],
        patch_size=patch[2],
        hidden_size=hidden,
        num_layers=_count(shapes, _CLIP + r"encoder.layers\.(\d+)\."),
        num_heads=heads,
        mlp_dim=_shape(shapes, _CLIP + "encoder.layers.0.mlp.fc1.weight")[0],
        select_layer=language.get("mm_vision_select_layer", language.get("vision_feature_layer", -2)),
        layer_norm_eps=vision.get("layer_norm_eps", 1e-5),
    )
    found = {
        "hidden_size": hidden,
        "num_hidden_layers": config.num_layers,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }
    _agree("CLIP", vision, found)
    return config


def _llm(shapes: Shapes, language: Json) -> LlmConfig:
    vocab, hidden = _shape(shapes, "model.embed_tokens.weight")
    mlp = next((shape[0] for key, shape in shapes.items() if key.endswith(".gate_proj.weight")), None)
    if mlp is None:
        raise ValueError("the language model has no tensor ending in '.gate_proj.weight': its MLP's width is unknown")
    language = language.get("text_config", language)
    if "num_attention_heads" not in language:
        raise ValueError(
            "the language model's number of heads is in no tensor; give the folder with its config.json (--config)"
        )
    heads = language["num_attention_heads"]
    kv_heads = _shape(shapes, "model.layers.0.self_attn.k_proj.weight")[0] * heads // hidden
    layers = _count(shapes, r"model\.layers\.(\d+)\.")
    found = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": mlp,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }
    _agree("the language model", language, found)
    if language.get("rope_scaling"):
        raise ValueError(f"config.json: rope_scaling {language['rope_scaling']} is not supported")
    return LlmConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_dim=mlp,
        rope_theta=float(language.get("rope_theta", 10000.0)),
        rms_norm_eps=language.get("rms_norm_eps", 1e-5),
        max_positions=language.get("max_position_embeddings", 4096),
    )


def _moe(shapes: Shapes, language: Json) -> MoeConfig:
    layers = tuple(sorted({int(match[1]) for key in shapes if (match := re.match(_MOE, key))}))
    if not layers:
        return MoeConfig()
    written = language.get("moe", {})
    experts = _count(shapes, _MOE + r"experts\.deepspeed_experts\.(\d+)\.")
    if set(written.get("num_experts", [experts])) != {experts}:
        raise ValueError(
            f"config.json: moe.num_experts {written['num_experts']} disagrees with the tensors: {experts} experts"
        )
    if tuple(written.get("moe_layers_idx") or layers) != layers:
        raise ValueError(
            f"config.json: moe.moe_layers_idx {written['moe_layers_idx']} disagrees with the tensors: layers {layers}"
        )
    count = _count(shapes, r"model\.layers\.(\d+)\.")
    named = (
        name
        for name in ("dense", "sparse", "first_half", "second_half")
        if MoeConfig(1, layers=name).layer_indices(count) == layers
    )
    return MoeConfig(
        num_experts=experts,
        top_k=written.get("top_k_experts", 1),
        layers=next(named, layers),
        capacity_factor=written.get("capacity_factor", 1.5),
        eval_capacity_factor=written.get("eval_capacity_factor", 2.0),
        min_capacity=written.get("min_capacity", 0),
        residual=any(".mlp.coefficient." in key for key in shapes),
        aux_loss_weight=written.get("router_aux_loss_coef", 0.0),
    )


def _lora(shapes: Shapes, alpha: float) -> LoraConfig:
    adapters = {key: shape for key, shape in shapes.items() if key.endswith(".lora_A.weight")}
    ranks = {shape[0] for shape in adapters.values()}
    if len(ranks) > 1:
        raise ValueError(f"adapters of several ranks ({sorted(ranks)}) in one checkpoint are not supported")
    if not ranks:
        return LoraConfig()
    targets = {re.search(r"(\w+)_proj\.lora_A\.weight$", key)[1] for key in adapters}
    return LoraConfig(rank=ranks.pop(), alpha=alpha, targets=tuple(sorted(targets)))


def _mask(shapes: Shapes, language: Json) -> MaskConfig:
    """With a SEG MLP, the original has trained it, on masks whose padding it cut away by its own rule, unless
    config.json says other."""
    trained = any(part_of(key) == "seg_mlp" for key in shapes)
    encoder, decoder = _SAM + "image_encoder.", _SAM + "mask_decoder."
    patch = _shape(shapes, encoder + "patch_embed.proj.weight")
    grid = _shape(shapes, encoder + "pos_embed")[1]
    layers = _count(shapes, re.escape(encoder) + r"blocks\.(\d+)\.")
    spans = [(_shape(shapes, f"{encoder}blocks.{i}.attn.rel_pos_h")[0] + 1) // 2 for i in range(layers)]
    hidden, head_dim = patch[0], _shape(shapes, encoder + "blocks.0.attn.rel_pos_h")[1]
    return MaskConfig(
        image_size=grid * patch[2],
        patch_size=patch[2],
        hidden_size=hidden,
        num_layers=layers,
        num_heads=hidden // head_dim,
        window_size=min(spans),
        global_layers=tuple(i for i, span in enumerate(spans) if span == grid),
        adapter=any(".Adapter." in key for key in shapes),
        out_dim=_shape(shapes, encoder + "neck.0.weight")[0],
        mask_in_dim=_shape(shapes, _SAM + "prompt_encoder.mask_downscaling.3.weight")[0],
        decoder_layers=_count(shapes, re.escape(decoder) + r"transformer\.layers\.(\d+)\."),
        decoder_mlp_dim=_shape(shapes, decoder + "transformer.layers.0.mlp.lin1.weight")[0],
        num_multimask=_shape(shapes, decoder + "mask_tokens.weight")[0] - 1,
        iou_head_layers=_count(shapes, re.escape(decoder) + r"iou_prediction_head\.layers\.(\d+)\."),
        iou_head_dim=_shape(shapes, decoder + "iou_prediction_head.layers.0.weight")[0],
        unpad=language.get("mask_unpad", "reference") if trained else "exact",
    )


def _shape(shapes: Shapes, key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise ValueError(f"tensor {key!r} is missing, the model's sizes cannot be read")
    return shapes[key]


def _count(shapes: Shapes, pattern: str) -> int:
    """How many values the last group of `pattern` takes."""
    return len({match[match.lastindex] for key in shapes if (match := re.match(pattern, key))})


def _agree(what: str, written: Json, found: Json) -> None:
    for name, value in found.items():
        if written.get(name, value) != value:
            raise ValueError(f"config.json of {what}: {name} {written[name]} disagrees with the tensors: {value}")
