"""Fills `data.cache` before a run, so that the first epoch reads as fast as later ones.

It runs on any machine that shares the folder.

COMMAND
    python -m medplib_jax.datasets.fill_cache --config=configs/stage2_vqa.py --config.data.cache=/shared/cache \\
        --workers=16

The config is the run's. The cache knows files by path, size and time, so both machines must see them under the same
paths. An interrupted fill goes on where it was. Records that cannot be used are named; with data.on_error=raise the
first one ends it.
"""

import functools
import logging
from collections.abc import Iterator

from absl import app, flags
from tqdm import tqdm

from medplib_jax.config.base import from_config_dict
from medplib_jax.config.experiment import DataConfig, ExperimentConfig
from medplib_jax.config.files import define_config
from medplib_jax.config.model import ModelConfig
from medplib_jax.data.errors import DataError, Notice
from medplib_jax.data.pipeline import Loader, make_loader
from medplib_jax.datasets.processes import Workers, map_shards

CHUNK = 32  # records per task of a worker process
log = logging.getLogger("medplib_jax.data")


def fill_cache(data: DataConfig, model: ModelConfig, workers: int) -> dict[str, int]:
    """Prepares every record; returns how many there are, were unusable, or odd. ValueError without `data.cache`."""
    if not data.cache:
        raise ValueError("data.cache is empty: expected the folder to fill")
    loader = _loader(data, model)
    _, problems = loader.plan(seed=0)  # keeps the lengths of all texts
    known = {(problem.file, problem.record) for problem in problems}
    chunks = [range(start, min(start + CHUNK, len(loader))) for start in range(0, len(loader), CHUNK)]
    with tqdm(total=len(loader), desc="cache", unit=" records") as bar:
        for chunk, found in zip(chunks, _prepare_all(data, model, chunks, workers), strict=True):
            bar.update(len(chunk))
            problems += [
                problem
                for problem in found
                if isinstance(problem, Notice) or (problem.file, problem.record) not in known
            ]
    for problem in problems:
        log.warning("%s %s", "used" if isinstance(problem, Notice) else "unusable", problem)
    odd = sum(isinstance(problem, Notice) for problem in problems)
    return {"records": len(loader), "unusable": len(problems) - odd, "odd": odd}


def _prepare_all(data: DataConfig, model: ModelConfig, chunks: list[range], workers: int) -> Iterator[list[DataError]]:
    prepare = functools.partial(_prepare, data, model)
    return map_shards(prepare, chunks, Workers(workers))


def _prepare(data: DataConfig, model: ModelConfig, indices: range) -> list[DataError]:
    loader = _loader(data, model)
    return [problem for index in indices for problem in loader.prepare(index)]


@functools.lru_cache(maxsize=1)
def _loader(data: DataConfig, model: ModelConfig) -> Loader:
    return make_loader(data, model, data.root or None, cache_bytes=0)


def main() -> None:
    config = define_config("configs/NAME.py:SIZE of the run, or NAME:SIZE of one that comes with the package")
    workers = flags.DEFINE_integer("workers", None, "processes; 0: this one only", required=True)
    flags.mark_flag_as_required("config")

    def run(_) -> int:
        experiment = from_config_dict(config.value, ExperimentConfig)
        try:
            print(fill_cache(experiment.data, experiment.model, workers.value))
        except ValueError as error:  # DataError among them
            print(error)
            return 1
        return 0

    app.run(run)


if __name__ == "__main__":
    main()
