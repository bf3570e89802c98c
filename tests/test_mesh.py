import jax
import pytest
from jax.sharding import AxisType

from medplib_jax.experiment import MeshConfig
from medplib_jax.mesh import make_mesh, resolve


def test_axes_are_named_and_auto():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 4


def test_one_device_is_a_mesh():
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}


def test_sizes_that_do_not_fit_are_refused():
    assert resolve(MeshConfig(data=2, fsdp=-1), 8) == (2, 4, 1, 1)
    with pytest.raises(ValueError, match="fsdp=3.*8 devices are not a multiple of 3"):
        resolve(MeshConfig(data=-1, fsdp=3), 8)
    with pytest.raises(ValueError, match="needs 4 devices, found 8"):
        resolve(MeshConfig(data=2, fsdp=2), 8)
    with pytest.raises(ValueError, match="at most one -1"):
        MeshConfig(data=-1, fsdp=-1)
