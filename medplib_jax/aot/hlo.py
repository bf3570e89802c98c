"""Reads what the TPU compiler made of a program: products, collectives, kernels and memory traffic of one chip in one step.

`compiled.cost_analysis()` counts the body of a loop once and kernels not at all, so the optimised HLO text is walked instead: every
instruction counts as often as the loops around it run.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}

_ARRAY = re.compile(r"\b(pred|token|opaque|bf16|[sufc]\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|body|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    dtype: str
    dims: tuple[int, ...]
    on_chip: bool  # lies in the chip's vector memory, which costs no HBM traffic

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS[self.dtype] if self.dtype in _BITS else int(digits.group())
        return self.size * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str  # of a constant
    attributes: str
    is_root: bool

    @property
    def called(self) -> tuple[str, ...]:
        return tuple(name.strip(" %") for group in _CALLED.findall(self.attributes) for name in group.strip("{}").split(","))


Computation = dict[str, Instruction]  # in order


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
    """What one chip does in one call of the program. `kernels`: {name: (calls, FLOPs)}."""

    flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    kernels: dict[str, tuple[float, float]]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """{name: computation} and the name of the entry."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found.group(2), found.group(3), bool(found.group(1)))
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of an optimised HLO module")
    return computations, entry


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    shapes = tuple(Shape(d, tuple(map(int, filter(None, dims.split(",")))), "S(1)" in layout) for d, dims, layout in _ARRAY.findall(rest[:end]))
    inside = rest[opening + 1 : closing]
    return Instruction(name, rest[end:opening].strip(), shapes, tuple(re.findall(r"%([\w.\-]+)", inside)), inside, rest[closing + 1 :], is_root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def read_usage(text: str, kernel_flops: Callable[[str, tuple[Shape, ...]], float], loop_trips: int = 1) -> Usage:
    """Walks the module. `kernel_flops(instruction name, operand shapes)` gives a kernel's FLOPs; `loop_trips`: of loops without a bound."""
    computations, entry = parse(text)
    flops = traffic = 0.0
    collectives: dict[str, Collective] = {}
    kernels = collections.defaultdict(lambda: (0.0, 0.0))
    for name, times, in_loop, fused in _executed(computations, entry, loop_trips):
        computation = computations[name]
        for instruction in computation.values():
            flops += times * _product_flops(instruction, computation)
            if not fused:
                traffic += times * _traffic(instruction, computation, computations)
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                found = _collective(kind, instruction, computation, times, in_loop, name)
                collectives.setdefault(_channel(instruction, name), found)  # an asynchronous one appears in several computations
            elif "tpu_custom_call" in instruction.attributes:
                operands = tuple(shape for operand in instruction.operands for shape in computation[operand].shapes)
                cost = times * kernel_flops(instruction.name, operands)
                flops += cost
                label = re.sub(r"[.\d]+$", "", instruction.name)
                kernels[label] = (kernels[label][0] + times, kernels[label][1] + cost)
    return Usage(flops, traffic, tuple(collectives.values()), dict(kernels))


def _executed(computations: dict[str, Computation], entry: str, loop_trips: int) -> Iterator[tuple[str, float, bool, bool]]:
    """(computation, how often it runs, inside a loop, inside a fusion) for every place that calls it."""
    pending = [(entry, 1.0, False, False)]
    while pending:
        name, times, in_loop, fused = pending.pop()
        yield name, times, in_loop, fused
        for instruction in computations[name].values():
            if instruction.opcode in ("all-reduce", "reduce", "reduce-window", "sort", "scatter", "select-and-scatter", "map", "reduce-scatter"):
                continue  # what they call works on single elements
            is_loop = instruction.opcode == "while"
            trips = _trips(instruction, computations, loop_trips) if is_loop else 1
            for called in instruction.called:
                if called in computations:
                    pending.append((called, times * trips, in_loop or is_loop, fused or instruction.opcode == "fusion"))


def _trips(loop: Instruction, computations: dict[str, Computation], unknown: int) -> int:
    """Loops count up from 0 by a constant to a constant. One that may end earlier counts as going on to the end, one without a bound as
    `unknown`."""
    names = [re.search(rf"{part}=%?([\w.\-]+)", loop.attributes).group(1) for part in ("condition", "body")]
    condition, body = (computations[name] for name in names)
    trips = [0]
    for instruction in condition.values():
        if instruction.opcode == "compare":
            sides = [condition[name] for name in instruction.operands]
            bounds = [int(side.literal) for side in sides if side.opcode == "constant" and side.shapes[0].dtype in ("s32", "u32")]
            counters = [re.search(r"index=(\d+)", side.attributes) for side in sides if side.opcode == "get-tuple-element"]
            step = _step(body, int(counters[0].group(1))) if counters else 1
            trips += [-(-bound // step) for bound in bounds]
    return max(trips) or unknown


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


def _collective(kind: str, instruction: Instruction, computation: Computation, times: float, in_loop: bool, name: str) -> Collective:
    group = _group_size(instruction.attributes)
    sent = instruction.operands[:1] if kind == "ragged-all-to-all" else instruction.operands  # its others are room and offsets
    inputs = sum(shape.bytes for operand in sent for shape in computation[operand].shapes)
    if kind == "all-reduce" and "all-reduce-scatter" in name:
        kind = "reduce-scatter"  # fused with the slice of its result that is kept
    others = (group - 1) / group if group else 1.0
    outputs = sum(shape.bytes for shape in instruction.shapes) - (inputs if instruction.opcode.endswith("-start") else 0)
    received = {"all-gather": outputs - inputs, "all-reduce": 2 * inputs * others, "collective-permute": inputs}.get(kind, inputs * others)
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    largest = max(instruction.shapes, key=lambda shape: shape.bytes)
    return Collective(kind, times * received, times, group, source.group(1) if source else instruction.name, in_loop, largest)


def _group_size(attributes: str) -> int:
    """Chips per group, from replica_groups={{0,1},..}, [groups,size]<=[..] or mesh['a'=4,'b'=2] {'b'}; 0 when the instruction has none."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return len(listed.group(1).split(","))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named.group(2)))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    return int(iota.group(2)) if iota else 0


# ---- products ----


def _product_flops(instruction: Instruction, computation: Computation) -> float:
    if instruction.opcode == "dot":
        lhs = computation[instruction.operands[0]].shapes[0].dims
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes).group(1)
        return 2.0 * instruction.shapes[0].size * math.prod(lhs[int(axis)] for axis in filter(None, contracted.split(",")))
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    return 0.0


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """2 * batch * features in * features out * pairs of an output and a kernel position that meet an input (XLA's HloCostAnalysis).

    The TPU compiler writes every matrix product as a convolution; batch axes become spatial ones with holes.
    """
    lhs_dims, rhs_dims = (computation[operand].shapes[0].dims for operand in instruction.operands[:2])
    out_dims = instruction.shapes[0].dims
    lhs, rhs, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    window = _window(instruction.attributes)
    pairs = 1
    for axis, label in enumerate(sorted(set(lhs) - set("bf"))):
        parameters = {name: values[axis] for name, values in window.items()}
        pairs *= _meeting_pairs(lhs_dims[lhs.index(label)], rhs_dims[rhs.index(label)], out_dims[out.index(label)], parameters)
    batch_groups = int((re.search(r"batch_group_count=(\d+)", instruction.attributes) or [0, 1])[1])
    rows = lhs_dims[lhs.index("b")] // batch_groups
    return 2.0 * rows * rhs_dims[rhs.index("i")] * rhs_dims[rhs.index("o")] * pairs


def _window(attributes: str) -> dict[str, list]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in found.group(1).split()) if found else {}
    return {name: values.split("x") for name, values in fields.items()}


def _meeting_pairs(inputs: int, kernel: int, outputs: int, window: dict[str, str]) -> int:
    stride, holes, spread = (int(window.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    pad = int(window.get("pad", "0_0").split("_")[0])
    position = np.arange(outputs)[:, None] * stride - pad + np.arange(kernel)[None, :] * spread
    return int(((position >= 0) & (position % holes == 0) & (position // holes < inputs)).sum())


# ---- memory traffic ----

_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is written into the first one
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "iota", "partition-id")


def _traffic(instruction: Instruction, computation: Computation, computations: dict[str, Computation]) -> float:
    """Bytes that an instruction moves between HBM and the chip: operands that it reads and results that it writes."""
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done") or "AllocateBuffer" in instruction.attributes:
        return 0.0
    operands = [computation[name].shapes for name in instruction.operands]
    fusion = computations.get(instruction.called[0]) if instruction.opcode == "fusion" and instruction.called else None
    if fusion:
        return sum(_fusion_traffic(fusion, instruction.shapes))
    if instruction.opcode in ("dynamic-slice", "gather", "slice"):
        return 2.0 * _hbm(instruction.shapes)
    if instruction.opcode in _IN_PLACE:
        return 2.0 * _hbm(operands[_IN_PLACE[instruction.opcode]])
    return _hbm(instruction.shapes) + sum(map(_hbm, operands))


def _hbm(shapes: tuple[Shape, ...]) -> float:
    return float(sum(shape.bytes for shape in shapes if not shape.on_chip))


def _fusion_traffic(fusion: Computation, results: tuple[Shape, ...]) -> Iterator[float]:
    """A parameter that is only sliced costs its slices; a result that updates a slice of a parameter costs the slice."""
    users = collections.defaultdict(list)
    for instruction in fusion.values():
        for operand in instruction.operands:
            users[operand].append(instruction)
    for parameter in (i for i in fusion.values() if i.opcode == "parameter"):
        yield _read(parameter, users, fusion) if _hbm(parameter.shapes) else 0.0
    root = next(i for i in fusion.values() if i.is_root)
    updates = [i for i in fusion.values() if i.opcode in _IN_PLACE]
    if root.opcode in (*_IN_PLACE, "bitcast") and updates:
        return  # written where the parameter's slice was counted
    yield _hbm(results)


def _read(source: Instruction, users: dict[str, list[Instruction]], fusion: Computation) -> float:
    """Bytes of an array inside a fusion that are read, or written when the fusion updates it in place."""
    total = 0.0
    for user in users[source.name]:
        if user.opcode == "bitcast":
            total += _read(user, users, fusion)
        elif user.opcode == "dynamic-slice" and user.operands[0] == source.name:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode in _IN_PLACE and user.operands[0] == source.name:
            total += sum(shape.bytes for shape in fusion[user.operands[_IN_PLACE[user.opcode]]].shapes)
        else:
            return float(sum(shape.bytes for shape in source.shapes))
    return total
