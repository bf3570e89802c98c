"""Kinds of questions: one file each, from which sweep, report and tables take everything."""

import json
import re

import numpy as np
import pytest

from medplib_jax.config.sweep import TaskConfig
from medplib_jax.evaluate import kinds, table
from medplib_jax.evaluate.kinds import Answer, Contents, best_fit, find_kind
from medplib_jax.evaluate.metrics import catalogue
from medplib_jax.evaluate.report.sweep import write_sweep_report
from medplib_jax.evaluate.tasks import read_task
from tests.evaluate.evaluators import tiny
from tests.paths import ROOT

README = (ROOT / "medplib_jax/evaluate/evaluators/README.md").read_text()
(COUNTING,) = re.findall(r"^```python\n(# medplib_jax/evaluate/kinds/.*?)^```", README, re.M | re.S)


@pytest.fixture
def counting(tmp_path, monkeypatch):
    """A new kind, by one file in the folder of kinds."""
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds/counting.py").write_text(COUNTING)
    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(tmp_path / "kinds")])
    monkeypatch.setattr(catalogue, "METRICS", dict(catalogue.METRICS))
    kinds.kinds.cache_clear()
    yield find_kind("counting")
    kinds.kinds.cache_clear()


def test_a_kind_is_found_from_what_a_file_holds():
    assert best_fit(Contents(1, 1, 1)) == "grounding" and best_fit(Contents(1, 1, 0)) == "region"
    assert best_fit(Contents(1, 0, 0)) == best_fit(Contents()) == "vqa"
    with pytest.raises(ValueError, match="kind 'refer_box' is not one of: grounding, .*refer_box MIA, .*vqa"):
        find_kind("refer_box")


def test_a_task_of_an_unknown_kind_is_refused_by_name(tmp_path):
    file = tiny.write_data(tmp_path / "root") / "test/vqa.json"
    with pytest.raises(ValueError, match="task a: kind 'riddle' is not one of"):
        read_task(TaskConfig("a", str(file), kind="riddle"), 0, "raise")


def test_one_file_adds_a_kind_to_sweep_report_and_tables(counting, tmp_path):
    answers = [("3", "4"), ("7", "7"), ("1", "9")]
    rows = [
        {"record": i, "image": [f"images/ct_{i}.png"], "modality": "ct", "question": "How many?", "answer_type": ""}
        | {"answer": said, "expected": true}
        | counting.score(Answer(said, true), "exact")
        for i, (said, true) in enumerate(answers)
    ]
    (tmp_path / "a.jsonl").write_text('{"header": 1}\n' + "".join(json.dumps(row) + "\n" for row in rows))
    cell = {"checkpoint": "a", "task": "fingers", "protocol": "exact", "predictions": ["a.jsonl"]}
    cell |= {"records": 3, "metrics": {"off_by": 3}}
    task = {"name": "fingers", "kind": "counting", "file": "fingers.json", "records": 3}
    sweep = {"checkpoints": [{"name": "a"}], "tasks": [task], "cells": [cell]}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    page = write_sweep_report(tmp_path).read_text()
    assert "off by" in page and "mean distance of the two numbers" in page and "sweep.json says" not in page
    (main,) = (f for f in json.loads((tmp_path / "report.json").read_text())["figures"] if f["modality"] == "all")
    assert (main["metric"], main["main"]) == ("off_by", True) and main["value"] == pytest.approx(np.mean([1, 0, 8]))
    selection = {"tasks": "*", "metrics": "", "checkpoints": "*", "protocol": "", "modality": "all"}
    assert "fingers off by" in table.make_table(tmp_path, "markdown", **selection)


def test_a_metric_has_one_meaning(counting):
    with pytest.raises(ValueError, match="'off_by' is known already: mean distance"):
        catalogue.register("off_by", catalogue.Metric("off by", "something else"))
