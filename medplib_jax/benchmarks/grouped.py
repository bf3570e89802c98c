"""Grouped products of a mixture of two experts: ours beside those that JAX ships, in bfloat16."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from medplib_jax.batch import Array
from medplib_jax.benchmarks.accelerator import fastest
from medplib_jax.benchmarks.measure import Table
from medplib_jax.config.model import LlmConfig
from medplib_jax.models.kernels.grouped_matmul import grouped_matmul

HOPPER = ("H100", "H200")  # whose matrix unit JAX's kernel in Mosaic GPU is written for
TILE = 128


def measure(llm: LlmConfig, rows: int) -> Table:
    """Rates of [rows, hidden_size] times two kernels [hidden_size, mlp_dim], and how far results are from XLA's."""
    rng, device = np.random.default_rng(0), jax.devices()[0]
    shapes = (rows, llm.hidden_size), (2, llm.hidden_size, llm.mlp_dim)
    x, w = (jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16) for shape in shapes)
    sizes = jnp.array([rows // 3, rows - rows // 3], jnp.int32)
    table = Table(f"Grouped products, {rows} rows: {device.device_kind}", ("", "TFLOP/s", "largest difference"))
    found = {name: jax.jit(run) for name, run in programs(device.device_kind, llm.mlp_dim).items()}
    expected = np.asarray(found["XLA"](x, w, sizes), np.float32)
    for name, run in found.items():
        error = np.abs(np.asarray(run(x, w, sizes), np.float32) - expected).max() / np.abs(expected).max()
        rate = 2 * rows * llm.hidden_size * llm.mlp_dim / fastest(run, x, w, sizes)
        table.rows.append((name, f"{rate / 1e12:.1f}", f"{error:.1e}"))
        table.flat |= {f"grouped.{name.replace(' ', '_')}.{key}": v for key, v in (("flops", rate), ("error", error))}
    return table


def programs(device_kind: str, outer: int) -> dict[str, Callable[[Array, Array, Array], Array]]:
    """{name: function of rows, kernels [E, D, outer] and the groups' sizes} for such a device."""
    found = {"ours": grouped_matmul, "XLA": jax.lax.ragged_dot}
    if any(name in device_kind for name in HOPPER):
        found["Mosaic GPU"] = functools.partial(_mosaic, neighbours=math.gcd(outer // TILE, 8))
    return found


def _mosaic(x: Array, w: Array, sizes: Array, neighbours: int) -> Array:
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot  # needs JAX's CUDA plugin

    tiles = {"block_m": TILE, "block_n": TILE, "block_k": 64, "max_concurrent_steps": 4, "grid_block_n": neighbours}
    return ragged_dot(x, w, group_sizes=sizes, **tiles)
