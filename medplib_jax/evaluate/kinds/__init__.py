"""The kinds of questions that a sweep knows. Each module of this folder with a `KINDS` is found by being here."""

import functools
import importlib
import pkgutil

from medplib_jax.evaluate.kinds.base import Answer, Contents, TaskKind
from medplib_jax.evaluate.metrics import catalogue

__all__ = ["Answer", "Contents", "TaskKind", "best_fit", "find_kind", "kinds"]


@functools.cache
def kinds() -> dict[tuple[str, str], TaskKind]:
    """{(name, part): kind}. Their metrics are known to `metrics.catalogue` from then on."""
    found: dict[tuple[str, str], TaskKind] = {}
    for module in pkgutil.iter_modules(__path__):
        for kind in getattr(importlib.import_module(f"{__name__}.{module.name}"), "KINDS", ()):
            found[kind.name, kind.part] = kind
            for name, metric in kind.metrics.items():
                catalogue.register(name, metric)
    return found


def find_kind(name: str, part: str = "") -> TaskKind:
    """The kind of that name and part. ValueError with the names that there are."""
    found = kinds().get((name, part))
    if found is None:
        known = ", ".join(sorted(" ".join(filter(None, key)) for key in kinds()))
        raise ValueError(f"kind {' '.join(filter(None, (name, part)))!r} is not one of: {known}")
    return found


def best_fit(contents: Contents) -> str:
    """The name of the kind that claims a file of these contents most."""
    return max(kinds().values(), key=lambda kind: kind.claim(contents)).name
