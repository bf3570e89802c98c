"""Whatever sharding rules a config accepts give the numbers of one device; others are refused, by the rule's name,
before anything compiles.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medplib_jax.batch import flatten
from medplib_jax.config.experiment import ExperimentConfig, MeshConfig, OptimConfig, ShardingConfig
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.models.language.llama import Llama
from medplib_jax.models.layers import abstract_module, bind, draw_params, logical_axes, model_shardings, params_of
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.parallel.sharding import (
    batch_sharding,
    check_model_fits,
    param_shardings,
    put_batch,
    shard_lookup,
    shard_rows,
)
from medplib_jax.train.losses import token_cross_entropy
from medplib_jax.train.step import CompiledStep, abstract_model, make_state, make_train_step, place, state_shardings
from tests.helpers import MODEL, assert_gradients_close, constant, init_params, random_batch, tiny_experiment

MODEL = dataclasses.replace(
    MODEL,
    llm=dataclasses.replace(MODEL.llm, num_heads=4, num_kv_heads=2),
    mask=dataclasses.replace(MODEL.mask, mask_in_dim=8),
)
NAMES = tuple(name for name in ShardingConfig.names() if name != "layers")
WHOLE = dict.fromkeys(NAMES, "")
BASES = {"default": {}, "whole": WHOLE}
CASES = [(base, name, axis) for base in BASES for name in NAMES for axis in (*MeshConfig.AXES, "")]
# What once went wrong: sums over axes that carry rows, a rank that is contracted, heads spread unlike the keys.
SELECTED = [
    ("whole", "mlp", "fsdp"),
    ("whole", "expert", "fsdp"),
    ("whole", "expert", "tensor"),
    ("whole", "lora_rank", "tensor"),
    ("whole", "embed", "data"),
    ("whole", "heads", "fsdp"),
    ("whole", "vocab", "tensor"),
    ("default", "mlp", ""),
    ("default", "kv_heads", ""),
    ("default", "lora_embed", "fsdp"),
]
RATE = 1024.0


def rules_of(base: str, name: str, axis: str) -> ShardingConfig:
    return ShardingConfig(**BASES[base] | {name: axis})


def mesh_for(axis: str):
    """Of eight devices, two along the axis."""
    return make_mesh(MeshConfig(2, 1, 2, 2) if axis == "data" else MeshConfig(1, 2, 2, 2))


@functools.cache
def axes_and_shapes():
    model = abstract_model(MODEL)
    return logical_axes(model), params_of(model)


def refusal(rules: ShardingConfig, mesh) -> str:
    """Why the model does not take these rules on this mesh; empty if it does."""
    try:
        check_model_fits(MODEL, rules, mesh)
        param_shardings(*axes_and_shapes(), rules, mesh)
    except ValueError as error:
        return str(error)
    return ""


def accepted(case) -> bool:
    return not refusal(rules_of(*case), mesh_for(case[2]))


def test_what_is_refused_names_the_rule():
    reasons = {case: refusal(rules_of(*case), mesh_for(case[2])) for case in CASES}
    for (_, name, axis), reason in reasons.items():
        assert not reason or (f"sharding.{name} " in reason and axis in reason), reason
    assert sum(map(bool, reasons.values())) < len(CASES) / 4, "most rules should work"
    assert refusal(ShardingConfig(), make_mesh(MeshConfig(1, 2, 1, 4))).startswith("model.llm.num_kv_heads 2 cannot")


def test_a_model_without_rules_is_refused_on_a_mesh():
    with pytest.raises(ValueError, match="needs sharding rules"):
        model_shardings(abstract_model(MODEL), make_mesh(MeshConfig()))


@functools.cache
def language(rules: ShardingConfig | None) -> Llama:
    return abstract_module(lambda rngs: Llama(MODEL, rngs, rules))


def language_loss(rules, params, batch):
    """Loss and gradients of the language model, and its last hidden state."""

    def loss(params):
        model = bind(language(rules), params)
        x = shard_rows(shard_lookup(model.embed(batch.tokens), rules))
        hidden, out = model(x, batch.valid, train=True)
        total, weight = token_cross_entropy(
            hidden, params["head"]["kernel"], batch.targets, batch.loss_weights, 4, rules
        )
        return total / weight + 0.1 * out["aux_loss"], hidden

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.cache
def language_params():
    return with_adapters(draw_params(language(None), 0))


def with_adapters(params):
    """Adapters' second factors start at zero, and hide the first ones' gradients."""
    return jax.tree.map_with_path(
        lambda path, x: (
            x + 0.1 * np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape) if path[-1].key == "lora_b" else x
        ),
        params,
    )


@functools.cache
def language_alone():
    return jax.device_get(jax.jit(functools.partial(language_loss, None))(language_params(), random_batch(tiny())))


def tiny(**sections) -> ExperimentConfig:
    return tiny_experiment(model=MODEL, **sections)


def check_language(rules: ShardingConfig, mesh) -> None:
    params = place(language_params(), model_shardings(language(rules), mesh))
    batch = jax.device_put(random_batch(tiny()), batch_sharding(mesh))
    actual = jax.device_get(jax.jit(functools.partial(language_loss, rules))(params, batch))
    chex.assert_trees_all_close(actual, language_alone(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("base", "name", "axis"), SELECTED)
def test_the_language_model_computes_the_same(base, name, axis):
    assert accepted((base, name, axis))
    check_language(rules_of(base, name, axis), mesh_for(axis))


def test_two_axes_for_one_dimension():
    check_language(ShardingConfig(embed="fsdp,data", mlp="tensor"), make_mesh(MeshConfig(2, 2, 1, 2)))


def test_more_devices_than_key_heads():
    check_language(ShardingConfig(kv_heads=""), make_mesh(MeshConfig(1, 2, 1, 4)))


# ---- the whole model: every rule ----


def step(config: ExperimentConfig, mesh):
    """(metrics, gradients); plain SGD at a high rate shows the gradients themselves, not lost in the parameters' last
    digits.
    """
    model, tx = abstract_model(config.model, config.sharding), optax.sgd(RATE)
    shardings = state_shardings(model, config, tx, mesh)
    params = with_adapters(init_params(config, model_shardings(model, mesh)))
    state = jax.jit(lambda p: make_state(p, config, tx), out_shardings=shardings)(params)
    before = jax.device_get(state.trainable)
    run = CompiledStep(make_train_step(model, config, tx), shardings, constant(RATE))
    state, metrics = run(state, put_batch(random_batch(config), mesh, config.data.batch_size))
    after = jax.device_get(state.trainable)
    return jax.device_get(metrics), jax.tree.map(lambda old, new: (old - new) / RATE, before, after)


def answers(config: ExperimentConfig, mesh, quantize: str = ""):
    params = jax.tree.map(jnp.asarray, with_adapters(draw_params(abstract_model(config.model), 0)))
    generator = Generator(
        config.model,
        params,
        DecodeOptions(max_new_tokens=4, max_masks=1, quantize=quantize),
        stop_ids=(2,),
        seg_id=7,
        mesh=mesh,
        rules=config.sharding,
    )
    return jax.device_get(generator(random_batch(config)))


@functools.cache
def alone(function, *options):
    return function(tiny(optim=OptimConfig(trainable=(".*",))), make_mesh(MeshConfig(), jax.devices()[:1]), *options)


def check_whole(rules: ShardingConfig, mesh) -> None:
    config = tiny(optim=OptimConfig(trainable=(".*",)), sharding=rules)
    metrics, gradients = step(config, mesh)
    expected_metrics, expected = alone(step)
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-5, atol=1e-6)
    assert_gradients_close(flatten(gradients), flatten(expected))
    check_answers(config, mesh)


def check_answers(config: ExperimentConfig, mesh, quantize: str = "") -> None:
    found, expected = answers(config, mesh, quantize), alone(answers, quantize)
    chex.assert_trees_all_equal(found.tokens, expected.tokens)
    chex.assert_trees_all_equal(found.choices, expected.choices)
    chex.assert_trees_all_close(found.mask_logits, expected.mask_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("base", "name", "axis"), CASES)
def test_training_and_decoding_are_those_of_one_device(base, name, axis):
    if accepted((base, name, axis)):
        check_whole(rules_of(base, name, axis), mesh_for(axis))


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_decoding_on_a_mesh(quantize):
    """Also with weights of 8 bits, and with keys that are spread unlike the queries."""
    config = tiny(sharding=ShardingConfig(kv_heads="", mlp="", lora_embed="fsdp"))
    check_answers(config, make_mesh(MeshConfig(1, 2, 2, 2)), quantize)
