"""CLIP's vision tower against transformers and against the original program's features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.clip import CLIPVisionConfig, CLIPVisionModel

from medplib_jax.config.model import ClipConfig
from medplib_jax.models.layers import Rngs, abstract_module, bind, params_of
from medplib_jax.models.vision.clip import ClipVisionTower, normalise_clip
from tests.paths import GOLDEN
from tests.torch_weights import CLIP_NAMES, formula_reader, reader, relative_error, torch_params

CONFIG = ClipConfig(image_size=56, patch_size=14, hidden_size=48, num_layers=3, num_heads=4, mlp_dim=192)


def tower(config: ClipConfig, read) -> ClipVisionTower:
    abstract = abstract_module(lambda rngs: ClipVisionTower(config, rngs))
    return bind(abstract, torch_params(abstract, CLIP_NAMES, read))


def test_features_equal_the_original():
    golden = np.load(GOLDEN / "region.npz")
    see = tower(CONFIG, formula_reader("clip56"))
    features, out = jax.jit(lambda pixels: see(pixels))(golden["images_clip"].transpose(0, 2, 3, 1))
    assert relative_error(features, golden["clip_features"]) < 1e-5
    assert out["class_token"].shape == (3, 48)


@pytest.mark.parametrize("select_layer", [-1, -2, -4])
def test_every_selected_layer_equals_transformers(select_layer):
    torch.manual_seed(0)
    theirs = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=12,
            patch_size=4,
            hidden_act="quick_gelu",
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    state = {
        f"vision_model.{name.removeprefix('vision_model.')}": value.numpy()
        for name, value in theirs.state_dict().items()
    }
    config = ClipConfig(
        image_size=12, patch_size=4, hidden_size=24, num_layers=3, num_heads=3, mlp_dim=40, select_layer=select_layer
    )
    pixels = np.random.default_rng(0).standard_normal((2, 12, 12, 3), np.float32)
    with torch.no_grad():
        hidden = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states[
            select_layer
        ]
    see = tower(config, reader(state))
    features, out = jax.jit(lambda pixels: see(pixels))(pixels)
    assert relative_error(features, hidden[:, 1:]) < 1e-5
    assert relative_error(out["class_token"], hidden[:, 0]) < 1e-5


def test_layers_behind_the_selected_one_are_not_computed():
    module = ClipVisionTower(CONFIG, Rngs(0))  # three layers, the second-last hidden state
    pixels = jax.random.normal(jax.random.key(0), (1, 56, 56, 3))
    loss = lambda params: jnp.square(bind(module, params)(pixels)[0]).sum()
    gradient = jax.jit(jax.grad(loss))(params_of(module))
    used = jnp.abs(gradient["layers"]["mlp"]["fc1"]["kernel"]).max((1, 2)) > 0
    assert used.tolist() == [True, True, False]


def test_normalise_equals_clips_processor():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), np.uint8)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    np.testing.assert_allclose(normalise_clip(jnp.asarray(pixels)), (pixels / 255 - mean) / std, rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_bfloat16():
    module = tower(CONFIG, formula_reader("clip56"))
    features, _ = jax.eval_shape(module, jax.ShapeDtypeStruct((1, 56, 56, 3), jnp.bfloat16))
    assert features.dtype == jnp.bfloat16
