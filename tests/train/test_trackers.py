"""What MLflow and W&B keep of a run, each asked by its own reader."""

import dataclasses
import importlib.util
import logging

import pytest

from medplib_jax.config.experiment import ExperimentConfig, TrainConfig
from medplib_jax.train.metrics_log import MetricWriter


def write(workdir, tracker: str, start: int, rows: dict[int, dict[str, float]]) -> None:
    workdir.mkdir(exist_ok=True)
    config = dataclasses.replace(ExperimentConfig(), train=TrainConfig(trackers=(tracker,), seed=3))
    with MetricWriter(str(workdir), start, config) as writer:
        for step, row in rows.items():
            writer.write(step, row)


@pytest.mark.slow
def test_mlflow_keeps_one_run_with_config_and_scalars_also_when_it_is_resumed(tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write(tmp_path / "stage3", "mlflow", 0, {1: {"loss": 2.0, "eval/loss": 3.0}, 2: {"loss": 1.5}})
    write(tmp_path / "stage3", "mlflow", 2, {3: {"loss": 1.0}})
    client = tracking.MlflowClient((tmp_path / "stage3/mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("medplib_jax").experiment_id])
    assert (run.info.run_name, run.info.status) == ("stage3", "FINISHED")
    assert run.data.params["train.seed"] == "3" and run.data.params["model.llm.vocab_size"].isdigit()
    assert [(row.step, row.value) for row in client.get_metric_history(run.info.run_id, "loss")] == [
        (1, 2.0),
        (2, 1.5),
        (3, 1.0),
    ]
    assert run.data.metrics["eval/loss"] == 3.0


@pytest.mark.slow
def test_a_run_that_an_error_ended_has_failed_in_mlflow(tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TypeError):
        write(tmp_path, "mlflow", 0, {1: {"loss": 2.0}, 2: {"loss": object()}})
    client = tracking.MlflowClient((tmp_path / "mlruns").as_uri())
    assert client.get_run((tmp_path / "mlflow_run.txt").read_text()).info.status == "FAILED"


def test_an_mlflow_server_that_goes_away_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    tracking = pytest.importorskip("mlflow.tracking")
    exceptions = pytest.importorskip("mlflow.exceptions")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logged = tracking.MlflowClient.log_batch

    def log_batch(client, run, metrics=(), params=()):
        if metrics:
            raise exceptions.MlflowException("connection refused")
        return logged(client, run, metrics=metrics, params=params)

    def set_terminated(client, run, status):
        raise exceptions.MlflowException(f"no answer to {status}")

    monkeypatch.setattr(tracking.MlflowClient, "log_batch", log_batch)
    monkeypatch.setattr(tracking.MlflowClient, "set_terminated", set_terminated)
    with caplog.at_level(logging.WARNING):
        write(tmp_path, "mlflow", 0, {1: {"loss": 2.0}})
    assert "MLflow took nothing of step 1: connection refused" in caplog.text
    assert "MLflow was not told of the end: no answer to FINISHED" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'


@pytest.mark.slow
def test_wandb_keeps_one_run_with_config_and_scalars(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(name, value)
    write(tmp_path, "wandb", 0, {1: {"loss": 2.25}})
    write(tmp_path, "wandb", 0, {2: {"loss": 1.125}})
    kept = [file.read_bytes() for file in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))]
    run = (tmp_path / "wandb_run.txt").read_text().encode()
    assert kept and all(run in content for content in kept)
    assert b"2.25" in kept[0] and b"1.125" in kept[-1] and b"bucket_lengths" in kept[0]


@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(tmp_path, monkeypatch, tracker):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"train\.trackers names '{tracker}'.*medplib_jax\[{tracker}\]"):
        write(tmp_path, tracker, 0, {})
    assert not list(tmp_path.iterdir())
