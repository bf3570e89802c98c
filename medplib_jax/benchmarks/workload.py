"""The models, batches and the PyTorch rival that are measured.

Sizes follow the original's own measurements on a CPU, and MedPLIB-7B on an accelerator.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from medplib_jax.batch import Batch, Params
from medplib_jax.config.experiment import DataConfig, ExperimentConfig, LossConfig
from medplib_jax.config.model import (
    ClipConfig,
    LlmConfig,
    LoraConfig,
    MaskConfig,
    ModelConfig,
    MoeConfig,
    QwenVisionConfig,
    RegionConfig,
)
from medplib_jax.models.layers import draw_params
from medplib_jax.train.step import abstract_model

TEXT = 64  # positions of text; the rest of a row is the picture

SMALL = ModelConfig(
    clip=ClipConfig(image_size=336, patch_size=14, hidden_size=256, num_layers=6, num_heads=4, mlp_dim=1024),
    llm=LlmConfig(vocab_size=32267, hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=8, mlp_dim=1376),
    mask=MaskConfig(hidden_size=192, num_layers=6, num_heads=3, global_layers=(2, 5)),
    scan_unroll=8,  # a loop on a CPU copies what its steps keep for the backward pass
)
TINY = ModelConfig(
    clip=ClipConfig(image_size=56, patch_size=14, hidden_size=32, num_layers=2, num_heads=2, mlp_dim=64),
    llm=LlmConfig(
        vocab_size=400, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2, mlp_dim=96, max_positions=256
    ),
    mask=MaskConfig(
        image_size=64,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        window_size=3,
        global_layers=(1,),
        out_dim=32,
        decoder_heads=2,
        decoder_mlp_dim=64,
        iou_head_dim=32,
    ),
    region=RegionConfig(max_points=16),
)


SMALL_BIRD = ModelConfig(
    family="bird",
    vit=QwenVisionConfig(hidden_size=256, num_layers=6, num_heads=4, mlp_dim=1024, num_queries=64),
    llm=dataclasses.replace(SMALL.llm, fused_qkv=True, trained_length=2048, rms_norm_eps=1e-6),
    scan_unroll=8,
)
TINY_BIRD = ModelConfig(
    family="bird",
    vit=QwenVisionConfig(
        image_size=56, hidden_size=32, num_layers=2, num_heads=2, mlp_dim=64, num_queries=16, resampler_head_dim=32
    ),
    llm=dataclasses.replace(TINY.llm, fused_qkv=True, trained_length=256, rms_norm_eps=1e-6),
)
BIRD_LENGTHS = {"small": 640, "tiny": 64}  # positions of a row

MODELS = {"small": SMALL, "tiny": TINY}
BIRDS = {"small": SMALL_BIRD, "tiny": TINY_BIRD}
SIZES = (*MODELS, "7b")


def model(size: str, layers: int) -> ModelConfig:
    """One of SIZES. "7b" is MedPLIB-7B with fewer decoder layers, as many as fit one device beside the peer."""
    if size in MODELS:
        return MODELS[size]
    large = ModelConfig(
        dtype="bfloat16", remat="products", scan_unroll=layers
    )  # a loop copies what its steps keep, as on a CPU
    return dataclasses.replace(large, llm=dataclasses.replace(large.llm, num_layers=layers))


def experiment(recipe: ExperimentConfig, model: ModelConfig, batch_size: int) -> ExperimentConfig:
    """A published recipe (what trains, which losses) with this model's sizes.

    Logits exist in smaller chunks than suit a TPU's matrix unit.
    """
    model = dataclasses.replace(model, moe=recipe.model.moe, lora=recipe.model.lora)
    length = model.clip.num_patches + TEXT
    data = DataConfig(
        bucket_lengths=(length,), batch_size=batch_size, max_regions=1, max_masks=1, mask_canvas=model.mask.image_size
    )
    optim = dataclasses.replace(recipe.optim, frozen_dtype=model.dtype)
    loss = dataclasses.replace(recipe.loss, ce_chunk=LossConfig.ce_chunk)
    return dataclasses.replace(recipe, model=model, data=data, optim=optim, loss=loss, init=type(recipe.init)())


def bird_experiment(recipe: ExperimentConfig, size: str, batch_size: int) -> ExperimentConfig:
    """BiRD's published recipe with the sizes of BIRDS."""
    data = DataConfig(
        template="chatml", bucket_lengths=(BIRD_LENGTHS[size],), batch_size=batch_size, max_regions=0, max_masks=0
    )
    model, loss = BIRDS[size], dataclasses.replace(recipe.loss, ce_chunk=LossConfig.ce_chunk)
    optim = dataclasses.replace(recipe.optim, frozen_dtype=model.dtype)
    return dataclasses.replace(recipe, model=model, data=data, optim=optim, loss=loss, init=type(recipe.init)())


