"""What a run starts from: the newest checkpoint of its workdir, or the parameters and sizes of the runs in `init`.

It also says what a config may change when a run is resumed, or when it starts from another run's weights.
"""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from medplib_jax import checkpoint
from medplib_jax.batch import Params
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.config.model import ModelConfig
from medplib_jax.data.tokenizers import load_tokenizer
from medplib_jax.models.layers import draw_params
from medplib_jax.models.whole import WholeModel
from medplib_jax.parallel.processes import of_process_0, wait_for_others
from medplib_jax.train.stages import hand_over

log = logging.getLogger("medplib_jax.train")

# Fields of `model` that touch no parameter and give none another meaning: how a step is computed or regularised.
FREE = (
    *("dtype", "remat", "scan_unroll", "lora.dropout", "mask.unpad"),
    *("moe.dispatch", "moe.capacity_factor", "moe.eval_capacity_factor", "moe.min_capacity", "moe.aux_loss_weight"),
)
MADE_ANEW = {4: ("model.moe.",), 5: ("model.icl.",)}  # stage -> what it adds to the model that it starts from
# What else has to stay when a run is resumed.
FIXED = ("optim.trainable", "optim.frozen_dtype", "init.stage", "data.batch_size")
# Fields that change which records a step reads.
ORDER = ("data.sources", "data.weights", "data.bucket_lengths", "data.pack", "train.seed")


def check_shared(manager: ocp.CheckpointManager) -> None:
    """ValueError when this process does not find the checkpoints that process 0 finds: hosts need one workdir."""
    advice = "several hosts need a workdir that all share"
    if not epath.Path(manager.directory).exists():
        raise ValueError(f"{manager.directory}: process {jax.process_index()} does not see it; {advice}")
    mine = str(manager.latest_step())
    first = of_process_0("newest_step", mine)
    if mine != first:
        found = f"the newest step is {first} for process 0, {mine} for process {jax.process_index()}"
        raise ValueError(f"{manager.directory}: {found}; {advice}")


def finished(manager: ocp.CheckpointManager, last: int, config: ExperimentConfig) -> bool:
    """Whether the run in this workdir came to its end; asking for more steps or epochs than it had continues it."""
    saved, total_steps = checkpoint.read_experiment(manager, last)
    return last >= total_steps and (saved.train.steps, saved.train.epochs) == (config.train.steps, config.train.epochs)


def completed(config: ExperimentConfig, workdir: str, resumed: ExperimentConfig | None) -> ExperimentConfig:
    """The config with what it leaves open: the sizes (`init.sizes` "base") and the tokenizer (none given) of the base.

    A resumed run takes them from itself, so that the base need not be there any more. Buckets count the tokens of the
    pictures, and move with them.
    """
    if not config.init.base or (config.init.sizes == "config" and config.data.tokenizer):
        return config
    found, tokenizer = (resumed, "") if resumed else checkpoint.load_experiment(config.init.base)
    if config.init.sizes == "base":
        config = with_sizes(config, found.model)
    if not config.data.tokenizer:
        folder = _own_tokenizer(workdir, tokenizer)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=folder))
    return config


def with_sizes(config: ExperimentConfig, model: ModelConfig) -> ExperimentConfig:
    """The config with the sizes of `model`, whose adapters are merged before training goes on."""
    own = config.model
    moe = own.moe if config.init.stage == 4 else model.moe  # which stage IV builds
    icl = own.icl if config.init.stage == 5 else model.icl
    kept = {"icl": icl, "lora": own.lora, "dtype": own.dtype, "remat": own.remat, "scan_unroll": own.scan_unroll}
    model = dataclasses.replace(model, moe=moe, **kept)
    more = (model.image_tokens - own.image_tokens) * config.data.max_images
    lengths = (min(length + more, model.llm.max_positions) for length in config.data.bucket_lengths)
    data = dataclasses.replace(config.data, bucket_lengths=tuple(sorted({length for length in lengths if length > 0})))
    return dataclasses.replace(config, model=model, data=data)


def _own_tokenizer(workdir: str, source: str) -> str:
    """The workdir's copy of a tokenizer, made once from `source`: the base's checkpoint may go."""
    folder = epath.Path(workdir) / "tokenizer"
    if source and jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for path in checkpoint.tokenizer_files(source):
            path.copy(folder / path.name, overwrite=True)
    wait_for_others("tokenizer")
    return str(folder)


