"""Lower bounds of a training step at 7B on v5e, v5p and v6e, by the TPU's compiler and without a TPU."""

import dataclasses
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

from medplib_jax.aot.report import Request, examine
from medplib_jax.aot.table import COLUMNS, markdown
from medplib_jax.benchmarks.measure import Table
from medplib_jax.config.experiment import ExperimentConfig

TOPOLOGIES = {"v5e:8x8": (1, 64), "v5p:2x4x4": (2, 16), "v6e:8x8": (1, 64)}  # and the mesh: data, fsdp


def measure(recipe: ExperimentConfig) -> Table:
    """Compiles in a process each: a minute, and the compiler keeps a gigabyte. ModuleNotFoundError without libtpu."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes: an accelerator of this machine is not needed
    reports = {}
    for topology, (data, fsdp) in TOPOLOGIES.items():
        config = dataclasses.replace(recipe, mesh=dataclasses.replace(recipe.mesh, data=data, fsdp=fsdp))
        request = Request(config, topology, "train", config.data.batch_size, config.data.bucket_lengths[-1])
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            reports[topology] = pool.submit(examine, request).result()
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in markdown(reports).splitlines()[2:]]
    table = Table("Stage IV at 7B, by the TPU compiler", COLUMNS, rows)
    for topology, report in reports.items():
        if report["fits"]:
            name = f"tpu.{topology.split(':')[0]}"
            table.flat |= {f"{name}.{bound}_seconds": value for bound, value in report["roofline_seconds"].items()}
            table.flat[f"{name}.mfu_at_roofline"] = report["mfu_at_roofline"]
            table.flat[f"{name}.hbm_gb"] = report["peak_hbm_gb_per_chip"]
    return table
