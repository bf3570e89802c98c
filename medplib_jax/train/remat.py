"""`model.remat` "auto": the least recomputation that fits, found by the compiler of the devices at hand.

A rematerialisation policy (`models/remat.py`) trades FLOPs for memory. How much a step needs is the compiler's to say:
it compiles the step with one policy after the other, those that recompute least first, until enough memory is spare.
"""

import dataclasses
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import jax
import psutil
from jax.sharding import Mesh

from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.parallel.processes import of_process_0
from medplib_jax.train.flops import chip_of_device
from medplib_jax.train.program import peak_bytes, train_program

log = logging.getLogger("medplib_jax.train")

AUTO = "auto"
LEAST_FIRST = ("products", "gate", "projections", "outputs", "full")
SPARE = 0.1  # share of a device's memory that stays free, for the runtime and what else it holds
CACHE = "remat.json"  # beside the compiled programs: peaks of steps that were compiled before


def candidates(config: ExperimentConfig) -> Iterator[ExperimentConfig]:
    """The config with each policy that "auto" may mean, those that recompute least first."""
    for policy in LEAST_FIRST:
        yield dataclasses.replace(config, model=dataclasses.replace(config.model, remat=policy))


def with_policy(config: ExperimentConfig, mesh: Mesh) -> ExperimentConfig:
    """The config with a policy in place of "auto": the first that leaves SPARE of the memory, or the last of them.

    Every process compiles what process 0 does not know, and all take what process 0 finds.
    """
    if config.model.remat != AUTO:
        return config
    limit, found = _memory(mesh), config
    known = json.loads(of_process_0("remat/known", json.dumps(_read_cache())))
    for found in candidates(config):
        peak = _peak(found, mesh, known)
        needs = "more than there is" if peak is None else f"{peak / 1e9:.2f} GB"
        log.info("model.remat %s needs %s of %.2f GB", found.model.remat, needs, limit / 1e9)
        if peak is not None and peak <= (1 - SPARE) * limit:
            break
    policy = of_process_0("remat/chosen", found.model.remat)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=policy))


def _memory(mesh: Mesh) -> float:
    """Bytes of one device; of a CPU its share of the machine's."""
    device = mesh.devices.flat[0]
    chip = chip_of_device(device)
    return chip.hbm_bytes if chip else psutil.virtual_memory().total / len(mesh.local_devices)


def _peak(config: ExperimentConfig, mesh: Mesh, known: dict[str, int | None]) -> int | None:
    """Bytes that a step on the longest batch needs on each device, None if the compiler refuses it.

    `known`: those of programs that were compiled before, by `_key`.
    """
    program = train_program(config, mesh, config.data.batch_size, config.data.bucket_lengths[-1])
    lowered = program.trace().lower()
    device = mesh.devices.flat[0]
    key = _key(lowered.as_text(), program.jit["compiler_options"], device)
    if key in known:
        return known[key]
    try:
        peak = peak_bytes(lowered.compile(), device.platform)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        peak = None
    _write_cache(key, peak)
    return peak


def _key(text: str, options: dict[str, int | str], device: jax.Device) -> str:
    """Of all that a compiled program's peak depends on."""
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    compiler = jax.__version__, device.client.platform_version, device.device_kind, options, flags
    return hashlib.sha256(f"{compiler} {text}".encode()).hexdigest()


def _cache_file() -> Path | None:
    folder = jax.config.jax_compilation_cache_dir
    return Path(folder) / CACHE if folder and "://" not in folder else None


def _read_cache() -> dict[str, int | None]:
    """The peaks on disk; none, with a warning, where the file cannot be used: compiling finds them again."""
    file = _cache_file()
    if not file or not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        log.warning("%s is not used: %s", file, error)
        return {}
    if isinstance(found, dict) and all(peak is None or type(peak) is int for peak in found.values()):
        return found
    log.warning("%s is not used: expected numbers of bytes by key", file)
    return {}


def _write_cache(key: str, peak: int | None) -> None:
    if not (file := _cache_file()) or jax.process_index() != 0:
        return
    partial = file.with_name(f"{CACHE}.{secrets.token_hex(4)}")  # several runs may share the folder
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(_read_cache() | {key: peak}), encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        log.warning("%s is not written: %s", file, error)
