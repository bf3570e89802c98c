"""Peak memory of a training step, each side in a process of its own.

    python -m medplib_jax.benchmarks.memory --side ours --size small      (one line of JSON; `--suite cpu` runs it for every side)
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from medplib_jax.benchmarks import training, workload
from medplib_jax.benchmarks.measure import Table

GB = 1e9
SIDES = {"ours": "ours", "torch eager": "torch"}
STEPS = 3


def status(field: str) -> float:
    """A size of this process, from the kernel, in GB."""
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) * 1024 / GB


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(side: str, size: str) -> dict[str, float]:
    """`peak`: of the whole process while it steps, without what compiling took. Ours also `predicted` by the compiler (arguments, temporary
    arrays, and results that take no argument's place; for a CPU its own peak leaves the temporary ones out), and the same as `measured`:
    what the process grew by, arguments included."""
    config = workload.experiment(workload.MODELS[size], 2)
    step = training.JaxStep(config) if side == "ours" else training.torch_step(config)
    before = status("VmRSS")
    forget_peak()
    for _ in range(STEPS):
        step()
    found = {"peak": status("VmHWM")}
    if side == "ours":
        planned = step.compiled.memory_analysis()
        arguments = planned.argument_size_in_bytes / GB
        beside = (planned.temp_size_in_bytes + planned.output_size_in_bytes - planned.alias_size_in_bytes) / GB
        found |= {"predicted": arguments + beside, "measured": found["peak"] - before + arguments}
    return found


def compare(size: str, against: bool) -> Table:
    table = Table("Peak memory of a training step", ("", "process GB", "arrays GB, measured", "arrays GB, predicted"))
    peaks = {}
    for name, side in SIDES.items():
        if side == "torch" and not against:
            continue
        command = (sys.executable, "-m", "medplib_jax.benchmarks.memory", "--side", side, "--size", size)
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout.splitlines()[-1])
        peaks[side] = found["peak"]
        table.rows.append((name, f"{found['peak']:.2f}", *(f"{found[key]:.2f}" if key in found else "" for key in ("measured", "predicted"))))
        table.flat |= {f"memory.{side}.{key}_gb": value for key, value in found.items()}
    table.flat["memory.measured_over_predicted"] = table.flat["memory.ours.measured_gb"] / table.flat["memory.ours.predicted_gb"]
    table.flat |= {"memory.ours_over_torch": peaks["ours"] / peaks["torch"]} if against else {}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=SIDES.values(), required=True)
    parser.add_argument("--size", choices=workload.MODELS, default="small")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.side, arguments.size)))


if __name__ == "__main__":
    main()
