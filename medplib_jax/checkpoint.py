"""Checkpoints of a run: saving, and resuming or loading a step that is complete and holds what was saved.

One Orbax step holds the training state, the experiment and the tokenizer's files. It is written in the background and
committed by a rename, so a killed save leaves nothing that looks finished. What disks and networks do to it later is
found when it is read: the experiment lists a sum over the bits of every array.

<workdir>/checkpoints/<step>/{state, experiment, tokenizer}; the step number is the data position.
<workdir>/damaged/<step> are steps that could not be resumed from.
"""

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from medplib_jax.batch import Params, combine
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.config.versions import VERSION, read_versioned
from medplib_jax.data import hub
from medplib_jax.parallel.processes import of_every_process, wait_for_others
from medplib_jax.parallel.quiet import without_orbax_remarks

log = logging.getLogger(__name__)

State = Any  # a dataclass of parameter trees with a field `step`: train.state.TrainState

FOLDER, DAMAGED = "checkpoints", "damaged"
ITEMS = ("state", "experiment", "tokenizer")
PARTS = ("trainable", "frozen")  # of the state: all parameters
LARGE_BYTES = 2**28
TOKENIZER_FILES = (
    "tokenizer.model",
    "qwen.tiktoken",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


class TokenizerHandler(ocp.CheckpointHandler):
    """Copies a tokenizer's files into the checkpoint."""

    def save(self, directory: epath.Path, args: "TokenizerFolder"):
        if jax.process_index() == 0:
            for path in tokenizer_files(args.source):
                path.copy(directory / path.name, overwrite=True)

    def restore(self, directory: epath.Path, args: "TokenizerFolder") -> str:
        return str(directory)


@ocp.args.register_with_handler(TokenizerHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class TokenizerFolder(ocp.args.CheckpointArgs):
    """The folder whose tokenizer files are saved."""

    source: str


def tokenizer_files(folder: str) -> list[epath.Path]:
    """The tokenizer's files in `folder`; FileNotFoundError when there are none."""
    found = [path for name in TOKENIZER_FILES if (path := epath.Path(folder) / name).exists()]
    if not folder or not found:
        raise FileNotFoundError(f"data.tokenizer: no tokenizer files ({', '.join(TOKENIZER_FILES)}) in {folder!r}")
    return found


def make_manager(
    workdir: str, keep: int | None = None, keep_best: int = 0, read_only: bool = False
) -> ocp.CheckpointManager:
    """The manager of `<workdir>/checkpoints`; without `read_only` it saves asynchronously and keeps the newest `keep`
    steps (None: all) and the `keep_best` of the smallest loss.
    """
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(),
        "experiment": ocp.JsonCheckpointHandler(),
        "tokenizer": TokenizerHandler(),
    }
    best = BestN(get_metric_fn=_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False)
    kept = AnyPreservationPolicy([LatestN(keep), best])
    # best_fn: without it Orbax does not write the losses, and forgets them when the run is started again
    with without_orbax_remarks():
        options = ocp.CheckpointManagerOptions(
            preservation_policy=kept, best_fn=_loss, best_mode="min", read_only=read_only, create=not read_only
        )
        return ocp.CheckpointManager(epath.Path(workdir).absolute() / FOLDER, item_handlers=handlers, options=options)


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def save(
    manager: ocp.CheckpointManager, state: State, config: ExperimentConfig, total_steps: int, loss: float | None
) -> None:
    """Starts saving `state` as step `state.step`; returns once the arrays are copied off the device.

    `loss` ranks the step among those of `keep_best`; None: it is not ranked. ValueError when Orbax does not take the
    step.
    """
    began, tree, step = time.perf_counter(), _as_dict(state), int(jax.device_get(state.step))
    written = {
        "version": VERSION,
        "experiment": dataclasses.asdict(config),
        "total_steps": total_steps,
        "bit_sums": bit_sums(tree),
    }
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(tree, save_args=jax.tree.map(_save_args, tree)),
        experiment=ocp.args.JsonSave(written),
        tokenizer=TokenizerFolder(config.data.tokenizer),
    )
    if not manager.save(step, args=items, metrics=None if loss is None else {"loss": loss}):
        raise ValueError(f"{manager.directory}: step {step} was not saved; the newest there is {manager.latest_step()}")
    log.info("saving step %d; training waited %.2f s", step, time.perf_counter() - began)


