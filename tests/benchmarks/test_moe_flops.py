"""A token costs one expert's FLOPs, whatever the number of experts; and the counter counts right."""

import jax
import jax.numpy as jnp
import pytest

from medplib_jax.benchmarks.moe_flops import executed_flops, flop_ratios, tile_ratio


def test_counter_follows_loops_branches_and_scans():
    x, n = jnp.ones((4, 5)), 2 * 4 * 5 * 4

    def program(x, trips):
        y = jax.lax.fori_loop(0, trips, lambda i, y: y + x @ x.T, jnp.zeros((4, 4)))
        y, _ = jax.lax.scan(lambda y, _: (y + jax.jit(lambda x: x @ x.T)(x), None), y, length=5)
        return jax.lax.cond(trips > 2, lambda: y + x @ x.T, lambda: y)

    assert executed_flops(program, x, 3) == (3 + 5 + 1) * n
    assert executed_flops(program, x, 2) == (2 + 5) * n
    assert executed_flops(jax.grad(lambda x: jnp.sum(x @ x.T)), x) > 0


@pytest.mark.parametrize("num_experts", [2, 8])
def test_top1_costs_one_expert(num_experts):
    for kind, ratio in flop_ratios(2048, 32, 48, num_experts).items():
        assert 1 <= ratio <= 1.3, (kind, ratio)


def test_tiles_of_the_tpu_kernel():
    assert tile_ratio(8192, 2) == 65 / 64 and tile_ratio(8192, 8) == 71 / 64
