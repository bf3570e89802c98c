"""Sweeps from checkpoints on disk to sweep.json, at a stretch and in pieces."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs import eval_sweep
from medplib_jax.config.base import from_config_dict
from medplib_jax.config.sweep import SweepConfig
from medplib_jax.data.tokenizers import Tokenizer
from medplib_jax.decode import generator as decode
from medplib_jax.evaluate import answering, sweep
from medplib_jax.evaluate.answering import evenly_spaced_lengths, load_model
from medplib_jax.evaluate.evaluators.predictions import read_rows
from medplib_jax.evaluate.plan import plan_sweep
from medplib_jax.evaluate.report.sweep import write_sweep_report
from medplib_jax.evaluate.report.sweep_load import load_sweep
from medplib_jax.evaluate.rescore import rescore
from medplib_jax.evaluate.sweep import IncompleteSweep, run_sweep
from medplib_jax.evaluate.tasks import folder_tasks
from medplib_jax.parallel.lock import folder_lock
from tests.evaluate.evaluators import fake_spice, tiny
from tests.paths import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data") / "root")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("root") / "runs" / "tiny"
    path.mkdir(parents=True)
    tiny.write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def config(folder, run):
    return SweepConfig(checkpoints=str(run), tasks=folder_tasks(folder), select="grounding", shard=3, slots=2, refill=1)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """(workdir, result) of a sweep at a stretch."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run_sweep(dataclasses.replace(config, protocol="both"), workdir)


def files(workdir):
    return {str(path.relative_to(workdir)): path.read_bytes() for path in sorted(workdir.rglob("*.json*"))}


def test_a_sweep_holds_every_cell(whole):
    workdir, result = whole
    assert json.loads(json.dumps(dataclasses.asdict(result))) == json.loads((workdir / "sweep.json").read_text())
    assert [(c.name, c.step, c.kind) for c in result.checkpoints] == [("runs-tiny-3", 3, "jax")]
    assert {task.name: (task.kind, task.records) for task in result.tasks} == {"grounding": ("grounding", 6)}
    cell, reference = result.cells
    assert (cell.task, cell.protocol, cell.records, cell.skipped, cell.mask_threshold) == (
        "grounding",
        "exact",
        6,
        (),
        0.5,
    )
    assert list(cell.predictions) == [f"predictions/runs-tiny-3/exact/grounding.{i:05d}.jsonl" for i in range(2)]
    assert {"gIoU", "gIoU/ct", "gIoU/modality_mean", "no_target_accuracy"} <= set(cell.metrics)
    assert {"text", "image"} <= set(cell.router["share"]) and set(cell.router["modalities"]) == {"ct", "mr"}
    rows = [row for path in cell.predictions for row in read_rows(workdir / path)]
    assert [row["record"] for row in rows] == list(range(6))
    assert (reference.mask_threshold, reference.protocol, reference.metrics["hit_rate"]) == (
        0.1,
        "reference",
        1,
    )  # it always draws


def test_answers_that_were_cut_off_are_counted_and_said(whole):
    workdir, result = whole
    cell = result.cells[0]
    rows = [row for path in cell.predictions for row in read_rows(workdir / path)]
    assert cell.cut_off == sum(row["cut_off"] for row in rows) > 0
    said = " ".join(note for one in load_sweep(workdir).cells if one.protocol == cell.protocol for note in one.notes)
    assert f"{cell.cut_off} of 6 answers were cut off after {cell.max_new_tokens} tokens" in said


def test_what_earlier_versions_did_not_say_of_answers_that_were_cut_off_is_unknown(
    config, whole, tmp_path, caplog, monkeypatch
):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    older = tmp_path / "predictions" / "runs-tiny-3" / "exact" / "grounding.00000.jsonl"
    rows = [json.loads(line) for line in older.read_text().splitlines()]
    older.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "cut_off"}) + "\n" for row in rows))
    exact, reference = rescore(tmp_path).of_models
    assert exact.cut_off is None and reference.cut_off == whole[1].cells[1].cut_off
    assert caplog.text.count("how many answers were cut off is unknown") == 1
    said = [note for one in load_sweep(tmp_path).cells if one.protocol == "exact" for note in one.notes]
    assert sum("is unknown, because their lines do not say" in note for note in said) == 1
    monkeypatch.setattr(sweep, "load_model", None)
    again = {cell.protocol: cell.cut_off for cell in run_sweep(config, tmp_path).of_models}
    assert again == {"exact": None, "reference": reference.cut_off}


