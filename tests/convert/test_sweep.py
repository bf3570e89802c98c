"""A sweep over a PyTorch folder, which it converts by itself, and over the checkpoint that the folder was written
from."""

import functools
import json

import jax.numpy as jnp
import pytest

from convert import to_torch
from medplib_jax import checkpoint
from medplib_jax.config.experiment import DataConfig, ExperimentConfig
from medplib_jax.config.sweep import SweepConfig
from medplib_jax.evaluate.evaluators.predictions import read_rows
from medplib_jax.evaluate.sweep import run_sweep
from medplib_jax.evaluate.tasks import folder_tasks
from medplib_jax.models.layers import abstract_module, draw_params
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.train.state import TrainState
from tests.convert.conftest import TINY, TOKENIZER
from tests.evaluate.evaluators import tiny


@pytest.fixture
def run(tmp_path):
    """A checkpoint of random weights with the original's tokenizer."""
    path = tmp_path / "runs" / "tiny"
    experiment = ExperimentConfig(model=TINY, data=DataConfig(tokenizer=str(TOKENIZER)))
    params = draw_params(abstract_module(functools.partial(MedPLIB, TINY)), 0)
    with checkpoint.make_manager(str(path), keep=1) as manager:
        checkpoint.save(
            manager,
            TrainState(step=jnp.asarray(3), trainable=params, frozen={}, opt_state={}),
            experiment,
            total_steps=3,
            loss=1.0,
        )
        manager.wait_until_finished()
    return path


def test_a_folder_of_pytorch_weights_answers_like_its_checkpoint(run, tmp_path):
    folder = tmp_path / "MedPLIB-tiny"
    to_torch.convert(run, folder)
    tasks = folder_tasks(tiny.write_data(tmp_path / "data"))
    config = SweepConfig(checkpoints=f"{run},{folder}", tasks=tasks, max_new_tokens=4, limit=2, slots=2, refill=2)
    result = run_sweep(config, tmp_path / "sweep")
    assert [(c.name, c.kind, c.step) for c in result.checkpoints] == [
        ("runs-tiny-3", "jax", 3),
        ("MedPLIB_tiny", "torch", 0),
    ]
    assert [path.name.rpartition("-")[0] for path in (tmp_path / "sweep" / "converted").iterdir()] == ["MedPLIB-tiny"]
    answers = {}
    for cell in result.cells:
        assert cell.records == 2 and not cell.skipped
        rows = read_rows(*(tmp_path / "sweep" / path for path in cell.predictions))
        answers.setdefault(cell.checkpoint, {})[cell.task, cell.protocol] = json.dumps(
            [rows, cell.metrics, cell.router]
        )
        assert all(row["answer"] for row in rows) and ("masks" in rows[0]) == (cell.task == "grounding")
    assert answers["MedPLIB_tiny"] == answers["runs-tiny-3"] and len(answers["runs-tiny-3"]) == 3
