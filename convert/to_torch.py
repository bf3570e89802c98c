"""Weights out: a folder that the PyTorch original loads without edits.

python -m convert.to_torch --checkpoint WORKDIR --out DIR [--format safetensors] [--layout merged]

`merged` adds the adapters into their kernels (a released model); `lora` keeps them apart under PEFT's names (a training
checkpoint)."""

import argparse
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import absl.logging
import jax
import numpy as np

from convert import hf_config, mapping, orbax_stream, torch_files
from convert.from_torch import SIDE_FOLDER, staged
from medplib_jax import checkpoint
from medplib_jax.batch import combine, flatten
from medplib_jax.config.model import ModelConfig

SHARD_BYTES = 2 << 30
LAYOUTS = ("merged", "lora")


@dataclasses.dataclass(frozen=True)
class Stored:
    """A checkpoint that is open but not read: path -> TensorStore."""

    config: ModelConfig
    arrays: dict
    tokenizer: pathlib.Path

    def dtype(self, path: str) -> np.dtype:
        return self.arrays[path].dtype.numpy_dtype


def open_checkpoint(workdir: pathlib.Path) -> Stored:
    """The newest complete step of `workdir`. FileNotFoundError when there is none."""
    if not (workdir / checkpoint.FOLDER).is_dir():
        raise FileNotFoundError(f"--checkpoint {workdir}: expected a workdir with a {checkpoint.FOLDER!r} folder")
    with checkpoint.make_manager(str(workdir), read_only=True) as manager:
        step = checkpoint.latest_step(manager)
        if step is None:
            raise FileNotFoundError(f"--checkpoint {workdir}: it has no complete step")
        experiment, _ = checkpoint.read_experiment(manager, step)
    folder = workdir.absolute() / checkpoint.FOLDER / str(step)
    parts = orbax_stream.open_arrays(folder / "state", ("trainable", "frozen"))
    return Stored(experiment.model, flatten(combine(parts["trainable"], parts["frozen"])), folder / "tokenizer")


def convert(
    workdir: pathlib.Path,
    out: pathlib.Path,
    file_format: str = "safetensors",
    layout: str = "merged",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `out`. Raises FileNotFoundError without a checkpoint, ValueError when a parameter has no PyTorch name or
    is not finite; then nothing is left behind."""
    stored = open_checkpoint(workdir)
    with staged(out) as folder:
        torch_files.write_shards(folder, planned(stored, layout), file_format, shard_bytes)
        if "llm/embed/embedding" in stored.arrays:
            hf_config.write_files(
                folder, stored.config, workdir / SIDE_FOLDER, stored.tokenizer, stored.dtype("llm/embed/embedding")
            )


def planned(stored: Stored, layout: str) -> Iterator[torch_files.Planned]:
    """Every PyTorch tensor of the checkpoint, in the table's order."""
    shapes = {path: store.shape for path, store in stored.arrays.items()}
    for key, entry in mapping.entries(stored.config, shapes).items():
        adapted = entry.path.endswith("/kernel") and entry.path.removesuffix("kernel") + "lora_a" in shapes
        if layout == "merged" and entry.path.endswith(("/lora_a", "/lora_b")):
            continue
        name = mapping.unmerged_name(key, adapted) if layout == "lora" else key
        shape = entry.torch_shape(shapes[entry.path])
        yield torch_files.Planned(
            name, shape, stored.dtype(entry.path), _maker(stored, entry, name, adapted and layout == "merged")
        )
    if "llm/embed/embedding" in shapes:
        yield from rotary_buffers(stored, layout)


def _maker(stored: Stored, entry: mapping.Entry, name: str, merge: bool):
    def make() -> np.ndarray:
        values = _read(stored, entry.path, entry.index)
        if merge:
            side = entry.path.removesuffix("kernel")
            low, high = (
                _read(stored, side + factor, entry.index).astype(np.float32) for factor in ("lora_a", "lora_b")
            )
            values = (values.astype(np.float32) + stored.config.lora.scale * (low @ high)).astype(values.dtype)
        torch_files.check_finite(name, stored.tokenizer.parent, values)
        return entry.layout.to_torch(values)

    return make


def _read(stored: Stored, path: str, index: tuple[int, ...]) -> np.ndarray:
    return np.ascontiguousarray(stored.arrays[path][index].read().result())


def rotary_buffers(stored: Stored, layout: str) -> Iterator[torch_files.Planned]:
    """LLaMA's `inv_freq`, which transformers 4.31 keeps in checkpoints although rope_theta decides it."""
    llm = stored.config.llm
    exponent = np.arange(0, llm.head_dim, 2, dtype=np.float32) / np.float32(llm.head_dim)
    values = (1 / np.float32(llm.rope_theta) ** exponent).astype(stored.dtype("llm/embed/embedding"))
    for layer in range(llm.num_layers):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        yield torch_files.Planned(
            mapping.unmerged_name(name, False) if layout == "lora" else name, values.shape, values.dtype, lambda: values
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, type=pathlib.Path, help="workdir of a training run or a conversion"
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder to create")
    parser.add_argument("--format", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("--layout", choices=LAYOUTS, default="merged")
    arguments = parser.parse_args(argv)
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax's remarks
    jax.config.update("jax_platforms", "cpu")  # nothing to compute; leave accelerators to those who do
    convert(arguments.checkpoint, arguments.out, arguments.format, arguments.layout)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
