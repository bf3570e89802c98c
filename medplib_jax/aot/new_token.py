"""What a chip must read for one new token of every answer, beside what the compiled loop over tokens moves."""

import math
from typing import Any

import jax

from medplib_jax.aot.flops import executed_kernel_flops
from medplib_jax.aot.usage import Usage, read_usage
from medplib_jax.batch import Params, flatten
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.models.language.llama import init_cache
from medplib_jax.parallel.sharding import BATCH_AXES, activation_axes, axis_size

GB = 1e9


def per_token(text: str, usage: Usage, trips: int, needed: float) -> dict[str, Any]:
    """Of a generation of `trips` tokens, whose optimised HLO is `text`: GB per token and GB of all before and after.

    `usage` is that of `text`, `needed` the bytes of `needed_bytes`.
    """
    moved = usage.hbm_bytes - read_usage(text, executed_kernel_flops, trips - 1).hbm_bytes
    return {
        "hbm_gb": moved / GB,
        "needed_gb": needed / GB,
        "hbm_over_needed": moved / needed,
        "hbm_gb_outside_the_loop": (usage.hbm_bytes - trips * moved) / GB,
    }


def needed_bytes(
    config: ExperimentConfig, params: Params, mesh: jax.sharding.Mesh, rows: int, length: int, quantize: str
) -> float:
    """Bytes of one chip: its part of the weights that one token of every row takes, and of the caches filled so far.

    `params` are a decoding model's, with shardings. A row takes top_k experts, the rows together all of them at most.
    Caches are filled with the prompt and, on average, half of the answer.
    """
    moe = config.model.moe
    share = min(1.0, rows * moe.top_k / moe.num_experts) if config.model.moe_layers else 1.0
    weights = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize * (share if "/experts/" in path else 1.0)
        for path, leaf in flatten(params["llm"]).items()
        if not path.startswith("embed/")  # a row of it
    )
    dtype = config.model.dtype
    cache = jax.eval_shape(lambda: init_cache(config.model, rows, length, dtype, "kv" in quantize))
    buffers = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((cache.k, cache.v)))
    heads = activation_axes(config.sharding, "kv_heads", BATCH_AXES) if mesh.size > 1 else ()
    filled = 1 - config.eval.max_new_tokens / 2 / length
    return weights + buffers * filled / axis_size(mesh, (*BATCH_AXES, *heads))
