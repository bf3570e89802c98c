"""What a program is compiled for, asked while it is traced: the devices of an array's mesh, else the default ones."""

import jax

from medplib_jax.batch import Array


def target_device(x: Array):
    """What the program that is being traced will run on; has `platform` and `device_kind`."""
    return jax.typeof(x).sharding.mesh.abstract_device or jax.devices()[0]


def is_for_tpu(x: Array) -> bool:
    """Whether the program that is being traced will run on a TPU."""
    return target_device(x).platform == "tpu"


def is_for_gpu(x: Array) -> bool:
    """Whether the program that is being traced will run on a GPU."""
    return target_device(x).platform == "gpu"
