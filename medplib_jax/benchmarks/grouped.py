"""Grouped products of a mixture of two experts, in every way that there is for the device, in bfloat16."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from medplib_jax.batch import Array
from medplib_jax.benchmarks.accelerator import fastest
from medplib_jax.benchmarks.kernels import TOLERANCE
from medplib_jax.benchmarks.measure import Table
from medplib_jax.config.model import LlmConfig
from medplib_jax.models.kernels.grouped_matmul import default_way, grouped_matmul, obstacle, ways

REFERENCE = "xla"  # which every device has


def measure(llm: LlmConfig, rows: int) -> Table:
    """Rates of [rows, hidden_size] times two kernels [hidden_size, mlp_dim], and of the gradients to both.

    And how far results are from XLA's, the last rows belonging to no group. RuntimeError names ways that are wrong.
    """
    rng, device = np.random.default_rng(0), jax.devices()[0]
    shapes = (rows, llm.hidden_size), (2, llm.hidden_size, llm.mlp_dim), (rows, llm.mlp_dim)
    x, w, dy = (jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16) for shape in shapes)
    sizes = jnp.array([rows // 3, rows // 2], jnp.int32)
    flops = 2 * int(sizes.sum()) * llm.hidden_size * llm.mlp_dim
    title = f"Grouped products, {rows} rows: {device.device_kind} (default: {default_way(x, w)})"
    table = Table(title, ("", "TFLOP/s", "of gradients", "largest difference"))
    expected = _results(programs(REFERENCE), x, w, dy, sizes)
    for way in ways(device):
        if why := obstacle(way, x, w):
            table.rows.append((way, "", "", why))
            continue
        product, gradients = found = programs(way)
        error = max(map(_difference, _results(found, x, w, dy, sizes), expected))
        rates = flops / fastest(product, x, w, sizes), 2 * flops / fastest(gradients, x, w, dy, sizes)
        table.rows.append((way, *(f"{rate / 1e12:.1f}" for rate in rates), f"{error:.1e}"))
        figures = {"flops": rates[0], "gradient_flops": rates[1], "error": error}
        table.flat |= {f"grouped.{way}.{key}": value for key, value in figures.items()}
    if wrong := [way for way in ways(device) if not table.flat.get(f"grouped.{way}.error", 0) <= TOLERANCE]:
        raise RuntimeError(f"{table}\n\nthe results differ from XLA's: {', '.join(wrong)}")
    return table


def programs(way: str) -> tuple[Callable[..., Array], Callable[..., tuple[Array, Array]]]:
    """The product of (rows, kernels, sizes) in this way, and its gradients of (rows, kernels, the result's, sizes)."""

    def product(x: Array, w: Array, sizes: Array) -> Array:
        return grouped_matmul(x, w, sizes, False, way)

    def gradients(x: Array, w: Array, dy: Array, sizes: Array) -> tuple[Array, Array]:
        return jax.vjp(lambda x, w: product(x, w, sizes), x, w)[1](dy)

    return jax.jit(product), jax.jit(gradients)


def _results(found: tuple[Callable, Callable], x: Array, w: Array, dy: Array, sizes: Array) -> list[np.ndarray]:
    product, gradients = found
    return [np.asarray(array, np.float32) for array in (product(x, w, sizes), *gradients(x, w, dy, sizes))]


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())
