"""Which batch size, rematerialisation policy and mesh fit a topology, and which of them the roofline likes best."""

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from medplib_jax.aot.report import Request, examine
from medplib_jax.aot.topologies import devices_of
from medplib_jax.config.experiment import MeshConfig

log = logging.getLogger(__name__)

POLICIES = ("projections", "outputs", "full")


def sweep(request: Request) -> list[dict[str, Any]]:
    """Reports of all candidates, those that fit first, the most tokens per second and chip first.

    Takes about a minute each.
    """
    chips = len(devices_of(request.topology, request.config.mesh.dcn_data))
    reports = []
    for candidate in tqdm(list(candidates(request, chips)), desc="sweep", unit="program"):
        try:
            reports.append(examine(candidate))
        except ValueError as error:  # this mesh divides something badly
            log.warning("%s, %s: %s", candidate.config.mesh, candidate.config.model.remat, error)
    return sorted(reports, key=lambda report: (not report["fits"], -report.get("tokens_per_second_per_chip", 0.0)))


def candidates(request: Request, chips: int) -> Iterator[Request]:
    """The requests that a sweep tries.

    The batch as given and doubled, and in training every policy. Meshes: one axis over all chips, a quarter of it, and
    with two-way tensor parallelism; for generation also all chips as one tensor axis. Only those over which the rows
    divide.
    """
    training = request.kind == "train"
    policies = POLICIES if training else (request.config.model.remat,)
    for rows, policy, mesh in itertools.product(
        (request.rows, 2 * request.rows), policies, _meshes(chips // request.config.mesh.dcn_data, training)
    ):
        if (
            rows
            % (
                mesh.data
                * mesh.fsdp
                * request.config.mesh.dcn_data
                * (request.config.optim.accumulate if training else 1)
            )
            == 0
        ):
            config = dataclasses.replace(
                request.config,
                model=dataclasses.replace(request.config.model, remat=policy),
                mesh=dataclasses.replace(mesh, dcn_data=request.config.mesh.dcn_data),
            )
            yield dataclasses.replace(request, config=config, rows=rows)


def _meshes(chips: int, training: bool) -> list[MeshConfig]:
    shapes = [(1, chips, 1), (4, chips // 4, 1), (1, chips // 2, 2)] + ([] if training else [(1, 1, chips)])
    return [
        MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
        for data, fsdp, tensor in shapes
        if data * fsdp * tensor == chips
    ]


def as_table(reports: list[dict[str, Any]]) -> str:
    """One line per candidate."""
    lines = [
        f"{'mesh (data x fsdp x expert x tensor)':38}{'rows':>6}  {'remat':14}{'peak GB':>9}{'spare':>7}"
        f"{'executed/model':>16}{'tokens/s/chip':>15}  bound by"
    ]
    for report in reports:
        peak, spare = report["peak_hbm_gb_per_chip"], report["spare_share"]
        line = f"{' x '.join(map(str, report['mesh'].values())):38}{report['rows']:>6}  {report['remat']:14}"
        line += f"{'?' if peak is None else f'{peak:.2f}':>9}{'' if spare is None else f'{spare:.0%}':>7}"
        if report["fits"]:
            line += f"{report['executed_over_model']:>16.3f}{report['tokens_per_second_per_chip']:>15.0f}"
            line += f"  {report['bound_by']}"
        lines.append(line if report["fits"] else f"{line}  does not fit")
    return "\n".join(lines)
