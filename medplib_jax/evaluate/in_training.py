"""A run's figures on held-out records while it trains: the loss, and the sweep's metrics of generated answers."""

import json
import logging
import os
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from medplib_jax.batch import Params
from medplib_jax.config.experiment import ExperimentConfig, MeshConfig
from medplib_jax.config.sweep import SweepConfig, TaskConfig
from medplib_jax.data.sources import is_dataset
from medplib_jax.data.tokenizers import load_tokenizer
from medplib_jax.decode.layout import to_decoding_layout
from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.answering import AskedModel, answers
from medplib_jax.evaluate.evaluators.predictions import SKIPPED, count_cut_off
from medplib_jax.evaluate.kinds import find_kind
from medplib_jax.evaluate.plan import AnswerSettings
from medplib_jax.evaluate.tasks import SweepTask, read_task
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.parallel.processes import of_every_process
from medplib_jax.train.held_out import HeldOutLoss

log = logging.getLogger(__name__)


class HeldOutFigures:
    """(parameters, step) -> `HeldOutLoss`, and the metrics of answers to the tasks that `train.eval_tasks` names.

    The metrics are those of a sweep in protocol exact, over the first `train.eval_records` usable records of a task.
    Every process answers its share of them with a copy of the parameters on its own devices, which must have room.
    """

    def __init__(self, config: ExperimentConfig, mesh: Mesh):
        self._loss = HeldOutLoss(config, mesh)
        self._config = config
        self._mesh = mesh if jax.process_count() == 1 else make_mesh(MeshConfig(data=1, fsdp=-1), jax.local_devices())
        self._tasks = [read_task(task, config.train.eval_records, "skip") for task in tasks_to_answer(config)]
        self._asked: AskedModel | None = None

    def __call__(self, params: Params, step: int) -> dict[str, float]:
        figures = self._loss(params, step)
        if self._tasks:
            model = self._model(params)
            for task in self._tasks:
                found = self._metrics(model, task, step)
                figures |= {f"eval/{task.name}/{metric}": value for metric, value in found.items()}
        return figures

    def _model(self, params: Params) -> AskedModel:
        """The model with the step's parameters; its programs are compiled at the first evaluation."""
        if jax.process_count() > 1:
            params = multihost_utils.process_allgather(params, tiled=True)
        config = self._config
        params = to_decoding_layout(config.model, params, self._mesh, config.sharding)
        if self._asked is None:
            tokenizer = load_tokenizer(config.data.tokenizer)
            self._asked = AskedModel(config, params, tokenizer, self._mesh, config.sharding)
        else:
            self._asked.replace_params(params)
        return self._asked

    def _metrics(self, model: AskedModel, task: SweepTask, step: int) -> dict[str, float]:
        how = SweepConfig(on_error="skip")
        settings = AnswerSettings.of(how, self._config, "exact")
        own = task.records[jax.process_index() :: jax.process_count()]
        rows = [row for row in answers(task, settings, model, own, how) if SKIPPED not in row]
        kind = find_kind(task.kind, task.config.part)
        dropped = {"masks", "true_masks"} - {*kind.fields}  # large, and most metrics need their scores alone
        rows = [{name: value for name, value in row.items() if name not in dropped} for row in rows]
        shared = of_every_process(f"eval/{task.name}/{step}", json.dumps(rows))
        everyone = sorted((row for part in shared for row in json.loads(part)), key=lambda row: row["record"])
        cut_off = count_cut_off(everyone)
        if cut_off and jax.process_index() == 0:
            place = f"step {step}, {task.name}: {cut_off} of {len(everyone)} answers"
            log.warning("%s were cut off after eval.max_new_tokens=%d tokens", place, settings.max_new_tokens)
        return metrics.values(kind.statistics(everyone, "exact")) if everyone else {}


def tasks_to_answer(config: ExperimentConfig) -> list[TaskConfig]:
    """The tasks of `eval.sources` that `train.eval_tasks` names. ValueError for a name that no source has."""
    named = {source_name(source): source for source in config.eval.sources}
    if unknown := [name for name in config.train.eval_tasks if name not in named]:
        raise ValueError(f"train.eval_tasks {unknown[0]!r} is not one of eval.sources, expected one of {sorted(named)}")
    return [TaskConfig(name, named[name], config.data.root) for name in config.train.eval_tasks]


def source_name(source: str) -> str:
    """An annotation file's name without its suffix; of a dataset, FOLDER#SPLIT, the folder's and the split's name."""
    if is_dataset(source):
        return os.path.basename(os.path.normpath(source)).replace("#", "-")
    return Path(source).stem
