"""Comparisons of parts of the model, each alone, with recorded arrays of the original program. Weights go through the
table of names."""

import dataclasses
import functools
import json
import pathlib
import tempfile
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from convert import from_torch, mapping, to_torch, torch_files
from medplib_jax.batch import flatten, unflatten
from medplib_jax.config.model import IclConfig, LlmConfig, LoraConfig, ModelConfig, MoeConfig
from medplib_jax.data import images
from medplib_jax.models.icl.embedding import picture_vectors, retrieval_tower
from medplib_jax.models.icl.tokens import ExampleReader, pooling_weights
from medplib_jax.models.language.lora import merge_lora
from medplib_jax.models.language.moe import MoeMlp
from medplib_jax.models.language.routing import expert_capacity
from medplib_jax.models.layers import abstract_module, bind, params_of
from medplib_jax.models.masks.sam import SamMed2d
from medplib_jax.models.masks.unpad import resample_to_canvas
from medplib_jax.models.region.encoder import point_weights
from medplib_jax.models.region.geometry import GeometrySampler, farthest_points, nearest_points
from tests.convert.checks import BAR, GRADIENT_BAR, Arrays, Converted, Row, differing, relative

SAM_PROMPTS = {
    "points": ("points", "labels"),
    "boxes": ("boxes",),
    "points_boxes": ("points", "labels", "boxes"),
    "text": ("text",),
    "all": ("points", "labels", "boxes", "text"),
}
MOE_CASES = {  # as they were recorded
    "a": MoeConfig(num_experts=2, capacity_factor=1.5, eval_capacity_factor=2.0),
    "b": MoeConfig(num_experts=4, capacity_factor=1.0, eval_capacity_factor=1.0, min_capacity=4),
    "c": MoeConfig(num_experts=4, capacity_factor=0.5, eval_capacity_factor=0.25, min_capacity=12),
    "d": MoeConfig(num_experts=3, top_k=2, capacity_factor=1.0, eval_capacity_factor=2.0),
    "e": MoeConfig(num_experts=5, top_k=2, capacity_factor=0.55, eval_capacity_factor=0.7, min_capacity=4),
    "f": MoeConfig(num_experts=2, capacity_factor=1.0, eval_capacity_factor=1.0, residual=True),
    "g": MoeConfig(num_experts=3, top_k=2, capacity_factor=1.0, eval_capacity_factor=1.0, residual=True),
    "h": MoeConfig(num_experts=2, capacity_factor=1.5, eval_capacity_factor=2.0),
}


def check_sam(converted: Converted, z: Arrays) -> Iterator[Row]:
    """SAM-Med2D alone: every block, every sort of prompt, single masks and three at a time."""
    image = z["image"] if "image" in z else z["image_low8"].repeat(8, 2).repeat(8, 3)
    sam = bind(
        abstract_module(lambda rngs: SamMed2d(converted.config.mask, rngs)),
        jax.tree.map(jnp.asarray, converted.params["sam"]),
    )
    embedding, out = jax.jit(lambda pixels: sam.image_encoder(pixels))(image.transpose(0, 2, 3, 1))
    for i, block in enumerate(out["blocks"]):
        if f"block{i}" in z:
            yield Row("SAM blocks", relative(block, z[f"block{i}"]))
    yield Row("SAM image embedding", relative(embedding, z["image_embedding"].transpose(0, 2, 3, 1)))
    if "dense_pe" in z:
        yield Row(
            "SAM prompts", relative(sam.prompt_encoder.grid_position()[None], z["dense_pe"].transpose(0, 2, 3, 1))
        )
        masks = sam.prompt_encoder.dense(z["in_masks"][:, 0])
        yield Row("SAM prompts", relative(masks, z["prompt_masks_dense"].transpose(0, 2, 3, 1)))
    inputs = {name: z[key] for name, key in _prompt_keys().items() if key in z}
    for prompt, names in SAM_PROMPTS.items():
        if set(names) <= set(inputs):
            yield from _check_prompt(sam, z, embedding, prompt, {name: inputs[name] for name in names})


def _prompt_keys() -> dict[str, str]:
    return {"points": "in_points", "labels": "in_labels", "boxes": "in_boxes", "text": "in_text_embeds"}


