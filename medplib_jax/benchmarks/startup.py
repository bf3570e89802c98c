"""Seconds from the command to the end of the first training step, with an empty compilation cache and a full one."""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from medplib_jax.benchmarks.measure import Table
from medplib_jax.datasets.phantom import generate as phantom
from medplib_jax.datasets.train_tokenizer import build_tokenizer


def measure() -> Table:
    """Runs `python -m medplib_jax.train` for one step, saving included, twice.

    Counts the programs that each run compiled or found.
    """
    table = Table("Start-up: one step of the tiny stage I", ("", "seconds", "programs", "from the cache"))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "phantom"
        phantom.generate(data, 40, 4, processes=1)
        build_tokenizer([str(data / name) for name in phantom.FILES["train"].values()], str(data / "tokenizer"))
        for start in ("first", "second"):
            seconds, (requested, cached) = _run(data, Path(folder), start)
            table.rows.append((f"{start} start", f"{seconds:.1f}", str(requested), str(cached)))
            table.flat |= {
                f"startup.{start}.seconds": seconds,
                f"startup.{start}.programs": requested,
                f"startup.{start}.cached": cached,
            }
    return table


def _run(data: Path, folder: Path, name: str) -> tuple[float, tuple[int, int]]:
    fields = {
        "data.sources": f"('{data / 'train' / 'align.json'}',)",
        "data.root": data,
        "data.tokenizer": data / "tokenizer",
        "train.steps": 1,
    }
    flags = [f"--config.{field}={value}" for field, value in fields.items()]
    command = [
        sys.executable,
        "-m",
        "medplib_jax.train",
        "--config=configs/stage1_align.py:tiny",
        f"--workdir={folder / name}",
        *flags,
    ]
    begin = time.perf_counter()
    done = subprocess.run(
        command, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    requested, cached = re.search(r"compiled (\d+) programs in .*, (\d+) of them from the cache", done.stderr).groups()
    return time.perf_counter() - begin, (int(requested), int(cached))
