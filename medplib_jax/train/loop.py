"""The training loop: from a config and its data to checkpoints."""

import collections
import dataclasses
import json
import logging
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from medplib_jax import checkpoint
from medplib_jax.batch import Batch, Params
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.data.errors import DataError, Notice
from medplib_jax.data.pipeline import BatchPlan, Loader, make_loader, train_batches
from medplib_jax.data.tokenizers import load_tokenizer
from medplib_jax.models.layers import draw_params, model_shardings, params_of
from medplib_jax.models.whole import WholeModel
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.parallel.processes import Agreement, Watchdog, abort_together, of_process_0, wait_for_others
from medplib_jax.parallel.sharding import batch_sharding, process_rows, put_batch
from medplib_jax.train.flops import chip_of_device, mfu, step_flops
from medplib_jax.train.metrics_log import Clock, MetricWriter, read_metrics
from medplib_jax.train.optim import make_optimizer, make_schedule, partition
from medplib_jax.train.signals import StopSignal
from medplib_jax.train.stages import hand_over
from medplib_jax.train.state import TrainState
from medplib_jax.train.step import CompiledStep, abstract_model, make_state, make_train_step, place, state_shardings

log = logging.getLogger("medplib_jax.train")  # not __name__: the module is also run by python -m


def train(config: ExperimentConfig, workdir: str) -> dict[str, Any]:
    """Trains until done, interrupted or a loss is not finite; returns the last metrics, "step" and "interrupted" (a signal or None).

    Raises ValueError for a config that does not fit the data, the mesh or the checkpoint in `workdir`, FloatingPointError for
    a loss that is not finite (naming step and records), DataError for a bad record with data.on_error "raise". With several
    processes an error in one ends all of them at once.
    """
    with (
        checkpoint.make_manager(workdir, config.train.keep, config.train.keep_best) as manager,
        StopSignal() as stop,
        abort_together(),
        Watchdog(config.train.hang_seconds) as watchdog,
    ):
        check_shared(manager)
        last = checkpoint.step_to_resume(manager)
        if last is not None and finished(manager, last, config):
            log.warning("%s is finished (step %d)", workdir, last)
            return {"interrupted": None, **read_metrics(workdir)[-1]}
        return Run(config, workdir, manager, last).loop(stop, watchdog)


