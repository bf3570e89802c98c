"""What annotation files hold, which are found, and how they are called."""

import dataclasses
import json
import shutil

import pytest

from medplib_jax.config.sweep import TaskConfig
from medplib_jax.data.errors import DataError
from medplib_jax.data.sources import data_root
from medplib_jax.datasets.assemble.dataset import assemble
from medplib_jax.datasets.processes import HERE
from medplib_jax.evaluate.report import sweep_cases
from medplib_jax.evaluate.tasks import annotation_files, find_tasks, folder_tasks, read_task
from tests.evaluate.evaluators import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data") / "root")


def test_kind_and_slots_are_found(folder):
    found = {
        kind: read_task(TaskConfig(kind, str(folder / "test" / f"{kind}.json")), 0, "raise")
        for kind in ("grounding", "region", "vqa")
    }
    assert all(task.kind == kind for kind, task in found.items())
    assert (found["grounding"].masks, found["grounding"].regions, len(found["grounding"].records)) == (2, 0, 6)
    assert (found["region"].masks, found["region"].regions, found["region"].images) == (0, 1, 1)
    assert read_task(TaskConfig("a", str(folder / "test" / "vqa.json"), kind="grounding"), 2, "raise").records == (0, 1)
    assert len({task.digest for task in found.values()}) == 3


def test_the_training_file_is_the_one_of_the_same_name_or_the_one_that_is_said(folder, tmp_path):
    for name in ("test", "train"):
        shutil.copytree(folder / "test", tmp_path / name)
    for part in ("images", "masks"):
        (tmp_path / part).symlink_to(folder / part)
    task = TaskConfig("vqa", str(tmp_path / "test/vqa.json"))
    assert read_task(task, 0, "raise").entry().examples == str(tmp_path / "train/vqa.json")
    said = dataclasses.replace(task, train=str(tmp_path / "train/region.json"))
    assert read_task(said, 0, "raise").entry().examples == said.train
    alone = read_task(TaskConfig("vqa", str(folder / "test/vqa.json"), about="mine"), 0, "raise").entry()
    assert (alone.examples, alone.generated, alone.source) == ("", False, "mine")


def test_question_without_answer_is_named(folder, tmp_path):
    records = json.loads((folder / "test" / "vqa.json").read_text())
    records[2]["conversations"].pop()
    (tmp_path / "open.json").write_text(json.dumps(records))
    config = TaskConfig("open", str(tmp_path / "open.json"))
    with pytest.raises(DataError, match=r"open\.json, record 2: question without an expected answer"):
        read_task(config, 0, "raise")
    task = read_task(config, 3, "skip")
    assert task.records == (0, 1, 2, 3) and list(task.skipped) == [2]  # the limit counts usable records


def test_files_of_a_folder(folder, tmp_path):
    files = annotation_files(folder)
    assert [file.name for file in files] == ["grounding.json", "region.json", "vqa.json"]
    assert annotation_files(files[0]) == [files[0]] and {data_root(str(file)) for file in files} == {
        str(folder.resolve())
    }
    with pytest.raises(FileNotFoundError, match="expected an annotation file or a folder"):
        annotation_files(tmp_path)
    for name, content in (
        ("manifest", "{}"),
        ("slake_train", "[]"),
        ("slake_test", "[]"),
    ):  # as an importer leaves them
        (tmp_path / f"{name}.json").write_text(content)
    assert [file.name for file in annotation_files(tmp_path)] == ["slake_test.json"]


def test_files_called_like_med_grits_tasks_are_those(tmp_path):
    for name in ("VG", "MIA", "vqa"):
        path = tmp_path / "grit" / "test" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[]")
    (tmp_path / "images").mkdir()
    tasks = folder_tasks(tmp_path / "grit")
    assert [(task.name, task.kind, task.part) for task in tasks] == [
        ("MIA", "refer_box", "MIA"),
        ("VG", "refer_box", "VG"),
        ("vqa", "", ""),
    ]
    assert data_root(str(path)) == str(tmp_path.resolve())  # whose images/ `write_qa` fills


def test_names_are_distinct(tmp_path):
    paths = [tmp_path / "rad" / "test.json", tmp_path / "slake" / "test.json", tmp_path / "other.json"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text("[]")
    assert [task.name for task in folder_tasks(*paths)] == ["rad-test", "slake-test", "other"]


def test_missing_and_repeated_tasks(folder, tmp_path):
    here = TaskConfig("here", str(folder / "test" / "vqa.json"))
    gone = TaskConfig("gone", str(tmp_path / "gone.json"))
    assert [task.name for task in find_tasks([here, gone], 0, "skip", "skip")[0]] == ["here"]
    with pytest.raises(DataError, match="gone.json: annotation file cannot be read"):
        find_tasks([here, gone], 0, "skip", "raise")
    with pytest.raises(ValueError, match="no task"):
        find_tasks([gone], 0, "skip", "skip")
    with pytest.raises(ValueError, match="more than one task would be called 'here'"):
        find_tasks([here, here], 0, "skip", "skip")


def test_a_split_of_an_assembled_dataset_is_a_task(folder, tmp_path):
    manifest = assemble(str(folder / "test"), str(folder), str(tmp_path / "out"), HERE)
    (name,) = (source for source in manifest["sources"] if "/grounding/" in source)
    tasks, left_out = find_tasks([TaskConfig("a", name), TaskConfig("b", f"{tmp_path}/gone#test")], 0, "raise", "skip")
    file = read_task(TaskConfig("a", str(folder / "test" / "grounding.json")), 0, "raise")
    (task,) = tasks
    assert (task.kind, task.masks, len(task.records)) == (file.kind, file.masks, len(file.records))
    assert len(left_out) == 1 and task.entry().file == name
    row = {"record": 0, "image": list(task.source[0].images), "question": task.source[0].turns[0][1]}
    picture, _, problem = sweep_cases._picture(task.entry(), row)
    assert picture.any() and not problem
