"""The step on one device, on meshes of eight, and in micro-batches computes the same numbers."""

import dataclasses

import chex
import jax
import numpy as np
import optax
import pytest

from medplib_jax.batch import flatten
from medplib_jax.config.experiment import MeshConfig, OptimConfig
from medplib_jax.models.layers import model_shardings, params_of
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.parallel.sharding import put_batch
from medplib_jax.train.optim import make_optimizer, make_schedule, partition
from medplib_jax.train.step import (
    CompiledStep,
    Knobs,
    abstract_model,
    make_state,
    make_train_step,
    split_batch,
    state_shardings,
)
from tests.helpers import constant, init_params, random_batch, tiny_experiment


def setup(config, mesh):
    """(compiled step, state at step 0) on a mesh; plain SGD shows the gradients themselves."""
    model = abstract_model(config.model, config.sharding)
    tx = optax.sgd(1.0)
    shardings = state_shardings(model, config, tx, mesh)
    params = init_params(config, model_shardings(model, mesh))
    state = jax.jit(lambda p: make_state(p, config, tx), out_shardings=shardings)(params)
    return CompiledStep(make_train_step(model, config, tx), shardings, constant(1.0)), state


def one_step(config, mesh_config, devices):
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    step, state = setup(config, mesh)
    before = jax.device_get(state.trainable)
    state, metrics = step(state, put_batch(random_batch(config), mesh, config.data.batch_size))
    gradients = jax.tree.map(np.subtract, before, jax.device_get(state.trainable))
    return jax.device_get(metrics), flatten(gradients), state


@pytest.fixture(scope="module")
def reference():
    return one_step(tiny_experiment(), MeshConfig(), 1)


def same(actual, expected, skip_metrics=()):
    (metrics, gradients), (expected_metrics, expected_gradients) = actual[:2], expected[:2]
    for name in set(expected_metrics) - set(skip_metrics):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)
    scale = max(np.abs(g).max() for g in expected_gradients.values())
    for path, gradient in expected_gradients.items():
        np.testing.assert_allclose(
            gradients[path], gradient, atol=1e-4 * max(np.abs(gradient).max(), 1e-3 * scale), err_msg=path
        )


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 4}, {"fsdp": 2, "expert": 2, "tensor": 2, "data": 1}])
def test_a_mesh_of_eight_devices_gives_the_same_losses_and_gradients(reference, mesh):
    result = one_step(tiny_experiment(), MeshConfig(**mesh), 8)
    same(result, reference)
    if mesh.get("fsdp", 1) > 1:
        q = result[2].trainable["llm"]["layers"]["attn"]["q"]["kernel"]
        assert q.addressable_shards[0].data.size == q.size // (mesh["fsdp"] * mesh.get("tensor", 1))


@pytest.mark.parametrize("parts", [4])
def test_micro_batches_add_up_to_the_batch(reference, parts):
    config = tiny_experiment()
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulate=parts))
    # the router's balance is not linear in the tokens; its weight in the loss is 0
    same(one_step(config, MeshConfig(), 1), reference, skip_metrics=("aux", "expert_load/0", "expert_load/1"))


def test_micro_batches_take_every_nth_row():
    batch = random_batch(tiny_experiment())
    np.testing.assert_array_equal(split_batch(batch, 4).record, [[0, 4], [1, 5], [2, 6], [3, 7]])


def test_a_bucket_is_compiled_once(reference):
    config = tiny_experiment()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    step, state = setup(config, mesh)
    batches = [put_batch(random_batch(config, seed=seed), mesh, 8) for seed in range(2)]
    assert step.compile(state, batches[0]) > 0 and step.compile(state, batches[1]) == 0
    for batch in batches:
        state, _ = step(state, batch)
    assert int(state.step) == 2
    other = random_batch(tiny_experiment(data=dataclasses.replace(config.data, max_masks=1)))
    with pytest.raises(TypeError, match="gt_masks|compiled"):
        step(state, put_batch(other, mesh, 8))


@pytest.mark.parametrize("seed", [0, 7, 2**31 + 5, 2**40 + 3])
def test_any_seed_draws_as_it_does_outside_a_program(seed):
    knobs = Knobs(make_schedule(OptimConfig(), 10, 10), seed).arrays()
    drawn = jax.jit(lambda knobs: jax.random.key_data(jax.random.key(knobs.seed)))(knobs)
    np.testing.assert_array_equal(drawn, jax.random.key_data(jax.random.key(seed)))


def test_frozen_parameters_keep_their_values_and_take_their_dtype():
    config = tiny_experiment(optim=OptimConfig(trainable=("lora_[ab]$",), frozen_dtype="bfloat16", lr=1e-2, warmup=0))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = abstract_model(config.model, config.sharding)
    trainable, _ = partition(params_of(model), config.optim.trainable)
    tx = make_optimizer(config.optim, trainable)
    shardings = state_shardings(model, config, tx, mesh)
    params = init_params(config, model_shardings(model, mesh))
    state = jax.jit(lambda p: make_state(p, config, tx), out_shardings=shardings)(params)
    before = jax.device_get((state.trainable, state.frozen))
    knobs = Knobs(make_schedule(config.optim, 10, 10), config.train.seed)
    step = CompiledStep(make_train_step(model, config, tx), shardings, knobs)
    for seed in range(3):
        state, metrics = step(state, put_batch(random_batch(config, seed=seed), mesh, 8))
    assert {path[-6:] for path in flatten(state.trainable)} == {"lora_a", "lora_b"}
    dtypes = {path: leaf.dtype.name for path, leaf in flatten(state.frozen).items()}
    constants = {path for path in dtypes if path.endswith("position_gaussian")}  # SAM's Fourier frequencies
    assert constants and all(dtypes.pop(path) == "float32" for path in constants)
    assert set(dtypes.values()) == {"bfloat16"}
    chex.assert_trees_all_equal(jax.device_get(state.frozen), before[1])
    changed = [
        path
        for path, leaf in flatten(jax.device_get(state.trainable)).items()
        if (leaf != flatten(before[0])[path]).any()
    ]
    assert changed and metrics["grad_norm"] > 0 and metrics["lr"] > 0
