"""Compiled programs are kept on disk from one run to the next, and counted."""

import contextlib
import ctypes
import functools
import gc
import logging
import os
import threading
import time
from collections.abc import Iterator

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from medplib_jax.parallel.quiet import ignore_missing_tpu

log = logging.getLogger(__name__)

FOLDER = "~/.cache/medplib_jax"
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def use_cache() -> None:
    """Keeps compiled programs in JAX_COMPILATION_CACHE_DIR, by default in ~/.cache/medplib_jax.

    JAX_ENABLE_COMPILATION_CACHE=false turns it off. Command lines call it first. It also leaves what they imported out
    of garbage collection: tracing programs would look through all of it again and again, a sixth of the start.
    """
    if getattr(jax.config, "jax_compilation_cache_dir") is None:  # noqa: B009 - jax.config declares no fields
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(FOLDER))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    ignore_missing_tpu()
    gc.freeze()


def release_memory() -> None:
    """Gives memory that was freed (by compiling, say) back to the system. glibc would keep it: gigabytes."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@functools.cache
def return_freed_memory() -> None:
    """From now on arrays of 4 MB and more go back to the system as soon as they are freed, and what compiling took
    when it ends.

    glibc would keep the arrays for later, up to the largest size that it has seen, for every thread. A decoder of 32
    layers takes 0.4 GB to compile.
    """
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        set_option(M_MMAP_THRESHOLD, 2**22)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: release_memory() if event == COMPILED else None
    )


def is_gpu(mesh: Mesh) -> bool:
    """Whether programs on this mesh are for GPUs."""
    return mesh.devices.flat[0].platform == "gpu"


def compiler_options(mesh: Mesh, frugal: bool = False) -> dict[str, int | str]:
    """What XLA is told beside its defaults. `frugal`: on a CPU memory counts for more than doing things at once.

    On a GPU it does not merge products with the same factor. It would copy the other factors (the kernels of queries,
    keys and values) into one array first, in every layer and for every token.
    """
    if is_gpu(mesh):
        return {"xla_gpu_dot_merger_threshold_mb": 0}
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if frugal and on_cpu else {}


LOWERED, COMPILED = "/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compiling_shown(bar: tqdm, every: float = 1.0) -> Iterator[None]:
    """While a program is compiled, the bar says "compiling, N s" behind its name, each `every` seconds."""
    if bar.disable:
        yield
        return
    began: dict[int, float] = {}  # by thread
    name, ended = bar.desc.removesuffix(": "), threading.Event()

    def happened(event: str, *_, **__) -> None:
        if event == LOWERED:  # compiling follows at once
            began[threading.get_ident()] = time.perf_counter()
        elif event == COMPILED:
            began.pop(threading.get_ident(), None)

    def tick() -> None:
        said = False
        while not ended.wait(every):
            since = min(list(began.values()), default=None)
            if since is not None:
                bar.set_description(f"{name}, compiling, {time.perf_counter() - since:.0f} s")
            elif said:
                bar.set_description(name)
            said = since is not None

    ticker = threading.Thread(target=tick, name="compiling", daemon=True)
    jax.monitoring.register_event_duration_secs_listener(happened)
    ticker.start()
    try:
        yield
    finally:
        ended.set()
        ticker.join()
        jax.monitoring.unregister_event_duration_listener(happened)
        bar.set_description(name)


class Compilations:
    """Counts programs from its creation on: `requested` in all, `cached` of them found on disk, `seconds` for both."""

    def __init__(self):
        self.requested, self.cached, self.seconds = 0, 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._timed)
        jax.monitoring.register_event_listener(self._happened)

    def _timed(self, event: str, duration_secs: float, **_) -> None:
        if event == COMPILED:
            self.requested += 1
            self.seconds += duration_secs

    def _happened(self, event: str, **_) -> None:
        self.cached += event == "/jax/compilation_cache/cache_hits"

    def __str__(self) -> str:
        return f"{self.requested} programs in {self.seconds:.1f} s, {self.cached} of them from the cache"
