"""Where a run's scalars go beside metrics.jsonl: TensorBoard, MLflow, Weights & Biases (`train.trackers`).

A run that is resumed goes on in the same MLflow or W&B run, whose id is kept in its workdir. Both are told where to
write by their own environment: MLFLOW_TRACKING_URI, WANDB_MODE, WANDB_PROJECT, and so on.
"""

import dataclasses
import importlib.util
import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Protocol

from etils import epath
from flax.traverse_util import flatten_dict

from medplib_jax.config.experiment import ExperimentConfig

log = logging.getLogger("medplib_jax.train")

FLUSH_SECONDS = 5  # what a killed process may lose of TensorBoard's events
PROJECT = "medplib_jax"
LONGEST = 6000  # characters of a parameter that MLflow keeps
PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}  # tracker: what it imports


class Tracker(Protocol):
    """One place for a run's scalars; only process 0 has any."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """The scalars of one step, by name."""

    def close(self, failed: bool) -> None:
        """After the last step. failed: an error ended the run."""


class TensorBoard:
    """Events in WORKDIR/tensorboard. Those after `start` are hidden by what comes instead of them."""

    def __init__(self, workdir: str, start: int, _: ExperimentConfig):
        from tensorboardX import SummaryWriter  # slow to import, and only process 0 needs it

        folder = epath.Path(workdir) / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=start + 1, flush_secs=FLUSH_SECONDS)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class Mlflow:
    """One MLflow run with the config as parameters, on MLFLOW_TRACKING_URI or else below WORKDIR/mlruns.

    Steps that a resumed run makes again stand there twice. A server that does not answer is a ValueError at the start
    and a warning later.
    """

    def __init__(self, workdir: str, _: int, config: ExperimentConfig):
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        try:
            self._client = MlflowClient(_mlflow_address(workdir))
            self._run = _kept_id(workdir, "mlflow", lambda: self._new_run(workdir))
            self._describe(config)
        except MlflowException as error:
            raise ValueError(f"train.trackers: MLflow: {error}") from error

    def _describe(self, config: ExperimentConfig) -> None:
        from mlflow.entities import Param

        values = flatten_dict(dataclasses.asdict(config), sep=".")
        params = [Param(name, str(value)[:LONGEST]) for name, value in values.items()]
        if not self._client.get_run(self._run).data.params:  # they cannot be changed
            for first in range(0, len(params), 100):  # the most that one request takes
                self._client.log_batch(self._run, params=params[first : first + 100])
        self._client.update_run(self._run, "RUNNING")

    def _new_run(self, workdir: str) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        return self._client.create_run(experiment, run_name=epath.Path(workdir).name).info.run_id

    def write(self, step: int, metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        now = int(time.time() * 1000)
        try:
            rows = [Metric(name, value, now, step) for name, value in metrics.items()]
            self._client.log_batch(self._run, metrics=rows)
        except MlflowException as error:
            log.warning("MLflow took nothing of step %d: %s", step, error)

    def close(self, failed: bool) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")
        except MlflowException as error:
            log.warning("MLflow was not told of the end: %s", error)


class WeightsAndBiases:
    """One W&B run with the config. Its own process sends what it is told, so that a slow network stops no step."""

    def __init__(self, workdir: str, _: int, config: ExperimentConfig):
        import wandb

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=epath.Path(workdir).name,
                id=_kept_id(workdir, "wandb", lambda: uuid.uuid4().hex[:8]),
                resume="allow",
                dir=None if "://" in workdir else workdir,
                config=dataclasses.asdict(config),
                settings=wandb.Settings(silent=True),
            )
        except wandb.Error as error:
            raise ValueError(f"train.trackers: W&B: {error}") from error
        self._run.define_metric("*", step_metric="step")  # a resumed run may go back, W&B's own steps may not

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


TRACKERS: dict[str, Callable[[str, int, ExperimentConfig], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": Mlflow,
    "wandb": WeightsAndBiases,
}


def check_installed(names: Sequence[str]) -> None:
    """ValueError for a tracker whose package is not there."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(f"train.trackers names {name!r}, not installed here: pip install 'medplib_jax[{name}]'")


def _mlflow_address(workdir: str) -> str:
    if address := os.environ.get("MLFLOW_TRACKING_URI"):
        return address
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder beside the checkpoints needs no database
    return (epath.Path(workdir).resolve() / "mlruns").as_uri()


def _kept_id(workdir: str, name: str, make: Callable[[], str]) -> str:
    """The id of the run that this workdir writes to; made once."""
    path = epath.Path(workdir) / f"{name}_run.txt"
    if not path.exists():
        path.write_text(make())
    return path.read_text().strip()
