"""Converted weights against what the original program computed: every recorded fixture, one table of the largest relative errors.

python -m tests.convert.parity --golden DIR [--only PATTERN]
"""

import argparse
import fnmatch
import json
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from convert import torch_files
from tests.convert import checks, part_checks
from tests.convert.checks import Arrays, Converted, Row
from tests.torch_weights import formula_reader

# What `fixtures` does not name, and where it counts. A recorded file that is in neither fails the run.
ELSEWHERE = {
    "README.*": "describe the others",
    "ckpt_moe_*/*": "weights of the fixtures above",
    "clip-tiny-*/*": "weights of the fixtures above",
    "sam-med2d_tiny.pth": "weights of the fixtures above",
    "weights_recipe.json": "weights of sam_full_vitb",
    "opt_sft_only_*.safetensors": "weights of opt_step_sft_only",
    "lora/*": "row 'lora' above",
    "opt_step.json": "trajectories above; schedules: tests/train/test_optim.py",
    "keys_7b*.json": "tests/convert/test_mapping.py",
    "losses.npz": "without weights: tests/train/test_losses.py",
    "metrics*": "without weights: tests/evaluate/metrics/test_metrics.py",
    "conversation/*": "without weights: tests/data/test_prompts.py, test_tokenizer.py",
    "preprocess/*": "without weights: tests/data/test_images.py, test_regions.py",
    "data/*": "pictures and records of the fixtures above",
    "rag*": "retrieval of in-context examples: not in this project yet",
    "icl_modules.npz": "weights mapped (icl_extra_weights, icl_mask_encoder above); their forward pass is not in this project yet",
    "icl_overlay_compress_multi.npz": "as icl_modules.npz",
    "icl_separate_maskenc*.npz": "as icl_modules.npz",
}


def formula_folder(recipe: Mapping, folder: pathlib.Path) -> pathlib.Path:
    """The full-size SAM-Med2D, whose weights are a formula of their names."""
    read = formula_reader(recipe["tag"])
    shapes = {key: tuple(entry["shape"]) for key, entry in recipe["state_dict"].items()}
    planned = [
        torch_files.Planned(key, shape, np.dtype(np.float32), lambda key=key, shape=shape: read(key, shape))
        for key, shape in shapes.items()
    ]
    torch_files.write_shards(folder, planned, "safetensors", 1 << 40)
    return folder


def check_sam_full(golden: pathlib.Path, z: Arrays) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        source = formula_folder(json.loads((golden / "weights_recipe.json").read_text()), pathlib.Path(folder))
        yield from part_checks.check_sam(Converted.load(source), z)


def check_without_adapters(source: pathlib.Path, z: Arrays) -> Iterator[Row]:
    tensors = {key: tensor for key, tensor in torch_files.read_file(source).items() if ".Adapter." not in key}
    with tempfile.TemporaryDirectory() as folder:
        planned = [torch_files.Planned(key, tensor.shape, tensor.dtype, tensor.read) for key, tensor in tensors.items()]
        torch_files.write_shards(pathlib.Path(folder), planned, "safetensors", 1 << 40)
        yield from part_checks.check_sam(Converted.load(pathlib.Path(folder)), z)


