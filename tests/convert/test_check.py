"""The plain PyTorch model and ours agree on a converted checkpoint, and a difference does not pass."""

import dataclasses

import numpy as np
import pytest

from convert import check, from_torch
from tests.convert.conftest import LORA, TINY, random_tensors, write_folder

ADAPTED = dataclasses.replace(TINY, lora=LORA)


def test_both_sides_say_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "QUESTIONS", check.QUESTIONS[:1])
    tensors = {name: x * np.float32(0.3) for name, x in random_tensors(ADAPTED).items()}
    source = write_folder(tmp_path / "source", ADAPTED, tensors)
    from_torch.convert(from_torch.Options((source,), tmp_path / "jax"))
    images = tmp_path / "images"
    images.mkdir()
    (images / "README.md").write_text("not a picture")
    check.made_up_images(images, count=1)
    with pytest.raises(SystemExit) as end:
        check.main(
            [
                "--torch",
                str(source),
                "--checkpoint",
                str(tmp_path / "jax"),
                "--images",
                str(images),
                "--max_new_tokens",
                "3",
            ]
        )
    *_, row, verdict = capsys.readouterr().out.splitlines()
    name, logits, _, greedy, mask, dice = row.strip("| ").split(" | ")
    assert (end.value.code, verdict, greedy, dice) == (0, "the same model", "1.00", "1.0000")
    assert max(float(logits), float(mask)) < 1e-4 and name.startswith("made_up_0.png")
    with pytest.raises(FileNotFoundError, match="expected pictures, found"):
        check.find_images(source)


def test_a_difference_does_not_pass():
    random = np.random.default_rng(0)
    logits, mask = random.standard_normal((9, 20)).astype(np.float32), random.standard_normal((8, 8)).astype(np.float32)
    answer = logits[4:-2].argmax(-1)
    same = check.comparison("same", (logits, mask), (logits, mask), answer, 5)
    assert same.passes("float32") and same.greedy == same.dice == 1.0 and same.kl == 0.0
    assert not check.comparison("mask", (logits, mask), (logits, -mask), answer, 5).passes("float32")
    other = logits.copy()
    other[5, (answer[1] + 1) % 20] += 5
    changed = check.comparison("logits", (logits, mask), (other, mask), answer, 5)
    assert (
        changed.greedy == 2 / 3 and changed.kl > 0 and not changed.passes("float32") and not changed.passes("bfloat16")
    )
