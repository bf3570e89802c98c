"""The recorded fixtures of MedPLIB: which file is compared how, with which weights."""

import json
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np

from convert import torch_files
from medplib_jax.data import images
from tests.convert import checks, generation_checks, part_checks
from tests.convert.checks import Converted, Row
from tests.convert.golden_folder import ELSEWHERE, Golden, compares
from tests.torch_weights import formula_reader

TOP1, TOP1_56, TOP2 = ("ckpt_moe_top1",), ("ckpt_moe_top1_56",), ("ckpt_moe_top2",)
ICL = (*TOP1_56, "icl_extra_weights.safetensors")
CLIP, SAM = "clip-tiny-56", "sam-med2d_tiny.pth"
ADAPTED = ("lora/ckpt_moe_top1_56_training.safetensors", CLIP, SAM)
SFT_ONLY = ("opt_sft_only_init.safetensors", "opt_sft_only_frozen.safetensors", CLIP, SAM)
DROPS = {"capacity_factor": 0.7, "eval_capacity_factor": 0.9, "min_capacity": 4}
DROPS_TOP2 = {"capacity_factor": 0.5, "eval_capacity_factor": 0.6}

ELSEWHERE.update(
    {
        "*README.*": "describes the others",
        "ckpt_moe_*/*": "weights of other fixtures",
        "clip-tiny-*/*": "weights of other fixtures",
        "sam-med2d_tiny.pth": "weights of other fixtures",
        "weights_recipe.json": "weights of sam_full_vitb.npz",
        "opt_sft_only_*.safetensors": "weights of opt_step_sft_only.npz",
        "lora/*": "parts of lora/training_layout.json",
        "opt_step.json": "trajectories: opt_step_*.npz; schedules: tests/train/test_optim.py",
        "keys_7b*.json": "without weights: tests/convert/test_mapping.py",
        "rag_*": "without weights: tests/datasets/test_index.py",
        "icl_source.json": "without weights: tests/data/test_icl.py",
        "icl_mask_encoder.safetensors": "weights of icl_modules.npz",
        "losses.npz": "without weights: tests/train/test_losses.py",
        "metrics*": "without weights: tests/evaluate/metrics/test_metrics.py",
        "conversation/*": "without weights: tests/data/test_prompts.py, test_tokenizer.py",
        "preprocess/*": "without weights: tests/data/test_images.py, test_regions.py",
        "data/*": "pictures and records of other fixtures",
    }
)


@compares("forward_vqa_56.npz", "forward_region_56.npz", sources=TOP1_56)
@compares("forward_vqa_drop_56.npz", sources=TOP1_56, moe=DROPS)
@compares("forward_vqa.npz", "forward_region.npz", sources=TOP1)
@compares("forward_vqa_top2.npz", sources=TOP2)
@compares("forward_vqa_top2_drop.npz", sources=TOP2, moe=DROPS_TOP2)
def forward(golden: Golden, name: str, sources, moe=None) -> Iterator[Row]:
    yield from checks.check_forward(golden.converted(*sources).with_moe(**moe or {}), golden.arrays(name))


@compares("forward_seg_mixed_56.npz", sources=TOP1_56)
@compares("forward_seg_eval_56.npz", sources=TOP1_56, train=False)
@compares("forward_seg.npz", sources=TOP1)
@compares("forward_seg_top2.npz", sources=TOP2)
def segmentation(golden: Golden, name: str, sources, train=True) -> Iterator[Row]:
    yield from checks.check_segmentation(golden.converted(*sources), golden.arrays(name), checks.SEG_LOSS, train)


@compares(
    *(f"icl_{mode}{views}.npz" for mode in ("overlay", "separate_maskenc") for views in ("", "_multi", "_3shot_multi")),
    "icl_overlay_compress_multi.npz",
    "icl_separate_multi.npz",
)
def examples(golden: Golden, name: str) -> Iterator[Row]:
    """Several pictures in a row. Some of the files record a slip of the original: one picture a row is left."""
    z = golden.arrays(name)
    yield from checks.check_segmentation(golden.converted(*ICL).with_examples(z), z, checks.SEG_LOSS, True)


@compares(
    "icl_generate_overlay.npz",
    "icl_generate_overlay_compress.npz",
    "icl_generate_separate.npz",
    "icl_generate_separate_maskenc.npz",
    "icl_generate_separate_maskenc_compress.npz",
)
def answers_to_examples(golden: Golden, name: str) -> Iterator[Row]:
    yield from generation_checks.check_examples_evaluated(golden.converted(*ICL), golden.arrays(name))


@compares("generate_vqa_56.npz", sources=TOP1_56)
@compares("generate_vqa.npz", sources=TOP1)
def generation(golden: Golden, name: str, sources) -> Iterator[Row]:
    yield from generation_checks.check_generation(golden.converted(*sources), golden.arrays(name))


