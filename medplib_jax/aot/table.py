"""Reports as a Markdown table.

COMMAND
    python -m medplib_jax.aot.table REPORT.json ...    (written by `python -m medplib_jax.aot --json=REPORT.json`)
"""

import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

COLUMNS = (
    "program",
    "topology",
    "mesh",
    "batch",
    "remat",
    "HBM GB at peak",
    "spare",
    "executed / model FLOPs",
    "compute s",
    "HBM s",
    "ICI s",
    "tokens/s per chip",
    "MFU at most",
)
OF_GENERATION = (
    "program",
    "topology",
    "mesh",
    "batch",
    "8 bits",
    "HBM GB at peak",
    "spare",
    "GB per token",
    "weights in use and filled cache GB",
    "ratio",
    "HBM ms per token",
    "GB before and after",
)


def markdown(reports: dict[str, dict[str, Any]]) -> str:
    """{"PROGRAM on TOPOLOGY": report} as a table, generation as one of its own.

    The mesh is data x fsdp x expert x tensor. A step takes at least its largest floor, which bounds MFU.
    """
    kinds = (COLUMNS, _work_of_step, False), (OF_GENERATION, _work_of_token, True)
    tables = []
    for columns, work, generates in kinds:
        chosen = [(name, one) for name, one in reports.items() if (one["program"] == "decode") == generates]
        rows = [_row(name.partition(" on ")[0], report, columns, work) for name, report in chosen]
        if rows:
            tables.append("\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)))
    return "\n\n".join(tables)


def _row(name: str, report: dict[str, Any], columns: Sequence[str], work: Callable) -> list[str]:
    parts = f" in {report['accumulate']}" if report["accumulate"] > 1 else ""
    head = [
        name,
        report["topology"],
        " x ".join(map(str, report["mesh"].values())),
        f"{report['rows']} x {report['length']}{parts}",
        report["quantize"] if report["program"] == "decode" else report["remat"],
    ]
    peak = report["peak_hbm_gb_per_chip"]
    memory = f"{'?' if peak is None else f'{peak:.1f}'} of {report['hbm_gb_per_chip']:.1f}"
    if not report["fits"]:
        row = [*head, memory, "does not fit"]
        return row + [""] * (len(columns) - len(row))
    return [*head, memory, f"{report['spare_share']:.0%}", *work(report)]


def _work_of_step(report: dict[str, Any]) -> list[str]:
    return [
        f"{report['executed_over_model']:.2f}",
        *(f"{seconds:.2f}" for seconds in report["roofline_seconds"].values()),
        f"{report['tokens_per_second_per_chip']:.0f}",
        f"{report['mfu_at_roofline']:.0%}",
    ]


def _work_of_token(report: dict[str, Any]) -> list[str]:
    token = report["per_token"]
    seconds = report["roofline_seconds"]["hbm"] * token["hbm_gb"] / report["hbm_traffic_gb_per_chip"]
    return [
        f"{token['hbm_gb']:.2f}",
        f"{token['needed_gb']:.2f}",
        f"{token['hbm_over_needed']:.2f}{' (not all counted)' if token['hbm_over_needed'] < 1 else ''}",
        f"{seconds * 1e3:.1f}",
        f"{token['hbm_gb_outside_the_loop']:.0f}",
    ]


def main(files: list[str]) -> None:
    print(markdown({pathlib.Path(file).stem: json.loads(pathlib.Path(file).read_text()) for file in files}))


if __name__ == "__main__":
    main(sys.argv[1:])
