"""Evaluation in context: the test records that `medplib_jax.datasets.icl` made, after none to three examples.

COMMAND
    python -m medplib_jax.evaluate --config=configs/eval_icl.py:data/icl --workdir=runs/icl \
        --config.checkpoints=runs/7b/stage5

Examples are the records' own, which were drawn at random, and, where `medplib_jax.datasets.retrieve` has written
test/icl_retrieved.json, those that look most alike.
"""

import pathlib

from medplib_jax.config.base import to_config_dict
from medplib_jax.config.sweep import SweepConfig, TaskConfig

FILES = {"random": "test/icl.json", "retrieved": "test/icl_retrieved.json"}
SHOTS = (0, 1, 2, 3)


def get_config(folder: str = "data/icl"):
    return to_config_dict(SweepConfig(tasks=tasks(pathlib.Path(folder))))


def tasks(folder: pathlib.Path, about: str = "") -> tuple[TaskConfig, ...]:
    """Called after how examples were chosen and their number; without any it does not matter how."""
    names = ((way, shots) for shots in SHOTS for way in FILES if shots or way == "random")
    return tuple(
        TaskConfig(f"{way}-{shots}", str(folder / FILES[way]), str(folder), kind="icl", shots=shots, about=about)
        for way, shots in names
    )
