"""How one stage's result starts the next (MedPLIB, section 3.3; train_ds_medplib.py): merge the adapters, build the
experts from two checkpoints, copy the rest. What is new keeps its fresh values; anything missing, left over or of
another size is an error.
"""

import re
from collections.abc import Sequence

import numpy as np

from medplib_jax.batch import Params, flatten, unflatten
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.config.model import ModelConfig
from medplib_jax.models.language.lora import merge_lora

NAMES = {
    0: "fine-tuning",
    1: "align",
    2: "visual-language expert",
    3: "grounding expert",
    4: "mixture of experts",
    5: "in context",
}
BASE_STAGES = {0: tuple(NAMES), 1: (0,), 2: (1,), 3: (2,), 4: (2,), 5: (4,)}  # stage -> stages its base may come from
GROUNDING_STAGES = (3,)
NEW = (
    r"lora_[ab]$",
    r"^llm/moe/(router|coefficient)/",
    r"^region/geometry/",
    r"^icl/",
)  # parameters that may start fresh

Checkpoint = tuple[ExperimentConfig, Params]


def hand_over(config: ExperimentConfig, fresh: Params, base: Checkpoint, grounding: Checkpoint | None = None) -> Params:
    """The parameters that stage `config.init.stage` starts from, in the nesting of `fresh`.

    `fresh` are newly initialised parameters of `config.model` (only new parts keep their values, so shapes suffice
    for the rest); `base` and `grounding` are (experiment, parameters) of finished runs. Raises ValueError for a
    checkpoint of the wrong stage, for parameters of another shape, and for parameters missing or left over.
    """
    stage = config.init.stage
    check_stage("init.base", stage, base[0].init.stage, BASE_STAGES[stage])
    source = merged(base)
    if stage == 4:
        if grounding is None:
            raise ValueError("stage 4 (mixture of experts) needs init.grounding, a checkpoint of stage 3")
        check_stage("init.grounding", stage, grounding[0].init.stage, GROUNDING_STAGES)
        source = with_experts(config.model, source, merged(grounding))
    return copy_into(fresh, source)


def check_stage(field: str, stage: int, found: int, allowed: Sequence[int]) -> None:
    if found not in allowed:
        expected = " or ".join(f"{i} ({NAMES[i]})" for i in allowed)
        raise ValueError(
            f"{field}: stage {stage} ({NAMES[stage]}) starts from a checkpoint of stage {expected}, "
            f"found stage {found} ({NAMES[found]})"
        )


def merged(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """{path: array} with the adapters merged into their kernels."""
    config, params = checkpoint
    return flatten(merge_lora(params, config.model.lora))


def with_experts(model: ModelConfig, language: dict, grounding: dict) -> dict:
    """Parameters of the mixture: expert 0 is the grounding checkpoint's MLP, expert 1 the language checkpoint's
    (which also gives the MLPs of layers without experts, and the residual MLP); SEG MLP and mask head come from
    grounding, the rest from language.
    """
    if model.moe.num_experts != 2:
        raise ValueError(
            f"stage 4 builds 2 experts from two checkpoints, but moe.num_experts is {model.moe.num_experts}"
        )
    check_same_shapes(language, grounding)
    sparse = list(model.moe_layers)
    dense = [i for i in range(model.llm.num_layers) if i not in sparse]
    source = {
        path: grounding[path] if path.startswith(("seg_mlp/", "sam/")) else leaf for path, leaf in language.items()
    }
    for name in ("gate", "up", "down"):
        path = f"llm/mlp/{name}/kernel"
        mlp = source.pop(path)
        if dense:
            source[path] = mlp[np.array(dense)]
        source[f"llm/moe/experts/{name}/kernel"] = np.stack(
            [grounding[path][np.array(sparse)], mlp[np.array(sparse)]], axis=1
        )
        if model.moe.residual:
            source[f"llm/moe/residual/{name}/kernel"] = mlp[np.array(sparse)]
    return source


def check_same_shapes(language: dict, grounding: dict) -> None:
    for path in sorted(set(language) | set(grounding)):
        shapes = [tree[path].shape if path in tree else None for tree in (language, grounding)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{path}: init.base has shape {shapes[0]}, init.grounding {shapes[1]}; both must be of one model"
            )


def copy_into(fresh: Params, source: dict) -> Params:
    """`fresh` with every parameter of `source` in its place, in the dtype of `fresh`."""
    wanted = flatten(fresh)
    left_over = sorted(set(source) - set(wanted))
    if left_over:
        raise ValueError(
            f"the checkpoint holds {len(left_over)} parameters that the new model lacks, first {left_over[0]}"
        )
    result = {}
    for path, leaf in wanted.items():
        if path not in source:
            if not any(re.search(pattern, path) for pattern in NEW):
                raise ValueError(f"{path}: not in the checkpoint, and not a part that may start fresh")
            result[path] = leaf
        elif source[path].shape != leaf.shape:
            raise ValueError(
                f"{path}: the new model expects shape {leaf.shape}, the checkpoint has {source[path].shape}"
            )
        else:
            result[path] = source[path].astype(leaf.dtype)
    return unflatten(result)
