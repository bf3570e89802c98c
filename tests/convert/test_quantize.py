"""A checkpoint written in 8 bits answers as the first one does in 8 bits, and is refused for anything else."""

import json
import shutil

import chex
import jax.numpy as jnp
import pytest

from convert import benchmark_8bit, quantize, to_torch
from medplib_jax import checkpoint
from medplib_jax.decode.loading import load_checkpoint
from medplib_jax.train.state import TrainState
from tests.decode.test_loading import write


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    first, small = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("small")
    write(first, 1)
    quantize.main(["--checkpoint", str(first), "--out", str(small)])
    return first, small


def test_it_answers_as_the_first_does_in_8_bits(folders):
    first, small = folders
    expected, found = load_checkpoint(first, quantize="int8"), load_checkpoint(small)
    assert found.quantize == "int8" and found.experiment.model.lora.rank == 0
    chex.assert_trees_all_equal(found.params, expected.params)
    chex.assert_trees_all_equal(load_checkpoint(small, quantize="int8").params, expected.params)
    for asked, got in (("kv", "int8+kv"), ("w8a8+kv", "w8a8+kv")):
        assert load_checkpoint(small, quantize=asked).quantize == got


def test_a_second_time_is_refused(folders, tmp_path):
    with pytest.raises(SystemExit, match="its weights have 8 bits already"):
        quantize.main(["--checkpoint", str(folders[1]), "--out", str(tmp_path / "again")])
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda norm: norm.clear(), "llm/final_norm/scale: found no such array, expected shape"),
        (lambda norm: norm.update(shift=jnp.zeros(3)), r"llm/final_norm/shift: found shape \(3,\), expected no such"),
        (lambda norm: norm.update(scale=jnp.zeros(3)), r"llm/final_norm/scale: found shape \(3,\), expected shape"),
    ],
    ids=["lacking", "beyond", "other shape"],
)
def test_parameters_of_another_model_are_refused(folders, tmp_path, change, what):
    experiment, params, _ = checkpoint.load_params(folders[0])
    change(params["llm"]["final_norm"])
    state = TrainState(step=jnp.asarray(1), trainable=params, frozen={}, opt_state={})
    with checkpoint.make_manager(str(tmp_path / "other")) as manager:
        checkpoint.save(manager, state, experiment, total_steps=1, loss=None)
    with pytest.raises(SystemExit, match=what):
        quantize.main(["--checkpoint", str(tmp_path / "other"), "--out", str(tmp_path / "small")])
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("convert", [quantize.quantize, to_torch.convert])
def test_what_is_not_what_was_saved_is_refused(folders, tmp_path, convert):
    first, other = folders[0] / "checkpoints/3", tmp_path / "run/checkpoints/3"
    write(tmp_path / "run", 2)
    shutil.rmtree(other / "state")
    shutil.copytree(first / "state", other / "state")
    with pytest.raises(ValueError, match=r"arrays are not what was saved, first trainable/clip"):
        convert(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_neither_training_nor_conversion_takes_it_for_a_whole_one(folders, tmp_path):
    with pytest.raises(ValueError, match="weights of 8 bits, which can only answer"):
        checkpoint.load_params(folders[1])
    with pytest.raises(ValueError, match="weights of 8 bits, which can only answer"):
        to_torch.convert(folders[1], tmp_path / "torch")


def test_the_benchmark_asks_a_checkpoint(workdir, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_8bit, "reading_rate", lambda: 1e9)
    benchmark_8bit.ask(str(workdir), "int8")
    found = json.loads(capsys.readouterr().out)
    assert found["positions"] > 0 and all(found[name] > 0 for name in ("loaded", "peak", "prefill", "token", "share"))
