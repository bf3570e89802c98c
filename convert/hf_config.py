"""The Hugging Face files around the original's weights: config.json, tokenizer and preprocessor settings."""

import json
import pathlib

import numpy as np

from convert import vocabulary
from convert.kinds import Json, read_json
from medplib_jax.config.model import ModelConfig

# Settings of the released model that no size of ours decides (config.json of MedPLIB-7b-2e).
_DEFAULTS: Json = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "freeze_mm_mlp_adapter": True,
    "image_aspect_ratio": "square",
    "image_grid_pinpoints": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": True,
    "mm_vision_select_feature": "patch",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "vision_tower": "openai/clip-vit-large-patch14-336",
    "pretraining_tp": 1,
    "region_fea_adapter": True,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "train_mask_decoder": True,
    "tune_mm_mlp_adapter": False,
    "use_cache": True,
}
_GENERATION: Json = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SPECIAL = {
    name: {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    for name, text in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
}
_TOKENIZER: Json = {
    **{name: {"__type": "AddedToken", **token} for name, token in _SPECIAL.items()},
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "legacy": True,
    "model_max_length": 1024,
    "pad_token": None,
    "padding_side": "right",
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
}


def model_json(config: ModelConfig, carried: Json, dtype: np.dtype) -> Json:
    """config.json for the original program: sizes from `config`, the rest from the `carried` file of the source, else
    defaults."""
    llm, moe_layers = config.llm, config.moe_layers
    written = _DEFAULTS | carried
    written |= {
        "architectures": ["MedPLIBForCausalLM" if moe_layers else "LISAForCausalLM"],
        "model_type": "medplib_moe_llama" if moe_layers else "medplib",
        "hidden_size": llm.hidden_size,
        "intermediate_size": llm.mlp_dim,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "num_hidden_layers": llm.num_layers,
        "max_position_embeddings": llm.max_positions,
        "rms_norm_eps": llm.rms_norm_eps,
        "vocab_size": llm.vocab_size,
        "mm_hidden_size": config.clip.hidden_size,
        "mm_vision_select_layer": config.clip.select_layer,
        "region_geo_sampler": config.region.sampler == "geometry",
        "max_sample_point": config.region.max_points,
        "sampler_pooler_mode": config.region.pooling,
        "out_dim": config.mask.out_dim,
        "mask_unpad": config.mask.unpad,  # read by `from_torch` alone
        "torch_dtype": str(dtype),
    }
    if llm.rope_theta != 10000.0 or "rope_theta" in carried:  # transformers 4.31 does not write it
        written["rope_theta"] = llm.rope_theta
    if moe_layers:
        written["moe"] = carried.get("moe", {}) | _moe_json(config)
    return dict(sorted(written.items()))


def _moe_json(config: ModelConfig) -> Json:
    moe, layers = config.moe, config.moe_layers
    return {
        "moe_enable": True,
        "moe_mode": moe.layers if isinstance(moe.layers, str) else "dense",
        "moe_layers_idx": list(layers),
        "num_experts": [moe.num_experts] * len(layers),
        "ep_size": 1,
        "top_k_experts": moe.top_k,
        "capacity_factor": moe.capacity_factor,
        "eval_capacity_factor": moe.eval_capacity_factor,
        "min_capacity": moe.min_capacity,
        "use_residual": moe.residual,
        "router_aux_loss_coef": moe.aux_loss_weight,
    }


def preprocessor_json(config: ModelConfig) -> Json:
    """preprocessor_config.json of CLIP at the model's image size."""
    size = config.clip.image_size
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def write_files(
    folder: pathlib.Path, config: ModelConfig, side: pathlib.Path, tokenizer: pathlib.Path, dtype: np.dtype
) -> None:
    """Writes all files around the weights into `folder`. `side` holds the source's own, where there was one."""
    _write(folder / "config.json", model_json(config, read_json(side / "config.json"), dtype))
    _write(folder / "generation_config.json", read_json(side / "generation_config.json") or _GENERATION)
    _write(
        folder / "preprocessor_config.json", read_json(side / "preprocessor_config.json") or preprocessor_json(config)
    )
    vocabulary.copy_tokenizer(tokenizer, folder)
    for name, content in (
        ("tokenizer_config.json", _TOKENIZER),
        ("special_tokens_map.json", _SPECIAL | {"pad_token": "<unk>"}),
    ):
        if not (folder / name).exists():
            _write(folder / name, content)


def _write(path: pathlib.Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
