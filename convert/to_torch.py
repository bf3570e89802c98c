"""Weights out: a folder that the PyTorch original loads without edits, or PEFT adapters beside their base.

python -m convert.to_torch --checkpoint WORKDIR[/checkpoints/STEP] --out DIR [--layout merged] [--dtype bf16]

`merged` adds the adapters into their kernels (a released model). `lora` keeps both under the names of the original's
training checkpoints. `peft` writes what `PeftModel.from_pretrained` loads, and the model without adapters in DIR/base.
`hf_llava` writes what transformers' `LlavaForConditionalGeneration` loads.
"""

import argparse
import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence

import absl.logging
import jax
import numpy as np

from medplib_jax import checkpoint
from medplib_jax.batch import Params, flatten
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.config.model import LoraConfig, ModelConfig
from medplib_jax.decode.saved_params import SavedArray, SavedParams, open_params
from medplib_jax.parallel.quiet import ignore_missing_tpu

from . import hf_config, hf_llava, mapping, torch_files, vocabulary
from .from_torch import DTYPES, SIDE_FOLDER, staged

log = logging.getLogger(__name__)

SHARD_BYTES = 2 << 30
LAYOUTS = ("merged", "lora", "peft", "hf_llava")
BASE_FOLDER = "base"  # of the layout `peft`
EMBEDDING = "llm/embed/embedding"


@dataclasses.dataclass(frozen=True)
class Stored:
    """A checkpoint that is open but not read."""

    saved: SavedParams

    @functools.cached_property
    def arrays(self) -> dict[str, SavedArray]:
        """By path."""
        return flatten(self.saved.tree)

    @property
    def experiment(self) -> ExperimentConfig:
        return self.saved.experiment

    @property
    def folder(self) -> pathlib.Path:
        """Of the step."""
        return pathlib.Path(self.saved.folder)

    @property
    def config(self) -> ModelConfig:
        return self.experiment.model

    @property
    def tokenizer(self) -> pathlib.Path:
        return self.folder / "tokenizer"

    @property
    def parts(self) -> set[str]:
        return {path.split("/")[0] for path in self.arrays}

    def dtype(self, path: str) -> np.dtype:
        return self.arrays[path].dtype

    def adapted(self, path: str) -> bool:
        return path.endswith("/kernel") and path.removesuffix("kernel") + "lora_a" in self.arrays


def original_tensors(config: ModelConfig, params: Params) -> Iterator[tuple[str, str, np.ndarray]]:
    """(name in the original's files, path in our tree, values) of every parameter."""
    flat = flatten(params)
    for name, place in mapping.entries(config, flat).items():
        yield name, place.path, np.array(place.layout.to_torch(np.asarray(flat[place.path])[place.index]))


def open_checkpoint(path: pathlib.Path) -> Stored:
    """The step that a path names: WORKDIR/checkpoints/STEP, or the newest of WORKDIR. FileNotFoundError without one."""
    stored = Stored(open_params(path))
    checkpoint.refuse_quantized(stored.saved.folder, stored.arrays)
    return stored


def convert(
    checkpoint_path: pathlib.Path,
    out: pathlib.Path,
    file_format: str = "safetensors",
    layout: str = "merged",
    shard_bytes: int = SHARD_BYTES,
    dtype: str | None = None,
) -> None:
    """Writes `out`. Raises FileNotFoundError without a checkpoint, ValueError when a parameter is not what was saved,
    has no PyTorch name, is not finite or overflows `dtype`; then nothing is left behind."""
    stored = open_checkpoint(checkpoint_path)
    with staged(out) as folder:
        model = folder
        if layout == "peft":
            write_adapters(folder, stored, dtype)
            model = folder / BASE_FOLDER
            model.mkdir()
        tensors = planned_llava(stored, dtype) if layout == "hf_llava" else planned(stored, layout, dtype)
        torch_files.write_shards(model, tensors, file_format, shard_bytes)
        stored.saved.check()
        if EMBEDDING in stored.arrays:
            write_side_files(model, stored, layout, DTYPES[dtype] if dtype else stored.dtype(EMBEDDING))


def write_side_files(folder: pathlib.Path, stored: Stored, layout: str, dtype: np.dtype) -> None:
    """Everything around the weights of a language model."""
    own = hf_config.own_json(stored.experiment, stored.parts, adapters=layout == "lora")
    if layout == "hf_llava":
        vocabulary.copy_tokenizer(stored.tokenizer, folder)
        hf_llava.write_files(folder, stored.experiment, dtype, own)
    else:
        side = stored.folder.parent.parent / SIDE_FOLDER
        hf_config.write_files(folder, stored.config, side, stored.tokenizer, dtype, own)


