"""TPU chips as their data sheets have them, and topologies that programs can be compiled for without a chip at hand."""

import atexit
import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile

import jax

GB = 1e9

# What libtpu asks of the machine it runs on; without an answer it waits for a cloud's metadata server.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip, per second. `ici` adds up what all its links can receive at once."""

    flops: float  # bfloat16
    hbm_bytes: float
    hbm_rate: float
    ici_rate: float


# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm; one way, over the links of all torus dimensions.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1.23e12, 6 * 45e9),
    "v5e": Chip(197e12, 16 * 2**30, 0.82e12, 4 * 45e9),
    "v5p": Chip(459e12, 95 * 2**30, 2.77e12, 6 * 90e9),
    "v6e": Chip(918e12, 32 * 2**30, 1.64e12, 4 * 90e9),
    "tpu7x": Chip(2307e12, 192 * 2**30, 7.4e12, 6 * 90e9),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as v5e:8x8. ValueError names the kinds that are known."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not shape:
        raise ValueError(f"topology {topology!r} is not KIND:SHAPE such as v5e:8x8 or v5p:4x4x4; kinds: {', '.join(CHIPS)}")
    return CHIPS[kind]


def devices_of(topology: str, slices: int = 1) -> list[jax.Device]:
    """The chips of `slices` slices of a topology, to compile for. Needs libtpu, no TPU.

    Raises ModuleNotFoundError without libtpu, ValueError for a topology that libtpu does not know.
    """
    chip_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("compiling for a TPU needs libtpu, which comes with the extra: pip install 'medplib_jax[tpu]'")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if "TPU_LOG_DIR" not in os.environ:
        os.environ["TPU_LOG_DIR"] = tempfile.mkdtemp(prefix="tpu_logs_")
        atexit.register(shutil.rmtree, os.environ["TPU_LOG_DIR"], ignore_errors=True)
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {topology!r}: {error}") from error


def full_rematerialisations() -> list[str]:
    """What this process's compiler has said so far about arrays that it had to collect on every chip to shard them anew: bad shardings."""
    logs = pathlib.Path(os.environ["TPU_LOG_DIR"]).glob(f"*.WARNING.*.{os.getpid()}")
    text = "".join(path.read_text(errors="replace") for path in logs)
    return re.findall(r"nvoluntary full rematerialization\. (.*)", text)
