"""Adapters merged into the weights, against PEFT's arithmetic and our own un-merged forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medplib_jax.batch import flatten
from medplib_jax.config.model import LlmConfig, LoraConfig, ModelConfig, MoeConfig
from medplib_jax.models.language.llama import Llama
from medplib_jax.models.language.lora import merge_lora
from medplib_jax.models.layers import Linear, abstract_module, bind, draw_params
from tests.paths import GOLDEN

golden = np.load(GOLDEN / "lora.npz")
LORA = LoraConfig(rank=4, alpha=16.0, targets=("q", "v", "gate", "up", "down"))
CONFIG = ModelConfig(
    llm=LlmConfig(vocab_size=31, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=48),
    moe=MoeConfig(num_experts=2, layers=(1,), residual=True),
    lora=LORA,
)


def llama_with_adapters():
    params = draw_params(abstract_module(lambda rngs: Llama(CONFIG, rngs)), 0)
    return jax.tree_util.tree_map_with_path(
        lambda path, a: 0.1 * jax.random.normal(jax.random.key(1), a.shape) if path[-1].key == "lora_b" else a, params
    )


def without_adapters():
    return ModelConfig(llm=CONFIG.llm, moe=CONFIG.moe)


def test_peft_linear():
    params = {"kernel": golden["q_proj_base"].T, "lora_a": golden["q_proj_A"].T, "lora_b": golden["q_proj_B"].T}
    layer = abstract_module(
        lambda rngs: Linear(64, 64, axes=(None, None), bias=False, rngs=rngs, lora=LORA, lora_rank=4)
    )
    np.testing.assert_allclose(bind(layer, params)(jnp.asarray(golden["x"])), golden["q_proj_y"], atol=1e-5)
    merged = merge_lora(params, LORA)
    assert set(merged) == {"kernel"} and set(params) == {"kernel", "lora_a", "lora_b"}
    np.testing.assert_allclose(merged["kernel"].T, golden["q_proj_merged"], atol=1e-6)


def test_original_merge_of_experts():
    names = [f"mlp.experts.{e}.gate_proj" for e in (0, 1)]

    def stacked(part):
        return np.stack([golden[f"before/{name}.{part}.weight"].T for name in names])[None]

    params = {
        "gate": {
            "kernel": stacked("base_layer"),
            "lora_a": stacked("lora_A.default"),
            "lora_b": stacked("lora_B.default"),
        }
    }
    expected = np.stack([golden[f"after/{name}.weight"].T for name in names])[None]
    np.testing.assert_allclose(merge_lora(params, LORA)["gate"]["kernel"], expected, atol=1e-6)


def test_merged_model_gives_the_same_output():
    params, tokens = llama_with_adapters(), np.arange(60).reshape(2, 30) % 31

    def hidden(config):
        module = abstract_module(lambda rngs: Llama(config, rngs))

        def run(params):
            model = bind(module, params)
            return model(model.embed(tokens), jnp.ones(tokens.shape, bool))[0]

        return jax.jit(run)

    plain = jax.tree_util.tree_map_with_path(lambda path, a: 0 * a if path[-1].key == "lora_b" else a, params)
    adapted_model = hidden(CONFIG)
    adapted = adapted_model(params)
    np.testing.assert_allclose(hidden(without_adapters())(merge_lora(params, LORA)), adapted, atol=1e-4)
    assert np.abs(adapted_model(plain) - adapted).max() > 1e-2


def test_merge_sums_in_float32_and_keeps_the_dtype():
    params = {
        "kernel": jnp.ones((3, 2), jnp.bfloat16),
        "lora_a": jnp.full((3, 1), 1 / 3),
        "lora_b": jnp.full((1, 2), 1 / 3),
    }
    kernel = merge_lora(params, LoraConfig(rank=1, alpha=1.0))["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel, jnp.full((3, 2), 1 + 1 / 9, jnp.bfloat16))


def test_merge_refuses_another_rank():
    params = {"kernel": jnp.ones((3, 2)), "lora_a": jnp.ones((3, 8)), "lora_b": jnp.ones((8, 2))}
    with pytest.raises(ValueError, match="rank 8, expected lora.rank 4"):
        merge_lora(params, LORA)


def test_paths():
    def adapted(params):
        return {path.rpartition("/")[0] for path in flatten(params) if path.endswith(("/lora_a", "/lora_b"))}

    params = llama_with_adapters()
    assert not adapted(merge_lora(params, LORA))
    assert adapted(params) == {
        "layers/attn/q",
        "layers/attn/v",
        *(f"{part}/{name}" for part in ("mlp", "moe/experts", "moe/residual") for name in ("gate", "up", "down")),
    }
