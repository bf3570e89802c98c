"""The PyTorch program that BiRD is measured against computes the same numbers from the same parameters."""

import functools

import jax
import numpy as np

from configs import bird_grit
from convert.to_torch import original_tensors
from medplib_jax.benchmarks import workload
from medplib_jax.benchmarks.bird_peer import loaded, to_torch
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.models.layers import bind, draw_params
from medplib_jax.models.vision.qwen_vit import OWN_PLACE_GAIN
from medplib_jax.train.losses import divisors, total_loss
from medplib_jax.train.optim import partition
from medplib_jax.train.step import abstract_model

CONFIG = workload.bird_experiment(bird_grit.large(), "tiny", 2)


@functools.cache
def params():
    """Nothing is zero: biases count."""
    rng = np.random.default_rng(0)
    drawn = draw_params(abstract_model(CONFIG.model), 0)
    drawn["resampler"]["position_embed"] /= OWN_PLACE_GAIN  # as sharp as it begins, the queries' gradients are rounding
    return jax.tree.map(lambda x: x if x.any() else 0.1 * rng.standard_normal(x.shape, np.float32), drawn)


def peer(trainable=()):
    return loaded(CONFIG.model, original_tensors(CONFIG.model, params()), trainable)


def test_the_same_parts_train():
    ours, _ = partition(params(), CONFIG.optim.trainable)
    theirs = peer(CONFIG.optim.trainable).trainable()
    assert sum(parameter.numel() for parameter in theirs) == sum(leaf.size for leaf in jax.tree.leaves(ours))


def test_loss_and_gradients_are_the_same():
    batch, model = workload.example_batch(CONFIG), abstract_model(CONFIG.model)

    def loss(params):
        output, _ = bind(model, params)(batch)
        kernel = params["llm"]["head"]["kernel"]
        return total_loss(output, kernel, batch, CONFIG.loss, CONFIG.model, divisors(batch))[0]

    ours, gradient = jax.jit(jax.value_and_grad(loss))(params())
    rival = peer(CONFIG.optim.trainable).train()
    theirs = rival(to_torch(batch), {"ce": 1.0})
    theirs.backward()
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    for found, expected in (
        (gradient["llm"]["head"]["kernel"].T, rival.lm_head.weight.grad),
        (gradient["resampler"]["query"], rival.transformer["visual"].attn_pool.query.grad),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_answers_are_the_same():
    batch = workload.example_batch(CONFIG)
    found = Generator(CONFIG.model, params(), DecodeOptions(max_new_tokens=4, max_masks=0), stop_ids=(-1,), seg_id=-1)(
        batch
    ).tokens
    np.testing.assert_array_equal(found, peer().eval().generate(to_torch(batch), 4))
