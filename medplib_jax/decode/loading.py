"""A checkpoint as it answers: its parameters on devices, and what it says about itself."""

import dataclasses
import os

from jax.sharding import Mesh

from medplib_jax.batch import Params
from medplib_jax.config.experiment import ExperimentConfig, ShardingConfig
from medplib_jax.decode.layout import LARGE, has_narrow_weights, to_decoding_layout
from medplib_jax.decode.saved_params import open_params
from medplib_jax.models.quantize import num_bytes
from medplib_jax.parallel.compilation import release_memory, return_freed_memory


@dataclasses.dataclass(frozen=True)
class LoadedCheckpoint:
    """`params`: see `layout.to_decoding_layout`. `tokenizer`: its folder. `quantize`: one of `layout.QUANTIZE`."""

    experiment: ExperimentConfig
    params: Params
    tokenizer: str
    quantize: str


def load_checkpoint(
    path: str | os.PathLike,
    step: int | None = None,
    *,
    mesh: Mesh | None = None,
    rules: ShardingConfig | None = None,
    quantize: str = "",
) -> LoadedCheckpoint:
    """`step` of a workdir, or what `path` names, on the devices of `mesh` (default: this process's first device).

    A parameter is read, quantised where that is asked for, placed and dropped before much more is read: the host needs
    the memory of the result and of a few layers. Weights that were saved in 8 bits stay so. FileNotFoundError when
    there is no such complete checkpoint, ValueError when it is not what was saved or not a model that answers.
    """
    saved = open_params(path, step)
    if saved.quantize and not has_narrow_weights(quantize):
        quantize = "+".join(filter(None, (saved.quantize, quantize)))
    if num_bytes(saved.tree) > LARGE:
        return_freed_memory()
    params = to_decoding_layout(saved.experiment.model, saved.tree, mesh, rules, quantize)
    saved.check()
    release_memory()
    return LoadedCheckpoint(saved.experiment, params, saved.tokenizer, quantize)
