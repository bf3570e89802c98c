"""Checkpoints: one Orbax step holds the training state, the experiment and the tokenizer's files. It is written in the
background and committed by a rename, so a killed save leaves nothing that looks finished. What disks and networks do to it later is
found when it is read: the experiment lists a sum over the bits of every array.

<workdir>/checkpoints/<step>/{state, experiment, tokenizer}; the step number is the data position. <workdir>/damaged/<step> are
steps that could not be resumed from.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from medplib_jax.batch import Params, combine
from medplib_jax.config.base import from_dict
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.parallel.processes import of_every_process, wait_for_others

log = logging.getLogger(__name__)

State = Any  # a dataclass of parameter trees with a field `step`: train.state.TrainState

FOLDER, DAMAGED = "checkpoints", "damaged"
ITEMS = ("state", "experiment", "tokenizer")
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


class TokenizerHandler(ocp.CheckpointHandler):
    """Copies a tokenizer's files into the checkpoint."""

    def save(self, directory: epath.Path, args: "TokenizerSave"):
        if jax.process_index() == 0:
            for path in tokenizer_files(args.source):
                path.copy(directory / path.name, overwrite=True)

    def restore(self, directory: epath.Path, args: "TokenizerRestore") -> str:
        return str(directory)


@ocp.args.register_with_handler(TokenizerHandler, for_save=True)
@dataclasses.dataclass
class TokenizerSave(ocp.args.CheckpointArgs):
    source: str


@ocp.args.register_with_handler(TokenizerHandler, for_restore=True)
@dataclasses.dataclass
class TokenizerRestore(ocp.args.CheckpointArgs):
    pass


def tokenizer_files(folder: str) -> list[epath.Path]:
    """The tokenizer's files in `folder`; FileNotFoundError when there are none."""
    found = [path for name in TOKENIZER_FILES if (path := epath.Path(folder) / name).exists()]
    if not folder or not found:
        raise FileNotFoundError(f"data.tokenizer: no tokenizer files ({', '.join(TOKENIZER_FILES)}) in {folder!r}")
    return found


def make_manager(
    workdir: str, keep: int | None = None, keep_best: int = 0, read_only: bool = False
) -> ocp.CheckpointManager:
    """The manager of `<workdir>/checkpoints`; without `read_only` it saves asynchronously and keeps the newest `keep` steps (None:
    all) and the `keep_best` of the smallest loss."""
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(),
        "experiment": ocp.JsonCheckpointHandler(),
        "tokenizer": TokenizerHandler(),
    }
    best = BestN(get_metric_fn=_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False)
    kept = AnyPreservationPolicy([LatestN(keep), best])
    # best_fn: without it Orbax does not write the losses, and forgets them when the run is started again
    options = ocp.CheckpointManagerOptions(
        preservation_policy=kept, best_fn=_loss, best_mode="min", read_only=read_only, create=not read_only
    )
    return ocp.CheckpointManager(epath.Path(workdir).absolute() / FOLDER, item_handlers=handlers, options=options)


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def save(manager: ocp.CheckpointManager, state: State, config: ExperimentConfig, total_steps: int, loss: float) -> None:
    """Starts saving `state` as step `state.step`, with the mean training `loss` since the last one; returns once the arrays are
    copied off the device."""
    began, tree = time.perf_counter(), _as_dict(state)
    written = {"experiment": dataclasses.asdict(config), "total_steps": total_steps, "bit_sums": bit_sums(tree)}
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(tree),
        experiment=ocp.args.JsonSave(written),
        tokenizer=TokenizerSave(config.data.tokenizer),
    )
    manager.save(int(state.step), args=items, metrics={"loss": loss})
    log.info("saving step %d; training waited %.2f s", int(state.step), time.perf_counter() - began)


def log_saved(manager: ocp.CheckpointManager, step: int) -> None:
    """Waits until `step` is saved, and logs how long that took, the waiting in the background included."""
    manager.wait_until_finished()
    times = json.loads((epath.Path(manager.directory) / str(step) / "_CHECKPOINT_METADATA").read_text())
    log.info(
        "step %d is saved after %.2f s", step, (times["commit_timestamp_nsecs"] - times["init_timestamp_nsecs"]) / 1e9
    )


