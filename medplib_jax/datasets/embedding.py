"""A checkpoint's own CLIP as vectors of pictures, batch by batch: in this process, or on workers of Beam."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from medplib_jax.data import images
from medplib_jax.data.errors import DataError
from medplib_jax.datasets.files import code_version
from medplib_jax.datasets.image_index import Entry

READERS = 8  # pictures that are read at a time


class Embedder:
    """The CLIP of a checkpoint as pictures' vectors for retrieval.

    `digest` names its weights. FileNotFoundError without a checkpoint, ValueError for one without CLIP.
    """

    def __init__(self, checkpoint_dir: str):
        import jax
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        from medplib_jax.checkpoint import load_params
        from medplib_jax.models.icl.embedding import picture_vectors, retrieval_tower
        from medplib_jax.models.layers import abstract_module, bind

        experiment, params, _ = load_params(checkpoint_dir, part="clip")
        config = experiment.model.clip
        self.side, self.width, self.digest = config.image_size, config.hidden_size, _digest(config, params["clip"])
        tower = abstract_module(functools.partial(retrieval_tower, config))
        mesh = Mesh(np.array(jax.local_devices()), ("rows",))
        everywhere, shared = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("rows",)))
        self._params = jax.device_put(params["clip"], everywhere)
        self._embed = jax.jit(
            lambda params, pixels: picture_vectors(bind(tower, params), pixels),
            in_shardings=(everywhere, shared),
            out_shardings=everywhere,
        )
        self._devices = mesh.size

    def __call__(self, pixels_BxIxIx3: np.ndarray) -> np.ndarray:
        """Unit vectors float32 [B, C] of pictures from `read`."""
        rows = len(pixels_BxIxIx3)
        padded = np.pad(pixels_BxIxIx3, ((0, -rows % self._devices), (0, 0), (0, 0), (0, 0)))
        return np.asarray(self._embed(self._params, padded))[:rows]

    def read(self, file: str | images.Blob) -> np.ndarray:
        """A picture as the tower reads it for retrieval, uint8 [side, side, 3]."""
        return images.cropped(images.load_pixels(file), self.side)


def _digest(config, params: dict) -> str:
    """16 hex digits that change with CLIP's sizes and weights."""
    from medplib_jax.batch import flatten

    total = hashlib.blake2b(repr(config).encode(), digest_size=8)
    for path, leaf in sorted(flatten(params).items()):
        total.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        total.update(np.ascontiguousarray(leaf).view(np.uint8).reshape(-1).data)
    return total.hexdigest()


Embedded = tuple[list[Entry], np.ndarray]  # entries with their problems, and vectors float32 [entries, C]


def embed_all(embedder: Embedder, root: str, batch: int, batches: Sequence[Sequence[Entry]]) -> Iterator[Embedded]:
    """The vectors of each batch; the next batch is read meanwhile."""
    for entries, pixels in _read_ahead(batches, functools.partial(_pixels, root, embedder.read)):
        yield _embed(embedder, batch, entries, pixels)


def embed_batch(checkpoint_dir: str, root: str, batch: int, entries: Sequence[Entry]) -> Embedded:
    """The vectors of one batch, in a process that keeps the model."""
    embedder = _embedder(checkpoint_dir)
    with ThreadPoolExecutor(READERS) as pool:
        pixels = list(pool.map(functools.partial(_pixels, root, embedder.read), entries))
    return _embed(embedder, batch, entries, pixels)


_embedder = functools.lru_cache(maxsize=1)(Embedder)


def batch_key(clip: str, root: str, batch: int, entries: Sequence[Entry]) -> str:
    """Changes with the weights, the pictures and the code that reads them."""
    return repr((clip, root, batch, entries, code_version()))


def _embed(embedder: Embedder, batch: int, entries: Sequence[Entry], pixels: Sequence) -> Embedded:
    """One program for all batches: the last one has empty rows."""
    canvas, found = np.zeros((batch, embedder.side, embedder.side, 3), np.uint8), list(entries)
    for row, one in enumerate(pixels):
        if isinstance(one, np.ndarray):
            canvas[row] = one
        else:
            found[row] = dataclasses.replace(found[row], problem=str(one))
    return found, embedder(canvas)[: len(found)]


def _pixels(root: str, read: Callable[[str], np.ndarray], entry: Entry) -> np.ndarray | DataError:
    try:
        return read(os.path.join(root, entry.image))
    except DataError as error:
        return error


def _read_ahead(
    batches: Sequence[Sequence[Entry]], read: Callable[[Entry], np.ndarray | DataError]
) -> Iterator[tuple[Sequence[Entry], list[np.ndarray | DataError]]]:
    """Batches with their pixels, or why they have none; the next batch is read meanwhile."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting = None
        for entries in (*batches, ()):
            coming = entries, [pool.submit(read, entry) for entry in entries]
            if waiting:
                yield waiting[0], [future.result() for future in waiting[1]]
            waiting = coming