def _save_args(array: Any) -> ocp.SaveArgs:
    """A large stack of layers is written layer by layer, so that one layer can be read without the others."""
    large = array.ndim > 2 and array.nbytes > LARGE_BYTES
    return ocp.SaveArgs(shard_axes=(0,) if large else ())


def log_saved(manager: ocp.CheckpointManager, step: int) -> None:
    """Waits until `step` is saved, and logs how long that took, the waiting in the background included."""
    manager.wait_until_finished()
    times = json.loads((epath.Path(manager.directory) / str(step) / "_CHECKPOINT_METADATA").read_text())
    log.info(
        "step %d is saved after %.2f s", step, (times["commit_timestamp_nsecs"] - times["init_timestamp_nsecs"]) / 1e9
    )


def bit_sums(tree: Any) -> dict[str, int]:
    """{"path dtype": sum of the array's bits, read as unsigned integers, modulo 2^32}: exact, so the same on every
    mesh and number of processes, and another one after any flipped bit. For trees of numpy arrays or of jax
    arrays.
    """
    named = _named(tree)
    leaves = list(named.values())
    sums = (
        _sums(leaves)
        if all(isinstance(leaf, np.ndarray) for leaf in leaves)
        else jax.device_get(jax.jit(_sums)(leaves))
    )
    return {f"{name} {leaf.dtype}": int(value) for (name, leaf), value in zip(named.items(), sums, strict=True)}


def _sums(leaves: list) -> list:
    return [leaf.view(f"uint{8 * leaf.dtype.itemsize}").sum(dtype="uint32") for leaf in leaves]