def planned(stored: Stored, layout: str, dtype: str | None = None) -> Iterator[torch_files.Planned]:
    """Every PyTorch tensor of the model, in the table's order."""
    shapes = {path: store.shape for path, store in stored.arrays.items()}
    for key, entry in mapping.entries(stored.config, shapes).items():
        if layout != "lora" and entry.path.endswith(("/lora_a", "/lora_b")):
            continue
        adapted = stored.adapted(entry.path)
        name = mapping.unmerged_name(key, adapted) if layout == "lora" else key
        yield _planned(stored, entry, name, dtype, merge=adapted and layout == "merged")
    if EMBEDDING in shapes and stored.config.family == "medplib":
        yield from rotary_buffers(stored, layout, dtype)


def planned_llava(stored: Stored, dtype: str | None) -> Iterator[torch_files.Planned]:
    """The tensors of Hugging Face's LLaVA. ValueError when the model is none."""
    hf_llava.check_fits(stored.experiment, stored.parts)
    rows = hf_llava.rows_of(stored.config.llm.vocab_size)
    left_out = set()
    for key, entry in mapping.entries(stored.config, stored.arrays).items():
        name = hf_llava.name_of(key)
        if name is None:
            left_out.add(entry.path.split("/")[0])
        elif not entry.path.endswith(("/lora_a", "/lora_b")):
            yield _planned(stored, entry, name, dtype, merge=stored.adapted(entry.path), rows=rows)
    if left_out:
        log.info("left out, since this LLaVA has no place for them: %s", ", ".join(sorted(left_out)))


def _planned(
    stored: Stored, entry: mapping.Entry, name: str, dtype: str | None, merge: bool, rows: vocabulary.Rows | None = None
) -> torch_files.Planned:
    """One tensor, to be read when it is written. `rows`: how many its vocabulary axis is to have."""
    target = DTYPES[dtype] if dtype else stored.dtype(entry.path)

    def make() -> np.ndarray:
        values = _read(stored, entry.path, entry.index)
        if merge:
            side = entry.path.removesuffix("kernel")
            low, high = (
                _read(stored, side + factor, entry.index).astype(np.float32) for factor in ("lora_a", "lora_b")
            )
            values = values.astype(np.float32) + stored.config.lora.scale * (low @ high)
        values = torch_files.cast(name, stored.folder, values, target)
        return entry.layout.to_torch(rows.fill(entry.path, values) if rows else values)

    shape = stored.arrays[entry.path].shape
    shape = rows.shape(entry.path, shape) if rows else shape
    return torch_files.Planned(name, entry.torch_shape(shape), target, make)


def _read(stored: Stored, path: str, index: tuple[int, ...]) -> np.ndarray:
    return stored.arrays[path][index]


def rotary_buffers(stored: Stored, layout: str, dtype: str | None = None) -> Iterator[torch_files.Planned]:
    """LLaMA's `inv_freq`, which transformers 4.31 keeps in checkpoints although rope_theta decides it."""
    llm = stored.config.llm
    exponent = np.arange(0, llm.head_dim, 2, dtype=np.float32) / np.float32(llm.head_dim)
    target = DTYPES[dtype] if dtype else stored.dtype(EMBEDDING)
    values = (1 / np.float32(llm.rope_theta) ** exponent).astype(target)
    for layer in range(llm.num_layers):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        written = mapping.unmerged_name(name, False) if layout == "lora" else name
        yield torch_files.Planned(written, values.shape, values.dtype, _constant(values))


def _constant(values: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: values


def write_adapters(folder: pathlib.Path, stored: Stored, dtype: str | None) -> None:
    """adapter_model.safetensors and adapter_config.json in PEFT's own names. ValueError for a checkpoint without
    adapters."""
    entries = mapping.entries(stored.config, stored.arrays).items()
    adapters = {key: entry for key, entry in entries if entry.path.endswith(("/lora_a", "/lora_b"))}
    if not adapters:
        raise ValueError(f"{stored.folder}: it has no adapters; --layout peft writes a checkpoint that has some")
    tensors = [
        _planned(stored, entry, f"base_model.model.{key}", dtype, merge=False) for key, entry in adapters.items()
    ]
    torch_files.write_shards(folder, tensors, "safetensors", 1 << 60, stem="adapter_model")
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in adapters})
    written = adapter_json(stored.config.lora, modules, BASE_FOLDER)
    (folder / "adapter_config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def adapter_json(lora: LoraConfig, modules: list[str], base: str) -> dict:
    """PEFT's adapter_config.json. `modules` are the adapted modules' full names."""
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": modules,
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }


def main(argv: Sequence[str] | None = None) -> None:
    ignore_missing_tpu()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=pathlib.Path,
        help="workdir, or WORKDIR/checkpoints/STEP for one of its steps",
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder to create")
    parser.add_argument("--format", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("--layout", choices=LAYOUTS, default="merged")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: as in the checkpoint")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax's remarks
    jax.config.update("jax_platforms", "cpu")  # nothing to compute; leave accelerators to those who do
    try:
        convert(arguments.checkpoint, arguments.out, arguments.format, arguments.layout, dtype=arguments.dtype)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"to_torch: {error}") from error
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
