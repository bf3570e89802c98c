"""Reads what a compiler made of a program: products, collectives, kernels and memory traffic of one chip in one step.

`compiled.cost_analysis()` counts the body of a loop once and kernels not at all, so the optimised HLO text is walked
instead: every instruction counts as often as the loops around it run.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator

from medplib_jax.aot.hlo import Computation, Instruction, Shape, parse
from medplib_jax.aot.products import multiplies_integers, product_flops
from medplib_jax.aot.traffic import COLLECTIVES, LIBRARIES, Traffic, traffic_of


@dataclasses.dataclass(frozen=True)
class Collective:
    """All executions of one collective instruction. `bytes`: what one chip receives in all of them."""

    kind: str
    bytes: float
    count: float
    group: int
    source: str
    in_loop: bool
    output: Shape


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one chip does in one call of the program. `kernels`: {name: (calls, FLOPs)}.

    `integer_flops`: those among `flops` whose factors are integers of 8 bits.
    """

    flops: float
    integer_flops: float
    traffic: tuple[Traffic, ...]
    collectives: tuple[Collective, ...]
    kernels: dict[str, tuple[float, float]]

    @property
    def hbm_bytes(self) -> float:
        return sum(traffic.bytes for traffic in self.traffic)


def read_usage(text: str, kernel_flops: Callable[[str, tuple[Shape, ...]], float], loop_trips: int = 1) -> Usage:
    """FLOPs, traffic, collectives and kernels of a compiled module.

    `kernel_flops(kernel's name, operand shapes)` gives a kernel's FLOPs. `loop_trips` is how often a loop without a
    bound runs.
    """
    computations, entry = parse(text)
    flops, integer_flops, traffic = 0.0, 0.0, []
    collectives: dict[str, Collective] = {}
    kernels = collections.defaultdict(lambda: (0.0, 0.0))
    for name, times, in_loop, fused in _executed(computations, entry, loop_trips):
        computation = computations[name]
        for instruction in computation.values():
            cost, kernel = times * product_flops(instruction, computation), kernel_name(instruction)
            if not fused and (moved := traffic_of(instruction, computation, computations, times)):
                traffic.append(moved)
            narrow = bool(cost) and multiplies_integers(instruction, computation)
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                found = _collective(kind, instruction, computation, times, in_loop, name)
                collectives.setdefault(
                    _channel(instruction, name), found
                )  # an asynchronous one appears in several computations
            elif kernel:
                operands = tuple(shape for operand in instruction.operands for shape in computation[operand].shapes)
                cost = cost or times * kernel_flops(kernel, operands)
                narrow |= {shape.dtype for shape in operands if len(shape.dims) > 1} == {"s8"}
                label = re.sub(r"[.\d]+$", "", kernel)
                kernels[label] = (kernels[label][0] + times, kernels[label][1] + cost)
            flops += cost
            integer_flops += cost * narrow
    return Usage(flops, integer_flops, tuple(traffic), tuple(collectives.values()), dict(kernels))


def kernel_name(instruction: Instruction) -> str:
    """The kernel or library function that an instruction calls, else empty: a Pallas kernel by its own name."""
    target = instruction.target
    if target == "tpu_custom_call":
        return instruction.name
    if target == "__gpu$xla.gpu.triton":
        return re.findall(r'\bname = "(\w+)"', instruction.attributes)[-1]  # after the kernel's code
    if target.startswith("mosaic_gpu"):  # has no name, but the function that calls it
        return next(iter(re.findall(r"jit\((mosaic_\w+)\)", instruction.attributes)), target)
    return target.removeprefix("__") if target.startswith(LIBRARIES) else ""


_ELEMENTWISE_CALLERS = (
    "all-reduce",
    "reduce",
    "reduce-window",
    "sort",
    "scatter",
    "select-and-scatter",
    "map",
    "reduce-scatter",
)