class Run:
    """Everything that one call of `train` holds: data, mesh, compiled step and state."""

    def __init__(self, config: ExperimentConfig, workdir: str, manager: ocp.CheckpointManager, last: int | None):
        self.config, self.workdir, self.manager = config, workdir, manager
        self.clock = Clock()
        self.mesh = make_mesh(config.mesh)
        self.rows = process_rows(self.mesh, config.data.batch_size)
        self.reads_first = reads_first(self.mesh, config.data.batch_size)
        self.agree = Agreement(self.mesh)
        check_tokenizer(config)
        self.loader, self.plan, self.skipped = self._read_sources()
        wait_for_others("data_planned")
        self.total_steps = config.train.steps or math.ceil(config.train.epochs * self.plan.steps_per_epoch)

        self.model = abstract_model(config.model, config.sharding)
        trainable, _ = partition(params_of(self.model), config.optim.trainable)
        schedule = make_schedule(config.optim, self.total_steps, self.plan.steps_per_epoch)
        self.tx = make_optimizer(config.optim, schedule, trainable)
        self.shardings = state_shardings(self.model, config, self.tx, self.mesh)
        self.step = CompiledStep(make_train_step(self.model, config, self.tx, schedule), self.shardings)
        self.start, self.state = (0, self._start()) if last is None else self._resume(last)
        self.losses: list[float] = []  # since the last checkpoint
        self.flops: dict[int, float] = {}  # bucket length -> model FLOPs of a step, where that says something
        log.info(
            "%.2f of %.2f million parameters train; steps %d to %d",
            _count(trainable) / 1e6,
            _count(params_of(self.model)) / 1e6,
            self.start,
            self.total_steps,
        )

    def _read_sources(self) -> tuple[Loader, BatchPlan, "SkippedRecords"]:
        loader = make_loader(self.config.data, self.config.model, self.config.data.root or None)
        plan, problems = loader.plan(self.config.train.seed)
        skipped = SkippedRecords(self.workdir)
        if jax.process_index() == 0:  # every process found the same ones
            skipped.add(problems)
        return loader, plan, skipped

    def _start(self) -> TrainState:
        placed = model_shardings(self.model, self.mesh)
        params = place(starting_params(self.config, self.model), placed)
        return jax.jit(lambda p: make_state(p, self.config, self.tx), out_shardings=self.shardings)(params)

    def _resume(self, last: int) -> tuple[int, TrainState]:
        """(step, state) of the newest checkpoint, `last` unless that is damaged."""
        saved, _ = checkpoint.read_experiment(self.manager, last)
        check_resumable(saved, self.config)
        shapes = jax.eval_shape(lambda p: make_state(p, self.config, self.tx), params_of(self.model))
        like = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, self.shardings
        )
        step, state = checkpoint.restore_newest(self.manager, like)
        log.info("resuming %s from step %d", self.workdir, step)
        return step, state

    def loop(self, stop: "StopSignal", watchdog: Watchdog) -> dict[str, Any]:
        config = self.config.train
        batches = train_batches(
            self.loader, self.plan, self.rows, self.start, self.total_steps, self.config.data.workers
        )
        writer = MetricWriter(self.workdir, self.start)
        late, last, saved = LateMetrics(self), {"step": self.start}, self.start
        bar = tqdm(
            total=self.total_steps, initial=self.start, desc="train", disable=jax.process_index() > 0, mininterval=1.0
        )
        step = self.start
        self.clock.begin_training()
        while step < self.total_steps and not stop.requested(step - self.start + 1):
            watchdog.beat()
            batch = self._next(batches, stop)
            if batch is None:
                break
            compiled = len(self.step.compile_seconds)
            self.state, metrics = self.step(self.state, batch)
            if len(self.step.compile_seconds) > compiled:
                self.clock.lose(self.step.compile_seconds[batch.tokens.shape[1]])
                if chip_of_device(jax.devices()[0]):
                    self.flops[batch.tokens.shape[1]] = step_flops(self.config, batch)
            step += 1
            late.add(
                step, metrics | self.feeding | self.agree(stop.signal or 0, self.skipped.count), batch.tokens.shape
            )
            for row in late.ready(keep=1):
                last = self._report(row, writer, bar)
                stop.agreed = late.stop
            if step % config.checkpoint_every == 0 or step == self.total_steps:
                last, saved = self._save(late, writer, bar, saved) or last, step
            bar.update()
        if saved < step:
            last, saved = self._save(late, writer, bar, saved) or last, step
        if saved > self.start:
            checkpoint.log_saved(self.manager, saved)
        bar.close()
        writer.close()
        interrupted = stop.reason()
        if interrupted:
            log.warning(
                "%s: step %d of %d is saved; run the same command to resume",
                signal.Signals(interrupted).name,
                step,
                self.total_steps,
            )
        return last | {"interrupted": interrupted}

    def _next(self, batches: Iterator, stop: "StopSignal") -> Batch | None:
        """The next batch on the devices; None when Ctrl-C ended the worker processes that would have read it."""
        began = time.perf_counter()
        try:
            arrays, skipped = next(batches)
        except Exception:
            if stop.signal is None or jax.process_count() > 1:
                raise
            return None
        self.feeding = {"data_wait": time.perf_counter() - began, "padding": 1.0 - float(arrays["valid"].mean())}
        if self.reads_first:
            self.skipped.add(skipped)
        return put_batch(Batch(**arrays), self.mesh, self.config.data.batch_size)

    def _report(self, row: dict[str, float], writer: MetricWriter, bar: tqdm) -> dict[str, float]:
        bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        self.losses.append(row["loss"])
        if row["step"] % self.config.train.log_every == 0 or row["step"] == self.total_steps:
            writer.write(row["step"], {name: value for name, value in row.items() if name != "step"})
        return row

    def _save(self, late: "LateMetrics", writer: MetricWriter, bar: tqdm, saved: int) -> dict[str, float] | None:
        """Saves the state, after every metric up to now was seen to be finite; returns the last of them. Step `saved` was saved before."""
        rows = [self._report(row, writer, bar) for row in late.ready(keep=0)]
        if saved > self.start:
            checkpoint.log_saved(self.manager, saved)
        checkpoint.save(self.manager, self.state, self.config, self.total_steps, float(np.mean(self.losses)))
        self.losses.clear()
        return rows[-1] if rows else None


class LateMetrics:
    """Metrics wait on the device until the next step is under way, so that reading them does not stop the device."""

    def __init__(self, run: Run):
        self.stop: int | None = None  # the signal on which some process was to stop, as of the newest row
        self._run = run
        self._waiting: collections.deque = collections.deque()

    def add(self, step: int, metrics: dict[str, jax.Array], shape: tuple[int, int]) -> None:
        self._waiting.append((step, metrics, shape))

    def ready(self, keep: int) -> Iterator[dict[str, float]]:
        """Rows of all but the newest `keep` steps. FloatingPointError when a loss or gradient is not finite."""
        while len(self._waiting) > keep:
            step, metrics, shape = self._waiting.popleft()
            row = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self.stop = int(row.pop("stop")) or None
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                raise FloatingPointError(self._describe(step, row))
            yield {"step": step, **row, **self._speed(row, shape)}

    def _speed(self, row: dict[str, float], shape: tuple[int, int]) -> dict[str, float]:
        seconds = self._run.clock.seconds_per_step()
        speed = {
            "seconds_per_step": seconds,
            "tokens_per_second": row["tokens"] / seconds,
            "examples_per_second": shape[0] / seconds,
            "goodput": self._run.clock.goodput(),
        }
        used = mfu(self._run.flops.get(shape[1], 0.0), seconds)
        return speed if used is None else speed | {"mfu": used}

    def _describe(self, step: int, row: dict[str, float]) -> str:
        _, indices = self._run.plan.batch(step - 1)
        records = [self._run.loader.record(index) for number in indices for index in self._run.plan.records(number)]
        names = ", ".join(f"{record.file}[{record.index}]" for record in records)
        terms = ", ".join(
            f"{name} {row[name]}" for name in ("loss", "ce", "dice", "bce", "focal", "iou", "aux", "grad_norm")
        )
        return f"step {step}: not finite: {terms}; its batch holds the records {names}"