def test_pieces_make_the_whole(config, whole, tmp_path):
    """A few records first, then a cut file: the same bytes.

    What is complete is not asked again, and files of other settings are refused.
    """
    run_sweep(dataclasses.replace(config, limit=4), tmp_path)
    cut = tmp_path / "predictions" / "runs-tiny-3" / "exact" / "grounding.00000.jsonl"
    cut.write_bytes(cut.read_bytes()[:-40])
    result = run_sweep(config, tmp_path)
    written = {name: content for name, content in files(tmp_path).items() if "predictions" in name}
    assert written == {name: content for name, content in files(whole[0]).items() if "/exact/" in name}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "load_model", None)
        assert run_sweep(config, tmp_path) == result
        with pytest.raises(ValueError, match="predictions of another run .different mask_threshold"):
            run_sweep(dataclasses.replace(config, mask_threshold=0.3), tmp_path)


def test_bad_records_are_lines_too(config, folder, tmp_path):
    records = json.loads((folder / "test" / "vqa.json").read_text())
    records[1]["image"] = "images/lost.png"
    records[2]["conversations"].pop()
    (folder / "broken.json").write_text(json.dumps(records))
    broken = dataclasses.replace(config, tasks=folder_tasks(folder / "broken.json"), select="*")
    (cell,) = run_sweep(broken, tmp_path).cells
    assert cell.records == 2 and [(error["record"], error["what"]) for error in cell.skipped] == [
        (1, "file is missing"),
        (2, "question without an expected answer"),
    ]
    with pytest.raises(ValueError, match="record 2: question without"):
        run_sweep(dataclasses.replace(broken, on_error="raise"), tmp_path)


def test_a_mask_too_many_is_drawn_and_counted(config, tmp_path, run, monkeypatch):
    # a model that says <SEG> at every step: two masks are expected at most, one slot more is drawn
    seg_id = Tokenizer.load(str(run / "tokenizer")).seg_id
    monkeypatch.setattr(
        decode, "draw_token", lambda logits, draws, place: jnp.full(logits.shape[:1], seg_id, jnp.int32)
    )
    result = run_sweep(config, tmp_path)
    (cell,) = result.cells
    assert cell.metrics["no_target_accuracy"] == 0 and cell.router["tokens"]["SEG"] == 6 * 4
    row = read_rows(tmp_path / cell.predictions[0])[0]
    assert row["answer"] == "<SEG> <SEG> <SEG> <SEG>" and row["scores"]["masks"] == 4
    assert (len(row["masks"]), len(row["predicted_iou"]), len(row["true_masks"])) == (3, 3, 1)
    assert row["masks"][0]["size"] == row["true_masks"][0]["size"] == [40, 30]


