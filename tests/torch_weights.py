"""PyTorch weights of the vision parts as our parameter trees, for parity tests; and the formula that stands in for
stored weights.

A `read(name, shape)` gives the PyTorch tensor of that name: from a state dict (`reader`), or made by formula
(`formula_reader`).
"""

import re
import zlib
from collections.abc import Callable

import numpy as np
from flax import nnx

Read = Callable[[str, tuple[int, ...]], np.ndarray]

SAM_NAMES = (
    (r"^image_encoder\.position_embed$", "image_encoder.pos_embed"),
    (r"patch_embed\.", "patch_embed.proj."),
    (r"\.adapter\.", ".Adapter."),
    (r"\.(channel|spatial)1\.", r".\1.0."),
    (r"\.(channel|spatial)2\.", r".\1.2."),
    (r"\.mlp\.fc", ".mlp.lin"),
    (r"neck\.conv1", "neck.0"),
    (r"neck\.norm1", "neck.1"),
    (r"neck\.conv2", "neck.2"),
    (r"neck\.norm2", "neck.3"),
    (r"position_gaussian$", "pe_layer.positional_encoding_gaussian_matrix"),
    (r"(not_a_point_embed|no_mask_embed|iou_token|mask_tokens)$", r"\1.weight"),
    (r"point_embed$", "point_embeddings.{}.weight"),
    (r"mask_conv1", "mask_downscaling.0"),
    (r"mask_norm1", "mask_downscaling.1"),
    (r"mask_conv2", "mask_downscaling.3"),
    (r"mask_norm2", "mask_downscaling.4"),
    (r"mask_conv3", "mask_downscaling.6"),
    (r"cross_(token_to_image|image_to_token)", r"cross_attn_\1"),
    (r"final_attn\.", "final_attn_token_to_image."),
    (r"final_norm", "norm_final_attn"),
    (r"(attn\w*|image|token)\.([qkv])\.", r"\1.\2_proj."),
    (r"(attn\w*|image|token)\.o\.", r"\1.out_proj."),
    (r"upscale1", "output_upscaling.0"),
    (r"upscale_norm", "output_upscaling.1"),
    (r"upscale2", "output_upscaling.3"),
    (r"hypernetworks", "output_hypernetworks_mlps"),
    (r"iou_head", "iou_prediction_head"),
    (r"(kernel|scale)$", "weight"),
)
CLIP_NAMES = (
    (r"^patch_embed\.kernel", "embeddings.patch_embedding.weight"),
    (r"^class_embed", "embeddings.class_embedding"),
    (r"^position_embed", "embeddings.position_embedding.weight"),
    (r"^pre_norm", "pre_layrnorm"),
    (r"^post_norm", "post_layernorm"),
    (r"^layers\.norm", "encoder.layers.{}.layer_norm"),
    (r"^layers\.", "encoder.layers.{}."),
    (r"attn\.o\.", "attn.out."),
    (r"attn\.(\w+)\.", r"self_attn.\1_proj."),
    (r"(kernel|scale)$", "weight"),
    (r"^", "vision_model."),
)
HF_SAM_NAMES = (  # the usual names of SAM's tensors -> those of transformers
    (r"^image_encoder\.", "vision_encoder."),
    (r"patch_embed\.proj", "patch_embed.projection"),
    (r"\.blocks\.", ".layers."),
    (r"neck\.0", "neck.conv1"),
    (r"neck\.1", "neck.layer_norm1"),
    (r"neck\.2", "neck.conv2"),
    (r"neck\.3", "neck.layer_norm2"),
    (r"(?<!layer_)norm(\d)", r"layer_norm\1"),
    (r"norm_final_attn", "layer_norm_final_attn"),
    (r"pe_layer\.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    (r"point_embeddings", "point_embed"),
    (r"mask_downscaling\.0", "mask_embed.conv1"),
    (r"mask_downscaling\.1", "mask_embed.layer_norm1"),
    (r"mask_downscaling\.3", "mask_embed.conv2"),
    (r"mask_downscaling\.4", "mask_embed.layer_norm2"),
    (r"mask_downscaling\.6", "mask_embed.conv3"),
    (r"output_upscaling\.0", "upscale_conv1"),
    (r"output_upscaling\.1", "upscale_layer_norm"),
    (r"output_upscaling\.3", "upscale_conv2"),
    (r"((mlps\.\d+|head)\.)layers\.0", r"\1proj_in"),
    (r"((mlps\.\d+|head)\.)layers\.2", r"\1proj_out"),
    (r"((mlps\.\d+|head)\.)layers\.1", r"\1layers.0"),
)
TRANSPOSED = ("spatial2", "upscale1", "upscale2")


def torch_params(abstract: nnx.Module, names: tuple[tuple[str, str], ...], read: Read) -> dict:
    """The module's parameter tree with every value read from PyTorch tensors.

    A `{}` in a name counts the leading axis.
    """
    tree: dict = {}
    for path, variable in nnx.to_flat_state(nnx.state(abstract, nnx.Param)):
        path = [str(part) for part in path]
        name = ".".join(path)
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        shape = variable.shape
        if "{}" in name:
            value = np.stack([_one(path, shape[1:], name.format(i), read) for i in range(shape[0])])
        else:
            value = _one(path, shape, name, read)
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return tree


def _one(path: list[str], shape: tuple[int, ...], name: str, read: Read) -> np.ndarray:
    if path[-1] == "kernel":
        order = (1, 0) if len(shape) == 2 else (2, 3, 0, 1) if path[-2] in TRANSPOSED else (2, 3, 1, 0)
        torch_shape = [0] * len(shape)
        for ours, theirs in enumerate(order):
            torch_shape[theirs] = shape[ours]
        return read(name, tuple(torch_shape)).transpose(order)
    singleton = name.endswith("pos_embed") or (
        len(shape) == 1 and re.search(r"point_embeddings|_embed\.weight|iou_token", name)
    )
    return read(name, (1, *shape) if singleton else shape).reshape(shape)


def reader(state_dict: dict, names: tuple[tuple[str, str], ...] = ()) -> Read:
    """Reads a state dict whose keys differ from the usual ones by `names`."""

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        value = np.asarray(state_dict[name])
        assert value.shape == shape, f"{name}: {value.shape} instead of {shape}"
        return value

    return read


def formula_reader(tag: str) -> Read:
    """The tensors that the golden arrays' SAM (tags samtiny, samfull) and CLIP (clip56) were made with: normal, seeded
    by their name, of a spread that fits their role."""

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        draws = np.random.RandomState(zlib.crc32(f"{tag}.{name}".encode())).standard_normal(shape)
        is_norm = len(shape) == 1 and re.search(
            r"norm|layrnorm|neck\.[13]\.|mask_downscaling\.[14]\.|output_upscaling\.1\.", name
        )
        if is_norm:
            return (draws * (0.05 if name.startswith("vision_model") else 0.1) + name.endswith("weight")).astype(
                np.float32
            )
        return (draws * _spread(name, shape)).astype(np.float32)

    return read


def _spread(name: str, shape: tuple[int, ...]) -> float:
    named = (
        (r"^vision_model.*bias$", 0.02),
        (r"patch_embedding", 0.05),
        (r"position_embedding|class_embedding", 0.3),
        (r"bias$", 0.05),
        (r"rel_pos|pos_embed", 0.2),
        (r"gaussian_matrix", 1.0),
        (r"iou_token|mask_tokens|point_embeddings|not_a_point|no_mask", 0.5),
        (r"output_upscaling", 1.2 / shape[0] ** 0.5),
        (r"Adapter\.spatial\.2", 0.6 / shape[0] ** 0.5),
    )
    fan_in = np.prod(shape[1:]) if len(shape) == 4 else shape[-1]
    return next((std for pattern, std in named if re.search(pattern, name)), 1.2 / fan_in**0.5)


def relative_error(actual, expected) -> float:
    """Largest difference over the largest magnitude."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{actual.shape} instead of {expected.shape}"
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
