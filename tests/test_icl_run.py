"""In-context segmentation from drawn shapes to the demo's figures, with little data and a few steps."""

import json

import pytest

from launch import demo_icl
from launch.demo_common import Stopwatch
from medplib_jax.data.sources import MecovqaSource
from medplib_jax.datasets.audit.collect import audit
from medplib_jax.datasets.phantom import shapes


@pytest.fixture
def demo(tmp_path, monkeypatch):
    for name, value in {"TRAIN_KINDS": 2, "TRAIN_PATIENTS": 4, "TEST_KINDS": 1, "TEST_PATIENTS": 5}.items():
        monkeypatch.setattr(demo_icl, name, value)
    monkeypatch.setattr(demo_icl, "STEPS", {"IV": 1, "V": 1})
    return demo_icl.IclDemo(tmp_path / "icl", 0)


def test_no_training_picture_holds_a_form_that_is_tested(demo):
    demo_icl.make_data(demo)
    forms = {}
    for split in ("train", "test"):
        records = MecovqaSource(str(demo.records(split)), str(demo.data(split)))
        forms[split] = {record.structure.split()[0] for record in records}
        drawn = {path.name.split("_")[0] for path in (demo.out / "pairs" / split / "masks").glob("*/*.png")}
        assert forms[split] == drawn and len(records)
        report, _ = audit(str(demo.data(split)))
        assert not [kind for kind in report["finding_counts"] if "own picture" in kind or "unusable" in kind]
    assert forms["train"] <= set(shapes.FORMS) and forms["test"] <= set(shapes.HELD_OUT_FORMS)
    named, shown = (json.loads(demo.asked(stage).read_text()) for stage in ("IV", "V"))
    assert len(named) == 2 * len(shown) == 2 * 2 * 4 * shapes.SHAPES
    places = [record["conversations"][1]["value"].split()[0] for record in shown]
    assert [record["conversations"][1]["value"].split()[0] for record in named[::2]] == places
    assert all(
        f"in the {place}." in record["conversations"][0]["value"]
        for record, place in zip(named[::2], places, strict=True)
    )


@pytest.mark.slow
def test_the_demo_runs_to_its_figures(demo, tmp_path):
    demo.out.mkdir()
    watch = Stopwatch(tmp_path / "stopwatch.json")
    assert demo_icl.run(demo, watch) == 0
    found = json.loads((demo.out / "metrics.json").read_text())
    assert {f"mDice, random-{shots}" for shots in range(4)} <= found.keys()
    assert found["gain, 3 over 0 examples, low"] <= found["gain, 3 over 0 examples"]
    assert (demo.evaluation / "report.html").is_file()
    made = (demo.out / "metrics.json").stat().st_mtime_ns
    assert demo_icl.run(demo, watch) == 0 and (demo.out / "metrics.json").stat().st_mtime_ns == made
