"""The training loop: from a config and its data to checkpoints."""

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from tqdm import tqdm

from medplib_jax import checkpoint
from medplib_jax.batch import Batch, Params, combine
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.data.pipeline import BatchPlan, Loader, make_loader, train_batches
from medplib_jax.data.records import Record
from medplib_jax.models.layers import model_shardings, params_of
from medplib_jax.parallel.compilation import compiling_shown
from medplib_jax.parallel.lock import folder_lock
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.parallel.processes import Agreement, Watchdog, abort_together, wait_for_others
from medplib_jax.parallel.sharding import batch_sharding, process_rows, put_batch
from medplib_jax.train.flops import chip_of_device, mfu, step_flops
from medplib_jax.train.metrics_log import Clock, LateMetrics, MetricWriter, SkippedRecords, check_finite, read_metrics
from medplib_jax.train.optim import make_optimizer, make_schedule, partition
from medplib_jax.train.remat import with_policy
from medplib_jax.train.signals import StopSignal
from medplib_jax.train.start import (
    check_resumable,
    check_same_tokenizer,
    check_shared,
    check_tokenizer,
    completed,
    finished,
    starting_params,
)
from medplib_jax.train.state import TrainState, overview
from medplib_jax.train.step import (
    CompiledStep,
    Knobs,
    abstract_model,
    make_state,
    make_train_step,
    place,
    state_shardings,
)
from medplib_jax.train.xprof import StepTrace

log = logging.getLogger("medplib_jax.train")  # not __name__: the module is also run by python -m

LOCK = ".lock"

# (parameters where they lie, step) -> figures on held-out records, `train.keep_best_by` among them
Evaluate = Callable[[Params, int], dict[str, float]]


def train(
    config: ExperimentConfig, workdir: str, make_evaluate: Callable[[ExperimentConfig, Mesh], Evaluate] | None = None
) -> dict[str, Any]:
    """Trains until done, interrupted or a loss is not finite.

    Returns the last metrics, "step" and "interrupted" (a signal or None). `make_evaluate` is called once where
    `train.eval_every` asks for evaluation.

    Raises ValueError for a config that does not fit the data, the mesh or the checkpoint in `workdir`, and for a
    workdir in use. Raises FloatingPointError for a loss that is not finite (naming step and records), DataError for a
    bad record with data.on_error "raise". With several processes an error in one ends all of them at once.
    """
    with (
        abort_together(),
        folder_lock(Path(workdir) / LOCK) if jax.process_index() == 0 else contextlib.nullcontext(),
        checkpoint.make_manager(workdir, config.train.keep, config.train.keep_best) as manager,
        StopSignal() as stop,
        Watchdog(config.train.hang_seconds) as watchdog,
    ):
        check_shared(manager)
        last = checkpoint.step_to_resume(manager)
        if last is not None and finished(manager, last, config):
            log.warning("%s is finished (step %d)", workdir, last)
            return {"interrupted": None, **_last_metrics(workdir, last)}
        return Run(config, workdir, manager, last, make_evaluate).loop(stop, watchdog)


def _last_metrics(workdir: str, step: int) -> dict[str, Any]:
    rows = [row for row in read_metrics(workdir) if row["step"] <= step]
    return rows[-1] if rows else {"step": step}


