"""BiRD from data to answers:

A phantom in Med-GRIT's form is trained on, packed, interrupted, resumed, swept and asked.
"""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest

from medplib_jax import checkpoint, predict
from medplib_jax.config.experiment import DataConfig, OptimConfig, TrainConfig
from medplib_jax.config.sweep import SweepConfig, TaskConfig
from medplib_jax.data.boxes import Box
from medplib_jax.data.records import parse_record
from medplib_jax.data.sources import open_source
from medplib_jax.datasets.phantom import grit
from medplib_jax.datasets.phantom.generate import generate
from medplib_jax.datasets.train_ranks import conversation_texts, train_ranks
from medplib_jax.decode.predictor import Predictor
from medplib_jax.evaluate.kinds import refer_box
from medplib_jax.evaluate.report.sweep import write_sweep_report
from medplib_jax.evaluate.sweep import run_sweep
from medplib_jax.train.loop import train
from tests import bird_tiny

LENGTH = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    generate(data, 8, 2, processes=1)
    counts = grit.write_grit(data)
    assert grit.write_grit(data) == counts and counts[grit.MIXED] == 16
    texts = conversation_texts(open_source(str(data / grit.MIXED), str(data)))
    assert train_ranks(texts, str(data / "tokenizer"), merges=60).vocab_size == 640
    return data


def experiment(folder, **changes):
    llm = dataclasses.replace(bird_tiny.MODEL.llm, max_positions=LENGTH, trained_length=256)
    data = DataConfig(
        sources=(str(folder / grit.MIXED),),
        root=str(folder),
        tokenizer=str(folder / "tokenizer"),
        template="chatml",
        bucket_lengths=(LENGTH,),
        batch_size=8,
        pack=True,
        max_images=3,
        max_regions=0,
        max_masks=0,
        workers=0,
    )
    config = bird_tiny.experiment(
        model=dataclasses.replace(bird_tiny.MODEL, llm=llm),
        data=data,
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup=0.1, weight_decay=0.1, no_decay=("/bias$",)),
        train=TrainConfig(steps=4, checkpoint_every=2, log_every=1),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "bird"
    result = train(experiment(folder), str(path))
    assert result["step"] == 4 and np.isfinite(result["loss"])
    return path


def test_a_resumed_run_is_the_run_at_a_stretch(folder, workdir, tmp_path):
    shutil.copytree(workdir / "checkpoints" / "2", tmp_path / "checkpoints" / "2")
    train(experiment(folder), str(tmp_path))
    whole, resumed = (checkpoint.load_params(str(path), 4)[1] for path in (workdir, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_all_four_tasks_are_swept_in_both_protocols(folder, workdir, tmp_path):
    tasks = tuple(
        TaskConfig(part, str(folder / grit.file_of("test", part)), root=str(folder), kind="refer_box", part=part)
        for part in refer_box.PARTS
    )
    config = SweepConfig(
        checkpoints=str(workdir), tasks=tasks, protocol="both", limit=2, max_new_tokens=6, slots=2, on_error="raise"
    )
    result = run_sweep(config, tmp_path)
    found = {(cell.task, cell.protocol): cell.metrics for cell in result.cells}
    assert len(found) == 8
    assert {"recall_at_0.5", "box_iou"} <= found["VG", "exact"].keys() and "box_iou" not in found["VG", "reference"]
    assert {"exact_match", "mBMR"} <= found["MIA", "exact"].keys()
    assert write_sweep_report(tmp_path).exists()


def test_predict_prints_the_answer_and_writes_its_boxes(folder, workdir, tmp_path, monkeypatch, capsys):
    image = next((folder / "images").iterdir())
    arguments = ["--checkpoint", str(workdir), "--image", str(image), "--question", "What is <region>?"]
    arguments += ["--box", "10,10,40,40", "--out", str(tmp_path / "out"), "--max-new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["predict", *arguments])
    predict.main()
    assert json.loads((tmp_path / "out/boxes.json").read_text()) == [] and (tmp_path / "out/overlay.png").exists()
    monkeypatch.setattr(sys, "argv", ["predict", *arguments[:-6], "--scribble", "1,1 2,2", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="take box:x1,y1,x2,y2 or point:x,y"):
        predict.main()


def test_drawn_boxes_are_those_of_the_answer(folder, workdir, tmp_path):
    predictor = Predictor(workdir, max_new_tokens=2)
    image = next((folder / "images").iterdir())
    prediction = predictor(image, "Where is <ref>the liver</ref>?")
    answered = dataclasses.replace(prediction, boxes=(Box(100, 200, 500, 999, "the liver"),))
    predict.write_prediction(answered, tmp_path)
    height, width = prediction.picture.shape[:2]
    (written,) = json.loads((tmp_path / "boxes.json").read_text())
    assert written["label"] == "the liver" and written["box"] == [
        int(0.1 * width),
        int(0.2 * height),
        int(0.5 * width),
        int(0.999 * height),
    ]


def test_records_of_the_phantom_are_med_grits(folder):
    for task in grit.grit.TASKS:
        records = json.loads((folder / grit.file_of("test", task)).read_text())
        question = records[0]["conversations"][0][0]
        assert question.startswith("Picture 1: <img>images/") and len(records[0]["conversations"]) == 1
        assert parse_record(records[0], "f", 0, str(folder)).path(parse_record(records[0], "f", 0, "").images[0])
    vg = json.loads((folder / grit.file_of("test", "VG")).read_text())
    assert all("<box>" in record["conversations"][0][1] for record in vg)
