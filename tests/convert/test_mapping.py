"""The table of names, on shapes alone."""

import dataclasses
import gzip
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import from_torch, kinds, mapping
from convert.foreign_config import RELEASED_TOWERS, Foreign
from medplib_jax.config.experiment import MeshConfig
from tests.convert.conftest import LORA, TINY
from tests.paths import GOLDEN

RECORDED = json.loads(gzip.decompress((GOLDEN / "keys_7b.json.gz").read_bytes()))
MOE = {key: tuple(shape) for key, shape in RECORDED["moe"].items()}
TOWER = "model.vision_tower.vision_tower.vision_model."
LANGUAGE = {"num_attention_heads": 32, "moe": {"top_k_experts": 1}}


def foreign(language: dict) -> Foreign:
    return Foreign(language, RELEASED_TOWERS["openai/clip-vit-large-patch14-336"], adapter={}, own={}, side=None)


def stage23() -> dict:
    """The checkpoint of stages II and III: plain MLPs, here with the in-context-learning modules."""
    recorded = RECORDED["stage23"]
    dense = {key: tuple(shape) for key, shape in (recorded["dense"] | recorded["icl"]).items()}
    return {key: shape for key, shape in MOE.items() if key not in recorded["missing"]} | dense


def plan(shapes):
    config = kinds.detect_config(shapes, foreign(LANGUAGE))
    params = from_torch.target_shapes(from_torch.model_shapes(config), {*kinds.KINDS["medplib"], "icl"})
    return config, params, mapping.strict_plan(config, params, shapes)


@pytest.mark.parametrize("shapes", [MOE, stage23()], ids=["moe", "stage23"])
def test_full_size_model_maps_completely_both_ways(shapes):
    config, params, places = plan(shapes)
    assert set(shapes) - set(places) == {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(32)}
    assert {place.path for place in places.values()} == set(params)
    assert {key: place.torch_shape(params[place.path]) for key, place in places.items()} == {
        key: shapes[key] for key in places
    }
    # every element of a parameter is filled once: as many slabs as the stacked axes have places, all different
    for path, shape in params.items():
        filled = [place.index for place in places.values() if place.path == path]
        stack = next(place.stack for place in places.values() if place.path == path)
        assert len(set(filled)) == len(filled) == np.prod(stack, dtype=int) and shape[: len(stack)] == stack
    assert (config.llm.vocab_size, config.moe.num_experts) == (32267, 2 if shapes is MOE else 0)


def test_every_detected_size_of_the_full_model_is_the_default():
    config, _, _ = plan(MOE)
    default = type(config)()
    assert (config.clip, config.llm, dataclasses.replace(config.mask, unpad="exact")) == (
        default.clip,
        default.llm,
        default.mask,
    )


def test_masks_are_unpadded_as_they_were_trained():
    fresh = {key: shape for key, shape in MOE.items() if "text_hidden_fcs" not in key}
    ways = {
        (name, said): dict(mask_unpad=said) if said else {}
        for name in ("trained", "fresh")
        for said in (None, "exact", "reference")
    }
    found = {
        way: kinds.detect_config(MOE if way[0] == "trained" else fresh, foreign(LANGUAGE | written)).mask.unpad
        for way, written in ways.items()
    }
    assert [way for way, unpad in found.items() if unpad == "reference"] == [
        ("trained", None),
        ("trained", "reference"),
    ]


def test_files_follow_the_shards_of_a_mesh():
    config, params, _ = plan(MOE)
    pieces = from_torch.shard_counts(from_torch.model_shapes(config), params, MeshConfig(data=1, fsdp=8, tensor=4))
    assert pieces["llm/moe/experts/gate/kernel"] == (1, 1, 8, 4) and pieces["llm/moe/experts/down/kernel"] == (
        1,
        1,
        4,
        8,
    )


def tiny_shapes():
    params = {
        path: leaf.shape
        for path, leaf in from_torch.flatten(from_torch.params_of(from_torch.model_shapes(TINY))).items()
    }
    return params, {key: place.torch_shape(params[place.path]) for key, place in mapping.entries(TINY, params).items()}


