"""What `kinds` and `qwen_vl` share: a model's sizes in its tensors."""

import re
from collections.abc import Mapping

from .foreign_config import Json

Shapes = Mapping[str, tuple[int, ...]]


def shape_of(shapes: Shapes, key: str) -> tuple[int, ...]:
    """ValueError when the tensor is missing."""
    if key not in shapes:
        raise ValueError(f"tensor {key!r} is missing, the model's sizes cannot be read")
    return shapes[key]


def count(shapes: Shapes, pattern: str) -> int:
    """How many values the last group of `pattern` takes."""
    return len({match[match.lastindex] for key in shapes if (match := re.match(pattern, key))})


def check_agree(what: str, written: Json, found: Json) -> None:
    """ValueError where config.json says another thing than the tensors; what it does not say is fine."""
    for name, value in found.items():
        plain = list(value) if isinstance(value, tuple) else value
        if written.get(name, plain) not in (plain, value):
            raise ValueError(f"config.json of {what}: {name} {written[name]} disagrees with the tensors: {plain}")


def adapters_rank(shapes: Shapes) -> int:
    """Of all adapters, 0 without any. ValueError when they have several."""
    ranks = {shape[0] for key, shape in shapes.items() if key.endswith(".lora_A.weight")}
    if len(ranks) > 1:
        raise ValueError(f"adapters of several ranks ({sorted(ranks)}) in one checkpoint are not supported")
    return ranks.pop() if ranks else 0
