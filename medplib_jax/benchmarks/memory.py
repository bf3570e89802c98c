"""Peak memory of a training step, each side in a process of its own."""

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax

from medplib_jax.benchmarks.measure import Table
from medplib_jax.benchmarks.training import JaxStep, torch_step
from medplib_jax.benchmarks.workload import Rival
from medplib_jax.config.experiment import ExperimentConfig

GB = 1e9
STEPS = 3
COLUMNS = ("", "peak GB", "arrays GB, measured", "arrays GB, predicted")


def compare(config: ExperimentConfig, rival: Rival | None) -> Table:
    """A row per side. RuntimeError anywhere but on Linux, whose kernel counts the peak."""
    if not Path("/proc/self/clear_refs").exists():
        raise RuntimeError("the peak is counted by Linux's kernel only; leave this part out by --only")
    table = Table("Peak memory of a training step", COLUMNS)
    for side in (None, rival) if rival else (None,):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(measure, config, side).result()
        cells = (f"{found[key]:.2f}" if key in found else "" for key in ("peak", "measured", "predicted"))
        table.rows.append(("torch eager" if side else "ours", *cells))
        table.flat |= {f"memory.{'torch' if side else 'ours'}.{key}_gb": value for key, value in found.items()}
    flat = table.flat
    flat["memory.measured_over_predicted"] = flat["memory.ours.measured_gb"] / flat["memory.ours.predicted_gb"]
    if rival:
        flat["memory.ours_over_torch"] = flat["memory.ours.peak_gb"] / flat["memory.torch.peak_gb"]
    return table


def measure(config: ExperimentConfig, rival: Rival | None) -> dict[str, float]:
    """Of the rival's step, or of ours where it is None.

    `peak`: on a CPU, GB of the whole process while it steps, without what compiling took; on a GPU, what the framework
    had allocated. Ours has two figures more. `predicted` is the compiler's: arguments, temporary arrays, and results
    that take no argument's place. `measured` is the same sum; on a CPU it is what the process grew by, and the
    arguments.
    """
    on_gpu = jax.default_backend() == "gpu"
    step = torch_step(config, rival) if rival else JaxStep(config)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    for _ in range(STEPS):
        step()
    found = {"peak": _allocated_peak(rival) if on_gpu else status("VmHWM")}
    if rival is None:
        planned = step.compiled.memory_analysis()
        arguments = planned.argument_size_in_bytes / GB
        beside = (planned.temp_size_in_bytes + planned.output_size_in_bytes - planned.alias_size_in_bytes) / GB
        measured = found["peak"] if on_gpu else found["peak"] - before + arguments
        found |= {"predicted": arguments + beside, "measured": measured}
    return found


def status(field: str) -> float:
    """A size of this process, from the kernel, in GB."""
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) * 1024 / GB


def _allocated_peak(rival: Rival | None) -> float:
    """Most GB of the GPU that a framework had given out at once. Setting up takes less than a step."""
    if rival is None:
        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / GB
    import torch

    return torch.cuda.max_memory_allocated() / GB
