"""Topologies that programs can be compiled for without a chip at hand, and how their compilers are asked."""

import atexit
import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile

import jax
from jax.experimental import topologies

from medplib_jax.train.flops import GPUS, Chip, chip_of

# What libtpu asks of the machine it runs on (without an answer it waits for a cloud's metadata server).
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
CHIP_CONFIG = {"v4": {"chip_config_name": "megacore"}}  # one device a chip, as on a Cloud TPU VM
ONE_CHIP = {"chips_per_host_bounds": (1, 1, 1)}  # a host of its own, as Colab's
GPU_ENVIRONMENT = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}  # that the driver is new enough: there may be none
CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")

# For a TPU, weaving collectives into products changes neither what they do nor, much, what they need, but takes the
# compiler minutes. For a GPU, kernels cannot be tried out, so every product is the library's and none a Triton kernel
# that might have been faster.
COMPILER_OPTIONS = {
    "tpu": {"xla_tpu_enable_async_collective_fusion": False},
    "gpu": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
}


@dataclasses.dataclass(frozen=True)
class Multiprocessors:
    """What the compiler asks about a GPU beyond its data sheet's rates.

    From the CUDA C++ Programming Guide, compute capabilities.
    """

    name: str
    capability: str  # fields of stream_executor.CudaComputeCapabilityProto
    count: int
    float32_lanes: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes: int  # of one multiprocessor
    shared_bytes_per_block: int  # at most


_HOPPER = Multiprocessors(
    "", "major: 9 feature_extension: ACCELERATED_FEATURES", 132, 128, 1.98, 50 * 2**20, 228 * 2**10, 227 * 2**10
)
MULTIPROCESSORS = {
    "a100": Multiprocessors("NVIDIA A100-SXM4-80GB", "major: 8", 108, 64, 1.41, 40 * 2**20, 164 * 2**10, 163 * 2**10),
    "h100": dataclasses.replace(_HOPPER, name="NVIDIA H100 80GB HBM3"),
    "h200": dataclasses.replace(_HOPPER, name="NVIDIA H200"),
}


def devices_of(topology: str, slices: int = 1) -> list[jax.Device]:
    """The chips of `slices` slices (GPUs: nodes) of a topology, to compile for. Needs the platform's compiler, no chip.

    Raises ModuleNotFoundError without libtpu or CUDA plugin, ValueError for a topology that is not known.
    """
    chip, (kind, _, shape) = chip_of(topology), topology.partition(":")
    return _gpus(kind, chip, int(shape), slices) if kind in GPUS else _tpus(topology, slices)


def _tpus(topology: str, slices: int) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "compiling for a TPU needs libtpu, the extra tpu: pip install -e '.[tpu]' in the repository's root"
        )
    _set(TPU_ENVIRONMENT)
    if "TPU_LOG_DIR" not in os.environ:
        os.environ["TPU_LOG_DIR"] = tempfile.mkdtemp(prefix="tpu_logs_")
        atexit.register(shutil.rmtree, os.environ["TPU_LOG_DIR"], ignore_errors=True)
    kind, _, shape = topology.partition(":")
    options = CHIP_CONFIG.get(kind, {}) | (ONE_CHIP if set(shape) <= set("1x") else {})
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology, num_slices=slices, **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {topology!r}: {error}") from error


def _gpus(kind: str, chip: Chip, gpus: int, nodes: int) -> list[jax.Device]:
    if not any(importlib.util.find_spec(plugin) for plugin in CUDA_PLUGINS):
        raise ModuleNotFoundError(
            "compiling for a GPU needs JAX's CUDA plugin, the extra gpu:"
            " pip install -e '.[gpu]' in the repository's root"
        )
    _set(GPU_ENVIRONMENT)
    shape = f"{nodes}x1x{gpus}"  # one host per node
    return topologies.get_topology_desc(
        platform="cuda", target_config=target_config(MULTIPROCESSORS[kind], chip), topology=shape
    ).devices


def _set(environment: dict[str, str]) -> None:
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def target_config(sm: Multiprocessors, chip: Chip) -> str:
    """A stream_executor.GpuTargetConfigProto as text. What all these GPUs have in common is written out here."""
    return f"""
gpu_device_info {{
  name: "{sm.name}" device_vendor: "NVIDIA Corporation" cuda_compute_capability {{ {sm.capability} }}
  core_count: {sm.count} fpus_per_core: {sm.float32_lanes} clock_rate_ghz: {sm.clock_ghz}
  device_memory_size: {chip.hbm_bytes:.0f} memory_bandwidth: {chip.hbm_rate:.0f} l2_cache_size: {sm.l2_bytes}
  shared_memory_per_core: {sm.shared_bytes} shared_memory_per_block: {48 * 2**10}
  shared_memory_per_block_optin: {sm.shared_bytes_per_block}
  registers_per_core_limit: {2**16} registers_per_block_limit: {2**16}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1} block_dim_limit_y: {2**16 - 1} block_dim_limit_z: {2**16 - 1}
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA" device_description_str: "{sm.name}" dnn_version_info {{ major: 9 minor: 10 }}
"""


def full_rematerialisations() -> list[str]:
    """Bad shardings that this process's compiler for TPUs has named so far.

    Those are arrays that it had to collect on every chip. The compiler for GPUs prints them on the terminal.
    """
    if "TPU_LOG_DIR" not in os.environ:
        return []
    logs = pathlib.Path(os.environ["TPU_LOG_DIR"]).glob(f"*.WARNING.*.{os.getpid()}")
    text = "".join(path.read_text(errors="replace") for path in logs)
    return re.findall(r"nvoluntary full rematerialization\. (.*)", text)
