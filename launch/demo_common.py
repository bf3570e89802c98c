"""What the demonstrations share: training, the sweep's report, time and memory used, headings, the table at the end."""

import contextlib
import json
import resource
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax

from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.evaluate.provenance import note_run
from medplib_jax.evaluate.report.sweep import write_sweep_report
from medplib_jax.evaluate.rescore import rescore
from medplib_jax.train.loop import train

MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss


class Stopwatch:
    """Seconds of the main job and its memory peak, summed over interrupted runs in a file."""

    def __init__(self, file: Path):
        self._file = file
        self._before = {"wall_seconds": 0.0, "peak_rss_gb": 0.0}
        self._before |= json.loads(file.read_text()) if file.exists() else {}
        self._start = time.perf_counter()

    def read(self) -> dict[str, float]:
        peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return {
            "wall_seconds": self._before["wall_seconds"] + time.perf_counter() - self._start,
            "peak_rss_gb": max(self._before["peak_rss_gb"], peak * MAXRSS_BYTES / 2**30),
        }

    def save(self) -> None:
        self._file.write_text(json.dumps(self.read()))


def train_stage(experiment: ExperimentConfig, workdir: Path) -> int:
    """Trains to the end; the demonstration's exit status: 0, or 130 or 143 when a signal interrupted it."""
    with contextlib.redirect_stdout(sys.stderr):
        interrupted = train(experiment, str(workdir))["interrupted"]
    return {None: 0, signal.SIGINT: 130}.get(interrupted, 143)


def report_sweep(evaluation: Path) -> Path:
    """Scores the answers of a sweep that was run here in both protocols; the page that it writes."""
    note_run(evaluation, jax.devices()[0].device_kind)
    rescore(evaluation)
    return write_sweep_report(evaluation)


def announce(title: str) -> None:
    print(f"\n=== {title}", file=sys.stderr, flush=True)


def print_summary(title: str, metrics: Mapping[str, float], page: Path) -> None:
    print(f"\n{title}")
    for name, value in metrics.items():
        print(f"  {name:28} {value:10.3f}")
    print(f"\nReport: {page}")
