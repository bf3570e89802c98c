"""What a PyTorch checkpoint is, and the model's sizes: from the tensors themselves; from config.json only what no shape
tells."""

import functools
import math
import re

from medplib_jax.config.base import from_dict
from medplib_jax.config.model import (
    ClipConfig,
    IclConfig,
    LlmConfig,
    LoraConfig,
    MaskConfig,
    ModelConfig,
    MoeConfig,
    RegionConfig,
)

from . import mapping, qwen_vl
from .foreign_config import OWN, Foreign, Json
from .sizes import Shapes, check_agree, count, shape_of

# Parts of the model that a checkpoint of each kind must hold in full.
KINDS = {
    "medplib": ("clip", "projector", "region", "llm", "seg_mlp", "sam"),
    "llava": ("projector", "llm"),
    "clip": ("clip",),
    "sam_med2d": ("sam",),
    "llama": ("llm",),
    "lora": ("llm",),
    "qwen_vl": ("vit", "resampler", "post_norm", "proj", "llm"),
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
    ("transformer.visual.attn_pool.", "resampler"),
    ("transformer.visual.ln_post.", "post_norm"),
    ("transformer.visual.proj", "proj"),
    ("transformer.visual.", "vit"),
    ("transformer.", "llm"),
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
    if is_qwen(names):
        return "qwen_vl"
    if "llm" in parts:
        if any(".lora_A." in name for name in names):
            return "lora"
        return "medplib" if parts & {"sam", "seg_mlp", "region"} else "llava" if "projector" in parts else "llama"
    if parts & {"clip", "sam"}:
        return "clip" if "clip" in parts else "sam_med2d"
    raise ValueError(f"not a checkpoint of a known kind ({', '.join(KINDS)}): it holds {sorted(names)[:5]}")


def is_qwen(names) -> bool:
    return any(name.startswith("transformer.") for name in names)


def detect_config(shapes: Shapes, foreign: Foreign, lora_alpha: float | None = None) -> ModelConfig:
    """The model's sizes. `shapes` has canonical names; parts that it lacks keep the sizes of MedPLIB-7B.

    `lora_alpha` is that of adapters without an adapter_config.json. ValueError when a size is neither in a tensor nor
    in a file, or when files and tensors disagree."""
    if is_qwen(shapes):
        alpha = functools.partial(adapters_alpha, foreign=foreign, given=lora_alpha)
        return qwen_vl.detect_config(shapes, foreign, alpha)
    parts = {part_of(key) for key in shapes}
    own = foreign.own.get("model", {})
    sizes = {"region": _region(shapes, foreign), "icl": _icl(shapes, foreign)}
    if "clip" in parts:
        sizes["clip"] = _clip(shapes, foreign)
    if "llm" in parts:
        sizes["llm"], sizes["moe"] = _llm(shapes, foreign), _moe(shapes, foreign)
        sizes["lora"] = _lora(shapes, foreign, lora_alpha)
    if "sam" in parts:
        sizes["mask"] = _mask(shapes, foreign)
    return ModelConfig(**sizes, dtype=own.get("dtype", "float32"))


def _combined(kind: type, part: str, foreign: Foreign, found: Json, told: Json):
    """The part's configuration: what tensors tell (`found`), then our own record in config.json, then its other keys
    (`told`).

    ValueError when our own record disagrees with the tensors.
    """
    own = foreign.own.get("model", {}).get(part, {})
    check_agree(f"{OWN}.model.{part}", own, found)
    return from_dict(kind, told | own | found, f"config.json: {OWN}.model.{part}.")


def _region(shapes: Shapes, foreign: Foreign) -> RegionConfig:
    geometry = any(key.startswith("model.region_geo_sampler.") for key in shapes)
    told = {
        "max_points": foreign.language.get("max_sample_point", 512),
        "pooling": foreign.language.get("sampler_pooler_mode", "max"),
    }
    return _combined(RegionConfig, "region", foreign, {"sampler": "geometry" if geometry else "mean"}, told)


def _icl(shapes: Shapes, foreign: Foreign) -> IclConfig:
    """Which modules read examples, by their tensors; how many tokens they yield is in config.json alone.

    Modules may come from a source of their own, so that config.json need not know of them.
    """
    switches = (
        ("compressed_tokens", "model.mm_token_compressor.", "mm_token_compress", "mm_compressed_token_count", 256),
        ("mask_tokens", "model.mask_encoder.", "icl_mask_encoder", "mask_encoder_token_count", 64),
    )
    told = {}
    for field, prefix, switch, count_key, original in switches:
        there = any(key.startswith(prefix) for key in shapes)
        if foreign.language.get(switch) and not there:
            raise ValueError(f"config.json: {switch} is true, but no source has a tensor {prefix}*")
        told[field] = foreign.language.get(count_key, original) if there else 0
    if told["mask_tokens"]:
        told["masks"] = "separate"
    return _combined(IclConfig, "icl", foreign, {}, told)


def _clip(shapes: Shapes, foreign: Foreign) -> ClipConfig:
    vision, language = foreign.vision, foreign.language
    patch = shape_of(shapes, _CLIP + "embeddings.patch_embedding.weight")
    positions = shape_of(shapes, _CLIP + "embeddings.position_embedding.weight")[0]
    found = {
        "hidden_size": patch[0],
        "image_size": math.isqrt(positions - 1) * patch[2],
        "patch_size": patch[2],
        "num_layers": count(shapes, _CLIP + r"encoder.layers\.(\d+)\."),
        "mlp_dim": shape_of(shapes, _CLIP + "encoder.layers.0.mlp.fc1.weight")[0],
    }
    told = {
        "num_heads": vision.get("num_attention_heads"),
        "layer_norm_eps": vision.get("layer_norm_eps", 1e-5),
        "select_layer": language.get("mm_vision_select_layer", language.get("vision_feature_layer", -2)),
    }
    same = {name: found[name] for name in ("hidden_size", "image_size", "patch_size")}
    check_agree(
        "CLIP", vision, same | {"num_hidden_layers": found["num_layers"], "intermediate_size": found["mlp_dim"]}
    )
    return _combined(ClipConfig, "clip", foreign, found, _complete("CLIP", told, foreign.own, "clip"))


def _complete(what: str, told: Json, own: Json, part: str) -> Json:
    """`told` without the number of heads where only our own record has it. ValueError when nothing has."""
    heads = own.get("model", {}).get(part, {}).get("num_heads")
    if told["num_heads"] is None and heads is None:
        raise ValueError(
            f"{what}: the number of heads is in no tensor; give the folder with its config.json (--config)"
        )
    if None not in (told["num_heads"], heads) and told["num_heads"] != heads:
        raise ValueError(f"{what}: num_attention_heads {told['num_heads']}, but {OWN}.model.{part}.num_heads {heads}")
    return told


def _llm(shapes: Shapes, foreign: Foreign) -> LlmConfig:
    language = foreign.language
    vocab, hidden = shape_of(shapes, "model.embed_tokens.weight")
    mlp = next((shape[0] for key, shape in shapes.items() if key.endswith(".gate_proj.weight")), None)
    if mlp is None:
        raise ValueError("the language model has no tensor ending in '.gate_proj.weight': its MLP's width is unknown")
    told = {
        "num_heads": language.get("num_attention_heads"),
        "rope_theta": language.get("rope_theta", 10000.0),
        "rms_norm_eps": language.get("rms_norm_eps", 1e-5),
        "max_positions": language.get("max_position_embeddings", 4096),
    }
    told = _complete("the language model", told, foreign.own, "llm")
    heads = told["num_heads"] or foreign.own["model"]["llm"]["num_heads"]
    found = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_layers": count(shapes, r"model\.layers\.(\d+)\."),
        "num_kv_heads": shape_of(shapes, "model.layers.0.self_attn.k_proj.weight")[0] * heads // hidden,
        "mlp_dim": mlp,
    }
    same = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": found["num_layers"],
        "intermediate_size": mlp,
        "num_key_value_heads": found["num_kv_heads"],
    }
    check_agree("the language model", language, same)
    return _combined(LlmConfig, "llm", foreign, found, told)


