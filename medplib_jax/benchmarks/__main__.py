"""Side-by-side measurements.

    python -m medplib_jax.benchmarks --suite cpu --against torch --json cpu.json

cpu      a training step, a mixture beside one MLP, parts of the step, peak memory, start-up
bird     a training step of BiRD and its answers at batch 1
decode   time to the first token and tokens per second at batch 1 and 16, also with weights of 8 bits; answers in slots
gpu      the kernels beside the CPU's numbers, memory, stages IV and III at 7B's width with as many layers as fit
         (--layers), MFU, answers, mixture beside one MLP, parts, input at the steps' rate; needs one accelerator
tpu      bounds of stage IV at 7B on v5e, v5p and v6e by the TPU's compiler; needs libtpu, no TPU
data     whether the input keeps up with a rate (--rate); with --data also time per record beside a PyTorch DataLoader
convert  speed and memory of the conversion
retrieve exact search among 100,000 pictures beside NumPy

Prints a table after each part; `--json` writes their figures flat. `--against torch` measures a PyTorch program of the
same sizes in the same run. `--only moe,memory` measures these parts of a suite. With `--budget SECONDS` it ends when
the time is up: parts come in the order of their worth, and what is not measured by then is named.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import psutil

from configs import bird_grit, common, stage3_grounding, stage4_moe
from convert import benchmark
from convert.to_torch import original_tensors
from medplib_jax.benchmarks import (
    accelerator,
    data_pipeline,
    decoding,
    feeding,
    grouped,
    kernels,
    memory,
    parts,
    retrieval,
    roofline,
    slots,
    startup,
    training,
    workload,
)
from medplib_jax.benchmarks.measure import Table
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.data.splits import annotation_files
from medplib_jax.parallel.compilation import use_cache

log = logging.getLogger("medplib_jax.benchmarks")

# Each suite says which parts it has, those first that matter most: {name: what measures it}.
Parts = dict[str, Callable[[], Iterable[Table]]]

RECIPES = {"IV": stage4_moe.large, "III": stage3_grounding.large}
SLOTS_PROMPT, SLOTS_REQUESTS = 96, 96  # positions of a prompt, 64 of them of the picture; prompts


def rival(options: argparse.Namespace) -> workload.Rival | None:
    if not options.against:
        return None
    device = options.device if options.suite == "gpu" else "cpu"
    return workload.Rival(original_tensors, device, compiled=not options.no_compile)


def experiment(options: argparse.Namespace, rows: int, stage: str = "IV") -> ExperimentConfig:
    return workload.experiment(RECIPES[stage](), workload.model(options.size, options.layers), rows)


def cpu(options: argparse.Namespace) -> Parts:
    config, rounds = experiment(options, options.batch or 2), options.rounds
    return {
        "train_step": lambda: [training.compare(config, rival(options), rounds)],
        "moe": lambda: [training.moe_over_dense(config, rounds)],
        "parts": lambda: [parts.measure(config, rounds)],
        "memory": lambda: [memory.compare(config, rival(options))],
        "startup": lambda: [startup.measure()],
    }


def decode(options: argparse.Namespace) -> Parts:
    def answers(rows: int) -> list[Table]:
        config = workload.merged(experiment(options, rows))
        return decoding.compare(config, rival(options), options.rounds, options.new_tokens)

    def in_slots() -> list[Table]:
        config = workload.merged(workload.experiment(RECIPES["IV"](), common.TINY, SLOTS_REQUESTS))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, bucket_lengths=(SLOTS_PROMPT,)))
        return [slots.measure(config, options.rounds)]

    sizes = (options.batch,) if options.batch else (1, 16)
    return {f"batch_{rows}": functools.partial(answers, rows) for rows in sizes} | {"slots": in_slots}


def bird(options: argparse.Namespace) -> Parts:
    def config(rows: int) -> ExperimentConfig:
        return workload.bird_experiment(bird_grit.large(), options.size, rows)

    other, rounds = rival(options), options.rounds
    return {
        "train_step": lambda: [training.compare(config(options.batch or 2), other, rounds, "bird_step")],
        "batch_1": lambda: decoding.compare(config(1), other, rounds, options.new_tokens),
    }


def gpu(options: argparse.Namespace) -> Parts:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs its share of the memory
    rows, rounds = options.batch or 8, options.rounds
    config, other = experiment(options, rows), rival(options)
    measured: dict[str, float] = {}

    def step(stage: str, other: workload.Rival | None) -> Iterator[Table]:
        table = accelerator.training_step(experiment(options, rows, stage), stage, other, rounds)
        measured[stage] = rows / table.flat[f"train_step.stage_{stage}.ours.seconds"]
        yield table

    def answers(rows: int, other: workload.Rival | None) -> list[Table]:
        config = workload.merged(experiment(options, rows))
        return accelerator.answers(config, other, rounds, options.new_tokens)

    def keeps_up() -> list[Table]:
        """The input at the fastest of the rates that the steps have reached."""
        return [_input(options, max(measured.values(), default=options.rate))]

    found: Parts = {
        "kernels": lambda: [kernels.measure()],
        "memory": lambda: [memory.compare(config, other)],  # early: it has the device for itself
        "rates": lambda: [accelerator.machine_rates(config.model.llm.hidden_size)],
        **{f"stage_{stage}": functools.partial(step, stage, None) for stage in RECIPES},
        **{f"decode_{rows}": functools.partial(answers, rows, None) for rows in (1, 16)},
        "grouped": lambda: [grouped.measure(config.model.llm, rows * config.data.bucket_lengths[-1])],
        "moe": lambda: [training.moe_over_dense(config, rounds)],
        "parts": lambda: [parts.measure(config, rounds)],
        "input": keeps_up,
    }
    if other:
        found |= {f"stage_{stage}_torch": functools.partial(step, stage, other) for stage in RECIPES}
        found |= {f"decode_{rows}_torch": functools.partial(answers, rows, other) for rows in (1, 16)}
    return found


def tpu(options: argparse.Namespace) -> Parts:
    return {"roofline": lambda: [roofline.measure(RECIPES["IV"]())]}


def data(options: argparse.Namespace) -> Parts:
    def records() -> list[Table]:
        sources, _ = annotation_files(options.data)
        config = data_pipeline.config(tuple(sources), options.data, options.tokenizer)
        return [data_pipeline.measure(config, options.rounds)]

    found: Parts = {"input": lambda: [_input(options, options.rate)]}
    return found | ({"records": records} if options.data else {})


def _input(options: argparse.Namespace, rate: float) -> Table:
    return feeding.measure(RECIPES["IV"]().data.bucket_lengths, rate, options.workers, options.seconds)


def retrieve(options: argparse.Namespace) -> Parts:
    return {"search": lambda: [retrieval.measure(options.rounds)]}


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


SUITES = {suite.__name__: suite for suite in (cpu, bird, decode, gpu, tpu, data, convert, retrieve)}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medplib_jax.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--against", choices=("torch",))
    parser.add_argument("--only", metavar="PART,...", help="parts of the suite, by default all")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="end when this time is up")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved runs, of which the median counts")
    parser.add_argument("--size", choices=workload.SIZES, help="default: small, 7b for gpu")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (gpu, convert)")
    parser.add_argument("--batch", type=int, help="rows (cpu, bird: 2, gpu: 8, decode: 1 and 16)")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    parser.add_argument("--device", default="cuda", help="where PyTorch runs in the suite gpu")
    parser.add_argument("--rate", type=float, default=64.0, help="rows per second that training takes (data)")
    parser.add_argument("--workers", type=int, default=8, help="worker processes (data)")
    parser.add_argument("--data", help="folder of annotation files in MeCoVQA's form")
    parser.add_argument("--tokenizer", help="for --data")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long the input is watched (data)")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of a command line.

    Exits with one line for what does not go together, and for the suite gpu on a machine without an accelerator.
    """
    parser = make_parser()
    options = parser.parse_args(argv)
    options.size = options.size or ("7b" if options.suite == "gpu" else "small")
    if options.data and not options.tokenizer:
        parser.error("--data needs --tokenizer")
    if options.size == "7b" and options.suite != "gpu":
        parser.error("--size 7b is for the suite gpu")
    if (options.against or options.data) and importlib.util.find_spec("torch") is None:
        parser.error("--against torch and --data need PyTorch: pip install -e '.[torch]' in the repository's root")
    small = options.device == "cpu" and options.size == "tiny"
    if options.suite == "gpu" and not small and jax.default_backend() == "cpu":
        parser.error(
            "--suite gpu needs an accelerator, and JAX finds none here (with one, install the extra gpu or tpu);"
            " to try the suite out on a CPU, add --device cpu --size tiny"
        )
    return options


def end_after(seconds: float, pending: list[str]) -> threading.Timer:
    """Ends this process when the time is up, even inside a compiler.

    What was measured has been printed and written by then.
    """

    def end() -> None:
        print(f"{seconds:g} s are over; not measured: {', '.join(pending)}", file=sys.stderr, flush=True)
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    suite = SUITES[options.suite](options)
    pending = options.only.split(",") if options.only else list(suite)
    if unknown := set(pending) - set(suite):
        sys.exit(f"--only: {', '.join(sorted(unknown))}: --suite {options.suite} has {', '.join(suite)}")
    timer = end_after(options.budget, pending) if options.budget else None
    use_cache()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    flat: dict[str, float] = {}
    failed = []
    while pending:
        try:
            for table in suite[pending[0]]():
                print(f"{table}\n", flush=True)
                flat |= table.flat
        except Exception as error:  # the other parts are measured all the same
            log.error("%s failed", pending[0], exc_info=not isinstance(error, ModuleNotFoundError))
            failed.append(f"{pending[0]}: {error}")
        if options.json:
            options.json.write_text(json.dumps(flat, indent=1) + "\n")
        pending.pop(0)
    if timer:
        timer.cancel()
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
