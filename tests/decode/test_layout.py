"""The layouts that decoding has on a GPU and on a TPU, run on the CPU:

The same answers, from the same programs but for kernels that are transposed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from medplib_jax.batch import flatten
from medplib_jax.config.experiment import MeshConfig, ShardingConfig
from medplib_jax.config.model import LoraConfig
from medplib_jax.decode import layout as layout
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.layout import model_in_decoding_layout, to_decoding_layout
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.models.language.lora import merge_lora
from medplib_jax.models.layers import abstract_module, draw_params, logical_axes, params_of
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.parallel.mesh import make_mesh
from tests.helpers import MODEL, random_batch, tiny_experiment

ADAPTED = MODEL
MODEL = dataclasses.replace(MODEL, lora=LoraConfig())


@pytest.fixture(scope="module")
def params():
    return draw_params(abstract_module(functools.partial(MedPLIB, MODEL)), 1)


def test_adapters_are_merged():
    drawn = draw_params(abstract_module(functools.partial(MedPLIB, ADAPTED)), 1)
    drawn = jax.tree.map_with_path(lambda path, x: x + 0.5 if path[-1].key == "lora_b" else x, drawn)
    batch = jax.tree.map(lambda x: x[:2], random_batch(tiny_experiment(model=MODEL), 16))
    expected = answers(MODEL, merge_lora(drawn, ADAPTED.lora), batch, "")
    np.testing.assert_array_equal(answers(ADAPTED, drawn, batch, "").tokens, expected.tokens)
    assert not np.array_equal(
        answers(MODEL, merge_lora(drawn, dataclasses.replace(ADAPTED.lora, alpha=0.0)), batch, "").tokens,
        expected.tokens,
    )


def for_platform(monkeypatch, platform):
    monkeypatch.setattr(layout, "platform_of", lambda mesh: platform)


@pytest.fixture
def on_gpu(monkeypatch):
    for_platform(monkeypatch, "gpu")


def answers(model, params, batch, quantize, mesh=None):
    options, rules = DecodeOptions(max_new_tokens=6, max_masks=1, quantize=quantize), ShardingConfig()
    generator = Generator(model, params, options, stop_ids=(2,), seg_id=7, mesh=mesh, rules=rules)
    return jax.device_get(generator(batch))


REPEATED = [pytest.param("gpu", 1, 1, quantize, marks=pytest.mark.slow) for quantize in ("int8", "w8a8")]
ON_GPU = [(1, 1, ""), (1, 2, ""), (3, 1, "int8"), (3, 1, "w8a8")]  # each width, and one row and several
ON_TPU = [(1, 1, ""), (1, 2, "int8"), (1, 1, "w8a8"), (3, 1, "")]


@pytest.fixture(scope="module")
def asked(params):
    """Answers by rows, top_k and quantize."""

    def ask(rows, top_k, quantize):
        model = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, top_k=top_k))
        batch = jax.tree.map(lambda x: x[:rows], random_batch(tiny_experiment(model=MODEL), 16))
        return answers(model, params, batch, quantize)

    return ask


@pytest.fixture(scope="module")
def on_cpu(asked):
    return functools.cache(asked)


@pytest.mark.parametrize(
    "platform, rows, top_k, quantize",
    [*(("gpu", *case) for case in ON_GPU), *(("tpu", *case) for case in ON_TPU), *REPEATED],
)
def test_an_accelerator_gives_the_same_answers(on_cpu, asked, platform, rows, top_k, quantize, monkeypatch):
    expected = on_cpu(rows, top_k, quantize)
    for_platform(monkeypatch, platform)
    actual = asked(rows, top_k, quantize)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.choices, expected.choices)
    np.testing.assert_allclose(actual.mask_logits, expected.mask_logits, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, rows, quantize",
    [
        ((1, 1, 2, 1), 1, ""),
        ((1, 2, 2, 2), 1, ""),
        ((1, 2, 2, 2), 4, ""),
        ((1, 1, 1, 2), 1, "w8a8"),
        ((1, 2, 1, 2), 1, "int8"),
    ],
)
def test_so_do_the_tpus_of_a_mesh(params, sizes, rows, quantize, monkeypatch):
    batch = jax.tree.map(lambda x: x[:rows], random_batch(tiny_experiment(model=MODEL), 16))
    expected = answers(MODEL, params, batch, quantize)
    for_platform(monkeypatch, "tpu")
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    actual = answers(MODEL, params, batch, quantize, mesh)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_allclose(actual.mask_logits, expected.mask_logits, atol=1e-3)


@pytest.mark.parametrize("quantize", layout.QUANTIZE)
def test_every_parameter_has_its_place_and_shape(params, quantize, on_gpu):
    shapes, axes = (
        flatten(params_of(model_in_decoding_layout(MODEL, quantize=quantize))),
        flatten(logical_axes(model_in_decoding_layout(MODEL, quantize=quantize))),
    )
    found = flatten(to_decoding_layout(MODEL, params, quantize=quantize))
    assert {path: (x.shape, x.dtype == jnp.int8) for path, x in found.items()} == {
        path: (x.shape, x.dtype == jnp.int8) for path, x in shapes.items()
    }
    assert all(len(axes[path]) == len(shape.shape) for path, shape in shapes.items())
    assert axes["llm/moe/0/experts/down/kernel"] == ("expert", "embed", "mlp") and axes["llm/head/kernel"] == (
        "vocab",
        "embed",
    )


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_token_chooses_no_program(params, platform, monkeypatch):
    for_platform(monkeypatch, platform)
    generator = Generator(MODEL, params, DecodeOptions(max_new_tokens=6, max_masks=0), stop_ids=(2,), seg_id=7)
    batch = jax.tree.map(lambda x: x[:1], random_batch(tiny_experiment(model=MODEL), 16))
    slots = jax.eval_shape(
        functools.partial(generator._decoder.prefill, draws=None, seen=None, room=6),
        generator.params,
        batch,
        jnp.ones(1, jnp.int32),
    )
    step = jax.make_jaxpr(generator._decoder.decode)(generator.params, slots, 0, 0)
    names = {equation.primitive.name for equation in _equations(step.jaxpr)}
    assert "cond" not in names, "a GPU's host would wait for the router, a TPU fetch every expert"


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def test_a_checkpoint_of_other_parts_says_what_it_is(params):
    with pytest.raises(ValueError, match=r"of in-context learning: .*\(icl/compressor, icl/mask_encoder\), which this"):
        to_decoding_layout(MODEL, params | {"icl": {"mask_encoder": {}, "compressor": {}}})
    with pytest.raises(ValueError, match="the checkpoint lacks llm, .*: it holds clip alone"):
        Generator(
            MODEL, {"clip": params["clip"]}, DecodeOptions(max_new_tokens=1, max_masks=0), stop_ids=(2,), seg_id=3
        )
