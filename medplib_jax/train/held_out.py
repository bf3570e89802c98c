"""The loss on held-out records while a run trains."""

import dataclasses
import itertools

import jax
import numpy as np
from jax.sharding import Mesh

from medplib_jax.batch import Batch, Params
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.data.pipeline import eval_batches, make_loader
from medplib_jax.parallel.sharding import process_rows, put_batch
from medplib_jax.train.losses import MASK_TERMS
from medplib_jax.train.step import abstract_model, make_loss_sums

TERMS = ("ce", *MASK_TERMS)


class HeldOutLoss:
    """(parameters, step) -> the loss and its terms on `train.eval_records` records of each of `eval.sources`.

    The parameters stay where training has them, and every process reads its rows of each batch. A term is the mean over
    all label positions, or over all masks, whatever batches they are in. Records that cannot be used are left out.
    """

    def __init__(self, config: ExperimentConfig, mesh: Mesh):
        if not config.eval.sources:
            raise ValueError("train.eval_every asks for evaluation, but eval.sources names no annotation file")
        own = {"sources": config.eval.sources, "weights": (), "pack": False, "on_error": "skip"}
        data = dataclasses.replace(config.data, **own)
        self._loader = make_loader(data, config.model, data.root or None)
        self._config, self._mesh = config, mesh
        self._rows = process_rows(mesh, data.batch_size)
        self._sums = jax.jit(make_loss_sums(abstract_model(config.model, config.sharding), config))

    def __call__(self, params: Params, step: int) -> dict[str, float]:
        size, totals = self._config.data.batch_size, []
        for arrays, _ in eval_batches(self._loader, self._records(), size, self._rows, question=False, workers=0):
            totals.append(self._sums(params, put_batch(Batch(**arrays), self._mesh, size)))
        sums, counts = jax.tree.map(lambda *values: np.sum(values, dtype=np.float64), *jax.device_get(totals))
        means = {name: sums[name] / counts[name] for name in TERMS}
        loss = sum(getattr(self._config.loss, name) * value for name, value in means.items())
        return {f"eval/{name}": float(value) for name, value in {"loss": loss, **means}.items()}

    def _records(self) -> list[int]:
        """The first `train.eval_records` of every source, numbered through all of them."""
        wanted, starts = self._config.train.eval_records, self._loader.starts
        return [i for first, end in itertools.pairwise(starts) for i in range(first, min(end, first + wanted))]
