"""Timing of programs side by side, and the table and the flat JSON that come of it."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping


@dataclasses.dataclass
class Samples:
    """Seconds of each run: by the clock, and of all threads of this process together."""

    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def spread(self) -> float:
        """Half the distance between the fastest and the slowest run, over the median."""
        return (max(self.wall) - min(self.wall)) / 2 / self.median

    @property
    def fastest(self) -> float:
        return min(self.wall)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu)


def interleave(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Samples]:
    """Seconds of each program over `rounds` runs in turn, so that other work on the machine hits all of them.

    Each must return when its work is done. The caller has run each of them before: compiling is not measured here.
    """
    samples = {name: Samples() for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            samples[name].cpu.append(time.process_time() - cpu)
            samples[name].wall.append(time.perf_counter() - wall)
    return samples


@dataclasses.dataclass
class Table:
    """Rows of one suite. `flat` collects what `--json` writes."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    flat: dict[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        body = ["| " + " | ".join(line) + " |" for line in lines]
        body.insert(1, "|" + "---|" * len(self.columns))
        return "\n".join([f"## {self.title}", "", *body])


def side_by_side(title: str, name: str, samples: Mapping[str, Samples], unit: str, work: float = 0.0) -> Table:
    """A table of competing programs; ratios (of the medians, of the fastest runs) are to the first, which is ours.

    With `work` (items per run) a rate in `unit` a second is shown as well.
    """
    ours = next(iter(samples))
    table = Table(
        title, ("", "median s", "spread", "CPU s", *((f"{unit}/s",) if work else ()), f"times {ours}", "of the fastest")
    )
    for side, found in samples.items():
        ratio, of_fastest = found.median / samples[ours].median, found.fastest / samples[ours].fastest
        rate = (f"{work / found.median:.1f}",) if work else ()
        seconds = f"{found.median:.3f}", f"{100 * found.spread:.0f} %", f"{found.cpu_median:.3f}"
        table.rows.append((side, *seconds, *rate, f"{ratio:.2f}", f"{of_fastest:.2f}"))
        key = f"{name}.{side.replace(' ', '_')}"
        table.flat |= {f"{key}.seconds": found.median, f"{key}.fastest_seconds": found.fastest}
        table.flat |= {f"{key}.cpu_seconds": found.cpu_median, f"{key}.spread": found.spread}
        table.flat |= {f"{key}.per_second": work / found.median} if work else {}
        if side != ours:
            table.flat[
                f"{name}.speedup" if side == "torch eager" else f"{name}.speedup_over_{side.replace(' ', '_')}"
            ] = ratio
    return table
