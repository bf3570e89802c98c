"""Tasks of in-context segmentation: shots, structures, and examples beside the query in the report."""

import dataclasses
import json

import pytest

from configs import eval_icl
from medplib_jax.config.base import from_config_dict
from medplib_jax.config.sweep import SweepConfig, TaskConfig
from medplib_jax.data.errors import DataError
from medplib_jax.datasets.icl import IclOptions, make_icl
from medplib_jax.evaluate.evaluators.predictions import read_rows
from medplib_jax.evaluate.plan import plan_sweep
from medplib_jax.evaluate.report.sweep import write_sweep_report
from medplib_jax.evaluate.report.sweep_load import load_sweep
from medplib_jax.evaluate.sweep import run_sweep
from medplib_jax.evaluate.tasks import find_tasks, read_task
from tests.datasets.icl_pairs import write_pairs
from tests.evaluate.evaluators import tiny

SHOTS = (0, 1, 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("icl")
    make_icl(str(write_pairs(root / "pairs")), str(root / "data"), IclOptions(test_share=0.6))
    file = root / "data" / "test" / "icl.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:6]))
    return root / "data"


def task(data, shots, **changes):
    return TaskConfig(
        f"icl_{shots}", str(data / "test" / "icl.json"), root=str(data), kind="icl", shots=shots, **changes
    )


@pytest.fixture(scope="module")
def swept(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    (root / "runs" / "tiny").mkdir(parents=True)
    tiny.write_checkpoint(root / "runs" / "tiny")
    tasks = tuple(task(data, shots) for shots in SHOTS)
    config = SweepConfig(checkpoints=str(root / "runs" / "tiny"), tasks=tasks, slots=2, refill=2, max_new_tokens=1)
    return root / "out", run_sweep(config, root / "out"), config


def test_each_task_shows_its_number_of_examples(data, swept):
    out, result, _ = swept
    records = json.loads((data / "test" / "icl.json").read_text())
    for shots, cell in zip(SHOTS, result.cells, strict=True):
        assert (cell.task, cell.records, cell.skipped) == (f"icl_{shots}", 6, ())
        for row in read_rows(*(out / path for path in cell.predictions)):
            record = records[row["record"]]
            assert row["examples"] == [[one["image"], one["mask"]] for one in record["icl_examples"][:shots]]
            assert row["question"].startswith("<examples>Query: <image>")
            assert len(row["true_masks"]) == 1 and row["scores"]["target"]


def test_the_report_shows_examples_beside_the_query(swept):
    out, _, _ = swept
    write_sweep_report(out)
    for number, shots in enumerate(SHOTS):
        case = (out / "report_cases" / f"{number:02d}-0.js").read_text()
        examples = json.loads(case.removeprefix("loaded(").rstrip(");\n").split(",", 3)[3])["examples"]
        assert [sorted(example) for example in examples] == [["picture", "shapes", "size"]] * shots
        assert all(len(example["shapes"]) == 1 and example["shapes"][0] for example in examples)


def test_figures_are_by_structure(swept):
    out, result, _ = swept
    rows = read_rows(*(out / path for path in result.cells[2].predictions))
    assert {row["structure"] for row in rows} == {"liver", "left kidney", "spleen"}
    names = load_sweep(out).cells[0].parts
    assert {name for name in names if "liver" in name}


def test_shots_are_part_of_what_predictions_are_made_from(data):
    one, three = (read_task(task(data, shots), 0, "raise") for shots in (1, 3))
    assert one.digest != three.digest and (one.examples, three.examples, one.images) == (1, 3, 1)
    assert one.kind == "icl" and one.masks == 1


def test_the_config_asks_every_number_of_examples(data):
    asked = {task.name: (task.file, task.shots) for task in eval_icl.tasks(data)}
    assert asked["random-0"] == (str(data / "test/icl.json"), 0) and "retrieved-0" not in asked
    assert asked["retrieved-3"] == (str(data / "test/icl_retrieved.json"), 3) and len(asked) == 7
    config = from_config_dict(eval_icl.get_config(str(data)), SweepConfig)
    tasks, left_out = find_tasks(config.tasks, 2, "raise", "skip")
    assert [task.examples for task in tasks] == [0, 1, 2, 3] and len(left_out) == 3


def test_an_ordinary_record_is_no_icl_record(data, tmp_path):
    file = tiny.write_data(tmp_path / "root") / "test" / "grounding.json"
    with pytest.raises(DataError, match="record 0: record without examples; expected icl_examples"):
        read_task(TaskConfig("icl", str(file), kind="icl"), 0, "raise")


def test_the_original_has_no_protocol_for_examples(swept, tmp_path):
    _, _, config = swept
    with pytest.raises(ValueError, match="an icl task has no protocol 'reference'"):
        plan_sweep(dataclasses.replace(config, protocol="both"), tmp_path)
