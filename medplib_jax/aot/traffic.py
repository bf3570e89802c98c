"""Memory traffic of a compiled program: what each instruction moves between HBM and the chip, and what for."""

import dataclasses
import re

from medplib_jax.aot.hlo import Computation, Instruction, Shape

LIBRARIES = ("__cublas$", "__cudnn$")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
KINDS = ("products", "kernels", "collectives", "moves", "elementwise")
_PRODUCTS = ("dot", "convolution")
_MOVES = (
    *("copy", "copy-start", "transpose", "bitcast", "reshape", "broadcast", "slice", "concatenate", "pad", "convert"),
    *("dynamic-slice", "dynamic-update-slice", "gather", "scatter", "sort", "parameter", "constant", "tuple"),
    *("get-tuple-element", "iota", "compare", "select", "add", "clamp"),  # of the places
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All executions of one instruction. `bytes`: what they move. `result`: its largest one."""

    kind: str  # one of KINDS
    bytes: float
    times: float
    result: Shape
    source: str


def traffic_of(
    instruction: Instruction, computation: Computation, computations: dict[str, Computation], times: float
) -> Traffic | None:
    """What an instruction moves that runs so often; None for one that moves nothing."""
    moved = times * bytes_moved(instruction, computation, computations)
    if not moved:
        return None
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    largest = max(instruction.shapes, key=lambda shape: shape.bytes)
    return Traffic(_kind(instruction, computations), moved, times, largest, source.group(1) if source else "")


def _kind(instruction: Instruction, computations: dict[str, Computation]) -> str:
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in COLLECTIVES:
        return "collectives"
    if opcode == "custom-call":
        return "products" if instruction.target.startswith(LIBRARIES) else "kernels"
    inside = {opcode}
    if opcode == "fusion":
        inside = {i.opcode for name in instruction.called for i in computations.get(name, {}).values()}
    if inside & set(_PRODUCTS):
        return "products"
    return "moves" if inside <= set(_MOVES) else "elementwise"


_SLICING = ("dynamic-slice", "gather", "slice")
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is written into the first one
# Their results are a tuple that names the operands, too.
_NAMES_OPERANDS = (
    *("all-gather-start", "reduce-scatter-start", "all-to-all-start", "collective-permute-start"),
    *("slice-start", "dynamic-slice-start"),
)
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "iota",
    "partition-id",
)


def bytes_moved(instruction: Instruction, computation: Computation, computations: dict[str, Computation]) -> float:
    """Bytes that an instruction moves between HBM and the chip: operands that it reads and results that it writes."""
    if (
        instruction.opcode in _FREE
        or instruction.opcode.endswith("-done")
        or "AllocateBuffer" in instruction.attributes
    ):
        return 0.0
    operands = [computation[name].shapes for name in instruction.operands]
    fusion = computations.get(instruction.called[0]) if instruction.opcode == "fusion" and instruction.called else None
    if fusion:
        return _fusion_traffic(fusion, instruction.shapes, computations)
    if instruction.opcode == "copy-start":  # its results are the copy, the operand again, and a token
        return hbm_bytes(instruction.shapes[:1]) + sum(map(hbm_bytes, operands))
    if instruction.opcode.removesuffix("-start") in _SLICING:
        taken = _written(instruction, operands)[0]
        return _between(taken, operands[0][0], taken)
    if instruction.opcode in _IN_PLACE:
        put = operands[_IN_PLACE[instruction.opcode]][0]
        return _between(put, put, instruction.shapes[0])
    again = (
        _read_again(instruction, operands)
        if instruction.target == "tpu_custom_call" and "gmm" in instruction.name
        else 0.0
    )
    return hbm_bytes(_written(instruction, operands)) + sum(map(hbm_bytes, operands)) + again


def _read_again(instruction: Instruction, operands: list[tuple[Shape, ...]]) -> float:
    """Bytes that a grouped product reads beyond each operand once: its rows for every further block of columns.

    The kernel says how many bytes it moves; rows in the chip's own memory cost none.
    """
    rows, matrices = [shape for shapes in operands for shape in shapes if len(shape.dims) > 1][:2]
    said = re.search(r'"bytes_accessed":"(\d+)"', instruction.attributes)
    if rows.on_chip or len(matrices.dims) == 2 or not said:  # two: gradients of the matrices, from rows and rows
        return 0.0
    return float(int(said.group(1)) - sum(shape.bytes for shape in (rows, matrices, *instruction.shapes)))


def _between(moved: Shape, source: Shape, target: Shape) -> float:
    """Bytes of an array that is read from one place and written to another: those ends that lie in HBM."""
    return float(moved.bytes * ((not source.on_chip) + (not target.on_chip)))


def _written(instruction: Instruction, operands: list[tuple[Shape, ...]]) -> tuple[Shape, ...]:
    """The results that an instruction writes.

    A library's workspace, its last one, is as large as a table says, and little of it is touched; the begin of a
    collective names its operands among its results.
    """
    shapes = instruction.shapes
    if instruction.target.startswith(LIBRARIES) and len(shapes) > 1 and shapes[-1].dtype in ("s8", "u8"):
        return shapes[:-1]
    return shapes[sum(map(len, operands)) :] if instruction.opcode in _NAMES_OPERANDS else shapes


def hbm_bytes(shapes: tuple[Shape, ...]) -> float:
    return float(sum(shape.bytes for shape in shapes if not shape.on_chip))


def _fusion_traffic(fusion: Computation, results: tuple[Shape, ...], computations: dict[str, Computation]) -> float:
    """A parameter that is only sliced costs its slices, a result that updates a parameter's slice costs the slice."""
    parameters = [i for i in fusion.values() if i.opcode == "parameter"]
    read = sum(_read(parameter, fusion, computations) for parameter in parameters if hbm_bytes(parameter.shapes))
    # A slice is written where the parameter's was counted.
    written = zip(results, _updated_in_place(fusion, computations), strict=True)
    return read + hbm_bytes(tuple(shape for shape, in_place in written if not in_place))


def _updated_in_place(fusion: Computation, computations: dict[str, Computation]) -> list[bool]:
    """Of each result of a fusion, whether it is one of its parameters with a slice replaced."""
    root = _behind_bitcasts(_root(fusion), fusion)
    if root.opcode == "fusion":
        return _updated_in_place(computations[root.called[0]], computations)
    several = root.opcode == "tuple"
    results = [fusion[name] for name in root.operands] if several else [root] * len(root.shapes)
    return [_is_update(result, fusion, computations) for result in results]


def _is_update(result: Instruction, fusion: Computation, computations: dict[str, Computation]) -> bool:
    result = _behind_bitcasts(result, fusion)
    if result.opcode == "fusion":
        return all(_updated_in_place(computations[result.called[0]], computations))
    return result.opcode in _IN_PLACE and _behind_bitcasts(fusion[result.operands[0]], fusion).opcode == "parameter"


def _root(computation: Computation) -> Instruction:
    return next(i for i in computation.values() if i.is_root)


def _behind_bitcasts(instruction: Instruction, computation: Computation) -> Instruction:
    while instruction.opcode == "bitcast":
        instruction = computation[instruction.operands[0]]
    return instruction


def _read(source: Instruction, fusion: Computation, computations: dict[str, Computation]) -> float:
    """Bytes of an array inside a fusion that are read, or written when the fusion updates it in place."""
    total, whole = 0.0, float(sum(shape.bytes for shape in source.shapes))
    if source.is_root:
        return whole
    for user in fusion.values():
        if source.name not in user.operands:
            continue
        if user.opcode == "bitcast":
            total += _read(user, fusion, computations)
        elif user.opcode == "fusion":
            inner = computations[user.called[0]]
            for place, parameter in enumerate(_parameters(inner)):
                if user.operands[place] == source.name:
                    renamed = _behind_bitcasts(_root(inner), inner) is parameter
                    total += _read(user, fusion, computations) if renamed else _read(parameter, inner, computations)
        elif user.opcode in _SLICING and user.operands[0] == source.name:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode in _IN_PLACE and user.operands[0] == source.name:
            total += sum(shape.bytes for shape in fusion[user.operands[_IN_PLACE[user.opcode]]].shapes)
        else:
            return whole
    return min(total, whole)


def _parameters(computation: Computation) -> list[Instruction]:
    """In the order in which they are given: the literal of each is its number."""
    found = [i for i in computation.values() if i.opcode == "parameter"]
    return sorted(found, key=lambda parameter: int(parameter.literal))
