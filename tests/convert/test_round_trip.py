"""PyTorch -> checkpoint -> PyTorch, bit for bit; and a checkpoint that the rest of the project takes."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert import from_torch, mapping, to_torch, torch_files
from medplib_jax import checkpoint
from medplib_jax.batch import combine, flatten
from medplib_jax.config.experiment import ExperimentConfig, MeshConfig
from medplib_jax.config.model import IclConfig, MoeConfig
from medplib_jax.data.tokenizers import Tokenizer
from medplib_jax.decode.saved_params import SavedParams, open_stores
from medplib_jax.models.language.lora import merge_lora
from medplib_jax.train.state import TrainState
from tests.convert.conftest import LORA, TINY, TOKENIZER, bits, load, random_tensors, save, write_folder

DENSE = dataclasses.replace(TINY, moe=MoeConfig())
ADAPTED = dataclasses.replace(TINY, lora=LORA)


def convert(out, *sources, **options):
    return from_torch.convert(from_torch.Options(tuple(sources), out, **options))


def assert_same(found: dict, expected: dict):
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in expected.items()}
    assert [name for name, x in expected.items() if bits(found[name]) != bits(x)] == []


def without_rotary(tensors: dict) -> dict:
    return {name: x for name, x in tensors.items() if not mapping.ignored(name)}


@pytest.mark.parametrize(
    "dtype, file_format", [(np.float32, "bin"), (ml_dtypes.bfloat16, "safetensors"), (np.float16, "safetensors")]
)
def test_merged_layout_is_bit_exact(tmp_path, dtype, file_format):
    tensors = random_tensors(TINY, dtype)
    source = write_folder(tmp_path / "source", TINY, tensors)
    assert convert(tmp_path / "jax", source) == TINY
    to_torch.convert(tmp_path / "jax", tmp_path / "torch", file_format, shard_bytes=20_000)
    written = load(tmp_path / "torch")
    assert_same(without_rotary(written), tensors)
    assert len(written) == len(tensors) + TINY.llm.num_layers
    # several shards of the size asked for, and an index that is right
    index = json.loads(next((tmp_path / "torch").glob("*.index.json")).read_text())
    assert set(index["weight_map"]) == set(written) and len(set(index["weight_map"].values())) > 2
    assert all(name in torch_files.read_file(tmp_path / "torch" / file) for name, file in index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in written.values())
    # everything around the weights comes back as it was, and what the source lacked is there
    assert {
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    } <= {path.name for path in (tmp_path / "torch").iterdir()}
    for name in ("config.json", "tokenizer.model", "added_tokens.json"):
        assert (tmp_path / "torch" / name).read_bytes() == (source / name).read_bytes() or name == "config.json"
    written = json.loads((tmp_path / "torch" / "config.json").read_text())
    own, carried = written.pop("medplib_jax"), json.loads((source / "config.json").read_text())
    assert carried.pop("mask_unpad") == own["model"]["mask"]["unpad"] and written == carried
    assert written["moe"]["num_experts"] == [2, 2]


@pytest.mark.parametrize(
    "dtype, file_format", [(np.float32, "safetensors"), (ml_dtypes.bfloat16, "bin"), (np.float16, "safetensors")]
)
def test_training_layout_with_adapters(tmp_path, dtype, file_format):
    tensors = random_tensors(ADAPTED, dtype)
    adapted = {name.replace(".lora_A.weight", ".weight") for name in tensors if ".lora_A." in name}
    unmerged = {mapping.unmerged_name(name, name in adapted): x for name, x in tensors.items()}
    assert any(".base_layer.weight" in name for name in unmerged) and any(
        ".lora_B.default.weight" in name for name in unmerged
    )
    source = write_folder(tmp_path / "source", ADAPTED, unmerged)
    assert convert(tmp_path / "jax", source, kind="lora", lora_alpha=LORA.alpha) == ADAPTED
    to_torch.convert(tmp_path / "jax", tmp_path / "lora", file_format, layout="lora")
    assert_same(without_rotary(load(tmp_path / "lora")), unmerged)


def test_what_training_saved_is_written_alike(tmp_path):
    tensors = random_tensors(TINY)
    convert(tmp_path / "jax", write_folder(tmp_path / "source", TINY, tensors))
    experiment, params, tokenizer = checkpoint.load_params(str(tmp_path / "jax"))
    experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, tokenizer=tokenizer))
    state = TrainState(step=jnp.asarray(1), trainable=jax.tree.map(jnp.asarray, params), frozen={}, opt_state={})
    with checkpoint.make_manager(str(tmp_path / "run"), keep=1) as manager:
        checkpoint.save(manager, state, experiment, total_steps=1, loss=1.0)
        manager.wait_until_finished()
    to_torch.convert(tmp_path / "run", tmp_path / "torch")
    assert_same(without_rotary(load(tmp_path / "torch")), tensors)


def test_merging_adds_the_adapters(tmp_path):
    tensors = random_tensors(ADAPTED)
    convert(tmp_path / "jax", write_folder(tmp_path / "source", ADAPTED, tensors), lora_alpha=LORA.alpha)
    to_torch.convert(tmp_path / "jax", tmp_path / "torch")
    written = without_rotary(load(tmp_path / "torch"))
    assert set(written) == {name for name in tensors if ".lora_" not in name}
    for name in (
        "model.layers.1.self_attn.q_proj",
        "model.layers.2.mlp.deepspeed_moe.experts.deepspeed_experts.1.down_proj",
        "model.layers.1.mlp.gate_proj",
    ):
        expected = (
            tensors[name + ".weight"] + LORA.scale * tensors[name + ".lora_B.weight"] @ tensors[name + ".lora_A.weight"]
        )
        np.testing.assert_allclose(written[name + ".weight"], expected, rtol=1e-5, atol=1e-5)
    # the same as the model code's own merge
    _, params, _ = checkpoint.load_params(str(tmp_path / "jax"))
    merged = flatten(merge_lora(params, LORA))
    places = mapping.entries(TINY, merged)
    for name, x in written.items():
        np.testing.assert_allclose(
            places[name].layout.to_torch(np.asarray(merged[places[name].path])[places[name].index]),
            x,
            rtol=1e-5,
            atol=1e-5,
        )


def test_stage_checkpoint_without_experts_and_with_icl_modules(tmp_path):
    tensors = random_tensors(DENSE)
    icl = {
        "model.mm_token_compressor.norm": (16,),
        "model.mm_token_compressor.proj": (16, 16),
        "model.mask_encoder.encoder.0": (64, 1, 3, 3),
        "model.mask_encoder.encoder.2": (128, 64, 3, 3),
        "model.mask_encoder.encoder.4": (256, 128, 3, 3),
        "model.mask_encoder.encoder.6": (256, 256, 3, 3),
        "model.mask_encoder.proj": (16, 256),
        "model.mask_encoder.norm": (16,),
    }
    random = np.random.default_rng(1)
    for name, shape in icl.items():
        tensors |= {
            name + ".weight": random.standard_normal(shape, np.float32),
            name + ".bias": random.standard_normal(shape[:1], np.float32),
        }
    source = write_folder(tmp_path / "source", DENSE, tensors)
    written = json.loads((source / "config.json").read_text())
    told = {"mm_token_compress": True, "mm_compressed_token_count": 3, "icl_mask_encoder": True}
    (source / "config.json").write_text(json.dumps(written | told))
    convert(tmp_path / "jax", source, stage=3)
    experiment, params, _ = checkpoint.load_params(str(tmp_path / "jax"))
    assert experiment.init.stage == 3 and experiment.model.moe.num_experts == 0
    assert experiment.model.icl == IclConfig("separate", compressed_tokens=3, mask_tokens=64)  # the original's 64
    assert params["icl"]["mask_encoder"]["conv1"]["kernel"].shape == (3, 3, 1, 64)
    to_torch.convert(tmp_path / "jax", tmp_path / "torch")
    assert_same(without_rotary(load(tmp_path / "torch")), tensors)
    back = json.loads((tmp_path / "torch" / "config.json").read_text())
    assert back["model_type"] == "medplib" and back.items() >= (told | {"mask_encoder_token_count": 64}).items()
    convert(tmp_path / "again", tmp_path / "torch", stage=3)
    assert checkpoint.load_experiment(str(tmp_path / "again"))[0].model.icl == experiment.model.icl


def test_rotary_buffers_equal_pytorchs():
    import torch

    model = dataclasses.replace(TINY, llm=dataclasses.replace(TINY.llm, hidden_size=256))
    tree = {"llm": {"embed": {"embedding": np.zeros(1, np.float32)}}}
    saved = SavedParams(ExperimentConfig(model=model), {"trainable": tree, "frozen": {}}, TOKENIZER)
    stored = to_torch.Stored(saved)
    made = next(to_torch.rotary_buffers(stored, "merged")).make()
    expected = 1.0 / (10000.0 ** (torch.arange(0, 128, 2).float() / 128))
    np.testing.assert_allclose(made, expected.numpy(), rtol=1e-6)  # the last bits of PyTorch's powers depend on the CPU


def test_parts_from_several_sources_make_one_model(tmp_path):
    """LLaVA, CLIP and SAM-Med2D as they are released: other names, no added tokens, no region adapter and no SEG
    MLP."""
    tensors = random_tensors(DENSE, ml_dtypes.bfloat16)
    base = VOCAB_WITHOUT_ADDED = Tokenizer.load(str(TOKENIZER)).seg_id
    llava = {
        name: x
        for name, x in tensors.items()
        if name.startswith(("model.layers.", "model.norm", "model.mm_projector", "model.embed", "lm_head"))
    }
    llava |= {name: llava[name][:base] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    source = write_folder(
        tmp_path / "llava", dataclasses.replace(DENSE, llm=dataclasses.replace(DENSE.llm, vocab_size=base)), llava
    )
    (source / "added_tokens.json").unlink()
    clip = {
        name.removeprefix("model.vision_tower.vision_tower."): x
        for name, x in tensors.items()
        if "vision_tower" in name
    }
    (tmp_path / "clip").mkdir()
    save(
        tmp_path / "clip" / "pytorch_model.bin",
        clip | {"text_model.final_layer_norm.weight": np.ones(3, np.float32), "logit_scale": np.ones(1, np.float32)},
    )
    shutil.copyfile(source / "clip" / "config.json", tmp_path / "clip" / "config.json")
    sam = {name.removeprefix("model.visual_model."): x for name, x in tensors.items() if "visual_model" in name}
    save(tmp_path / "sam.pth", {})
    import torch

    torch.save(
        {"model": {name: torch.from_numpy(x.astype(np.float32)) for name, x in sam.items()}}, tmp_path / "sam.pth"
    )

    config = convert(
        tmp_path / "jax",
        source,
        tmp_path / "clip",
        tmp_path / "sam.pth",
        fresh=("region", "seg_mlp"),
        dtype="fp32",
        stage=1,
    )
    assert config == DENSE
    _, params, tokenizer = checkpoint.load_params(str(tmp_path / "jax"))
    assert Tokenizer.load(tokenizer).vocab_size == DENSE.llm.vocab_size
    assert jax.tree.map(np.shape, params) == jax.tree.map(
        np.shape, from_torch.params_of(from_torch.model_shapes(DENSE))
    )
    embedding, head = params["llm"]["embed"]["embedding"], params["llm"]["head"]["kernel"]
    assert np.array_equal(embedding[:base], llava["model.embed_tokens.weight"].astype(np.float32))
    np.testing.assert_allclose(
        embedding[base:], np.tile(embedding[:base].mean(0), (len(embedding) - VOCAB_WITHOUT_ADDED, 1)), atol=1e-5
    )
    np.testing.assert_allclose(
        head[:, base:], np.tile(head[:, :base].mean(1, keepdims=True), (1, len(embedding) - base)), atol=1e-5
    )
    assert np.array_equal(
        params["sam"]["mask_decoder"]["mask_tokens"], sam["mask_decoder.mask_tokens.weight"].astype(np.float32)
    )


@pytest.mark.parametrize(
    "kind, prefix, part",
    [
        ("clip", "model.vision_tower.", "clip"),
        ("sam_med2d", "model.visual_model.", "sam"),
        ("llama", "model.layers.", "llm"),
    ],
)
def test_one_part_alone(tmp_path, kind, prefix, part):
    tensors = {
        name: x
        for name, x in random_tensors(DENSE).items()
        if name.startswith((prefix, "model.norm", "model.embed", "lm_head") if part == "llm" else prefix)
    }
    convert(
        tmp_path / "jax",
        write_folder(tmp_path / "source", DENSE, tensors),
        kind=kind,
        config=tmp_path / "source" / "clip" if part == "clip" else None,
    )
    _, params, _ = checkpoint.load_params(str(tmp_path / "jax"))
    assert set(params) == {part}
    to_torch.convert(tmp_path / "jax", tmp_path / "torch")
    assert_same(without_rotary(load(tmp_path / "torch")), tensors)


def test_shards_with_any_index(tmp_path):
    tensors = random_tensors(DENSE)
    source = write_folder(tmp_path / "source", DENSE, tensors)
    names = sorted(tensors)
    (source / "model.safetensors").unlink()
    for i in range(3):
        save(source / f"model-{i + 1:05d}-of-00003.safetensors", {name: tensors[name] for name in names[i::3]})
    convert(tmp_path / "without", source)
    of_bins = {"weight_map": {name: f"pytorch_model-{i % 2 + 1:05d}-of-00002.bin" for i, name in enumerate(names)}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(of_bins))
    wrong = {"weight_map": {name: "model-00001-of-00003.safetensors" for name in [*names, "model.gone.weight"]}}
    (source / "model.safetensors.index.json").write_text(json.dumps(wrong))
    convert(tmp_path / "wrong", source)
    for found in ("without", "wrong"):
        to_torch.convert(tmp_path / found, tmp_path / f"{found}_torch")
        assert_same(without_rotary(load(tmp_path / f"{found}_torch")), tensors)


def test_dtype_and_mesh_options(tmp_path):
    tensors = random_tensors(DENSE)
    source = write_folder(tmp_path / "source", DENSE, tensors)
    convert(tmp_path / "jax", source, dtype="bf16", mesh=MeshConfig(data=1, fsdp=2, tensor=2))
    stored = to_torch.open_checkpoint(tmp_path / "jax")
    assert {stored.dtype(path) for path in stored.arrays} == {np.dtype(ml_dtypes.bfloat16)}
    stores = open_stores(stored.folder)
    gate = combine(*stores.values())["llm"]["mlp"]["gate"]["kernel"]
    assert gate.chunk_layout.read_chunk.shape == (1, 8, 12)
    to_torch.convert(tmp_path / "jax", tmp_path / "torch")
    expected = {name: x.astype(ml_dtypes.bfloat16).view(np.int16) for name, x in tensors.items()}
    assert_same(without_rotary(load(tmp_path / "torch")), expected)


def test_restores_onto_a_mesh(tmp_path):
    """With shardings, each device holds its own part and the values are the same."""
    from medplib_jax.models.layers import model_shardings
    from medplib_jax.parallel.mesh import make_mesh

    convert(tmp_path / "jax", write_folder(tmp_path / "source", DENSE, random_tensors(DENSE)))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, placed, _ = checkpoint.load_params(
        str(tmp_path / "jax"), shardings=model_shardings(from_torch.model_shapes(DENSE), mesh)
    )
    _, whole, _ = checkpoint.load_params(str(tmp_path / "jax"))
    gate = placed["llm"]["mlp"]["gate"]["kernel"]
    assert gate.addressable_shards[0].data.shape == (3, 8, 12)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(whole), strict=True))
