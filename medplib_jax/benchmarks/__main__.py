"""Side-by-side measurements.

    python -m medplib_jax.benchmarks --suite cpu --against torch --json cpu.json

cpu      a training step, a mixture beside one MLP, parts of the step, peak memory, start-up
decode   time to the first token and tokens per second, batch 1 and 16, also with weights of 8 bits
gpu      memory, stage IV and III at 7B's width with as many layers as fit (--layers), MFU, parts, answers, input at the steps' rate; needs
         one accelerator
tpu      bounds of stage IV at 7B on v5e, v5p and v6e by the TPU's compiler; needs libtpu, no TPU
data     whether the input keeps up with a rate (--rate); with --data also time per record beside a PyTorch DataLoader
convert  speed and memory of the conversion

Prints tables; `--json` writes their figures flat. `--against torch` measures a PyTorch program of the same sizes in the same run; `--only moe,memory`
measures these parts of a suite.
README.md beside this file has what came out and how.
"""

import argparse
import dataclasses
import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from convert import benchmark
from medplib_jax.benchmarks import (
    accelerator,
    data_pipeline,
    decoding,
    feeding,
    memory,
    parts,
    roofline,
    startup,
    training,
    workload,
)
from medplib_jax.benchmarks.measure import Table
from medplib_jax.parallel.compilation import use_cache

# Each suite says which parts it has: {name: what measures it}.
Parts = dict[str, Callable[[], Iterable[Table]]]


def cpu(options: argparse.Namespace) -> Parts:
    config = workload.experiment(workload.MODELS[options.size], options.batch or 2)
    return {
        "train_step": lambda: [training.compare(config, _peers(options), options.rounds)],
        "moe": lambda: [training.moe_over_dense(config, options.rounds)],
        "parts": lambda: [parts.measure(config, options.rounds)],
        "memory": lambda: [
            memory.compare(options.size, options.batch or 2, options.layers, options.against == "torch")
        ],
        "startup": lambda: [startup.measure()],
    }


def decode(options: argparse.Namespace) -> Parts:
    def answers(rows: int) -> list[Table]:
        config = workload.merged(workload.experiment(workload.MODELS[options.size], rows))
        return decoding.compare(config, options.against == "torch", options.rounds, options.new_tokens)

    return {
        f"batch_{rows}": functools.partial(answers, rows) for rows in ((options.batch,) if options.batch else (1, 16))
    }


def gpu(options: argparse.Namespace) -> Parts:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs its share of the memory
    model, rows = workload.model(options.size, options.layers), options.batch or 8
    config = workload.experiment(model, rows)
    measured: dict[str, float] = {}

    def step(stage: str) -> Iterator[Table]:
        table = accelerator.training_step(
            workload.experiment(model, rows, stage), stage, _peers(options), options.rounds, options.device
        )
        measured[stage] = rows / table.flat[f"train_step.stage_{stage}.ours.seconds"]
        yield table

    def keeps_up() -> Iterator[Table]:
        """The input at the fastest of the rates that the steps have reached."""
        yield feeding.measure(max(measured.values(), default=options.rate), options.workers, options.seconds)

    return {
        "memory": lambda: [
            memory.compare(options.size, rows, options.layers, options.against == "torch")
        ],  # first: it has the device for itself
        "rates": lambda: [accelerator.machine_rates(model.llm.hidden_size)],
        **{f"stage_{stage}": functools.partial(step, stage) for stage in ("IV", "III")},
        "moe": lambda: [training.moe_over_dense(config, options.rounds)],
        "parts": lambda: [parts.measure(config, options.rounds)],
        "decode": lambda: accelerator.answers(
            model, options.against == "torch", options.rounds, options.new_tokens, options.device
        ),
        "input": keeps_up,
    }


def tpu(options: argparse.Namespace) -> Parts:
    return {"roofline": lambda: [roofline.measure()]}


def data(options: argparse.Namespace) -> Parts:
    found: Parts = {"input": lambda: [feeding.measure(options.rate, options.workers, options.seconds)]}
    return found | ({"records": lambda: [_records(options)]} if options.data else {})


def _records(options: argparse.Namespace) -> Table:
    times = data_pipeline.compare(data_pipeline.config(str(options.data), str(options.tokenizer)), options.rounds)
    rows = [(name, f"{value:.2f}", f"{times['PyTorch DataLoader'] / value:.1f}") for name, value in times.items()]
    flat = {f"data.{name.replace(' ', '_').replace(',', '')}.ms": value for name, value in times.items()}
    return Table("Reading records", ("", "ms per record and core", "times PyTorch's rate"), rows, flat)


def convert(options: argparse.Namespace) -> Parts:
    return {"convert": lambda: [_conversion(options.layers)]}


def _conversion(layers: int) -> Table:
    with tempfile.TemporaryDirectory() as folder:
        found = benchmark.compare(Path(folder) / "work", layers)
    flat = {
        f"convert.{name}.{figure}": value
        for name, measured in found.results.items()
        for figure, value in dataclasses.asdict(measured).items()
    }
    return Table(found.title, benchmark.COLUMNS, found.rows(), flat | {"convert.tensors_changed": found.changed})


SUITES = {suite.__name__: suite for suite in (cpu, decode, gpu, tpu, data, convert)}


def _peers(options: argparse.Namespace) -> tuple[str, ...]:
    return (
        (("torch eager",) if options.no_compile else ("torch eager", "torch compile"))
        if options.against == "torch"
        else ()
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="medplib_jax.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--against", choices=("torch",))
    parser.add_argument("--only", metavar="PART,...", help="parts of the suite, by default all")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved runs, of which the median counts")
    parser.add_argument("--size", choices=workload.SIZES, help="default: small, 7b for gpu")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (gpu, convert)")
    parser.add_argument("--batch", type=int, help="rows (cpu: 2, gpu: 8, decode: 1 and 16)")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    parser.add_argument("--device", default="cuda", help="where PyTorch runs in the suite gpu")
    parser.add_argument("--rate", type=float, default=64.0, help="rows per second that training takes (data)")
    parser.add_argument("--workers", type=int, default=8, help="worker processes (data)")
    parser.add_argument("--data", type=Path, help="folder of annotation files in MeCoVQA's form")
    parser.add_argument("--tokenizer", type=Path, help="for --data")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long the input is watched (data)")
    options = parser.parse_args(argv)
    options.size = options.size or ("7b" if options.suite == "gpu" else "small")
    if options.data and not options.tokenizer:
        parser.error("--data needs --tokenizer")
    if options.size == "7b" and options.suite != "gpu":
        parser.error("--size 7b is for the suite gpu")
    suite = SUITES[options.suite](options)
    chosen = options.only.split(",") if options.only else list(suite)
    if unknown := set(chosen) - set(suite):
        parser.error(f"--only: {', '.join(sorted(unknown))}: --suite {options.suite} has {', '.join(suite)}")
    use_cache()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    flat: dict[str, float] = {}
    for part in chosen:
        for table in suite[part]():
            print(f"{table}\n", flush=True)
            flat |= table.flat
    if options.json:
        options.json.write_text(json.dumps(flat, indent=1) + "\n")


if __name__ == "__main__":
    main()
