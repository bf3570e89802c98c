"""A model and batches small enough to train in a test."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.tree_util import Partial

from medplib_jax.batch import Batch, Params
from medplib_jax.config.experiment import DataConfig, ExperimentConfig, LossConfig, OptimConfig
from medplib_jax.config.model import ClipConfig, LlmConfig, LoraConfig, MaskConfig, ModelConfig, MoeConfig, RegionConfig
from medplib_jax.models.layers import draw_params
from medplib_jax.train.step import Knobs, abstract_model, place

MODEL = ModelConfig(
    clip=ClipConfig(image_size=28, patch_size=14, hidden_size=16, num_layers=2, num_heads=2, mlp_dim=32),
    llm=LlmConfig(
        vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, mlp_dim=32, max_positions=64
    ),
    moe=MoeConfig(num_experts=2, top_k=1),
    mask=MaskConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        window_size=3,
        global_layers=(),
        out_dim=16,
        mask_in_dim=4,
        decoder_layers=1,
        decoder_mlp_dim=16,
        decoder_heads=2,
        iou_head_dim=16,
    ),
    region=RegionConfig(max_points=4),
    lora=LoraConfig(rank=2, alpha=4.0, targets=("gate", "up", "down", "q")),
)


def tiny_experiment(**sections) -> ExperimentConfig:
    """All losses on, everything but CLIP trains; sections as in ExperimentConfig."""
    base = ExperimentConfig(
        model=MODEL,
        data=DataConfig(bucket_lengths=(16,), batch_size=8, max_regions=1, max_masks=2, mask_canvas=20),
        optim=OptimConfig(lr=1e-2, trainable=("^llm/", "^sam/", "^seg_mlp/", "^region/", "^projector/")),
        loss=LossConfig(ce=1.0, dice=0.5, bce=2.0, focal=1.0, iou=0.5),
    )
    return dataclasses.replace(base, **sections)


def constant(rate: float) -> Knobs:
    """Of steps that all have this learning rate."""
    return Knobs(Partial(lambda step: rate), 0)


def init_params(config: ExperimentConfig, shardings: Params) -> Params:
    """Random float32 parameters from `train.seed`, placed where they belong."""
    return place(draw_params(abstract_model(config.model), config.train.seed), shardings)


def random_batch(config: ExperimentConfig, length: int = 16, seed: int = 0) -> Batch:
    """Rows of different lengths, some with a region, with no, one or two masks."""
    rng = np.random.default_rng(seed)
    data, model = config.data, config.model
    B, M, canvas = data.batch_size, data.max_masks, data.mask_canvas
    patches, clip, sam = model.image_tokens, model.clip.image_size, model.mask.image_size
    shown = data.max_images - 1 if model.icl.mask_tokens else 0
    lengths = rng.integers(length // 2 + 2, length + 1, B)
    valid = np.arange(length) < lengths[:, None]
    feature_index = np.full((B, length), -1, np.int32)
    feature_index[:, 1 : 1 + patches] = np.arange(patches)
    feature_index[::2, 1 + patches] = data.max_images * patches  # every second row has a region
    if shown:  # and every row a token of an example's mask
        feature_index[:, 2 + patches] = data.max_images * patches + data.max_regions
    weights = (valid & (np.arange(length) > patches + 2) & (rng.random((B, length)) < 0.8)).astype(np.float32)
    mask_valid = np.arange(M) < rng.integers(0, M + 1, (B, 1))
    mask_size = rng.integers(canvas // 2, canvas + 1, (B, 2)).astype(np.int32)
    return Batch(
        tokens=rng.integers(3, model.llm.vocab_size, (B, length)).astype(np.int32) * valid,
        valid=valid,
        targets=rng.integers(3, model.llm.vocab_size, (B, length)).astype(np.int32),
        loss_weights=weights,
        feature_index=feature_index,
        clip_pixels=rng.integers(0, 256, (B, data.max_images, clip, clip, 3)).astype(np.uint8),
        sam_pixels=rng.integers(0, 256, (B, sam, sam, 3)).astype(np.uint8),
        sam_box=np.tile(np.array([2, 0, sam - 4, sam], np.int32), (B, 1)),
        region_points=rng.random((B, data.max_regions, model.region.max_points, 2)).astype(np.float32),
        region_point_valid=rng.random((B, data.max_regions, model.region.max_points)) < 0.7,
        region_image=np.zeros((B, data.max_regions), np.int32),
        seg_position=(rng.integers(patches + 2, length // 2, (B, M)) * mask_valid).astype(np.int32),
        mask_valid=mask_valid,
        gt_masks=(rng.random((B, M, canvas, canvas)) < 0.4).astype(np.uint8),
        mask_size=mask_size,
        record=np.arange(B, dtype=np.int32),
        example_masks=(rng.random((B, shown, 336, 336)) < 0.3).astype(np.uint8) if shown else None,
    )


def assert_gradients_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same arrays to 1e-5 of the largest value of each; of arrays with hardly any, to that of the largest of all.

    More so a key's bias. It shifts all scores alike, softmax does not see it, and its gradient is nothing but rounding.
    """
    assert found.keys() == expected.keys()
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for path, gradient in expected.items():
        scale = max(np.abs(gradient).max(), (1e-2 if path.endswith("/k/bias") else 1e-3) * largest)
        np.testing.assert_allclose(found[path], gradient, rtol=0, atol=1e-5 * scale, err_msg=path)


@contextlib.contextmanager
def interpreted_kernels(capsys: pytest.CaptureFixture[str]):
    """Kernels of a TPU run on CPU devices. Fails when two of a kernel's accesses to memory race."""
    capsys.readouterr()
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    jax.effects_barrier()  # results are promises: kernels still run, and the interpreter's memory is one for all
    pltpu.reset_tpu_interpret_mode_state()
    assert "race" not in capsys.readouterr().out.lower()
