"""Geometry-aware region sampler (Ferret, You et al. 2023, section 3.2; GeoSampler.py): a shape becomes one token."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from medplib_jax.batch import Array
from medplib_jax.models.layers import LayerNorm, Linear, Rngs
from medplib_jax.models.precision import product

NORM_EPS = 1e-5


def repeat_points(valid: Array, count: int) -> Array:
    """Indices [..., count] of the valid points of [..., S], over and over in order. The original does so at random."""
    order = jnp.argsort(~valid, axis=-1, stable=True)
    available = jnp.maximum(valid.sum(-1, keepdims=True), 1)
    return jnp.take_along_axis(order, jnp.arange(count) % available, axis=-1)


def farthest_points(points_GxSx2: Array, count: int, start_G: Array) -> Array:
    """Indices [G, count]: the start, then each time the point farthest from all taken before (the first on ties)."""

    def take(carry, _):
        distance, latest = carry
        centre = jnp.take_along_axis(points_GxSx2, latest[:, None, None], axis=1)
        distance = jnp.minimum(distance, jnp.square(points_GxSx2 - centre).sum(-1))
        return (distance, distance.argmax(-1)), latest

    initial = (jnp.full(points_GxSx2.shape[:2], jnp.inf), start_G)
    return jax.lax.scan(take, initial, length=count)[1].T


def nearest_points(points_GxSx2: Array, centres_GxQx2: Array, count: int) -> Array:
    """Indices [G, Q, count] of the points nearest to each centre."""
    distance = jnp.square(centres_GxQx2[:, :, None] - points_GxSx2[:, None]).sum(-1)
    return jax.lax.top_k(-distance, count)[1]


def largest(x: Array, axis: int) -> Array:
    """The maximum along an axis. Its gradient goes to one place, as PyTorch's does.

    That of `jnp.max` goes to all that equal the maximum. It is NaN where the compiler computes `x` twice, with other
    roundings, and so finds none.
    """
    place = jnp.expand_dims(x.argmax(axis), axis)
    return jnp.take_along_axis(x, place, axis).squeeze(axis)


class Aggregation(nnx.Module):
    """Every centre gathers its neighbours, relative to itself: linear, ReLU, norm, then pooled.

    The original projects the difference to the centre, joins the centre's own features and projects again. Both are
    linear, so here every point is projected once, before the gather, and differences are taken after it.
    """

    def __init__(self, width: int, pooling: str, rngs: Rngs):
        self.diff = Linear(width + 2, width + 2, axes=(None, None), rngs=rngs)
        self.aggregate = Linear(2 * (width + 2), width, axes=(None, None), rngs=rngs)
        self.norm = LayerNorm(width, eps=NORM_EPS, rngs=rngs)
        self.pool = largest if pooling == "max" else jnp.mean

    def __call__(
        self, features_GxSxC: Array, points_GxSx2: Array, centres_GxQ: Array, neighbours_GxQxK: Array
    ) -> Array:
        """-> [G, Q, C]."""
        placed = jnp.concatenate([features_GxSxC, points_GxSx2], axis=-1)
        of_difference, of_centre = jnp.split(self.aggregate.kernel[...], 2)
        projected = product(product(placed, self.diff.kernel[...]), of_difference)
        take = jax.vmap(lambda values, indices: values[indices])
        bias = product(self.diff.bias[...], of_difference) + self.aggregate.bias[...]
        centre = product(take(placed, centres_GxQ), of_centre) - take(projected, centres_GxQ) + bias
        gathered = take(projected, neighbours_GxQxK) + centre[:, :, None]
        return self.pool(self.norm(jax.nn.relu(gathered)), axis=2)


class GeometrySampler(nnx.Module):
    """Repeated sampling and aggregation of a region's points; what remains is flattened and projected."""

    def __init__(
        self,
        width: int,
        out_dim: int,
        pooling: str,
        rngs: Rngs,
        *,
        centres: tuple[int, ...] = (128, 32),
        neighbours: tuple[int, ...] = (24, 24),
    ):
        self.stages = nnx.List([Aggregation(width, pooling, rngs) for _ in centres])
        self.flatten = Linear(width * centres[-1], width, axes=(None, None), rngs=rngs)
        self.project = Linear(width, out_dim, axes=(None, "embed"), rngs=rngs)
        self.centres, self.neighbours = centres, neighbours

    def __call__(self, features_GxSxC: Array, points_GxSx2: Array) -> Array:
        """float32 features at (row, column) points in [0, 1), all of them valid -> [G, out_dim]."""
        for stage, count, neighbours in zip(self.stages, self.centres, self.neighbours, strict=True):
            start = jnp.zeros(points_GxSx2.shape[0], jnp.int32)
            chosen = farthest_points(points_GxSx2, count, start)
            centres = jnp.take_along_axis(points_GxSx2, chosen[..., None], axis=1)
            nearest = nearest_points(points_GxSx2, centres, neighbours)
            features_GxSxC, points_GxSx2 = stage(features_GxSxC, points_GxSx2, chosen, nearest), centres
        return self.readout(features_GxSxC)

    def readout(self, features_GxQxC: Array) -> Array:
        return self.project(self.flatten(rearrange(features_GxQxC, "G Q C -> G (Q C)")))
