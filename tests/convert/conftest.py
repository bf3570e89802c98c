"""A tiny model, its PyTorch tensors, and a folder of files as the original program writes them."""

import functools
import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest

from convert import from_torch, hf_config, mapping
from medplib_jax.batch import flatten
from medplib_jax.config.model import ClipConfig, LlmConfig, LoraConfig, MaskConfig, ModelConfig, MoeConfig
from medplib_jax.models.layers import params_of
from tests.paths import GOLDEN

TOKENIZER = GOLDEN / "tokenizer"
VOCAB = 667

TINY = ModelConfig(
    clip=ClipConfig(image_size=28, patch_size=14, hidden_size=8, num_layers=2, num_heads=2, mlp_dim=16),
    llm=LlmConfig(vocab_size=VOCAB, hidden_size=16, num_layers=3, num_heads=2, num_kv_heads=2, mlp_dim=24),
    moe=MoeConfig(num_experts=2, layers="sparse"),
    mask=MaskConfig(
        image_size=64,
        hidden_size=12,
        num_layers=2,
        num_heads=2,
        window_size=2,
        global_layers=(1,),
        out_dim=16,
        decoder_mlp_dim=16,
        iou_head_dim=16,
    ),
)
LORA = LoraConfig(rank=2, alpha=16.0, targets=("down", "gate", "q"))


@pytest.fixture(scope="session", autouse=True)
def shapes_once():
    """Tracing the model takes seconds; every conversion of a session asks for one of a few."""
    patch = pytest.MonkeyPatch()
    patch.setattr(from_torch, "model_shapes", functools.cache(from_torch.model_shapes))
    yield
    patch.undo()


def random_tensors(config: ModelConfig, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """PyTorch name -> random tensor, for every tensor of the model (merged names)."""
    shapes = {path: leaf.shape for path, leaf in flatten(params_of(from_torch.model_shapes(config))).items()}
    random = np.random.default_rng(seed)
    places = mapping.entries(config, shapes)
    return {
        key: random.standard_normal(place.torch_shape(shapes[place.path])).astype(dtype)
        for key, place in places.items()
    }


def write_folder(folder: pathlib.Path, config: ModelConfig, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    """A source folder as others write it: one safetensors file (of the safetensors package), config.json without
    our record, the vision tower's config.json, and the tokenizer."""
    folder.mkdir(parents=True)
    save(folder / "model.safetensors", tensors)
    tower = {"mm_vision_tower": "clip", "vision_tower": "clip"}
    written = hf_config.model_json(config, tower, next(iter(tensors.values())).dtype)
    written["mask_unpad"] = config.mask.unpad
    (folder / "config.json").write_text(json.dumps(written))
    (folder / "clip").mkdir()
    (folder / "clip" / "config.json").write_text(json.dumps(hf_config.tower_json(config.clip)))
    for path in TOKENIZER.iterdir():
        shutil.copyfile(path, folder / path.name)
    return folder


def save(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    import torch
    from safetensors.torch import save_file

    def as_torch(x):
        return (
            torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
            if x.dtype == ml_dtypes.bfloat16
            else torch.from_numpy(x.copy())
        )

    converted = {name: as_torch(x) for name, x in tensors.items()}
    save_file(converted, path, metadata={"format": "pt"}) if path.suffix == ".safetensors" else torch.save(
        converted, path
    )


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, by the packages' own readers; bfloat16 as its bits."""
    import torch
    from safetensors.torch import load_file

    tensors = {}
    for file in sorted([*path.glob("*.safetensors"), *path.glob("*.bin")]):
        tensors |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    return {
        name: x.view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.numpy() for name, x in tensors.items()
    }


def bits(x: np.ndarray) -> bytes:
    return x.tobytes()
