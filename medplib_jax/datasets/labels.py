"""Label maps: masks in which each value marks another structure, named by a file of their folder."""

import os

import numpy as np

from medplib_jax.data.errors import DataError, Notice
from medplib_jax.volumes.masks import Labels, read_labels

NAMES_FILES = ("labels.json", "labels.tsv", "labels.txt", "dataset.json")
_EXPECTED = '{"1": "liver", ...} in labels.json, or labels.tsv, labels.txt (name=value), nnU-Net\'s dataset.json'


def read_names(root: str) -> Labels:
    """Name -> its values, from the first of `NAMES_FILES` that the folder has; empty without one.

    DataError when the file has another form.
    """
    path = next((path for name in NAMES_FILES if os.path.isfile(path := os.path.join(root, name))), "")
    return read_labels(path) if path else {}


def is_label_map(name: str, names: Labels) -> bool:
    """Whether a mask file of this name is a label map: the folder has names of labels, and this is none of them."""
    return bool(names) and name not in names


def split(values: np.ndarray, names: Labels, file: str) -> tuple[dict[str, np.ndarray], list[DataError]]:
    """A bool mask for each structure of a label map, by name; and a problem for each value that has no name."""
    found = {int(value) for value in np.unique(values) if value}
    known = {value for wanted in names.values() for value in wanted}
    unnamed = [DataError(file, None, "value without a name", _EXPECTED, str(one)) for one in sorted(found - known)]
    return {name: np.isin(values, wanted) for name, wanted in names.items() if found & set(wanted)}, unnamed


def several_values(values: np.ndarray, file: str) -> list[DataError]:
    """The notice that a mask of several values is read as one, or none."""
    shown = np.unique(values[values > 0])
    if len(shown) < 2:
        return []
    listed = ", ".join(f"{value:g}" for value in shown[:6]) + (", ..." if len(shown) > 6 else "")
    return [Notice(file, None, "mask has several values, which are read as one", "one, or " + _EXPECTED, listed)]
