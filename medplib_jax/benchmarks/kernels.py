"""Whether the accelerator's kernels give the CPU's numbers: the first thing to know of a new card."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from medplib_jax.benchmarks.measure import Table
from medplib_jax.config.experiment import MeshConfig
from medplib_jax.models.kernels.grouped_matmul import grouped_matmul
from medplib_jax.models.language.attention import attend_within
from medplib_jax.parallel.mesh import make_mesh

TOLERANCE = 0.02  # of bfloat16 sums, over the largest value
ROWS, WIDTH, WIDE, HEADS = 700, 256, 512, 4


def measure() -> Table:
    """The largest difference of each kernel's results, over their largest value.

    RuntimeError names those beyond the tolerance.
    """
    table = Table(f"Kernels of {jax.devices()[0].device_kind} beside the CPU", ("", "largest difference", "tolerance"))
    for name, (run, arguments) in programs().items():
        found, expected = (_on(device, run, arguments) for device in (jax.devices()[0], jax.devices("cpu")[0]))
        error = max(_difference(*pair) for pair in zip(found, expected, strict=True))
        table.rows.append((name, f"{error:.1e}", f"{TOLERANCE:.0e}"))
        table.flat[f"kernels.{name.replace(' ', '_')}.error"] = error
    if wrong := [name for name, error, _ in table.rows if not float(error) <= TOLERANCE]:
        raise RuntimeError(f"{table}\n\nthe results differ from the CPU's: {', '.join(wrong)}")
    return table


def programs() -> dict[str, tuple[Callable, tuple]]:
    """{kernel:

    (function, arguments)}: each product in bfloat16 with its gradients; the last rows belong to no group.
    """
    rng = np.random.default_rng(0)

    def values(*shape: int):
        return rng.standard_normal(shape, np.float32).astype(jnp.bfloat16)

    sizes = np.array([300, 0, 380], np.int32)
    rows, matrices, wide = values(ROWS, WIDTH), values(len(sizes), WIDTH, WIDE), values(ROWS, WIDE)
    heads = tuple(values(2, 256, HEADS, 64) for _ in range(3))
    valid = np.arange(256) < np.array([[256], [200]])

    def attention(q, k, v):
        return jnp.where(valid[..., None, None], attend_within(q, k, v, jnp.asarray(valid)), 0)

    def with_gradients(function: Callable, *arguments):
        result, pullback = jax.vjp(function, *arguments)
        return result, *pullback(jnp.cos(result.astype(jnp.float32)).astype(result.dtype))

    return {
        "grouped product": (
            lambda x, w: with_gradients(lambda x, w: grouped_matmul(x, w, jnp.asarray(sizes)), x, w),
            (rows, matrices),
        ),
        "grouped product, transposed": (
            lambda x, w: (grouped_matmul(x, w, jnp.asarray(sizes), True),),
            (wide, matrices),
        ),
        "grouped product of integers": (
            lambda x, w: (grouped_matmul(x, w, jnp.asarray(sizes)),),
            tuple(rng.integers(-127, 128, shape, np.int8) for shape in (rows.shape, matrices.shape)),
        ),
        "attention": (lambda *heads: with_gradients(attention, *heads), heads),
    }


def _on(device: jax.Device, run: Callable, arguments: tuple) -> list[np.ndarray]:
    """The results of a program for one device, which it is traced for."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, expert=1, tensor=1), [device])
    placed = jax.device_put(arguments, NamedSharding(mesh, PartitionSpec()))
    return [np.asarray(leaf, np.float32) for leaf in jax.jit(run)(*placed)]


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())
