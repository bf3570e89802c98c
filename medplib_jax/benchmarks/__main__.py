"""Side-by-side measurements.

    python -m medplib_jax.benchmarks --suite cpu --against torch --json cpu.json

cpu      a training step, a mixture beside one MLP, parts of the step, peak memory, start-up
decode   time to the first token and tokens per second, batch 1 and 16, also with weights of 8 bits
gpu      stage IV and III at 7B's width with as many layers as fit (--layers), MFU, parts, answers; needs one accelerator
tpu      bounds of stage IV at 7B on v5e, v5p and v6e by the TPU's compiler; needs libtpu, no TPU
data     whether the input keeps up with a rate (--rate); with --data also time per record beside a PyTorch DataLoader
convert  speed and memory of the conversion

Prints tables; `--json` writes their figures flat. `--against torch` measures a PyTorch program of the same sizes in the same run.
README.md beside this file has what came out and how.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from medplib_jax.benchmarks import accelerator, data_pipeline, decoding, feeding, memory, parts, roofline, startup, training, workload
from medplib_jax.benchmarks.measure import Table
from medplib_jax.compilation import use_cache


def cpu(options: argparse.Namespace) -> Iterator[Table]:
    config = workload.experiment(workload.MODELS[options.size], options.batch or 2)
    yield training.compare(config, _peers(options), options.rounds)
    yield training.moe_over_dense(config, options.rounds)
    yield parts.measure(config, options.rounds)
    yield memory.compare(options.size, options.against == "torch")
    yield startup.measure()


def decode(options: argparse.Namespace) -> Iterator[Table]:
    for rows in (options.batch,) if options.batch else (1, 16):
        config = workload.merged(workload.experiment(workload.MODELS[options.size], rows))
        yield from decoding.compare(config, options.against == "torch", options.rounds, options.new_tokens)


def gpu(options: argparse.Namespace) -> Iterator[Table]:
    model = workload.wide(options.layers) if options.size == "7b" else workload.MODELS[options.size]
    yield from accelerator.measure(model, options.batch or 8, options.against == "torch", options.rounds, options.new_tokens, options.device)


def tpu(options: argparse.Namespace) -> Iterator[Table]:
    yield roofline.measure()


def data(options: argparse.Namespace) -> Iterator[Table]:
    yield feeding.measure(options.rate, options.workers, options.seconds)
    if options.data:
        times = data_pipeline.compare(data_pipeline.config(str(options.data), str(options.tokenizer)), options.rounds)
        rows = [(name, f"{value:.2f}", f"{times['PyTorch DataLoader'] / value:.1f}") for name, value in times.items()]
        flat = {f"data.{name.replace(' ', '_').replace(',', '')}.ms": value for name, value in times.items()}
        yield Table("Reading records", ("", "ms per record and core", "times PyTorch's rate"), rows, flat)


def convert(options: argparse.Namespace) -> Iterator[Table]:
    with tempfile.TemporaryDirectory() as folder:
        command = (sys.executable, "-m", "convert.benchmark", "--folder", str(Path(folder) / "work"), "--layers", str(options.layers))
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    yield from ()


SUITES = {suite.__name__: suite for suite in (cpu, decode, gpu, tpu, data, convert)}


def _peers(options: argparse.Namespace) -> tuple[str, ...]:
    return (("torch eager",) if options.no_compile else ("torch eager", "torch compile")) if options.against == "torch" else ()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="medplib_jax.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--against", choices=("torch",))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved runs, of which the median counts")
    parser.add_argument("--size", choices=(*workload.MODELS, "7b"), help="default: small, 7b for gpu")
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
    use_cache()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    flat: dict[str, float] = {}
    for table in SUITES[options.suite](options):
        print(f"{table}\n", flush=True)
        flat |= table.flat
    if options.json:
        options.json.write_text(json.dumps(flat, indent=1) + "\n")


if __name__ == "__main__":
    main()
