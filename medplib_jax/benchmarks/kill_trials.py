"""Kills training runs at random moments and checks that each goes on, bit for bit, as if nothing had happened.

    python -m medplib_jax.benchmarks.kill_trials --trials 20 --processes 2      # from the repository's root; about half a minute each

Every trial starts the smallest run (tiny_run.py) by launch/local_multiprocess.py, sends SIGKILL to one process or to all, while it starts,
trains or writes a checkpoint, and lets the launcher start it again. Expected: loss and gradient norm of every step, and every
array of the last checkpoint, equal those of a run that was left alone; no step is resumed from that was not complete. The exit code is
1 when a trial is not so.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from medplib_jax.benchmarks import tiny_run
from medplib_jax.train.metrics_log import read_metrics

ROOT = Path(__file__).parents[2]
COMPILE_FAST = "--xla_backend_optimization_level=0"


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
        """A process that lived on may have completed a step that was half-written; otherwise none of those may be gone on from."""
        usable = self.saved if self.victim == "all" else self.saved + self.half_written
        return self.same and set(self.resumed[:1]) <= set(usable)


def start(folder: Path, workdir: Path, processes: int, steps: int) -> subprocess.Popen:
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
        str(processes),
        "--devices",
        "1",
        "--max-restarts",
        "10",
        "--",
    ]
    config = f"--config={tiny_run.__file__}:{folder}"
    command = [
        sys.executable,
        "-m",
        "medplib_jax.train",
        config,
        f"--workdir={workdir}",
        f"--config.mesh.fsdp={processes}",
    ]
    return subprocess.Popen(
        [*launcher, *command, f"--config.train.steps={steps}", "--config.train.keep=100"],
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


def wait_until(moment: str, process: subprocess.Popen, workdir: Path, steps: int, rng: random.Random) -> None:
    """Until a random moment of starting, of a random step, or of the writing of a random checkpoint; or until the run ends."""
    step, complete = rng.randrange(steps), rng.randrange(steps // 3)
    reached = {
        "starting": lambda: True,
        "training": lambda: len(read_metrics(str(workdir))) >= step,
        "saving": lambda: half_written(workdir) and len(steps_in(workdir)) >= complete,
    }[moment]
    while process.poll() is None and not reached():
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 10 if moment == "starting" else 0.1))


def trial(folder: Path, name: str, processes: int, steps: int, expected: tuple, rng: random.Random) -> Trial | None:
    """One run that is killed once; None when it was over before it could be."""
    victim, moment = rng.choice(["one", "all"]), rng.choice(["starting", "training", "training", "saving", "saving"])
    workdir = folder / name
    began = time.perf_counter()
    process = start(folder, workdir, processes, steps)
    wait_until(moment, process, workdir, steps, rng)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", help="folder for the runs and their output, which stay there; default: a temporary one"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.out or temporary)
        tiny_run.prepare(str(folder))
        if start(folder, folder / "alone", given.processes, given.steps).wait():
            raise SystemExit(f"{folder}/alone.log: the run that nobody kills failed")
        expected = outcome(folder / "alone")
        rng, trials, number = random.Random(given.seed), [], 0
        while len(trials) < given.trials:
            number += 1
            if one := trial(folder, f"trial{number}", given.processes, given.steps, expected, rng):
                trials.append(one)
                print(f"{'ok  ' if one.good else 'BAD '} {one}", flush=True)
    print(
        f"{sum(one.good for one in trials)} of {len(trials)} go on bit for bit; in {sum(bool(one.half_written) for one in trials)} a checkpoint was half-written"
    )
    return 0 if all(one.good for one in trials) else 1


if __name__ == "__main__":
    sys.exit(main())
