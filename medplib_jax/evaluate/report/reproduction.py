"""The report's block on reproduction: what was run, on what, with which data and weights."""

from collections.abc import Iterator

from medplib_jax.evaluate.metrics.resampling import BOOTSTRAPS, PERMUTATIONS
from medplib_jax.evaluate.report.paths import shorten
from medplib_jax.evaluate.report.sweep_load import Sweep

RESAMPLING = (
    f"{BOOTSTRAPS:,} bootstrap resamples and {PERMUTATIONS:,} permutations; seeds are the CRC-32 of TASK/PROTOCOL, and "
    "that plus one"
)


def reproduction(sweep: Sweep) -> list[tuple[str, str, str]]:
    """(what, which, value) of everything that the figures follow from; paths say nothing of whose they are."""
    return [(what, which, shorten(value)) for what, which, value in _facts(sweep) if value]


def _facts(sweep: Sweep) -> Iterator[tuple[str, str, str]]:
    for run in sweep.runs:
        yield "command", run.date, run.command
        yield "machine", run.date, f"{run.machine}, {run.devices}"
        yield "commit", run.date, run.commit
        yield "versions", run.date, ", ".join(f"{name} {version}" for name, version in run.versions.items())
    for task in sweep.tasks:
        yield "data", task.name, f"{task.file}, SHA-256 {task.content or 'not known'}"
        yield "guesses from", task.name, task.examples or "the task itself (no training file is known)"
    for entry in sweep.checkpoints:
        if entry.name not in sweep.naive:
            yield "weights", entry.name, entry.weights or "not known"
    for own in sweep.own_metrics:
        yield "own metric", own.name, f"{own.file}, SHA-256 {own.content}"
    yield "statistics", "", RESAMPLING
    yield "decoding", "", "greedy: no seed"