def _check_prompt(sam: SamMed2d, z: Arrays, embedding, prompt: str, given: Arrays) -> Iterator[Row]:
    sparse = sam.prompt_encoder.sparse(**given)
    if f"prompt_{prompt}_sparse" in z:
        yield Row("SAM prompts", relative(sparse, z[f"prompt_{prompt}_sparse"]))
    dense = sam.prompt_encoder.dense(z["in_masks"][:, 0] if prompt == "all" else None)
    for several in (False, True):
        masks, iou = sam.mask_decoder(
            embedding, sam.prompt_encoder.grid_position(), sparse[:, None], dense, multimask=several
        )
        masks, iou = (masks[:, 0], iou[:, 0]) if several else (masks, iou)
        for what, found, name in (("mask logits", masks, "masks"), ("predicted IoU", iou, "iou")):
            expected = z.get(f"dec_{prompt}_mm{several:d}_{name}")
            if expected is not None:
                yield Row(what, relative(found, expected))


def table_params(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], tensors: Arrays) -> dict:
    """The tree of the parameters `shapes` (path -> shape), filled from PyTorch tensors by the table."""
    flat = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    plan = mapping.strict_plan(config, shapes, {name: x.shape for name, x in tensors.items()})
    for key, place in plan.items():
        flat[place.path][place.index] = place.layout.to_jax(tensors[key])
    return unflatten(flat)


def under(prefix: str, module) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}{path}": leaf.shape for path, leaf in flatten(params_of(module)).items()}


def check_geometry(z: Arrays) -> Iterator[Row]:
    """The geometry-aware sampler with the original's draws of points: features and gradients."""
    found = jax.jit(lambda points, start: farthest_points(points, 17, start))(z["unit_points"], z["unit_start"])
    yield Row("farthest and nearest points (share that differs)", differing(found, z["unit_fps"]), 0.0)
    centres = np.take_along_axis(z["unit_points"], np.asarray(found)[..., None], axis=1)
    nearest = np.sort(nearest_points(z["unit_points"], centres, 9), axis=-1)
    yield Row(
        "farthest and nearest points (share that differs)", differing(nearest, np.sort(z["unit_knn"], axis=-1)), 0.0
    )
    for pooling in ("max", "mean"):
        yield from _check_pooling(z, pooling)


def _check_pooling(z: Arrays, pooling: str) -> Iterator[Row]:
    module = abstract_module(lambda rngs: GeometrySampler(10, 12, pooling, rngs, centres=(24, 8), neighbours=(12, 6)))
    prefix, start = "region/geometry/", f"{pooling}_param."
    tensors = {
        "model.region_geo_sampler." + key.removeprefix(start): x for key, x in z.items() if key.startswith(start)
    }
    shapes = under(prefix, module)
    params = table_params(ModelConfig(), shapes, tensors)["region"]["geometry"]
    places = mapping.entries(ModelConfig(), shapes)
    images, cells = [0, 0, 2], [np.argwhere(mask) / mask.shape for mask in (*z["mask_0"], *z["mask_2"])]
    draws = [z[f"{pooling}_rsr_{i}"] for i in range(3)]
    points = np.float32(
        [c[d] if len(d) == 64 else np.concatenate([c, c[d]]) for c, d in zip(cells, draws, strict=True)]
    )
    weights = point_weights(jnp.asarray(points[None, :, :, ::-1]), 24)[0]

    def read(params, feature_map):
        sampler, at = bind(module, params), jnp.asarray(points)
        features = weights @ feature_map[np.array(images)]
        for i, stage in enumerate(sampler.stages):
            centres = z[f"{pooling}_fps_{i}"]
            features = stage(features, at, jnp.asarray(centres), jnp.asarray(z[f"{pooling}_knn_{i}"]))
            at = jnp.take_along_axis(at, jnp.asarray(centres)[..., None], axis=1)
        return sampler.readout(features), features.reshape(3, -1)

    made, flat = read(params, z["feature_map"])
    yield Row("region features", relative(made, np.concatenate([z[f"{pooling}_region_feature_{i}"] for i in (0, 2)])))
    # The loss is not recorded; what reached `flatten` follows from its gradient (30 unknowns, 800 equations).
    recorded, key = (
        z[f"{pooling}_grad_flatten_projector.weight"],
        "model.region_geo_sampler.diff_projector_list.0.weight",
    )
    incoming = recorded @ np.linalg.pinv(np.asarray(flat, np.float64))

    def loss(params, feature_map):
        return ((read(params, feature_map)[1] @ params["flatten"]["kernel"]) * incoming.T).sum()

    of_params, of_map = jax.grad(loss, argnums=(0, 1))(params, jnp.asarray(z["feature_map"]))
    of_diff = places[key].layout.to_torch(flatten({"region": {"geometry": of_params}})[places[key].path])
    yield Row("gradients", relative(of_map, z[f"{pooling}_grad_feature_map"]), GRADIENT_BAR)
    yield Row("gradients", relative(of_diff, z[f"{pooling}_grad_diff_projector_list.0.weight"]), GRADIENT_BAR)


