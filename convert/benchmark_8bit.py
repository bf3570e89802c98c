"""What it takes to ask MedPLIB-7B on a small machine, in weights of 8 bits: a synthetic checkpoint of its width.

python -m convert.benchmark_8bit --folder DIR [--layers 4]

Writes a checkpoint in bfloat16 with that many decoder layers (32: 23 GB, and twice that on disk for a while), asks it
with `quantize="int8"`, writes it in 8 bits, asks that, and removes everything again. Each in a process of its own.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from medplib_jax.batch import Params
from medplib_jax.decode.predictor import Predictor, read_question
from medplib_jax.models.quantize import num_bytes
from medplib_jax.parallel.compilation import use_cache

from .benchmark import MAXRSS_BYTES, settle, write_source

COLUMNS = (
    *("", "GB on disk", "reading it, s", "until it is loaded, s", "over reading", "peak GB"),
    *("prompt, s (positions)", "s per token", "of reading its weights"),
)
TOKENS = 16


def ask(checkpoint: str, quantize: str) -> None:
    """Loads a checkpoint, answers, and prints the seconds as JSON; those of a second time, when all is compiled.

    `share`: of the speed at which this machine reads memory, that of a token's weights.
    """
    use_cache()
    began = time.monotonic()
    predictor = Predictor(checkpoint, quantize=quantize, max_new_tokens=TOKENS)
    found = {"loaded": time.monotonic() - began}
    picture, prompt = predictor.prompt(read_question(np.full((336, 336, 3), 127, np.uint8), "What is it?"))
    predictor.answer(picture, prompt)
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES
    generator, limits, place = predictor.generator, np.full(1, TOKENS, np.int32), np.zeros((1, 1), np.int32)
    for _ in range(2):
        began = time.monotonic()
        slots = jax.block_until_ready(generator.start(None, prompt, limits, None, place, 1))
        found["prefill"] = time.monotonic() - began
        began = time.monotonic()
        slots, *_ = jax.block_until_ready(generator.advance(slots, keep=0))
        found["token"] = (time.monotonic() - began) / max(1, int(slots.lengths[0]))
    found["share"] = bytes_per_token(predictor.params["llm"]) / found["token"] / reading_rate()
    print(json.dumps(found | {"positions": prompt.tokens.shape[1]}))


def bytes_per_token(llm: Params) -> int:
    """Of the weights that a token reads: all but the embeddings and the experts that it does not go to."""
    experts = sum(num_bytes(layer["experts"]) for layer in llm["moe"].values())
    count = len(next(iter(llm["moe"].values()))["experts"]["each"])
    return num_bytes(llm) - num_bytes(llm["embed"]) - experts * (count - 1) // count


def reading_rate() -> float:
    """Bytes per second that all cores read together."""
    parts = np.ones((os.cpu_count(), 1 << 26))
    seconds = []
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(3):
            began = time.monotonic()
            list(pool.map(np.sum, parts))
            seconds.append(time.monotonic() - began)
    return parts.nbytes / min(seconds)


def measure(checkpoint: pathlib.Path, quantize: str) -> dict[str, float]:
    """What `ask` says, with `disk` in bytes and `read`, the seconds that reading its files takes."""
    files = [path for path in (checkpoint / "checkpoints").rglob("*") if path.is_file()]
    for path in files:
        settle(path, forget=True)
    began = time.monotonic()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    found = {"read": time.monotonic() - began, "disk": sum(path.stat().st_size for path in files)}
    for path in files:
        settle(path, forget=True)
    command = [sys.executable, "-m", __spec__.name, "--ask", str(checkpoint), "--quantize", quantize]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return found | json.loads(said.splitlines()[-1])


def row(name: str, found: dict[str, float]) -> tuple[str, ...]:
    """As COLUMNS says."""
    return (
        name,
        f"{found['disk'] / 1e9:.1f}",
        f"{found['read']:.1f}",
        f"{found['loaded']:.1f}",
        f"{found['loaded'] / found['read']:.1f}",
        f"{found['peak'] / 1e9:.2f}",
        f"{found['prefill']:.1f} ({found['positions']})",
        f"{found['token']:.2f}",
        f"{found['share']:.0%}",
    )


def compare(work: pathlib.Path, layers: int) -> list[tuple[str, ...]]:
    """Works below `work`, which must not exist yet and is removed again; returns rows of COLUMNS."""
    work.mkdir(parents=True)
    run, rows = (sys.executable, "-m"), []
    try:
        source, whole, small = (work / name for name in ("source", "whole", "small"))
        write_source(source, layers, "medplib")
        subprocess.run(
            [*run, f"{__package__}.from_torch", "--source", str(source), "--out", str(whole)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        shutil.rmtree(source)
        rows.append(row("bfloat16, quantised while it is read", measure(whole, "int8")))
        began = time.monotonic()
        subprocess.run([*run, f"{__package__}.quantize", "--checkpoint", str(whole), "--out", str(small)], check=True)
        print(f"written in 8 bits in {time.monotonic() - began:.0f} s")
        shutil.rmtree(whole)
        rows.append(row("written in 8 bits before", measure(small, "")))
        return rows
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, help="where to work; it must not exist yet")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    parser.add_argument("--quantize", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.ask:
        return ask(arguments.ask, arguments.quantize)
    if not arguments.folder:
        parser.error("expected --folder")
    for cells in (COLUMNS, ("---",) * len(COLUMNS), *compare(arguments.folder, arguments.layers)):
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
