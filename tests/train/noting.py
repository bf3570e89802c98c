"""`medplib_jax.train` as tests start it in several processes:

It notes which records each process reads, in $NOTES/<process>.jsonl, and sends itself the signal $EARLY_SIGNAL before
training begins.
"""

import json
import os
import signal

import jax

from medplib_jax.train import __main__ as program
from medplib_jax.train import loop as train


def note_records(folder: str) -> None:
    read = train.train_batches

    def noting(loader, plan, rows, start, stop, workers):
        for step, (arrays, skipped) in enumerate(read(loader, plan, rows, start, stop, workers), start):
            with open(f"{folder}/{jax.process_index()}.jsonl", "a") as file:
                file.write(
                    json.dumps({"step": step, "rows": rows.tolist(), "records": arrays["record"].tolist()}) + "\n"
                )
            yield arrays, skipped

    train.train_batches = noting


def signal_early(number: int) -> None:
    join = program.initialize_distributed

    def join_and_signal():
        join()
        signal.raise_signal(number)

    program.initialize_distributed = join_and_signal


if __name__ == "__main__":
    if "NOTES" in os.environ:
        note_records(os.environ["NOTES"])
    if "EARLY_SIGNAL" in os.environ:
        signal_early(int(os.environ["EARLY_SIGNAL"]))
    program.main()