def test_strictness_names_what_is_wrong():
    params, shapes = tiny_shapes()
    mapping.strict_plan(TINY, params, shapes)
    with pytest.raises(ValueError, match="1 tensors of the source have no place in the model: model.surprise.weight"):
        mapping.strict_plan(TINY, params, shapes | {"model.surprise.weight": (1,)})
    with pytest.raises(ValueError, match="1 tensors of the model are not in the source: model.norm.weight"):
        mapping.strict_plan(TINY, params, {key: shape for key, shape in shapes.items() if key != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"lm_head.weight: expected shape \(667, 16\), found \(667, 15\)"):
        mapping.strict_plan(TINY, params, shapes | {"lm_head.weight": (667, 15)})
    with pytest.raises(ValueError, match="no PyTorch name is known for 1 parameters: llm/surprise"):
        mapping.entries(TINY, [*params, "llm/surprise"])


@pytest.mark.parametrize(
    "key, name",
    [
        (
            "base_model.model.model.layers.1.self_attn.q_proj.base_layer.weight",
            "model.layers.1.self_attn.q_proj.weight",
        ),
        (
            "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight",
            "model.layers.1.self_attn.q_proj.lora_A.weight",
        ),
        ("base_model.model.lm_head.weight", "lm_head.weight"),
        ("vision_model.post_layernorm.bias", "model.vision_tower.vision_tower.vision_model.post_layernorm.bias"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("embeddings.class_embedding", "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"),
        *(
            (f"{prefix}.encoder.layers.0.mlp.fc1.bias", f"{TOWER}encoder.layers.0.mlp.fc1.bias")
            for prefix in (
                "vision_model",
                "vision_tower",
                "vision_tower.vision_model",
                "model.vision_tower",
                "model.vision_tower.vision_model",
                "model.vision_tower.vision_tower.vision_model",
            )
        ),
        ("model.multi_modal_projector.linear_1.weight", "model.mm_projector.0.weight"),
        ("multi_modal_projector.linear_2.bias", "model.mm_projector.2.bias"),
        ("image_encoder.pos_embed", "model.visual_model.image_encoder.pos_embed"),
        ("encoder.4.bias", "model.mask_encoder.encoder.4.bias"),
    ],
)
def test_other_names_of_the_same_tensor(key, name):
    assert mapping.canonical(key) == name == mapping.canonical(name)


def test_unmerged_names_come_back():
    adapted = "model.layers.0.mlp.gate_proj.weight"
    for key, is_adapted in (
        (adapted, True),
        ("model.layers.0.mlp.gate_proj.lora_B.weight", False),
        ("lm_head.weight", False),
    ):
        assert mapping.canonical(mapping.unmerged_name(key, is_adapted)) == key
    assert mapping.unmerged_name(adapted, True) == "base_model.model.model.layers.0.mlp.gate_proj.base_layer.weight"


@settings(max_examples=30)
@given(st.data())
def test_layouts_are_inverse(data):
    layout = data.draw(
        st.sampled_from(
            [mapping.SAME, mapping.LINEAR, mapping.CONV, mapping.CONV_TRANSPOSE, mapping.CONV_POINT, mapping.ROW]
        )
    )
    shape = tuple(
        data.draw(st.lists(st.integers(1, 4), min_size=len(layout.order) or 2, max_size=len(layout.order) or 2))
    )
    for i in range(layout.drop):
        shape = tuple(1 if axis == (layout.order or (0,))[i] else size for axis, size in enumerate(shape))
    tensor = np.arange(np.prod(shape)).reshape(shape)
    there = layout.to_jax(tensor)
    assert there.shape == layout.jax_shape(shape) and layout.torch_shape(there.shape) == shape
    assert np.array_equal(layout.to_torch(there), tensor)


def test_a_kind_is_known_by_its_names():
    medplib = set(MOE)
    parts = {kind: {key for key in medplib if kinds.part_of(key) in kinds.KINDS[kind]} for kind in kinds.KINDS}
    assert {kind: kinds.detect_kind(keys) for kind, keys in parts.items() if kind not in ("lora", "qwen_vl")} == {
        kind: kind for kind in parts if kind not in ("lora", "qwen_vl")
    }
    assert kinds.detect_kind({"transformer.h.0.attn.c_attn.weight", "lm_head.weight"}) == "qwen_vl"
    assert kinds.detect_kind(medplib | {"model.layers.0.self_attn.q_proj.lora_A.weight"}) == "lora"
    with pytest.raises(ValueError, match="not a checkpoint of a known kind"):
        kinds.detect_kind({"encoder.h.0.attn.c_attn.weight"})


def test_sizes_that_disagree_are_refused():
    with pytest.raises(ValueError, match="hidden_size 2048 disagrees with the tensors: 4096"):
        kinds.detect_config(MOE, foreign(LANGUAGE | {"hidden_size": 2048}))
    with pytest.raises(ValueError, match="number of heads is in no tensor"):
        kinds.detect_config(MOE, foreign({}))
    with pytest.raises(ValueError, match="moe.moe_layers_idx"):
        kinds.detect_config(MOE, foreign(LANGUAGE | {"moe": {"moe_layers_idx": [0, 2]}}))
    adapters = {
        "model.layers.0.mlp.gate_proj.lora_A.weight": (4, 16),
        "model.layers.1.mlp.gate_proj.lora_A.weight": (LORA.rank, 16),
    }
    with pytest.raises(ValueError, match="adapters of several ranks"):
        kinds.detect_config(stage23() | adapters, foreign(LANGUAGE))


def test_readme_lists_every_row():
    text = (pathlib.Path(mapping.__file__).parent / "README.md").read_text()
    rows = [f"| `{torch}` | `{jax}` |" for torch, jax, _ in (*mapping.MEDPLIB, *mapping.QWEN_VL)]
    assert [row for row in rows if text.count(row) != rows.count(row)] == []
    assert sum(map(text.count, ("| `model.", "| `lm_head", "| `transformer."))) == len(rows)