def check_example_readers(z: Arrays, mask_encoder: Mapping[str, torch_files.Tensor]) -> Iterator[Row]:
    """The compressor and the mask encoder of in-context learning, each alone, and the pooling that both do."""
    config = IclConfig("separate", compressed_tokens=z["tc_y"].shape[1], mask_tokens=z["me_y"].shape[1])
    module = abstract_module(lambda rngs: ExampleReader(config, z["tc_y"].shape[2], rngs))
    tensors = {mapping.canonical(key): tensor.read() for key, tensor in mask_encoder.items()}
    for key, value in z.items():
        if key.startswith("tc_param."):
            tensors["model.mm_token_compressor." + key.removeprefix("tc_param.")] = value
    model = bind(module, table_params(ModelConfig(), under("icl/", module), tensors)["icl"])
    yield Row("compressed tokens", relative(model.compressor(jnp.asarray(z["tc_x"])), z["tc_y"]))
    yield Row("encoded masks", relative(model.mask_encoder(jnp.asarray(z["me_masks"]), jnp.float32), z["me_y"]))
    for key in (key for key in z if key.startswith("adaptive_")):
        size, count = map(int, key.split("_")[1:])
        yield Row("means of shares", relative(pooling_weights(size, count) @ np.arange(size), z[key]), 1e-6)


def check_retrieval(converted: Converted, z: Arrays, pictures: list[np.ndarray]) -> Iterator[Row]:
    """Pictures as vectors, from their pixels on, and their cosines."""
    clip = converted.config.clip
    tower = abstract_module(functools.partial(retrieval_tower, clip))
    pixels = np.stack([images.cropped(picture, clip.image_size) for picture in pictures])
    vectors = picture_vectors(bind(tower, converted.params["clip"]), pixels)
    yield Row("vectors of pictures", relative(vectors, z["embeddings"]))
    yield Row("cosines", relative(vectors @ vectors.T, z["scores"]))


def check_experts(z: Arrays) -> Iterator[Row]:
    """DeepSpeed's mixture alone, top-1 and top-2, with drops and residual experts, in training and evaluation: values
    and gradients."""
    for name, case in MOE_CASES.items():
        moe = dataclasses.replace(case, dispatch="capacity")
        x = z[f"{name}_x"]
        weight = np.random.RandomState(7).standard_normal(x.shape).astype(np.float32)
        config = ModelConfig(
            llm=LlmConfig(vocab_size=8, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, mlp_dim=24), moe=moe
        )
        module = abstract_module(functools.partial(MoeMlp, config.llm, moe, LoraConfig()))
        for mode in ("eval", "train"):
            yield from _check_mixture(z, f"{name}_", mode, config, module, weight)


