"""The policy in place of "auto": the least recomputation that fits, found once and written down."""

import dataclasses
import json

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
    most, least = (choosing._peak(config, mesh, {}) for config in choosing.candidates(CONFIG))
    assert least < most
    count = Compilations()
    for limit, policy in ((most / 0.89, "products"), (most, "full"), (least / 2, "full")):
        monkeypatch.setattr(choosing, "_memory", lambda mesh, limit=limit: limit)
        assert choosing.with_policy(CONFIG, mesh).model.remat == policy
    assert count.requested == 0, "it was compiled before"

    said = {"remat/known": choosing._cache_file().read_text()}  # by process 0, to one that has compiled nothing yet
    monkeypatch.setattr(choosing, "_cache_file", lambda: tmp_path / "other" / "remat.json")
    monkeypatch.setattr(choosing, "of_process_0", said.get)
    assert choosing.with_policy(CONFIG, mesh).model.remat == "full" and count.requested == 0


def test_compiler_flags_make_another_program(mesh, monkeypatch):
    device = mesh.devices.flat[0]
    keys = {choosing._key("text", options, device) for options in ({}, {"xla_some": 1})}
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.setenv(name, "--xla_other=1")
        keys.add(choosing._key("text", {}, device))
    assert len(keys) == 4


@pytest.mark.parametrize("content", ['{"a', "[1]", '{"a": "words"}', '{"a": true}', b"\xff\xfe"])
def test_a_damaged_file_of_peaks_is_replaced(content, tmp_path, monkeypatch, caplog):
    file = tmp_path / "remat.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(choosing, "_cache_file", lambda: file)
    assert choosing._read_cache() == {} and f"{file} is not used" in caplog.text
    choosing._write_cache("b", 7)
    assert choosing._read_cache() == {"b": 7} == json.loads(file.read_text())


def test_a_folder_that_takes_no_peaks_ends_no_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(choosing, "_cache_file", lambda: tmp_path / "remat.json")
    (tmp_path / "remat.json").mkdir()
    choosing._write_cache("a", 7)
    assert "is not written" in caplog.text and [path.name for path in tmp_path.iterdir()] == ["remat.json"]


def test_a_policy_that_was_given_stays(mesh):
    assert choosing.with_policy(tiny_experiment(), mesh) == tiny_experiment()
    with pytest.raises(ValueError, match="'auto' is for training"):
        remat("auto")
