"""Weights and caches of 8 bits leave the demo's answers as they were."""

import pytest

from medplib_jax.config.sweep import SweepConfig
from medplib_jax.decode.layout import QUANTIZE
from medplib_jax.evaluate.evaluators.predictions import read_rows
from medplib_jax.evaluate.sweep import run_sweep
from medplib_jax.evaluate.tasks import folder_tasks
from tests.paths import ROOT

DEMO = ROOT / "runs/demo"
needs_demo = pytest.mark.skipif(not (DEMO / "metrics.json").exists(), reason="bash launch/demo.sh makes the model")


def answers(quantize: str, workdir) -> dict[tuple[str, int], str]:
    """{(task, record): answer} of the demo's last stage."""
    tasks = folder_tasks(str(DEMO / "phantom"))
    result = run_sweep(SweepConfig(checkpoints=str(DEMO / "stage_IV"), tasks=tasks, quantize=quantize), workdir)
    return {
        (cell.task, row["record"]): row["answer"]
        for cell in result.cells
        for path in cell.predictions
        for row in read_rows(workdir / path)
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return answers("", tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
@needs_demo
@pytest.mark.parametrize("quantize", QUANTIZE[1:])
def test_98_of_100_answers_stay(whole, quantize, tmp_path):
    small = answers(quantize, tmp_path)
    assert whole.keys() == small.keys() and len(whole) > 700
    assert sum(whole[key] == small[key] for key in whole) >= 0.98 * len(whole)
