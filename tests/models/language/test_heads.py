"""Projections into heads and back, as a TPU gets them, against the plain form."""

import jax
import numpy as np
import pytest

from medplib_jax.config.model import LoraConfig
from medplib_jax.models.language.heads import from_heads, into_heads
from medplib_jax.models.layers import Linear, Rngs, bind, params_of
from medplib_jax.models.target import made_for

B, L, D, H, K = 2, 5, 12, 3, 8


def value_and_gradients(function, params, x):
    y, back = jax.vjp(function, params, x)
    return y, *back(jax.numpy.cos(y))


@pytest.mark.parametrize("rank", [0, 4, 17], ids=["plain", "thin", "wide"])
@pytest.mark.parametrize("into", [True, False], ids=["into", "from"])
def test_a_tpu_projects_heads_as_a_cpu_does(into, rank):
    sides = (D, H * K) if into else (H * K, D)
    linear = Linear(*sides, axes=(None, None), bias=False, rngs=Rngs(0), lora=LoraConfig(rank=rank), lora_rank=rank)
    params = params_of(linear)
    if rank:
        params["lora_b"] += jax.random.normal(jax.random.key(1), params["lora_b"].shape)
    x = jax.random.normal(jax.random.key(2), (B, L, D) if into else (B, L, H, K))

    def run(params, x):
        bound = bind(linear, params)
        return into_heads(bound, x, K, None) if into else from_heads(bound, x, None)

    expected, plain = value_and_gradients(run, params, x), str(jax.make_jaxpr(run)(params, x))
    with made_for("tpu"):
        actual, program = value_and_gradients(run, params, x), str(jax.make_jaxpr(run)(params, x))
    assert program != plain, "it is a TPU's program"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * abs(b).max()), actual, expected)
