"""Qwen-VL's configuration (and BiRD's):

From the tensors and config.json to ours, and the files around the weights on the way back.
"""

import json
import pathlib
import re
from collections.abc import Callable

import numpy as np

from medplib_jax.config.model import LlmConfig, LoraConfig, ModelConfig, QwenVisionConfig
from medplib_jax.data.qwen_tokenizer import QwenTokenizer

from . import vocabulary
from .foreign_config import OWN, Foreign, Json, read_json
from .sizes import Shapes, adapters_rank, check_agree, count, shape_of

# LoRA's targets under Qwen's names and ours.
TARGETS = {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.w1": "up", "mlp.w2": "gate", "mlp.c_proj": "down"}
_SIGHT = "transformer.visual."
DATA = {"template": "chatml", "max_regions": 0, "max_masks": 0}  # how the model is asked

# Settings of the released model that no size of ours decides (config.json of Qwen-VL-Chat).
_DEFAULTS: Json = {
    "_name_or_path": "./",
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "initializer_range": 0.02,
    "model_type": "qwen",
    "no_bias": True,
    "onnx_safe": None,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "use_cache": True,
    "use_flash_attn": False,
}


def detect_config(shapes: Shapes, foreign: Foreign, alpha: Callable[[int], float]) -> ModelConfig:
    """The model's sizes; `alpha` tells that of adapters of a rank.

    ValueError when a size is in neither the tensors nor config.json, or when they disagree.
    """
    written, own = foreign.language, foreign.own.get("model", {})
    if "num_attention_heads" not in written or "visual" not in written:
        raise ValueError(
            "Qwen-VL's numbers of heads are in no tensor; give the folder with its config.json, which has "
            "'num_attention_heads' and 'visual' (--config)"
        )
    return ModelConfig(
        family="bird",
        vit=_vision(shapes, written),
        llm=_llm(shapes, written),
        lora=_lora(shapes, foreign, alpha),
        dtype=own.get("dtype", "float32"),
    )


def _vision(shapes: Shapes, written: Json) -> QwenVisionConfig:
    visual, conv = written["visual"], shape_of(shapes, _SIGHT + "conv1.weight")
    config = QwenVisionConfig(
        image_size=visual["image_size"],
        patch_size=conv[2],
        hidden_size=conv[0],
        num_layers=count(shapes, re.escape(_SIGHT) + r"transformer\.resblocks\.(\d+)\."),
        num_heads=visual["heads"],
        mlp_dim=shape_of(shapes, _SIGHT + "transformer.resblocks.0.mlp.c_fc.weight")[0],
        position_grid=round(shape_of(shapes, _SIGHT + "positional_embedding")[0] ** 0.5),
        num_queries=shape_of(shapes, _SIGHT + "attn_pool.query")[0],
    )
    found = {"width": config.hidden_size, "layers": config.num_layers, "patch_size": config.patch_size}
    check_agree("Qwen-VL's visual", visual, found | {"output_dim": shape_of(shapes, _SIGHT + "proj")[1]})
    return config


def _llm(shapes: Shapes, written: Json) -> LlmConfig:
    vocab, hidden = shape_of(shapes, "transformer.wte.weight")
    mlp = shape_of(shapes, "transformer.h.0.mlp.w1.weight")[0]
    layers = count(shapes, r"transformer\.h\.(\d+)\.")
    found = {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocab, "intermediate_size": 2 * mlp}
    check_agree("Qwen-VL", written, found)
    heads = written["num_attention_heads"]
    ntk, log_n = written.get("use_dynamic_ntk", True), written.get("use_logn_attn", True)
    return LlmConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        mlp_dim=mlp,
        rope_theta=float(written.get("rotary_emb_base", 10000.0)),
        rms_norm_eps=written.get("layer_norm_epsilon", 1e-6),
        max_positions=written.get("max_position_embeddings", 8192),
        fused_qkv=True,
        trained_length=written.get("seq_length", 2048) if ntk or log_n else 0,
        ntk=ntk,
        log_n=log_n,
    )


