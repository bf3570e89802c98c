import dataclasses
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from medplib_jax.config.experiment import MeshConfig, ShardingConfig
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.parallel.sharding import batch_sharding, optimizer_shardings, param_shardings, process_rows, put_batch
from medplib_jax.train.step import abstract_model, state_shardings
from tests.helpers import tiny_experiment
from tests.parallel import sharding_golden


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_rules_map_names_to_mesh_axes(mesh):
    axes = {"mlp": {"kernel": ("layers", "expert", "embed", "mlp"), "scale": ("norm",)}, "position": (None, "vision")}
    shapes = {"mlp": {"kernel": shape(3, 2, 8, 6), "scale": shape(5)}, "position": shape(7, 3)}
    shardings = param_shardings(axes, shapes, RULES, mesh)
    assert shardings["mlp"]["kernel"].spec == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert shardings["mlp"]["scale"].spec == PartitionSpec(None)
    assert shardings["position"].spec == PartitionSpec(None, None)


RULES = ShardingConfig()


@pytest.mark.parametrize(
    ("axes", "sizes", "rules", "message"),
    [
        (("embed", "mpl"), (4, 4), RULES, "llm/up: no sharding rule for logical axis 'mpl'"),
        (
            ("embed", "mlp"),
            (4, 4),
            ShardingConfig(mlp="fsdp"),
            "llm/up: sharding.embed and sharding.mlp both map a dimension of it to mesh axis 'fsdp'",
        ),
        (("embed", "embed"), (4, 4), RULES, "sharding.embed and sharding.embed both map"),
        (("embed", "mlp"), (4, 5), RULES, "llm/up: dimension 'mlp' of size 5 is not divisible by 2"),
        (("embed",), (4, 4), RULES, "llm/up: 1 logical axes"),
    ],
)
def test_errors_are_loud_and_name_the_parameter(mesh, axes, sizes, rules, message):
    with pytest.raises(ValueError, match=message):
        param_shardings({"llm": {"up": axes}}, {"llm": {"up": shape(*sizes)}}, rules, mesh)


def test_rules_are_a_block_of_the_config(mesh):
    rules = ShardingConfig(embed="data, fsdp", vocab="tensor")
    spec = param_shardings({"head": ("embed", "vocab")}, {"head": shape(8, 6)}, rules, mesh)["head"].spec
    assert spec == PartitionSpec(("data", "fsdp"), "tensor")
    with pytest.raises(ValueError, match="sharding.mlp names model, but the mesh axes are data, fsdp, expert, tensor"):
        ShardingConfig(mlp="model")
    with pytest.raises(ValueError, match="sharding.embed 'fsdp,fsdp' names a mesh axis twice"):
        ShardingConfig(embed="fsdp,fsdp")
    with pytest.raises(ValueError, match="sharding.layers must stay empty"):
        ShardingConfig(layers="fsdp")


def test_trees_must_agree(mesh):
    with pytest.raises(ValueError, match="llm: logical axes and shapes differ in \\['up'\\]"):
        param_shardings({"llm": {}}, {"llm": {"up": shape(4)}}, RULES, mesh)


def test_moments_are_sharded_like_their_parameter(mesh):
    shapes = {"kernel": shape(8, 4), "scale": shape(3)}
    shardings = param_shardings({"kernel": ("embed", "mlp"), "scale": ("norm",)}, shapes, RULES, mesh)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale_by_learning_rate(lambda step: 1e-3)
    )
    params = jax.tree.map(lambda s, sharding: jax.device_put(jnp.ones(s.shape), sharding), shapes, shardings)
    placed = optimizer_shardings(tx, shapes, shardings, mesh)
    state = jax.jit(tx.init, out_shardings=placed)(params)
    moments = [x for x in jax.tree.leaves(state) if x.shape == (8, 4)]
    assert len(moments) == 2 and all(x.sharding.is_equivalent_to(shardings["kernel"], 2) for x in moments)


def test_rows_of_a_batch(mesh):
    np.testing.assert_array_equal(process_rows(mesh, 8), np.arange(8))
    batch = put_batch({"tokens": np.arange(16).reshape(8, 2)}, mesh, 8)
    assert batch["tokens"].sharding == batch_sharding(mesh)
    assert batch["tokens"].addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(batch["tokens"], np.arange(16).reshape(8, 2))
    with pytest.raises(ValueError, match="batch size 6 is not divisible by data x fsdp x expert = 4"):
        process_rows(mesh, 6)


@pytest.mark.parametrize("file", sharding_golden.FILES, ids=lambda file: file.name)
def test_every_parameter_of_the_full_size_models_lies_where_it_did(file):
    """A change of rules or logical axes shows here; when it is meant, `python -m tests.parallel.sharding_golden` writes
    the files anew."""
    golden = json.loads(gzip.decompress(file.read_bytes()))
    current = json.loads(json.dumps(sharding_golden.specs(sharding_golden.FILES[file]())))
    assert current.keys() == golden.keys()
    for mesh, specs in golden.items():
        changed = {
            path: (specs.get(path), current[mesh].get(path))
            for path in specs | current[mesh]
            if specs.get(path) != current[mesh].get(path)
        }
        assert not changed, f"{mesh}: {changed}"


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        (
            (8, 1, 1, 1),
            {"optim": {"accumulate": 2}},
            "data.batch_size / optim.accumulate 4 cannot be shared out evenly over the mesh's data=8 x fsdp=1 x "
            "expert=1",
        ),
        ((1, 1, 1, 8), {}, "model.llm.num_heads 2 cannot be shared out evenly over the mesh's tensor=8"),
        ((1, 1, 8, 1), {}, "model.moe.num_experts 2 cannot be shared out evenly over the mesh's expert=8"),
        ((8, 1, 1, 1), {"optim": {"accumulate": 3}}, "data.batch_size 8 is not a multiple of optim.accumulate 3"),
    ],
)
def test_what_a_mesh_cannot_share_out_is_said_before_anything_compiles(sizes, changes, message):
    config = tiny_experiment()
    config = dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in changes.items()}
    )
    with pytest.raises(ValueError, match=message):
        state_shardings(
            abstract_model(config.model, config.sharding), config, optax.sgd(1.0), make_mesh(MeshConfig(*sizes))
        )
