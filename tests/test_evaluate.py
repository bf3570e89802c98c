"""Evaluation from a checkpoint on disk to metrics.json."""

import json

import jax.numpy as jnp
import pytest

from medplib_jax import decode
from medplib_jax.data.errors import DataError
from medplib_jax.data.sources import MecovqaSource
from medplib_jax.data.tokenizer import Tokenizer
from medplib_jax.evaluate import annotation_files, data_root, evaluate, report_examples, report_router, survey, task_names
from tests.evaluators import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data") / "root")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    tiny.write_checkpoint(path)
    return path


def test_survey_tells_what_a_file_holds(folder):
    found = {kind: survey(MecovqaSource(str(folder / "test" / f"{kind}.json")), "raise") for kind in ("grounding", "region", "vqa")}
    assert all(survey.kind == kind for kind, survey in found.items())
    assert (found["grounding"].masks, found["grounding"].regions, len(found["grounding"].usable)) == (2, 0, 6)
    assert (found["region"].masks, found["region"].regions, found["region"].images) == (0, 1, 1)


def test_question_without_answer_is_named(folder, tmp_path):
    records = json.loads((folder / "test" / "vqa.json").read_text())
    records[2]["conversations"].pop()
    (tmp_path / "open.json").write_text(json.dumps(records))
    source = MecovqaSource(str(tmp_path / "open.json"))
    with pytest.raises(DataError, match=r"open\.json, record 2: question without an expected answer"):
        survey(source, "raise")
    found = survey(source, "skip")
    assert found.usable == (0, 1, 3) and [error.record for error in found.skipped] == [2]


def test_files_of_a_folder(folder, tmp_path):
    files = annotation_files(folder)
    assert [file.name for file in files] == ["grounding.json", "region.json", "vqa.json"]
    assert annotation_files(files[0]) == [files[0]] and {data_root(file) for file in files} == {folder.resolve()}
    with pytest.raises(FileNotFoundError, match="expected an annotation file or a folder"):
        annotation_files(tmp_path)


def test_task_names_are_distinct(tmp_path):
    paths = [tmp_path / "rad" / "test.json", tmp_path / "slake" / "test.json", tmp_path / "other.json"]
    assert task_names(paths) == ["rad-test", "slake-test", "other"]
    with pytest.raises(ValueError, match="more than one file would be called 'rad-test'"):
        task_names([paths[0], paths[0]])


def test_checkpoint_to_metrics(folder, workdir, tmp_path, monkeypatch):
    # a model that says <SEG> at every step: two masks are expected at most, one slot more is drawn
    seg_id = Tokenizer.load(str(workdir / "tokenizer")).seg_id
    monkeypatch.setattr(decode, "draw_token", lambda logits, key, sampling: jnp.full(logits.shape[:1], seg_id, jnp.int32))
    source = folder / "test" / "grounding.json"
    result = evaluate(workdir, [source], tmp_path, max_new_tokens=4)
    assert result == json.loads((tmp_path / "metrics.json").read_text())
    task = result["tasks"]["grounding"]
    metrics = task["metrics"]
    assert (task["kind"], task["records"], task["skipped"]) == ("grounding", 6, [])
    assert metrics["no_target_accuracy"] == 0 and 0 <= metrics["mDice"] <= 1
    assert {"mDice/ct", "mDice/mr", "gIoU/modality_mean"} <= set(metrics)
    assert set(task["router"]["share"]) == {"text", "image", "SEG"} and task["router"]["tokens"]["SEG"] == 6 * 4

    lines = (tmp_path / "grounding.jsonl").read_text().splitlines()
    row = json.loads(lines[1])
    assert row["answer"] == "<SEG> <SEG> <SEG> <SEG>"
    assert (len(row["masks"]), len(row["predicted_iou"]), len(row["true_masks"])) == (3, 3, 1)
    assert row["masks"][0]["size"] == row["true_masks"][0]["size"] == [40, 30]

    split = report_router(task)
    assert split.share.shape == (2, 3, 2) and split.experts == ["expert 0", "expert 1"]
    first, last = report_examples(tmp_path, per_task=2)
    assert (first.task, first.modality, last.modality) == ("grounding", "ct", "mr") and "dice" in first.scores
    assert [mask.shape for mask in first.masks] == [(40, 30)] * 3 and first.true_masks[0].sum() == 600

    monkeypatch.setattr(decode.Generator, "__call__", None)  # nothing is left to generate
    assert evaluate(workdir, [source], tmp_path, max_new_tokens=4) == result
    with pytest.raises(ValueError, match="predictions of another run .different mask_threshold"):
        evaluate(workdir, [source], tmp_path, max_new_tokens=4, mask_threshold=0.1)
