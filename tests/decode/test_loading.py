"""A checkpoint is read piece by piece: the same parameters as read whole, and never much of it in memory."""

import dataclasses
import functools
import math
import shutil
import threading
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from medplib_jax import checkpoint
from medplib_jax.batch import flatten
from medplib_jax.config.experiment import MeshConfig, ShardingConfig
from medplib_jax.decode.layout import STACKS, to_decoding_layout
from medplib_jax.decode.loading import load_checkpoint
from medplib_jax.decode.saved_params import SavedArray, open_params
from medplib_jax.models.layers import abstract_module, draw_params
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.parallel.ahead import THREADS
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.train.state import TrainState
from tests.evaluate.evaluators.tiny import make_experiment
from tests.helpers import MODEL

LAYERS = 24
DEEP = dataclasses.replace(MODEL, llm=dataclasses.replace(MODEL.llm, num_layers=LAYERS, mlp_dim=64, max_positions=512))


def write(workdir, seed):
    """A checkpoint in bfloat16 with adapters that count, its larger stacks written layer by layer."""
    experiment = dataclasses.replace(make_experiment(workdir / "tokenizer"), model=DEEP)
    params = draw_params(abstract_module(functools.partial(MedPLIB, DEEP)), seed)
    params = jax.tree.map_with_path(lambda path, x: x + 0.5 if path[-1].key == "lora_b" else x, params)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    state = TrainState(step=jnp.asarray(3), trainable=params, frozen={}, opt_state={})
    with checkpoint.make_manager(str(workdir), keep=1) as manager:
        checkpoint.save(manager, state, experiment, total_steps=3, loss=1.0)
        manager.wait_until_finished()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "LARGE_BYTES", 2**12)
        write(path, 1)
    return path


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_parameters_are_those_that_are_read_whole(workdir, quantize):
    _, params, tokenizer = checkpoint.load_params(workdir)
    loaded = load_checkpoint(workdir, quantize=quantize)
    chex.assert_trees_all_equal(loaded.params, to_decoding_layout(DEEP, params, quantize=quantize))
    assert (loaded.experiment.model, loaded.tokenizer, loaded.quantize) == (DEEP, tokenizer, quantize)


def test_they_lie_where_the_rules_say(workdir):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    alone = load_checkpoint(workdir, quantize="int8").params
    spread = load_checkpoint(workdir, mesh=mesh, rules=ShardingConfig(), quantize="int8").params
    chex.assert_trees_all_equal(jax.device_get(spread), jax.device_get(alone))
    kernel = spread["llm"]["layers"]["3"]["attn"]["q"]["kernel"]
    assert kernel.dtype == jnp.int8 and kernel.addressable_shards[0].data.size == kernel.size // 4


def test_little_of_it_is_in_memory_at_once(workdir, monkeypatch):
    """Of the kernels that become 8 bits, a few layers' are held, however many there are."""
    lock, arrays, peak = threading.Lock(), [], [0]
    read = SavedArray.__getitem__

    def counted(array, place):
        found = read(array, place)
        with lock:
            if found.ndim > 2:  # a kernel of a stack: what is no kernel stays in its type
                arrays.append(weakref.ref(found))
            alive = [array for reference in arrays if (array := reference()) is not None]
            peak[0] = max(peak[0], sum(array.nbytes for array in alive))
        return found

    monkeypatch.setattr(SavedArray, "__getitem__", counted)
    sizes = {path: 2 * math.prod(array.shape) for path, array in flatten(open_params(workdir).tree).items()}
    layer = max(size // LAYERS if path.startswith(STACKS) else size for path, size in sizes.items())
    load_checkpoint(workdir, quantize="int8")
    assert peak[0] <= 2 * THREADS * layer < sum(sizes.values()) / 2


def test_what_is_not_what_was_saved_is_refused(workdir, tmp_path):
    write(tmp_path, 2)
    shutil.rmtree(tmp_path / "checkpoints/3/state")
    shutil.copytree(workdir / "checkpoints/3/state", tmp_path / "checkpoints/3/state")
    with pytest.raises(ValueError, match=r"arrays are not what was saved, first trainable/clip"):
        load_checkpoint(tmp_path)


def test_a_part_that_changes_between_two_readings_is_refused():
    zarr = {"driver": "zarr", "kvstore": "memory://weights/"}
    store = ts.open(zarr, create=True, dtype=ts.float32, shape=[2, 3]).result()
    store.write(np.ones((2, 3), np.float32)).result()
    array = SavedArray(store)
    np.testing.assert_array_equal(array[0], array[0])
    store[0].write(np.zeros(3, np.float32)).result()
    with pytest.raises(ValueError, match="memory://weights/: changed while it was read"):
        array[0]
