"""Answers to held-out records while a run trains, against a sweep over checkpoints with the same parameters."""

import dataclasses

import jax
import pytest

from medplib_jax.checkpoint import load_params
from medplib_jax.config.experiment import EvalConfig, MeshConfig, TrainConfig
from medplib_jax.config.sweep import SweepConfig
from medplib_jax.evaluate.in_training import HeldOutFigures
from medplib_jax.evaluate.sweep import run_sweep
from medplib_jax.evaluate.tasks import folder_tasks
from medplib_jax.models.layers import model_shardings
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.train.step import abstract_model, place
from tests.evaluate.evaluators import tiny

TASKS = ("grounding", "vqa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data") / "root")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two checkpoints of one model with different parameters."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        (root / str(seed)).mkdir()
        tiny.write_checkpoint(root / str(seed), seed)
    return root


def evaluated(experiment, folder, tokenizer, tasks):
    sources = tuple(f"{folder}/test/{name}.json" for name in tasks)
    return dataclasses.replace(
        experiment,
        data=dataclasses.replace(experiment.data, root=str(folder), batch_size=4, tokenizer=tokenizer),
        eval=dataclasses.replace(experiment.eval, sources=sources),
        train=TrainConfig(eval_every=1, eval_tasks=tasks),
    )


@pytest.mark.parametrize(("devices", "tasks"), [(1, TASKS[:1]), pytest.param(4, TASKS, marks=pytest.mark.slow)])
def test_figures_are_those_of_a_sweep_over_the_same_parameters(folder, runs, tmp_path, devices, tasks):
    """Also after an evaluation of other parameters, whose compiled programs are used again."""
    select = ",".join(tasks)
    swept = run_sweep(SweepConfig(checkpoints=f"{runs}/0", tasks=folder_tasks(folder), select=select), tmp_path)
    expected = {
        f"eval/{cell.task}/{name}": value
        for cell in swept.cells
        for name, value in cell.metrics.items()
        if "/" not in name
    }
    assert "eval/grounding/mDice" in expected
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.devices()[:devices])
    experiment, _, tokenizer = load_params(runs / "0")
    config = evaluated(experiment, folder, tokenizer, tasks)
    figures = HeldOutFigures(config, mesh)
    placed = model_shardings(abstract_model(config.model, config.sharding), mesh)
    other, found = (figures(place(load_params(runs / name)[1], placed), step) for step, name in enumerate(("1", "0")))
    assert found.pop("eval/loss") > 0 and found["eval/ce"] != other["eval/ce"]
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_a_task_that_no_source_has_is_refused(folder, tmp_path):
    config = evaluated(tiny.make_experiment(tmp_path), folder, str(tmp_path), TASKS)
    config = dataclasses.replace(config, eval=EvalConfig(sources=config.eval.sources[:1]))
    with pytest.raises(ValueError, match="eval_tasks 'vqa' is not one of eval.sources, expected one of .'grounding'"):
        HeldOutFigures(config, make_mesh(MeshConfig(), jax.devices()[:1]))


def test_tasks_without_evaluation_are_refused():
    for setting in ({"eval_tasks": TASKS}, {"keep_best_by": "eval/grounding/mDice"}):
        with pytest.raises(ValueError, match="are read with eval_every only"):
            TrainConfig(**setting)
