"""SAM-Med2D against the arrays of the original program, and against transformers' SAM where both compute the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.sam.configuration_sam import (
    SamConfig,
    SamMaskDecoderConfig,
    SamPromptEncoderConfig,
    SamVisionConfig,
)
from transformers.models.sam.modeling_sam import SamModel

from medplib_jax.config.model import MaskConfig
from medplib_jax.models.layers import abstract_module, bind, draw_params, params_of
from medplib_jax.models.masks.sam import SamMed2d, normalise_sam
from tests.paths import GOLDEN
from tests.torch_weights import HF_SAM_NAMES, SAM_NAMES, formula_reader, reader, relative_error, torch_params

TINY = MaskConfig(
    hidden_size=48, num_layers=4, num_heads=4, global_layers=(1, 3), out_dim=64, decoder_mlp_dim=128, iou_head_dim=64
)
SMALL = MaskConfig(
    image_size=32,
    patch_size=4,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    window_size=3,
    global_layers=(1,),
    adapter=False,
    out_dim=16,
    mask_in_dim=8,
    decoder_heads=4,
    decoder_mlp_dim=32,
    iou_head_dim=16,
)
PROMPTS = {
    "points": ("points", "labels"),
    "boxes": ("boxes",),
    "points_boxes": ("points", "labels", "boxes"),
    "text": ("text",),
}
PROMPTS["all"] = (*PROMPTS["points_boxes"], "text")  # and masks


def build(config: MaskConfig, read) -> SamMed2d:
    abstract = abstract_module(lambda rngs: SamMed2d(config, rngs))
    return bind(abstract, torch_params(abstract, SAM_NAMES, read))


@functools.cache
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "sam.npz"))


@functools.cache
def tiny() -> SamMed2d:
    return build(TINY, formula_reader("samtiny"))


def image() -> np.ndarray:
    return golden()["image_low8"].repeat(8, 2).repeat(8, 3).transpose(0, 2, 3, 1)


def run(sam: SamMed2d, method: str, *inputs):
    """`sam.method(*inputs)` as one compiled program."""
    return jax.jit(lambda params, *inputs: getattr(bind(sam, params), method)(*inputs))(params_of(sam), *inputs)


def channels_last(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


def test_encoder_equals_the_original_block_by_block():
    embedding, out = run(tiny(), "image_encoder", image())
    for i, block in enumerate(out["blocks"]):
        assert relative_error(block, golden()[f"block{i}"]) < 1e-5, f"block {i}"
    assert relative_error(embedding, channels_last(golden()["image_embedding"][:1])) < 1e-5


def test_encoder_without_adapter_equals_the_original():
    plain = build(dataclasses.replace(TINY, adapter=False), formula_reader("samtiny"))
    embedding = run(plain, "encode", image())
    assert relative_error(embedding, channels_last(golden()["image_embedding_without_adapter"])) < 1e-5


def test_on_a_cpu_the_kernels_of_half_precision_are_not_widened_together():
    """Those of a loop would be."""
    sam = abstract_module(lambda rngs: SamMed2d(dataclasses.replace(SMALL, num_layers=3, global_layers=()), rngs))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), draw_params(sam, 0))
    whole = jax.tree.map(lambda x: x.astype(jnp.float32), half)

    def encode(params, pixels):
        return bind(sam, params).encode(pixels)

    pixels = np.random.default_rng(0).standard_normal((1, 32, 32, 3), np.float32)
    loops = ["scan" in str(jax.make_jaxpr(encode)(params, pixels)) for params in (half, whole)]
    assert loops == [False, True]
    assert relative_error(jax.jit(encode)(half, pixels), jax.jit(encode)(whole, pixels)) < 1e-5


@pytest.mark.parametrize("prompt", list(PROMPTS))
def test_prompts_and_masks_equal_the_original(prompt):
    arrays, sam = golden(), tiny()
    given = {name: arrays["in_text_embeds" if name == "text" else f"in_{name}"] for name in PROMPTS[prompt]}
    sparse = sam.prompt_encoder.sparse(**given)
    assert relative_error(sparse, arrays[f"prompt_{prompt}_sparse"]) < 1e-5
    dense = sam.prompt_encoder.dense(arrays["in_masks"][:, 0] if prompt == "all" else None)
    embedding = jnp.asarray(channels_last(arrays["image_embedding"]))
    for multimask in (False, True):
        expected = {name: arrays.get(f"dec_{prompt}_mm{multimask:d}_{name}") for name in ("masks", "iou")}
        if expected["iou"] is None:
            continue
        decode = jax.jit(functools.partial(sam.mask_decoder, multimask=multimask))
        masks, iou = decode(embedding, sam.prompt_encoder.grid_position(), sparse[:, None], dense)
        masks, iou = (masks[:, 0], iou[:, 0]) if multimask else (masks, iou)
        assert relative_error(iou, expected["iou"]) < 1e-5
        if expected["masks"] is not None:
            assert relative_error(masks, expected["masks"]) < 1e-5


def test_dense_prompt_and_positions_equal_the_original():
    encoder = tiny().prompt_encoder
    assert (
        relative_error(encoder.dense(golden()["in_masks"][:, 0]), channels_last(golden()["prompt_masks_dense"])) < 1e-5
    )
    assert relative_error(encoder.grid_position()[None], channels_last(golden()["dense_pe"])) < 5e-6
    with pytest.raises(ValueError, match="points, boxes or text"):
        encoder.sparse()


def test_decoding_several_prompts_equals_decoding_each():
    embedding = jnp.asarray(channels_last(golden()["image_embedding"]))
    prompts = jax.random.normal(jax.random.key(0), (2, 3, 64))
    masks, iou = run(tiny(), "decode", embedding, prompts)
    assert masks.shape == (2, 3, 64, 64) and iou.shape == (2, 3)
    alone = jax.jit(tiny().decode)
    for m in range(3):
        alone_masks, alone_iou = alone(embedding, prompts[:, m : m + 1])
        assert relative_error(masks[:, m], alone_masks[:, 0]) < 1e-5
        assert relative_error(iou[:, m], alone_iou[:, 0]) < 1e-5


@functools.cache
def transformers_sam() -> tuple[SamModel, SamMed2d]:
    torch.manual_seed(0)
    vision = SamVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
        window_size=3,
        global_attn_indexes=[1],
        output_channels=16,
        mlp_dim=64,
        num_pos_feats=8,
    )
    prompt = SamPromptEncoderConfig(hidden_size=16, image_size=32, patch_size=4, mask_input_channels=8)
    decoder = SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=32, num_attention_heads=4, iou_head_hidden_dim=16, layer_norm_eps=1e-5
    )
    theirs = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)).eval()
    with torch.no_grad():
        for value in (*theirs.parameters(), *theirs.buffers()):
            value.normal_(0, 0.3)
    return theirs, build(
        SMALL, reader({name: value.detach().numpy() for name, value in theirs.state_dict().items()}, HF_SAM_NAMES)
    )


def test_encoder_with_many_windows_equals_transformers():
    theirs, ours = transformers_sam()
    pixels = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    with torch.no_grad():
        expected = theirs.vision_encoder(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    assert relative_error(run(ours, "encode", pixels), channels_last(expected)) < 1e-4


def test_decoder_and_its_gradients_equal_transformers():
    theirs, ours = transformers_sam()
    random = np.random.default_rng(1)
    embedding, text = random.standard_normal((2, 8, 8, 16), np.float32), random.standard_normal((2, 3, 16), np.float32)
    weights = random.standard_normal((2, 3, 32, 32), np.float32)

    torch_embedding = torch.from_numpy(embedding.transpose(0, 3, 1, 2)).requires_grad_()
    torch_text = torch.from_numpy(text[:, :, None]).requires_grad_()
    encoder = theirs.prompt_encoder
    rows = columns = (torch.arange(8) + 0.5) / 8
    position = encoder.shared_embedding(torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)).permute(
        2, 0, 1
    )[None]
    dense = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(2, -1, 8, 8)
    position = position.expand(2, -1, -1, -1)
    expected_masks, expected_iou = theirs.mask_decoder(
        torch_embedding, position, torch_text, dense, multimask_output=False
    )
    ((expected_masks[:, :, 0] * torch.from_numpy(weights)).sum() + expected_iou.sum()).backward()

    def loss(params, embedding, text):
        masks, iou = bind(ours, params).decode(embedding, text)
        return (masks * weights).sum() + iou.sum(), (masks, iou)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    (of_params, of_embedding, of_text), (masks, iou) = gradient(
        params_of(ours), jnp.asarray(embedding), jnp.asarray(text)
    )
    assert relative_error(masks, expected_masks[:, :, 0].detach()) < 1e-4
    assert relative_error(iou, expected_iou[:, :, 0].detach()) < 1e-4
    assert relative_error(of_embedding, channels_last(torch_embedding.grad.numpy())) < 1e-3
    assert relative_error(of_text, torch_text.grad[:, :, 0]) < 1e-3
    upscale = theirs.mask_decoder.upscale_conv1.weight.grad.numpy()
    assert relative_error(of_params["mask_decoder"]["upscale1"]["kernel"], upscale.transpose(2, 3, 0, 1)) < 1e-3
    frequencies = of_params["prompt_encoder"]["position_gaussian"]
    assert not np.any(frequencies), "the frequencies are a buffer in PyTorch: nothing may train them"


def test_adapter_gradient_equals_torch():
    """The convolution down and up, which ours computes in another form, against PyTorch's autograd."""
    torch.manual_seed(0)
    down, up = torch.nn.Conv2d(4, 4, 3, 2, 1, bias=False), torch.nn.ConvTranspose2d(4, 4, 4, 2, 1, bias=False)
    x = torch.randn(2, 4, 6, 8, requires_grad=True)
    expected = up(down(x))
    expected.square().sum().backward()
    config = dataclasses.replace(SMALL, hidden_size=4, num_layers=1, global_layers=(), adapter=True)
    adapter = abstract_module(lambda rngs: SamMed2d(config, rngs)).image_encoder.blocks[0].adapter
    kernels = [down.weight.detach().numpy().transpose(2, 3, 1, 0), up.weight.detach().numpy().transpose(2, 3, 0, 1)]

    def loss(kernels, x):
        y = bind(adapter.spatial2, {"kernel": kernels[1]})(bind(adapter.spatial1, {"kernel": kernels[0]})(x))
        return jnp.square(y).sum(), y

    (of_kernels, of_x), y = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        kernels, jnp.asarray(channels_last(x.detach().numpy()))
    )
    assert relative_error(y, channels_last(expected.detach().numpy())) < 1e-5
    assert relative_error(of_x, channels_last(x.grad.numpy())) < 1e-4
    assert relative_error(of_kernels[0], down.weight.grad.numpy().transpose(2, 3, 1, 0)) < 1e-4
    assert relative_error(of_kernels[1], up.weight.grad.numpy().transpose(2, 3, 0, 1)) < 1e-4


def test_normalise_pads_with_zero_after_normalising():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    box = np.array([[1, 0, 5, 8], [0, 2, 8, 3]])
    ours = np.asarray(normalise_sam(jnp.asarray(pixels), jnp.asarray(box)))
    for row, (top, left, height, width) in enumerate(box):
        inside = np.zeros((8, 8, 1), bool)
        inside[top : top + height, left : left + width] = True
        expected = np.where(
            inside, (pixels[row] - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375]), 0
        )
        np.testing.assert_allclose(ours[row], expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_bfloat16():
    sam = tiny()
    embedding = jax.eval_shape(sam.encode, jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.bfloat16))
    masks, iou = jax.eval_shape(sam.decode, embedding, jax.ShapeDtypeStruct((1, 2, 64), jnp.bfloat16))
    assert (embedding.dtype, masks.dtype, iou.dtype) == (jnp.bfloat16,) * 3
