"""Rows on their way to experts: sorting them, and carrying them to the devices where their experts live and back.

The exchange is an all-to-all inside `shard_map`. How many rows go where is known at run time only, so a device keeps
room for the worst case, all rows of all its peers: rows times the number of peers. The grouped matmul kernel skips the
part that stays empty. On most TPUs only the rows that there are travel (`ragged_all_to_all`); elsewhere blocks padded
to the worst case do.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from medplib_jax.batch import Array
from medplib_jax.models.target import is_for_tpu, target_device


def sort_by_expert(expert_N: Array, num_experts: int) -> tuple[Array, Array, Array]:
    """A stable counting sort: (order [N], its inverse [N], bool [N, E]: the sorted row belongs to expert e).

    `expert_N` is in [0, E]; E, no expert, comes last.
    """
    (N,) = expert_N.shape
    packed = jnp.sort(expert_N * N + jnp.arange(N))  # one integer to sort instead of a pair
    place = jax.nn.one_hot(expert_N, num_experts + 1, dtype=jnp.int32)
    count = place.sum(0)
    inverse = ((jnp.cumsum(place, 0) - 1 + jnp.cumsum(count) - count) * place).sum(-1)
    return packed % N, inverse, (packed // N)[:, None] == jnp.arange(num_experts)


@jax.custom_vjp
def permute_rows(x: Array, index: Array, inverse: Array) -> Array:
    """x[index] for a permutation whose inverse is known: the gradient is a gather too, not a scatter."""
    return x[index]


permute_rows.defvjp(
    lambda x, index, inverse: (x[index], (index, inverse)),
    lambda saved, dy: (dy[saved[1]], *(np.zeros(a.shape, jax.dtypes.float0) for a in saved)),
)


def axis_product(axes: tuple[str, ...]) -> int:
    """Devices along mesh axes, inside `shard_map`."""
    return math.prod(jax.lax.axis_size(axis) for axis in axes)


def with_exchange(
    compute: Callable[[Array, Array], Array], x_NxD: Array, expert_N: Array, num_experts: int, axes: tuple[str, ...]
) -> Array:
    """Rows through `compute` on the devices where their experts live, [N, D]. Expert `num_experts` is none: zero.

    Device i along `axes` holds experts i * E / peers and the following. compute(rows, expert among those, E / peers for
    none).
    """
    N, peers = len(expert_N), axis_product(axes)
    here = num_experts // peers
    order, inverse, member = sort_by_expert(expert_N, num_experts)
    sorted_NxD = permute_rows(x_NxD, order, inverse)
    # sizes[i, j, e]: rows that peer i sends to expert e of peer j. Everything else follows from it on every device.
    sizes = jax.lax.all_gather(member.sum(0, dtype=jnp.int32), axes).reshape(peers, peers, here)
    counts = sizes.sum(-1)
    carry = _ragged if carries_ragged(x_NxD) else _padded
    arrived, expert, give_back = carry(sorted_NxD, sizes, counts, axes)
    y_NxD = give_back(compute(arrived, expert))
    kept = jnp.arange(N) < counts[jax.lax.axis_index(axes)].sum()
    return permute_rows(jnp.where(kept[:, None], y_NxD, 0), inverse, order)


def carries_ragged(x: Array) -> bool:
    """Whether the devices can exchange unequal numbers of rows. The compiler refuses it on v5e slices beyond 4x4."""
    return is_for_tpu(x) and not (
        target_device(x).device_kind == "TPU v5 lite" and jax.typeof(x).sharding.mesh.size > 16
    )


def _starts(counts: Array, axis: int = -1) -> Array:
    return jnp.cumsum(counts, axis) - counts


def _padded(sorted_NxD: Array, sizes: Array, counts: Array, axes: tuple[str, ...]):
    """One block of N rows per pair of peers, rows first. Returns (rows that arrived, their experts, the way back)."""
    me, (N, D), (peers, _, _) = jax.lax.axis_index(axes), sorted_NxD.shape, sizes.shape
    slot = jnp.arange(N)
    begins, mine = _starts(counts[me]), counts[me]  # where the rows for each peer lie among the sorted ones

    def swap(blocks):
        return jax.lax.all_to_all(blocks, axes, 0, 0)

    blocks = jnp.where((slot < mine[:, None])[..., None], sorted_NxD[jnp.minimum(begins[:, None] + slot, N - 1)], 0)
    ends = jnp.cumsum(sizes[:, me], -1)  # [peers, here]: in each peer's block, where the rows of each expert end
    expert = (slot[None, :, None] >= ends[:, None, :]).sum(-1)

    def give_back(y):
        returned = swap(y.reshape(peers, N, D))
        peer = (slot[:, None] >= jnp.cumsum(mine)).sum(-1).clip(max=peers - 1)
        return returned[peer, (slot - begins[peer]).clip(0, N - 1)]

    return swap(blocks).reshape(peers * N, D), expert.reshape(-1), give_back


def _ragged(sorted_NxD: Array, sizes: Array, counts: Array, axes: tuple[str, ...]):
    """The same without padding between the peers' rows."""
    me, (N, D), (peers, _, here) = jax.lax.axis_index(axes), sorted_NxD.shape, sizes.shape
    room = jnp.zeros((peers * N, D), sorted_NxD.dtype)
    # Peer i's rows for j begin at leaves[i, j] among those i sends, and at lands[i, j] among those that j gets.
    leaves, lands = _starts(counts, 1), _starts(counts, 0)
    sent, received = counts[me], counts[:, me]
    arrived = jax.lax.ragged_all_to_all(sorted_NxD, room, leaves[me], sent, lands[me], received, axis_name=axes)
    ends = jnp.cumsum(sizes[:, me].reshape(-1))
    run = (jnp.arange(peers * N)[:, None] >= ends).sum(-1)
    expert = jnp.where(run < peers * here, run % here, here)

    def give_back(y):
        return jax.lax.ragged_all_to_all(
            y, jnp.zeros_like(sorted_NxD), lands[:, me], received, leaves[:, me], sent, axis_name=axes
        )

    return arrived, expert, give_back
