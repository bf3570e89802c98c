"""Paddle's checkpoint files (`*.pdparams`), as BiRD's own trainer writes them: a pickle of NumPy arrays.

The file is read by an unpickler that makes arrays and nothing else: any other object in it is refused by name. bfloat16
is stored as the bits of uint16. Names stay Paddle's (`mapping.canonical` knows them); shapes become PyTorch's, since
Paddle keeps the weight of a linear layer as (in, out).
"""

import collections
import pathlib
import pickle

import ml_dtypes
import numpy as np

SUFFIX = ".pdparams"
_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),  # bytes, as Python 2 wrote them
}
_ALLOWED |= {(f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0] for core in ("core", "_core")}
_NAMES = "StructuredToParameterName@@"  # what the parameters are called inside of a program
_SPLIT = "UnpackBigParamInfor@@"  # of arrays above 1 GB, with an old protocol of pickle


def read_arrays(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Name -> array in PyTorch's shape. ValueError for a damaged file, and for one that holds more than arrays."""
    try:
        with open(file, "rb") as stream:
            loaded = _Arrays(stream).load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file}: refused or damaged: {error}") from error
    except (EOFError, AttributeError, LookupError, MemoryError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: truncated or damaged: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{file}: expected a dictionary of arrays, found {type(loaded).__name__}")
    if _SPLIT in loaded:
        raise ValueError(f"{file}: its large arrays are split; save it anew with paddle.save(..., protocol=4)")
    arrays = {name: value for name, value in loaded.items() if name != _NAMES}
    for name, value in arrays.items():
        if not isinstance(value, np.ndarray) or value.dtype.hasobject:
            raise ValueError(f"{file}: {name!r}: expected an array of numbers, found {type(value).__name__}")
        if not isinstance(name, str):
            raise ValueError(f"{file}: expected names of arrays, found {name!r}")
    rows = {array.shape[0] for name, array in arrays.items() if name.endswith("wte.weight") and array.ndim}
    return {name: _as_torch(name, array, rows) for name, array in arrays.items()}


class _Arrays(pickle.Unpickler):
    """Loads arrays and containers of them."""

    def find_class(self, module: str, name: str):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which could run code when loaded")
        return _ALLOWED[module, name]


def _as_torch(name: str, array: np.ndarray, vocabulary: set[int]) -> np.ndarray:
    if array.dtype == np.uint16:
        array = array.view(ml_dtypes.bfloat16)
    if array.ndim != 2 or not name.endswith("weight") or name.endswith("wte.weight"):
        return array
    if name.endswith("lm_head.weight") and len(array) in vocabulary:  # a table, as the embedding is
        return array
    return array.T
