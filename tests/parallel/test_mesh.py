import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from medplib_jax.config.experiment import MeshConfig
from medplib_jax.parallel import mesh as mesh_module
from medplib_jax.parallel.mesh import make_mesh, resolve
from medplib_jax.parallel.processes import initialize_distributed


def test_axes_are_named_and_auto():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 4


def test_one_device_is_a_mesh():
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}


def test_sizes_that_do_not_fit_are_refused():
    assert resolve(MeshConfig(data=2, fsdp=-1), 8) == (2, 4, 1, 1)
    assert resolve(MeshConfig(data=1, fsdp=-1, dcn_data=2), 8) == (2, 4, 1, 1)
    with pytest.raises(ValueError, match="fsdp=3.*8 devices are not a multiple of 3"):
        resolve(MeshConfig(data=-1, fsdp=3), 8)
    with pytest.raises(ValueError, match="needs 4 devices, found 8"):
        resolve(MeshConfig(data=2, fsdp=2), 8)
    with pytest.raises(ValueError, match="data=1, .*dcn_data=3: 8 devices are not a multiple of 3"):
        resolve(MeshConfig(data=1, dcn_data=3), 8)
    with pytest.raises(ValueError, match="mesh.dcn_data 0"):
        MeshConfig(dcn_data=0)
    with pytest.raises(ValueError, match="at most one of them -1"):
        MeshConfig(data=-1, fsdp=-1)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What `make_mesh` asks of a device."""

    id: int
    slice_index: int  # JAX's client for CUDA counts nodes here
    platform: str = "gpu"


CLUSTER = [Gpu(id, id // 8) for id in range(32)]  # four nodes of eight


def nodes_along(mesh, axis: str) -> int:
    """On how many nodes the devices of one line along the axis are, at most."""
    lines = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), -1).reshape(-1, mesh.shape[axis])
    return max(len({device.slice_index for device in line}) for line in lines)


@pytest.mark.parametrize(
    ("config", "sizes", "nodes"),
    [
        (MeshConfig(fsdp=32), (1, 32, 1, 1), {"fsdp": 4}),
        (MeshConfig(fsdp=16), (2, 16, 1, 1), {"data": 2, "fsdp": 2}),
        (MeshConfig(fsdp=4, tensor=8, data=1), (1, 4, 1, 8), {"fsdp": 4, "tensor": 1}),
        (MeshConfig(fsdp=8, dcn_data=4), (4, 8, 1, 1), {"data": 4, "fsdp": 1}),
        (MeshConfig(fsdp=-1, data=1, dcn_data=2), (2, 16, 1, 1), {"data": 2, "fsdp": 2}),
    ],
)
def test_nodes_of_gpus_are_one_mesh(config, sizes, nodes):
    mesh = make_mesh(config, CLUSTER[::-1])
    assert mesh.devices.shape == sizes
    assert {axis: nodes_along(mesh, axis) for axis in nodes} == nodes


def test_nodes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="mesh.dcn_data is 8, which does not divide the 4 nodes"):
        make_mesh(MeshConfig(dcn_data=8), CLUSTER)
    with pytest.raises(ValueError, match="mesh.dcn_data is 1, but the devices form 4 slices"):
        make_mesh(MeshConfig(), [dataclasses.replace(device, platform="tpu") for device in CLUSTER])


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("variables", "on_tpu", "expected"),
    [
        ({}, False, None),
        (
            {"JAX_COORDINATOR_ADDRESS": "host0:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"},
            False,
            {"num_processes": 4, "process_id": 2},
        ),
        (SLURM | {"SLURM_NTASKS": "16"}, False, {}),
        (SLURM | {"SLURM_NTASKS": "1"}, False, None),  # an interactive shell
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, False, None),  # the batch script itself, outside of srun
        ({}, True, {}),
        ({"JAX_PLATFORMS": "cpu"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False, None),  # compiling for TPUs on a laptop
    ],
)
def test_who_joins_other_processes(monkeypatch, variables, on_tpu, expected):
    calls = []
    for name in (
        "JAX_COORDINATOR_ADDRESS",
        "SLURM_STEP_NODELIST",
        "SLURM_NTASKS",
        "TPU_WORKER_HOSTNAMES",
        "JAX_PLATFORMS",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("jax._src.cloud_tpu_init.running_in_cloud_tpu_vm", on_tpu)
    monkeypatch.setattr(mesh_module.jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    initialize_distributed()
    assert calls == ([] if expected is None else [expected])


def test_jax_finds_the_coordinator_of_a_slurm_step(monkeypatch):
    """What `jax.distributed.initialize` makes of the variables that srun sets:

    The names above must stay those that it reads.
    """
    from jax._src.clusters import SlurmCluster

    for name, value in (SLURM | {"SLURM_NTASKS": "16"}).items():
        monkeypatch.setenv(name, value)
    assert (
        SlurmCluster.is_env_present() and SlurmCluster.get_process_id() == 3 and SlurmCluster.get_process_count() == 16
    )
    assert SlurmCluster.get_coordinator_address(None, None).startswith("gpu03:")
