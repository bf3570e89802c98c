"""The demo's page says its figures in words, in percent and with intervals."""

import json

import pytest

from launch import demo
from tests.evaluate.report.sweep_fixture import CHECKPOINTS, write_sweep

NAMES = {
    "MeCoVQA_Grounding_test": "grounding",
    "MeCoVQA_Complex_VQA_test": "complex",
    "MeCoVQA_Region_VQA_test": "region",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A demo whose evaluation is pretended, and its results."""
    made = demo.Demo(tmp_path_factory.mktemp("demo"), 1, 6, 0)
    write_sweep(made.evaluation, 6, CHECKPOINTS[3:4], protocols=("exact",))
    sweep = json.loads((made.evaluation / "sweep.json").read_text())
    for entry in (*sweep["tasks"], *sweep["cells"]):
        key = "task" if "task" in entry else "name"
        entry[key] = NAMES.get(entry[key], entry[key])
    (made.evaluation / "sweep.json").write_text(json.dumps(sweep))
    return made, {"IV mixture": {cell["task"]: cell for cell in sweep["cells"] if cell["task"] in NAMES.values()}}


def test_figures_are_words_with_percent_interval_and_number(found):
    made, results = found
    (row,) = demo.in_words(made, results).values()
    assert row.keys() == {words for words, *_ in demo.BARS.values()}
    value = results["IV mixture"]["grounding"]["metrics"]["mDice"]
    assert row["masks, mDice"].startswith(f"{100 * value:.1f} (") and ", n = " in row["masks, mDice"]
    assert demo.comparisons(results).keys() == row.keys()


def test_every_figure_with_a_bar_is_one_of_the_headlines(found):
    _, results = found
    assert demo.BARS.keys() <= demo.headline(results["IV mixture"]).keys()