def bit_sums(tree: Any) -> dict[str, int]:
    """{"path dtype": sum of the array's bits, read as unsigned integers, modulo 2^32}: exact, so the same on every mesh and number
    of processes, and another one after any flipped bit. For trees of numpy arrays or of jax arrays."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    leaves = [leaf for _, leaf in named]
    sums = (
        _sums(leaves)
        if all(isinstance(leaf, np.ndarray) for leaf in leaves)
        else jax.device_get(jax.jit(_sums)(leaves))
    )
    names = [f"{jax.tree_util.keystr(path, simple=True, separator='/')} {leaf.dtype}" for path, leaf in named]
    return {name: int(value) for name, value in zip(names, sums, strict=True)}


def _sums(leaves: list) -> list:
    return [leaf.view(f"uint{8 * leaf.dtype.itemsize}").sum(dtype="uint32") for leaf in leaves]


def _as_dict(state: State) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def restore(manager: ocp.CheckpointManager, step: int, like: State) -> State:
    """Step `step` with the structure, dtypes and shardings of `like` (jax.ShapeDtypeStruct leaves), whatever mesh wrote it.

    Raises ValueError when an array that keeps its dtype is not the one that was saved, and what Orbax raises when it cannot read one.
    Other processes are not waited for: they may have found nothing wrong.
    """
    target, folder = _as_dict(like), epath.Path(manager.directory) / str(step)
    args = ocp.args.PyTreeRestore(item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
    restored = ocp.PyTreeCheckpointHandler().restore(folder / "state", args=args)
    check_bits(folder, restored)
    return type(like)(**restored)


def restore_newest(manager: ocp.CheckpointManager, like: State) -> tuple[int, State]:
    """(step, state) of the newest step that every process can read and that holds what was saved.

    Newer ones are named in a warning and moved to <workdir>/damaged, so that their numbers are free. ValueError when no step is good;
    then nothing is moved.
    """
    for step in complete_steps(manager):
        began, state, problem = time.perf_counter(), None, ""
        try:
            state = restore(manager, step, like)
        except Exception as error:  # whatever Orbax and TensorStore raise for files that are not what they were
            problem = f"{type(error).__name__}: {error}"
        problems = [text for text in of_every_process(f"restored_{step}", problem) if text]
        if not problems:
            log.info("restored step %d in %.2f s", step, time.perf_counter() - began)
            _set_aside(manager, [newer for newer in manager.all_steps() if newer > step])
            return step, state
        log.warning("checkpoint %s/%d is damaged and not used: %s", manager.directory, step, problems[0])
    raise ValueError(
        f"{manager.directory}: no step can be restored; to start anew, take another workdir or remove this one"
    )


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


def check_bits(folder: epath.Path, tree: Any) -> None:
    """ValueError naming the arrays of `tree` that are not those saved in this step's folder. A converted checkpoint lists no sums."""
    saved = _read_json(folder).get("bit_sums", {})
    wrong = sorted(name for name, value in bit_sums(tree).items() if saved.get(name, value) != value)
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} arrays are not what was saved, first {wrong[0]}")


def complete_steps(manager: ocp.CheckpointManager) -> Iterator[int]:
    """The complete steps, newest first. One that lacks an item, or whose experiment cannot be read, is named in a warning and passed over."""
    for step in sorted(manager.all_steps(), reverse=True):
        folder = epath.Path(manager.directory) / str(step)
        missing = [item for item in ITEMS if not (folder / item).exists()]
        if missing:
            log.warning("checkpoint %s lacks %s and is not used", folder, ", ".join(missing))
            continue
        try:
            read_experiment(manager, step)
        except (ValueError, KeyError, TypeError, OSError) as error:
            log.warning("checkpoint %s is not used, its experiment cannot be read: %s", folder, error)
            continue
        yield step


def latest_step(manager: ocp.CheckpointManager) -> int | None:
    """The newest complete step, None without any."""
    return next(complete_steps(manager), None)


def read_experiment(manager: ocp.CheckpointManager, step: int) -> tuple[ExperimentConfig, int]:
    """The experiment saved with a step, and how many steps it was to run."""
    written = _read_json(epath.Path(manager.directory) / str(step))
    return from_dict(ExperimentConfig, written["experiment"]), written["total_steps"]


def _read_json(folder: epath.Path) -> dict[str, Any]:
    return ocp.JsonCheckpointHandler().restore(folder / "experiment", ocp.args.JsonRestore())


def load_params(
    workdir: str, step: int | None = None, shardings: Params | None = None
) -> tuple[ExperimentConfig, Params, str]:
    """(experiment, parameters, tokenizer folder) of a finished checkpoint in `workdir`, the newest unless `step` is given.

    Parameters are trainable and frozen together, a nested dict in the dtypes they were saved in: numpy arrays, or jax
    arrays placed by `shardings` (same nesting). Optimizer state is not read. Raises FileNotFoundError when `workdir` has
    no complete checkpoint (half-written ones do not count), ValueError when its parameters are not those that were saved.
    """
    folder = epath.Path(workdir).absolute() / FOLDER
    if not folder.exists():
        raise FileNotFoundError(f"{workdir}: expected a workdir of a training run, found no {FOLDER!r} folder in it")
    with make_manager(workdir, read_only=True) as manager:
        newest = latest_step(manager)
        step = newest if step is None else step
        if step is None or step not in manager.all_steps():
            raise FileNotFoundError(
                f"{folder}: no complete checkpoint{'' if step is None else f' of step {step}'}; found {sorted(p.name for p in folder.iterdir())}"
            )
        config, _ = read_experiment(manager, step)
        folder = folder / str(step)
        saved = ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
        parts = {}
        for name in ("trainable", "frozen"):
            parts[name] = _restore_args(saved.get(name) or {}, shardings)
        args = ocp.args.PyTreeRestore(item=jax.tree.map(lambda _: 0, parts), restore_args=parts, partial_restore=True)
        state = manager.restore(step, args=ocp.args.Composite(state=args))["state"]
    check_bits(folder, state)
    return config, combine(state["trainable"], state["frozen"]), str(folder / "tokenizer")


def _restore_args(tree, shardings):
    if isinstance(tree, dict):
        return {key: _restore_args(value, shardings and shardings[key]) for key, value in tree.items()}
    if shardings is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=shardings)
