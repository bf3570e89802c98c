"""How long exact search takes in an index of pictures, beside NumPy's own products."""

import tempfile
from pathlib import Path

import numpy as np

from medplib_jax.benchmarks.measure import Table, interleave
from medplib_jax.datasets.image_index import nearest

PICTURES, WIDTH, QUERIES, TOP = 100_000, 1024, 1000, 3


def measure(rounds: int) -> Table:
    """A row for each way to search a file that is mapped into memory. ValueError when they find other pictures."""
    rng = np.random.default_rng(0)
    queries = _units(rng, QUERIES)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vectors.f32"
        with open(file, "wb") as out:
            for start in range(0, PICTURES, 10_000):
                out.write(_units(rng, min(10_000, PICTURES - start)).tobytes())
        vectors = np.memmap(file, np.float32, "r", shape=(PICTURES, WIDTH))
        runs = {"ours": lambda: nearest(vectors, queries, TOP)[1], "numpy": lambda: _brute_force(vectors, queries)}
        ours, theirs = (run() for run in runs.values())  # compiles, too
        if differ := int((ours != theirs).sum()):
            raise ValueError(f"{differ} of {ours.size} pictures that were found differ from NumPy's")
        samples = interleave(runs, rounds)
    table = Table(f"{QUERIES} queries in {PICTURES} pictures of width {WIDTH}", ("", "median s", "fastest s"))
    for way, found in samples.items():
        table.rows.append((way, f"{found.median:.2f}", f"{found.fastest:.2f}"))
        table.flat[f"retrieval.{way}.seconds"] = found.median
    return table


def _units(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.standard_normal((count, WIDTH), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _brute_force(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    scores = queries @ vectors.T
    best = np.argpartition(-scores, TOP, axis=1)[:, :TOP]
    order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1)
