"""The device mesh: axes data, fsdp, expert, tensor. One device is a mesh too, so that every run takes the same way."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from medplib_jax.config.experiment import MeshConfig

MESH_AXES = MeshConfig.AXES

Device = Any  # jax.Device, which type checkers do not take for a type


def resolve(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """The sizes of the four axes with -1 filled in; that of data counts all slices.

    Raises ValueError when their product is not `num_devices`.
    """
    given = math.prod(size for size in config.sizes if size != -1) * config.dcn_data
    described = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, config.sizes, strict=True))
    described += f", dcn_data={config.dcn_data}" if config.dcn_data > 1 else ""
    if num_devices % given:
        raise ValueError(f"mesh {described}: {num_devices} devices are not a multiple of {given}")
    if -1 not in config.sizes and given != num_devices:
        raise ValueError(
            f"mesh {described} needs {given} devices, found {num_devices}; one size may be -1, for whatever is left"
        )
    data, *rest = (num_devices // given if size == -1 else size for size in config.sizes)
    return data * config.dcn_data, *rest


def make_mesh(config: MeshConfig, devices: Sequence[Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them) whose axes are Auto: the compiler propagates shardings.

    With `dcn_data` > 1 the outer part of the data axis runs over the slices (TPU) or groups of nodes (GPU), between
    which the network is slow. All other axes stay within one. Raises ValueError when the sizes do not fit.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = resolve(config, len(devices))
    slices = len({_slice_of(device) for device in devices})
    arrange = _tpu_grid if devices[0].platform == "tpu" else _grid
    grid = arrange(sizes, config.dcn_data, slices, devices)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _slice_of(device: Device) -> int:
    """The TPU slice of a device. JAX numbers nodes of GPUs so, too."""
    return getattr(device, "slice_index", 0)


def _tpu_grid(sizes: tuple[int, ...], dcn_data: int, slices: int, devices: list[Device]) -> np.ndarray:
    if slices > 1 and slices != dcn_data:
        raise ValueError(f"mesh.dcn_data is {dcn_data}, but the devices form {slices} slices")
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    inner, outer = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def _grid(sizes: tuple[int, ...], dcn_data: int, slices: int, devices: list[Device]) -> np.ndarray:
    """Devices node by node: the outermost axis, data, runs over the nodes. An axis larger than a node spans several."""
    if slices > 1 and slices % dcn_data:
        raise ValueError(f"mesh.dcn_data is {dcn_data}, which does not divide the {slices} nodes")
    return np.array(sorted(devices, key=_slice_of), dtype=object).reshape(sizes)


def one_device() -> Mesh:
    """The mesh of this process's first device."""
    return make_mesh(MeshConfig(), jax.local_devices()[:1])
