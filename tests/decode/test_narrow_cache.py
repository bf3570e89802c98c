"""Keys and values of 8 bits: close to whole ones, and the same answer whoever shares the batch; so with activations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medplib_jax.config.experiment import MeshConfig, ShardingConfig
from medplib_jax.config.model import LoraConfig
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.decode.stream import stream_answers
from medplib_jax.models.language.attention import attend_cached, begin_cache, extend_cache
from medplib_jax.models.layers import abstract_module, draw_params
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.parallel.mesh import make_mesh
from tests.helpers import MODEL, random_batch, tiny_experiment

PLAIN = dataclasses.replace(MODEL, lora=LoraConfig())
ENDS = {"stop_ids": (2,), "seg_id": 7}


@pytest.mark.parametrize("rows", [1, 3])
def test_attention_to_it_is_close(rows):
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.standard_normal((rows, 9, 2, 8), np.float32)) for _ in range(2))
    q = jnp.asarray(rng.standard_normal((rows, 1, 4, 8), np.float32))
    index = np.full((rows, 1), 8)

    @functools.partial(jax.jit, static_argnums=0)
    def attended(narrow):
        cache = begin_cache(k[:, :8], v[:, :8], 12, narrow)
        return attend_cached(q, *extend_cache(*cache, k[:, 8:], v[:, 8:], index), index)

    whole, small = attended(False), attended(True)
    assert 0 < np.abs(whole - small).max() < 0.03


@pytest.fixture(scope="module")
def params():
    return draw_params(abstract_module(functools.partial(MedPLIB, PLAIN)), 1)


@pytest.mark.parametrize("quantize", ["kv", "w8a8+kv"])
def test_answers_are_the_same_in_a_batch_in_slots_and_on_a_mesh(params, quantize):
    options = DecodeOptions(max_new_tokens=6, max_masks=0, quantize=quantize)
    batch = random_batch(tiny_experiment(model=PLAIN), 16)
    batch = batch.replace(record=np.arange(len(batch.record), dtype=np.int32))
    generator = Generator(PLAIN, params, options, **ENDS)
    expected = jax.device_get(generator(batch))
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(len(batch.record))]
    for prompt, answer in stream_answers(generator, rows, slots=3, refill=1):
        np.testing.assert_array_equal(answer.tokens[0], expected.tokens[prompt.record[0]])
    mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
    spread = Generator(PLAIN, params, options, **ENDS, mesh=mesh, rules=ShardingConfig())(batch)
    np.testing.assert_array_equal(spread.tokens, expected.tokens)


def test_it_takes_a_quarter_of_the_memory_of_float32():
    nothing = jnp.zeros((2, 0, 3, 64))
    caches = (
        jax.eval_shape(lambda narrow=narrow: begin_cache(nothing, nothing, 10, narrow)) for narrow in (False, True)
    )
    whole, small = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) for cache in caches)
    assert small == whole * (64 + 4) / (4 * 64)  # a scale for each position of each head
