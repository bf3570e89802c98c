"""How decoding wants a checkpoint's parameters:

Adapters merged, layers apart, kernels in the order in which the platform reads them, perhaps in 8 bits.
"""

import dataclasses
import functools

import jax
from flax import nnx
from jax.sharding import Mesh

from medplib_jax.batch import Params
from medplib_jax.config.experiment import ShardingConfig
from medplib_jax.config.model import LoraConfig, ModelConfig
from medplib_jax.models.families import build_model
from medplib_jax.models.language.llama import unstack
from medplib_jax.models.language.lora import merge_lora
from medplib_jax.models.layers import abstract_module, model_shardings, params_of
from medplib_jax.models.quantize import quantize_module, quantize_params
from medplib_jax.models.whole import WholeModel
from medplib_jax.parallel.compilation import is_gpu
from medplib_jax.parallel.mesh import one_device
from medplib_jax.parallel.sharding import check_model_fits

QUANTIZE = ("", "int8")


def decoding_model(
    config: ModelConfig, mesh: Mesh | None = None, rules: ShardingConfig | None = None, quantize: str = ""
) -> WholeModel:
    """`laid_out_model` whose experts have no capacity, which would let a token's expert depend on the rest of the
    batch.
    """
    dropless = dataclasses.replace(config, moe=dataclasses.replace(config.moe, dispatch="dropless"))
    return laid_out_model(dropless, mesh, rules, quantize)


def laid_out_model(
    config: ModelConfig, mesh: Mesh | None = None, rules: ShardingConfig | None = None, quantize: str = ""
) -> WholeModel:
    """The abstract model with parameters as `lay_out` gives them; with `quantize` "int8" its linear layers have weights
    of 8 bits.

    On a GPU the experts of a layer stay in one array, from which the chosen one is picked while it is read: in order to
    choose among programs the host would have to wait for the router. The decoder's kernels are turned there
    (`layers.matmul_by_output`).
    """
    if quantize not in QUANTIZE:
        raise ValueError(f"quantize {quantize!r} is not one of {QUANTIZE}")
    for_gpu = is_gpu(mesh or one_device())
    config = dataclasses.replace(config, lora=LoraConfig())
    model = abstract_module(
        functools.partial(build_model, config, rules=rules, layers_apart=True, experts_apart=not for_gpu)
    )
    model = quantize_module(model) if quantize else model
    return _turn_module(model) if for_gpu else model


def lay_out(
    config: ModelConfig,
    params: Params,
    mesh: Mesh | None = None,
    rules: ShardingConfig | None = None,
    quantize: str = "",
) -> Params:
    """A checkpoint's parameters as decoding reads them, adapters merged, on the devices of the mesh (default:

    This process's first device). Several generators may share them. `config` is the checkpoint's, adapters included.
    ValueError for a mesh and rules that do not fit.
    """
    mesh = mesh or one_device()
    check_model_fits(config, rules, mesh)
    model = laid_out_model(config, mesh, rules, quantize)
    check_parts(params, params_of(model))

    def arrange(params: Params) -> Params:
        for_gpu = is_gpu(mesh)
        params = merge_lora(unstack(params, experts_apart=not for_gpu), config.lora)
        params = quantize_params(params, params_of(model)) if quantize else params
        return params | {"llm": jax.tree.map_with_path(_turn, params["llm"])} if for_gpu else params

    return jax.jit(arrange, out_shardings=model_shardings(model, mesh))(params)


def is_laid_out(params: Params) -> bool:
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


def _turn(path, array: jax.Array) -> jax.Array:
    return array.swapaxes(-1, -2) if path[-1].key == "kernel" else array


def _last_two_swapped(values: tuple) -> tuple:
    return (*values[:-2], values[-1], values[-2])
