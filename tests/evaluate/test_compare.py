"""Two runs side by side: what changed, and gates that fail a build."""

import csv
import dataclasses
import json
import shutil
import sys

import pytest

from medplib_jax.evaluate import compare
from medplib_jax.evaluate.compare import Gate, Side, changes, compare_runs
from medplib_jax.evaluate.result import MetricEntry, update_result
from tests.evaluate.report.sweep_fixture import CHECKPOINTS, write_sweep

TASK = "MeCoVQA_Grounding_test"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A sweep of two checkpoints, and what comparing them leaves."""
    folder = tmp_path_factory.mktemp("runs")
    write_sweep(folder / "sweep", 6, CHECKPOINTS[1:4:2], protocols=("exact",))
    sides = [Side.of(f"{folder}/sweep@{name}") for name in ("stage_IV-800", "stage_III-1200")]
    return folder, compare_runs(*sides, folder / "out")


def values(result, checkpoint):
    return {cell.task: cell.metrics for cell in result.cells if cell.checkpoint == checkpoint}


def test_every_changed_answer_is_listed_with_both_sides(folders):
    folder, result = folders
    with open(folder / "out/changed.csv", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["task"] == TASK]
    found = list(changes(folder / "out", result))
    assert len(lines) == len([line for line in found if line["task"] == TASK]) > 3
    losses = [float(line["after"]) - float(line["before"]) for line in lines if line["after"] and line["before"]]
    assert all(losses) and losses[0] == min(losses)
    assert result.baseline == "stage_III-1200" and (folder / "out/report.html").exists()
    assert list((folder / "out/report_cases").glob("*-*.js"))
    report = json.loads((folder / "out/report.json").read_text())
    assert {one["baseline"] for one in report["figures"]} == {None, "stage_III-1200"} and report["notes"] == []


def test_gates_hold_where_they_say(folders):
    _, result = folders
    new, old = (values(result, name)[TASK]["mDice"] for name in ("stage_IV-800", "stage_III-1200"))
    assert new > old
    assert not Gate.of("grounding.mdice < baseline - 0.01").check(result)
    (line,) = Gate.of(f"{TASK}.mDice > baseline + 0.001").check(result)
    assert f"{new:.4f} > {old + 0.001:.4f} (exact)" in line
    assert Gate.of("grounding.mDice<0.999").check(result) and not Gate.of("grounding.mDice < 0").check(result)
    for text, message in (
        ("grounding.mDice ~ 3", "expected TASK.METRIC < NUMBER"),
        ("grounding.mDice < ", "expected TASK.METRIC < NUMBER"),
        ("vga.accuracy < 1", "expected one task vga, there are MeCoVQA_Complex_VQA_test"),
        ("grounding.mDoce < 1", "has .*mDice"),
        ("grounding.mDice < baseline 0.01", "expected TASK.METRIC < NUMBER"),
        ("grounding.mDice < baseline -", "expected TASK.METRIC < NUMBER"),
    ):
        with pytest.raises(ValueError, match=message):
            Gate.of(text).check(result)


def test_gates_take_metrics_and_tasks_with_a_dot_in_their_names(folders):
    _, result = folders
    assert Gate.of("MedGRIT_VG.recall_at_0.5 <= 1").check(result)
    renamed = lambda entry, field: dataclasses.replace(entry, **{field: getattr(entry, field).replace("_", ".")})
    tasks = tuple(renamed(task, "name") for task in result.tasks)
    dotted = dataclasses.replace(result, tasks=tasks, cells=tuple(renamed(cell, "task") for cell in result.cells))
    assert Gate.of("MedGRIT.VG.recall_at_0.5 <= baseline + 1").check(dotted)


def test_a_gate_on_the_baseline_wants_the_same_records(folders):
    """The mean over ten records says nothing of the mean over a thousand."""
    _, result = folders
    shorter = [
        dataclasses.replace(cell, records=cell.records - 1) if cell.checkpoint == result.baseline else cell
        for cell in result.cells
    ]
    fewer = dataclasses.replace(result, cells=tuple(shorter))
    with pytest.raises(ValueError, match="stage_IV-800 and stage_III-1200 answered different records"):
        Gate.of("grounding.mdice < baseline - 0.01").check(fewer)
    assert Gate.of("grounding.mDice<0.999").check(fewer)


def test_the_summary_counts_each_protocol_by_itself(folders, tmp_path):
    folder, result = folders
    write_sweep(tmp_path / "sweep", 6, CHECKPOINTS[1:4:2])
    sides = [Side.of(f"{tmp_path}/sweep@{name}") for name in ("stage_IV-800", "stage_III-1200")]
    out = tmp_path / "out"
    lines = [line for line in compare.summary(out, compare_runs(*sides, out)) if line.startswith(f"{TASK}: ")]
    (exact,) = (line for line in compare.summary(folder / "out", result) if line.startswith(f"{TASK}: "))
    assert len(lines) == 2 and exact in lines and "(exact)" in exact


def test_the_folder_of_a_sweep_is_not_written_over(folders):
    folder, _ = folders
    before = (folder / "sweep/sweep.json").read_text()
    sides = [Side.of(f"{folder}/sweep@{name}") for name in ("stage_IV-800", "stage_III-1200")]
    with pytest.raises(ValueError, match="sweep: expected a folder for the comparison alone, found a sweep"):
        compare_runs(*sides, folder / "sweep")
    assert (folder / "sweep/sweep.json").read_text() == before


def test_own_metrics_of_two_files_are_not_compared(folders, tmp_path):
    folder, _ = folders
    for name, content in (("new", "aa"), ("old", "bb")):
        shutil.copytree(folder / "sweep", tmp_path / name)
        entry = MetricEntry("brevity", "brevity", "is short", file=f"{name}.py", content=content)
        update_result(tmp_path / name, lambda before, own=entry: dataclasses.replace(before, metrics=(own,)))
    sides = Side.of(f"{tmp_path}/new@stage_IV-800"), Side.of(f"{tmp_path}/old@stage_IV-800")
    with pytest.raises(ValueError, match="metric brevity: scored by two files .new.py, old.py."):
        compare_runs(*sides, tmp_path / "out")


def test_one_command_compares_two_folders_and_fails_by_its_gates(folders, tmp_path, monkeypatch, capsys):
    folder, result = folders
    for name, checkpoint in (("new", "stage_III-1200"), ("old", "stage_IV-800")):  # worse than before
        shutil.copytree(folder / "sweep", tmp_path / name)
        sweep = json.loads((tmp_path / name / "sweep.json").read_text())
        sweep["checkpoints"] = [entry for entry in sweep["checkpoints"] if entry["name"] == checkpoint]
        sweep["cells"] = [cell for cell in sweep["cells"] if cell["checkpoint"] == checkpoint]
        sweep["tasks"] = [task for task in sweep["tasks"] if task["name"] == TASK]
        sweep["cells"] = [cell for cell in sweep["cells"] if cell["task"] == TASK]
        sweep["baseline"] = None
        (tmp_path / name / "sweep.json").write_text(json.dumps(sweep))
    monkeypatch.chdir(tmp_path)
    command = ["compare", "new", "old", "--out", "out", "--fail-if", "grounding.mdice < baseline - 0.01"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        compare.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and "failed: grounding.mdice < baseline - 0.01: 0." in err
    assert f"{TASK}: " in out and "answers better" in out
    monkeypatch.setattr(sys, "argv", command[:-2])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert not ended.value.code
    monkeypatch.setattr(sys, "argv", ["compare", str(folder / "sweep"), "old", "--out", "out"])
    with pytest.raises(SystemExit, match="expected FOLDER@CHECKPOINT with one of stage_III-1200, stage_IV-800"):
        compare.main()


@pytest.mark.parametrize("field", ["content", "data"])
def test_other_data_is_refused(folders, tmp_path, field):
    folder, _ = folders
    shutil.copytree(folder / "sweep", tmp_path / "other")
    sweep = json.loads((tmp_path / "other/sweep.json").read_text())
    for task in sweep["tasks"]:
        task[field] = "beef"
    (tmp_path / "other/sweep.json").write_text(json.dumps(sweep))
    sides = Side.of(f"{folder}/sweep@stage_IV-800"), Side.of(f"{tmp_path}/other@stage_IV-800")
    with pytest.raises(ValueError, match="task .*: the annotation files or what they name differ"):
        compare_runs(*sides, tmp_path / "out")
