"""One training step on every mesh of eight devices:

The losses and gradients of one device, for what each stage trains.
"""

import dataclasses
import functools
import importlib
import re

import jax
import numpy as np
import optax
import pytest

from medplib_jax.batch import flatten
from medplib_jax.config.base import from_config_dict
from medplib_jax.config.experiment import ExperimentConfig, MeshConfig, OptimConfig
from medplib_jax.config.model import IclConfig
from medplib_jax.models.layers import model_shardings
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.parallel.sharding import put_batch
from medplib_jax.train.step import CompiledStep, abstract_model, make_state, make_train_step, state_shardings
from tests.helpers import MODEL, assert_gradients_close, constant, init_params, random_batch, tiny_experiment

STAGES = ("stage1_align", "stage2_vqa", "stage3_grounding", "stage4_moe", "stage5_icl")
MESHES = ((8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 2, 4))  # data x fsdp x expert x tensor
RATE = 1024.0
CASES = [(stage, "dropless") for stage in STAGES] + [("stage4_moe", "capacity")]
# Every stage, every mesh and both ways to dispatch occur in the default selection.
SELECTED = {
    ("stage1_align", "dropless", (8, 1, 1, 1)),
    ("stage2_vqa", "dropless", (1, 8, 1, 1)),
    ("stage3_grounding", "dropless", (1, 1, 2, 4)),
    ("stage4_moe", "dropless", (1, 2, 2, 2)),
    ("stage4_moe", "capacity", (2, 2, 2, 1)),
    ("stage5_icl", "dropless", (1, 2, 2, 2)),
}


def small(stage: str, dispatch: str) -> ExperimentConfig:
    """What a stage of the 7B model adapts, trains and weighs, on a model of a few thousand parameters."""
    config = from_config_dict(importlib.import_module(f"configs.{stage}").get_config("7b"), ExperimentConfig)
    model = dataclasses.replace(
        MODEL,
        llm=dataclasses.replace(MODEL.llm, num_heads=4, num_kv_heads=4),
        moe=dataclasses.replace(config.model.moe, dispatch=dispatch, capacity_factor=1.0),  # some tokens are dropped
        lora=dataclasses.replace(config.model.lora, rank=config.model.lora.rank and 2, dropout=0.0),
        remat="projections",
        icl=IclConfig("separate", compressed_tokens=2, mask_tokens=1) if stage == "stage5_icl" else IclConfig(),
    )
    loss = dataclasses.replace(config.loss, iou=0.5 * (config.data.max_masks > 0))
    pictures = min(2, config.data.max_images)
    data = dataclasses.replace(tiny_experiment().data, max_masks=2 * config.data.max_masks, max_images=pictures)
    return tiny_experiment(model=model, loss=loss, data=data, optim=OptimConfig(trainable=config.optim.trainable))


def step(config: ExperimentConfig, sizes: tuple[int, ...]):
    """(metrics, gradients); plain SGD at a high rate shows the gradients themselves, not lost in the parameters' last
    digits.
    """
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    model, tx = abstract_model(config.model, config.sharding), optax.sgd(RATE)
    shardings = state_shardings(model, config, tx, mesh)
    params = varied(init_params(config, model_shardings(model, mesh)))
    state = jax.jit(lambda p: make_state(p, config, tx), out_shardings=shardings)(params)
    before = jax.device_get(state.trainable)
    run = CompiledStep(make_train_step(model, config, tx), shardings, constant(RATE))
    state, metrics = run(state, put_batch(random_batch(config), mesh, config.data.batch_size))
    return jax.device_get(metrics), flatten(
        jax.tree.map(lambda old, new: (old - new) / RATE, before, jax.device_get(state.trainable))
    )


def varied(params):
    """Adapters' second factors start at zero, and hide the first ones' gradients."""

    def value(path, x):
        return x + 0.1 * np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape) if path[-1].key == "lora_b" else x

    return jax.tree_util.tree_map_with_path(value, params)


@functools.cache
def on_one_device(stage: str, dispatch: str):
    return step(small(stage, dispatch), (1, 1, 1, 1))


def _case(stage, dispatch, mesh):
    name = f"{stage}-{dispatch}-{'x'.join(map(str, mesh))}"
    return pytest.param(
        stage, dispatch, mesh, id=name, marks=() if (stage, dispatch, mesh) in SELECTED else pytest.mark.slow
    )


@pytest.mark.parametrize(("stage", "dispatch", "mesh"), [_case(*case, mesh) for case in CASES for mesh in MESHES])
def test_a_mesh_changes_neither_losses_nor_gradients(stage, dispatch, mesh, capfd):
    expected_metrics, expected = on_one_device(stage, dispatch)
    metrics, gradients = step(small(stage, dispatch), mesh)
    assert "nvoluntary full rematerialization" not in capfd.readouterr().err
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert dispatch == "dropless" or 0 < metrics["dropped"] < 1
    assert_gradients_close(gradients, expected)
    for path, gradient in expected.items():
        assert gradient.any() or re.search("^region|hypernetworks/[1-9]", path), (
            path
        )  # not of every batch; of masks that are not drawn
