"""What lines tell without the model: the user's own metrics, and answers without a model beside every figure."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medplib_jax.data.records import MASK
from medplib_jax.data.rle import decode_rle
from medplib_jax.datasets.phantom import generate as phantom
from medplib_jax.evaluate import own
from medplib_jax.evaluate.evaluators.predictions import read_rows
from medplib_jax.evaluate.kinds.vqa import Vqa
from medplib_jax.evaluate.own import load_metrics
from medplib_jax.evaluate.report.reproduction import reproduction
from medplib_jax.evaluate.report.sweep import write_sweep_report
from medplib_jax.evaluate.report.sweep_load import load_sweep
from medplib_jax.evaluate.rescore import rescore
from medplib_jax.evaluate.result import read_result, update_result
from tests.evaluate.report.sweep_fixture import CHECKPOINTS, write_sweep
from tests.paths import ROOT

GROUNDING, VQA = "MeCoVQA_Grounding_test", "MeCoVQA_Complex_VQA_test"
MY_METRICS = """
from medplib_jax.evaluate.own import metric


@metric("share of answers that are no longer than the expected one")
def brevity(answer, truth, meta):
    return len(answer.text) <= len(truth.text)


@metric("mean number of pixels too many", better="lower", unit="px", kinds=["grounding"])
def surplus(answer, truth, meta):
    if not truth.masks:
        return None
    return sum(mask.sum() for mask in answer.masks) - sum(mask.sum() for mask in truth.masks)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sweep whose pictures and checkpoints are gone, rescored."""
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder, 6, CHECKPOINTS[1:4:2], protocols=("exact",))
    (folder / "my_metrics.py").write_text(MY_METRICS)
    rescore(folder, load_metrics(str(folder / "my_metrics.py")))
    return folder


@pytest.fixture(scope="module")
def cells(folder):
    cells = json.loads((folder / "sweep.json").read_text())["cells"]
    return {(cell["checkpoint"], cell["task"]): cell for cell in cells}


def test_own_metrics_are_means_of_what_the_function_returns(folder, cells):
    cell = cells[CHECKPOINTS[3][0], GROUNDING]
    rows = read_rows(*(folder / name for name in cell["predictions"]))
    expected = [len(row["answer"]) <= len(row["expected"]) for row in rows]
    assert 0 < np.mean(expected) and cell["metrics"]["brevity"] == pytest.approx(np.mean(expected))
    sums = lambda row, side: sum(decode_rle(rle).sum() for rle in row[side])
    surplus = [sums(row, "masks") - sums(row, "true_masks") for row in rows if row["true_masks"]]
    assert cell["metrics"]["surplus"] == pytest.approx(np.mean(surplus)) and len(surplus) < len(rows)
    assert "surplus" not in cells[CHECKPOINTS[3][0], VQA]["metrics"]


def test_the_report_explains_own_metrics_and_has_their_intervals(folder):
    page = write_sweep_report(folder).read_text()
    assert "share of answers that are no longer than the expected one" in page and "surplus (px)" in page
    report = json.loads((folder / "report.json").read_text())
    figures = [f for f in report["figures"] if (f["metric"], f["modality"]) == ("brevity", "all")]
    assert all(figure["low"] is not None for figure in figures) and report["metrics"]["surplus"]["unit"] == "px"
    assert any(figure["p"] is not None for figure in figures)


def test_the_lines_of_the_readme_are_a_metric(folder, tmp_path):
    readme = (ROOT / "medplib_jax/evaluate/evaluators/README.md").read_text()
    (code,) = re.findall(r"^```python\n(# my_metrics.py.*?)^```", readme, re.M | re.S)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "my_metrics.py").write_text(code.replace("brevity", "shortness"))
    result = rescore(tmp_path / "copy", load_metrics(str(tmp_path / "my_metrics.py")))
    assert {cell.task for cell in result.cells if "shortness" in cell.metrics} == {VQA}  # of the kind that it says


def test_scoring_again_changes_nothing_and_a_new_metric_keeps_the_others(folder, cells, tmp_path):
    again = rescore(folder, load_metrics(str(folder / "my_metrics.py")))
    assert {(c.checkpoint, c.task): c.metrics for c in again.cells} == {k: c["metrics"] for k, c in cells.items()}
    (tmp_path / "more.py").write_text(MY_METRICS.replace("brevity", "shortness"))
    metrics = rescore(folder, load_metrics(str(tmp_path / "more.py"))).cells[0].metrics
    assert metrics["shortness"] == metrics["brevity"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("return len(answer.text) <= len(truth.text)", "return 1 / 0"), "brevity of .* record 0: ZeroDivisionError"),
        (("return len(answer.text) <= len(truth.text)", "return float('nan')"), "expected a finite number or None"),
        (("def brevity", "def mDice"), "metric mDice is known already"),
        (("def brevity", "def words"), "metric words: metrics of the package are summed from it"),
        (("def brevity", "def dice"), "metric dice: metrics of the package are summed from it"),
        (("def brevity(", "def brevity("), ""),
    ],
    ids=["fails", "not a number", "of the package", "a count", "a score", "right"],
)
def test_a_metric_that_cannot_be_used_is_one_line(folder, tmp_path, change, message):
    (tmp_path / "mine.py").write_text(MY_METRICS.replace(*change))
    before = (folder / "sweep.json").read_text()
    if not message:
        assert [one.name for one in load_metrics(str(tmp_path / "mine.py"))] == ["brevity", "surplus"]
        return
    with pytest.raises(ValueError, match=message):
        rescore(folder, load_metrics(str(tmp_path / "mine.py")))
    assert (folder / "sweep.json").read_text() == before


def test_a_score_of_the_answers_keeps_its_name(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    for path in (tmp_path / "copy/predictions").rglob(f"{VQA}.0.jsonl"):
        path.write_text(path.read_text().replace('"scores": {', '"scores": {"brevity": 1, '))
    with pytest.raises(ValueError, match="metric brevity: the answers have a score of that name"):
        rescore(tmp_path / "copy", load_metrics(str(folder / "my_metrics.py")))


def test_scores_of_other_answers_are_no_earlier_ones(folder, tmp_path):
    """A file of own scores whose answers were made anew since, as after another run in the same workdir."""
    shutil.copytree(folder, tmp_path / "copy")
    (path,) = (tmp_path / "copy/predictions" / CHECKPOINTS[3][0]).rglob(f"{VQA}.0.jsonl")
    path.write_text(path.read_text().replace('"answer": "', '"answer": "oh '))
    (tmp_path / "more.py").write_text(MY_METRICS.replace("brevity", "shortness"))
    cells = rescore(tmp_path / "copy", load_metrics(str(tmp_path / "more.py"))).cells
    found = {cell.checkpoint: cell.metrics for cell in cells if cell.task == VQA}
    assert "shortness" in found[CHECKPOINTS[3][0]] and "brevity" not in found[CHECKPOINTS[3][0]]
    assert "brevity" in found[CHECKPOINTS[1][0]]


def test_guesses_follow_what_their_records_say_and_how_they_are_scored(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "copy")
    for path in (tmp_path / "copy/predictions").rglob(f"{GROUNDING}.?.jsonl"):
        path.write_text(path.read_text().replace('"modality": "ct"', '"modality": "mr"'))
    scored = lambda self, answer, protocol: {"scores": {"closed_accuracy": 0.25}}
    monkeypatch.setattr(Vqa, "score", scored)
    monkeypatch.setattr(Vqa, "scoring", Vqa.scoring + 1)
    rescore(tmp_path / "copy")
    lines = read_rows(tmp_path / f"copy/predictions/mean_box/exact/{GROUNDING}.jsonl")
    assert "mr" in {line["modality"] for line in lines} and "ct" not in {line["modality"] for line in lines}
    lines = read_rows(tmp_path / f"copy/predictions/always_yes/exact/{VQA}.jsonl")
    assert {line["scores"]["closed_accuracy"] for line in lines} == {0.25}


def test_metrics_come_from_entry_points_too(monkeypatch, tmp_path):
    @own.metric("always one")
    def one_point(answer, truth, meta):
        return 1

    class Point:
        name = "mine"

        def load(self):
            return one_point

    monkeypatch.setattr(own.importlib.metadata, "entry_points", lambda group: [Point()] * (group == own.GROUP))
    assert [one.name for one in load_metrics("mine")] == ["one_point"]
    with pytest.raises(ValueError, match="expected a file NAME.py or an entry point .* installed are mine"):
        load_metrics("yours")
    with pytest.raises(ValueError, match="no such file"):
        load_metrics(str(tmp_path / "gone.py"))


def test_answers_without_a_model_stand_in_every_table(folder, cells):
    empty, whole, box = (cells[name, GROUNDING]["metrics"] for name in ("empty mask", "whole image", "mean box"))
    assert empty["mDice"] == 0 and empty["no_target_accuracy"] == 1 and whole["false_mask_rate"] == 1
    rows = read_rows(*(folder / name for name in cells[CHECKPOINTS[3][0], GROUNDING]["predictions"]))
    dice = []
    for row in rows:
        shares = [decode_rle(rle).mean() for rle in row["true_masks"]]
        dice += [2 * shares[0] / (1 + shares[0]) / len(shares)] if shares else []
    assert whole["mDice"] == pytest.approx(np.mean(dice)) and whole["hit_rate"] == box["hit_rate"] == 1
    yes = cells["always yes", VQA]["metrics"]
    assert yes["yes_sensitivity"] == 1 and yes["yes_specificity"] == 0
    assert cells["majority answer", VQA]["metrics"]["accuracy"] > 0
    write_sweep_report(folder)
    text = (folder / "report.md").read_text()
    overview = text[text.index("## Overview") : text.index(f"## {GROUNDING}")]
    assert {"always yes", "majority answer", "empty mask", "whole image", "mean box"} <= {
        line.split("|")[1].strip().removeprefix("(no model) ") for line in overview.splitlines() if "(no model)" in line
    }
    figures = json.loads((folder / "report.json").read_text())["figures"]
    assert all(figure["p"] is None for figure in figures if figure["run"] == "no model")
    result = read_result(folder)
    names = {cell.checkpoint for cell in result.of_models}
    assert names == {CHECKPOINTS[1][0], CHECKPOINTS[3][0]} and len(result.cells) > len(result.of_models) == 12


def test_guesses_come_from_the_training_file_where_it_is_known(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    sweep = json.loads((tmp_path / "copy/sweep.json").read_text())
    data = Path(sweep["tasks"][0]["root"])
    for task in sweep["tasks"]:
        task["examples"] = str(data / phantom.FILES["train"]["grounding"]) if task["name"] == GROUNDING else ""
    (tmp_path / "copy/sweep.json").write_text(json.dumps(sweep))
    rescore(tmp_path / "copy")
    boxes = []
    for record in json.loads((data / phantom.FILES["train"]["grounding"]).read_text()):
        for name in MASK.findall(record["conversations"][-1]["value"]):
            rows, columns = np.nonzero(np.asarray(Image.open(data / name)))
            height, width = np.asarray(Image.open(data / name)).shape[:2]
            ends = columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height
            boxes.append(ends)
    lines = read_rows(tmp_path / f"copy/predictions/mean_box/exact/{GROUNDING}.jsonl")
    drawn = decode_rle(next(line["masks"][0] for line in lines if line["true_masks"]))
    height, width = drawn.shape
    rows, columns = np.nonzero(drawn)
    found = columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height
    np.testing.assert_allclose(found, np.mean(boxes, axis=0), atol=1 / min(drawn.shape))
    facts = {(what, which): value for what, which, value in reproduction(load_sweep(tmp_path / "copy"))}
    assert facts["guesses from", GROUNDING].endswith(Path(phantom.FILES["train"]["grounding"]).name)
    assert "the task itself" in facts["guesses from", VQA]


def test_no_guesses_come_from_training_records_without_their_masks(folder, tmp_path, caplog):
    """The mean box of the few that can be read would be another one, that of none the whole picture."""
    shutil.copytree(folder, tmp_path / "copy")
    sweep = json.loads((tmp_path / "copy/sweep.json").read_text())
    for task in sweep["tasks"]:
        if task["name"] == GROUNDING:
            task["examples"] = str(Path(task["root"]) / phantom.FILES["train"]["grounding"])
            task["root"] = str(tmp_path / "nothing")
    (tmp_path / "copy/sweep.json").write_text(json.dumps(sweep))
    cells = rescore(tmp_path / "copy").cells
    assert "mean box" not in {cell.checkpoint for cell in cells if cell.task == GROUNDING}
    assert "always yes" in {cell.checkpoint for cell in cells if cell.task == VQA}
    assert f"{GROUNDING} has no answers without a model" in caplog.text


def test_a_cell_that_another_sweep_wrote_meanwhile_stays(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    wrote = []

    @own.metric("always one")
    def slow(answer, truth, meta):
        if not wrote:
            newer = lambda cell: dataclasses.replace(cell, max_new_tokens=7)
            change = lambda before: dataclasses.replace(before, cells=tuple(map(newer, before.cells[:1])))
            wrote.append(update_result(tmp_path / "copy", change).cells[0].key)
        return 1

    cells = {cell.key: cell for cell in rescore(tmp_path / "copy", [slow.own_metric]).cells}
    assert cells[wrote[0]].max_new_tokens == 7 and "slow" not in cells[wrote[0]].metrics


def test_lines_of_an_old_folder_are_rescored_by_one_command_without_jax(folder):
    program = "import sys; from medplib_jax.evaluate import rescore; rescore.main(); sys.exit('jax' in sys.modules)"
    arguments = ["--workdir", str(folder), "--metrics", str(folder / "my_metrics.py")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip().endswith("report.html"), done.stderr
    arguments[-1] = "gone.py"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == "error: gone.py: no such file\n"
