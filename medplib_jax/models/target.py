"""What a program is made for, asked while it is traced: the devices of an array's mesh, else the default ones.

`made_for` says otherwise. So a CPU runs the program that a TPU would get, its kernels interpreted:

    with made_for("tpu"), pltpu.force_tpu_interpret_mode():
        step(state, batch)
"""

import dataclasses

import jax
from jax.sharding import Mesh

from medplib_jax.batch import Array


@dataclasses.dataclass(frozen=True)
class Target:
    """What is asked of a device; JAX's own have these fields, too."""

    platform: str
    device_kind: str


_chosen = jax.make_user_context()  # a part of the key of JAX's caches: programs made for something else stay apart


def made_for(platform: str, device_kind: str = ""):
    """A context in which programs are made for such devices, whatever devices run them."""
    return _chosen(Target(platform, device_kind))


def target_device(x: Array):
    """What the program that is being traced is made for; has `platform` and `device_kind`."""
    return _chosen.value or jax.typeof(x).sharding.mesh.abstract_device or jax.devices()[0]


def platform_of(mesh: Mesh) -> str:
    """What programs on this mesh are made for."""
    return (_chosen.value or mesh.devices.flat[0]).platform


def is_for_tpu(x: Array) -> bool:
    """Whether the program that is being traced is made for a TPU."""
    return target_device(x).platform == "tpu"


def is_for_gpu(x: Array) -> bool:
    """Whether the program that is being traced is made for a GPU."""
    return target_device(x).platform == "gpu"


def is_simulated() -> bool:
    """Whether the devices that will run the program may be others than those it is made for."""
    return _chosen.value is not None