def _as_dict(state: State) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def restore(manager: ocp.CheckpointManager, step: int, like: State) -> State:
    """Step `step` with the structure, dtypes and shardings of `like` (jax.ShapeDtypeStruct leaves), whatever mesh
    wrote it.

    Raises OtherArrays when the step holds other arrays than `like`, ValueError when an array that keeps its dtype is
    not the one that was saved, and what Orbax raises when it cannot read one. Other processes are not waited for:
    they may have found nothing wrong.
    """
    folder, handler = epath.Path(manager.directory) / str(step), ocp.PyTreeCheckpointHandler()
    like_dict, saved = _as_dict(like), handler.metadata(folder / "state").tree
    wanted = _named(like_dict)
    check_listed(folder, saved)
    check_arrays(folder, _named(saved), wanted)
    # in the nesting that was saved: containers without arrays, such as states of stateless transforms, may have come
    # or gone
    target = jax.tree_util.tree_map_with_path(lambda path, _: wanted[_name(path)], saved)
    args = ocp.args.PyTreeRestore(item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
    restored = handler.restore(folder / "state", args=args)
    check_bits(folder, restored)
    arrays = _named(restored)
    return type(like)(**jax.tree.unflatten(jax.tree.structure(like_dict), [arrays[name] for name in wanted]))


class OtherArrays(ValueError):
    """A checkpoint holds other arrays than are asked for: it is of another model or optimizer, not damaged."""


def check_arrays(folder: epath.Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """OtherArrays naming the first path or shape in which they differ."""
    for name in sorted(saved.keys() | wanted.keys()):
        shapes = [tuple(tree[name].shape) if name in tree else None for tree in (saved, wanted)]
        if shapes[0] != shapes[1]:
            found, expected = ("no such array" if shape is None else f"shape {shape}" for shape in shapes)
            raise OtherArrays(f"{folder}: {name}: found {found}, expected {expected}")


def _named(tree: Any) -> dict[str, Any]:
    """{"a/b/0/c": leaf} in the order of the leaves; the same names for a NamedTuple and the dict that Orbax makes of
    it.
    """
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def restore_newest(manager: ocp.CheckpointManager, like: State) -> tuple[int, State]:
    """(step, state) of the newest step that every process can read and that holds what was saved.

    Newer ones are named in a warning and moved to <workdir>/damaged, so that their numbers are free. ValueError when
    no step is good; then nothing is moved. OtherArrays is not damage and is raised.
    """
    for step in complete_steps(manager):
        began, state, problem = time.perf_counter(), None, ""
        try:
            state = restore(manager, step, like)
        except (OtherArrays, MemoryError, jax.errors.JaxRuntimeError):  # the files are not to blame
            raise
        except Exception as error:  # whatever Orbax and TensorStore raise for files that are not what they were
            problem = f"{type(error).__name__}: {error}"
        problems = [text for text in of_every_process(f"restored_{step}", problem) if text]
        if not problems:
            log.info("restored step %d in %.2f s", step, time.perf_counter() - began)
            _set_aside(manager, [newer for newer in manager.all_steps() if newer > step])
            return step, state
        log.warning("checkpoint %s/%d is damaged and not used: %s", manager.directory, step, problems[0])
    raise ValueError(_no_good_step(manager))


def _no_good_step(manager: ocp.CheckpointManager) -> str:
    return f"{manager.directory}: no step can be restored; to start anew, take another workdir or remove this one"


def _set_aside(manager: ocp.CheckpointManager, steps: list[int]) -> None:
    if not steps:
        return
    folder = epath.Path(manager.directory)
    if jax.process_index() == 0:
        (folder.parent / DAMAGED).mkdir(exist_ok=True)
        for step in steps:
            (folder / str(step)).rename(folder.parent / DAMAGED / f"{step}.{time.time_ns()}")
    wait_for_others("set_aside")
    manager.reload()


def check_listed(folder: epath.Path, saved: Any) -> None:
    """ValueError when the arrays that Orbax finds are not those that the experiment lists; a converted checkpoint
    lists none.
    """
    listed = _read_json(folder).get("bit_sums", {}).keys()
    found = {f"{name} {leaf.dtype}" for name, leaf in _named(saved).items()}
    if listed and (odd := sorted(listed ^ found)):
        raise ValueError(f"{folder}: {len(odd)} arrays are not those that were saved, first {odd[0]}")


def check_bits(folder: epath.Path, tree: Any) -> None:
    """ValueError naming the arrays of `tree` that are not those saved in this step's folder. A converted checkpoint
    lists no sums.
    """
    check_sums(folder, bit_sums(tree))


def check_sums(folder: epath.Path, found: dict[str, int]) -> None:
    """`check_bits` by the sums themselves."""
    saved = _read_json(folder).get("bit_sums", {})
    wrong = sorted(name for name, value in found.items() if saved.get(name, value) != value)
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} arrays are not what was saved, first {wrong[0]}")


def complete_steps(manager: ocp.CheckpointManager) -> Iterator[int]:
    """The complete steps, newest first. One that lacks an item, or whose experiment is no JSON, is named in a warning
    and passed over.

    Raises ValueError for an experiment that this version of the program does not understand: it is whole, and not to
    be passed over.
    """
    for step in sorted(manager.all_steps(), reverse=True):
        folder = epath.Path(manager.directory) / str(step)
        missing = [item for item in ITEMS if not (folder / item).exists()]
        if missing:
            log.warning("checkpoint %s lacks %s and is not used", folder, ", ".join(missing))
            continue
        try:
            _read_json(folder)
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            log.warning("checkpoint %s is not used, its experiment cannot be read: %s", folder, error)
            continue
        read_experiment(manager, step)
        yield step


def latest_step(manager: ocp.CheckpointManager) -> int | None:
    """The newest complete step, None without any."""
    return next(complete_steps(manager), None)


def step_to_resume(manager: ocp.CheckpointManager) -> int | None:
    """The newest complete step, None in a new workdir. ValueError when there are steps of which none can be used."""
    step = latest_step(manager)
    if step is None and manager.all_steps():
        raise ValueError(_no_good_step(manager))
    return step


def read_experiment(manager: ocp.CheckpointManager, step: int) -> tuple[ExperimentConfig, int]:
    """The experiment saved with a step, whatever version of this program wrote it, and how many steps it was to run.

    ValueError names the file and the field that is not understood.
    """
    folder = epath.Path(manager.directory) / str(step)
    written = _read_json(folder)
    try:
        return read_versioned(written["experiment"], written.get("version", 0)), written["total_steps"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}/experiment: cannot be used by this version of the program: {error}") from error


def _read_json(folder: epath.Path) -> dict[str, Any]:
    return ocp.JsonCheckpointHandler().restore(folder / "experiment", ocp.args.JsonRestore())


def named_step(path: str | os.PathLike) -> tuple[str, int | None]:
    """(workdir, step) that a path names: WORKDIR/checkpoints/STEP, or a WORKDIR alone, whose step is None for the
    newest; hf://OWNER/NAME@REVISION is a workdir that is fetched (`data.hub`).
    """
    path = hub.local(path)
    place = epath.Path(path)
    if place.name.isdigit() and place.parent.name == FOLDER:
        return str(place.parent.parent), int(place.name)
    return str(path), None


def find_step(path: str | os.PathLike) -> tuple[epath.Path, int]:
    """(absolute workdir, complete step) that a path names (see `named_step`); FileNotFoundError when it is not
    there.
    """
    workdir, step = named_step(path)
    folder = epath.Path(workdir).absolute() / FOLDER
    if not folder.exists():
        raise FileNotFoundError(f"{workdir}: expected a workdir of a training run, found no {FOLDER!r} folder in it")
    with make_manager(workdir, read_only=True) as manager:
        steps = complete_steps(manager)
        found = next(steps, None) if step is None else next((one for one in steps if one == step), None)
    if found is None:
        wanted, there = "" if step is None else f" of step {step}", sorted(entry.name for entry in folder.iterdir())
        raise FileNotFoundError(f"{folder}: no complete checkpoint{wanted}; found {there}")
    return folder.parent, found


def load_experiment(path: str | os.PathLike) -> tuple[ExperimentConfig, str]:
    """(experiment, tokenizer folder) of the step that a path names, without its parameters. Raises as `find_step`."""
    workdir, step = find_step(path)
    with make_manager(str(workdir), read_only=True) as manager:
        return read_experiment(manager, step)[0], str(workdir / FOLDER / str(step) / "tokenizer")


def load_params(
    path: str | os.PathLike, step: int | None = None, shardings: Params | None = None, part: str = ""
) -> tuple[ExperimentConfig, Params, str]:
    """(experiment, parameters, tokenizer folder) of a complete checkpoint: `step` of a workdir, or what `path` names
    (see `named_step`).

    Parameters are trainable and frozen together, a nested dict in the dtypes they were saved in: numpy arrays, or jax
    arrays placed by `shardings` (same nesting). Only those of one `part` of the model where it is named, such as "sam".
    Optimizer state is not read. Raises FileNotFoundError when there is
    no such complete checkpoint (half-written ones do not count), ValueError when its parameters are not those that
    were saved, or there is no such part.
    """
    workdir, step = find_step(path if step is None else epath.Path(path) / FOLDER / str(step))
    folder = workdir / FOLDER / str(step)
    with make_manager(str(workdir), read_only=True) as manager:
        config, _ = read_experiment(manager, step)
        saved = ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
        trees = {name: saved.get(name) or {} for name in PARTS}
        if part:
            trees = {name: {part: tree[part]} for name, tree in trees.items() if part in tree}
            if not trees:
                raise ValueError(f"{folder}: expected a model with the part {part!r}, found none")
        parts = {name: _restore_args(tree, shardings) for name, tree in trees.items()}
        refuse_quantized(folder, _named(parts))
        args = ocp.args.PyTreeRestore(item=jax.tree.map(lambda _: 0, parts), restore_args=parts, partial_restore=True)
        state = manager.restore(step, args=ocp.args.Composite(state=args))["state"]
    check_bits(folder, state)
    return config, combine(*(state.get(name, {}) for name in PARTS)), str(folder / "tokenizer")


def is_quantized(paths: Iterable[str]) -> bool:
    """Whether parameters of these paths are weights of 8 bits (`convert.quantize`)."""
    return any(path.endswith("/kernel_scale") for path in paths)


def refuse_quantized(folder: epath.Path, paths: Iterable[str]) -> None:
    """ValueError for weights of 8 bits."""
    if is_quantized(paths):
        raise ValueError(f"{folder}: weights of 8 bits, which can only answer; take the checkpoint they were made of")


def _restore_args(tree, shardings):
    if isinstance(tree, dict):
        return {key: _restore_args(value, shardings and shardings[key]) for key, value in tree.items()}
    if shardings is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=shardings)


def step_digest(workdir: str | os.PathLike, step: int) -> str:
    """16 hex digits of what a step is, wherever it lies: its experiment, its tokenizer and the bit sums of its arrays.

    A converted checkpoint has no bit sums. There the files of arrays tell, whose names Orbax draws at random for each
    save.
    """
    folder, total = epath.Path(workdir) / FOLDER / str(step), hashlib.sha256()
    for item in ("experiment", "tokenizer"):
        for name, file in _files(folder / item):
            total.update(repr((item, name, hashlib.sha256(file.read_bytes()).hexdigest())).encode())
    total.update(repr([(name, file.stat().length) for name, file in _files(folder / "state")]).encode())
    return total.hexdigest()[:16]


def _files(folder: epath.Path, name: str = "") -> list[tuple[str, epath.Path]]:
    """Every file below a folder, by its path there."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        inner = f"{name}/{path.name}"
        found += _files(path, inner) if path.is_dir() else [(inner, path)]
    return found