def _check_mixture(z: Arrays, name: str, mode: str, config: ModelConfig, module, weight: np.ndarray) -> Iterator[Row]:
    def stack(prefix: str) -> dict:
        """The tree of the tensors under a prefix; the table stacks layers, of which there is one."""
        tensors = {
            "model.layers.0.mlp." + key.removeprefix(prefix): x for key, x in z.items() if key.startswith(prefix)
        }
        shapes = {path: (1, *shape) for path, shape in under("llm/moe/", module).items()}
        return jax.tree.map(lambda x: x[0], table_params(config, shapes, tensors)["llm"]["moe"]) if tensors else {}

    x = jnp.asarray(z[name + "x"])

    def objective(params, x):
        y, out = bind(module, params)(
            x, jnp.ones(x.shape[:2], bool), train=mode == "train", noise_SxE=z[f"{name}{mode}_noise"]
        )
        return jnp.sum(y * weight) + 3 * out["aux_loss"], (y, out)

    compute = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    (_, (y, out)), (of_params, of_x) = compute(stack(name + "param."), x)
    prefix = f"{name}{mode}_"
    yield Row("outputs", relative(y, z[prefix + "y"]))
    logits = out["router_logits"]
    yield Row("router logits", relative(logits.reshape(-1, logits.shape[-1]), z[prefix + "router_logits"]))
    yield Row("auxiliary loss", relative(out["aux_loss"], z[prefix + "l_aux"]))
    yield Row("gradients", relative(of_x, z[prefix + "dx"]), GRADIENT_BAR)
    expected = flatten(stack(prefix + "grad."))
    for path in expected:
        yield Row("gradients", relative(flatten(of_params)[path], expected[path]), GRADIENT_BAR)


def check_capacities(table: np.ndarray) -> Iterator[Row]:
    """Rows of (tokens, experts, factor, least, capacity)."""
    ours = [
        expert_capacity(int(tokens), int(experts), float(factor), int(least))
        for tokens, experts, factor, least in table[:, :4]
    ]
    yield Row("capacities (share that differs)", differing(ours, table[:, 4]), 0.0)


def check_unpadding(z: Arrays) -> Iterator[Row]:
    """Mask logits back at the original size, as MedPLIB cuts them and as SAM does."""
    for case in range(5):
        (height, width), (rows, columns) = z[f"post{case}_input_size"], z[f"post{case}_original_size"]
        low = z[f"post{case}_low8"]
        low = low.reshape(-1, *low.shape[-3:]).repeat(8, 2).repeat(8, 3)
        centred = ((256 - height) // 2, (256 - width) // 2, height, width)
        for name, box, mode in (("out", centred, "reference"), ("sam_out", (0, 0, height, width), "exact")):
            expected = z.get(f"post{case}_{name}")
            if expected is None:
                continue
            boxes, sizes = (np.int32([value] * len(low)) for value in (box, (rows, columns)))
            canvas = (int(rows), int(columns))
            found, _ = resample_to_canvas(jnp.asarray(low), boxes, sizes, canvas=canvas, sam_size=256, mode=mode)
            yield Row("masks at original size", relative(found, expected))


def check_adapters(sources: tuple[pathlib.Path, ...], config: pathlib.Path, lora: pathlib.Path) -> Iterator[Row]:
    """PEFT's layouts: names of a training checkpoint and of a merged one, the merge itself, one adapted layer alone."""
    layout = json.loads((lora / "training_layout.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        one_layer = lora / "layer1_before_merge.safetensors"  # the first source counts
        options = from_torch.Options(
            (one_layer, *sources), work / "jax", config=config, lora_alpha=layout["lora"]["alpha"]
        )
        from_torch.convert(options)
        for name, keys in (("lora", "keys"), ("merged", "merged_keys")):
            to_torch.convert(work / "jax", work / name, layout=name)
            found = {key: tensor.shape for key, tensor in torch_files.read_folder(work / name).items()}
            expected = {key: tuple(shape) for key, shape in layout[keys].items()}
            wrong = [key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)]
            yield Row("names and shapes (share that differs)", len(wrong) / len(expected), 0.0)
        merged = torch_files.read_folder(work / "merged")
        for key, tensor in torch_files.read_file(lora / "layer1_after_merge.safetensors").items():
            yield Row("merged weights", relative(merged[key].read(), tensor.read()))
    z = dict(np.load(lora / "lora_linear.npz"))
    for name in ("q_proj", "gate_proj"):
        parts = zip(("kernel", "lora_a", "lora_b"), ("base", "A", "B"), strict=True)
        params = {ours: mapping.LINEAR.to_jax(z[f"{name}_{theirs}"]) for ours, theirs in parts}
        kernel = merge_lora(params, LoraConfig(rank=layout["lora"]["r"], alpha=layout["lora"]["alpha"]))["kernel"]
        yield Row("merged weights", relative(mapping.LINEAR.to_torch(np.asarray(kernel)), z[f"{name}_merged"]))
        yield Row("an adapted layer's output", relative(z["x"] @ kernel, z[f"{name}_y"]), BAR)