def _lora(shapes: Shapes, foreign: Foreign, alpha: Callable[[int], float]) -> LoraConfig:
    rank = adapters_rank(shapes)
    if not rank:
        return LoraConfig()
    names = (re.search(r"h\.\d+\.(.*)\.lora_A\.weight$", key) for key in shapes if key.endswith(".lora_A.weight"))
    targets = {match[1] if match else "another place" for match in names}
    unknown = sorted(targets - TARGETS.keys())
    if unknown:
        raise ValueError(f"adapters on {unknown}, expected some of {sorted(TARGETS)}")
    own = tuple(sorted(TARGETS[target] for target in targets))
    return LoraConfig(rank=rank, alpha=alpha(rank), dropout=foreign.adapter.get("lora_dropout", 0.0), targets=own)


def model_json(config: ModelConfig, carried: Json, dtype: np.dtype, image_start_id: int, own: Json) -> Json:
    """config.json for the original program:

    Sizes from `config`, `image_start_id` (of `<img>`) from the tokenizer, `own` what no key of it tells, the rest from
    the `carried` file of the source, else the release's.
    """
    llm, vit = config.llm, config.vit
    written = _DEFAULTS | carried
    written |= {
        "hidden_size": llm.hidden_size,
        "intermediate_size": 2 * llm.mlp_dim,
        "kv_channels": llm.head_dim,
        "layer_norm_epsilon": llm.rms_norm_eps,
        "max_position_embeddings": llm.max_positions,
        "num_attention_heads": llm.num_heads,
        "num_hidden_layers": llm.num_layers,
        "rotary_emb_base": int(llm.rope_theta) if llm.rope_theta.is_integer() else llm.rope_theta,
        "seq_length": llm.trained_length or carried.get("seq_length", 2048),
        "torch_dtype": str(dtype),
        "use_dynamic_ntk": llm.ntk and bool(llm.trained_length),
        "use_logn_attn": llm.log_n and bool(llm.trained_length),
        "vocab_size": llm.vocab_size,
    }
    visual = {
        "heads": vit.num_heads,
        "image_size": vit.image_size,
        "image_start_id": image_start_id,
        "layers": vit.num_layers,
        "mlp_ratio": 4.9231 if int(vit.hidden_size * 4.9231) == vit.mlp_dim else vit.mlp_dim / vit.hidden_size,
        "output_dim": llm.hidden_size,
        "patch_size": vit.patch_size,
        "width": vit.hidden_size,
    }
    visual |= {"n_queries": vit.num_queries} if vit.num_queries != 256 else {}
    written["visual"] = carried.get("visual", {}) | visual
    return dict(sorted((written | {OWN: own}).items()))


def check_tokenizer(folder: pathlib.Path, written: Json) -> None:
    """ValueError unless `<img>` has the id that config.json says: vocabularies of other sizes may fill as many rows."""
    found, expected = QwenTokenizer.load(str(folder)).image_ids[0], written["visual"].get("image_start_id")
    if expected not in (None, found):
        raise ValueError(f"{folder}: wrong tokenizer: <img> is token {found}, but config.json says {expected}")


def generation_json(end: int) -> Json:
    """generation_config.json of the release; `end` is the id of <|endoftext|>."""
    return {
        "chat_format": "chatml",
        "do_sample": True,
        "eos_token_id": end,
        "max_new_tokens": 512,
        "max_window_size": 6144,
        "pad_token_id": end,
        "top_k": 0,
        "top_p": 0.3,
        "transformers_version": "4.31.0",
    }


_TOKENIZER: Json = {
    "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    "model_max_length": 8192,
    "tokenizer_class": "QWenTokenizer",
}


def write_files(
    folder: pathlib.Path, config: ModelConfig, side: pathlib.Path, tokenizer: pathlib.Path, dtype: np.dtype, own: Json
) -> None:
    """Writes all files around the weights into `folder`. `side` holds the source's own, where there was one."""
    vocabulary.copy_tokenizer(tokenizer, folder)
    words = QwenTokenizer.load(str(folder))
    described = model_json(config, read_json(side / "config.json"), dtype, words.image_ids[0], own)
    files = {
        "config.json": described,
        "generation_config.json": read_json(side / "generation_config.json") or generation_json(words.eos_id),
        "tokenizer_config.json": read_json(folder / "tokenizer_config.json") or _TOKENIZER,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
