"""The loss on held-out records against the training step's, with the same parameters."""

import dataclasses

import jax
import pytest

from medplib_jax.batch import Batch
from medplib_jax.config.experiment import EvalConfig, ExperimentConfig, MeshConfig, TrainConfig
from medplib_jax.data.pipeline import make_loader
from medplib_jax.models.layers import bind, draw_params, model_shardings
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.train.held_out import HeldOutLoss
from medplib_jax.train.losses import divisors, total_loss
from medplib_jax.train.step import abstract_model, place
from tests import tiny_run


def test_held_out_loss_is_the_mean_over_all_positions_on_any_mesh(tmp_path):
    """Eleven records in batches of 8 and 3, on one device and on four, against all of them in one batch."""
    tiny_run.prepare(str(tmp_path))
    config = tiny_run.experiment(str(tmp_path))
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, lora=dataclasses.replace(config.model.lora, dropout=0.0)),
        eval=EvalConfig(sources=config.data.sources),
        train=TrainConfig(eval_every=1, eval_records=11),
    )
    model, results = abstract_model(config.model, config.sharding), []
    host = draw_params(model, 0)
    for devices in (1, 4):
        mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.devices()[:devices])
        params = place(host, model_shardings(model, mesh))
        results.append(HeldOutLoss(config, mesh)(params, 1))
    loader = make_loader(config.data, config.model, config.data.root)
    arrays, _ = loader.load_eval(range(11), range(11), question=False)
    batch = Batch(**arrays)

    @jax.jit
    def loss_of(params, batch):
        output, _ = bind(model, params)(batch)
        head = params["llm"]["head"]["kernel"]
        return total_loss(output, head, batch, config.loss, config.model, divisors(batch))[0]

    whole = loss_of(host, batch)
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert results[0]["eval/loss"] == pytest.approx(float(whole), rel=1e-5)


def test_evaluation_without_records_is_refused(tmp_path):
    config = dataclasses.replace(ExperimentConfig(), train=TrainConfig(eval_every=1))
    with pytest.raises(ValueError, match="eval.sources names no annotation file"):
        HeldOutLoss(config, None)
