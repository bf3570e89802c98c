"""The plain PyTorch model and ours agree on a converted checkpoint, and a difference does not pass."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from convert import check, from_torch
from medplib_jax.config.model import MoeConfig
from tests.convert.conftest import LORA, TINY, random_tensors, save, write_folder
from tests.paths import ROOT

ADAPTED = dataclasses.replace(TINY, lora=LORA)
LANGUAGE = ("model.layers.", "model.norm", "model.embed", "lm_head")


@pytest.fixture(autouse=True)
def one_question(monkeypatch):
    monkeypatch.setattr(check, "QUESTIONS", check.QUESTIONS[:1])


def compare(capsys, *arguments) -> tuple[object, list[str]]:
    """(exit status, printed lines) of the command, of short answers about one picture."""
    with pytest.raises(SystemExit) as end:
        check.main([*map(str, arguments), "--max_new_tokens", "3"])
    return end.value.code, capsys.readouterr().out.splitlines()


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("|")[1:-1]]


@pytest.fixture
def one_image(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "README.md").write_text("not a picture")
    check.made_up_images(images, count=1)
    return images


def test_both_sides_say_the_same(tmp_path, capsys, one_image):
    tensors = {name: x * np.float32(0.3) for name, x in random_tensors(ADAPTED).items()}
    source = write_folder(tmp_path / "source", ADAPTED, tensors)
    from_torch.convert(from_torch.Options((source,), tmp_path / "jax", lora_alpha=LORA.alpha))
    sides = ("--torch", source, "--checkpoint", tmp_path / "jax", "--images", one_image)
    status, lines = compare(capsys, *sides, "--lora_alpha", LORA.alpha)
    name, features, logits, _, greedy, mask, dice = cells(lines[-2])
    assert (status, lines[-1], greedy, dice) == (0, "the same model", "1.00", "1.0000")
    assert max(float(features), float(logits), float(mask)) < 1e-4 and name.startswith("made_up_0.png")
    assert lines[0] == "not compared: region, of the checkpoint and PyTorch's side"
    with pytest.raises(FileNotFoundError, match="expected pictures, found"):
        check.find_images(source)


def test_the_torch_sides_sizes_are_its_own(tmp_path, capsys, one_image):
    """Heads of CLIP are in no tensor: a checkpoint that has them wrong is not the same model."""
    source = write_folder(tmp_path / "source", TINY, random_tensors(TINY))
    from_torch.convert(from_torch.Options((source,), tmp_path / "jax"))
    written = json.loads((source / "clip" / "config.json").read_text())
    (source / "clip" / "config.json").write_text(json.dumps(written | {"num_attention_heads": 4}))
    sides = ("--torch", source, "--checkpoint", tmp_path / "jax", "--images", one_image)
    status, lines = compare(capsys, *sides)
    assert status == 1 and lines[-1] == "1 comparisons differ"
    assert "clip.num_heads: 2 in the checkpoint, 4 on PyTorch's side" in lines


def test_what_one_side_lacks_is_named_and_left_out(tmp_path, capsys, one_image):
    """LLaVA, CLIP and SAM with fresh parts, and without MedPLIB's tokens: what README does."""
    config = dataclasses.replace(TINY, moe=MoeConfig(), llm=dataclasses.replace(TINY.llm, vocab_size=400))
    tensors = {name: x * np.float32(0.3) for name, x in random_tensors(config).items()}
    known = {name: x for name, x in tensors.items() if not name.startswith(("model.region", "model.text_hidden"))}
    source = write_folder(tmp_path / "source", config, known)
    (source / "added_tokens.json").unlink()
    from_torch.convert(from_torch.Options((source,), tmp_path / "jax", fresh=("region", "seg_mlp")))
    status, lines = compare(capsys, "--torch", source, "--checkpoint", tmp_path / "jax", "--images", one_image)
    assert status == 0 and "not compared: seg_mlp, of the checkpoint" in lines
    assert all(cells(lines[-2])[1:])


@pytest.mark.parametrize("prefixes, filled", [(LANGUAGE, [2, 3, 4]), (("model.vision_tower.",), [1])])
def test_a_part_alone_is_compared(tmp_path, capsys, one_image, prefixes, filled):
    config = dataclasses.replace(TINY, moe=MoeConfig())
    tensors = {name: x * np.float32(0.3) for name, x in random_tensors(config).items() if name.startswith(prefixes)}
    source = write_folder(tmp_path / "source", config, tensors)
    tower = {"config": source / "clip"} if len(prefixes) == 1 else {}
    from_torch.convert(from_torch.Options((source,), tmp_path / "jax", **tower))
    status, lines = compare(capsys, "--torch", source, "--checkpoint", tmp_path / "jax", "--images", one_image)
    assert status == 0 and [i for i, cell in enumerate(cells(lines[-2])) if cell and i] == filled


def test_mistakes_are_one_line(tmp_path, capsys):
    save(tmp_path / "model.safetensors", {"surprise": np.ones(3, np.float32)})
    status, _ = compare(capsys, "--torch", tmp_path, "--checkpoint", tmp_path / "nowhere")
    assert "\n" not in status and status.startswith("check: ")
    status, _ = compare(capsys, "--torch", tmp_path / "nowhere", "--checkpoint", tmp_path)
    assert status == f"check: --source {tmp_path / 'nowhere'}: no such file or folder"


def test_help_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; from convert import check; check.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--checkpoint" in done.stdout


def test_a_difference_does_not_pass():
    random = np.random.default_rng(0)
    made = {"logits": random.standard_normal((9, 20), np.float32), "mask": random.standard_normal((8, 8), np.float32)}
    same = check.comparison("same", made, made, 5)
    assert same.passes("float32") and same.greedy == same.dice == 1.0 and same.kl == 0.0
    assert not check.comparison("mask", made, made | {"mask": -made["mask"]}, 5).passes("float32")
    for name in made:
        assert not check.comparison("NaN", made | {name: np.full_like(made[name], np.nan)}, made, 5).passes("float32")
    other = made["logits"].copy()
    other[5, (other[5].argmax() + 1) % 20] += 9
    changed = check.comparison("logits", made, made | {"logits": other}, 5)
    assert changed.greedy == 3 / 4 and changed.kl > 0
    assert not changed.passes("float32") and not changed.passes("bfloat16")