def test_what_is_not_there_is_said(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoints 'nowhere/.': expected workdirs"):
        run_sweep(dataclasses.replace(config, checkpoints="nowhere/*"), tmp_path)
    with pytest.raises(ValueError, match="baseline 'other' is not one of the checkpoints .'runs-tiny-3'."):
        run_sweep(dataclasses.replace(config, baseline="other"), tmp_path)
    for wrong in ({"slots": 2, "refill": 3}, {"slots": 0, "refill": 5}):  # 4 of the experiment
        with pytest.raises(ValueError, match=r"refill \d exceeds the \d slots"):
            run_sweep(dataclasses.replace(config, **wrong), tmp_path)
    assert not files(tmp_path)


def test_a_record_without_an_answer_ends_the_sweep(config, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "stream_answers", lambda *_, **__: iter(()))
    with pytest.raises(RuntimeError, match="runs-tiny-3 grounding exact: 6 records got no answer, first record 0"):
        run_sweep(config, tmp_path)


def test_a_changed_mask_is_asked_and_scored_anew(config, run, tmp_path):
    data = tiny.write_data(tmp_path / "data")
    asked = dataclasses.replace(config, tasks=folder_tasks(data), limit=1)
    run_sweep(asked, tmp_path / "out")
    mask = next((data / "masks").iterdir())
    mask.write_bytes(next(path for path in (data / "masks").iterdir() if path != mask).read_bytes())
    with pytest.raises(ValueError, match="different data.; to ask again, remove the file or take another workdir"):
        run_sweep(asked, tmp_path / "out")


def test_a_copied_run_goes_on_and_other_weights_do_not(config, whole, run, tmp_path):
    shutil.copytree(whole[0], tmp_path / "out")
    copied = tmp_path / "runs" / "tiny"
    shutil.copytree(run, copied, copy_function=shutil.copyfile)  # as cp -r: other times
    asked = dataclasses.replace(config, checkpoints=str(copied))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "load_model", None)
        found = run_sweep(asked, tmp_path / "out").cells
        assert sorted(found, key=str) == sorted(whole[1].cells, key=str)
    shutil.rmtree(copied)
    copied.mkdir()
    tiny.write_checkpoint(copied, seed=1)
    with pytest.raises(ValueError, match="different weights"):
        run_sweep(asked, tmp_path / "out")


def test_a_damaged_checkpoint_is_named_and_the_others_are_asked(config, run, tmp_path, caplog):
    damaged = tmp_path / "runs" / "damaged"
    shutil.copytree(run, damaged)
    for file in (damaged / "checkpoints" / "3" / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "runs" / "begun" / "checkpoints").mkdir(parents=True)
    asked = dataclasses.replace(config, checkpoints=f"{tmp_path}/runs/*, {run}", limit=1)
    result = run_sweep(asked, tmp_path / "out")
    assert [cell.checkpoint for cell in result.cells] == ["runs-tiny-3"]
    assert [(left.what, left.failed) for left in result.left_out] == [
        (f"{tmp_path}/runs/begun", False),
        ("runs-damaged-3", True),
    ]
    assert "its 'checkpoints' hold no complete step" in caplog.text and "runs-damaged-3 is left out" in caplog.text
    page = write_sweep_report(tmp_path / "out").read_text()
    assert "runs-damaged-3 is left out" in page and "runs/begun is left out" in page
    shutil.copytree(run, damaged, dirs_exist_ok=True)
    assert [left.what for left in run_sweep(asked, tmp_path / "out").left_out] == [f"{tmp_path}/runs/begun"]


def test_sweeps_side_by_side_keep_each_others_cells(config, folder, tmp_path, monkeypatch):
    tasks = folder_tasks(folder)
    one, other = (dataclasses.replace(config, tasks=tasks, select=name, limit=1) for name in ("vqa", "region"))

    def load(*arguments):
        monkeypatch.setattr(sweep, "load_model", load_model)
        run_sweep(other, tmp_path)  # begins and ends while the first one runs
        return load_model(*arguments)

    monkeypatch.setattr(sweep, "load_model", load)
    run_sweep(one, tmp_path)
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert {cell["task"] for cell in found["cells"]} == {task["name"] for task in found["tasks"]} == {"vqa", "region"}


def test_a_cell_that_another_sweep_answers_is_left_to_it(config, folder, tmp_path):
    asked = dataclasses.replace(config, tasks=folder_tasks(folder), select="vqa,region", limit=1)
    cells = plan_sweep(asked, tmp_path).cells
    with folder_lock(tmp_path / cells[0].lock):
        with pytest.raises(IncompleteSweep, match="1 of 2 cells are not complete, first runs-tiny-3 region.*in use by"):
            run_sweep(asked, tmp_path)
    assert [cell.task for cell in run_sweep(asked, tmp_path).cells] == ["region", "vqa"]