class Run:
    """What one call of `train` holds, made in the order of its needs: data, mesh, model, compiled step, state."""

    def __init__(
        self,
        config: ExperimentConfig,
        workdir: str,
        manager: ocp.CheckpointManager,
        last: int | None,
        make_evaluate: Callable[[ExperimentConfig, Mesh], Evaluate] | None,
    ):
        self.clock = Clock()
        resumed = None if last is None else checkpoint.read_experiment(manager, last)[0]
        self.config = config = completed(config, workdir, resumed)
        self.workdir, self.manager = workdir, manager
        check_tokenizer(config)
        if resumed:
            check_resumable(resumed, config)
            check_same_tokenizer(f"{manager.directory}/{last}", f"{manager.directory}/{last}/tokenizer", config)
        self.mesh = make_mesh(config.mesh)
        self.feeder = Feeder(config, workdir, self.mesh)
        self.total_steps = self.feeder.total_steps
        wait_for_others("data_planned")

        self.config = config = with_policy(config, self.mesh)
        self.model = abstract_model(config.model, config.sharding)
        trainable, _ = partition(params_of(self.model), config.optim.trainable)
        schedule = make_schedule(config.optim, self.total_steps, self.feeder.plan.steps_per_epoch)
        self.tx = make_optimizer(config.optim, trainable)
        self.shardings = state_shardings(self.model, config, self.tx, self.mesh)
        step = make_train_step(self.model, config, self.tx)
        self.step = CompiledStep(step, self.shardings, Knobs(schedule, config.train.seed))
        self.flops: dict[int, float] = {}  # bucket length -> model FLOPs of a step, where the device has a known peak
        self.start, self.state = (0, self._start()) if last is None else self._resume()
        self.evaluate = make_evaluate(config, self.mesh) if make_evaluate and config.train.eval_every else None
        log.info("parameters\n%s\nsteps %d to %d", overview(self.state), self.start, self.total_steps)
        if self.start >= self.total_steps:
            log.warning(
                "nothing to do: the checkpoint is at step %d, the config ends at %d", self.start, self.total_steps
            )

    def _start(self) -> TrainState:
        placed = model_shardings(self.model, self.mesh)
        params = place(starting_params(self.config, self.model), placed)
        return jax.jit(lambda p: make_state(p, self.config, self.tx), out_shardings=self.shardings)(params)

    def _resume(self) -> tuple[int, TrainState]:
        """(step, state) of the newest checkpoint that is not damaged."""
        shapes = jax.eval_shape(lambda p: make_state(p, self.config, self.tx), params_of(self.model))
        like = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, self.shardings
        )
        step, state = checkpoint.restore_newest(self.manager, like)
        log.info("resuming %s from step %d", self.workdir, step)
        return step, state

    def loop(self, stop: StopSignal, watchdog: Watchdog) -> dict[str, Any]:
        """The steps. Metrics are read one step late; before a checkpoint all of them are read, and were finite."""
        config, agree, step, saved = self.config.train, Agreement(self.mesh), self.start, self.start
        trace = StepTrace(config.profile_steps, f"{self.workdir}/profile")
        with Reports(self, stop) as reports, trace:
            batches = self.feeder.batches(self.start)
            self.clock.begin_training()
            while step < self.total_steps and not stop.requested():
                watchdog.beat()
                batch = self.feeder.next(batches, stop)
                if batch is None:
                    break
                self._compile(batch)
                with trace.step(step), jax.transfer_guard("disallow"):
                    self.state, metrics = self.step(self.state, batch)
                    agreed = agree(stop.signal or 0, self.feeder.skipped.count)
                step += 1
                reports.add(step, metrics | self.feeder.metrics | agreed, batch.tokens.shape)
                if self.evaluate and (step % config.eval_every == 0 or step == self.total_steps):
                    watchdog.beat()
                    reports.add_evaluation(step, self._evaluate(step))
                if step % config.checkpoint_every == 0 or step == self.total_steps:
                    saved = self._save(reports, saved)
                reports.read(keep=1)
            if saved < step:
                saved = self._save(reports, saved)
            if saved > self.start:
                checkpoint.log_saved(self.manager, saved)
        if stop.reason:
            name = signal.Signals(stop.reason).name
            log.warning("%s: step %d of %d is saved; run the same command to resume", name, step, self.total_steps)
        return {"step": step, **reports.last, "interrupted": stop.reason}

    def _compile(self, batch: Batch) -> None:
        """Compiles the step for a bucket that is new."""
        if seconds := self.step.compile(self.state, batch):
            self.clock.lose(seconds)
            if chip_of_device(jax.devices()[0]):
                self.flops[batch.tokens.shape[1]] = step_flops(self.config, batch)

    def _evaluate(self, step: int) -> dict[str, float]:
        began = time.perf_counter()
        jax.block_until_ready(self.state)
        figures = self.evaluate(combine(self.state.trainable, self.state.frozen), step)
        self.clock.lose(time.perf_counter() - began)
        wanted = self.config.train.keep_best_by
        if wanted not in figures:
            raise ValueError(f"train.keep_best_by {wanted!r} was not measured, expected one of {sorted(figures)}")
        return figures

    def _save(self, reports: "Reports", saved: int) -> int:
        """Saves the state, after every metric up to now was seen to be finite. Step `saved` was saved before."""
        reports.read(keep=0)
        if saved > self.start:
            checkpoint.log_saved(self.manager, saved)
        rank = reports.rank(evaluated=self.evaluate is not None)
        checkpoint.save(self.manager, self.state, self.config, self.total_steps, rank)
        return reports.last["step"]


