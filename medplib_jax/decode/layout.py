"""How decoding wants a checkpoint's parameters: adapters merged, layers unstacked, kernels in the order in which the
platform reads them, perhaps in 8 bits.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from medplib_jax.batch import Params, flatten, unflatten
from medplib_jax.config.experiment import ShardingConfig
from medplib_jax.config.model import ClipConfig, LoraConfig, ModelConfig
from medplib_jax.decode.saved_params import SavedArray
from medplib_jax.models.families import build_model
from medplib_jax.models.language.lora import merge_lora
from medplib_jax.models.layers import abstract_module, model_shardings, params_of
from medplib_jax.models.quantize import quantize_kernel, quantize_module
from medplib_jax.models.target import platform_of
from medplib_jax.models.whole import WholeModel
from medplib_jax.parallel.ahead import ahead
from medplib_jax.parallel.mesh import one_device
from medplib_jax.parallel.sharding import check_model_fits

LARGE = 2**30  # bytes of parameters from which on memory is short on a CPU
# int8: weights of 8 bits; w8a8: these, and the decoder's activations in its products; kv: keys and values of the cache
QUANTIZE = ("", "int8", "kv", "int8+kv", "w8a8", "w8a8+kv")
STACKS = ("llm/layers/", "llm/mlp/", "llm/moe/")  # modules whose parameters have an axis of layers in a checkpoint

Piece = Callable[[], Iterator[tuple[str, Params]]]  # reads (path in the decoding model, arrays of that module)


def decoding_model(
    config: ModelConfig, mesh: Mesh | None = None, rules: ShardingConfig | None = None, quantize: str = ""
) -> WholeModel:
    """`model_in_decoding_layout` whose experts drop nothing: no token depends on the rest of its batch."""
    dropless = dataclasses.replace(config, moe=dataclasses.replace(config.moe, dispatch="dropless"))
    return model_in_decoding_layout(dropless, mesh, rules, quantize)


def model_in_decoding_layout(
    config: ModelConfig, mesh: Mesh | None = None, rules: ShardingConfig | None = None, quantize: str = ""
) -> WholeModel:
    """The abstract model with parameters as `to_decoding_layout` gives them.

    `quantize` is one of QUANTIZE: "int8" gives its linear layers weights of 8 bits. With "w8a8", whose parameters are
    the same, the decoder's layers round their activations, too, and multiply integers. "kv" gives its cache keys and
    values of 8 bits, "+" both.

    On an accelerator the experts of a layer stay in one array, from which the chosen one is picked while it is read. In
    order to choose among programs a GPU's host would have to wait for the router, and a TPU fetches what all of them
    read beforehand. For a GPU the decoder's kernels are transposed (`layers.matmul_by_output`).
    """
    if quantize not in QUANTIZE:
        raise ValueError(f"quantize {quantize!r} is not one of {QUANTIZE}")
    config = dataclasses.replace(config, lora=LoraConfig(), clip=_computed(config.clip))
    return _model_in_decoding_layout(config, rules, quantize, platform_of(mesh or one_device()))


@functools.lru_cache(maxsize=8)
def _model_in_decoding_layout(
    config: ModelConfig, rules: ShardingConfig | None, quantize: str, platform: str
) -> WholeModel:
    """Read-only, because equal arguments share it."""
    model = abstract_module(
        functools.partial(build_model, config, rules=rules, unstacked_layers=True, unstacked_experts=platform == "cpu")
    )
    model = quantize_module(model, "w8a8" in quantize) if has_narrow_weights(quantize) else model
    model.llm.narrow_cache = "kv" in quantize
    return _turn_module(model) if platform == "gpu" else model


def _computed(clip: ClipConfig) -> ClipConfig:
    """Without the layers that are not computed. To leave them out of a stack would copy it for every question."""
    kept = max(1, clip.computed_layers)
    return dataclasses.replace(clip, num_layers=kept, select_layer=clip.select_layer + clip.num_layers - kept)


def to_decoding_layout(
    config: ModelConfig,
    params: Params,
    mesh: Mesh | None = None,
    rules: ShardingConfig | None = None,
    quantize: str = "",
) -> Params:
    """A checkpoint's parameters as decoding reads them, adapters merged, on the devices of the mesh (default: this
    process's first device).

    The leaves are arrays, or are read from the checkpoint here (`saved_params`): no more than a few layers' parameters
    are on the host at once. Several generators may share the result. `config` is the checkpoint's, adapters included.
    ValueError for a mesh and rules that do not fit, and for parameters that are not the model's.
    """
    mesh = mesh or one_device()
    check_model_fits(config, rules, mesh)
    model = model_in_decoding_layout(config, mesh, rules, quantize)
    check_parts(params, params_of(model))
    platform, like = platform_of(mesh), flatten(params_of(model))
    arrange = functools.partial(_arrange, lora=config.lora, like=like, transposed=platform == "gpu")

    def make(piece: Piece) -> dict[str, np.ndarray]:
        return {place: array for path, module in piece() for place, array in arrange(path, module).items()}

    shardings, placed = flatten(model_shardings(model, mesh)), {}
    for made in ahead(functools.partial(make, piece) for piece in _pieces(params, unstacked_experts=platform == "cpu")):
        placed |= {path: jax.device_put(array, shardings[path]) for path, array in made.items()}
    if missing := sorted(shardings.keys() - placed.keys()):
        raise ValueError(f"the checkpoint lacks {len(missing)} parameters of the model, first {missing[0]}")
    return unflatten(placed)


def _pieces(params: Params, unstacked_experts: bool) -> Iterator[Piece]:
    """What is read together: one module, and of a stack of layers as few layers as the file allows."""
    modules = collections.defaultdict(dict)
    for path, leaf in flatten(params).items():
        module, _, name = path.rpartition("/")
        modules[module][name] = leaf if isinstance(leaf, SavedArray) else np.asarray(leaf)
    for module, leaves in modules.items():
        if not module.startswith(STACKS):
            yield functools.partial(_read_module, module, leaves)
            continue
        largest = max(leaves.values(), key=lambda leaf: math.prod(leaf.shape))
        count, step = largest.shape[0], getattr(largest, "rows_at_once", 1)
        for start in range(0, count, step):
            yield functools.partial(_read_layers, module, leaves, range(count)[start : start + step], unstacked_experts)


def _read_module(path: str, leaves: Params) -> Iterator[tuple[str, Params]]:
    yield path, {name: leaf[...] for name, leaf in leaves.items()}


def _read_layers(path: str, leaves: Params, layers: range, unstacked_experts: bool) -> Iterator[tuple[str, Params]]:
    """The module of each of these layers, and with `unstacked_experts` of each expert in it."""
    part, stack, *inner = path.split("/")
    rows = {name: leaf[layers.start : layers.stop] for name, leaf in leaves.items()}
    for i in layers:
        module = {name: row[i - layers.start] for name, row in rows.items()}
        if inner[0] != "experts" or not unstacked_experts:
            yield "/".join((part, stack, str(i), *inner)), module
            continue
        for e in range(len(module["kernel"])):
            place = "/".join((part, stack, str(i), "experts", "each", str(e), *inner[1:]))
            yield place, {name: array[e] for name, array in module.items()}


def _arrange(path: str, module: Params, *, lora: LoraConfig, like: dict[str, Any], transposed: bool) -> dict[str, Any]:
    """{path: array} of one module of the decoding model. `like`: shapes by path; ValueError for others."""
    module = merge_lora(module, lora)
    if f"{path}/kernel_scale" in like and "kernel_scale" not in module:
        kernel, scale = quantize_kernel(module["kernel"])
        module = module | {"kernel": kernel, "kernel_scale": scale}
    if transposed and path.startswith("llm/") and "kernel" in module:
        module = module | {"kernel": module["kernel"].swapaxes(-1, -2)}
    found = {f"{path}/{name}": array for name, array in module.items()}
    if path.startswith("clip/layers/"):  # see `_computed`
        found = {place: array[: like[place].shape[0]] for place, array in found.items()}
    for place, array in found.items():
        expected = like[place].shape if place in like else "no such array"
        if array.shape != expected:
            raise ValueError(f"{place}: found shape {array.shape}, expected {expected}")
    return found


def has_narrow_weights(quantize: str) -> bool:
    """Whether one of QUANTIZE says that weights have 8 bits."""
    return quantize.partition("+")[0] in ("int8", "w8a8")


def in_decoding_layout(params: Params) -> bool:
    return "0" in params.get("llm", {}).get("layers", {})


def check_parts(found: Params, expected: Params) -> None:
    """ValueError naming the parts that a checkpoint has beyond the model, or lacks."""
    if lacking := sorted(expected.keys() - found.keys()):
        raise ValueError(f"the checkpoint lacks {', '.join(lacking)}: it holds {', '.join(sorted(found))} alone")
    if "icl" in found and "icl" not in expected:
        raise ValueError(
            "the checkpoint is of in-context learning: it has modules that read example pictures (icl/"
            f"{', icl/'.join(sorted(found['icl']))}), which this model does not have"
        )


def _turn_module(model: WholeModel) -> WholeModel:
    """Kernels of the decoder become [..., out, in]; changes and returns the abstract model."""
    for path, module in nnx.iter_modules(model):
        if path[:1] == ("llm",) and hasattr(module, "by_output"):
            shape, axes = (_last_two_swapped(x) for x in (module.kernel.shape, module.kernel.axes))
            module.kernel = nnx.Param(jax.ShapeDtypeStruct(shape, module.kernel.dtype), axes=axes)
            module.by_output = True
    return model


def _last_two_swapped(values: tuple) -> tuple:
    return (*values[:-2], values[-1], values[-2])
