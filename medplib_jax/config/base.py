"""How every configuration is declared, checked, and built from plain values.

A section is a frozen dataclass that derives from `Section`. The type of a field says what it may hold: a `Literal`, or
a number within bounds (`Positive[int]`). Creating a section checks all of its fields, and an error names the field as a
flag would: `train.log_every`.
"""

import dataclasses
import difflib
import functools
import math
import numbers
import typing
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, TypeVar

T = TypeVar("T", int, float)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a number must be: at least `low`, or above it when `strict`, and below `high`."""

    low: float
    strict: bool = False
    high: float = math.inf

    def hold(self, value: float) -> bool:
        return (value > self.low if self.strict else value >= self.low) and value < self.high

    def __str__(self) -> str:
        lower = f"above {self.low:g}" if self.strict else f"at least {self.low:g}"
        return lower if math.isinf(self.high) else f"{lower} and below {self.high:g}"


Positive = Annotated[T, Bounds(0, strict=True)]
NotNegative = Annotated[T, Bounds(0)]
Share = Annotated[float, Bounds(0, high=1)]  # in [0, 1)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class Section:
    """Base of all sections: `class TrainConfig(Section, name="train")`. Lists in tuple fields become tuples."""

    NAME: ClassVar[str] = ""

    def __init_subclass__(cls, name: str = "", **arguments):
        super().__init_subclass__(**arguments)
        cls.NAME = name

    def __post_init__(self):
        for name, kind in field_types(type(self)).items():
            value = getattr(self, name)
            if typing.get_origin(kind) is tuple and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
            _check(f"{self.NAME}.{name}" if self.NAME else name, getattr(self, name), kind)


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    """{field: its type, bounds included}, in order."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _check(name: str, value: Any, kind: Any) -> None:
    """ValueError unless the value is of this type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        _check(name, value, arguments[0])
        bounds = arguments[1]
        require(bounds.hold(value), f"{name} {value!r} must be {bounds}")
    elif origin is typing.Literal:
        known = ", ".join(map(repr, arguments))
        require(value in arguments, f"{name} {value!r} is not one of {known}")
    elif origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        require(isinstance(value, tuple), f"{name} {value!r} is not a list")
        for item in value:
            _check(name, item, arguments[0])
    elif kind is int:
        require(isinstance(value, numbers.Integral), f"{name} {value!r} is not a whole number")
    elif kind is float:
        is_number = isinstance(value, numbers.Real) and math.isfinite(value)
        require(is_number, f"{name} {value!r} is not a finite number")
    elif kind is str:
        require(isinstance(value, str), f"{name} {value!r} is not a string")


def from_dict(cls, values: dict[str, Any], path: str = ""):
    """A (nested) section from plain values. An unknown field is a ValueError that names the nearest one."""
    types, built = typing.get_type_hints(cls), {}
    for name, value in values.items():
        if name not in field_types(cls):
            raise ValueError(unknown_field(cls, name, path))
        nested = dataclasses.is_dataclass(types[name]) and isinstance(value, dict)
        built[name] = from_dict(types[name], value, f"{path}{name}.") if nested else value
    return cls(**built)


def unknown_field(cls: type, name: str, path: str = "") -> str:
    """What to say of a field that does not exist. `name` may have dots, `path` is what stands before it."""
    known, last = list(_field_paths(cls)), name.rpartition(".")[2]
    initials = "".join(word[0] for word in last.split("_") if word)  # learning_rate: lr
    nearest = [field for field in known if field.rpartition(".")[2] in (last, initials)]
    nearest = nearest or difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if not nearest:
        ends = {field.rpartition(".")[2]: field for field in known}
        nearest = [ends[end] for end in difflib.get_close_matches(last, ends, n=1)]
    names = [path + field for field in nearest] or [path + field for field in field_types(cls)]
    hint = f"did you mean {' or '.join(names)}?" if nearest else f"known: {', '.join(names)}"
    return f"unknown config field {path}{name}; {hint}"


def _field_paths(cls: Any) -> Iterator[str]:
    """The names of all fields, those of nested sections with dots."""
    for name, kind in typing.get_type_hints(cls).items():
        if name in field_types(cls):
            yield from (f"{name}.{inner}" for inner in _field_paths(kind)) if dataclasses.is_dataclass(kind) else [name]


def flags_parser(cls: type):
    """A parser for `absl.app.run` that ends with one line for a wrong flag, as `--config.X` where X is no field of
    `cls`.
    """
    from absl import flags  # not needed by data workers

    def parse(argv: list[str]) -> list[str]:
        names = [argument.lstrip("-").partition("=")[0] for argument in argv[1:]]
        fields = [name.removeprefix("config.") for name in names if name.startswith("config.")]
        for field in fields:
            if field not in _field_paths(cls):
                raise SystemExit(f"error: {unknown_field(cls, field)}")
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            raise SystemExit(f"error: {error}") from None

    return parse


def to_config_dict(config):
    """A configuration as a locked ml_collections.ConfigDict, so that flags can change any field and no other."""
    import ml_collections  # not needed by data workers

    return ml_collections.ConfigDict(dataclasses.asdict(config), type_safe=False).lock()


def from_config_dict(values, kind: type):
    """A validated configuration of class `kind` from the (possibly flag-changed) ConfigDict."""
    return from_dict(kind, values.to_dict())