class Feeder:
    """The batches of the training steps, on the devices; and which records could not be used."""

    def __init__(self, config: ExperimentConfig, workdir: str, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._rows = process_rows(mesh, config.data.batch_size)
        self._names_skipped = reads_first(mesh, config.data.batch_size)
        self.skipped = SkippedRecords(workdir)
        self.metrics: dict[str, float] = {}  # of the newest batch
        self.loader: Loader = make_loader(config.data, config.model, config.data.root or None)
        self.plan: BatchPlan
        self.plan, problems = self.loader.plan(config.train.seed)
        if jax.process_index() == 0:  # every process found the same ones
            self.skipped.add(problems)
        self.total_steps = config.train.steps or math.ceil(config.train.epochs * self.plan.steps_per_epoch)
        if self.total_steps < 1:
            asked = f"train.steps {config.train.steps} and train.epochs {config.train.epochs}"
            raise ValueError(f"{asked} give {self.total_steps} steps, expected at least 1")

    def batches(self, start: int) -> Iterator:
        """Host arrays of this process's rows of the steps from `start` on, read ahead."""
        workers = self._config.data.workers
        return train_batches(self.loader, self.plan, self._rows, start, self.total_steps, workers)

    def next(self, batches: Iterator, stop: StopSignal) -> Batch | None:
        """The next batch on the devices; None when Ctrl-C ended the worker processes that would have read it."""
        began = time.perf_counter()
        try:
            arrays, skipped = next(batches)
        except Exception:
            if stop.signal is None or jax.process_count() > 1:
                raise
            return None
        self.metrics = {"data_wait": time.perf_counter() - began, "padding": 1.0 - float(arrays["valid"].mean())}
        if self._names_skipped:
            self.skipped.add(skipped)
        return put_batch(Batch(**arrays), self._mesh, self._config.data.batch_size)

    def records(self, step: int) -> Iterator[Record]:
        """The records of the batch that made step number `step`, counted from 1."""
        _, numbers = self.plan.batch(step - 1)
        return (self.loader.record(index) for number in numbers for index in self.plan.records(number))


def reads_first(mesh: Mesh, batch_size: int) -> bool:
    """Whether no process before this one loads the same rows, as tensor peers do."""
    first_row = {
        device: index[0].start for device, index in batch_sharding(mesh).devices_indices_map((batch_size,)).items()
    }
    mine = {row for device, row in first_row.items() if device.process_index == jax.process_index()}
    return all(device.process_index >= jax.process_index() for device, row in first_row.items() if row in mine)


class Reports:
    """The metrics of the steps, read late, checked, and written to the progress bar and the files.

    With the metrics of a step come the signals that all processes report, which `stop` is told here and nowhere else.
    """

    def __init__(self, run: Run, stop: StopSignal):
        self._run, self._stop = run, stop
        self.last: dict[str, Any] = {"step": run.start}
        self._late, self._losses = LateMetrics(), []  # losses since the last checkpoint
        self._shapes: dict[int, tuple[int, int]] = {}  # step -> rows x positions
        self._evaluations: dict[int, dict[str, float]] = {}
        self._writer = MetricWriter(run.workdir, run.start, run.config)

    def __enter__(self) -> "Reports":
        hidden = jax.process_index() > 0
        total, done = self._run.total_steps, self._run.start
        self._bar = tqdm(total=total, initial=done, desc="train", disable=hidden, mininterval=1.0)
        self._shown = contextlib.ExitStack()
        self._shown.enter_context(compiling_shown(self._bar))
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        with self._writer, self._bar, self._shown:
            # what has been computed is not lost; with several processes it may never come
            if error and not isinstance(error, FloatingPointError) and jax.process_count() == 1:
                with contextlib.suppress(Exception):
                    self.read(keep=0)

    def add(self, step: int, metrics: dict[str, Any], shape: tuple[int, int]) -> None:
        self._late.add(step, metrics)
        self._shapes[step] = shape
        self._bar.update()

    def add_evaluation(self, step: int, figures: dict[str, float]) -> None:
        self._evaluations[step] = figures

    def read(self, keep: int) -> None:
        """Reports all but the newest `keep` steps. FloatingPointError when a loss or gradient is not finite."""
        for step, row in self._late.ready(keep):
            self._stop.hear(int(row.pop("stop")))
            check_finite(step, row, self._run.feeder.records(step))
            figures = self._evaluations.pop(step, {})
            row |= self._speed(row, self._shapes.pop(step)) | figures
            self._losses.append(row["loss"])
            self._bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
            if step % self._run.config.train.log_every == 0 or step == self._run.total_steps or figures:
                self._writer.write(step, row)
            self.last = {"step": step, **row}

    def rank(self, evaluated: bool) -> float | None:
        """What `train.keep_best` ranks a checkpoint of the newest step by, the smaller the better.

        `train.keep_best_by` where the run evaluates (None at a step without), else the mean training loss since the
        last call.
        """
        mean = float(np.mean(self._losses)) if self._losses else None
        self._losses.clear()
        if not evaluated:
            return mean
        config = self._run.config.train
        figure = self.last.get(config.keep_best_by)
        return figure if figure is None or config.keep_best_is == "lowest" else -figure

    def _speed(self, row: dict[str, float], shape: tuple[int, int]) -> dict[str, float]:
        clock, (rows, length) = self._run.clock, shape
        seconds = clock.seconds_per_step()
        speed = {
            "seconds_per_step": seconds,
            "tokens_per_second": row["tokens"] / seconds,
            "examples_per_second": rows / seconds,
            "goodput": clock.goodput(),
        }
        used = mfu(self._run.flops.get(length, 0.0), seconds)
        return speed if used is None else speed | {"mfu": used}
