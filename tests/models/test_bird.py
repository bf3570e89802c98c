"""BiRD's whole model on random weights: decoding, long prompts, packing, quantisation, and one step on every mesh.

What it computes with the original's weights: `tests.convert.parity`."""

import dataclasses

import chex
import jax
import numpy as np
import optax
import pytest
from flax import nnx

from configs import bird_grit
from medplib_jax.batch import flatten
from medplib_jax.config.experiment import MeshConfig
from medplib_jax.config.model import LoraConfig, ModelConfig
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.models.families import build_model
from medplib_jax.models.language.lora import merge_lora
from medplib_jax.models.layers import abstract_module, bind, layer_at, params_of
from medplib_jax.models.vision.qwen_vit import bicubic_weights
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.parallel.sharding import put_batch
from medplib_jax.train.optim import lr_factors, partition
from medplib_jax.train.step import (
    CompiledStep,
    abstract_model,
    make_state,
    make_train_step,
    model_shardings,
    state_shardings,
)
from tests import bird_tiny
from tests.helpers import constant

NEW = 12


@pytest.fixture(scope="module")
def params():
    return bird_tiny.params()


def logits(params, batch, config=bird_tiny.MODEL, train=False):
    model = abstract_module(lambda rngs: build_model(config, rngs))

    @jax.jit
    def run(params, batch):
        bound = bind(model, params)
        output, _ = bound(batch, train=train)
        return bound.llm.logits(output.hidden)

    return np.asarray(run(params, batch))


def test_greedy_answers_are_the_likeliest_tokens_of_the_whole_text(params):
    """Prompts lie before, on and beyond the trained length of 8, and answers cross its doubles:

    NTK stays the prompt's.
    """
    long = dataclasses.replace(bird_tiny.MODEL.llm, trained_length=8)
    config = dataclasses.replace(bird_tiny.MODEL, llm=long)
    batch = bird_tiny.batch(rows=4, length=16)
    generator = Generator(config, params, DecodeOptions(max_new_tokens=NEW, max_masks=0), stop_ids=(-1,), seg_id=-1)
    made = jax.device_get(generator(batch))
    assert made.lengths.tolist() == [NEW] * 4 and made.mask_logits is None
    first = logits(params, batch, config)
    for row in range(4):
        length = int(batch.valid[row].sum())
        assert made.tokens[row, 0] == first[row, length - 1].argmax()


def test_what_a_row_answers_depends_on_that_row_alone(params):
    batch = bird_tiny.batch(rows=4, length=16)
    generator = Generator(
        bird_tiny.MODEL, params, DecodeOptions(max_new_tokens=NEW, max_masks=0), stop_ids=(7,), seg_id=-1
    )
    together = jax.device_get(generator(batch))
    for row in range(4):
        alone = jax.device_get(generator(jax.tree.map(lambda x, row=row: x[row : row + 1], batch)))
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


def test_scaling_begins_beyond_the_trained_length_and_not_in_training(params):
    batch = bird_tiny.batch(rows=2, length=24)
    plain = dataclasses.replace(bird_tiny.MODEL, llm=dataclasses.replace(bird_tiny.MODEL.llm, trained_length=0))
    short = dataclasses.replace(bird_tiny.MODEL, llm=dataclasses.replace(bird_tiny.MODEL.llm, trained_length=24))
    expected = logits(params, batch, plain)
    valid = batch.valid[..., None]
    np.testing.assert_allclose(logits(params, batch, short) * valid, expected * valid, atol=2e-5)
    np.testing.assert_allclose(logits(params, batch, train=True) * valid, expected * valid, atol=2e-5)
    assert np.abs((logits(params, batch) - expected) * valid).max() > 1e-2


def test_packed_conversations_are_what_they_are_alone(params):
    batch = bird_tiny.batch(rows=2, length=12, images=1)
    alone = logits(params, batch, train=True)
    lengths = batch.valid.sum(1)

    def joined(name):
        parts = [np.asarray(getattr(batch, name))[row, : lengths[row]] for row in range(2)]
        if name == "feature_index":
            parts[1] = np.where(parts[1] >= 0, parts[1] + bird_tiny.QUERIES, -1)
        return np.concatenate(parts)[None]

    fields = {name: joined(name) for name in ("tokens", "valid", "targets", "loss_weights", "feature_index")}
    segment = np.repeat([1, 2], lengths)[None].astype(np.int32)
    pixels = np.asarray(batch.clip_pixels).reshape(1, 2, *batch.clip_pixels.shape[2:])
    one = jax.tree.map(lambda x: x[:1], batch).replace(clip_pixels=pixels, segment=segment, **fields)
    packed = logits(params, one, train=True)[0]
    np.testing.assert_allclose(packed[: lengths[0]], alone[0, : lengths[0]], atol=2e-5)
    np.testing.assert_allclose(packed[lengths[0] :], alone[1, : lengths[1]], atol=2e-5)


def test_weights_of_8_bits_answer_nearly_alike(params):
    batch = bird_tiny.batch(rows=2, length=16)
    made = [
        Generator(
            bird_tiny.MODEL,
            params,
            DecodeOptions(max_new_tokens=1, max_masks=0, quantize=quantize),
            stop_ids=(-1,),
            seg_id=-1,
        )(batch).tokens.tolist()
        for quantize in ("", "int8")
    ]
    assert made[0] == made[1]


