"""Pictures with a spacing through an evaluation: lines, figures, answers without a model, and the report's cases."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from medplib_jax.batch import Batch
from medplib_jax.data.errors import DataError
from medplib_jax.data.pipeline import Loader
from medplib_jax.data.records import parse_record
from medplib_jax.data.sources import MecovqaSource, digest
from medplib_jax.data.tokenizers import Tokenizer
from medplib_jax.decode.slots import Generation
from medplib_jax.evaluate import compare, metrics, table
from medplib_jax.evaluate.evaluators.common import Evaluator
from medplib_jax.evaluate.evaluators.predictions import read_rows
from medplib_jax.evaluate.kinds import find_kind
from medplib_jax.evaluate.report.sweep import write_sweep_report
from medplib_jax.evaluate.rescore import rescore
from medplib_jax.volumes.metrics import contour_scores
from tests.evaluate.evaluators import tiny

SPACING = [0.5, 0.8]
MILLIMETRES = {"hd95_mm", "nsd_2mm", "area_error_mm2"}
TURNS = [{"from": "human", "value": "<image>\nWhere is the lung?"}, {"from": "gpt", "value": "It is <SEG>."}]


def record(**fields):
    turns = [TURNS[0], {"from": "gpt", "value": "It is <SEG>.<mask>masks/a.png</mask>"}]
    return {"image": "images/a.png", "conversations": turns, "answer_type": "open"} | fields


def write(root, size, *records) -> MecovqaSource:
    """A data folder with a picture of this size (h, w), whose mask is its upper left quarter, and these records."""
    for folder in ("images", "masks", "test"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    mask = np.zeros(size, np.uint8)
    mask[: size[0] // 2, : size[1] // 2] = 255
    Image.fromarray(mask // 2).save(root / "images/a.png")
    Image.fromarray(mask).save(root / "masks/a.png")
    (root / "test/ground.json").write_text(json.dumps(records))
    return MecovqaSource(str(root / "test/ground.json"), str(root))


@pytest.mark.parametrize(
    "told",
    [[0, 1], [-1, 1], [float("nan"), 1], [float("inf"), 1], [10**400, 1], [1], [1, 1, 1], "11", [True, 1], ["1", 1], 1],
)
def test_a_spacing_that_is_none_is_refused_by_name(told):
    with pytest.raises(DataError, match=r"test.json, record 7: spacing cannot be used; expected \[mm between rows"):
        parse_record(record(spacing=told), "test.json", 7, "")


def test_slices_of_volumes_have_the_spacing_of_their_rows_and_columns():
    volume = {"name": "a", "slice": 0, "slices": 9, "spacing": [3.0, 0.5, 0.8], "size": [20, 16]}
    assert parse_record(record(volume=volume), "f", 0, "").spacing == (0.5, 0.8)
    assert parse_record(record(volume=volume, spacing=SPACING), "f", 0, "").spacing == (0.5, 0.8)
    with pytest.raises(DataError, match=r"not that of the volume.*expected \(0.5, 0.8\), found \(0.8, 0.5\)"):
        parse_record(record(volume=volume, spacing=[0.8, 0.5]), "f", 0, "")


def test_answers_are_asked_anew_where_a_spacing_changed(tmp_path):
    made = [digest(write(tmp_path, (40, 30), one), [0]) for one in (record(), record(spacing=SPACING), record())]
    assert made[0] == made[2] != made[1]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return tiny.make_experiment(tmp_path_factory.mktemp("tokenizer"))


def answered(source, experiment):
    """The lines of answers that draw the whole picture for a target, and nothing else."""
    tokenizer = Tokenizer.load(experiment.data.tokenizer)
    loader = Loader([source], tokenizer, experiment.data, experiment.model)
    evaluator = Evaluator(find_kind("grounding"), loader, draw_masks=lambda *_: np.ones((1, 2, 64, 64), bool))
    for index in range(len(source)):
        prompt = Batch(**loader.load_eval([index], [0], question=True)[0])
        target = bool(prompt.mask_valid[0, 0])
        ids = np.array([tokenizer.encode("It is <SEG>." if target else "No.")], np.int32)
        logits, sure = np.zeros((1, 2, 4, 4), np.float32), np.ones((1, 2), np.float32)
        answer = Generation(ids, np.array([ids.shape[1]]), np.array([[target, False]]), logits, sure)
        yield evaluator.row(prompt, answer), prompt


@pytest.mark.parametrize("size", [(40, 30), (128, 96), (100, 37), (37, 151)], ids=str)
def test_millimetres_follow_a_picture_that_was_shrunk(experiment, tmp_path, size):
    ((row, prompt),) = answered(write(tmp_path, size, record(spacing=SPACING)), experiment)
    assert row["size"] == tuple(prompt.mask_size[0].tolist()) and max(row["size"]) == min(64, max(size))
    extent = np.multiply(row["spacing"], row["size"])
    np.testing.assert_allclose(extent, np.multiply(SPACING, size))  # the picture keeps its millimetres
    wrong = extent.prod() - prompt.gt_masks[0, 0].sum() * np.prod(row["spacing"])
    assert row["scores"]["area_error_mm2"] == pytest.approx(wrong)
    if max(size) <= 64:  # its own grid
        truth = np.asarray(Image.open(tmp_path / "masks/a.png")) > 0
        expected = contour_scores(truth, np.ones(size, bool), SPACING, [2])
        assert row["scores"]["hd95_mm"] == expected["hd95"] and row["scores"]["nsd_2mm"] == expected["nsd_2mm"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory, experiment):
    """The folder of a sweep over a task with and one without spacing."""
    folder = tmp_path_factory.mktemp("swept")
    said = [TURNS[0], {"from": "gpt", "value": "No, there is no tumor."}]
    known = [record(spacing=SPACING), record(), record(spacing=SPACING, conversations=said)]
    sweep = {"checkpoints": [{"name": "run"}], "tasks": [], "cells": []}
    for name, records in (("known", known), ("unknown", [record()])):
        source = write(folder / name, (128, 96), *records)
        rows = [row for row, _ in answered(source, experiment)]
        (folder / f"{name}.jsonl").write_text("{}\n" + "".join(json.dumps(row) + "\n" for row in rows))
        entry = {"name": name, "kind": "grounding", "file": source.file, "root": source.root, "records": len(rows)}
        sweep["tasks"].append(entry)
        found = metrics.by_modality(metrics.statistics(rows), [row["modality"] for row in rows])
        cell = {"checkpoint": "run", "task": name, "protocol": "exact", "predictions": [f"{name}.jsonl"]}
        sweep["cells"].append(cell | {"records": len(rows), "metrics": found})
    (folder / "sweep.json").write_text(json.dumps(sweep))
    rescore(folder)
    write_sweep_report(folder)
    return folder


def test_a_sweep_measures_where_the_spacing_is_known(swept):
    figures = json.loads((swept / "report.json").read_text())["figures"]
    found = {(one["checkpoint"], one["task"], one["metric"]): one for one in figures if one["modality"] == "all"}
    whole, side = found["whole image", "known", "area_error_mm2"], 128 * 96 * 0.5 * 0.8
    assert whole["value"] == pytest.approx(side * 3 / 4) and whole["records"] == 1  # a target and a spacing
    assert found["empty mask", "known", "nsd_2mm"]["value"] == 0
    assert ("empty mask", "known", "hd95_mm") not in found  # nothing is drawn: not zero
    assert found["whole image", "known", "mDice"]["records"] == 2
    assert {task for _, task, metric in found if metric in MILLIMETRES} == {"known"}
    assert "whose pictures have a known spacing" in (swept / "report.html").read_text()


def test_tables_and_comparisons_take_millimetres_as_any_metric(swept, tmp_path):
    selection = {"tasks": "known", "checkpoints": "*", "protocol": "", "modality": "all"}
    text = table.make_table(swept, "markdown", metrics="mDice,area_error_mm2", **selection)
    assert "known area error (mm²)" in text and "3686.4" in text
    assert "mDice: 2 records" in text and "area error (mm²): 1 records" in text
    latex = table.make_table(swept, "latex", metrics="area_error_mm2", **selection)
    assert r"area error (mm\textsuperscript{2})" in latex
    assert "area_error_mm2" in (swept / "report.csv").read_text()
    shutil.copytree(swept, tmp_path / "before")
    sides = str(swept), str(tmp_path / "before")
    assert compare.run(*sides, tmp_path / "a", ["known.nsd_2mm < baseline"]) == 0
    assert compare.run(*sides, tmp_path / "b", ["known.area_error_mm2 > 3000"]) == 1


def test_lines_hold_what_rescoring_needs(swept):
    rows = read_rows(swept / "known.jsonl")
    assert rows[0]["spacing"] == [1.0, 1.6] and rows[0]["size"] == rows[2]["size"] == [64, 48]
    assert "spacing" not in rows[1] and not MILLIMETRES & rows[1]["scores"].keys()


def test_a_case_is_measured(swept):
    (path,) = swept.glob("report_cases/00-0.js")
    case = json.loads(path.read_text().split(",", 3)[3].rsplit(")", 1)[0])
    assert case["extent"] == [64, pytest.approx(76.8)] and case["area"] == pytest.approx(64 * 76.8 / 4)
    (answer,) = case["answers"].values()
    assert answer["area"] >= 0 and "area error (mm²)" in answer["scores"]
    assert '"extent":null' in next(swept.glob("report_cases/00-1.js")).read_text()