@compares("generate_vqa_top2.npz")
def noisy_generation(golden: Golden, name: str) -> Iterator[Row]:
    yield from generation_checks.check_noisy_generation(golden.converted(*TOP2), golden.arrays(name))


@compares("evaluate_seg_56.npz", sources=TOP1_56)
@compares("evaluate_seg.npz", sources=TOP1)
def evaluation(golden: Golden, name: str, sources) -> Iterator[Row]:
    yield from generation_checks.check_evaluate(golden.converted(*sources), golden.arrays(name))


@compares("sam_tiny.npz")
def sam(golden: Golden, name: str) -> Iterator[Row]:
    yield from part_checks.check_sam(golden.converted(SAM), golden.arrays(name))


@compares("sam_tiny_noadapter.npz")
def sam_without_adapters(golden: Golden, name: str) -> Iterator[Row]:
    tensors = torch_files.read_file(golden.path(SAM))
    planned = [
        torch_files.Planned(key, tensor.shape, tensor.dtype, tensor.read)
        for key, tensor in tensors.items()
        if ".Adapter." not in key
    ]
    z = golden.arrays(name)
    z["image"] = golden.arrays("sam_tiny.npz")["image"]
    yield from part_checks.check_sam(_written(planned), z)


@compares("sam_full_vitb.npz")
def sam_of_full_size(golden: Golden, name: str) -> Iterator[Row]:
    """Its weights are a formula of their names."""
    recipe = golden.json("weights_recipe.json")
    read = formula_reader(recipe["tag"])
    shapes = {key: tuple(entry["shape"]) for key, entry in recipe["state_dict"].items()}
    planned = [
        torch_files.Planned(key, shape, np.dtype(np.float32), lambda key=key, shape=shape: read(key, shape))
        for key, shape in shapes.items()
    ]
    yield from part_checks.check_sam(_written(planned), golden.arrays(name))


def _written(planned: list[torch_files.Planned]) -> Converted:
    with tempfile.TemporaryDirectory() as folder:
        torch_files.write_shards(pathlib.Path(folder), planned, "safetensors", 1 << 40)
        return Converted.load(pathlib.Path(folder))


@compares("sam_postprocess.npz", check=part_checks.check_unpadding)
@compares("moe_unit.npz", check=part_checks.check_experts)
@compares("geo_sampler.npz", check=part_checks.check_geometry)
def without_a_checkpoint(golden: Golden, name: str, check) -> Iterator[Row]:
    yield from check(golden.arrays(name))


@compares("moe_capacity_table.npz")
def capacities(golden: Golden, name: str) -> Iterator[Row]:
    yield from part_checks.check_capacities(golden.arrays(name)["table_f64"])


@compares("icl_extra_weights.safetensors")
def icl_weights(golden: Golden, name: str) -> Iterator[Row]:
    yield from checks.check_carried((golden.path(*TOP1_56),), golden.path(name))


@compares("rag.npz")
def retrieval(golden: Golden, name: str) -> Iterator[Row]:
    pictures = [images.load_pixels(str(golden.path(f"data/{picture}.png"))) for picture in "abcd"]
    yield from part_checks.check_retrieval(golden.converted("clip-tiny-336"), golden.arrays(name), pictures)


@compares("icl_modules.npz")
def example_readers(golden: Golden, name: str) -> Iterator[Row]:
    weights = torch_files.read_file(golden.path("icl_mask_encoder.safetensors"))
    yield from part_checks.check_example_readers(golden.arrays(name), weights)


@compares("lora/training_layout.json")
def adapters(golden: Golden, name: str) -> Iterator[Row]:
    """The names were recorded with pictures of 336 pixels."""
    sources = tuple(map(golden.path, (ADAPTED[0], "clip-tiny-336", SAM)))
    yield from part_checks.check_adapters(sources, golden.path(*TOP1), golden.path("lora"))


@compares("train_lora_56.npz")
def training_with_adapters(golden: Golden, name: str) -> Iterator[Row]:
    z, weights = golden.arrays(name), golden.converted(*ADAPTED, config=TOP1_56[0])
    yield from checks.check_segmentation(weights, z, checks.STAGE4_LOSS, True)
    stats = golden.json("README.json")[name]["note"]
    stats = json.loads(stats)["trainable_grad_[l2norm,sum]"]
    yield from checks.check_gradient_norms(weights, z, stats)


@compares("opt_step_stage4_lora.npz", sources=ADAPTED, case="stage4_lora")
@compares("opt_step_sft_only.npz", sources=SFT_ONLY, case="sft_only")
def optimizer(golden: Golden, name: str, sources, case) -> Iterator[Row]:
    weights = golden.converted(*sources, config=TOP1_56[0])
    recorded = golden.json("opt_step.json")[case]
    yield from checks.check_optimizer(weights, golden.arrays("train_lora_56.npz"), recorded, golden.arrays(name))
