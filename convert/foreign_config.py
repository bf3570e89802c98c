"""The JSON files beside foreign weights, and a ruling on each of their keys.

A key is used (`kinds` reads it), harmless, or has the one value that this model computes with. Every other key or value
is an error by name, so that nothing that changes the arithmetic is passed over. Defaults of keys that a file leaves out
are those of transformers' class for its `model_type`."""

import dataclasses
import json
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import transformers

Json = dict[str, Any]

OWN = "medplib_jax"  # key of config.json under which `to_torch` writes what no tensor and no foreign key tells
# model_type -> transformers' class whose keys and defaults it has
LANGUAGE_CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "llava": transformers.LlamaConfig,  # the original LLaVA's own; Hugging Face's has a text_config
    "llava_llama": transformers.LlamaConfig,
    "llava_mistral": transformers.MistralConfig,
    "medplib": transformers.LlamaConfig,
    "medplib_moe_llama": transformers.LlamaConfig,
}
RELEASED_TOWERS = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "image_size": 336,
        "layer_norm_eps": 1e-5,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    }
}
OF_TRANSFORMERS = frozenset(  # about training, generation and files; older versions wrote them into every config.json
    {*transformers.PreTrainedConfig().to_dict(), *transformers.GenerationConfig().to_dict()}
    | set(
        """
        bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class torch_dtype
        initializer_range initializer_factor use_cache pretraining_tp gradient_checkpointing add_cross_attention
        cross_attention_hidden_size is_decoder tie_encoder_decoder pruned_heads torchscript tf_legacy_loss use_bfloat16
        finetuning_task task_specific_params prefix do_sample early_stopping forced_bos_token_id forced_eos_token_id
        suppress_tokens begin_suppress_tokens typical_p diversity_penalty num_beam_groups
        exponential_decay_length_penalty _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
        _commit_hash
        """.split()
    )
)


@dataclasses.dataclass(frozen=True)
class Keys:
    """The ruling on one sort of file."""

    used: frozenset[str]
    harmless: frozenset[str]
    only: dict[str, tuple]  # key -> the values that this model computes with

    def check(self, file: str, written: Json, ignored: Collection[str]) -> None:
        """ValueError naming the first key that is not known, or whose value this model does not compute with."""
        for key, value in written.items():
            if key in self.used or key in self.harmless or key in OF_TRANSFORMERS or key in ignored:
                continue
            if key not in self.only:
                raise ValueError(
                    f"{file}: key {key!r} ({json.dumps(value)[:80]}) is not known, and may change what the model "
                    f"computes; if it does not, pass --ignore_key {key}"
                )
            if value not in self.only[key]:
                allowed = " or ".join(json.dumps(one) for one in self.only[key])
                raise ValueError(f"{file}: {key} {json.dumps(value)[:80]} is not supported, only {allowed}")