def test_an_unknown_answer_type_is_named_and_ends_nothing(config, folder, tmp_path):
    records = json.loads((folder / "test" / "vqa.json").read_text())
    for record, kind in zip(records, ("CLOSED ", "riddle", "open-ended", "open"), strict=True):
        record["answer_type"] = kind
    (folder / "odd.json").write_text(json.dumps(records))
    (folder / "none.json").write_text(json.dumps(records[1:2]))
    odd = dataclasses.replace(config, tasks=folder_tasks(folder / "odd.json", folder / "none.json"), select="*")
    result = run_sweep(odd, tmp_path)
    (cell,) = result.cells
    assert (cell.records, [(error["record"], error["what"]) for error in cell.skipped]) == (
        3,
        [(1, "unknown answer type")],
    )
    assert [(left.what, left.failed) for left in result.left_out] == [("task none", True)]
    assert "unknown answer type" in result.left_out[0].why


@pytest.mark.parametrize("longest", [16, 100, 512, 2048, 4096, 5000])
def test_the_longest_prompt_has_a_length(longest):
    lengths = evenly_spaced_lengths(longest)
    assert lengths[-1] == longest and list(lengths) == sorted(set(lengths)) and len(lengths) <= 33


def test_what_cannot_be_evaluated_is_one_line(folder, tmp_path):
    wrong = [
        ("configs/eval_folder.py:/lost", "x", "/lost: expected an annotation file or a folder"),
        (f"configs/eval_folder.py:{folder}", "/lost/run", "checkpoints '/lost/run': expected workdirs"),
        (f"configs/eval_folder.py:{folder}", "/lost/run", "lost.py: no such file", "--config.metrics=lost.py"),
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "medplib_jax.evaluate", f"--config={config}", f"--workdir={tmp_path}"]
            + [f"--config.checkpoints={checkpoints}", *flags],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for config, checkpoints, _, *flags in wrong
    ]
    for process, (_, _, expected, *_) in zip(processes, wrong, strict=True):
        said = process.communicate()[1]
        assert process.returncode == 1 and len(said.splitlines()) == 1, said
        assert said.startswith("error: ") and expected in said


def test_answers_with_weights_of_8_bits_stand_beside_the_others(config, whole, tmp_path, monkeypatch):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    loaded = []
    monkeypatch.setattr(sweep, "load_model", lambda *arguments: loaded.append(load_model(*arguments)) or loaded[-1])
    small = dataclasses.replace(config, quantize="int8", baseline="runs-tiny-3", limit=3)
    result = run_sweep(small, tmp_path)
    assert {"int8", "float32"} <= {str(leaf.dtype) for leaf in jax.tree.leaves(loaded[0].params)}
    before = files(whole[0])
    assert {
        name: content for name, content in files(tmp_path).items() if "-int8/" not in name and name != "sweep.json"
    } == {name: content for name, content in before.items() if name != "sweep.json"}
    assert result.baseline == "runs-tiny-3" and [(c.name, c.quantize) for c in result.checkpoints] == [
        ("runs-tiny-3", ""),
        ("runs-tiny-3-int8", "int8"),
    ]
    plain, _, quantized = ([tmp_path / path for path in cell.predictions] for cell in result.cells)
    header = json.loads(quantized[0].read_text().splitlines()[0])
    assert header["quantize"] == "int8" and [row["record"] for row in read_rows(quantized[0])] == [0, 1, 2]
    assert "step 3, int8 weights" in write_sweep_report(tmp_path).read_text()
    shutil.copyfile(plain[0], quantized[0])
    with pytest.raises(ValueError, match="predictions of another run .different checkpoint, quantize"):
        run_sweep(small, tmp_path)


