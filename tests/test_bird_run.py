"""BiRD from data to answers:

A phantom in Med-GRIT's form is trained on, packed, interrupted, resumed, swept and asked.
"""

import asyncio
import base64
import dataclasses
import json
import shutil
import sys

import chex
import numpy as np
import pytest
from PIL import Image

from launch import demo_bird
from medplib_jax import checkpoint, predict
from medplib_jax.config.sweep import SweepConfig, TaskConfig
from medplib_jax.data.boxes import Box
from medplib_jax.data.pipeline import Loader
from medplib_jax.data.records import parse_record
from medplib_jax.data.sources import open_source
from medplib_jax.data.tokenizers import load_tokenizer
from medplib_jax.datasets.phantom import grit
from medplib_jax.datasets.phantom.generate import FILES
from medplib_jax.decode.predictor import Prediction, Predictor
from medplib_jax.decode.sampling import GREEDY
from medplib_jax.evaluate.kinds import refer_box
from medplib_jax.evaluate.report.sweep import write_sweep_report
from medplib_jax.evaluate.sweep import run_sweep
from medplib_jax.serve.asking import Asker, Wish
from medplib_jax.serve.engine import Engine
from medplib_jax.serve.model import load_model
from medplib_jax.serve.observe import ServerMetrics
from medplib_jax.serve.questions import Message, Part, Region
from medplib_jax.serve.refusals import Refused
from medplib_jax.train.loop import train
from tests.evaluate.evaluators import tiny
from tests.tiny_bird_run import experiment, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    prepare(data)
    assert grit.write_grit(data)[grit.LOOK] == 16
    assert load_tokenizer(str(data / "tokenizer")).vocab_size == 640
    return data


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
    chex.assert_trees_all_equal(resumed, whole)


def test_conversations_of_other_datasets_join_by_weight(folder):
    """MeCoVQA's form and Med-GRIT's in one mixture; what speaks of masks or regions is named and left out."""
    names = (grit.LOOK, FILES["train"]["complex"], FILES["train"]["region"])
    config = experiment(folder)
    files = tuple(str(folder / name) for name in names)
    data = dataclasses.replace(config.data, sources=files, pack=False, on_error="skip", weights=(3.0, 1.0, 0.0))
    sources = [open_source(file, str(folder)) for file in files]
    loader = Loader(sources, load_tokenizer(str(folder / "tokenizer")), data, config.model)
    plan, problems = loader.plan(0)
    assert len(problems) == len(sources[2]) and {one.what for one in problems} == {"region or mask in the text"}
    drawn = np.concatenate([plan.batch(step)[1] for step in range(plan.steps_per_epoch)])
    of_source = np.searchsorted(loader.starts[1:], drawn[drawn >= 0], side="right")
    counts = np.bincount(of_source, minlength=3)
    assert counts[0] == pytest.approx(3 * counts[1], abs=3) and counts[2] == 0


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
    exact = dataclasses.replace(result, cells=tuple(cell for cell in result.cells if cell.protocol == "exact"))
    shown = demo_bird.headline(exact)
    assert (
        list(shown) == [*demo_bird.BARS, *(f"{part}.records" for part in refer_box.PARTS)] and shown["VG.records"] == 2
    )
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


@pytest.mark.parametrize(
    ("image", "question", "message"),
    [
        ("", "What is <ref>it</ref><box>(1,2),(3,1000)</box>?", "error: .*expected numbers from 0 to 999"),
        ("", "What is <ref>it</ref><box>(1,2),(3,4)?", "error: .*<box> is not closed"),
        ("gone.png", "What is it?", "error: .*gone.png: file is missing"),
    ],
)
def test_a_question_that_cannot_be_asked_is_one_line(folder, workdir, tmp_path, monkeypatch, image, question, message):
    image = image or next((folder / "images").iterdir())
    arguments = ["--checkpoint", str(workdir), "--image", str(image), "--question", question, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["predict", *arguments])
    with pytest.raises(SystemExit, match=message):
        predict.main()


def test_each_box_of_an_answer_becomes_a_mask(folder, workdir, tmp_path, monkeypatch, capsys):
    tiny.write_checkpoint(tmp_path / "medplib")
    image = next((folder / "images").iterdir())
    arguments = ["--checkpoint", str(workdir), "--image", str(image), "--question", "Where?", "--max-new-tokens", "2"]
    masks = ["--masks", "sam", "--sam-checkpoint", str(tmp_path / "medplib"), "--out", str(tmp_path / "out")]
    said = (Box(100, 200, 500, 999, "the liver"), Box(0, 0, 300, 300))
    monkeypatch.setattr(predict.Predictor, "answer", lambda self, picture, *_: Prediction("", (), (), picture, said))
    monkeypatch.setattr(sys, "argv", ["predict", *arguments, *masks])
    predict.main()
    drawn = [np.asarray(Image.open(tmp_path / "out" / f"mask_{k}.png")) for k in range(2)]
    assert {mask.shape for mask in drawn} == {Image.open(image).size[::-1]}
    assert len(json.loads((tmp_path / "out/boxes.json").read_text())) == 2
    for wrong, message in (
        (["--masks", "sam"], "expected both or neither"),
        ([*masks, "--checkpoint", str(tmp_path / "medplib")], "draws its masks itself"),
        (["--masks", "sam", "--sam-checkpoint", str(workdir)], "expected a model with the part 'sam'"),
    ):
        monkeypatch.setattr(sys, "argv", ["predict", *arguments, "--out", str(tmp_path / "out"), *wrong])
        with pytest.raises(SystemExit) as end:
            predict.main()
        assert message in f"{end.value.code}{capsys.readouterr().err}"


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


def test_a_server_answers_as_predict_does(folder, workdir):
    image = next((folder / "images").iterdir())
    model = load_model(str(workdir), "bird", "", 6, None)
    engine = Engine(
        model.generator,
        ServerMetrics().of_engine("bird"),
        longest=model.longest,
        slots=2,
        refill=1,
        together=1,
        chunk=4,
        capacity=2,
        cache_bytes=2**20,
    )
    engine.start(model.example())
    url = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
    parts = [Part(type="image_url", image_url=url), Part(type="text", text="What is <region>?")]
    regions = [Region(type="box", points=[10, 10, 40, 40])]
    wish = Wish([Message(role="user", content=parts)], regions, None, GREEDY, 0, (), True)

    async def answer() -> str:
        return "".join([piece.text async for piece in Asker(engine, model, 120).ask(wish, "a")])

    try:
        found = asyncio.run(answer())
    finally:
        engine.close(10)
    assert found == Predictor(workdir, max_new_tokens=6)(image, "What is <region>?", "box:10,10,40,40").answer
    assert model.boxes("<ref>a liver</ref><box>(100,200),(500,999)</box>", (100, 200)) == (
        {"label": "a liver", "box": [20, 20, 100, 99]},
    )
    with pytest.raises(Refused, match="take box:x1,y1,x2,y2 or point:x,y"):
        model.make_prompt(wish.messages, [Region(type="scribble", points=[1, 1, 2, 2])])


def test_records_of_the_phantom_are_med_grits(folder):
    for task in grit.grit.TASKS:
        records = json.loads((folder / grit.file_of("test", task)).read_text())
        question = records[0]["conversations"][0][0]
        assert question.startswith("Picture 1: <img>images/") and len(records[0]["conversations"]) == 1
        assert parse_record(records[0], "f", 0, str(folder)).path(parse_record(records[0], "f", 0, "").images[0])
    vg = json.loads((folder / grit.file_of("test", "VG")).read_text())
    assert all("<box>" in record["conversations"][0][1] for record in vg)
