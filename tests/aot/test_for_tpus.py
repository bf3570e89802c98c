"""What the TPU's compiler makes of the meshes and the float32 products, for chips that nobody here has."""

import dataclasses
import importlib.util

import pytest

from medplib_jax.aot.hlo import parse
from medplib_jax.aot.programs import make_program
from medplib_jax.aot.topologies import devices_of
from medplib_jax.config.experiment import EvalConfig, MeshConfig, OptimConfig
from medplib_jax.parallel.mesh import make_mesh
from tests.helpers import MODEL, tiny_experiment

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu (the extra tpu) is not installed"
)


@pytest.mark.parametrize(
    ("topology", "devices"),
    [("v4:2x2x2", 8), ("v5e:2x4", 8), ("v5p:2x2x2", 8), ("v6e:2x4", 8), ("tpu7x:2x2x2", 16), ("tpu7x:4x4x4", 128)],
)
def test_every_kind_of_chip_makes_a_mesh(topology, devices):
    """A device of a TPU7x is half a chip, one of a v4 a whole one."""
    for config in (MeshConfig(), MeshConfig(data=1, fsdp=-1), MeshConfig(data=2, fsdp=-1, expert=2, tensor=2)):
        mesh = make_mesh(config, devices_of(topology))
        assert len({device.id for device in mesh.devices.flat}) == mesh.size == devices


@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1", "v5p:1x1x1"])
def test_a_single_chip_is_a_topology(topology):
    assert len(devices_of(topology)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "at_least"), [("train", 5), ("decode", 1)])
def test_a_v5e_multiplies_float32_in_float32(kind, at_least):
    """In a model of bfloat16. (Gradients of its kernels have one factor that was not rounded before the product.)"""
    llm = dataclasses.replace(MODEL.llm, hidden_size=256, mlp_dim=512, max_positions=256)
    config = tiny_experiment(
        model=dataclasses.replace(MODEL, llm=llm, dtype="bfloat16"),
        mesh=MeshConfig(data=1, fsdp=-1),
        optim=OptimConfig(trainable=(".*",)),
        eval=EvalConfig(max_new_tokens=4),
    )
    program = make_program(kind, config, make_mesh(config.mesh, devices_of("v5e:2x2")), 8, 128)
    computations, _ = parse(program.trace().lower().compile().as_text())
    highest = [
        "operand_precision={highest,highest}" in instruction.attributes
        for computation in computations.values()
        for instruction in computation.values()
        if instruction.opcode in ("convolution", "dot")
        and all(computation[operand].shapes[0].dtype == "f32" for operand in instruction.operands[:2])
    ]
    assert len(highest) >= at_least and all(highest)
