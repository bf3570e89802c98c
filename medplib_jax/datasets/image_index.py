"""An index of pictures by CLIP's vectors: a folder that grows in place, is mapped into memory and searched exactly.

`vectors.f32` holds one row of float32 per picture, `entries.jsonl` one line per picture in the same order, and
`index.json` what all of them have in common. Rows are added in batches; a killed build goes on after its last whole
batch, with the batches that it would have had, so that the files come out the same byte for byte.
"""

import dataclasses
import filecmp
import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from medplib_jax.data.errors import DataError
from medplib_jax.datasets.files import write_json

VERSION = 1
VECTORS, ENTRIES, HEAD = "vectors.f32", "entries.jsonl", "index.json"
BLOCK = 2**14  # rows that are compared at a time: an index may be larger than memory


@dataclasses.dataclass(frozen=True)
class Head:
    """What the rows of an index have in common. `clip`: digest of the weights that made the vectors.

    `base`: the rows that were there when the latest build began. `complete`: whether that build has ended.
    """

    clip: str
    width: int
    batch: int
    root: str  # where pictures and masks lie, relative to the index
    base: int = 0
    complete: bool = False
    version: int = VERSION


@dataclasses.dataclass(frozen=True)
class Entry:
    """One picture and its masks by name, paths relative to the root. `problem`: why it has no vector."""

    image: str
    masks: dict[str, str]
    patient: str  # see `patients.anonymous`
    status: tuple[int, int]  # size in bytes and time of the file
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Hit:
    """A picture that was found, with its cosine; paths as `open` takes them."""

    score: float
    image: str
    masks: dict[str, str]
    patient: str


class ImageIndex:
    """An index on disk, read-only.

    DataError when the folder holds none, one of another version, or one whose build did not end.
    """

    def __init__(self, path: str):
        self.path, self.head = path, read_head(path)
        if self.head.version != VERSION:
            raise DataError(path, None, "index of another version", str(VERSION), str(self.head.version))
        if not self.head.complete:
            raise DataError(path, None, "index is not complete", "its build run to the end", "one that was interrupted")
        self.entries = read_entries(path)
        shape = (len(self.entries), self.head.width)
        self.vectors = np.memmap(os.path.join(path, VECTORS), np.float32, "r", shape=shape)
        self._root = os.path.normpath(os.path.join(path, self.head.root))
        self._sizes = np.array([entry.status[0] for entry in self.entries])

    def check_weights(self, clip: str) -> None:
        """DataError when the vectors are of other CLIP weights than these: they cannot be compared."""
        if clip != self.head.clip:
            expected = f"weights {self.head.clip}, of which the index was made"
            raise DataError(self.path, None, "index of another checkpoint's CLIP", expected, clip)

    @property
    def names(self) -> tuple[str, ...]:
        """What its masks are called, sorted."""
        return tuple(sorted({name for entry in self.entries for name in entry.masks}))

    def search(
        self,
        queries_QxC: np.ndarray,
        k: int,
        name: str = "",
        patients: Sequence[str] = (),
        pictures: Sequence[str] = (),
    ) -> list[list[Hit]]:
        """The k most similar pictures to each unit vector, best first; of equal ones the first that was added.

        name: only pictures with a mask of it (empty: any). patients (empty for an unknown one) and pictures (files):
        what each query is not to find; of a picture that is in the index its patient's others neither. Fewer than k
        where there are no more.
        """
        allowed = np.array([not one.problem and (not name or name in one.masks) for one in self.entries], bool)
        found_in = np.array([one.patient for one in self.entries])
        excluded = np.zeros((len(queries_QxC), len(self.entries)), bool)
        for row, patient in enumerate(patients):
            excluded[row] |= (found_in == patient) & bool(patient)
        for row, picture in enumerate(pictures):
            same = self._same(picture)
            known = [self.entries[i].patient for i in same if self.entries[i].patient]
            excluded[row] |= np.isin(found_in, known)
            excluded[row, same] = True
        scores, rows = nearest(self.vectors, queries_QxC, k, allowed & ~excluded if excluded.any() else allowed)
        return [
            [self._hit(float(score), int(i)) for score, i in zip(*one, strict=True) if np.isfinite(score)]
            for one in zip(scores, rows, strict=True)
        ]

    def _same(self, picture: str) -> list[int]:
        """The rows of pictures that are this file, byte for byte."""
        rows = np.flatnonzero(self._sizes == os.path.getsize(picture)).tolist()
        paths = [(row, os.path.join(self._root, self.entries[row].image)) for row in rows]
        return [row for row, path in paths if os.path.isfile(path) and filecmp.cmp(path, picture, shallow=False)]

    def _hit(self, score: float, row: int) -> Hit:
        entry = self.entries[row]
        masks = {name: os.path.join(self._root, mask) for name, mask in entry.masks.items()}
        return Hit(score, os.path.join(self._root, entry.image), masks, entry.patient)