def check_tokenizer(config: ExperimentConfig) -> None:
    """ValueError when the model's vocabulary is not the tokenizer's, FileNotFoundError when there is no tokenizer."""
    folder, size = config.data.tokenizer, config.model.llm.vocab_size
    checkpoint.tokenizer_files(folder)
    found = load_tokenizer(folder).vocab_size
    if found != size:
        raise ValueError(f"model.llm.vocab_size is {size}, but data.tokenizer {folder!r} has {found} tokens")


def check_resumable(saved: ExperimentConfig, config: ExperimentConfig) -> None:
    """ValueError when what gives the parameters or the position in the data their meaning differs from the
    checkpoint's.

    Other changes are logged.
    """
    changes = dict(differences(saved, config))
    if config.model.remat == "auto":  # which chose what was saved
        changes.pop("model.remat", None)
    fixed = {name: change for name, change in changes.items() if name in FIXED or _gives_meaning(name)}
    if fixed:
        why = "; the position in the data is counted in batches" if "data.batch_size" in fixed else ""
        raise ValueError(f"the workdir's checkpoint cannot be resumed with this config: {_listed(fixed)}{why}")
    for name, (old, new) in changes.items():
        order = "; records of this epoch may come twice or not at all" if name in ORDER else ""
        log.warning("resuming with another %s: %r instead of %r%s", name, new, old, order)


def check_same_meaning(field: str, saved: ExperimentConfig, config: ExperimentConfig, but_not: tuple[str, ...]) -> None:
    """ValueError when `config` would read the parameters of `saved`, the checkpoint of `field`, as another model's.

    Adapters may differ, because they are merged, and so may what begins with one of `but_not`.
    """
    free = ("model.lora.", *but_not)
    changes = {
        name: change
        for name, change in differences(saved, config)
        if _gives_meaning(name) and not name.startswith(free)
    }
    if changes:
        advice = "give it the checkpoint's value, or set init.sizes=base"
        raise ValueError(f"{field}: these weights are of another model: {_listed(changes)}; {advice}")


def _gives_meaning(name: str) -> bool:
    return name.startswith("model.") and name.removeprefix("model.") not in FREE


def _listed(changes: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name}: {old!r} in the checkpoint, {new!r} now" for name, (old, new) in changes.items())


def differences(saved: ExperimentConfig, config: ExperimentConfig) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(name with dots, (saved value, value now)) of each field that differs."""
    yield from _differences(dataclasses.asdict(saved), dataclasses.asdict(config), "")


def _differences(saved: dict, config: dict, prefix: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for key, old in saved.items():
        if isinstance(old, dict):
            yield from _differences(old, config[key], f"{prefix}{key}.")
        elif old != config[key]:
            yield f"{prefix}{key}", (old, config[key])


def starting_params(config: ExperimentConfig, model: WholeModel) -> Params:
    """Random parameters, or those that the stage takes over from the checkpoints of `init`; on the host.

    ValueError when a checkpoint's model or tokenizer is not the config's, but for what the stage itself makes anew.
    """
    fresh = draw_params(model, config.train.seed)
    if not config.init.base:
        return fresh
    sources = [_source(config, field) for field in ("base", "grounding") if getattr(config.init, field)]
    return hand_over(config, fresh, *sources)


def _source(config: ExperimentConfig, field: str) -> tuple[ExperimentConfig, Params]:
    path = getattr(config.init, field)
    name = f"init.{field} {path}"
    saved, params, tokenizer = checkpoint.load_params(path)
    check_same_meaning(name, saved, config, MADE_ANEW.get(config.init.stage, ()))
    check_same_tokenizer(name, tokenizer, config)
    return saved, params


def check_same_tokenizer(checkpoint_name: str, tokenizer: str, config: ExperimentConfig) -> None:
    """ValueError when the tokenizer in the folder, a checkpoint's, gives other ids than that of the config."""
    if load_tokenizer(tokenizer).fingerprint != load_tokenizer(config.data.tokenizer).fingerprint:
        raise ValueError(f"{checkpoint_name}: its tokenizer is not that of data.tokenizer {config.data.tokenizer!r}")
