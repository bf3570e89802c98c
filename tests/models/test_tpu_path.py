"""The programs that a TPU gets, run on CPU devices by Pallas' interpreter of TPU kernels, with its detector of races.

They give what the programs of a CPU give.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medplib_jax.batch import flatten
from medplib_jax.config.experiment import DataConfig, MeshConfig, ShardingConfig
from medplib_jax.config.model import LoraConfig
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.models.kernels.grouped_matmul import grouped_matmul
from medplib_jax.models.language.attention import attend_within
from medplib_jax.models.layers import abstract_module, draw_params, model_shardings
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.models.target import made_for
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.parallel.sharding import put_batch
from medplib_jax.train.step import CompiledStep, abstract_model, make_state, make_train_step, state_shardings
from tests.helpers import (
    MODEL,
    assert_gradients_close,
    constant,
    init_params,
    interpreted_kernels,
    random_batch,
    tiny_experiment,
)

LENGTH, ROWS = 256, 8  # so many positions that a device sorts its tokens by expert
WIDE = dataclasses.replace(  # heads of 128, which splash attention takes
    MODEL,
    llm=dataclasses.replace(MODEL.llm, hidden_size=256, mlp_dim=128, max_positions=LENGTH),
    lora=dataclasses.replace(MODEL.lora, dropout=0.0),  # a TPU draws in another way
)


@contextlib.contextmanager
def on_tpu(capsys, kind=""):
    """Programs made for a TPU of some kind and interpreted."""
    with made_for("tpu", kind), interpreted_kernels(capsys):
        yield


def assert_close(found, expected):
    def compare(found, expected):
        found, expected = np.asarray(found), np.asarray(expected)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * max(1e-6, np.abs(expected).max()))

    jax.tree.map(compare, found, expected)


def test_grouped_products_and_their_gradients(capsys):
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((256, 128), (2, 128, 256))))

    def loss(x, w):
        return (grouped_matmul(x, w, jnp.array([100, 150])) ** 2).mean()

    both = jax.jit(jax.value_and_grad(loss, (0, 1)))
    expected, program = both(x, w), both.lower(x, w).as_text()
    with on_tpu(capsys):
        found = both(x, w)
        assert both.lower(x, w).as_text() != program, "it is a TPU's program"
    assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("segments", [None, np.repeat([[1, 2], [1, 1]], LENGTH // 2, axis=1)])
def test_attention_and_its_gradients(segments, capsys):
    check_attention(LENGTH, segments, capsys)


@pytest.mark.slow
def test_attention_whose_gradients_take_two_blocks_of_keys_at_once(capsys):
    check_attention(1024, None, capsys, "TPU v6 lite")


def check_attention(length, segments, capsys, kind=""):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, length, 2, 128)) for i in range(3))
    valid = np.arange(length) < np.array([[length], [length - 50]])

    def loss(q, k, v):
        y = attend_within(q, k, v, valid, segments, rules=None)
        return ((y * valid[:, :, None, None]) ** 2).mean()

    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    expected = both(q, k, v)
    with on_tpu(capsys, kind):
        found = both(q, k, v)
    assert_close(found, expected)


def trained(mesh: MeshConfig):
    """(metrics, gradients) of one step; plain SGD at a high rate shows the gradients themselves."""
    data = DataConfig(bucket_lengths=(LENGTH,), batch_size=ROWS, max_regions=1, max_masks=2, mask_canvas=20)
    config = tiny_experiment(model=WIDE, data=data, mesh=mesh)
    mesh = make_mesh(mesh, jax.devices()[: int(np.prod(mesh.sizes))])
    model, tx = abstract_model(config.model, config.sharding), optax.sgd(1024.0)
    shardings = state_shardings(model, config, tx, mesh)
    params = init_params(config, model_shardings(model, mesh))
    params = jax.tree.map_with_path(lambda path, x: x + 0.1 if path[-1].key == "lora_b" else x, params)
    state = jax.jit(lambda p: make_state(p, config, tx), out_shardings=shardings)(params)
    before = jax.device_get(state.trainable)
    step = CompiledStep(make_train_step(model, config, tx), shardings, constant(1024.0))
    state, metrics = step(state, put_batch(random_batch(config, LENGTH), mesh, ROWS))
    return jax.device_get(metrics), jax.tree.map(np.subtract, before, jax.device_get(state.trainable))


@pytest.fixture(scope="module")
def on_cpu():
    return trained(MeshConfig(data=1))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 8, 1, 1), (2, 2, 1, 2)], ids=str)
def test_a_training_step(sizes, on_cpu, capsys):
    with on_tpu(capsys):
        metrics, gradients = trained(MeshConfig(*sizes))
    assert_close(metrics, on_cpu[0])
    gradients, expected = flatten(gradients), flatten(on_cpu[1])
    assert_gradients_close(gradients, expected)
    for path in expected.keys() - {path for path in expected if path.endswith("/k/bias")}:
        assert_close(gradients[path], expected[path])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 1, 2)], ids=str)
def test_answers(sizes, capsys):
    model = dataclasses.replace(WIDE, lora=LoraConfig())
    params = draw_params(abstract_module(lambda rngs: MedPLIB(model, rngs)), 1)
    batch = random_batch(tiny_experiment(model=model), LENGTH - 8)

    def answers(sizes):
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        ends = {"stop_ids": (2,), "seg_id": 7}
        generator = Generator(model, params, DecodeOptions(6, 1), **ends, mesh=mesh, rules=ShardingConfig())
        return jax.device_get(generator(batch))

    expected = answers((1, 1, 1, 1))
    with on_tpu(capsys):
        found = answers(sizes)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.choices, expected.choices)
    assert_close(found.mask_logits, expected.mask_logits)
