"""A small selection of what `tests.convert.parity` runs, and that command over a small folder."""

import types

import numpy as np
import pytest

from convert import from_torch, mapping
from medplib_jax.batch import flatten
from medplib_jax.config.model import ClipConfig, LlmConfig, MaskConfig, ModelConfig, MoeConfig
from medplib_jax.models.layers import params_of
from tests.convert import checks, generation_checks, parity
from tests.convert.conftest import write_folder
from tests.convert.golden_batch import CLIP_MEAN, CLIP_STD
from tests.paths import GOLDEN
from tests.torch_weights import formula_reader

CONFIG = ModelConfig(
    clip=ClipConfig(image_size=56, hidden_size=48, num_layers=3, num_heads=4, mlp_dim=192),
    llm=LlmConfig(vocab_size=667, hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=4, mlp_dim=128),
    moe=MoeConfig(num_experts=2, aux_loss_weight=0.01),
    mask=MaskConfig(
        hidden_size=48,
        num_layers=4,
        num_heads=4,
        global_layers=(1, 3),
        out_dim=64,
        decoder_mlp_dim=128,
        iou_head_dim=64,
    ),
)


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "medplib_56.npz"))


@pytest.fixture(scope="module")
def converted(recorded, tmp_path_factory) -> checks.Converted:
    """The checkpoint: what is stored, CLIP and SAM's encoder by their formula, and (unused) zeros for the networks of
    the multi-mask tokens."""
    params = {path: leaf.shape for path, leaf in flatten(params_of(from_torch.model_shapes(CONFIG))).items()}
    places = mapping.entries(CONFIG, params)
    stored = {
        name.removeprefix("weights/"): x
        for file in (np.load(GOLDEN / "llm_top1.npz"), recorded)
        for name, x in file.items()
        if name.startswith("weights/")
    }
    embedding = np.zeros((667, 64), np.float32)
    embedding[recorded["embed_rows"]] = recorded["embed_values"]
    clip, sam = formula_reader("clip56"), formula_reader("samtiny")
    tensors = {}
    for key, place in places.items():
        shape = place.torch_shape(params[place.path])
        if key in stored:
            tensors[key] = stored[key]
        elif "vision_tower" in key:
            tensors[key] = clip(key.removeprefix("model.vision_tower.vision_tower."), shape)
        elif "output_hypernetworks_mlps" in key:
            tensors[key] = np.zeros(shape, np.float32)
        elif "visual_model" in key:
            tensors[key] = sam(key.removeprefix("model.visual_model."), shape)
        else:
            tensors[key] = {"model.embed_tokens.weight": embedding}[key]
    folder = write_folder(tmp_path_factory.mktemp("golden") / "source", CONFIG, tensors)
    return checks.Converted.load(folder)


def part(recorded, name: str) -> dict[str, np.ndarray]:
    found = {key.removeprefix(name + "/"): x for key, x in recorded.items() if key.startswith(name + "/")}
    for key in [key for key in found if key.endswith("clip_uint8")]:
        pixels = (found.pop(key) / np.float32(255) - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
        found[key.replace("clip_uint8", "images_clip")] = pixels.transpose(0, 3, 1, 2)
    return found


def check(rows, kinds: set[str]):
    rows = checks.summarise(rows)
    assert {row.what for row in rows} == kinds
    assert [row for row in rows if not row.error <= row.bar] == []


def test_language_and_regions(converted, recorded):
    z = part(recorded, "region")
    for mode in ("", "train_"):
        for i in range(4):
            z[f"{mode}moe{i}_gate"] = z[f"{mode}moe{i}_kept"]
    both = {
        "router logits",
        "chosen experts (share that differs)",
        "dropped share (difference)",
        "hidden states",
        "logits",
        "loss",
    }
    seen = {"clip features", "merged embeddings", "region features"}
    check(checks.check_forward(converted, z), seen | {f"{mode} {what}" for mode in ("eval", "train") for what in both})


def test_masks_losses_and_gradients(converted, recorded):
    z = part(recorded, "seg")
    kinds = {"<SEG> embedding", "mask logits", "predicted IoU", "masks at original size", "loss terms", "gradients"}
    check(checks.check_segmentation(converted, z, checks.SEG_LOSS, train=True), kinds)


def test_generated_answer(converted, recorded):
    check(
        generation_checks.check_generation(converted, part(recorded, "generate")),
        {"generated ids (share that differs)"},
    )


def run_command(folder, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        parity.main(["--golden", str(folder)])
    return end.value.code, capsys.readouterr().out


def write_capacities(folder, table: np.ndarray):
    np.savez(folder / "moe_capacity_table.npz", table_f64=table)


def test_the_command_runs_whatever_a_folder_holds(tmp_path, capsys):
    assert run_command(tmp_path, capsys)[0] == 1  # nothing to compare is no success
    write_capacities(tmp_path, np.load(GOLDEN / "moe_capacity_table.npz")["table"])
    for name in ("from_the_future.npz", "forward_vqa_56.npz", "opt_step.json"):
        (tmp_path / name).write_bytes(b"PK")
    code, table = run_command(tmp_path, capsys)
    assert code == 0 and "1 files compared, 0 failed" in table
    assert "| moe_capacity_table.npz | capacities (share that differs) | 0.0e+00 | 0e+00 | ok |" in table
    assert "| from_the_future.npz | not compared: no check knows it |" in table
    assert "| forward_vqa_56.npz | not compared: it needs ckpt_moe_top1_56, which is not here |" in table
    assert "| opt_step.json | trajectories" in table


def test_the_command_fails_with_what_differs_or_cannot_be_read(tmp_path, capsys):
    table = np.load(GOLDEN / "moe_capacity_table.npz")["table"].copy()
    table[3, 4] += 1
    write_capacities(tmp_path, table)
    (tmp_path / "moe_unit.npz").write_bytes(b"damaged")
    code, printed = run_command(tmp_path, capsys)
    assert code == 1 and "2 files compared, 2 failed" in printed
    assert "| 1.2e-04 | 0e+00 | FAILED |" in printed and "| moe_unit.npz | ValueError: " in printed


def test_a_fixture_without_masks_is_compared_for_the_rest():
    batch = types.SimpleNamespace(
        gt_masks=np.zeros((1, 1, 8, 8)),
        sam_box=np.int32([[0, 0, 256, 256]]),
        mask_size=np.int32([[8, 8]]),
        mask_valid=np.ones((1, 1), bool),
    )
    output = types.SimpleNamespace(mask_logits=np.zeros((1, 1, 64, 64), np.float32))
    assert list(checks.check_masks({}, batch, output, {})) == []
