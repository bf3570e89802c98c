"""PyTorch weights in: one checkpoint folder that train, evaluate and predict take.

python -m convert.from_torch --source DIR_OR_FILE [--source ...] --out WORKDIR [--kind auto] [--dtype bf16] [--mesh
fsdp=8,tensor=2]

Several sources are put together (LLaVA, CLIP and SAM-Med2D, say); where two hold the same tensor, the first is taken.
Tensors are read, transposed and written one at a time. The result appears under its name only when it is complete."""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence

import absl.logging
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AbstractMesh

from medplib_jax import checkpoint
from medplib_jax.batch import flatten, unflatten
from medplib_jax.config.base import from_dict
from medplib_jax.config.experiment import (
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    InitConfig,
    MeshConfig,
    ShardingConfig,
)
from medplib_jax.config.model import ModelConfig
from medplib_jax.config.versions import VERSION
from medplib_jax.data import hub
from medplib_jax.models.families import build_model
from medplib_jax.models.layers import Mlp, abstract_module, gelu, logical_axes, params_of
from medplib_jax.models.region.encoder import RegionEncoder
from medplib_jax.models.whole import WholeModel
from medplib_jax.parallel.quiet import ignore_missing_tpu
from medplib_jax.parallel.sharding import axis_size, partition_spec

from . import kinds, mapping, orbax_stream, qwen_vl, torch_files, vocabulary
from .sources import Source, read_source

