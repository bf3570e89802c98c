"""The text of an optimised HLO module as computations of instructions."""

import dataclasses
import math
import re

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}

_ARRAY = re.compile(r"\b(pred|token|opaque|bf16|[sufc]\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(
    r"(?:calls|body|to_apply|branch_computations|true_computation|false_computation|called_computations)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
)
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


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
        attributes = self.attributes.partition("backend_config=")[0]  # a kernel's code lies beyond, any bytes
        return tuple(name.strip(" %") for group in _CALLED.findall(attributes) for name in group.strip("{}").split(","))

    @property
    def target(self) -> str:
        """What a custom call calls, else empty."""
        found = _TARGET.search(self.attributes) if self.opcode == "custom-call" else None
        return found.group(1) if found else ""


Computation = dict[str, Instruction]  # in order


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
    shapes = tuple(
        Shape(d, tuple(map(int, filter(None, dims.split(",")))), "S(1)" in layout)
        for d, dims, layout in _ARRAY.findall(rest[:end])
    )
    inside = rest[opening + 1 : closing]
    return Instruction(
        name,
        rest[end:opening].strip(),
        shapes,
        tuple(re.findall(r"%([\w.\-]+)", inside)),
        inside,
        rest[closing + 1 :],
        is_root,
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")
