"""Runs that are killed at random moments go on, bit for bit, as if nothing had happened.

Every trial starts a smallest run (`tests.tiny_run`, `tests.tiny_bird_run`) by launch/local_multiprocess.py, sends
SIGKILL to one process or to all of them, while it starts, trains or writes a checkpoint, and lets the launcher start it
again. Half a minute each.
"""

import dataclasses
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from medplib_jax.train.metrics_log import read_metrics
from tests import tiny_bird_run, tiny_run
from tests.paths import ROOT

TRIALS, PROCESSES, STEPS = {tiny_run: 20, tiny_bird_run: 4}, 2, 18
COMPILE_FAST = "--xla_backend_optimization_level=0"


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable[[ModuleType], tuple[Path, tuple]]:
    """Of a run: a folder with its data, and what it comes to when nobody kills it."""

    @functools.cache
    def prepared(run: ModuleType) -> tuple[Path, tuple]:
        folder = tmp_path_factory.mktemp("kills")
        run.prepare(str(folder))
        assert start(run, folder, folder / "alone").wait() == 0, (folder / "alone.log").read_text()
        return folder, outcome(folder / "alone")

    return prepared


@pytest.mark.slow
@pytest.mark.parametrize(("run", "seed"), [(run, seed) for run, trials in TRIALS.items() for seed in range(trials)])
def test_a_killed_run_goes_on_bit_for_bit(alone, run, seed):
    """Loss and gradient norm of every step and every array of the last checkpoint; no step is resumed from that was not
    whole."""
    (folder, expected), rng, number = alone(run), random.Random(seed), 0
    while (found := trial(run, folder, f"trial{seed}_{number}", expected, rng)) is None:
        number += 1
    assert found.good, found


@dataclasses.dataclass
class Trial:
    """What was killed when, and what came of it."""

    victim: str  # "one" or "all"
    moment: str  # "starting", "training" or "saving"
    saved: list[int]  # steps that were complete when the signals went out
    half_written: list[int]  # steps that were being written
    resumed: list[int]  # steps that were gone on from
    seconds: float
    same: bool

    @property
    def good(self) -> bool:
        """A process that lived on may have completed a step that was half-written; otherwise none of those may be gone
        on from."""
        usable = self.saved if self.victim == "all" else self.saved + self.half_written
        return self.same and set(self.resumed[:1]) <= set(usable)


def start(run: ModuleType, folder: Path, workdir: Path) -> subprocess.Popen:
    variables = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": f"{COMPILE_FAST} {os.environ.get('XLA_FLAGS', '')}".strip(),
    }
    launcher = [
        sys.executable,
        "-m",
        "launch.local_multiprocess",
        "--processes",
        str(PROCESSES),
        "--devices",
        "1",
        "--max-restarts",
        "10",
        "--",
    ]
    config = f"--config={run.__file__}:{folder}"
    command = [
        sys.executable,
        "-m",
        "medplib_jax.train",
        config,
        f"--workdir={workdir}",
        f"--config.mesh.fsdp={PROCESSES}",
    ]
    return subprocess.Popen(
        [*launcher, *command, f"--config.train.steps={STEPS}", "--config.train.keep=100"],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=(workdir.parent / f"{workdir.name}.log").open("w"),
        stderr=subprocess.STDOUT,
    )


def outcome(workdir: Path) -> tuple:
    """Loss and gradient norm of every step, and the sums over the bits of every array of the last checkpoint."""
    rows = [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(str(workdir))]
    newest = max(steps_in(workdir))
    return rows, json.loads((workdir / "checkpoints" / str(newest) / "experiment" / "metadata").read_text())["bit_sums"]


def steps_in(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())


def half_written(workdir: Path) -> list[int]:
    return [int(path.name.split(".")[0]) for path in workdir.glob("checkpoints/*-tmp*")]


def wait_until(moment: str, process: subprocess.Popen, workdir: Path, rng: random.Random) -> None:
    """Until a random moment of starting, of a random step, or of the writing of a random checkpoint; or until the run
    ends."""
    step, complete = rng.randrange(STEPS), rng.randrange(STEPS // 3)
    reached = {
        "starting": lambda: True,
        "training": lambda: len(read_metrics(str(workdir))) >= step,
        "saving": lambda: half_written(workdir) and len(steps_in(workdir)) >= complete,
    }[moment]
    while process.poll() is None and not reached():
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 10 if moment == "starting" else 0.1))


def trial(run: ModuleType, folder: Path, name: str, expected: tuple, rng: random.Random) -> Trial | None:
    """One run that is killed once; None when it was over before it could be."""
    victim, moment = rng.choice(["one", "all"]), rng.choice(["starting", "training", "training", "saving", "saving"])
    workdir = folder / name
    began = time.perf_counter()
    process = start(run, folder, workdir)
    wait_until(moment, process, workdir, rng)
    victims = psutil.Process(process.pid).children() if process.poll() is None else []
    for child in victims if victim == "all" else rng.sample(victims, min(1, len(victims))):
        child.send_signal(signal.SIGKILL)
    saved, unfinished = steps_in(workdir), half_written(workdir)
    code = process.wait()
    if not victims:
        return None
    resumed = [
        int(step) for step in re.findall(r"\[0\].*resuming .* from step (\d+)", Path(f"{workdir}.log").read_text())
    ]
    same = code == 0 and outcome(workdir) == expected
    return Trial(victim, moment, saved, unfinished, resumed, time.perf_counter() - began, same)
