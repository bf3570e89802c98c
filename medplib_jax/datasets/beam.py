"""Shards made by Apache Beam (extra [beam]): by its local runner, Flink, Dataflow or any other.

Only numbers travel through Beam. What is to be made of which shard, and what came of it, lies in files of one folder
that all workers see under the same path, as they see the data. So a job is small however large the data is, and a run
that was killed goes on with the shards that were finished.
"""

import hashlib
import importlib.util
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from medplib_jax.datasets.files import replace

JOB = "job.pickle"


def check(runner: str) -> None:
    """ValueError where Beam is not installed, or has no such runner."""
    if importlib.util.find_spec("apache_beam") is None:
        raise ValueError(f"--beam_runner={runner}: Apache Beam is not installed here: pip install 'medplib_jax[beam]'")
    from apache_beam.runners.runner import create_runner

    try:
        create_runner(runner)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(f"--beam_runner={runner}: {error}") from error


def map_shards(make: Callable, shards: Sequence, runner: str, options: Sequence[str], keeping) -> Iterator[Any]:
    """See `processes.map_shards`. The folder is removed when all results have been taken."""
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    os.makedirs(keeping.folder, exist_ok=True)
    replace(os.path.join(keeping.folder, JOB), pickle.dumps((make, keeping.key, keeping.whole)))
    for number, shard in enumerate(shards):
        replace(_shard_file(keeping.folder, number), pickle.dumps(shard))
    logging.getLogger("apache_beam").setLevel(logging.WARNING)  # it tells of each of its threads
    try:
        with beam.Pipeline(runner=runner, options=PipelineOptions(list(options))) as pipeline:
            numbers = pipeline | beam.Create(range(len(shards))) | beam.Reshuffle()
            numbers | beam.Map(make_shard, keeping.folder)
    except Exception as error:  # of many types; what happened on a worker stands at the end of a long text
        last = [line for line in str(error).splitlines() if line.strip()][-1:]
        raise RuntimeError(f"--beam_runner={runner}: {' '.join(last) or type(error).__name__}") from error
    for number in range(len(shards)):
        with open(_result_file(keeping.folder, number), "rb") as file:
            yield pickle.load(file)[1]
    shutil.rmtree(keeping.folder)


def make_shard(number: int, folder: str) -> None:
    """On a worker: makes shard `number`, unless an earlier run has made it of the same."""
    with open(os.path.join(folder, JOB), "rb") as file:
        make, key, whole = pickle.load(file)
    with open(_shard_file(folder, number), "rb") as file:
        content = file.read()
    shard = pickle.loads(content)
    wanted = key and hashlib.sha256(key(shard).encode()).hexdigest()
    if not (wanted and _is_made(_result_file(folder, number), wanted, whole)):
        replace(_result_file(folder, number), pickle.dumps((wanted, make(shard))))


def _is_made(file: str, wanted: str, whole: Callable[..., bool] | None) -> bool:
    if not os.path.exists(file):
        return False
    with open(file, "rb") as content:
        key, result = pickle.load(content)
    return key == wanted and (whole is None or whole(result))


def _shard_file(folder: str, number: int) -> str:
    return os.path.join(folder, f"{number:08d}.shard")


def _result_file(folder: str, number: int) -> str:
    return os.path.join(folder, f"{number:08d}.result")
