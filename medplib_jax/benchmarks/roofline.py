"""What the TPU compiler says of stage IV at 7B: bounds of a step on v5e, v5p and v6e, without a TPU (`medplib_jax.aot`)."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from medplib_jax.aot.table import COLUMNS, markdown
from medplib_jax.benchmarks.measure import Table

TOPOLOGIES = {"v5e:8x8": (1, 64), "v5p:2x4x4": (2, 16), "v6e:8x8": (1, 64)}  # and the mesh: data, fsdp


def measure() -> Table:
    """Compiles in a process each (a minute; the compiler keeps a gigabyte)."""
    reports = {}
    with tempfile.TemporaryDirectory() as folder:
        for topology, (rows, width) in TOPOLOGIES.items():
            file = Path(folder) / "report.json"
            flags = (
                "--config=configs/stage4_moe.py:7b",
                f"--topology={topology}",
                f"--config.mesh.data={rows}",
                f"--config.mesh.fsdp={width}",
                f"--json={file}",
            )
            subprocess.run(
                (sys.executable, "-m", "medplib_jax.aot", *flags), check=True, capture_output=True, text=True
            )
            reports[topology] = json.loads(file.read_text())
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in markdown(reports).splitlines()[2:]]
    table = Table("Stage IV at 7B, by the TPU compiler", COLUMNS, rows)
    for topology, report in reports.items():
        if report["fits"]:
            kind = topology.split(":")[0]
            table.flat |= {
                f"tpu.{kind}.{bound}_seconds": seconds for bound, seconds in report["roofline_seconds"].items()
            }
            table.flat |= {
                f"tpu.{kind}.mfu_at_roofline": report["mfu_at_roofline"],
                f"tpu.{kind}.hbm_gb": report["peak_hbm_gb_per_chip"],
            }
    return table
