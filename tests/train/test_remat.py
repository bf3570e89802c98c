"""The policy in place of "auto": the least recomputation that fits, found once and written down."""

import dataclasses

import jax
import pytest

from medplib_jax.config.experiment import DataConfig, LossConfig, MeshConfig, OptimConfig
from medplib_jax.models.remat import POLICIES, remat
from medplib_jax.parallel.compilation import Compilations
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.train import remat as choosing
from medplib_jax.train.flops import count_flops
from medplib_jax.train.program import train_program
from tests.helpers import MODEL, tiny_experiment

CONFIG = tiny_experiment(  # text alone, which is quick to compile
    model=dataclasses.replace(MODEL, remat="auto", clip=dataclasses.replace(MODEL.clip, num_layers=1)),
    data=DataConfig(bucket_lengths=(16,), batch_size=8, max_regions=0, max_masks=0, mask_canvas=20),
    optim=OptimConfig(trainable=("^llm/",)),
    loss=LossConfig(),
)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def test_each_recomputes_more_than_the_one_before(mesh):
    plain = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, remat="none"))
    flops = [
        count_flops(train_program(config, mesh, 8, 16).trace().jaxpr.jaxpr)
        for config in (plain, *choosing.candidates(CONFIG))
    ]
    assert flops == sorted(flops) and len(set(flops[1:])) == len(choosing.LEAST_FIRST)
    assert set(choosing.LEAST_FIRST) < set(POLICIES)


def test_the_first_that_leaves_room_is_chosen_and_remembered(mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "LEAST_FIRST", ("products", "full"))
    monkeypatch.setattr(choosing, "_cache_file", lambda: tmp_path / "remat.json")
    most, least = (choosing._peak(config, mesh) for config in choosing.candidates(CONFIG))
    assert least < most
    count = Compilations()
    for limit, policy in ((most / 0.89, "products"), (most, "full"), (least / 2, "full")):
        monkeypatch.setattr(choosing, "_memory", lambda mesh, limit=limit: limit)
        assert choosing.with_policy(CONFIG, mesh).model.remat == policy
    assert count.requested == 0, "it was compiled before"


def test_a_policy_that_was_given_stays(mesh):
    assert choosing.with_policy(tiny_experiment(), mesh) == tiny_experiment()
    with pytest.raises(ValueError, match="'auto' is for training"):
        remat("auto")
