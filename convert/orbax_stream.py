"""Orbax checkpoints written piece by piece, so that no parameter need ever be whole in memory.

With `handler`, a tree's leaves are `Streamed`: Orbax writes its usual files (they restore like any other checkpoint),
and the arrays' contents come from here, a few slabs at a time. `decode.saved_params` reads so.

Why this is not Orbax's own: its handlers take whole arrays. All of MedPLIB-7B in bfloat16 are 22.9 GB, the largest one
(experts of 32 layers) has 5.8 GB. Written in pieces, the conversion's peak is 3.0 GB (2 cores, 24 GB of memory,
2026-11-26; `convert.benchmark`).
"""

import asyncio
import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from medplib_jax.parallel.ahead import ahead

from .torch_files import progress

Index = tuple[int, ...]
MAX_CHUNK_BYTES = 1 << 25
MAX_PENDING_BYTES = 1 << 29  # being written, beside `ahead.MAX_BYTES` in the making


@dataclasses.dataclass(frozen=True)
class Streamed:
    """An array that is made while it is written: `slabs` are pairs of an index on the leading axes and what makes the
    rest."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]  # what is read and written as one piece; divides every slab
    slabs: Sequence[tuple[Index, Callable[[], np.ndarray]]]


class _StreamHandler(type_handlers.NumpyHandler):
    """Writes `Streamed` leaves."""

    async def serialize(self, values, infos, args=None):
        return [ocp.future.CommitFutureAwaitingContractedSignals(self._write(values, infos), name="streamed_arrays")]

    async def _write(self, values, infos):
        """Slabs are made by a few threads, and written while the next ones are made."""
        stores = await asyncio.gather(*map(self._create, values, infos))  # together: each alone would wait for the disk
        slabs = [
            (store[index], make) for store, value in zip(stores, values, strict=True) for index, make in value.slabs
        ]
        sizes = [math.prod(store.shape) * store.dtype.numpy_dtype.itemsize for store, _ in slabs]
        begun = ahead((functools.partial(_begin, *slab) for slab in slabs), sizes)
        pending, size = collections.deque(), 0
        with progress("checkpoint", sum(sizes)) as bar:
            try:
                for written, nbytes in zip(begun, sizes, strict=True):
                    pending.append((written, nbytes))
                    bar.update(nbytes)
                    size += nbytes
                    while size > MAX_PENDING_BYTES:
                        written, nbytes = pending.popleft()
                        await written
                        size -= nbytes
            finally:  # after an error too: who removes the folder must not meet files that still appear
                await asyncio.gather(*(written for written, _ in pending))

    async def _create(self, value, info):
        await info.await_path_creation()
        ocdbt = info.is_ocdbt_checkpoint
        spec = type_handlers.get_json_tspec_write(info, ocdbt, value.shape, value.chunk, value.dtype, process_index=0)
        return await ts.open(spec, create=True, open=True, context=info.ts_context)


def _begin(store: ts.TensorStore, make: Callable[[], np.ndarray]) -> ts.WriteFutures:
    """Makes a slab and begins to write it, which alone holds it from then on."""
    return store.write(make(), can_reference_source_data_indefinitely=True)


def handler() -> ocp.PyTreeCheckpointHandler:
    """Of an item whose leaves are `Streamed`."""
    registry = type_handlers.create_type_handler_registry((Streamed, _StreamHandler()))
    # no compression: trained weights shrink by a quarter at most, and packing them costs more time than writing them
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)


def chunk_shape(shape: tuple[int, ...], stacked: int, parts: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The piece to write at once: one slab along the first `stacked` axes, cut into `parts` per axis (a mesh's shards),
    then halved along its first even axis, so that it stays contiguous, until it is no larger than `MAX_CHUNK_BYTES`."""
    chunk = [1] * stacked + [size // part for size, part in zip(shape[stacked:], parts[stacked:], strict=True)]
    while math.prod(chunk) * itemsize > MAX_CHUNK_BYTES and any(size % 2 == 0 for size in chunk):
        axis = next(i for i, size in enumerate(chunk) if size % 2 == 0)
        chunk[axis] //= 2
    return tuple(chunk)
