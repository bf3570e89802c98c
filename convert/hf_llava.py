"""Hugging Face's form of LLaVA-1.5: names, config.json and tokenizer of what `LlavaForConditionalGeneration` loads.

The names are those of transformers 4, which version 5 reads, too. It holds what stages I and II train: CLIP, projector
and a dense language model.
"""

import json
import pathlib

import numpy as np
import transformers

from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.data.prompts import TEMPLATES
from medplib_jax.data.tokenizers import ADDED_TOKENS, CONTROL_TOKENS, Tokenizer

from .foreign_config import OWN, Json
from .hf_config import preprocessor_json, tower_json
from .vocabulary import Rows

IMAGE = "<image>"
ROUND = 64  # the rows of the embedding are padded to a multiple of this
_NAMES = (  # of the table -> of Hugging Face
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.layers.", "language_model.model.layers."),
    ("model.norm.", "language_model.model.norm."),
    ("lm_head.", "language_model.lm_head."),
)
# The conversation that this project evaluates with, see `data.prompts`.
_TEMPLATE = (
    TEMPLATES["v1"]
    + "{% for message in messages %}{{ ' ' + message['role'].upper() + ': ' }}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<im_start><image><im_end>\n' }}{% else %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{{ '' if message['role'] == 'user' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def name_of(key: str) -> str | None:
    """Hugging Face's name of a tensor of the table; None for one that its LLaVA has no place for."""
    return next((new + key.removeprefix(old) for old, new in _NAMES if key.startswith(old)), None)


def rows_of(vocab: int) -> Rows:
    """`<image>` follows the model's tokens, then padding."""
    return Rows(vocab, -(-(vocab + 1) // ROUND) * ROUND - vocab)


def check_fits(experiment: ExperimentConfig, parts: set[str]) -> None:
    """ValueError for a model that is no LLaVA."""
    missing = {"clip", "projector", "llm"} - parts
    if missing or experiment.model.moe_layers:
        what = f"lacks {sorted(missing)}" if missing else "has experts"
        raise ValueError(f"--layout hf_llava writes models of stages I and II; this one {what}")


def model_json(experiment: ExperimentConfig, dtype: np.dtype, own: Json) -> Json:
    """config.json. The rows of the vocabulary are other ones than ours, so our record is silent about them."""
    own["model"]["llm"].pop("vocab_size")
    llm, clip = experiment.model.llm, experiment.model.clip
    text = transformers.LlamaConfig(
        vocab_size=rows_of(llm.vocab_size).total,
        hidden_size=llm.hidden_size,
        intermediate_size=llm.mlp_dim,
        num_hidden_layers=llm.num_layers,
        num_attention_heads=llm.num_heads,
        num_key_value_heads=llm.num_kv_heads,
        max_position_embeddings=llm.max_positions,
        rms_norm_eps=llm.rms_norm_eps,
        rope_theta=llm.rope_theta,
    ).to_diff_dict()
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_seq_length": clip.num_patches,
        "image_token_index": llm.vocab_size,
        "model_type": "llava",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": text | {"rope_theta": llm.rope_theta},  # where transformers 4 looks for it
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype),
        "vision_config": tower_json(clip),
        "vision_feature_layer": clip.select_layer,
        "vision_feature_select_strategy": "default",
        OWN: own,
    }


def write_files(folder: pathlib.Path, experiment: ExperimentConfig, dtype: np.dtype, own: Json) -> None:
    """Everything around the weights. The tokenizer's own files are in `folder` already."""
    tokenizer = Tokenizer.load(str(folder))
    added = {token: tokenizer.encode(token)[0] for token in (*CONTROL_TOKENS, *ADDED_TOKENS)}
    added[IMAGE] = tokenizer.vocab_size
    described = {
        str(i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        | {"special": token in (*CONTROL_TOKENS, IMAGE)}
        for token, i in added.items()
    }
    written = {
        "config.json": model_json(experiment, dtype, own),
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        "preprocessor_config.json": preprocessor_json(experiment.model),
        "processor_config.json": {
            "image_token": IMAGE,
            "num_additional_image_tokens": 1,
            "patch_size": experiment.model.clip.patch_size,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
        "tokenizer_config.json": {
            "added_tokens_decoder": described,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
            "legacy": True,
            "model_max_length": experiment.model.llm.max_positions,
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
            "tokenizer_class": "LlamaTokenizer",
        },
    }
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
