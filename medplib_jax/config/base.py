"""How every configuration is checked and built from plain values."""

import dataclasses
import difflib
import typing
from typing import Any


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def from_dict(cls, values: dict[str, Any], path: str = ""):
    """Builds a (nested) config dataclass from plain values; an unknown field is a ValueError that names the nearest one."""
    types = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    built = {}
    for name, value in values.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {path}{nearest[0]!r}?" if nearest else f"; known: {sorted(known)}"
            raise ValueError(f"unknown config field {path}{name!r}{hint}")
        nested = dataclasses.is_dataclass(types[name]) and isinstance(value, dict)
        built[name] = from_dict(types[name], value, f"{path}{name}.") if nested else value
    return cls(**built)


def to_config_dict(config):
    """A configuration as a locked ml_collections.ConfigDict, so that flags can change any field and no other."""
    import ml_collections  # not needed by data workers

    return ml_collections.ConfigDict(dataclasses.asdict(config), type_safe=False).lock()


def from_config_dict(values, kind: type):
    """A validated configuration of class `kind` from the (possibly flag-changed) ConfigDict."""
    return from_dict(kind, values.to_dict())
