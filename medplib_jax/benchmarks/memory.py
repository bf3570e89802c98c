"""Peak memory of a training step, each side in a process of its own.

python -m medplib_jax.benchmarks.memory --side ours --size small      (one line of JSON; `--suite cpu` runs it for every side)
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import jax

from medplib_jax.benchmarks import training, workload
from medplib_jax.benchmarks.measure import Table
from medplib_jax.config.experiment import ExperimentConfig

GB = 1e9
SIDES = {"ours": "ours", "torch eager": "torch"}
STEPS = 3


def status(field: str) -> float:
    """A size of this process, from the kernel, in GB."""
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) * 1024 / GB


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(side: str, config: ExperimentConfig) -> dict[str, float]:
    """`peak`: on a CPU of the whole process while it steps, without what compiling took; on a GPU of what the framework had allocated. Ours
    also `predicted` by the compiler (arguments, temporary arrays, and results that take no argument's place; for a CPU its own peak
    leaves the temporary ones out), and the same as `measured`: on a CPU what the process grew by, arguments included."""
    on_gpu = jax.default_backend() == "gpu"
    step = training.JaxStep(config) if side == "ours" else training.torch_step(config, "cuda" if on_gpu else "cpu")
    before = status("VmRSS")
    forget_peak()
    for _ in range(STEPS):
        step()
    found = {"peak": allocated_peak(side) if on_gpu else status("VmHWM")}
    if side == "ours":
        planned = step.compiled.memory_analysis()
        arguments = planned.argument_size_in_bytes / GB
        beside = (planned.temp_size_in_bytes + planned.output_size_in_bytes - planned.alias_size_in_bytes) / GB
        found |= {
            "predicted": arguments + beside,
            "measured": found["peak"] if on_gpu else found["peak"] - before + arguments,
        }
    return found


def allocated_peak(side: str) -> float:
    """Most GB of the GPU that a framework had given out at once. Setting up takes less than a step."""
    if side == "ours":
        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / GB
    import torch

    return torch.cuda.max_memory_allocated() / GB


def compare(size: str, batch: int, layers: int, against: bool) -> Table:
    table = Table("Peak memory of a training step", ("", "peak GB", "arrays GB, measured", "arrays GB, predicted"))
    peaks = {}
    for name, side in SIDES.items():
        if side == "torch" and not against:
            continue
        flags = ("--side", side, "--size", size, "--batch", str(batch), "--layers", str(layers))
        command = (sys.executable, "-m", "medplib_jax.benchmarks.memory", *flags)
        found = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
        peaks[side] = found["peak"]
        table.rows.append(
            (
                name,
                f"{found['peak']:.2f}",
                *(f"{found[key]:.2f}" if key in found else "" for key in ("measured", "predicted")),
            )
        )
        table.flat |= {f"memory.{side}.{key}_gb": value for key, value in found.items()}
    table.flat["memory.measured_over_predicted"] = (
        table.flat["memory.ours.measured_gb"] / table.flat["memory.ours.predicted_gb"]
    )
    table.flat |= {"memory.ours_over_torch": peaks["ours"] / peaks["torch"]} if against else {}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=SIDES.values(), required=True)
    parser.add_argument("--size", choices=workload.SIZES, default="small")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4, help="of size 7b")
    options = parser.parse_args()
    print(
        json.dumps(
            measure(options.side, workload.experiment(workload.model(options.size, options.layers), options.batch))
        )
    )


if __name__ == "__main__":
    main()