def test_adapters_on_the_fused_projection_merge(params):
    adapted = dataclasses.replace(bird_tiny.MODEL, lora=LoraConfig(rank=2, targets=("qkv", "o", "up", "gate")))
    own = bird_tiny.params(adapted)
    flat = flatten(own)
    assert flat["llm/layers/attn/qkv/lora_b"].shape == (2, 2, 96) and "llm/mlp/down/lora_a" not in flat
    own["llm"]["layers"]["attn"]["qkv"]["lora_b"] += 0.1
    batch = bird_tiny.batch(rows=2, length=12)
    merged = logits(merge_lora(own, adapted.lora), batch)
    np.testing.assert_allclose(logits(own, batch, adapted), merged, atol=1e-4)
    with pytest.raises(ValueError, match=r"lora.targets \['q'\]: the decoder has qkv"):
        dataclasses.replace(bird_tiny.MODEL, lora=LoraConfig(rank=2, targets=("q",)))


def test_positions_between_those_of_the_table_are_cubic():
    weights = bicubic_weights(16, 32)
    chex.assert_shape(weights, (32, 16))
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(bicubic_weights(5, 5), np.eye(5, dtype=np.float32))


def test_from_nothing_each_query_looks_at_its_own_place_and_training_leaves_it_there():
    """Where queries look is so sharp that gradients there are noise, of which Adam makes full steps: all end up at one
    patch."""
    config = bird_grit.rough()
    model = build_model(config.model, nnx.Rngs(0))
    pixels = jax.random.normal(jax.random.key(0), (2, config.model.image_size, config.model.image_size, 3))
    _, out = nnx.jit(lambda model, pixels: model.resample(pixels))(model, pixels)
    query, key = (layer_at(model.resampler.qkv, i)(out[name]) for i, name in enumerate(("query", "key")))
    looked_at = np.einsum("qd,bpd->bqp", query, key).argmax(-1)
    np.testing.assert_array_equal(looked_at, [np.arange(config.model.vit.num_queries)] * 2)
    _, frozen = partition(params_of(model), config.optim.trainable)
    assert set(frozen) == {"resampler"}
    assert set(frozen["resampler"]) == {"query", "position_embed", "norm_q", "norm_kv", "qkv"}


def test_a_training_step_changes_patches_by_little_of_what_tells_their_positions():
    """Adam moves each of a patch's hundreds of weights by the rate, in one direction where the patch is one colour."""
    config = bird_grit.rough()
    trainable, _ = partition(params_of(build_model(config.model, nnx.Rngs(0))), config.optim.trainable)
    rates = flatten(jax.tree.map(lambda factor: factor * config.optim.lr, lr_factors(config.optim, trainable)))
    kernel = trainable["vit"]["patch_embed"]["kernel"]
    per_step = rates["vit/patch_embed/kernel"] * kernel.size / kernel.shape[-1]
    assert per_step < 0.1 * np.std(trainable["vit"]["position_embed"])


def test_the_full_size_model_has_the_published_number_of_parameters():
    from configs.bird_grit import LARGE

    model = abstract_module(lambda rngs: build_model(LARGE, rngs))
    assert sum(leaf.size for leaf in jax.tree.leaves(params_of(model))) == 9_656_935_168
    assert isinstance(LARGE, ModelConfig) and LARGE.image_tokens == 256


def one_step(mesh_sizes):
    config, rate = bird_tiny.experiment(), 1024.0
    mesh = make_mesh(MeshConfig(*mesh_sizes), jax.devices()[: int(np.prod(mesh_sizes))])
    model, tx = abstract_model(config.model, config.sharding), optax.sgd(rate)
    shardings = state_shardings(model, config, tx, mesh)
    placed = model_shardings(model, mesh)
    params = jax.tree.map(jax.device_put, bird_tiny.params(), placed)
    state = jax.jit(lambda p: make_state(p, config, tx), out_shardings=shardings)(params)
    before = jax.device_get(state.trainable)
    step = CompiledStep(make_train_step(model, config, tx), shardings, constant(rate))
    state, metrics = step(state, put_batch(bird_tiny.batch(), mesh, 8))
    after = jax.device_get(state.trainable)
    return float(metrics["loss"]), flatten(jax.tree.map(lambda old, new: (old - new) / rate, before, after))


@pytest.fixture(scope="module")
def on_one_device():
    return one_step((1, 1, 1, 1))


@pytest.mark.parametrize(
    "mesh",
    [
        (1, 2, 1, 4),
        *(
            pytest.param(mesh, marks=pytest.mark.slow)
            for mesh in ((8, 1, 1, 1), (1, 8, 1, 1), (2, 4, 1, 1), (2, 2, 1, 2), (2, 1, 1, 4))
        ),
    ],
)
def test_a_mesh_changes_neither_loss_nor_gradients(mesh, on_one_device, capfd):
    loss, gradients = one_step(mesh)
    assert "nvoluntary full rematerialization" not in capfd.readouterr().err
    np.testing.assert_allclose(loss, on_one_device[0], rtol=1e-5)
    largest = max(np.abs(gradient).max() for gradient in on_one_device[1].values())
    for path, expected in on_one_device[1].items():
        scale = max(np.abs(expected).max(), 1e-3 * largest)
        np.testing.assert_allclose(gradients[path], expected, rtol=0, atol=1e-5 * scale, err_msg=path)
