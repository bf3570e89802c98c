"""The challenge's interface: cases in, segments out, in the form of the challenge's files."""

import sys

import numpy as np
import pytest

from launch.cvpr25 import answer
from medplib_jax.data.errors import DataError
from medplib_jax.decode.scans import SliceAnswer

SHAPE = (5, 14, 12)  # D, H, W


def write_case(path, prompts, **arrays):
    values = np.random.default_rng(0).integers(0, 255, SHAPE, np.uint8)
    np.savez_compressed(path, **{"imgs": values, "spacing": (0.8, 0.8, 3.0), "text_prompts": prompts} | arrays)


def oracle(truth):
    """The masks of each prompt's text, [D, H, W]."""

    def answers(predictor, shown, text, question, numbers, seed=0):
        for number in numbers:
            plane = shown.cut.reoriented(truth[text].transpose(2, 1, 0))[number]
            yield SliceAnswer(text, number, "", plane if plane.any() else None, 0.5)

    return answers


@pytest.fixture
def truth():
    spots = np.zeros((2, *SHAPE), bool)
    spots[0, 1:3, 2:6, 3:9] = True
    spots[1, 3:5, 8:12, 1:3] = True
    return {"Liver in CT": spots[0], "two cells": spots[0] | spots[1]}


def test_prompts_become_their_numbers(tmp_path, monkeypatch, truth):
    write_case(tmp_path / "a.npz", {"2": "Liver in CT", "instance_label": 0})
    monkeypatch.setattr(answer, "answer_slices", oracle(truth))
    segments = answer.answer_case(None, str(tmp_path / "a.npz"), answer.QUESTION)
    np.testing.assert_array_equal(segments, truth["Liver in CT"] * 2)


def test_instances_are_counted(tmp_path, monkeypatch, truth):
    write_case(tmp_path / "a.npz", {"1": "two cells", "instance_label": 1})
    monkeypatch.setattr(answer, "answer_slices", oracle(truth))
    segments = answer.answer_case(None, str(tmp_path / "a.npz"), answer.QUESTION)
    assert sorted(np.unique(segments)) == [0, 1, 2] and len(np.unique(segments[truth["Liver in CT"]])) == 1


def test_the_command_names_what_it_cannot_use_and_answers_the_rest(tmp_path, monkeypatch, capsys, truth):
    (tmp_path / "inputs").mkdir()
    write_case(tmp_path / "inputs/good.npz", {"1": "Liver in CT"})
    write_case(tmp_path / "inputs/flat.npz", {"1": "x"}, imgs=np.zeros((4, 4)))
    (tmp_path / "inputs/broken.npz").write_bytes(b"PK")
    monkeypatch.setattr(answer, "answer_slices", oracle(truth))
    monkeypatch.setattr(answer, "Predictor", lambda checkpoint: None)
    folders = ["--inputs", str(tmp_path / "inputs"), "--outputs", str(tmp_path / "outputs")]
    monkeypatch.setattr(sys, "argv", ["answer", "--checkpoint", "x", *folders])
    assert answer.main() == 1
    errors = capsys.readouterr().err
    assert "broken.npz: case cannot be read" in errors and "flat.npz: case of another form" in errors
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["good.npz"]
    with np.load(tmp_path / "outputs/good.npz") as file:
        np.testing.assert_array_equal(file["segs"], truth["Liver in CT"])


class Harmful:
    def __reduce__(self):
        return print, ("code of a file was run",)


def test_a_case_runs_no_code(tmp_path, capsys):
    write_case(tmp_path / "a.npz", np.array(Harmful(), object))
    with pytest.raises(DataError, match="is not a plain value"):
        answer.read_case(str(tmp_path / "a.npz"))
    assert not capsys.readouterr().out