def _moe(shapes: Shapes, foreign: Foreign) -> MoeConfig:
    layers = tuple(sorted({int(match[1]) for key in shapes if (match := re.match(_MOE, key))}))
    if not layers:
        return _combined(MoeConfig, "moe", foreign, {"num_experts": 0}, {})
    written = foreign.language.get("moe", {})
    experts = count(shapes, _MOE + r"experts\.deepspeed_experts\.(\d+)\.")
    if set(written.get("num_experts", [experts])) != {experts}:
        raise ValueError(
            f"config.json: moe.num_experts {written['num_experts']} disagrees with the tensors: {experts} experts"
        )
    if tuple(written.get("moe_layers_idx") or layers) != layers:
        raise ValueError(
            f"config.json: moe.moe_layers_idx {written['moe_layers_idx']} disagrees with the tensors: layers {layers}"
        )
    total = count(shapes, r"model\.layers\.(\d+)\.")
    own = foreign.own.get("model", {}).get("moe", {})
    names = (own.get("layers", "dense"), "dense", "sparse", "first_half", "second_half")
    named = (name for name in names if MoeConfig(1, layers=name).layer_indices(total) == layers)
    found = {
        "num_experts": experts,
        "layers": next(named, layers),
        "residual": any(".mlp.coefficient." in key for key in shapes),
    }
    told = {
        "top_k": written.get("top_k_experts", 1),
        "capacity_factor": written.get("capacity_factor", 1.5),
        "eval_capacity_factor": written.get("eval_capacity_factor", 2.0),
        "min_capacity": written.get("min_capacity", 0),
        "aux_loss_weight": written.get("router_aux_loss_coef", 0.0),
    }
    return _combined(MoeConfig, "moe", foreign, found, told)


