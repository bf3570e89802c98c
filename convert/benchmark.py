"""How long conversion takes and how much memory: a synthetic checkpoint of MedPLIB-7B's width, or of BiRD's, there and
back, beside a plain copy.

python -m convert.benchmark --folder DIR [--layers 4] [--family medplib|bird]

Writes bfloat16 tensors of every name and shape of the model with that many decoder layers (32: 23 GB, of BiRD 19 GB,
and twice that on disk at most), converts in processes of their own, compares every tensor of the result with the
source, and removes everything again."""

import argparse
import base64
import dataclasses
import itertools
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import time
import zlib

import ml_dtypes
import numpy as np

from medplib_jax.batch import flatten
from medplib_jax.config.model import LlmConfig, ModelConfig, MoeConfig, QwenVisionConfig
from medplib_jax.data.qwen_tokenizer import QwenTokenizer
from medplib_jax.data.tokenizers import train_tokenizer
from medplib_jax.datasets.train_ranks import BYTES
from medplib_jax.models.layers import params_of

from . import from_torch, hf_config, mapping, qwen_vl, torch_files

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHARD_BYTES = 5 << 30
QWEN_RANKS = 151_643
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss


def synthetic(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random finite bits of a seed that is the tensor's name."""
    random = np.random.Generator(np.random.SFC64(zlib.crc32(key.encode())))
    return (random.integers(0, 1 << 16, shape, np.uint16) & np.uint16(0xBFFF)).view(
        BFLOAT16
    )  # a clear exponent bit: below 2, finite


def medplib_source(folder: pathlib.Path, layers: int) -> ModelConfig:
    """Writes tokenizer and config.json; returns the model's sizes."""
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog"], str(folder), 290)
    config = ModelConfig(
        llm=LlmConfig(num_layers=layers, vocab_size=tokenizer.vocab_size), moe=MoeConfig(num_experts=2)
    )
    (folder / "config.json").write_text(json.dumps(hf_config.model_json(config, {}, BFLOAT16)))
    return config


def bird_source(folder: pathlib.Path, layers: int) -> ModelConfig:
    """`medplib_source` of BiRD, whose ViT has half as many layers again, with as many ranks as Qwen's vocabulary."""
    letters = [bytes([byte]) for byte in BYTES]
    words = itertools.chain(letters, map(b"".join, itertools.product(letters, repeat=2)))
    words = itertools.chain(words, map(b"".join, itertools.product(letters, repeat=3)))
    ranks = (base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(itertools.islice(words, QWEN_RANKS)))
    tokenizer = QwenTokenizer(b"".join(ranks))
    tokenizer.save(str(folder))
    vocab_size = tokenizer.vocab_size
    llm = LlmConfig(num_layers=layers, vocab_size=vocab_size, fused_qkv=True, trained_length=2048, rms_norm_eps=1e-6)
    config = ModelConfig(family="bird", llm=llm, vit=QwenVisionConfig(num_layers=layers * 3 // 2))
    described = qwen_vl.model_json(config, {}, BFLOAT16, tokenizer.image_ids[0], {})
    (folder / "config.json").write_text(json.dumps(described))
    return config


FAMILIES = {"medplib": medplib_source, "bird": bird_source}


def write_source(folder: pathlib.Path, layers: int, family: str) -> tuple[int, int]:
    """A source folder; returns the bytes of its weights, and of the largest parameter that they are stacked to."""
    folder.mkdir(parents=True)
    config = FAMILIES[family](folder, layers)
    shapes = {path: leaf.shape for path, leaf in flatten(params_of(from_torch.model_shapes(config))).items()}
    planned = []
    for key, place in mapping.entries(config, shapes).items():
        shape = place.torch_shape(shapes[place.path])
        planned.append(torch_files.Planned(key, shape, BFLOAT16, lambda key=key, shape=shape: synthetic(key, shape)))
    torch_files.write_shards(folder, planned, "safetensors", SHARD_BYTES)
    largest = max(math.prod(shape) for shape in shapes.values()) * BFLOAT16.itemsize
    return sum(tensor.nbytes for tensor in planned), largest


@dataclasses.dataclass(frozen=True)
class Measured:
    seconds: float
    cpu_seconds: float
    peak_gb: float


def measure(source: pathlib.Path, out: pathlib.Path, *command: str) -> Measured:
    """Runs a command that reads `source`, not in memory before, and writes `out`, on the disk afterwards."""
    for path in source.rglob("*"):
        if path.is_file():
            settle(path, forget=True)
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    for path in out.rglob("*"):
        if path.is_file():
            settle(path)
    return Measured(time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * MAXRSS_BYTES / 1e9)


def settle(path: pathlib.Path, forget: bool = False) -> None:
    """Waits until a file is on the disk; `forget`: and drops it from memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if forget and hasattr(os, "posix_fadvise"):  # macOS does not have it
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def count_changed(folder: pathlib.Path) -> int:
    """How many tensors of `folder` differ from what `write_source` wrote."""
    tensors = {name: tensor for name, tensor in torch_files.read_folder(folder).items() if not mapping.ignored(name)}
    return sum(tensor.read().tobytes() != synthetic(name, tensor.shape).tobytes() for name, tensor in tensors.items())


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`results`: of a copy, of the way there and back. `changed`: tensors that came back different."""

    layers: int
    gigabytes: float
    largest_gigabytes: float  # of the parameters, layers stacked
    changed: int
    results: dict[str, Measured]

    @property
    def title(self) -> str:
        largest = f"largest stacked parameter {self.largest_gigabytes:.2f} GB"
        stored = f"{self.layers} layers, {self.gigabytes:.1f} GB, {largest}"
        return f"{stored}; {self.changed} tensors changed"

    def rows(self) -> list[tuple[str, ...]]:
        """As COLUMNS says."""
        copied = self.results["copy"].seconds
        return [
            (
                name,
                f"{one.seconds:.0f}",
                f"{one.cpu_seconds:.0f}",
                f"{self.gigabytes / one.seconds:.2f}",
                f"{copied / one.seconds:.2f}",
                f"{one.peak_gb:.2f}",
            )
            for name, one in self.results.items()
        ]


COLUMNS = ("", "seconds", "of them on a CPU", "GB/s", "speed of the copy", "peak GB")


def compare(work: pathlib.Path, layers: int, family: str = "medplib") -> Comparison:
    """Converts there and back below `work`, which must not exist yet and is removed again."""
    python = (sys.executable, "-m")
    work.mkdir(parents=True)
    try:
        source, copy, jax, back = (work / name for name in ("source", "copy", "jax", "torch"))
        nbytes, largest = write_source(source, layers, family)
        results = {"copy": measure(source, copy, "cp", "-r", str(source), str(copy))}
        shutil.rmtree(copy)
        results["from_torch"] = measure(
            source, jax, *python, f"{__package__}.from_torch", "--source", str(source), "--out", str(jax)
        )
        shutil.rmtree(source)
        results["to_torch"] = measure(
            jax, back, *python, f"{__package__}.to_torch", "--checkpoint", str(jax), "--out", str(back)
        )
        return Comparison(layers, nbytes / 1e9, largest / 1e9, count_changed(back), results)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, type=pathlib.Path, help="where to work; it must not exist yet")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--family", choices=FAMILIES, default="medplib")
    arguments = parser.parse_args()
    found = compare(arguments.folder, arguments.layers, arguments.family)
    print(found.title)
    for row in (COLUMNS, ("---",) * len(COLUMNS), *found.rows()):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
