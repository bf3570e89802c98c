"""8-bit kernels: what they hold, how close the model stays, and what they take."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medplib_jax.batch import flatten
from medplib_jax.config.model import LoraConfig
from medplib_jax.decode.layout import decoding_model, to_decoding_layout
from medplib_jax.models.layers import abstract_module, bind, draw_params, params_of
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.models.quantize import dequantize_params, num_bytes
from tests.helpers import MODEL, random_batch, tiny_experiment

MODEL = dataclasses.replace(MODEL, lora=LoraConfig())


@pytest.fixture(scope="module")
def params():
    return draw_params(abstract_module(functools.partial(MedPLIB, MODEL)), 1)


def test_kernels_keep_their_values_to_half_a_step(params):
    plain, quantized = to_decoding_layout(MODEL, params), to_decoding_layout(MODEL, params, quantize="int8")
    back, scales = flatten(dequantize_params(quantized, jnp.float32)), flatten(quantized)
    for path, kernel in flatten(plain).items():
        step = scales.get(path.replace("/kernel", "/kernel_scale")) if path.endswith("/kernel") else None
        if step is None:
            np.testing.assert_array_equal(back[path], kernel)
        else:
            assert scales[path].dtype == jnp.int8
            assert (np.abs(back[path] - kernel) <= 0.501 * np.asarray(step)[..., None, :]).all(), path
    kinds = {path.split("/")[0] for path, leaf in scales.items() if leaf.dtype == jnp.int8}
    assert kinds == {"llm", "clip", "projector"} and not any(
        "router" in path for path in scales if scales[path].dtype == jnp.int8
    )
    assert num_bytes(quantized) < num_bytes(plain)


def test_the_model_computes_with_them(params):
    """Hidden states and a prefill over many tokens, equal to those of the dequantised weights."""
    batch = random_batch(tiny_experiment(model=MODEL), 16)
    model, quantized = decoding_model(MODEL, quantize="int8"), to_decoding_layout(MODEL, params, quantize="int8")
    assert jax.tree.structure(params_of(model)) == jax.tree.structure(quantized)
    plain = decoding_model(MODEL)

    def hidden(model, params):
        output, _ = jax.jit(lambda params: bind(model, params)(batch))(params)
        return output.hidden

    expected = hidden(plain, dequantize_params(quantized, jnp.float32))
    np.testing.assert_allclose(hidden(model, quantized), expected, rtol=1e-3, atol=1e-4)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="int4"):
        decoding_model(MODEL, quantize="int4")