def test_captions_are_scored_by_other_programs_or_it_is_said_why_not(config, folder, tmp_path, monkeypatch, caplog):
    """Without Java first, then with it; answers are made once, SPICE and METEOR 1.5 are run once."""
    tasks = tuple(
        dataclasses.replace(task, name=name, kind="refer_box", part="RC")
        for name in ("RC", "GC")
        for task in folder_tasks(folder / "test" / "vqa.json")
    )
    captions = dataclasses.replace(config, tasks=tasks, select="*", limit=2)

    def left_out():
        write_sweep_report(tmp_path)
        notes = json.loads((tmp_path / "report.json").read_text())["notes"]
        return [note for note in notes if "left out" in note]

    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    cells = run_sweep(captions, tmp_path).cells
    assert [cell.task for cell in cells] == ["RC", "GC"]
    left = [message.partition(":")[0] for message in caplog.messages if "Java program" in message]
    assert left == ["SPICE is left out", "METEOR 1.5 is left out"]
    for cell in cells:
        assert (
            "mBMR" in cell.metrics
            and "spice" not in cell.metrics
            and "no `java` is on the PATH" in cell.left_out["spice"]
            and cell.left_out.keys() == {"spice", "meteor_1.5", "mBMR_1.5"}
        )
    assert [note.partition(": no")[0].partition(" is a Java program")[0] for note in left_out()] == [
        f"{task}: {metric} is left out: {program}"
        for task in ("RC", "GC")
        for metric, program in (("SPICE", "SPICE"), ("METEOR 1.5", "METEOR 1.5"), ("mBMR 1.5", "METEOR 1.5"))
    ]

    caplog.clear()
    monkeypatch.setattr(sweep, "load_model", None)
    with fake_spice.installed(tmp_path) as calls:
        for _ in range(2):
            cells = run_sweep(captions, tmp_path).cells
        assert [len(call) for call in calls()] == [2, 2]  # one for each task, none for the second sweep
    assert run_sweep(captions, tmp_path).cells == cells and "left out" not in caplog.text
    for cell in cells:
        rows = read_rows(tmp_path / cell.predictions[0])
        expected = [fake_spice.score(row["answer"], row["expected"]) for row in rows]
        assert cell.metrics["spice"] == pytest.approx(sum(expected) / 2) and cell.left_out == {}
        assert {"meteor_1.5", "mBMR_1.5"} <= cell.metrics.keys()
        assert [name.rpartition("/")[2] for name in cell.predictions[-2:]] == [
            f"{cell.task}.{program}.jsonl" for program in ("spice", "meteor")
        ]
    assert left_out() == []
    figures = json.loads((tmp_path / "report.json").read_text())["figures"]
    assert {
        figure["task"]: figure["value"]
        for figure in figures
        if (figure["metric"], figure["modality"]) == ("spice", "all")
    } == {cell.task: pytest.approx(cell.metrics["spice"]) for cell in cells}


@pytest.mark.slow
def test_every_task_of_the_sweep_is_asked(run, folder, tmp_path):
    """eval_sweep.py's files, each with records of its kind in the form that the importers write."""
    swept = from_config_dict(eval_sweep.get_config(str(tmp_path / "data")), SweepConfig)
    boxes = "<ref>lung</ref><box>(0,0),(500,999)</box>"
    for task in swept.tasks:
        root = tmp_path / "data" / os.path.relpath(task.file, tmp_path / "data").split(os.sep)[0]
        if not root.exists():
            shutil.copytree(folder, root, ignore=shutil.ignore_patterns("*.json"))
        records = json.loads(
            (folder / "test" / f"{'vqa' if task.kind == 'refer_box' else task.kind}.json").read_text()
        )[:3]
        for record in records:
            if task.kind == "refer_box":
                record["conversations"][-1]["value"] = boxes if task.part == "VG" else "It is the left lung."
            if task.name == "BRISC":
                record["conversations"][-1]["value"] = "No, there is no tumor."
        Path(task.file).parent.mkdir(exist_ok=True)
        Path(task.file).write_text(json.dumps(records))
    result = run_sweep(dataclasses.replace(swept, checkpoints=str(run), slots=2, refill=1), tmp_path / "out")
    metrics = {cell.task: cell.metrics for cell in result.cells}
    expected = {
        "grounding": "mDice",
        "vqa": "closed_accuracy",
        "region": "accuracy",
        "VG": "recall_at_0.5",
        "ROC": "roc_accuracy",
        "RC": "mBMR",
        "MIA": "mBMR",
    }
    assert metrics.keys() == {task.name for task in swept.tasks} and all(cell.records >= 2 for cell in result.cells)
    for task in swept.tasks:
        wanted = "false_mask_rate" if task.name == "BRISC" else expected[task.part or task.kind]
        assert 0 <= metrics[task.name][wanted] <= 1 and f"{wanted}/ct" in metrics[task.name], task.name
    assert (tmp_path / "out").exists() and "mDice" not in metrics["BRISC"]
