"""Which checkpoints patterns mean, what they are called, and how PyTorch folders become some."""

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import jax.numpy as jnp
import pytest

from medplib_jax import checkpoint
from medplib_jax.evaluate import checkpoints as checkpoint_list
from medplib_jax.evaluate.checkpoints import find_checkpoints
from medplib_jax.train.state import TrainState
from tests.evaluate.evaluators import tiny


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """a/model with steps 3, 5 and 10, b/model with step 3, and a folder that is no checkpoint."""
    root = tmp_path_factory.mktemp("runs")
    experiment = tiny.make_experiment(root / "tokenizer")
    for workdir, steps in ((root / "a" / "model", (3, 5, 10)), (root / "b" / "model", (3,))):
        with checkpoint.make_manager(str(workdir), keep=5) as manager:
            for step in steps:
                state = TrainState(step=jnp.asarray(step), trainable={"w": jnp.ones(2)}, frozen={}, opt_state={})
                checkpoint.save(manager, state, experiment, total_steps=10, loss=1.0)
            manager.wait_until_finished()
    shutil.rmtree(root / "a" / "model" / "checkpoints" / "5" / "tokenizer")  # not complete
    return root


def test_patterns_and_names(runs, tmp_path):
    def found(patterns, steps="newest"):
        return [(c.name, c.run, c.step, c.kind) for c in find_checkpoints(patterns, steps, tmp_path)[0]]

    assert found(f"{runs}/*/model") == [("a-model-10", "model", 10, "jax"), ("b-model-3", "model", 3, "jax")]
    assert found(f"{runs}/a/model", "all") == [("a-model-3", "model", 3, "jax"), ("a-model-10", "model", 10, "jax")]
    assert found(f"{runs}/a/model/checkpoints/*") == [
        ("a-model-3", "model", 3, "jax"),
        ("a-model-10", "model", 10, "jax"),
    ]
    assert found(f"{runs}/b/model, {runs}/b/model/checkpoints/3") == [("b-model-3", "model", 3, "jax")]
    for nothing, why in {
        f"{runs}/tokenizer": "it is none of",
        f"{runs}/a/model/checkpoints/5": "the step is not complete",
        f"{runs}/c/*": "found none",
        "": "no checkpoint was given",
    }.items():
        with pytest.raises(FileNotFoundError, match=why):
            found(nothing)


def test_a_comma_of_a_path_separates_nothing(runs, tmp_path):
    odd = tmp_path / "lr 1e-4, seed 0"
    shutil.copytree(runs / "b", odd)
    found, _ = find_checkpoints(f"{runs}/a/model, {odd}/model,{runs}/b/*", "newest", tmp_path / "converted")
    assert [one.path for one in found] == [f"{runs}/a/model", f"{odd}/model", f"{runs}/b/model"]


def test_two_of_one_name_are_refused(runs, tmp_path):
    shutil.copytree(runs / "b", tmp_path / "b")
    with pytest.raises(ValueError, match="would both be called 'b-model-3'"):
        find_checkpoints(f"{runs}/b/model,{tmp_path}/b/model", "newest", tmp_path / "converted")


def test_what_a_step_knows(runs, tmp_path):
    (found,), _ = find_checkpoints(f"{runs}/b/model", "newest", tmp_path)
    assert found.experiment().eval.max_new_tokens == 4
    assert len(found.digest) == 16 and dataclasses.asdict(found.entry()) == {
        "name": "b-model-3",
        "path": f"{runs}/b/model",
        "run": "model",
        "step": 3,
        "kind": "jax",
        "quantize": "",
        "weights": found.digest,
    }
    (small,), _ = find_checkpoints(f"{runs}/b/model", "newest", tmp_path, "int8")
    assert (small.name, small.run, small.quantize, small.workdir) == (
        "b-model-3-int8",
        "model-int8",
        "int8",
        found.workdir,
    )


def test_pytorch_weights_are_converted_once(runs, tmp_path, monkeypatch):
    source, calls = tmp_path / "MedPLIB-7b", []
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"weights")

    def convert(command, **options):
        calls.append(dict(zip(command[3::2], command[4::2], strict=True)))
        shutil.copytree(runs / "b" / "model", calls[-1]["--out"])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(checkpoint_list.subprocess, "run", convert)
    for _ in range(2):
        (found,), _ = find_checkpoints(str(source), "newest", tmp_path / "converted")
        assert (found.name, found.run, found.kind) == ("MedPLIB_7b", "MedPLIB-7b", "torch") and found.path == str(
            source
        )
        assert Path(found.workdir).parent == tmp_path / "converted"
    assert [call["--source"] for call in calls] == [str(source)]
    os.utime(source / "model.safetensors", (1, 1))  # other files, or the same ones written anew
    find_checkpoints(str(source), "newest", tmp_path / "converted")
    assert len(calls) == 2

    failed = subprocess.CompletedProcess([], 1, "", "ValueError: weights are damaged")
    monkeypatch.setattr(checkpoint_list.subprocess, "run", lambda command, **options: failed)
    os.utime(source / "model.safetensors", (2, 2))
    with pytest.raises(FileNotFoundError, match="MedPLIB-7b'.*it cannot be converted: .*weights are damaged"):
        find_checkpoints(str(source), "newest", tmp_path / "converted")
    shutil.copytree(runs / "b" / "model", tmp_path / "MedPLIB-jax")
    found, (left,) = find_checkpoints(f"{tmp_path}/MedPLIB*", "newest", tmp_path / "converted")
    assert [one.run for one in found] == ["MedPLIB-jax"] and (left.what, left.failed) == (str(source), True)