LANGUAGE = Keys(
    used=frozenset(
        f"""
        {OWN} model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings rope_theta rope_scaling
        rope_parameters sliding_window use_sliding_window layer_types mm_vision_tower mm_vision_select_layer
        vision_feature_layer text_config vision_config image_token_index mask_unpad max_sample_point sampler_pooler_mode
        moe icl_mask_encoder mask_encoder_token_count mm_token_compress mm_compressed_token_count
        """.split()
    ),
    # What was trained and how it was prompted; sizes that tensors tell.
    harmless=frozenset(
        """
        freeze_mm_mlp_adapter freeze_mm_vision_resampler tune_mm_mlp_adapter tune_mm_vision_resampler
        pretrain_mm_mlp_adapter unfreeze_mm_vision_tower mm_projector_lr mm_vision_tower_lr use_mm_proj
        mm_use_im_patch_token mm_use_im_start_end image_aspect_ratio tokenizer_model_max_length tokenizer_padding_side
        vision_tower mm_resampler_type train_mask_decoder ignore_index
        mm_hidden_size out_dim region_fea_adapter region_geo_sampler image_seq_length projection_dim
        """.split()
    ),
    only={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "attention_dropout": (0.0, None),
        "partial_rotary_factor": (1.0, None),
        "quantization_config": (None,),
        "image_grid_pinpoints": (None, []),
        "mm_patch_merge_type": ("flat", None),
        "mm_projector_type": ("mlp2x_gelu", None),
        "mm_vision_select_feature": ("patch", None),
        "multimodal_projector_bias": (True,),
        "projector_hidden_act": ("gelu",),
        "vision_feature_select_strategy": ("default",),
    },
)
QWEN = Keys(
    used=frozenset(
        f"""
        {OWN} model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads kv_channels
        max_position_embeddings layer_norm_epsilon rotary_emb_base seq_length use_dynamic_ntk use_logn_attn visual
        """.split()
    ),
    harmless=frozenset("auto_map bf16 fp16 fp32 onnx_safe tokenizer_type use_flash_attn softmax_in_fp32".split()),
    only={
        "attn_dropout_prob": (0.0,),
        "emb_dropout_prob": (0.0,),
        "no_bias": (True,),
        "rotary_pct": (1.0,),
        "scale_attn_weights": (True,),
        "tie_word_embeddings": (False,),
        "quantization_config": (None,),
        "use_cache_quantization": (False,),
        "use_cache_kernel": (False,),
    },
)
VISION = Keys(
    used=frozenset(
        """
        model_type hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size
        layer_norm_eps
        """.split()
    ),
    harmless=frozenset({"projection_dim", "vocab_size", "tie_word_embeddings"}),  # of CLIP's text side
    only={
        "hidden_act": ("quick_gelu",),
        "num_channels": (3,),
        "attention_dropout": (0.0, None),
        "dropout": (0.0, None),
    },
)
ADAPTER = Keys(
    used=frozenset("r lora_alpha lora_dropout use_rslora base_model_name_or_path target_modules".split()),
    harmless=frozenset(  # the last line: used in training only
        """
        auto_mapping inference_mode revision task_type init_lora_weights exclude_modules layers_to_transform
        layers_pattern modules_to_save peft_version ensure_weight_tying
        corda_config eva_config loftq_config megatron_core qalora_group_size
        """.split()
    ),
    only={"peft_type": ("LORA",), "bias": ("none",)},
)
PIXELS = {
    "do_normalize": True,
    "do_rescale": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "rescale_factor": 1 / 255,
}
# Variants of LoRA with other arithmetic (use_dora, rank_pattern, fan_in_fan_out, ...) have a switch each, off in a
# plain adapter.
OFF = (None, False, {}, [])


@dataclasses.dataclass(frozen=True)
class Foreign:
    """What the files beside the weights say, checked. {} and None: there is no such file."""

    language: Json
    vision: Json
    adapter: Json
    own: Json
    side: pathlib.Path | None  # folder of the language model's config.json


