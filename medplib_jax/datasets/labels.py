"""Label maps: masks in which each value marks another structure, named by a file of their folder."""

import json
import os
from collections.abc import Mapping

import numpy as np

from medplib_jax.data.errors import DataError, Notice

NAMES_FILES = ("labels.json", "dataset.json")
_EXPECTED = '{"1": "liver", ...} in labels.json, or "labels" in nnU-Net\'s dataset.json'


def read_names(root: str) -> dict[int, str]:
    """Value -> name, of a folder with a names file; empty without one.

    labels.json holds {"1": "liver"} or {"liver": 1}; nnU-Net's dataset.json {"labels": ...}. The background, 0, has no
    name. DataError when the file has another form.
    """
    path = next((path for name in NAMES_FILES if os.path.isfile(path := os.path.join(root, name))), "")
    if not path:
        return {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
        pairs = (content["labels"] if path.endswith(NAMES_FILES[1]) else content).items()
        names = {int(key): str(value) for key, value in (pair if pair[0].isdecimal() else pair[::-1] for pair in pairs)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(path, None, "names of labels cannot be read", _EXPECTED, str(error)) from error
    return {value: name for value, name in names.items() if value}


def is_label_map(name: str, names: Mapping[int, str]) -> bool:
    """Whether a mask file of this name is a label map: the folder has names of labels, and this is none of them."""
    return bool(names) and name not in names.values()


def split(values: np.ndarray, names: Mapping[int, str], file: str) -> tuple[dict[str, np.ndarray], list[DataError]]:
    """A bool mask for each value of a label map, by name; and a problem for each value that has no name."""
    found = [int(value) for value in np.unique(values) if value]
    unnamed = [DataError(file, None, "value without a name", _EXPECTED, str(one)) for one in found if one not in names]
    return {names[value]: values == value for value in found if value in names}, unnamed


def several_values(values: np.ndarray, file: str) -> list[DataError]:
    """The notice that a mask of several values is read as one, or none."""
    shown = np.unique(values[values > 0])
    if len(shown) < 2:
        return []
    listed = ", ".join(f"{value:g}" for value in shown[:6]) + (", ..." if len(shown) > 6 else "")
    return [Notice(file, None, "mask has several values, which are read as one", "one, or " + _EXPECTED, listed)]
