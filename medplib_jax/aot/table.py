"""Reports as a Markdown table.

COMMAND
    python -m medplib_jax.aot.table REPORT.json ...    (written by `python -m medplib_jax.aot --json=REPORT.json`)
"""

import json
import pathlib
import sys
from typing import Any

COLUMNS = (
    "program",
    "topology",
    "mesh",
    "batch",
    "HBM GB at peak",
    "spare",
    "executed / model FLOPs",
    "compute s",
    "HBM s",
    "ICI s",
    "tokens/s per chip",
)


def markdown(reports: dict[str, dict[str, Any]]) -> str:
    """{"PROGRAM on TOPOLOGY": report} as a table; the mesh is data x fsdp x expert x tensor."""
    rows = [
        COLUMNS,
        ["---"] * len(COLUMNS),
        *(_row(name.partition(" on ")[0], report) for name, report in reports.items()),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(name: str, report: dict[str, Any]) -> list[str]:
    parts = f" in {report['accumulate']}" if report["accumulate"] > 1 else ""
    head = [
        name,
        report["topology"],
        " x ".join(map(str, report["mesh"].values())),
        f"{report['rows']} x {report['length']}{parts}",
    ]
    if not report["fits"]:
        return (
            head
            + [f"{report['peak_hbm_gb_per_chip'] or '?':.1f} of {report['hbm_gb_per_chip']:.1f}", "does not fit"]
            + [""] * 5
        )
    return head + [
        f"{report['peak_hbm_gb_per_chip']:.1f} of {report['hbm_gb_per_chip']:.1f}",
        f"{report['spare_share']:.0%}",
        f"{report['executed_over_model']:.2f}",
        *(f"{seconds:.2f}" for seconds in report["roofline_seconds"].values()),
        f"{report['tokens_per_second_per_chip']:.0f}",
    ]


def main(files: list[str]) -> None:
    print(markdown({pathlib.Path(file).stem: json.loads(pathlib.Path(file).read_text()) for file in files}))


if __name__ == "__main__":
    main(sys.argv[1:])
