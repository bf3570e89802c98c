"""The device mesh: axes data, fsdp, expert, tensor. One device is a mesh too, so that every run takes the same way."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from medplib_jax.config.experiment import MeshConfig

MESH_AXES = MeshConfig.AXES


def resolve(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """The sizes of the four axes with -1 filled in, data over all slices. Raises ValueError when their product is not `num_devices`."""
    given = math.prod(size for size in config.sizes if size != -1) * config.dcn_data
    described = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, config.sizes))
    described += f", dcn_data={config.dcn_data}" if config.dcn_data > 1 else ""
    if num_devices % given:
        raise ValueError(f"mesh {described}: {num_devices} devices are not a multiple of {given}")
    if -1 not in config.sizes and given != num_devices:
        raise ValueError(
            f"mesh {described} needs {given} devices, found {num_devices}; one size may be -1, for whatever is left"
        )
    data, *rest = (num_devices // given if size == -1 else size for size in config.sizes)
    return data * config.dcn_data, *rest


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them), axes Auto: the compiler propagates shardings.

    With several TPU slices the data axis spans them (slower network outside, fast links inside). Raises ValueError when the
    sizes do not fit.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = resolve(config, len(devices))
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices > 1:
        if num_slices != config.dcn_data:
            raise ValueError(f"mesh.dcn_data is {config.dcn_data}, but the devices form {num_slices} slices")
        inner = (sizes[0] // num_slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, (num_slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def one_device() -> Mesh:
    """The mesh of this process's first device."""
    return make_mesh(MeshConfig(), jax.local_devices()[:1])
