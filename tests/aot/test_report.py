"""A small model, compiled for a TPU that nobody here has."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medplib_jax.aot.programs import make_program
from medplib_jax.aot.report import Request, as_text, examine
from medplib_jax.aot.sweep import as_table, candidates
from medplib_jax.aot.topologies import devices_of, full_rematerialisations
from medplib_jax.config.experiment import MeshConfig
from medplib_jax.models.language.expert_exchange import carries_ragged, with_exchange
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.train.program import abstract_batch
from tests.helpers import MODEL, random_batch, tiny_experiment

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu (the extra tpu) is not installed"
)


def config(**mesh):
    """Wide enough for the TPU's attention kernel."""
    llm = dataclasses.replace(MODEL.llm, hidden_size=256, mlp_dim=512, max_positions=256)
    model = dataclasses.replace(MODEL, llm=llm, dtype="bfloat16", remat="outputs")
    data = dataclasses.replace(tiny_experiment().data, max_masks=0, max_regions=0)
    optim = dataclasses.replace(
        tiny_experiment().optim, trainable=("lora_[ab]$", "^llm/moe/router/"), frozen_dtype="bfloat16"
    )
    return tiny_experiment(model=model, data=data, optim=optim, mesh=MeshConfig(**{"data": 1, "fsdp": -1} | mesh))


@needs_libtpu
def test_a_training_step_for_four_chips():
    report = examine(Request(config(), "v5e:2x2", "train", rows=32, length=128))
    assert report["fits"] and report["mesh"] == {"data": 1, "fsdp": 4, "expert": 1, "tensor": 1}
    assert 0 < report["argument_gb_per_chip"] <= report["peak_hbm_gb_per_chip"] < report["hbm_gb_per_chip"]
    assert {"splash_mha_fwd_segmented_residuals", "splash_mha_dkv_segmented_no_residuals", "gmm"} <= report[
        "kernels"
    ].keys()
    assert (
        report["kernels"]["splash_mha_fwd_segmented_residuals"]["calls"] == 2
    )  # its results are kept, not computed again
    # Frozen experts need no weight gradients, and of what is recomputed the experts' last product is kept.
    assert 1.0 <= report["executed_over_model"] < 1.5
    assert report["collectives"]["all-gather"]["count"] >= 2 * 7  # seven matrices in two layers
    largest_stack = 2 * 2 * 256 * 512 * 2 / 1e9  # layers x experts x widths in bfloat16
    assert report["largest_gather_outside_loops_gb"] < largest_stack
    assert report["full_rematerialisations"] == []
    assert report["bound_by"] in report["roofline_seconds"] and report["tokens_per_second_per_chip"] > 0
    assert "fits" in as_text(json.loads(json.dumps(report)))


@needs_libtpu
@pytest.mark.parametrize(("topology", "ragged"), [("v5e:4x4", True), ("v5e:4x8", False), ("v6e:4x8", True)])
def test_rows_travel_to_their_experts_on_every_network(topology, ragged):
    mesh = make_mesh(MeshConfig(data=-1, expert=2), devices_of(topology))
    rows = NamedSharding(mesh, PartitionSpec(("data", "expert")))
    x = jax.ShapeDtypeStruct((16 * mesh.size, 128), jnp.bfloat16, sharding=rows)
    expert = jax.ShapeDtypeStruct((16 * mesh.size,), jnp.int32, sharding=rows)

    def exchange(x, expert):
        assert carries_ragged(x) == ragged
        return with_exchange(lambda rows, _: 2 * rows, x, expert, 2, ("expert",))

    run = jax.shard_map(exchange, mesh=mesh, in_specs=rows.spec, out_specs=rows.spec, check_vma=False)
    assert ("ragged-all-to-all" in jax.jit(run).lower(x, expert).compile().as_text()) == ragged


def test_programs_have_the_shapes_of_real_batches():
    experiment = tiny_experiment()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    abstract = abstract_batch(experiment.data, experiment.model, mesh, 8, 16)
    jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a} {b.shape} {b.dtype}"),
        abstract,
        random_batch(experiment),
    )
    with pytest.raises(ValueError, match="length 65 is outside \\[1, model.llm.max_positions=64\\]"):
        make_program("train", experiment, mesh, 8, 65)
    with pytest.raises(ValueError, match="length 64 leaves no room for a prompt"):
        make_program("decode", experiment, mesh, 8, 64)
    with pytest.raises(ValueError, match="program 'serve' is not one of"):
        make_program("serve", experiment, mesh, 8, 64)


def test_what_is_missing_or_misspelt_is_said(monkeypatch):
    with pytest.raises(ValueError, match="topology 'v5e-16' is not KIND:SHAPE"):
        devices_of("v5e-16")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install -e '.\\[tpu\\]'"):
        devices_of("v5e:2x2")


@needs_libtpu
def test_bad_shardings_are_heard_of():
    devices = np.array(devices_of("v5e:2x4")).reshape(2, 4)
    mesh, before = Mesh(devices, ("x", "y"), axis_types=(AxisType.Auto,) * 2), len(full_rematerialisations())

    def reshard(a):
        a = jax.lax.with_sharding_constraint(jnp.sin(a), NamedSharding(mesh, PartitionSpec("x", None, "y")))
        return jax.lax.with_sharding_constraint(a + 1, NamedSharding(mesh, PartitionSpec(None, ("y", "x"))))

    jax.jit(reshard).lower(
        jax.ShapeDtypeStruct((16, 8, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x", "y")))
    ).compile()
    assert len(full_rematerialisations()) > before


@needs_libtpu
def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="topology 'v5e:3x5'"):
        devices_of("v5e:3x5")


@needs_libtpu
def test_slices_become_the_outer_part_of_the_data_axis():
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1, dcn_data=2), devices_of("v5e:2x2", slices=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "expert": 1, "tensor": 1}
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match="mesh.dcn_data is 1, but the devices form 2 slices"):
        make_mesh(MeshConfig(data=2, fsdp=-1), devices_of("v5e:2x2", slices=2))


def test_candidates_of_a_sweep():
    found = list(candidates(Request(config(), "v5e:4x4", "train", rows=16, length=128), chips=16))
    assert {(c.rows, c.config.model.remat) for c in found} == {
        (r, p) for r in (16, 32) for p in ("projections", "outputs", "full")
    }
    assert {c.config.mesh.sizes for c in found} == {(1, 16, 1, 1), (4, 4, 1, 1), (1, 8, 1, 2)}
    generation = list(candidates(Request(config(), "v5e:4x4", "decode", rows=4, length=128), chips=16))
    assert {c.config.mesh.sizes for c in generation} == {
        (1, 8, 1, 2),
        (1, 1, 1, 16),
    }  # four rows do not divide over sixteen chips; eight do over eight
    row = {
        "mesh": {"data": 1, "fsdp": 16, "expert": 1, "tensor": 1},
        "rows": 16,
        "remat": "full",
        "peak_hbm_gb_per_chip": 20.0,
        "spare_share": -0.25,
    }
    assert "does not fit" in as_table([row | {"fits": False}])
