"""Products with float32 factors say that they are computed in float32:

A TPU would multiply them in bfloat16, a GPU in TF32.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from medplib_jax.aot.programs import make_program
from medplib_jax.config.experiment import EvalConfig, MeshConfig, OptimConfig
from medplib_jax.config.model import LoraConfig, MoeConfig, RegionConfig
from medplib_jax.decode.masks import mask_drawer
from medplib_jax.models.language.lora import merge_lora
from medplib_jax.models.layers import abstract_module, params_of
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.models.precision import HIGHEST
from medplib_jax.parallel.mesh import make_mesh
from tests.helpers import MODEL, tiny_experiment


def equations(jaxpr) -> Iterator:
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":  # a kernel's products are its own
            for inner in jaxprs_in_params(equation.params):
                yield from equations(inner)


def products(jaxpr) -> list[tuple[tuple, bool]]:
    """(types of the factors, whether the product says HIGHEST) of every product in the program."""
    return [
        (tuple(str(x.aval.dtype) for x in equation.invars[:2]), equation.params["precision"] == (HIGHEST, HIGHEST))
        for equation in equations(jaxpr)
        if equation.primitive.name in ("dot_general", "conv_general_dilated")
    ]


def assert_float32_is_highest(found: list[tuple[tuple, bool]], at_least: int) -> None:
    assert not [types for types, highest in found if set(types) == {"float32"} and not highest]
    assert sum(highest for _, highest in found) >= at_least, "the float32 products are gone: what does this test see?"


def traced(kind: str, **model):
    config = tiny_experiment(
        model=dataclasses.replace(MODEL, moe=MoeConfig(num_experts=2, top_k=2, residual=True), **model),
        optim=OptimConfig(trainable=(".*",)),
        eval=EvalConfig(max_new_tokens=4),
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return products(make_program(kind, config, mesh, 8, 24).trace().jaxpr.jaxpr)


@pytest.mark.parametrize("sampler", ["mean", "geometry"])
@pytest.mark.parametrize("kind", ["train", "eval", "decode"])
def test_a_bfloat16_model_says_so_of_its_float32_products(kind, sampler):
    """Router, load balancing, positions, relative positions, region pooling, geometry sampler, mask resampling in the
    loss.
    """
    found = traced(kind, dtype="bfloat16", region=RegionConfig(sampler=sampler, max_points=128))
    assert_float32_is_highest(found, at_least=14)
    mixed = [types for types, highest in found if len(set(types)) == 2 and not highest]
    assert kind == "train" or not mixed, "only gradients of bfloat16 scores meet bfloat16 keys"
    assert not [types for types, highest in found if set(types) == {"bfloat16"} and highest]


@pytest.mark.parametrize("kind", ["train", "decode"])
def test_a_float32_model_is_float32(kind):
    assert_float32_is_highest(traced(kind, dtype="float32"), at_least=100)


def test_masks_are_resampled_in_float32():
    drawer = mask_drawer(32, "exact", 20, 0.5)
    draw = drawer.__closure__[0].cell_contents
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((2, 1, 16, 16), jnp.bfloat16), ((2, 4), jnp.int32), ((2, 2), jnp.int32))
    ]
    assert_float32_is_highest(products(jax.make_jaxpr(draw)(*shapes).jaxpr), at_least=3)


def test_adapters_are_merged_in_float32():
    lora = LoraConfig(rank=2, targets=("q", "up"))
    params = params_of(abstract_module(lambda rngs: MedPLIB(dataclasses.replace(MODEL, lora=lora), rngs)))
    merged = jax.make_jaxpr(lambda params: merge_lora(params, lora))(params)
    assert_float32_is_highest(products(merged.jaxpr), at_least=2)