def read_json(path: pathlib.Path) -> Json:
    """A JSON file's content, {} when there is none. ValueError when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}") from error


def read_foreign(folders: Sequence[pathlib.Path], ignored: Collection[str] = ()) -> Foreign:
    """The configurations in `folders`; of each sort the first counts. CLIP's may lie where `mm_vision_tower` points.

    ValueError for a key that is not known and not in `ignored`, and for a value that this model does not compute with.
    """
    language, vision, adapter, side = {}, {}, {}, None
    for folder in folders:
        found = read_json(folder / "config.json")
        adapter = adapter or _adapter(folder / "adapter_config.json", ignored)
        for name in ("preprocessor_config.json", "processor_config.json"):
            _check_pixels(folder / name, read_json(folder / name), ignored)
        if found.get("model_type", "").startswith("clip"):
            vision = vision or _vision(folder / "config.json", found, ignored)
        elif found and not language:
            language, side = _language(folder / "config.json", found, ignored), folder
            if "vision_config" in found:
                vision = vision or _vision(folder / "config.json", found["vision_config"], ignored)
    tower = language.get("mm_vision_tower")
    for base in (side, side.parent, pathlib.Path()) if side and tower else ():
        file = base / tower / "config.json"
        vision = vision or _vision(file, read_json(file), ignored)
    vision = vision or RELEASED_TOWERS.get(tower, {})
    return Foreign(language, vision, adapter, language.get(OWN, {}), side)


def _language(file: pathlib.Path, found: Json, ignored: Collection[str]) -> Json:
    """One flat dictionary: what holds for pictures and text together, and the language model's part."""
    if found.get("model_type") == "qwen":
        QWEN.check(str(file), found, ignored)
        return found
    text = found.get("text_config", {})
    for part in (found, text):
        LANGUAGE.check(str(file), part, ignored)
    outer = {key: value for key, value in found.items() if key not in ("text_config", "vision_config")}
    text = text or outer
    kind = text.get("model_type")
    if kind is not None and kind not in LANGUAGE_CLASSES:
        raise ValueError(f"{file}: model_type {kind!r} is not supported, only {', '.join(LANGUAGE_CLASSES)}")
    filled = _with_defaults(file, LANGUAGE_CLASSES[kind], text) if kind else text
    _check_attention(file, filled)
    return outer | filled | {"rope_theta": _rope_theta(file, filled)}


def _with_defaults(file: pathlib.Path, kind: type[transformers.PreTrainedConfig], written: Json) -> Json:
    sizes = {key: value for key, value in written.items() if key not in OF_TRANSFORMERS and key not in (OWN, "moe")}
    try:
        return written | kind(**sizes).to_dict()
    except Exception as error:  # whatever transformers raises for values of a wrong type
        raise ValueError(f"{file}: transformers' {kind.__name__} refuses it: {' '.join(str(error).split())}") from error


def _check_attention(file: pathlib.Path, config: Json) -> None:
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings", 0)
    if window is not None and window < longest and config.get("use_sliding_window", True):
        raise ValueError(
            f"{file}: sliding_window {window} is not supported (only null, or at least {longest} positions)"
        )
    if set(config.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        raise ValueError(f"{file}: layer_types {config['layer_types']} are not supported, only full_attention")
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if heads and width and config.get("head_dim") not in (None, width // heads):
        raise ValueError(f"{file}: head_dim {config['head_dim']} is not supported, only {width} / {heads}")


def _rope_theta(file: pathlib.Path, config: Json) -> float:
    """The base of the rotary angles. transformers 5 has it in `rope_parameters`, before it stood beside
    `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    plain = {"rope_theta", "rope_type", "type"}
    if rope.get("rope_type", rope.get("type", "default")) != "default" or not plain >= set(rope):
        raise ValueError(f"{file}: rotary angles {json.dumps(rope)} are not supported, only rope_type default")
    return float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))


def _vision(file: pathlib.Path, found: Json, ignored: Collection[str]) -> Json:
    found = found.get("vision_config", found)  # a whole CLIP has a text side too
    if not found:
        return {}
    if found.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise ValueError(f"{file}: vision model_type {found['model_type']!r} is not supported, only clip_vision_model")
    VISION.check(str(file), found, ignored)
    return _with_defaults(file, transformers.CLIPVisionConfig, found) if "model_type" in found else found


def _check_pixels(file: pathlib.Path, found: Json, ignored: Collection[str]) -> None:
    """ValueError for pixels that are scaled otherwise than CLIP's; sizes and cropping are those of this project's
    data."""
    found = found.get("image_processor", found)
    for key, value in PIXELS.items():
        if key not in ignored and not np.allclose(found.get(key, value), value, rtol=0, atol=1e-6):
            raise ValueError(f"{file}: {key} {json.dumps(found[key])} is not supported, only {json.dumps(value)}")


def _adapter(file: pathlib.Path, ignored: Collection[str]) -> Json:
    found = read_json(file)
    off = {key for key, value in found.items() if value in OFF}
    ADAPTER.check(str(file), found, {*ignored, *(off - {"r", "lora_alpha"})})
    return found
