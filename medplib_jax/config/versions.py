"""Experiments as they are saved: which version of the configuration wrote one, and how older ones are read.

A field that is renamed, moved or removed, or whose meaning changes, gets a migration at the end of MIGRATIONS. A new
field with a default needs none.
"""

from collections.abc import Callable
from typing import Any

from medplib_jax.config.base import from_dict
from medplib_jax.config.experiment import ExperimentConfig

Migration = Callable[[dict[str, Any]], dict[str, Any]]

# MIGRATIONS[i] turns the plain values of an experiment of version i into those of version i + 1.
MIGRATIONS: tuple[Migration, ...] = ()

VERSION = len(MIGRATIONS)  # of the experiments that this program writes; files that say no version are of version 0


def read_versioned(values: dict[str, Any], version: int) -> ExperimentConfig:
    """The experiment of values that were saved as `version`. ValueError for a version from the future and for an
    unknown field.
    """
    if version > len(MIGRATIONS):
        raise ValueError(f"experiment version {version}; this program reads versions up to {len(MIGRATIONS)}")
    for migrate in MIGRATIONS[version:]:
        values = migrate(values)
    return from_dict(ExperimentConfig, values)
