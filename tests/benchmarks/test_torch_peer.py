"""The PyTorch program that we are measured against computes the same numbers from the same parameters."""

import functools

import jax
import numpy as np
import pytest

from configs import stage3_grounding, stage4_moe
from convert.to_torch import original_tensors
from medplib_jax.batch import flatten
from medplib_jax.benchmarks import workload
from medplib_jax.benchmarks.measure import Samples, side_by_side
from medplib_jax.benchmarks.torch_peer import loaded, to_torch
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.models.layers import bind, draw_params
from medplib_jax.train.losses import divisors, total_loss
from medplib_jax.train.optim import partition
from medplib_jax.train.step import abstract_model

RECIPES = {"III": stage3_grounding.large(), "IV": stage4_moe.large()}
CONFIG = workload.experiment(RECIPES["IV"], workload.TINY, 2)


@functools.cache
def params():
    """Nothing is zero: adapters and biases count."""
    rng = np.random.default_rng(0)
    drawn = draw_params(abstract_model(CONFIG.model), 0)
    return jax.tree.map(lambda x: x if x.any() else 0.1 * rng.standard_normal(x.shape, np.float32), drawn)


def peer_of(model, params, trainable=()):
    return loaded(model, original_tensors(model, params), trainable)


@pytest.mark.parametrize("stage", ["III", "IV"])
def test_the_same_parts_train(stage):
    config = workload.experiment(RECIPES[stage], workload.TINY, 2)
    drawn = draw_params(abstract_model(config.model), 0)
    ours, _ = partition(drawn, config.optim.trainable)
    theirs = peer_of(config.model, drawn, config.optim.trainable).trainable()
    unused = sum(leaf.size for path, leaf in flatten(ours).items() if "prompt_encoder" in path)
    assert (
        sum(parameter.numel() for parameter in theirs) == sum(leaf.size for leaf in jax.tree.leaves(ours)) - unused > 0
    )


def test_loss_and_gradient_are_the_same():
    batch, model = workload.example_batch(CONFIG), abstract_model(CONFIG.model)

    def loss(trainable, frozen):
        joined = jax.tree.map(lambda x: x, frozen) | {"llm": frozen["llm"] | trainable}
        output, _ = bind(model, joined)(batch)
        return total_loss(output, joined["llm"]["head"]["kernel"], batch, CONFIG.loss, CONFIG.model, divisors(batch))[0]

    ours, gradient = jax.jit(jax.value_and_grad(loss))({"head": params()["llm"]["head"]}, params())
    peer = peer_of(CONFIG.model, params(), CONFIG.optim.trainable).eval()  # no dropout, and room for every token
    theirs = peer(to_torch(batch), {name: getattr(CONFIG.loss, name) for name in ("ce", "dice", "bce")})
    theirs.backward()
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    expected = peer.llm.lm_head.weight.grad.numpy().T
    np.testing.assert_allclose(gradient["head"]["kernel"], expected, atol=1e-4 * np.abs(expected).max())


def test_answers_are_the_same():
    config = workload.merged(CONFIG)
    ours = draw_params(abstract_model(config.model), 0)
    batch = workload.example_batch(config)
    found = Generator(config.model, ours, DecodeOptions(max_new_tokens=4, max_masks=0), stop_ids=(-1,), seg_id=-1)(
        batch
    ).tokens
    np.testing.assert_array_equal(found, peer_of(config.model, ours).eval().generate(to_torch(batch), 4))


def test_a_table_names_the_speedup():
    table = side_by_side(
        "Step",
        "train_step",
        {"ours": Samples([2.0, 1.0, 3.0], [4.0] * 3), "torch eager": Samples([5.0, 6.0, 7.0], [8.0] * 3)},
        "step",
    )
    assert table.flat["train_step.speedup"] == 3.0 and table.flat["train_step.ours.spread"] == 0.5
    assert "| torch eager | 6.000 | 17 % | 8.000 | 3.00 | 5.00 |" in str(table)
