import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from medplib_jax import checkpoint
from medplib_jax.config import versions
from medplib_jax.config.experiment import DataConfig, ExperimentConfig, MeshConfig
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.train.state import TrainState


@pytest.fixture
def experiment(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_text("not part of the tokenizer")
    return ExperimentConfig(data=DataConfig(tokenizer=str(folder)))


def make_state(step: int, mesh) -> TrainState:
    """Numbers that tell where they belong: w = step + 0, 1, 2, ..."""
    w = jax.device_put(step + jnp.arange(16.0).reshape(8, 2), NamedSharding(mesh, PartitionSpec("fsdp")))
    trainable = {"blocks": {"0": {"kernel": w}}}
    opt_state = optax.adam(1e-3).init(trainable)
    return TrainState(
        jnp.int32(step),
        trainable,
        {"blocks": {"0": {"bias": jnp.ones(3, jnp.bfloat16)}, "1": {"bias": jnp.zeros(2)}}},
        opt_state,
    )


def abstract(state, mesh, spec, dtype=None):
    def leaf(x):
        fits = NamedSharding(mesh, spec if x.ndim == 2 else PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=fits)

    return jax.tree.map(leaf, state)


def write(workdir, experiment, steps, keep=5, keep_best=0, losses=None):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with checkpoint.make_manager(str(workdir), keep, keep_best) as manager:
        for step, loss in zip(steps, losses or [1.0] * len(steps), strict=True):
            checkpoint.save(manager, make_state(step, mesh), experiment, total_steps=9, loss=loss)


def test_round_trip_on_another_mesh_and_dtype(tmp_path, experiment):
    write(tmp_path / "run", experiment, [3])
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    state = make_state(3, mesh)
    with checkpoint.make_manager(str(tmp_path / "run")) as manager:
        same = checkpoint.restore(manager, 3, abstract(state, mesh, PartitionSpec("tensor", "fsdp")))
        half = checkpoint.restore(manager, 3, abstract(state, mesh, PartitionSpec(), jnp.bfloat16))
    chex.assert_trees_all_equal(same, state)
    chex.assert_trees_all_equal_dtypes(same, state)
    kernel = same.trainable["blocks"]["0"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec("tensor", "fsdp") and kernel.sharding.mesh == mesh
    assert half.trainable["blocks"]["0"]["kernel"].dtype == jnp.bfloat16


def test_load_params_joins_the_parts_and_brings_the_tokenizer(tmp_path, experiment):
    write(tmp_path / "run", experiment, [3, 5])
    config, params, tokenizer = checkpoint.load_params(str(tmp_path / "run"))
    assert config == experiment
    assert set(params["blocks"]) == {"0", "1"} and set(params["blocks"]["0"]) == {"kernel", "bias"}
    np.testing.assert_array_equal(params["blocks"]["0"]["kernel"], 5 + np.arange(16.0).reshape(8, 2))
    assert params["blocks"]["0"]["bias"].dtype == jnp.bfloat16
    assert [path.name for path in checkpoint.tokenizer_files(tokenizer)] == ["tokenizer.json"]
    assert not (tmp_path / "run/checkpoints/5/tokenizer/model.safetensors").exists()
    older = checkpoint.load_params(str(tmp_path / "run"), step=3)[1]
    np.testing.assert_array_equal(older["blocks"]["0"]["kernel"], 3 + np.arange(16.0).reshape(8, 2))


def test_a_part_that_trains_as_a_whole_is_read_beside_frozen_others(tmp_path, experiment):
    state = make_state(3, make_mesh(MeshConfig(data=2, fsdp=4))).replace(frozen={"other": {"bias": jnp.zeros(2)}})
    with checkpoint.make_manager(str(tmp_path / "run"), 5, 0) as manager:
        checkpoint.save(manager, state, experiment, total_steps=9, loss=1.0)
    for part in ("blocks", "other"):
        assert checkpoint.load_params(str(tmp_path / "run"), part=part)[1].keys() == {part}


def test_load_params_places_by_shardings(tmp_path, experiment):
    write(tmp_path / "run", experiment, [1])
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    rows, replicated = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    shardings = {"blocks": {"0": {"kernel": rows, "bias": replicated}, "1": {"bias": replicated}}}
    _, params, _ = checkpoint.load_params(str(tmp_path / "run"), shardings=shardings)
    assert params["blocks"]["0"]["kernel"].sharding == rows


def test_only_the_newest_are_kept(tmp_path, experiment):
    write(tmp_path / "run", experiment, [1, 2, 3], keep=2)
    with checkpoint.make_manager(str(tmp_path / "run")) as manager:
        assert sorted(manager.all_steps()) == [2, 3]
        assert checkpoint.read_experiment(manager, 3) == (experiment, 9)


def test_the_best_are_kept_too(tmp_path, experiment):
    write(tmp_path / "run", experiment, [1, 2, 3, 4, 5], keep=1, keep_best=2, losses=[5.0, 2.0, 3.0, 4.0, 6.0])
    with checkpoint.make_manager(str(tmp_path / "run"), read_only=True) as manager:
        assert sorted(manager.all_steps()) == [2, 3, 5]


def test_the_best_are_still_known_when_the_run_starts_again(tmp_path, experiment):
    write(tmp_path / "run", experiment, [1, 2, 3], keep=1, keep_best=1, losses=[1.0, 3.0, 4.0])
    write(tmp_path / "run", experiment, [4, 5], keep=1, keep_best=1, losses=[2.0, 5.0])
    with checkpoint.make_manager(str(tmp_path / "run"), read_only=True) as manager:
        assert sorted(manager.all_steps()) == [1, 5]


def test_bit_sums_are_the_same_on_every_mesh_and_tell_every_bit(tmp_path):
    trees = [
        make_state(3, make_mesh(mesh)).trainable
        for mesh in (MeshConfig(data=2, fsdp=4), MeshConfig(data=1, fsdp=2, tensor=4))
    ]
    (name, value), *_ = checkpoint.bit_sums(trees[0]).items()
    assert name == "blocks/0/kernel float32" and checkpoint.bit_sums(trees[1]) == {name: value}
    host = jax.device_get(trees[0])
    assert checkpoint.bit_sums(host) == {name: value}
    host["blocks"]["0"]["kernel"] = np.nextafter(host["blocks"]["0"]["kernel"], np.float32(np.inf))
    assert checkpoint.bit_sums(host) != {name: value}
    assert checkpoint.bit_sums({"a": np.full(3, 1.0, jnp.bfloat16)}) == {"a bfloat16": 3 * 0x3F80}


def biggest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(folder):
    file = biggest_file(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(folder):
    file = biggest_file(folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def swap_with_another_step(folder):
    """Readable throughout, but not what was saved as this step."""
    shutil.rmtree(folder)
    shutil.copytree(folder.parents[1] / "1" / "state", folder)


DAMAGES = {
    "truncated": truncate,
    "a bit flipped": flip_a_bit,
    "another step's": swap_with_another_step,
    "a file missing": lambda folder: biggest_file(folder).unlink(),
    "the index missing": lambda folder: (folder / "manifest.ocdbt").unlink(),
    "state missing": shutil.rmtree,
    "experiment unreadable": lambda folder: (folder.parent / "experiment" / "metadata").write_text('{"experiment": {'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_step_is_named_and_the_one_before_is_taken(tmp_path, experiment, caplog, damage):
    write(tmp_path / "run", experiment, [1, 2, 3])
    damage(tmp_path / "run/checkpoints/3/state")
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with checkpoint.make_manager(str(tmp_path / "run")) as manager:
        step, state = checkpoint.restore_newest(manager, abstract(make_state(0, mesh), mesh, PartitionSpec("fsdp")))
    assert step == 2 and state.trainable["blocks"]["0"]["kernel"][0, 0] == 2
    assert "checkpoints/3" in caplog.text
    write(tmp_path / "run", experiment, [3])  # the number is free again
    with checkpoint.make_manager(str(tmp_path / "run"), read_only=True) as manager:
        assert checkpoint.restore(manager, 3, abstract(make_state(0, mesh), mesh, PartitionSpec())).step == 3


def test_no_run_starts_anew_over_damaged_steps(tmp_path, experiment):
    write(tmp_path / "run", experiment, [1])
    truncate(tmp_path / "run/checkpoints/1/state")
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with checkpoint.make_manager(str(tmp_path / "run")) as manager:
        with pytest.raises(ValueError, match="no step can be restored"):
            checkpoint.restore_newest(manager, abstract(make_state(0, mesh), mesh, PartitionSpec("fsdp")))
    assert (tmp_path / "run/checkpoints/1").exists() and not (tmp_path / "run/damaged").exists()


def test_parameters_that_are_not_what_was_saved_are_refused(tmp_path, experiment):
    write(tmp_path / "run", experiment, [1, 3])
    swap_with_another_step(tmp_path / "run/checkpoints/3/state")
    with pytest.raises(ValueError, match="1 arrays are not what was saved, first trainable/blocks/0/kernel"):
        checkpoint.load_params(str(tmp_path / "run"))


def test_half_written_steps_do_not_count(tmp_path, experiment, caplog):
    write(tmp_path / "run", experiment, [1, 2, 3])
    folder = tmp_path / "run" / "checkpoints"
    (folder / "3").rename(folder / "3.orbax-checkpoint-tmp")  # what a save killed by SIGKILL leaves
    shutil.rmtree(folder / "2" / "state")
    with checkpoint.make_manager(str(tmp_path / "run"), read_only=True) as manager:
        assert checkpoint.latest_step(manager) == 1
    assert "lacks state" in caplog.text
    _, params, _ = checkpoint.load_params(str(tmp_path / "run"))
    assert params["blocks"]["0"]["kernel"][0, 0] == 1


def test_nothing_complete_is_refused_by_name(tmp_path, experiment):
    with pytest.raises(FileNotFoundError, match="no 'checkpoints' folder"):
        checkpoint.load_params(str(tmp_path / "nowhere"))
    write(tmp_path / "run", experiment, [1])
    (tmp_path / "run/checkpoints/1").rename(tmp_path / "run/checkpoints/1.orbax-checkpoint-tmp")
    with pytest.raises(FileNotFoundError, match="no complete checkpoint.*1.orbax-checkpoint-tmp"):
        checkpoint.load_params(str(tmp_path / "run"))
    bad = dataclasses.replace(experiment, data=DataConfig(tokenizer=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="no tokenizer files"):
        write(tmp_path / "other", bad, [1])


def edit_experiment(folder, edit):
    """Rewrites the experiment of a step as `edit` changes its plain values."""
    file = folder / "experiment" / "metadata"
    written = json.loads(file.read_text())
    edit(written)
    file.write_text(json.dumps(written))


def rename_a_field(written):
    written["experiment"]["optim"]["learning_speed"] = written["experiment"]["optim"].pop("lr")


def test_an_experiment_that_is_not_understood_is_refused_by_its_field(tmp_path, experiment):
    write(tmp_path / "run", experiment, [1, 2])
    edit_experiment(tmp_path / "run/checkpoints/2", rename_a_field)
    with pytest.raises(ValueError, match=r"checkpoints/2/experiment.*unknown config field .*learning_speed"):
        checkpoint.load_params(str(tmp_path / "run"))
    with checkpoint.make_manager(str(tmp_path / "run")) as manager, pytest.raises(ValueError, match="learning_speed"):
        checkpoint.step_to_resume(manager)


def test_older_experiments_are_migrated_and_newer_ones_refused(tmp_path, experiment, monkeypatch):
    write(tmp_path / "run", experiment, [1])
    edit_experiment(tmp_path / "run/checkpoints/1", rename_a_field)
    edit_experiment(tmp_path / "run/checkpoints/1", lambda written: written.pop("version"))

    def to_1(values):
        optim = dict(values["optim"])
        return values | {"optim": optim | {"lr": optim.pop("learning_speed")}} | {"optim": {"lr": 3e-4}}

    monkeypatch.setattr(versions, "MIGRATIONS", (to_1,))
    assert checkpoint.load_experiment(tmp_path / "run")[0] == experiment
    edit_experiment(tmp_path / "run/checkpoints/1", lambda written: written.update(version=2))
    with pytest.raises(ValueError, match="experiment version 2; this program reads versions up to 1"):
        checkpoint.load_experiment(tmp_path / "run")


def test_no_run_starts_anew_over_steps_that_cannot_be_read(tmp_path, experiment):
    write(tmp_path / "run", experiment, [1])
    DAMAGES["experiment unreadable"](tmp_path / "run/checkpoints/1/state")
    with checkpoint.make_manager(str(tmp_path / "run")) as manager:
        with pytest.raises(ValueError, match="no step can be restored"):
            checkpoint.step_to_resume(manager)
    with checkpoint.make_manager(str(tmp_path / "new")) as manager:
        assert checkpoint.step_to_resume(manager) is None


def test_a_step_that_orbax_does_not_take_is_an_error(tmp_path, experiment):
    write(tmp_path / "run", experiment, [3])
    with pytest.raises(ValueError, match="step 2 was not saved; the newest there is 3"):
        write(tmp_path / "run", experiment, [2])


def test_other_arrays_are_not_damage(tmp_path, experiment):
    write(tmp_path / "run", experiment, [1])
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    like = abstract(make_state(0, mesh), mesh, PartitionSpec())
    more = dataclasses.replace(like, frozen=like.frozen | {"router": jax.ShapeDtypeStruct((2,), jnp.float32)})
    wider = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape, 1), x.dtype, sharding=x.sharding), like)
    with checkpoint.make_manager(str(tmp_path / "run")) as manager:
        with pytest.raises(checkpoint.OtherArrays, match=r"frozen/router: found no such array, expected shape \(2,\)"):
            checkpoint.restore_newest(manager, more)
        with pytest.raises(checkpoint.OtherArrays, match=r"bias: found shape \(3,\), expected shape \(3, 1\)"):
            checkpoint.restore_newest(manager, wider)
    assert not (tmp_path / "run/damaged").exists()


def test_transforms_without_state_may_come_and_go(tmp_path, experiment):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    short = make_state(1, mesh)
    long = dataclasses.replace(short, opt_state=(*short.opt_state, optax.EmptyState()))
    for written, wanted in ((short, long), (long, short)):
        with checkpoint.make_manager(str(tmp_path / str(len(written.opt_state)))) as manager:
            checkpoint.save(manager, written, experiment, total_steps=9, loss=1.0)
            manager.wait_until_finished()
            chex.assert_trees_all_equal(checkpoint.restore(manager, 1, abstract(wanted, mesh, PartitionSpec())), wanted)


def test_a_path_names_a_step_of_a_workdir(tmp_path, experiment, monkeypatch):
    write(tmp_path / "run", experiment, [1, 2])
    monkeypatch.chdir(tmp_path)
    assert checkpoint.find_step("run") == (tmp_path / "run", 2)
    assert checkpoint.find_step("run/checkpoints/1") == (tmp_path / "run", 1)
    _, params, tokenizer = checkpoint.load_params("run/checkpoints/1")
    assert params["blocks"]["0"]["kernel"][0, 0] == 1
    assert (
        tokenizer == checkpoint.load_experiment("run/checkpoints/1")[1] == str(tmp_path / "run/checkpoints/1/tokenizer")
    )
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint of step 7; found \['1', '2'\]"):
        checkpoint.find_step("run/checkpoints/7")