def _executed(
    computations: dict[str, Computation], entry: str, loop_trips: int
) -> Iterator[tuple[str, float, bool, bool]]:
    """(computation, how often it runs, inside a loop, inside a fusion) for every place that calls it."""
    pending = [(entry, 1.0, False, False)]
    while pending:
        name, times, in_loop, fused = pending.pop()
        yield name, times, in_loop, fused
        for instruction in computations[name].values():
            if instruction.opcode.removesuffix("-start") in _ELEMENTWISE_CALLERS:
                continue  # what they call works on single elements
            is_loop, called = (
                instruction.opcode == "while",
                [name for name in instruction.called if name in computations],
            )
            trips = _trips(instruction, computations, loop_trips) if is_loop else 1
            if instruction.opcode == "conditional":
                trips = 1 / len(called)  # which branch runs is not known: each counts in part
            pending += [
                (name, times * trips, in_loop or is_loop, fused or instruction.opcode == "fusion") for name in called
            ]


def _trips(loop: Instruction, computations: dict[str, Computation], unknown: int) -> int:
    """Loops count up from 0 by a constant to a constant.

    One that may end earlier counts as going on to the end, one without a bound as `unknown`.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known.group(1))
    names = [re.search(rf"{part}=%?([\w.\-]+)", loop.attributes).group(1) for part in ("condition", "body")]
    condition, body = (computations[name] for name in names)
    trips = [0]
    fused = (computations[name] for i in condition.values() if i.opcode == "fusion" for name in i.called)
    for computation in (condition, *fused):
        for compare in (i for i in computation.values() if i.opcode == "compare"):
            sides = [computation[name] for name in compare.operands]
            bounds = [int(side.literal) for side in sides if side.opcode == "constant" and _is_counter(side.shapes[0])]
            counters = [
                re.search(r"index=(\d+)", side.attributes) for side in sides if side.opcode == "get-tuple-element"
            ]
            step = _step(body, int(counters[0].group(1))) if counters else 1
            trips += [-(-bound // step) for bound in bounds]
    return max(trips) or unknown


def _is_counter(shape: Shape) -> bool:
    return shape.dtype in ("s32", "u32") and not shape.dims


def _step(body: Computation, place: int) -> int:
    """What the body of a loop adds to the `place`-th element of its state."""
    root = next(i for i in body.values() if i.is_root)
    added = body.get(root.operands[place]) if place < len(root.operands) else None
    while added and added.opcode == "copy":
        added = body.get(added.operands[0])
    if not added or added.opcode != "add":
        return 1
    literals = [body[name].literal for name in added.operands if body[name].opcode == "constant"]
    return int(literals[0]) if literals else 1


def _channel(instruction: Instruction, computation: str) -> str:
    """One name for the places where a collective that is woven into products begins, goes on and ends."""
    woven = re.search(r"channel_id=(\d+).*chain_id=", instruction.attributes)
    return woven.group(1) if woven else f"{computation}/{instruction.name}"


def _collective(
    kind: str, instruction: Instruction, computation: Computation, times: float, in_loop: bool, name: str
) -> Collective:
    group = _group_size(instruction.attributes)
    sent = (
        instruction.operands[:1] if kind == "ragged-all-to-all" else instruction.operands
    )  # its others are room and offsets
    inputs = sum(shape.bytes for operand in sent for shape in computation[operand].shapes)
    if kind == "all-reduce" and "all-reduce-scatter" in name:
        kind = "reduce-scatter"  # fused with the slice of its result that is kept
    others = (group - 1) / group if group else 1.0
    outputs = sum(shape.bytes for shape in instruction.shapes) - (
        inputs if instruction.opcode.endswith("-start") else 0
    )
    received = {"all-gather": outputs - inputs, "all-reduce": 2 * inputs * others, "collective-permute": inputs}.get(
        kind, inputs * others
    )
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    largest = max(instruction.shapes, key=lambda shape: shape.bytes)
    return Collective(
        kind, times * received, times, group, source.group(1) if source else instruction.name, in_loop, largest
    )


def _group_size(attributes: str) -> int:
    """Chips per group of a collective; 0 when the instruction has none.

    From replica_groups={{0,1},..}, [groups,size]<=[..] or mesh['a'=4,'b'=2] {'b'}.
    """
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return len(listed.group(1).split(","))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^ ]*\))? \{([^}]*)\}", attributes)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named.group(2)))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    return int(iota.group(2)) if iota else 0
