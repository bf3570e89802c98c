"""A BiRD of a few thousand parameters and batches for it, for tests of every room."""

import dataclasses

import numpy as np

from medplib_jax.batch import Batch
from medplib_jax.config.experiment import DataConfig, ExperimentConfig, OptimConfig
from medplib_jax.config.model import LlmConfig, ModelConfig, QwenVisionConfig
from medplib_jax.models.families import build_model
from medplib_jax.models.layers import abstract_module, draw_params
from tests.convert.qwen_vl_checks import without_masks

SIDE, QUERIES = 28, 4
MODEL = ModelConfig(
    family="bird",
    vit=QwenVisionConfig(
        image_size=SIDE,
        patch_size=7,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        mlp_dim=24,
        position_grid=2,
        num_queries=QUERIES,
        resampler_head_dim=8,
    ),
    llm=LlmConfig(
        vocab_size=640,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        mlp_dim=48,
        rms_norm_eps=1e-6,
        max_positions=64,
        fused_qkv=True,
        trained_length=8,
    ),
)


def params(config: ModelConfig = MODEL, seed: int = 0) -> dict:
    return draw_params(abstract_module(lambda rngs: build_model(config, rngs)), seed)


def batch(rows: int = 8, length: int = 24, images: int = 1, seed: int = 0) -> Batch:
    """Rows of random text behind their pictures, padded on the right by different lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(length // 2, length + 1, rows)
    valid = np.arange(length) < lengths[:, None]
    index = np.where(np.arange(length) - 1 < images * QUERIES, np.arange(length) - 1, -1)
    tokens = np.where(valid & (index < 0), rng.integers(1, 416, (rows, length)), 0).astype(np.int32)
    return Batch(
        tokens=tokens,
        valid=valid,
        targets=np.roll(tokens, -1, 1),
        loss_weights=(valid & (np.arange(length) < lengths[:, None] - 1)).astype(np.float32),
        feature_index=np.broadcast_to(index, (rows, length)).astype(np.int32),
        clip_pixels=rng.integers(0, 256, (rows, images, SIDE, SIDE, 3), dtype=np.uint8),
        **without_masks(rows),
    )


def experiment(**changes) -> ExperimentConfig:
    data = DataConfig(batch_size=8, bucket_lengths=(24,), template="chatml", max_regions=0, max_masks=0)
    return dataclasses.replace(ExperimentConfig(model=MODEL, data=data, optim=OptimConfig()), **changes)