def dense(config: ExperimentConfig) -> ExperimentConfig:
    """The same with one MLP in place of each mixture: as many active parameters."""
    trainable = tuple(pattern for pattern in config.optim.trainable if "router" not in pattern)
    model = dataclasses.replace(config.model, moe=MoeConfig())
    return dataclasses.replace(config, model=model, optim=dataclasses.replace(config.optim, trainable=trainable))


def merged(config: ExperimentConfig) -> ExperimentConfig:
    """For answering: no adapters."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, lora=LoraConfig()))


def example_batch(config: ExperimentConfig, seed: int = 0) -> Batch:
    """Full rows: 8 positions of prompt, the picture, a question, which may have a region, and an answer.

    The answer has 32 tokens with one <SEG>, of a model without masks half of the row.
    """
    rng = np.random.default_rng(seed)
    model, data = config.model, config.data
    B, L, patches = data.batch_size, data.bucket_lengths[-1], model.image_tokens
    feature_index = np.full((B, L), -1, np.int32)
    feature_index[:, 8 : 8 + patches] = np.arange(patches)
    if data.max_regions:
        feature_index[:, 16 + patches] = patches
    tokens = rng.integers(3, model.llm.vocab_size, (B, L)).astype(np.int32) * (feature_index < 0)
    answer = (np.arange(L) >= L - (33 if model.draws_masks else L // 2)) & (np.arange(L) < L - 1)
    side, canvas = model.mask_image_size, data.mask_canvas
    return Batch(
        tokens=tokens,
        valid=np.ones((B, L), bool),
        targets=np.roll(tokens, -1, axis=1),
        loss_weights=np.tile(answer.astype(np.float32), (B, 1)),
        feature_index=feature_index,
        clip_pixels=rng.integers(0, 256, (B, 1, model.image_size, model.image_size, 3)).astype(np.uint8),
        sam_pixels=rng.integers(0, 256, (B, side, side, 3)).astype(np.uint8),
        sam_box=np.tile(np.array([0, 0, side, side], np.int32), (B, 1)),
        region_points=rng.random((B, data.max_regions, model.region.max_points, 2)).astype(np.float32),
        region_point_valid=np.ones((B, data.max_regions, model.region.max_points), bool),
        region_image=np.zeros((B, data.max_regions), np.int32),
        seg_position=np.full((B, data.max_masks), L - 4, np.int32),
        mask_valid=np.ones((B, data.max_masks), bool),
        gt_masks=(rng.random((B, data.max_masks, canvas, canvas)) < 0.3).astype(np.uint8),
        mask_size=np.full((B, 2), canvas, np.int32),
        record=np.arange(B, dtype=np.int32),
    )


@dataclasses.dataclass(frozen=True)
class Rival:
    """The PyTorch program of `torch_peer.py` or `bird_peer.py`, with the parameters and the batch that ours has.

    `tensors(config, params)` yields (the original's tensor name, path in our tree, values) of every parameter. With
    `compiled`, `torch.compile` is measured as well.
    """

    tensors: Callable[[ModelConfig, Params], Iterable[tuple[str, str, np.ndarray]]]
    device: str = "cpu"
    compiled: bool = False

    @property
    def sides(self) -> tuple[str, ...]:
        return ("torch eager", "torch compile") if self.compiled else ("torch eager",)

    def model(self, config: ModelConfig, trainable: Sequence[str] = ()):
        """A `Peer` on the device, all in the config's type.

        `trainable`: patterns of the paths that have gradients.
        """
        import torch

        tensors = self.tensors(config, draw_params(abstract_model(config), 0))
        return _peers(config).loaded(config, tensors, trainable).to(self.device, getattr(torch, config.dtype))

    def inputs(self, config: ExperimentConfig) -> Mapping[str, Any]:
        """`example_batch` as the peer takes it."""
        import torch

        batch = example_batch(config)
        return _peers(config.model).to_torch(batch, self.device, getattr(torch, config.model.dtype))


def _peers(config: ModelConfig) -> ModuleType:
    """The PyTorch program of this whole model. Imported when it is used: PyTorch is an extra."""
    name = {"medplib": "torch_peer", "bird": "bird_peer"}[config.family]
    return importlib.import_module(f"medplib_jax.benchmarks.{name}")
