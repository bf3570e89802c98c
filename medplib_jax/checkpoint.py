"""Checkpoints: one Orbax step holds the training state, the experiment and the tokenizer's files. It is written in the
background and committed by a rename, so a killed save leaves nothing that looks finished.

<workdir>/checkpoints/<step>/{state, experiment, tokenizer}; the step number is the data position.
"""

import dataclasses
import logging
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from medplib_jax.config import from_dict
from medplib_jax.experiment import ExperimentConfig
from medplib_jax.optim import combine
from medplib_jax.types import Params, TrainState

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
ITEMS = ("state", "experiment", "tokenizer")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


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


def make_manager(workdir: str, keep: int | None = None, keep_best: int = 0, read_only: bool = False) -> ocp.CheckpointManager:
    """The manager of `<workdir>/checkpoints`; without `read_only` it saves asynchronously and keeps the newest `keep` steps (None:
    all) and the `keep_best` of the smallest loss."""
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "experiment": ocp.JsonCheckpointHandler(), "tokenizer": TokenizerHandler()}
    best = BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=keep_best, keep_checkpoints_without_metrics=False)
    kept = AnyPreservationPolicy([LatestN(keep), best])
    options = ocp.CheckpointManagerOptions(preservation_policy=kept, read_only=read_only, create=not read_only)
    return ocp.CheckpointManager(epath.Path(workdir).absolute() / FOLDER, item_handlers=handlers, options=options)


def save(manager: ocp.CheckpointManager, state: TrainState, config: ExperimentConfig, total_steps: int, loss: float) -> None:
    """Starts saving `state` as step `state.step`, with the mean training `loss` since the last one; returns once the arrays are
    copied off the device."""
    written = {"experiment": dataclasses.asdict(config), "total_steps": total_steps}
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(_as_dict(state)), experiment=ocp.args.JsonSave(written), tokenizer=TokenizerSave(config.data.tokenizer)
    )
    manager.save(int(state.step), args=items, metrics={"loss": loss})


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def restore(manager: ocp.CheckpointManager, step: int, like: TrainState) -> TrainState:
    """Step `step` with the structure, dtypes and shardings of `like` (jax.ShapeDtypeStruct leaves), whatever mesh wrote it."""
    target = _as_dict(like)
    args = ocp.args.PyTreeRestore(item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
    return TrainState(**manager.restore(step, args=ocp.args.Composite(state=args))["state"])


def latest_step(manager: ocp.CheckpointManager) -> int | None:
    """The newest complete step, None without any. A step that lacks an item is named in a warning and passed over."""
    for step in sorted(manager.all_steps(), reverse=True):
        folder = epath.Path(manager.directory) / str(step)
        missing = [item for item in ITEMS if not (folder / item).exists()]
        if not missing:
            return step
        log.warning("checkpoint %s lacks %s and is not used", folder, ", ".join(missing))
    return None


def read_experiment(manager: ocp.CheckpointManager, step: int) -> tuple[ExperimentConfig, int]:
    """The experiment saved with a step, and how many steps it was to run."""
    written = manager.restore(step, args=ocp.args.Composite(experiment=ocp.args.JsonRestore()))["experiment"]
    return from_dict(ExperimentConfig, written["experiment"]), written["total_steps"]


def load_params(workdir: str, step: int | None = None, shardings: Params | None = None) -> tuple[ExperimentConfig, Params, str]:
    """(experiment, parameters, tokenizer folder) of a finished checkpoint in `workdir`, the newest unless `step` is given.

    Parameters are trainable and frozen together, a nested dict in the dtypes they were saved in: numpy arrays, or jax
    arrays placed by `shardings` (same nesting). Optimizer state is not read. Raises FileNotFoundError when `workdir` has
    no complete checkpoint: half-written ones do not count.
    """
    folder = epath.Path(workdir).absolute() / FOLDER
    if not folder.exists():
        raise FileNotFoundError(f"{workdir}: expected a workdir of a training run, found no {FOLDER!r} folder in it")
    with make_manager(workdir, read_only=True) as manager:
        newest = latest_step(manager)
        step = newest if step is None else step
        if step is None or step not in manager.all_steps():
            raise FileNotFoundError(f"{folder}: no complete checkpoint{'' if step is None else f' of step {step}'}; found {sorted(p.name for p in folder.iterdir())}")
        config, _ = read_experiment(manager, step)
        saved = ocp.PyTreeCheckpointHandler().metadata(folder / str(step) / "state").tree
        parts = {}
        for name in ("trainable", "frozen"):
            parts[name] = _restore_args(saved.get(name) or {}, shardings)
        args = ocp.args.PyTreeRestore(item=jax.tree.map(lambda _: 0, parts), restore_args=parts, partial_restore=True)
        state = manager.restore(step, args=ocp.args.Composite(state=args))["state"]
    return config, combine(state["trainable"], state["frozen"]), str(folder / str(step) / "tokenizer")


def _restore_args(tree, shardings):
    if isinstance(tree, dict):
        return {key: _restore_args(value, shardings and shardings[key]) for key, value in tree.items()}
    if shardings is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=shardings)
