"""The parameters of a checkpoint, opened and not yet read.

MedPLIB-7B has 23 GB in bfloat16. What answers on a small machine reads a layer, makes of it what it needs (8 bits, say)
and drops it before it reads the next (`layout.to_decoding_layout`).
"""

import dataclasses
import math
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import type_handlers

from medplib_jax.batch import Params, combine, flatten
from medplib_jax.checkpoint import (
    FOLDER,
    PARTS,
    bit_sums,
    check_listed,
    check_sums,
    find_step,
    is_quantized,
    make_manager,
    read_experiment,
)
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.parallel.quiet import without_orbax_remarks


class OpenHandler(type_handlers.NumpyHandler):
    """Reads an array as an open TensorStore, of which a slice is a part of the file."""

    async def deserialize(self, infos, args=None):
        specs = [type_handlers.get_json_tspec_read(info, info.is_ocdbt_checkpoint) for info in infos]
        return [
            await ts.open(spec, open=True, context=info.ts_context) for spec, info in zip(specs, infos, strict=True)
        ]


def open_stores(folder: epath.PathLike) -> dict[str, Params]:
    """The parameters of a step's folder, "trainable" and "frozen", each an open `tensorstore.TensorStore`."""
    state = epath.Path(folder) / "state"
    saved = ocp.PyTreeCheckpointHandler().metadata(state).tree  # knows the types of arrays that training saved, too
    check_listed(epath.Path(folder), saved)
    wanted = {part: saved.get(part) or {} for part in PARTS}
    args = ocp.args.PyTreeRestore(
        item=jax.tree.map(lambda _: 0, wanted),
        restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted),
        partial_restore=True,
    )
    with without_orbax_remarks():
        registry = type_handlers.create_type_handler_registry((np.ndarray, OpenHandler()))
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
            return checkpointer.restore(state, args=args)


class SavedArray:
    """An array of a checkpoint. `saved[place]` reads a part of it; two parts must not overlap, or be the same.

    The bits of what is read are summed, as `checkpoint.bit_sums` does. ValueError for a part that is read again and is
    not what it was: the sum would tell of one of them.
    """

    def __init__(self, store: ts.TensorStore):
        self.shape, self.dtype, self._store = store.shape, store.dtype.numpy_dtype, store
        self._read: dict[str, tuple[int, int]] = {}  # part -> its elements, and the sum over their bits

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def rows_at_once(self) -> int:
        """Rows along the first axis that lie in one piece of the file. To read one of them is to read all."""
        return self._store.chunk_layout.read_chunk.shape[0] if self.shape else 1

    @property
    def bit_sum(self) -> int | None:
        """The sum over the bits, None while some of it is not read."""
        parts = list(self._read.values())
        whole = sum(size for size, _ in parts) == math.prod(self.shape)
        return sum(bits for _, bits in parts) % 2**32 if whole else None

    def __getitem__(self, place: Any) -> np.ndarray:
        found = np.ascontiguousarray(self._store[place].read().result())
        summed = found.size, *bit_sums({"": found}).values()
        if self._read.setdefault(str(place), summed) != summed:
            raise ValueError(f"{self._store.kvstore.url}: changed while it was read")
        return found


@dataclasses.dataclass(frozen=True)
class SavedParams:
    """The parameters of a complete step. The leaves of `parts`, "trainable" and "frozen", are `SavedArray`."""

    experiment: ExperimentConfig
    parts: dict[str, Params]
    folder: epath.Path

    @property
    def tree(self) -> Params:
        """All of them together."""
        return combine(*(self.parts[part] for part in PARTS))

    @property
    def tokenizer(self) -> str:
        """The folder of its files."""
        return str(self.folder / "tokenizer")

    @property
    def quantize(self) -> str:
        """ "int8" if the step holds weights of 8 bits."""
        return "int8" if is_quantized(flatten(self.tree)) else ""

    def check(self) -> None:
        """ValueError naming the arrays that were read whole and are not what was saved."""
        arrays = {f"{path} {array.dtype}": array.bit_sum for path, array in flatten(self.parts).items()}
        check_sums(self.folder, {name: bits for name, bits in arrays.items() if bits is not None})


def open_params(path: str | os.PathLike, step: int | None = None) -> SavedParams:
    """What `checkpoint.load_params` would read. Raises as `checkpoint.find_step`."""
    workdir, step = find_step(path if step is None else epath.Path(path) / FOLDER / str(step))
    folder = workdir / FOLDER / str(step)
    with make_manager(str(workdir), read_only=True) as manager:
        experiment = read_experiment(manager, step)[0]
    return SavedParams(experiment, jax.tree.map(SavedArray, open_stores(folder)), folder)
