"""Products of groups of rows with one matrix per group: what a token costs does not depend on the number of groups.

`grouped_matmul(x, w, sizes)`: the first sizes[0] rows of x times w[0], the next sizes[1] rows times w[1], ...; rows
beyond the groups give zero. There are several ways to compute them, each a module `grouped_matmul_WAY` with `multiply`
and `weight_gradient`; `default_way` chooses one.
"""

import functools
import importlib
import types

import jax
import numpy as np

from medplib_jax.batch import Array
from medplib_jax.models.target import target_device

# By platform, best first: the first that has no obstacle is the default. On a GPU our kernel in Triton, which JAX will
# cease to support, those that JAX ships in Mosaic GPU, then loops. The order is by tokamax's published rates on an
# H100; `benchmarks --suite gpu --only grouped` measures all of them on a card.
WAYS = {"gpu": ("triton", "mosaic", "blocks", "xla"), "tpu": ("tpu", "xla")}
WAYS_ELSEWHERE = ("blocks", "xla")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(x_SxD: Array, w: Array, sizes_E: Array, transposed: bool = False, way: str = "") -> Array:
    """[S, D] rows sorted by group times w [E, D, F], or [E, F, D] if `transposed`, -> [S, F] in x's dtype.

    int8 times int8 gives int32. `way`: how it and its gradients are computed, by default `default_way`. ValueError
    names what keeps a way from being taken.
    """
    return _multiply(x_SxD, w, sizes_E, transposed, way)


def _forward(x_SxD, w, sizes_E, transposed, way):
    return _multiply(x_SxD, w, sizes_E, transposed, way), (x_SxD, w, sizes_E)


def _backward(transposed, way, residuals, dy_SxF):
    x_SxD, w, sizes_E = residuals
    dx_SxD = _multiply(dy_SxF, w, sizes_E, not transposed, way)
    dw = _weight_gradient(*((dy_SxF, x_SxD) if transposed else (x_SxD, dy_SxF)), w, sizes_E, way).astype(w.dtype)
    return dx_SxD, dw, np.zeros(sizes_E.shape, jax.dtypes.float0)


grouped_matmul.defvjp(_forward, _backward)


def ways(device) -> tuple[str, ...]:
    """Those that there are for a device (`platform`, `device_kind`), best first."""
    return WAYS.get(device.platform, WAYS_ELSEWHERE)


def default_way(x_SxD: Array, w: Array) -> str:
    """The best way that can be taken: by the platform the program is made for, JAX's version, shapes and dtypes."""
    return next(way for way in ways(target_device(x_SxD)) if not obstacle(way, x_SxD, w))


def obstacle(way: str, x_SxD: Array, w: Array) -> str:
    """Why this way cannot be taken for these products, empty if it can."""
    device = target_device(x_SxD)
    if way not in ways(device):
        return f"a {device.platform} has {', '.join(ways(device))}"
    try:
        kernels = _kernels(way)
    except ImportError as error:
        return f"JAX {jax.__version__} does not have it: {error}"
    return kernels.obstacle(x_SxD, w, device) if hasattr(kernels, "obstacle") else ""


def _multiply(x, w, sizes, transpose, way):
    kernels = _kernels(_possible(way, x, w))
    return _in_mesh_of(x, kernels.multiply, x, w, sizes, transpose=transpose)


def _weight_gradient(x, dy, w, sizes, way):
    kernels = _kernels(_possible(way, x, w))
    return _in_mesh_of(x, kernels.weight_gradient, x, dy, sizes)


def _possible(way: str, x: Array, w: Array) -> str:
    if way and (why := obstacle(way, x, w)):
        raise ValueError(f"grouped products on {target_device(x).device_kind} by way={way!r}: {why}")
    return way or default_way(x, w)


def _kernels(way: str) -> types.ModuleType:
    """Imported where it is used: a second that other platforms need not spend, and no JAX has all of them for ever."""
    return importlib.import_module(f"{__package__}.grouped_matmul_{way}")


def _in_mesh_of(x, compute, *args, **options):
    """On a GPU jitted: a call that nobody reads (experts may be frozen) is dropped from a program, a kernel is not. In
    the mesh of the rows: the result says by its mesh what the program is for, as they do."""
    compute = functools.partial(compute, device=(device := target_device(x)), **options)
    if device.platform != "gpu":
        return compute(*args)
    with jax.sharding.use_abstract_mesh(jax.typeof(x).sharding.mesh):
        return jax.jit(compute)(*args)
