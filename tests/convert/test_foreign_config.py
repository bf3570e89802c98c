"""Every key of a foreign configuration is used, known to be harmless, or an error by name."""

import json

import pytest
import transformers

from convert import kinds
from convert.foreign_config import read_foreign

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
SHAPES = {"model.embed_tokens.weight": (400, 16), "model.norm.weight": (16,), "lm_head.weight": (400, 16)} | {
    f"model.layers.{i}.{name}.weight": shape
    for i in range(2)
    for name, shape in (("self_attn.k_proj", (8, 16)), ("mlp.gate_proj", (24, 16)))
}


def read(tmp_path, name="config.json", ignored=(), **changes):
    (tmp_path / name).write_text(json.dumps(LLAMA | changes if name == "config.json" else changes))
    return read_foreign([tmp_path], ignored)


def sizes(tmp_path, **changes):
    return kinds.detect_config(SHAPES, read(tmp_path, **changes)).llm


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},  # transformers 5
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 500000},
    ],
)
def test_rope_theta_is_read_from_every_spelling(tmp_path, changes):
    assert sizes(tmp_path, **changes).rope_theta == 5e5


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"head_dim": 8}, "head_dim 8"),
        ({"model_type": "mistral", "sliding_window": 256}, "sliding_window 256"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"model_type": "gemma"}, "model_type 'gemma'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"mm_projector_type": "linear"}, "mm_projector_type"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        ({"qk_norm": True}, "'qk_norm'.*--ignore_key qk_norm"),
    ],
)
def test_what_the_model_does_not_compute_is_refused_by_name(tmp_path, changes, named):
    with pytest.raises(ValueError, match=f"config.json.*{named}"):
        read(tmp_path, **changes)


def test_a_key_that_is_said_to_be_harmless_is_passed_over(tmp_path):
    assert read(tmp_path, ignored=("qk_norm",), qk_norm=True).language["num_attention_heads"] == 4


def test_a_sliding_window_that_no_text_reaches_is_none(tmp_path):
    assert sizes(tmp_path, model_type="mistral", sliding_window=512).num_kv_heads == 2
    assert sizes(tmp_path, model_type="mistral", sliding_window=None).num_heads == 4


@pytest.mark.parametrize("kind", [transformers.LlamaConfig, transformers.MistralConfig, transformers.LlavaConfig])
def test_configurations_of_transformers_are_known_whole(tmp_path, kind):
    changes = {"sliding_window": None} if kind is transformers.MistralConfig else {}
    kind(**changes).save_pretrained(tmp_path)
    found = read_foreign([tmp_path])
    assert (found.language["num_attention_heads"], found.language["rope_theta"]) == (32, 10000.0)


def test_defaults_of_a_sparse_text_config_are_transformers(tmp_path):
    """As in the released llava-1.5-7b-hf, which says no more of its language model."""
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    language = read_foreign([tmp_path]).language
    assert (language["num_attention_heads"], language["hidden_size"], language["vocab_size"]) == (32, 4096, 32064)


def test_clip_of_another_activation_is_refused(tmp_path):
    vision = transformers.CLIPVisionConfig().to_dict() | {"hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(vision))
    with pytest.raises(ValueError, match='config.json: hidden_act "gelu" is not supported, only "quick_gelu"'):
        read_foreign([tmp_path])


def test_heads_of_an_unknown_tower_are_not_guessed(tmp_path):
    clip = "model.vision_tower.vision_tower.vision_model."
    shapes = {
        clip + "embeddings.patch_embedding.weight": (64, 3, 14, 14),
        clip + "embeddings.position_embedding.weight": (5, 64),
        clip + "encoder.layers.0.mlp.fc1.weight": (128, 64),
    }
    with pytest.raises(ValueError, match="CLIP: the number of heads is in no tensor; give the folder with its config"):
        kinds.detect_config(shapes, read(tmp_path))


ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 256, "target_modules": ["q_proj"], "bias": "none"}
ADAPTED = SHAPES | {"model.layers.0.self_attn.q_proj.lora_A.weight": (4, 16)}


def adapted(tmp_path, given=None, **changes):
    read(tmp_path)
    foreign = read(tmp_path, "adapter_config.json", **ADAPTER | changes)
    return kinds.detect_config(ADAPTED, foreign, given).lora


def test_alpha_is_read_from_adapter_config(tmp_path):
    assert (adapted(tmp_path).scale, adapted(tmp_path, use_rslora=True).scale) == (256 / 4, 256 / 4**0.5)
    with pytest.raises(ValueError, match=r"expected one value .*, found \[16.0, 256.0\]"):
        adapted(tmp_path, given=16.0)
    with pytest.raises(ValueError, match="adapters' alpha is in no tensor.*found none"):
        (tmp_path / "adapter_config.json").unlink()
        kinds.detect_config(ADAPTED, read(tmp_path))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(tmp_path, changes, named):
    with pytest.raises(ValueError, match=f"adapter_config.json.*{named}"):
        adapted(tmp_path, **changes)


# What transformers 4.21 wrote into openai/clip-vit-large-patch14-336, beside the sizes.
OF_OLD_CLIP = """
_name_or_path add_cross_attention architectures bad_words_ids bos_token_id chunk_size_feed_forward
cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping
encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
forced_eos_token_id id2label initializer_factor initializer_range is_decoder is_encoder_decoder label2id length_penalty
max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
output_hidden_states output_scores pad_token_id prefix problem_type projection_dim pruned_heads remove_invalid_values
repetition_penalty return_dict return_dict_in_generate sep_token_id task_specific_params temperature
tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript transformers_version
typical_p use_bfloat16
""".split()
OF_LLAVA = {
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "image_aspect_ratio": "pad",
    "max_length": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_mm_proj": True,
}


@pytest.mark.parametrize(
    "changes",
    [
        OF_LLAVA | {"model_type": "llava"},
        OF_LLAVA
        | {"model_type": "llava_mistral", "sliding_window": None, "rope_theta": 1e6, "mm_patch_merge_type": "flat"},
    ],
)
def test_released_configurations_are_known_whole(tmp_path, changes):
    """LLaVA-1.5 and LLaVA-Med v1.5, whose vision tower is known by its name."""
    found = read(tmp_path, **changes)
    assert found.vision["num_attention_heads"] == 16 and found.language["rope_theta"] == changes.get("rope_theta", 1e4)


def test_the_released_clip_is_known_whole(tmp_path):
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "hidden_act": "quick_gelu", "dropout": 0.0}
    sizes |= {"intermediate_size": 4096, "num_hidden_layers": 24, "image_size": 336, "patch_size": 14}
    sizes |= {"projection_dim": 768, "tie_word_embeddings": True, "layer_norm_eps": 1e-5}
    vision = dict.fromkeys(OF_OLD_CLIP) | sizes | {"model_type": "clip_vision_model"}
    written = {"model_type": "clip", "text_config": {}, "vision_config": vision, "projection_dim": 768}
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_foreign([tmp_path]).vision["num_attention_heads"] == 16


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_pixels_that_are_scaled_otherwise_are_refused(tmp_path, name):
    clip = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "do_rescale": True, "size": {"shortest_edge": 336}}
    read(tmp_path, name, **clip)
    read(tmp_path, name, image_processor=clip)
    with pytest.raises(ValueError, match=rf"{name}: image_mean \[0.5, 0.5, 0.5\] is not supported, only \[0.48"):
        read(tmp_path, name, **clip | {"image_mean": [0.5, 0.5, 0.5]})
    with pytest.raises(ValueError, match=f"{name}: do_normalize false is not supported"):
        read(tmp_path, name, image_processor=clip | {"do_normalize": False})