DTYPES = {"fp32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16)}
SIDE_FOLDER = "huggingface"  # the source's own files, for the way back
SIDE_FILES = ("config.json", "generation_config.json", "preprocessor_config.json")
FRESH = {
    "projector": lambda config, rngs: Mlp(
        config.clip.hidden_size, config.llm.hidden_size, config.llm.hidden_size, gelu, rngs=rngs
    ),
    "region": lambda config, rngs: RegionEncoder(config.region, config.clip, config.llm.hidden_size, rngs),
    "seg_mlp": lambda config, rngs: Mlp(
        config.llm.hidden_size, config.llm.hidden_size, config.mask.out_dim, jax.nn.relu, rngs=rngs
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to convert. `fresh` names parts that the sources lack and that start at random; `stage` is where the weights
    come from."""

    sources: tuple[pathlib.Path, ...]
    out: pathlib.Path
    kind: str = "auto"
    dtype: str | None = None  # of DTYPES; None keeps each tensor's own
    mesh: MeshConfig = MeshConfig(data=1)
    config: pathlib.Path | None = None
    tokenizer: pathlib.Path | None = None
    fresh: tuple[str, ...] = ()
    stage: int = 0
    lora_alpha: float | None = None  # of adapters without an adapter_config.json
    ignored_keys: tuple[str, ...] = ()  # of config.json, said to be harmless


def convert(options: Options) -> ModelConfig:
    """Writes the checkpoint `options.out` and returns the model's configuration.

    Raises FileNotFoundError for missing files, ValueError for weights that are damaged, not finite, of a wrong shape,
    or that do not fill the model exactly; then nothing is left behind."""
    source = read_source(options.sources, options.config, options.lora_alpha, options.ignored_keys)
    config, shapes = source.config, source.shapes
    model = model_shapes(config)
    params = target_shapes(model, required_parts(options, shapes))
    plan = mapping.strict_plan(config, params, shapes)
    rows, tokenizer = vocabulary.Rows(config.llm.vocab_size), None
    if "llm/embed/embedding" in params:
        tokenizer = vocabulary.find_tokenizer(options.tokenizer, source.folders)
        rows = vocabulary.fit(tokenizer, config.llm.vocab_size, source.foreign.language.get("image_token_index"))
        if config.family == "bird":
            qwen_vl.check_tokenizer(tokenizer, source.foreign.language)
        config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, vocab_size=rows.total))
    params = {path: rows.shape(path, shape) for path, shape in params.items()}
    pieces = shard_counts(model, params, options.mesh)
    members = collections.defaultdict(list)
    for key, entry in plan.items():
        members[entry.path].append((entry, source.tensors[key]))
    leaves = {path: streamed(path, params[path], pieces[path], members[path], options.dtype, rows) for path in params}
    leaves |= fresh_leaves(config, options)
    with staged(options.out) as folder:
        if tokenizer:
            vocabulary.copy_tokenizer(tokenizer, folder / "tokenizer")
        write_checkpoint(folder, experiment_of(source, config, options), leaves)
        for name in SIDE_FILES if source.foreign.side else ():
            if (source.foreign.side / name).is_file():
                (folder / SIDE_FOLDER).mkdir(exist_ok=True)
                shutil.copyfile(source.foreign.side / name, folder / SIDE_FOLDER / name)
    return config


def experiment_of(source: Source, config: ModelConfig, options: Options) -> ExperimentConfig:
    """The experiment that the checkpoint belongs to. What `to_torch` recorded of it comes back; else it is as
    prediction needs it."""
    own, needed = source.foreign.own, {"bucket_lengths": short_and_longest_lengths(config)}
    needed |= {} if config.draws_masks else qwen_vl.DATA
    data = from_dict(DataConfig, needed | own.get("data", {}))
    if "llm" in {kinds.part_of(key) for key in source.tensors}:
        data = dataclasses.replace(data, tokenizer=str(options.out.absolute() / "tokenizer"))
    return ExperimentConfig(
        model=config, data=data, init=InitConfig(stage=options.stage), eval=from_dict(EvalConfig, own.get("eval", {}))
    )


def short_and_longest_lengths(config: ModelConfig) -> tuple[int, ...]:
    """Two lengths, multiples of 128, for a picture and a short question, and the longest. What a prompt is padded with
    costs computing and memory."""
    longest = min(DataConfig().bucket_lengths[-1], config.llm.max_positions)
    shortest = 128 * math.ceil((config.image_tokens + 64) / 128)
    return (*(length for length in (shortest, shortest + 128) if length < longest), longest)


def required_parts(options: Options, shapes: kinds.Shapes) -> set[str]:
    """The parts that must be filled: those of the kind, and every other that a source begins."""
    found = kinds.detect_kind(shapes)
    if options.kind not in ("auto", found):
        raise ValueError(f"--kind {options.kind}: what the sources hold together looks like {found}")
    held = {kinds.part_of(key) for key in shapes if not mapping.ignored(key)}
    return (set(kinds.KINDS[found]) | held) - {None, *options.fresh}


def model_shapes(config: ModelConfig) -> WholeModel:
    """The model with shapes in place of arrays."""
    return abstract_module(lambda rngs: build_model(config, rngs, ShardingConfig()))


def target_shapes(model: WholeModel, parts: set[str]) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters to fill: the model's under `parts`."""
    return {path: leaf.shape for path, leaf in flatten(params_of(model)).items() if path.split("/")[0] in parts}


def shard_counts(model: WholeModel, params: dict[str, tuple[int, ...]], mesh: MeshConfig) -> dict[str, tuple[int, ...]]:
    """Path -> how many shards the mesh cuts each axis into: files hold whole shards, so that each host reads only its
    own."""
    sizes = dataclasses.asdict(mesh)
    abstract = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    axes = flatten(logical_axes(model))
    specs = {
        path: partition_spec(path, axes[path], shape, model.rules, abstract) if path in axes else (None,) * len(shape)
        for path, shape in params.items()
    }
    return {path: tuple(axis_size(abstract, target) for target in spec) for path, spec in specs.items()}


def streamed(path: str, shape, pieces, members: list, dtype: str | None, rows) -> orbax_stream.Streamed:
    """One parameter, to be put together from its tensors while it is written. `members`: (place, tensor) pairs."""
    found = {tensor.dtype for _, tensor in members}
    if dtype is None and len(found) > 1:
        raise ValueError(f"{path}: its tensors are of types {sorted(map(str, found))}; choose one with --dtype")
    target = DTYPES[dtype] if dtype else found.pop()
    if target not in DTYPES.values():
        raise ValueError(f"{path}: its tensors are of type {target}; choose one of {sorted(DTYPES)} with --dtype")

    def slab(entry: mapping.Entry, tensor: torch_files.Tensor) -> np.ndarray:
        values = torch_files.cast(entry.key, tensor.file, tensor.read(), target)
        return rows.fill(path, torch_files.contiguous(entry.layout.to_jax(values)))

    chunk = orbax_stream.chunk_shape(shape, len(members[0][0].stack), pieces, target.itemsize)
    return orbax_stream.Streamed(
        shape, target, chunk, [(entry.index, functools.partial(slab, entry, tensor)) for entry, tensor in members]
    )


def fresh_leaves(config: ModelConfig, options: Options) -> dict[str, orbax_stream.Streamed]:
    """Randomly initialised parameters of the parts `options.fresh`."""
    unknown = set(options.fresh) - set(FRESH)
    if unknown:
        raise ValueError(f"--fresh {sorted(unknown)}: only {sorted(FRESH)} can start fresh")
    tree = {part: params_of(FRESH[part](config, nnx.Rngs(0))) for part in options.fresh}
    dtype = DTYPES[options.dtype or "fp32"]
    return {path: _whole(np.asarray(leaf).astype(dtype)) for path, leaf in flatten(tree).items()}


def _whole(array: np.ndarray) -> orbax_stream.Streamed:
    return orbax_stream.Streamed(array.shape, array.dtype, array.shape, [((), lambda: array)])


def write_checkpoint(folder: pathlib.Path, experiment: ExperimentConfig, leaves) -> None:
    """Step 0 of a workdir, with the items that `medplib_jax.checkpoint` reads. Its tokenizer is in `folder` already."""
    steps = folder / checkpoint.FOLDER
    handlers = {
        "state": orbax_stream.handler(),
        "experiment": ocp.JsonCheckpointHandler(),
        "tokenizer": checkpoint.TokenizerHandler(),
    }
    tokenizer = folder / "tokenizer"
    state = {"step": _whole(np.zeros((), np.int32)), "trainable": unflatten(leaves), "frozen": {}, "opt_state": {}}
    written = {"version": VERSION, "experiment": dataclasses.asdict(experiment), "total_steps": 0}
    items = {"state": ocp.args.PyTreeSave(state), "experiment": ocp.args.JsonSave(written)}
    if tokenizer.exists():
        items["tokenizer"] = checkpoint.TokenizerFolder(str(tokenizer))
    manager_options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(steps, item_handlers=handlers, options=manager_options) as manager:
        manager.save(0, args=ocp.args.Composite(**items))
    (steps / "0" / "tokenizer").mkdir(exist_ok=True)  # every step has all items; CLIP or SAM alone have no tokenizer


@contextlib.contextmanager
def staged(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A hidden folder beside `out` (its path is absolute) that takes its name at the end, when all of it is on the
    disk. An exception removes it; a kill leaves it, under its hidden name."""
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out {out}: already exists and is not an empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.converting-", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        for path in folder.rglob("*"):
            sync(path)
        os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync(path: pathlib.Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_mesh(text: str) -> MeshConfig:
    """ "fsdp=8,tensor=2" -> MeshConfig; axes not named are 1."""
    sizes = dict(part.split("=") for part in text.split(",")) if text else {}
    return MeshConfig(**{"data": 1} | {axis: int(size) for axis, size in sizes.items()})


def main(argv: Sequence[str] | None = None) -> None:
    ignore_missing_tpu()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source",
        action="append",
        required=True,
        type=hub.argument,
        help="folder, file or hf://OWNER/NAME@REVISION; may be given several times",
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, help="workdir to create")
    parser.add_argument("--kind", choices=("auto", *kinds.KINDS), default="auto")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: as in the source")
    parser.add_argument(
        "--mesh",
        type=parse_mesh,
        default=MeshConfig(data=1),
        help="write the shards of this mesh, e.g. fsdp=8,tensor=2",
    )
    parser.add_argument("--config", type=pathlib.Path, help="folder with config.json, where the source has none")
    parser.add_argument("--tokenizer", type=pathlib.Path, help="folder with tokenizer.model, where the source has none")
    parser.add_argument("--fresh", default="", help=f"comma-separated parts that start at random: {', '.join(FRESH)}")
    parser.add_argument("--stage", type=int, default=0, help="training stage that the weights come from")
    parser.add_argument("--lora_alpha", type=float, help="of adapters without an adapter_config.json; MedPLIB's is 16")
    parser.add_argument(
        "--ignore_key", action="append", default=[], help="key of config.json that changes nothing; several times"
    )
    arguments = vars(parser.parse_args(argv))
    arguments["ignored_keys"] = tuple(arguments.pop("ignore_key"))
    arguments["fresh"] = tuple(filter(None, arguments["fresh"].split(",")))
    arguments["sources"] = tuple(arguments.pop("source"))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax's remarks
    jax.config.update("jax_platforms", "cpu")  # nothing to compute; leave accelerators to those who do
    try:
        config = convert(Options(**arguments))
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"from_torch: {error}") from error
    print(json.dumps(dataclasses.asdict(config), indent=1))
    print(f"wrote {arguments['out']}")


if __name__ == "__main__":
    main()
