"""What the TPU compiler says of stage IV at 7B: bounds of a step on v5e, v5p and v6e, without a TPU (`medplib_jax.aot`)."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from medplib_jax.aot.table import COLUMNS, markdown
from medplib_jax.benchmarks.measure import Table

TOPOLOGIES = ("v5e:8x8", "v5p:4x4x4", "v6e:8x8")


def measure() -> Table:
    """Compiles in a process each (a minute; the compiler keeps a gigabyte)."""
    reports = {}
    with tempfile.TemporaryDirectory() as folder:
        for topology in TOPOLOGIES:
            file = Path(folder) / "report.json"
            flags = ("--config=configs/stage4_moe.py:7b", f"--topology={topology}", "--config.mesh.data=1", "--config.mesh.fsdp=-1", f"--json={file}")
            subprocess.run((sys.executable, "-m", "medplib_jax.aot", *flags), check=True, capture_output=True, text=True)
            reports[topology] = json.loads(file.read_text())
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in markdown(reports).splitlines()[2:]]
    table = Table("Stage IV at 7B, by the TPU compiler", COLUMNS, rows)
    for topology, report in reports.items():
        if report["fits"]:
            kind = topology.split(":")[0]
            table.flat |= {f"tpu.{kind}.{bound}_seconds": seconds for bound, seconds in report["roofline_seconds"].items()}
            table.flat |= {f"tpu.{kind}.mfu_at_roofline": report["mfu_at_roofline"], f"tpu.{kind}.hbm_gb": report["peak_hbm_gb_per_chip"]}
    return table