def _lora(shapes: Shapes, foreign: Foreign, alpha: float | None) -> LoraConfig:
    adapters = {key: shape for key, shape in shapes.items() if key.endswith(".lora_A.weight")}
    ranks = {shape[0] for shape in adapters.values()}
    if len(ranks) > 1:
        raise ValueError(f"adapters of several ranks ({sorted(ranks)}) in one checkpoint are not supported")
    if not ranks:
        return LoraConfig()
    rank, written = ranks.pop(), foreign.adapter
    check_agree("the adapters (adapter_config.json)", written, {"r": rank})
    targets = {re.search(r"(\w+)_proj\.lora_A\.weight$", key)[1] for key in adapters}
    found = {"rank": rank, "alpha": adapters_alpha(rank, foreign, alpha), "targets": tuple(sorted(targets))}
    return _combined(LoraConfig, "lora", foreign, found, {"dropout": written.get("lora_dropout", 0.0)})


def adapters_alpha(rank: int, foreign: Foreign, given: float | None) -> float:
    """What is divided by the rank and scales an adapter: from adapter_config.json, our own record or `given`, which
    must agree. ValueError when nothing says it."""
    written = foreign.adapter.get("lora_alpha")
    if written is not None and foreign.adapter.get("use_rslora"):
        written *= math.sqrt(rank)  # PEFT divides by the root of the rank then
    alphas = (given, written, foreign.own.get("model", {}).get("lora", {}).get("alpha"))
    known = {float(alpha) for alpha in alphas if alpha is not None}
    if len(known) != 1:
        raise ValueError(
            "the adapters' alpha is in no tensor: expected one value from adapter_config.json or --lora_alpha "
            f"(MedPLIB trains with 16), found {sorted(known) or 'none'}"
        )
    return known.pop()


def _mask(shapes: Shapes, foreign: Foreign) -> MaskConfig:
    """With a SEG MLP, the original has trained it, on masks whose padding it cut away by its own rule, unless
    config.json says other. SAM's own files tell no number of heads in the decoder, because all of them have 8."""
    trained = any(part_of(key) == "seg_mlp" for key in shapes)
    encoder, decoder = _SAM + "image_encoder.", _SAM + "mask_decoder."
    patch = shape_of(shapes, encoder + "patch_embed.proj.weight")
    grid = shape_of(shapes, encoder + "pos_embed")[1]
    layers = count(shapes, re.escape(encoder) + r"blocks\.(\d+)\.")
    spans = [(shape_of(shapes, f"{encoder}blocks.{i}.attn.rel_pos_h")[0] + 1) // 2 for i in range(layers)]
    hidden, head_dim = patch[0], shape_of(shapes, encoder + "blocks.0.attn.rel_pos_h")[1]
    found = {
        "image_size": grid * patch[2],
        "patch_size": patch[2],
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": hidden // head_dim,
        "adapter": any(".Adapter." in key for key in shapes),
        "out_dim": shape_of(shapes, encoder + "neck.0.weight")[0],
        "mask_in_dim": shape_of(shapes, _SAM + "prompt_encoder.mask_downscaling.3.weight")[0],
        "decoder_layers": count(shapes, re.escape(decoder) + r"transformer\.layers\.(\d+)\."),
        "decoder_mlp_dim": shape_of(shapes, decoder + "transformer.layers.0.mlp.lin1.weight")[0],
        "num_multimask": shape_of(shapes, decoder + "mask_tokens.weight")[0] - 1,
        "iou_head_layers": count(shapes, re.escape(decoder) + r"iou_prediction_head\.layers\.(\d+)\."),
        "iou_head_dim": shape_of(shapes, decoder + "iou_prediction_head.layers.0.weight")[0],
    }
    windows = {"window_size": min(spans), "global_layers": tuple(i for i, span in enumerate(spans) if span == grid)}
    told = {"unpad": foreign.language.get("mask_unpad", "reference") if trained else "exact"}
    if min(spans) == grid:  # one window or all of the picture: the tensors are the same
        return _combined(MaskConfig, "mask", foreign, found, told | windows)
    return _combined(MaskConfig, "mask", foreign, found | windows, told)
