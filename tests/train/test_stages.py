"""Hand-over between stages on the parameter trees of a tiny model, with every kernel telling where it came from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medplib_jax.batch import flatten
from medplib_jax.config.experiment import InitConfig
from medplib_jax.config.model import IclConfig, LoraConfig, MoeConfig
from medplib_jax.models.layers import params_of
from medplib_jax.train.stages import hand_over
from medplib_jax.train.step import abstract_model
from tests.helpers import MODEL, tiny_experiment

PLAIN, LORA = MoeConfig(), LoraConfig(rank=2, alpha=4.0)


def experiment(stage: int, moe=PLAIN, lora=LORA, **model):
    return tiny_experiment(model=dataclasses.replace(MODEL, moe=moe, lora=lora, **model), init=InitConfig(stage=stage))


def params(config, value: float):
    """Every leaf filled with `value`, layers made different from each other."""

    def leaf(x):
        return (value + np.arange(x.shape[0]).reshape(-1, *[1] * (x.ndim - 1)) * np.ones(x.shape)).astype(np.float32)

    return jax.tree.map(leaf, params_of(abstract_model(config.model)))


def checkpoint(stage: int, value: float, **settings):
    config = experiment(stage, **settings)
    return config, params(config, value)


def test_the_next_stage_starts_from_merged_weights_with_fresh_adapters():
    base = checkpoint(2, 5.0)
    config = experiment(3, lora=LoraConfig(rank=3, alpha=3.0, targets=("up",)))
    result = hand_over(config, params(config, 100.0), base)
    old = flatten(base[1])
    gate = old["llm/mlp/gate/kernel"] + 2.0 * old["llm/mlp/gate/lora_a"] @ old["llm/mlp/gate/lora_b"]
    np.testing.assert_allclose(result["llm"]["mlp"]["gate"]["kernel"], gate, rtol=1e-6)
    assert result["llm"]["mlp"]["up"]["lora_a"].shape[-1] == 3 and result["llm"]["mlp"]["up"]["lora_a"][0, 0, 0] == 100
    np.testing.assert_array_equal(result["clip"]["class_embed"], base[1]["clip"]["class_embed"])
    assert jax.tree.structure(result) == jax.tree.structure(params(config, 0.0))


@pytest.mark.parametrize("layers", ["dense", (1,)])
def test_stage_4_takes_each_expert_from_its_checkpoint(layers):
    no_lora = LoraConfig()
    language, grounding = checkpoint(2, 20.0, lora=no_lora), checkpoint(3, 30.0, lora=no_lora)
    config = experiment(4, moe=MoeConfig(num_experts=2, layers=layers), lora=LORA)
    result = hand_over(config, params(config, 100.0), language, grounding)
    sparse = list(config.model.moe_layers)
    for name in ("gate", "up", "down"):
        experts = result["llm"]["moe"]["experts"][name]["kernel"]
        np.testing.assert_array_equal(experts[:, 0], grounding[1]["llm"]["mlp"][name]["kernel"][sparse])
        np.testing.assert_array_equal(experts[:, 1], language[1]["llm"]["mlp"][name]["kernel"][sparse])
    if layers == (1,):
        np.testing.assert_array_equal(
            result["llm"]["mlp"]["up"]["kernel"], language[1]["llm"]["mlp"]["up"]["kernel"][:1]
        )
    origin = {path: float(leaf.reshape(-1)[0]) for path, leaf in flatten(result).items() if "experts" not in path}
    assert {value for path, value in origin.items() if path.startswith(("sam/", "seg_mlp/"))} == {30}
    assert {value for path, value in origin.items() if "lora_" in path or "router" in path} == {100}
    rest = {
        path: v
        for path, v in origin.items()
        if not path.startswith(("sam/", "seg_mlp/")) and "lora_" not in path and "router" not in path
    }
    assert len(rest) > 20 and set(rest.values()) == {20}


def test_stage_5_goes_on_with_stage_4_and_adds_what_reads_examples():
    mixture = MoeConfig(num_experts=2)
    base = checkpoint(4, 5.0, moe=mixture)
    config = experiment(5, moe=mixture, icl=IclConfig("separate", compressed_tokens=2, mask_tokens=3))
    result = flatten(hand_over(config, params(config, 100.0), base))
    fresh = {path for path, leaf in result.items() if float(leaf.reshape(-1)[0]) == 100 and "lora_" not in path}
    assert fresh and all(path.startswith(("icl/compressor/", "icl/mask_encoder/")) for path in fresh)
    assert {path for path in result if path.startswith("icl/")} == fresh
    old = flatten(base[1])
    np.testing.assert_array_equal(result["llm/moe/router/kernel"], old["llm/moe/router/kernel"])
    np.testing.assert_array_equal(result["seg_mlp/fc1/kernel"], old["seg_mlp/fc1/kernel"])
    gate = old["llm/moe/experts/gate/kernel"] + 2.0 * (
        old["llm/moe/experts/gate/lora_a"] @ old["llm/moe/experts/gate/lora_b"]
    )
    np.testing.assert_allclose(result["llm/moe/experts/gate/kernel"], gate, rtol=1e-6)


def test_frozen_precision_does_not_leak_into_the_next_stage():
    config, tree = checkpoint(2, 5.0)
    base = config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    result = hand_over(experiment(3), params(experiment(3), 0.0), base)
    assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("stage", "base", "grounding", "message"),
    [
        (
            3,
            1,
            None,
            "init.base: stage 3 .grounding expert. starts from a checkpoint of stage 2 .*, found stage 1 .align.",
        ),
        (2, 3, None, "init.base: stage 2 .* found stage 3"),
        (4, 2, 2, "init.grounding: stage 4 .* of stage 3 .*, found stage 2"),
        (4, 2, None, "stage 4 .* needs init.grounding"),
        (5, 3, None, "init.base: stage 5 .in context. starts from a checkpoint of stage 4 .*, found stage 3"),
    ],
)
def test_a_checkpoint_of_the_wrong_stage_is_refused(stage, base, grounding, message):
    config = experiment(stage, moe=MoeConfig(num_experts=2) if stage == 4 else PLAIN)
    with pytest.raises(ValueError, match=message):
        hand_over(config, params(config, 0.0), checkpoint(base, 0.0), grounding and checkpoint(grounding, 0.0))


def test_another_size_is_refused_by_name():
    wide = dataclasses.replace(MODEL.llm, mlp_dim=48)
    config = experiment(3, llm=wide)
    with pytest.raises(
        ValueError, match=r"llm/mlp/\w+/kernel: the new model expects shape .*48.*, the checkpoint has .*32"
    ):
        hand_over(config, params(config, 0.0), checkpoint(2, 0.0))
    config = experiment(4, moe=MoeConfig(num_experts=2))
    with pytest.raises(ValueError, match=r"llm/mlp/\w+/kernel: init.base has shape .*32.*, init.grounding .*48"):
        hand_over(config, params(config, 0.0), checkpoint(2, 0.0), checkpoint(3, 0.0, llm=wide))


def test_missing_and_left_over_parameters_are_errors():
    config, base = experiment(3), checkpoint(2, 0.0)
    lacking = {name: part for name, part in base[1].items() if name != "projector"}
    with pytest.raises(ValueError, match="projector/.*not in the checkpoint"):
        hand_over(config, params(config, 0.0), (base[0], lacking))
    with pytest.raises(ValueError, match="1 parameters that the new model lacks, first extra/kernel"):
        hand_over(config, params(config, 0.0), (base[0], base[1] | {"extra": {"kernel": np.zeros(3)}}))


def test_other_numbers_of_experts_are_refused():
    config = experiment(4, moe=MoeConfig(num_experts=3))
    with pytest.raises(ValueError, match="moe.num_experts is 3"):
        hand_over(config, params(config, 0.0), checkpoint(2, 0.0), checkpoint(3, 0.0))
