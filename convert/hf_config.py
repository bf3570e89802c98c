"""The Hugging Face files around the original's weights: config.json, tokenizer and preprocessor settings.

The original runs on transformers 4.31. Where that knows other keys than the installed version (rotary angles, the slow
tokenizer, image processors by name), the files are written here by hand.
"""

import dataclasses
import json
import pathlib

import numpy as np
import transformers

from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.config.model import ClipConfig, ModelConfig

from . import qwen_vl, vocabulary
from .foreign_config import OWN, RELEASED_TOWERS, Json, read_json

TOWER_FOLDER = "clip"  # beside config.json: the description of a vision tower that is not a released one
_PARTS = {
    "clip": "clip",
    "llm": "llm",
    "moe": "llm",
    "mask": "sam",
    "region": "region",
    "icl": "icl",
}  # field -> part of the parameters

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


def model_json(config: ModelConfig, carried: Json, dtype: np.dtype, own: Json | None = None) -> Json:
    """config.json for the original program: sizes from `config`, the rest from the `carried` file of the source, else
    defaults. `own` is our record of what no other key tells, see `own_json`."""
    llm, moe_layers = config.llm, config.moe_layers
    written = _DEFAULTS | ({} if "text_config" in carried else carried)
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
        "tie_word_embeddings": False,  # embedding and head are written each
        "vocab_size": llm.vocab_size,
        "mm_hidden_size": config.clip.hidden_size,
        "mm_vision_select_layer": config.clip.select_layer,
        "region_geo_sampler": config.region.sampler == "geometry",
        "max_sample_point": config.region.max_points,
        "sampler_pooler_mode": config.region.pooling,
        "out_dim": config.mask.out_dim,
        "torch_dtype": str(dtype),
    }
    if not _is_released(config.clip, written["mm_vision_tower"]):
        written |= {"mm_vision_tower": TOWER_FOLDER, "vision_tower": TOWER_FOLDER}
    for newer in ("rope_parameters", "mask_unpad"):  # the former is transformers 5's, the latter is in our record
        written.pop(newer, None)
    if llm.rope_theta != 10000.0 or "rope_theta" in carried:  # transformers 4.31 does not write it
        written["rope_theta"] = llm.rope_theta
    if config.icl.compressed_tokens:
        written |= {"mm_token_compress": True, "mm_compressed_token_count": config.icl.compressed_tokens}
    if config.icl.mask_tokens:
        written |= {"icl_mask_encoder": True, "mask_encoder_token_count": config.icl.mask_tokens}
    if moe_layers:
        written["moe"] = carried.get("moe", {}) | _moe_json(config)
    return dict(sorted(written.items())) | ({OWN: own} if own else {})


def own_json(experiment: ExperimentConfig, parts: set[str], adapters: bool) -> Json:
    """What `from_torch` needs beside the tensors to make the same checkpoint again: the configuration of the `parts`
    that are there, and what prediction reads of data and evaluation."""
    model, data = dataclasses.asdict(experiment.model), dataclasses.asdict(experiment.data)
    held = [name for name, part in _PARTS.items() if part in parts]
    if experiment.model.icl.masks == "separate" and "icl" not in held:  # no module shows it
        held.append("icl")
    sizes = {name: model[name] for name in held} | {"dtype": model["dtype"]}
    if adapters:
        sizes["lora"] = {name: model["lora"][name] for name in ("alpha", "dropout")}
    read = {name: data[name] for name in ("bucket_lengths", "max_images", "max_regions", "max_masks", "mask_canvas")}
    return {"model": sizes, "data": read, "eval": dataclasses.asdict(experiment.eval) | {"sources": []}}


def _is_released(clip: ClipConfig, tower: str) -> bool:
    """Whether the released vision tower of that name has these sizes."""
    return RELEASED_TOWERS.get(tower, {}).items() <= tower_json(clip).items() and tower in RELEASED_TOWERS


def tower_json(clip: ClipConfig) -> Json:
    """config.json of the vision tower."""
    return transformers.CLIPVisionConfig(
        hidden_size=clip.hidden_size,
        intermediate_size=clip.mlp_dim,
        num_hidden_layers=clip.num_layers,
        num_attention_heads=clip.num_heads,
        image_size=clip.image_size,
        patch_size=clip.patch_size,
        layer_norm_eps=clip.layer_norm_eps,
        architectures=["CLIPVisionModel"],
    ).to_diff_dict()


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
    folder: pathlib.Path, config: ModelConfig, side: pathlib.Path, tokenizer: pathlib.Path, dtype: np.dtype, own: Json
) -> None:
    """Writes all files around the weights into `folder`. `side` holds the source's own, where there was one."""
    if config.family == "bird":
        qwen_vl.write_files(folder, config, side, tokenizer, dtype, own)
        return
    described = model_json(config, read_json(side / "config.json"), dtype, own)
    preprocessor = read_json(side / "preprocessor_config.json") or preprocessor_json(config)
    _write(folder / "config.json", described)
    _write(folder / "generation_config.json", read_json(side / "generation_config.json") or _GENERATION)
    _write(folder / "preprocessor_config.json", preprocessor)
    if described["mm_vision_tower"] == TOWER_FOLDER:
        (folder / TOWER_FOLDER).mkdir()
        _write(folder / TOWER_FOLDER / "config.json", tower_json(config.clip))
        _write(folder / TOWER_FOLDER / "preprocessor_config.json", preprocessor)
    vocabulary.copy_tokenizer(tokenizer, folder)
    for name, content in (
        ("tokenizer_config.json", _TOKENIZER),
        ("special_tokens_map.json", _SPECIAL | {"pad_token": "<unk>"}),
    ):
        if not (folder / name).exists():
            _write(folder / name, content)


def _write(path: pathlib.Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
