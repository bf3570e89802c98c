"""Whether the input keeps up: how long training waits for batches at a rate, and how many cores that takes."""

import tempfile
import time
from pathlib import Path

from medplib_jax.benchmarks.measure import Table
from medplib_jax.config.experiment import DataConfig
from medplib_jax.config.model import ModelConfig
from medplib_jax.data.pipeline import make_loader, train_batches
from medplib_jax.datasets.phantom import generate as phantom
from medplib_jax.datasets.train_tokenizer import build_tokenizer

BATCH, EXAMPLES = 16, 200


def measure(buckets: tuple[int, ...], rate: float, workers: int, seconds: float) -> Table:
    """Batches at MedPLIB-7B's sizes from generated pictures, taken every BATCH / rate seconds by steps that only sleep.

    The first row of the table is one reader as fast as it can: the rows that one core prepares. The second is `workers`
    processes at the given rate (rows per second). `buckets`: the lengths that rows are padded to.
    """
    table = Table(
        f"Input: {workers} worker processes at {rate:.0f} rows/s",
        ("", "rows/s", "share of the time spent waiting", "cores that the rate needs"),
    )
    with tempfile.TemporaryDirectory() as folder:
        phantom.generate(folder, EXAMPLES, 4)
        sources = tuple(str(Path(folder) / name) for name in phantom.FILES["train"].values())
        build_tokenizer(sources, str(Path(folder) / "tokenizer"))
        data = DataConfig(
            sources=sources,
            root=folder,
            tokenizer=str(Path(folder) / "tokenizer"),
            bucket_lengths=buckets,
            batch_size=BATCH,
            max_regions=4,
            max_masks=4,
        )
        loader = make_loader(data, ModelConfig(), folder)
        plan, _ = loader.plan(0)
        start = time.process_time()
        for step in range(4):
            loader.load_batch(plan, step, rows=tuple(range(BATCH)))
        per_core = 4 * BATCH / (time.process_time() - start)
        waited, taken, elapsed = _consume(train_batches(loader, plan, range(BATCH), 0, 10**6, workers), rate, seconds)
    cores = rate / per_core
    table.rows += [
        ("one core", f"{per_core:.0f}", "", f"{cores:.1f}"),
        (f"{workers} processes", f"{taken / elapsed:.0f}", f"{100 * waited / elapsed:.1f} %", ""),
    ]
    table.flat = {
        "input.rows_per_second_per_core": per_core,
        "input.cores_needed": cores,
        "input.waiting_share": waited / elapsed,
    }
    return table


def _consume(batches, rate: float, seconds: float) -> tuple[float, int, float]:
    """(seconds that steps of BATCH / rate seconds waited, rows taken, seconds in all).

    As in training, a batch is read while the step before runs, and no further ahead. The first batch, which starts the
    workers, is free.
    """
    next(batches)
    begin = now = done = time.perf_counter()  # done: when the step that was started last ends
    waited, taken = 0.0, 0
    while now - begin < seconds:
        next(batches)
        now = time.perf_counter()
        waited += max(now - done, 0.0)
        taken += BATCH
        running, done = done, max(now, done) + BATCH / rate
        time.sleep(max(running - now, 0.0))
    batches.close()
    return waited, taken, now - begin
