"""Several processes act as one: they stop at the same step, and when one fails all end, soon and with its reason.

A program that ends with `RESTART` (75, "temporary failure" in sysexits.h) asks for being started again: it was told to
stop and has saved, it hung, or it lost another process. Any other failure (1) would only come again.
"""

import contextlib
import faulthandler
import json
import logging
import os
import queue
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

log = logging.getLogger(__name__)

RESTART = 75
ABORT_KEY = "medplib_jax/abort"
POLL_SECONDS = 1.0
SHARED_DISK_SECONDS = 10
LAST_WORDS_SECONDS = 10  # how long the process that failed waits for the others to read why


def initialize_distributed() -> None:
    """Joins the other processes of the run. It must be called before anything asks for devices.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say who they are. Without them JAX finds out: on Cloud
    TPU VMs, on GKE nodes with TPUs (one slice or several), and for the tasks of one SLURM step. A process on its own
    needs none.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        numbers = [os.environ.get(name, "") for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")]
        if not all(number.isdigit() for number in numbers):
            raise ValueError(
                "JAX_COORDINATOR_ADDRESS is set: expected JAX_NUM_PROCESSES and JAX_PROCESS_ID (0, 1, ...) beside it,"
                f" found {numbers[0]!r} and {numbers[1]!r}"
            )
        jax.distributed.initialize(num_processes=int(numbers[0]), process_id=int(numbers[1]))
    elif on_tpu_vm() or in_slurm_step():
        jax.distributed.initialize()


def on_tpu_vm() -> bool:
    """Whether this host has TPU chips that the program is to use."""
    from jax._src import cloud_tpu_init  # has no public name; set when jax is imported

    return cloud_tpu_init.running_in_cloud_tpu_vm and "tpu" in os.environ.get("JAX_PLATFORMS", "tpu")


def in_slurm_step() -> bool:
    """Whether srun started several tasks; an interactive shell is one task, and uses all GPUs that it sees."""
    return "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def wait_for_others(name: str) -> None:
    """A barrier of all processes that needs no device. Through gloo, one that comes 30 s late would end the run."""
    if jax.process_count() > 1:
        multihost.get_barrier_sync_fn()(key=name, timeout_ms=3_600_000)


def of_process_0(name: str, value: str) -> str:
    """What process 0 gave as `value`, once per `name`; needs no device and waits up to an hour."""
    if jax.process_count() == 1:
        return value
    if jax.process_index() == 0:
        _client().key_value_set(f"medplib_jax/{name}", value)
    return _client().blocking_key_value_get(f"medplib_jax/{name}", 3_600_000)


def of_every_process(name: str, value: str) -> list[str]:
    """What each process gave as `value`, by process, once per `name`; needs no device and waits up to an hour."""
    if jax.process_count() == 1:
        return [value]
    _client().key_value_set(f"medplib_jax/{name}/{jax.process_index()}", json.dumps(value))
    keys = [f"medplib_jax/{name}/{process}" for process in range(jax.process_count())]
    return [json.loads(_client().blocking_key_value_get(key, 3_600_000)) for key in keys]


def require_shared(folder: Path) -> None:
    """Raises ValueError in every process unless all of them see what process 0 writes into `folder`.

    Each process gives its own path, as the folder may be mounted elsewhere.
    """
    if jax.process_count() == 1:
        return
    name = f".seen-by-all-{secrets.token_hex(8)}"
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    mark = folder / of_process_0("shared", name)
    answers = of_every_process("shared/seen", "" if _appears(mark) else f"{socket.gethostname()}:{folder}")
    if jax.process_index() == 0:
        mark.unlink()
    blind = [f"process {process} ({place})" for process, place in enumerate(answers) if place]
    if blind:
        raise ValueError(
            f"{folder}: expected one folder that all processes see; "
            f"{', '.join(blind)} does not see what process 0 writes"
        )


def _appears(path: Path) -> bool:
    """Whether the file is there within the time that a shared disk may need to show what another host has written."""
    deadline = time.monotonic() + SHARED_DISK_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


class Agreement:
    """(stop, skipped) of this process -> {"stop": the greatest, "skipped": the sum} over all processes, on the device.

    Read late like any metric it costs no waiting, and every process reads the same of the same step.
    """

    def __init__(self, mesh: Mesh):
        self._rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._shape = (mesh.size, 2)
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._reduce = jax.jit(
            lambda rows: {"stop": rows[:, 0].max(), "skipped": rows[:, 1].sum()}, out_shardings=everywhere
        )

    def __call__(self, stop: int, skipped: int) -> dict[str, jax.Array]:
        values = [np.array([[stop, skipped]], np.int32)] + [np.zeros((1, 2), np.int32)] * (
            len(self._rows.addressable_devices) - 1
        )
        devices = sorted(self._rows.addressable_devices, key=lambda device: device.id)
        parts = [jax.device_put(value, device) for value, device in zip(values, devices, strict=True)]
        return self._reduce(jax.make_array_from_single_device_arrays(self._shape, self._rows, parts))


@contextlib.contextmanager
def abort_together() -> Iterator[None]:
    """An error within ends all processes, which would otherwise wait for this one; alone, it is raised as usual."""
    if jax.process_count() == 1:
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch_for_abort, args=(over,), name="abort", daemon=True)
    watcher.start()
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        abort(f"{type(error).__name__}: {error}", exit_code(error))
    finally:
        over.set()
        watcher.join()


def exit_code(error: Exception) -> int:
    """RESTART for what a lost process or a broken link looks like from here, else 1."""
    if "Gloo" in str(error):  # JAX raises what its transport between CPUs reports as errors of several types
        return RESTART
    lost = isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(
        ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")
    )
    return RESTART if lost else 1


def abort(reason: str, code: int) -> None:
    """Tells the other processes why, and ends this one without clean-up, which could wait for them forever."""
    threading.Timer(2 * LAST_WORDS_SECONDS, os._exit, (code,)).start()  # in case that telling them hangs, too
    if jax.process_count() > 1:
        words = json.dumps({"process": jax.process_index(), "reason": reason, "code": code})
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was faster, or the coordinator is gone
            _client().key_value_set(ABORT_KEY, words)
        _goodbye()
    _exit(code)


def _watch_for_abort(over: threading.Event) -> None:
    """Asks again and again: a thread that waits inside the client would bring the program down when it ends."""
    words = None
    while words is None:
        if over.wait(POLL_SECONDS):
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody has said anything yet
            words = json.loads(_client().key_value_try_get(ABORT_KEY))
    if words["process"] == jax.process_index():
        return
    log.error("process %d ends the run: %s", words["process"], words["reason"])
    if words["code"] == RESTART:
        faulthandler.dump_traceback(all_threads=True)
    _goodbye()
    _exit(words["code"])


def _goodbye() -> None:
    """Waits until all have read why; process 0 holds the message, so it must not be the first to go."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().wait_at_barrier(ABORT_KEY, LAST_WORDS_SECONDS * 1000)


def _client() -> Any:
    from jax._src import distributed  # the key-value store of jax.distributed has no public name yet

    return distributed.global_state.client


def _exit(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


class Watchdog:
    """Within the context, more than `seconds` without a `beat` ends all processes with RESTART.

    First it prints what every thread is doing.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._beats: queue.SimpleQueue[bool] = queue.SimpleQueue()  # False: it is over

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._beats.put(False)

    def beat(self) -> None:
        self._beats.put(True)

    def _watch(self) -> None:
        try:
            while self._beats.get(timeout=self._seconds):
                pass
        except queue.Empty:
            log.error("no step was finished for %g s; what each thread is doing:", self._seconds)
            faulthandler.dump_traceback(all_threads=True)
            abort(f"no step was finished for {self._seconds:g} s", RESTART)