class SkippedRecords:
    """Names the records that could not be used, which are counted, and the odd ones that were, in skipped.<process>.jsonl."""

    def __init__(self, workdir: str):
        self._path = epath.Path(workdir) / f"skipped.{jax.process_index()}.jsonl"
        self.count = 0

    def add(self, errors: list[DataError]) -> None:
        self.count += sum(not isinstance(error, Notice) for error in errors)
        if not errors:
            return
        with self._path.open("a") as file:
            for error in errors:
                log.warning("%s %s", "used" if isinstance(error, Notice) else "skipped", error)
                file.write(json.dumps(error.as_dict()) + "\n")


def check_shared(manager: ocp.CheckpointManager) -> None:
    """ValueError when this process does not find the checkpoints that process 0 finds: several hosts need one workdir."""
    if not epath.Path(manager.directory).exists():
        raise ValueError(
            f"{manager.directory}: process {jax.process_index()} does not see it; several hosts need a workdir that all share"
        )
    mine = str(manager.latest_step())
    first = of_process_0("newest_step", mine)
    if mine != first:
        raise ValueError(
            f"{manager.directory}: the newest step is {first} for process 0, {mine} for process {jax.process_index()}; several hosts need a workdir that all share"
        )


def reads_first(mesh: Mesh, batch_size: int) -> bool:
    """Whether no process before this one loads the same rows, as tensor peers do."""
    first_row = {
        device: index[0].start for device, index in batch_sharding(mesh).devices_indices_map((batch_size,)).items()
    }
    mine = {row for device, row in first_row.items() if device.process_index == jax.process_index()}
    return all(device.process_index >= jax.process_index() for device, row in first_row.items() if row in mine)


def finished(manager: ocp.CheckpointManager, last: int, config: ExperimentConfig) -> bool:
    """Whether the run in this workdir came to its end; asking for more steps or epochs than it had continues it."""
    saved, total_steps = checkpoint.read_experiment(manager, last)
    return last >= total_steps and (saved.train.steps, saved.train.epochs) == (config.train.steps, config.train.epochs)


def check_tokenizer(config: ExperimentConfig) -> None:
    checkpoint.tokenizer_files(config.data.tokenizer)
    size = load_tokenizer(config.data.tokenizer).vocab_size
    if size != config.model.llm.vocab_size:
        raise ValueError(
            f"model.llm.vocab_size is {config.model.llm.vocab_size}, but data.tokenizer {config.data.tokenizer!r} has {size} tokens"
        )


def check_resumable(saved: ExperimentConfig, config: ExperimentConfig) -> None:
    """ValueError when model or trainable set differ from the checkpoint's; other changes are logged."""
    changes = {
        name: (old, new) for name, old, new in _differences(dataclasses.asdict(saved), dataclasses.asdict(config))
    }
    fixed = {
        name: change
        for name, change in changes.items()
        if name.startswith(("model.", "optim.trainable", "optim.frozen_dtype", "init.stage"))
    }
    if fixed:
        listed = "; ".join(f"{name}: {old!r} in the checkpoint, {new!r} now" for name, (old, new) in fixed.items())
        raise ValueError(f"the workdir's checkpoint cannot be resumed with this config: {listed}")
    for name, (old, new) in changes.items():
        log.warning("resuming with another %s: %r instead of %r", name, new, old)


def _differences(saved: dict, config: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key, old in saved.items():
        if isinstance(old, dict):
            yield from _differences(old, config[key], f"{prefix}{key}.")
        elif old != config[key]:
            yield f"{prefix}{key}", old, config[key]


def starting_params(config: ExperimentConfig, model: WholeModel) -> Params:
    """Random parameters, or those that the stage takes over from the checkpoints of `init`; on the host."""
    fresh = draw_params(model, config.train.seed)
    if not config.init.base:
        return fresh
    base = checkpoint.load_params(config.init.base)[:2]
    grounding = checkpoint.load_params(config.init.grounding)[:2] if config.init.grounding else None
    return hand_over(config, fresh, base, grounding)


def _count(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
