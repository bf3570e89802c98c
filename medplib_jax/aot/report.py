"""Compiles one program for one topology and sums up what came out, as a dict and as a page of text."""

import collections
import dataclasses
import re
import time
from typing import Any

import jax

from medplib_jax.aot.flops import executed_kernel_flops, model_flops
from medplib_jax.aot.new_token import needed_bytes, per_token
from medplib_jax.aot.programs import make_program
from medplib_jax.aot.topologies import COMPILER_OPTIONS, devices_of, full_rematerialisations
from medplib_jax.aot.traffic import Traffic
from medplib_jax.aot.usage import Collective, Usage, read_usage
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.train.flops import Chip, chip_of
from medplib_jax.train.program import Program, peak_bytes
from medplib_jax.train.remat import AUTO, SPARE, candidates

GB = 1e9
LARGEST, SHOWN = 60, 10  # instructions whose traffic is listed, and printed


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile: `kind` is one of programs.PROGRAMS, `rows` x `length` its batch, `quantize` see there."""

    config: ExperimentConfig
    topology: str
    kind: str
    rows: int
    length: int
    quantize: str = ""


def examine(request: Request) -> dict[str, Any]:
    """The report of a compiled request, also of a program that does not fit.

    Then it says what was missing, as far as the compiler does. With `model.remat` "auto" it is that of the policy which
    a run on these devices would choose.
    """
    if request.kind != "train" or request.config.model.remat != AUTO:
        return _examine(request)
    for config in candidates(request.config):
        report = _examine(dataclasses.replace(request, config=config))
        if report["fits"] and report["spare_share"] >= SPARE:
            break
    return report


def _examine(request: Request) -> dict[str, Any]:
    slices = request.config.mesh.dcn_data
    chip, devices = chip_of(request.topology), devices_of(request.topology, slices)
    mesh = make_mesh(request.config.mesh, devices)
    program = make_program(request.kind, request.config, mesh, request.rows, request.length, request.quantize)
    needed = model_flops(request.kind, request.config, devices[0], request.rows, request.length)
    said_before, start = len(full_rematerialisations()), time.perf_counter()
    lowered = program.trace().lower()
    head = {
        "program": request.kind,
        "topology": request.topology if slices == 1 else f"{slices} x {request.topology}",
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "rows": request.rows,
        "length": request.length,
        "remat": request.config.model.remat,
        "accumulate": request.config.optim.accumulate,
        "quantize": request.quantize,
        "model_flops": needed,
        "hbm_gb_per_chip": chip.hbm_bytes / GB,
    }
    try:
        compiled = lowered.compile(compiler_options=COMPILER_OPTIONS[devices[0].platform])
    except jax.errors.JaxRuntimeError as error:
        return head | _refused(str(error), chip)
    head["compile_seconds"] = time.perf_counter() - start
    head["full_rematerialisations"] = full_rematerialisations()[said_before:]
    memory = compiled.memory_analysis()
    peak = peak_bytes(compiled, devices[0].platform)
    if peak > chip.hbm_bytes:  # the compiler for GPUs does not refuse such a program
        return head | _does_not_fit(
            peak / GB, chip, "arguments, results and temporaries are more than the GPU's memory"
        )
    text = compiled.as_text()
    usage = read_usage(text, executed_kernel_flops, program.loop_trips)
    report = head | _memory(memory, peak, chip) | _work(program, usage, needed, chip, mesh.size)
    if request.kind == "decode":
        least = needed_bytes(request.config, program.args[0], mesh, request.rows, request.length, request.quantize)
        report["per_token"] = per_token(text, usage, program.loop_trips, least)
    return report


def _refused(message: str, chip: Chip) -> dict[str, Any]:
    if "RESOURCE_EXHAUSTED" not in message:
        raise RuntimeError(message)
    wanted = re.search(r"\(?([\d.]+)([GM])\)? exceeds|Used ([\d.]+)([GM]) of", message)
    size, unit = [group for group in wanted.groups() if group] if wanted else (None, None)
    return _does_not_fit(float(size) * {"G": 2**30, "M": 2**20}[unit] / GB if wanted else None, chip, message)


def _does_not_fit(needs: float | None, chip: Chip, message: str) -> dict[str, Any]:
    """`needs`: GB, where known."""
    spare = None if needs is None else 1 - needs * GB / chip.hbm_bytes
    return {"fits": False, "peak_hbm_gb_per_chip": needs, "spare_share": spare, "message": message}


def _memory(memory, peak: int, chip: Chip) -> dict[str, Any]:
    return {
        "fits": True,
        "argument_gb_per_chip": memory.argument_size_in_bytes / GB,
        "temporary_gb_per_chip": memory.temp_size_in_bytes / GB,
        "peak_hbm_gb_per_chip": peak / GB,
        "spare_share": 1 - peak / chip.hbm_bytes,
    }


def _work(program: Program, usage: Usage, needed: float, chip: Chip, chips: int) -> dict[str, Any]:
    received = sum(collective.bytes for collective in usage.collectives)
    bounds = {
        "compute": (usage.flops - usage.integer_flops) / chip.flops + usage.integer_flops / chip.int8_ops,
        "hbm": usage.hbm_bytes / chip.hbm_rate,
        "ici": received / chip.ici_rate,
    }
    seconds = max(bounds.values())
    return {
        "executed_flops": usage.flops * chips,
        "executed_over_model": usage.flops * chips / needed,
        "integer_share": usage.integer_flops / usage.flops,
        "hbm_traffic_gb_per_chip": usage.hbm_bytes / GB,
        "hbm_traffic_by_kind_gb": _traffic_by_kind(usage.traffic),
        "largest_hbm_traffic": _largest(usage.traffic),
        "collectives": _by_kind(usage.collectives),
        "largest_gather_outside_loops_gb": max(
            (c.output.bytes for c in usage.collectives if c.kind == "all-gather" and not c.in_loop), default=0
        )
        / GB,
        "kernels": {name: {"calls": calls, "flops": flops} for name, (calls, flops) in sorted(usage.kernels.items())},
        "roofline_seconds": bounds,
        "bound_by": max(bounds, key=bounds.get),
        "tokens_per_second_per_chip": program.tokens / seconds / chips,
        "mfu_at_roofline": needed / seconds / chips / chip.flops,
    }


def _by_kind(collectives: tuple[Collective, ...]) -> dict[str, dict[str, float]]:
    """{kind: {"count", "gb"}}: executions, and GB that one chip receives in them, per call of the program."""
    totals = collections.defaultdict(lambda: {"count": 0.0, "gb": 0.0})
    for collective in collectives:
        totals[collective.kind]["count"] += collective.count
        totals[collective.kind]["gb"] += collective.bytes / GB
    return dict(sorted(totals.items()))


def _traffic_by_kind(traffic: tuple[Traffic, ...]) -> dict[str, float]:
    """GB per kind of instruction, the most first; and of all of them that of float32 results."""
    totals = collections.Counter()
    for one in traffic:
        totals[one.kind] += one.bytes / GB
    wide = sum(one.bytes for one in traffic if one.result.dtype == "f32") / GB
    return dict(totals.most_common()) | {"with float32 results": wide}


def _largest(traffic: tuple[Traffic, ...]) -> list[dict[str, Any]]:
    """What moves most: instructions of one origin and shape together."""
    totals, times = collections.Counter(), collections.Counter()
    for one in traffic:
        name = one.kind, f"{one.result.dtype}{list(one.result.dims)}", one.source
        totals[name] += one.bytes / GB
        times[name] += one.times
    return [
        {"kind": kind, "result": result, "source": source, "gb": gb, "times": times[kind, result, source]}
        for (kind, result, source), gb in totals.most_common(LARGEST)
    ]


def as_text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    lines = [
        f"{report['program']} on {report['topology']} ({report['chips']} chips: {mesh}), "
        f"{report['rows']} x {report['length']} positions, remat {report['remat']}"
        + (f", in {report['accumulate']} parts" if report["accumulate"] > 1 else ""),
        "",
        *_memory_lines(report),
    ]
    return "\n".join(lines + (_work_lines(report) if report["fits"] else []))


def _memory_lines(report: dict[str, Any]) -> list[str]:
    have, peak = report["hbm_gb_per_chip"], report["peak_hbm_gb_per_chip"]
    if not report["fits"]:
        return [
            f"DOES NOT FIT: needs {'more than' if peak is None else f'{peak:.2f} GB of'} {have:.2f} GB per chip",
            report["message"].splitlines()[0],
        ]
    return [
        f"HBM per chip        {peak:8.2f} GB at peak of {have:.2f}: fits, "
        f"{have - peak:.2f} GB ({report['spare_share']:.0%}) to spare",
        f"  arguments         {report['argument_gb_per_chip']:8.2f} GB",
        f"  temporaries       {report['temporary_gb_per_chip']:8.2f} GB",
    ]


def _work_lines(report: dict[str, Any]) -> list[str]:
    needed, executed, seconds = report["model_flops"], report["executed_flops"], report["roofline_seconds"]
    return [
        f"model FLOPs         {needed:8.3e} per step, all chips",
        f"executed FLOPs      {executed:8.3e}: {report['executed_over_model']:.3f} times the model's,"
        f" {report['integer_share']:.0%} of them of 8-bit integers",
        f"HBM traffic         {report['hbm_traffic_gb_per_chip']:8.1f} GB per chip and step",
        *(f"  {kind:24}{gb:8.2f} GB" for kind, gb in report["hbm_traffic_by_kind_gb"].items()),
        "  the largest       GB: result, times it is made, origin (all of them in --json)",
        *(_traffic_line(one) for one in report["largest_hbm_traffic"][:SHOWN]),
        *_token_lines(report),
        "collectives         GB received per chip and step (executions)",
        *(f"  {kind:18}{total['gb']:8.3f} GB ({total['count']:.0f})" for kind, total in report["collectives"].items()),
        "kernels             calls per step",
        *(f"  {name:42}{kernel['calls']:8.0f}" for name, kernel in report["kernels"].items()),
        "roofline            seconds per step, each with perfect overlap",
        *(f"  {name:18}{value:8.3f} s" for name, value in seconds.items()),
        *(f"WARNING: the compiler reshards through every chip: {text}" for text in report["full_rematerialisations"]),
        f"bound by {report['bound_by']}: {report['tokens_per_second_per_chip']:.0f} tokens/s per chip, "
        f"{report['mfu_at_roofline']:.0%} MFU at best",
    ]


def _token_lines(report: dict[str, Any]) -> list[str]:
    if "per_token" not in report:
        return []
    token = report["per_token"]
    short = [] if token["hbm_over_needed"] >= 1 else ["  less than it needs: some of what it reads is not counted"]
    return [
        f"  of it per token   {token['hbm_gb']:8.2f} GB, {token['hbm_over_needed']:.2f} times weights in use and "
        f"filled cache; {token['hbm_gb_outside_the_loop']:.1f} GB before and after",
        *short,
    ]


def _traffic_line(one: dict[str, Any]) -> str:
    return f"  {one['gb']:8.2f}: {one['kind']} {one['result']}, {one['times']:.0f}, {one['source'][-90:]}"