def nearest(
    vectors_NxC: np.ndarray, queries_QxC: np.ndarray, k: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k largest products of each query with the rows: (float32 [Q, k], rows int32 [Q, k]), -inf beyond the last.

    allowed: bool [N] or [Q, N]. Compared in float32 on all devices of this process, block by block.
    """
    import jax
    import jax.numpy as jnp

    queries = jnp.asarray(queries_QxC, jnp.float32)
    best = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
    allowed = np.ones(len(vectors_NxC), bool) if allowed is None else allowed
    parts = jax.local_device_count()
    compare = _comparison(parts)
    block = min(BLOCK, -(-max(1, len(vectors_NxC)) // parts) * parts)
    for start in range(0, len(vectors_NxC), block):
        rows = np.asarray(vectors_NxC[start : start + block])
        beyond = block - len(rows)
        usable = np.pad(np.atleast_2d(allowed)[:, start : start + block], ((0, 0), (0, beyond)))
        best = compare(queries, np.pad(rows, ((0, beyond), (0, 0))), usable, best, start)
    return jax.device_get(best)


@functools.cache
def _comparison(parts: int):
    """The compiled step of `nearest`: the best of what was found and of one more block, whose rows are shared out over
    `parts` devices."""
    import jax
    import jax.numpy as jnp
    from einops import rearrange
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from medplib_jax.models.precision import product

    mesh = Mesh(np.array(jax.local_devices()), ("rows",))
    everywhere, shared = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("rows"))

    def top(scores, rows, k):
        scores, places = jax.lax.top_k(scores, k)
        return scores, jnp.take_along_axis(rows, places, axis=-1)

    def compare(queries, block, usable, best, start):
        k = best[0].shape[1]
        scores = jnp.where(usable, product(queries, block.T), -jnp.inf)
        scores = rearrange(scores, "Q (P n) -> Q P n", P=parts)
        rows = rearrange(start + jnp.arange(len(block)), "(P n) -> 1 P n", P=parts)
        scores, rows = top(scores, jnp.broadcast_to(rows, scores.shape), min(k, scores.shape[-1]))
        found = zip(best, (rearrange(x, "Q P k -> Q (P k)") for x in (scores, rows)), strict=True)
        return top(*(jnp.concatenate(both, axis=1) for both in found), k)

    columns = NamedSharding(mesh, PartitionSpec(None, "rows"))
    inputs = (everywhere, shared, columns, everywhere, everywhere)
    return jax.jit(compare, in_shardings=inputs, out_shardings=everywhere)


def read_head(path: str) -> Head:
    file = os.path.join(path, HEAD)
    try:
        with open(file, encoding="utf-8") as content:
            return Head(**json.load(content))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(path, None, "not an index of pictures", f"a folder with {HEAD}", str(error)) from error


def read_entries(path: str) -> list[Entry]:
    with open(os.path.join(path, ENTRIES), encoding="utf-8") as file:
        return [_entry(json.loads(line)) for line in file]


def _entry(raw: dict[str, Any]) -> Entry:
    return Entry(**raw | {"status": tuple(raw["status"])})


class IndexWriter:
    """Adds rows to an index, which it makes or goes on with. `entries`: those that are there already.

    DataError when the folder holds another index: of other weights, another root or another batch.
    """

    def __init__(self, path: str, clip: str, width: int, batch: int, root: str):
        self._path = path
        os.makedirs(path, exist_ok=True)
        head = Head(clip, width, batch, os.path.relpath(os.path.realpath(root), os.path.realpath(path)))
        if os.path.exists(os.path.join(path, HEAD)):
            head = self._continued(read_head(path), head)
        elif others := sorted(os.listdir(path)):
            raise DataError(path, None, "folder holds other files", "a new or empty folder, or an index", others[0])
        else:
            self._write_head(head)
        self._head = head
        for name in (VECTORS, ENTRIES):
            open(os.path.join(path, name), "ab").close()
        self._cut(self._whole_rows())
        self.entries = read_entries(path)

    def _continued(self, found: Head, wanted: Head) -> Head:
        for field in ("version", "clip", "width", "batch", "root"):
            old, new = getattr(found, field), getattr(wanted, field)
            if old != new:
                raise DataError(self._path, None, f"index has another {field}", str(new), str(old))
        if not found.complete:
            return found
        return dataclasses.replace(wanted, base=_lines(os.path.join(self._path, ENTRIES)))

    def _whole_rows(self) -> int:
        """How many rows belong to whole batches, of those that are in both files."""
        bytes_ = os.path.getsize(os.path.join(self._path, VECTORS))
        rows = min(bytes_ // (4 * self._head.width), _lines(os.path.join(self._path, ENTRIES)))
        base, batch = self._head.base, self._head.batch
        return base + (rows - base) // batch * batch

    def _cut(self, rows: int) -> None:
        """Drops what a killed build left behind the whole batches."""
        with open(os.path.join(self._path, VECTORS), "r+b") as file:
            file.truncate(4 * self._head.width * rows)
        with open(os.path.join(self._path, ENTRIES), "r+b") as file:
            for _ in range(rows):
                file.readline()
            file.truncate(file.tell())

    def add(self, vectors_BxC: np.ndarray, entries: Sequence[Entry]) -> None:
        """One batch, or what is left at the end. From the first one on the index is not complete."""
        self._write_head(self._head)
        with open(os.path.join(self._path, VECTORS), "ab") as file:
            file.write(np.ascontiguousarray(vectors_BxC, np.float32).tobytes())
        lines = [json.dumps(dataclasses.asdict(entry)) + "\n" for entry in entries]
        with open(os.path.join(self._path, ENTRIES), "ab") as file:
            file.write("".join(lines).encode())
        self.entries += entries

    def finish(self) -> None:
        self._write_head(dataclasses.replace(self._head, complete=True))

    def _write_head(self, head: Head) -> None:
        write_json(os.path.join(self._path, HEAD), dataclasses.asdict(head))


def _lines(path: str) -> int:
    with open(path, "rb") as file:
        return sum(line.endswith(b"\n") for line in file)
