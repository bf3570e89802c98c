"""A checkpoint with weights of 8 bits, written once: half the size of one in bfloat16, and quicker to start.

python -m convert.quantize --checkpoint WORKDIR --out WORKDIR

It answers as the first one does with `--quantize int8`, and predict, serve and evaluate take it as any other. Adapters
are merged. It cannot be trained further. Parameters are read, quantised and written a layer at a time.
"""

import argparse
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Sequence

import absl.logging
import jax
import numpy as np

from medplib_jax.batch import Params, flatten
from medplib_jax.checkpoint import check_arrays
from medplib_jax.config.model import LoraConfig
from medplib_jax.decode.layout import check_parts
from medplib_jax.decode.saved_params import SavedArray, SavedParams, open_params
from medplib_jax.models.families import build_model
from medplib_jax.models.language.lora import merge_lora
from medplib_jax.models.layers import abstract_module, params_of
from medplib_jax.models.quantize import quantize_kernel, quantize_module
from medplib_jax.parallel.quiet import ignore_missing_tpu

from . import orbax_stream, vocabulary
from .from_torch import staged, write_checkpoint

ADAPTER = ("lora_a", "lora_b")
SOURCES = ("kernel", *ADAPTER)  # what a kernel of 8 bits is made of


def quantize(checkpoint: pathlib.Path, out: pathlib.Path) -> None:
    """Writes step 0 of the workdir `out`.

    FileNotFoundError without a checkpoint, ValueError for one that is damaged, of another model or of 8 bits already;
    then nothing is left behind.
    """
    saved = open_params(checkpoint)
    if saved.quantize:
        raise ValueError(f"{saved.folder}: its weights have 8 bits already")
    experiment = saved.experiment
    model = dataclasses.replace(experiment.model, lora=LoraConfig())
    data = dataclasses.replace(experiment.data, tokenizer=str(out.absolute() / "tokenizer"))
    module = abstract_module(functools.partial(build_model, model))
    check_parts(saved.tree, params_of(module))
    merged = {path: array for path, array in flatten(saved.tree).items() if not path.endswith(ADAPTER)}
    check_arrays(saved.folder, merged, flatten(params_of(module)))
    like = params_of(quantize_module(module))
    with staged(out) as folder:
        vocabulary.copy_tokenizer(pathlib.Path(saved.tokenizer), folder / "tokenizer")
        write_checkpoint(folder, dataclasses.replace(experiment, model=model, data=data), quantized(saved, like))
        saved.check()


def quantized(saved: SavedParams, like: Params) -> dict[str, orbax_stream.Streamed]:
    """What is written, by path. `like`: the model's parameters of 8 bits."""
    arrays, expected = flatten(saved.tree), flatten(like)
    made = {}
    for path, leaf in expected.items():
        module, _, name = path.rpartition("/")
        if f"{module}/kernel_scale" in expected and name.startswith("kernel"):
            sources = {name: arrays[f"{module}/{name}"] for name in SOURCES if f"{module}/{name}" in arrays}
            read, source = functools.partial(_quantized, sources, saved.experiment.model.lora, name), sources["kernel"]
            stack, dtype = leaf.shape[: len(source.shape) - 2], leaf.dtype
        else:
            source = arrays[path]
            read, stack, dtype = source.__getitem__, (), source.dtype
        made[path] = _streamed(leaf.shape, np.dtype(dtype), stack, read)
    return made


def _streamed(
    shape: tuple[int, ...], dtype: np.dtype, stack: tuple[int, ...], read: Callable[[tuple[int, ...]], np.ndarray]
) -> orbax_stream.Streamed:
    """An array that is made in one slab for each index on its leading axes `stack`."""
    chunk = orbax_stream.chunk_shape(shape, len(stack), (1,) * len(shape), dtype.itemsize)
    return orbax_stream.Streamed(shape, dtype, chunk, [(i, functools.partial(read, i)) for i in np.ndindex(stack)])


def _quantized(sources: dict[str, SavedArray], lora: LoraConfig, name: str, index: tuple[int, ...]) -> np.ndarray:
    """A kernel at `index`, or its scale. The file is read for each of them."""
    module = merge_lora({name: array[index] for name, array in sources.items()}, lora)
    kernel, scale = quantize_kernel(module["kernel"])
    return kernel if name == "kernel" else scale


def main(argv: Sequence[str] | None = None) -> None:
    ignore_missing_tpu()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=pathlib.Path, help="workdir, or its checkpoints/STEP")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="workdir to create")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax's remarks
    jax.config.update("jax_platforms", "cpu")  # nothing to compute; leave accelerators to those who do
    try:
        quantize(arguments.checkpoint, arguments.out)
    except (OSError, ValueError) as error:
        raise SystemExit(f"quantize: {error}") from error
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