def fixtures(golden: pathlib.Path) -> Iterator[tuple[str, Callable[[], Iterator[Row]]]]:
    """(name of the fixture, its check) for every recorded one that weights take part in."""
    loaded: dict[str, Converted] = {}
    clip, sam, config = golden / "clip-tiny-56", golden / "sam-med2d_tiny.pth", golden / "ckpt_moe_top1_56"
    adapted = (golden / "lora/ckpt_moe_top1_56_training.safetensors", clip, sam)

    def weights(name: str) -> Converted:
        if name not in loaded:
            special = {
                "lora": adapted,
                "sft": (
                    golden / "opt_sft_only_init.safetensors",
                    golden / "opt_sft_only_frozen.safetensors",
                    clip,
                    sam,
                ),
                "sam": (sam,),
            }
            sources = special.get(name, (golden / name,))
            loaded[name] = Converted.load(*sources, **({"config": config} if name in ("lora", "sft") else {}))
        return loaded[name]

    def read(name: str) -> Arrays:
        return dict(np.load(golden / name))

    top1, top1_56, top2 = "ckpt_moe_top1", "ckpt_moe_top1_56", "ckpt_moe_top2"
    drop1 = {"capacity_factor": 0.7, "eval_capacity_factor": 0.9, "min_capacity": 4}
    drop2 = {"capacity_factor": 0.5, "eval_capacity_factor": 0.6}
    for name, source, moe in (
        ("forward_vqa_56", top1_56, {}),
        ("forward_region_56", top1_56, {}),
        ("forward_vqa_drop_56", top1_56, drop1),
        ("forward_vqa", top1, {}),
        ("forward_region", top1, {}),
        ("forward_vqa_top2", top2, {}),
        ("forward_vqa_top2_drop", top2, drop2),
    ):
        yield (
            name,
            lambda name=name, source=source, moe=moe: checks.check_forward(
                weights(source).with_moe(**moe), read(name + ".npz")
            ),
        )
    for name, source, train in (
        ("forward_seg_mixed_56", top1_56, True),
        ("forward_seg_eval_56", top1_56, False),
        ("forward_seg", top1, True),
        ("forward_seg_top2", top2, True),
        ("icl_overlay", top1_56, True),  # several pictures in a prompt; without modules of their own
        ("icl_overlay_multi", top1_56, True),
        ("icl_separate_multi", top1_56, True),
    ):
        yield (
            name,
            lambda name=name, source=source, train=train: checks.check_segmentation(
                weights(source), read(name + ".npz"), checks.SEG_LOSS, train
            ),
        )
    for name, source in (("generate_vqa_56", top1_56), ("generate_vqa", top1)):
        yield name, lambda name=name, source=source: checks.check_generation(weights(source), read(name + ".npz"))
    yield "generate_vqa_top2", lambda: checks.check_noisy_generation(weights(top2), read("generate_vqa_top2.npz"))
    for name, source in (("evaluate_seg_56", top1_56), ("evaluate_seg", top1)):
        yield name, lambda name=name, source=source: checks.check_evaluate(weights(source), read(name + ".npz"))
    yield "sam_tiny", lambda: part_checks.check_sam(weights("sam"), read("sam_tiny.npz"))
    without = {"image": read("sam_tiny.npz")["image"]} | read("sam_tiny_noadapter.npz")
    yield "sam_tiny_noadapter", lambda: check_without_adapters(golden / "sam-med2d_tiny.pth", without)
    yield "sam_full_vitb", lambda: check_sam_full(golden, read("sam_full_vitb.npz"))
    yield "sam_postprocess", lambda: part_checks.check_unpadding(read("sam_postprocess.npz"))
    yield "moe_unit", lambda: part_checks.check_experts(read("moe_unit.npz"))
    yield "moe_capacity_table", lambda: part_checks.check_capacities(read("moe_capacity_table.npz")["table_f64"])
    yield "geo_sampler", lambda: part_checks.check_geometry(read("geo_sampler.npz"))
    for name in ("icl_extra_weights", "icl_mask_encoder"):
        yield name, lambda name=name: checks.check_icl((golden / top1_56,), golden / f"{name}.safetensors")
    of_336 = (adapted[0], golden / "clip-tiny-336", sam)  # the names were recorded with pictures of this size
    yield "lora", lambda: part_checks.check_adapters(of_336, golden / top1, golden / "lora")
    yield (
        "train_lora_56",
        lambda: checks.check_segmentation(weights("lora"), read("train_lora_56.npz"), checks.STAGE4_LOSS, True),
    )
    notes = json.loads((golden / "README.json").read_text())
    stats = json.loads(notes["train_lora_56.npz"]["note"])["trainable_grad_[l2norm,sum]"]
    yield (
        "train_lora_56, all tensors",
        lambda: checks.check_gradient_norms(weights("lora"), read("train_lora_56.npz"), stats),
    )
    cases = json.loads((golden / "opt_step.json").read_text())
    for name, source, case in (
        ("opt_step_stage4_lora", "lora", "stage4_lora"),
        ("opt_step_sft_only", "sft", "sft_only"),
    ):
        yield (
            name,
            lambda name=name, source=source, case=case: checks.check_optimizer(
                weights(source), read("train_lora_56.npz"), cases[case], read(name + ".npz")
            ),
        )


def not_compared(golden: pathlib.Path, names: set[str]) -> Iterator[tuple[str, str | None]]:
    """(file, where it counts) of every recorded file that no fixture is named after; None: nowhere."""
    for path in sorted(path.relative_to(golden) for path in golden.rglob("*") if path.is_file()):
        if str(path.with_suffix("")) not in names:
            yield (
                str(path),
                next((where for pattern, where in ELSEWHERE.items() if fnmatch.fnmatch(str(path), pattern)), None),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--golden", required=True, type=pathlib.Path)
    parser.add_argument("--only", default="", help="regular expression of fixture names")
    arguments = parser.parse_args()
    failed, names = 0, set()
    print("| fixture | what | largest relative error | bar | |\n|---|---|---|---|---|")
    for name, check in fixtures(arguments.golden):
        names.add(name.split(",")[0])
        if not re.search(arguments.only, name):
            continue
        start = time.time()
        for row in checks.summarise(check()):
            verdict = "ok" if row.error <= row.bar else "FAILED"
            failed += verdict != "ok"
            print(f"| {name} | {row.what} | {row.error:.1e} | {row.bar:.0e} | {verdict} |", flush=True)
        print(f"{name}: {time.time() - start:.0f} s", file=sys.stderr)
        jax.clear_caches()  # compiled programs of all fixtures together are gigabytes
    for file, where in () if arguments.only else not_compared(arguments.golden, names):
        failed += where is None
        print(f"| {file} | {where or 'not compared anywhere'} | | | {'FAILED' if where is None else ''} |")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
