"""The loop on a handful of generated examples: resuming, stopping, refusing. Programs are compiled once and cached for the module."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from medplib_jax.config.experiment import TrainConfig
from medplib_jax.config.model import LoraConfig
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.train import loop as train_module
from medplib_jax.train.loop import train
from medplib_jax.train.metrics_log import read_metrics
from tests import tiny_run
from tests.paths import ROOT

KILLED = """
import json, sys
from medplib_jax.train import loop as train
from medplib_jax.config.base import from_dict
from medplib_jax.config.experiment import ExperimentConfig
from tests.train.test_loop import one_device
train.make_mesh = one_device
train.train(from_dict(ExperimentConfig, json.load(open(sys.argv[1]))), sys.argv[2])
"""


def one_device(config):
    return make_mesh(config, jax.devices()[:1])


@pytest.fixture(autouse=True)
def use_one_device(monkeypatch):
    """Eight virtual devices would only cost time here."""
    monkeypatch.setattr(train_module, "make_mesh", one_device)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small dataset with its tokenizer, and a compilation cache that this module and its subprocesses share."""
    folder = tmp_path_factory.mktemp("train")
    tiny_run.prepare(str(folder))
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield folder
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture
def config(folder):
    """8 steps, a checkpoint every 3."""
    return dataclasses.replace(
        tiny_run.experiment(str(folder)), train=TrainConfig(steps=8, checkpoint_every=3, log_every=1)
    )


def losses(workdir) -> dict[int, tuple[float, float]]:
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in read_metrics(str(workdir))}


@pytest.fixture(scope="module")
def whole(folder):
    return {}


@pytest.fixture
def uninterrupted(config, folder, whole):
    """Losses and result of a run from start to end."""
    if not whole:
        whole["result"] = train(config, str(folder / "whole"))
        whole["losses"] = losses(folder / "whole")
    return whole


def test_a_run_learns_and_returns_its_last_metrics(uninterrupted):
    sequence = uninterrupted["losses"]
    assert list(sequence) == list(range(1, 9)) and sequence[8][0] < sequence[1][0] - 0.5
    result = uninterrupted["result"]
    assert result["step"] == 8 and result["interrupted"] is None
    assert 0 < result["padding"] < 1 and result["data_wait"] > 0 and result["examples_per_second"] > 0


def test_resuming_after_sigkill_gives_the_same_losses(uninterrupted, config, folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "config.json"), str(tmp_path / "run")], env=environment
    )
    deadline = time.time() + 200
    while len(losses(tmp_path / "run")) < 5 and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was killed in the middle, not finished
    written = losses(tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # as a killed write leaves it
    assert train(config, str(tmp_path / "run"))["step"] == 8
    resumed = losses(tmp_path / "run")
    assert resumed == uninterrupted["losses"] and written.items() <= resumed.items()


@pytest.fixture
def stopped(config, tmp_path, monkeypatch):
    """stopped(number) -> (workdir, result) of a run that got this signal at step 4."""
    write = train_module.MetricWriter.write

    def stop(number):
        def interrupt(self, step, row):
            if step == 4:
                signal.raise_signal(number)
            write(self, step, row)

        with monkeypatch.context() as patch:
            patch.setattr(train_module.MetricWriter, "write", interrupt)
            return tmp_path / "run", train(config, str(tmp_path / "run"))

    return stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_call_goes_on(uninterrupted, config, stopped, number):
    before = signal.getsignal(number)
    workdir, result = stopped(number)
    assert result["interrupted"] == number and result["step"] == 5 and (workdir / "checkpoints/5/state").exists()
    assert signal.getsignal(number) == before
    train(config, str(workdir))
    assert losses(workdir) == uninterrupted["losses"]


def test_a_damaged_checkpoint_costs_its_steps_only(uninterrupted, config, stopped, caplog):
    workdir, _ = stopped(signal.SIGTERM)
    for file in (workdir / "checkpoints/5/state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-1])
    train(config, str(workdir))
    assert "checkpoints/5 is damaged" in caplog.text and len(list((workdir / "damaged").iterdir())) == 1
    assert losses(workdir) == uninterrupted["losses"]


def test_a_finished_workdir_returns_at_once_and_more_steps_continue_it(uninterrupted, config, folder, monkeypatch):
    def refuse(*_):
        raise AssertionError("data was read")

    monkeypatch.setattr(train_module, "make_loader", refuse)
    again = train(config, str(folder / "whole"))
    assert again["step"] == 8 and again["loss"] == uninterrupted["result"]["loss"]
    with pytest.raises(AssertionError, match="data was read"):
        train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=9)), str(folder / "whole"))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_records(config, tmp_path):
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e30))
    with pytest.raises(FloatingPointError, match=r"step \d: not finite: loss (nan|inf).*align.json\[\d+\]"):
        train(config, str(tmp_path / "run"))
    before = losses(tmp_path / "run")
    assert before and all(np.isfinite(value).all() for value in before.values())


def test_another_model_cannot_resume_a_workdir(uninterrupted, config, folder):
    other = dataclasses.replace(
        config, model=dataclasses.replace(config.model, lora=LoraConfig(rank=3)), train=TrainConfig(steps=9)
    )
    with pytest.raises(ValueError, match="cannot be resumed.*model.lora.rank: 2 in the checkpoint, 3 now"):
        train(other, str(folder / "whole"))


def test_a_tokenizer_of_another_size_is_refused(config, tmp_path):
    other = dataclasses.replace(
        config, model=dataclasses.replace(config.model, llm=dataclasses.replace(config.model.llm, vocab_size=41))
    )
    with pytest.raises(ValueError, match="model.llm.vocab_size is 41, but data.tokenizer .* has"):
        train(other, str(tmp_path / "run"))


def test_bad_records_are_skipped_by_name_or_refused(config, folder, tmp_path):
    records = json.loads((folder / "phantom/train/align.json").read_text())
    records[3]["image"] = "images/missing.png"
    (tmp_path / "bad.json").write_text(json.dumps(records))
    data = dataclasses.replace(config.data, sources=(str(tmp_path / "bad.json"),), on_error="skip")
    config = dataclasses.replace(config, data=data, train=TrainConfig(steps=2, log_every=1))
    assert train(config, str(tmp_path / "run"))["skipped"] == 1
    (line,) = (tmp_path / "run/skipped.0.jsonl").read_text().splitlines()
    assert json.loads(line)["record"] == 3
    with pytest.raises(ValueError, match=r"bad.json, record 3.*missing"):
        train(dataclasses.replace(config, data=dataclasses.replace(data, on_error="raise")), str(tmp_path / "other"))
