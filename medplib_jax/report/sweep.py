"""One report about many checkpoints on many tasks: report.html, report.md and report.json of a sweep's workdir."""

import json
from pathlib import Path

from medplib_jax.report.page import ReportData, write_report


def write_sweep_report(workdir: str | Path) -> Path:
    """Reads `workdir`/sweep.json and writes `workdir`/report.html; returns its path."""
    workdir = Path(workdir)
    sweep = json.loads((workdir / "sweep.json").read_text(encoding="utf-8"))
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for cell in sweep["cells"]:
        overall = {name: value for name, value in cell["metrics"].items() if "/" not in name}
        tables.setdefault(f"{cell['task']} ({cell['protocol']})", {})[cell["checkpoint"]] = overall
    return write_report(ReportData(title="Evaluation sweep", tables=tables), workdir)
