"""Model FLOPs against arithmetic."""

import jax
import jax.numpy as jnp
import pytest

from medplib_jax.aot.flops import executed_kernel_flops
from medplib_jax.aot.hlo import Shape
from medplib_jax.models.language import attention
from medplib_jax.train.flops import count_flops, splash_flops


def flops(function, *args, **options):
    return count_flops(jax.make_jaxpr(function)(*args).jaxpr, **options)


def test_products_scans_loops_and_branches():
    x, n = jnp.ones((4, 5)), 2 * 4 * 5 * 4

    def program(x):
        y, _ = jax.lax.scan(lambda y, _: (y + jax.jit(lambda x: x @ x.T)(x), None), jnp.zeros((4, 4)), length=5)
        y = jax.lax.while_loop(lambda y: y.sum() < 3, lambda y: y + x @ x.T, y)
        return jax.lax.cond(y[0, 0] > 2, lambda: y + x @ x.T, lambda: y)

    assert flops(program, x, loop_trips=7) == (5 + 7 + 1) * n
    assert (
        flops(lambda x, k: jax.lax.conv(x, k, (1, 1), "VALID"), jnp.ones((2, 3, 8, 8)), jnp.ones((5, 3, 3, 3)))
        == 2 * (2 * 5 * 36) * 27
    )


def test_gradients_of_what_is_frozen_do_not_count():
    x, w = jnp.ones((4, 5)), jnp.ones((5, 6))
    forward = 2 * 4 * 5 * 6

    def loss(x, w):
        return jnp.square(x @ w).sum()

    assert flops(jax.grad(loss), x, w) == 2 * forward
    assert flops(jax.grad(loss, (0, 1)), x, w) == 3 * forward
    # the compiler does not compute what nobody reads either
    assert flops(lambda x, w: jax.grad(loss, (0, 1))(x, w)[1], x, w) == 2 * forward


def test_attention_counts_half_of_the_scores_and_executes_whole_blocks():
    q = (3, 2, 1024, 128)
    all_scores = 2 * 3 * 2 * 1024 * 1024 * 128  # one product
    forward, back = "splash_mha_fwd_segmented_residuals", "splash_mha_dkv_segmented_no_residuals"
    assert splash_flops(forward, [q]) == 2 * all_scores / 2
    assert splash_flops(back, [q]) == 4 * all_scores / 2

    def executed(name, *blocks):
        return executed_kernel_flops(name, [Shape("s8", (1, *blocks), False), Shape("bf16", q, False)])

    assert executed(forward, 2, 2) == 2 * all_scores * 3 / 4
    assert executed(back, 2, 2) == 5 * all_scores * 3 / 4
    assert executed(back, 2, 1) == 5 * all_scores
    assert executed(back, 4, 2) == 5 * all_scores * 3 / 4
    assert executed(back, 4, 4) == 5 * all_scores * 5 / 8


def test_grouped_products_execute_tiles_on_a_border_twice():
    sizes = [
        Shape("s32", (), False),
        Shape("s32", (4,), False),
        Shape("s32", (18,), False),
    ]  # two groups: three borders and the rest's
    rows, wide, weights, back = (
        Shape("bf16", dims, False) for dims in ((2048, 512), (2048, 768), (2, 512, 768), (2, 768, 512))
    )
    expected = 2 * (2048 + 128) * 512 * 768
    assert executed_kernel_flops("gmm.3", [*sizes, rows, weights]) == expected
    assert executed_kernel_flops("gmm.4", [*sizes, wide, weights]) == expected  # with the weights transposed
    assert executed_kernel_flops("gmm.4", [*sizes, rows, back]) == expected
    assert executed_kernel_flops("tgmm.1", [*sizes, rows, wide]) == expected
    with pytest.raises(ValueError, match="kernel mystery.1 is not one"):
        executed_kernel_flops("mystery.1", [])


def test_grouped_products_of_a_gpu_execute_tiles_of_every_group():
    tiles, groups = (Shape("s32", (number,), False) for number in (2000 // 128 + 3, 2))  # two groups and the rest
    rows, wide, weights = (Shape("bf16", dims, False) for dims in ((2000, 512), (2000, 768), (2, 512, 768)))
    assert executed_kernel_flops("gmm_triton", [tiles, tiles, tiles, rows, weights]) == 2 * 17 * 128 * 512 * 768
    assert (
        executed_kernel_flops("gmm_triton", [tiles, tiles, tiles, wide, weights]) == 2 * 17 * 128 * 512 * 768
    )  # with the weights transposed
    assert executed_kernel_flops("tgmm_triton", [groups, groups, rows, wide]) == 2 * (2000 + 2 * 64) * 512 * 768
    assert executed_kernel_flops("mosaic_gmm", [groups, rows, weights]) == 2 * 17 * 128 * 512 * 768
    assert executed_kernel_flops("mosaic_tgmm", [*[groups] * 5, rows, wide]) == 2 * (2000 + 2 * 64) * 512 * 768


def test_cudnn_needs_what_splash_needs(monkeypatch):
    """Traced as for a GPU and as for a TPU; there is none here to run it."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda *_: False)
    queries, keys = (jax.ShapeDtypeStruct((2, 1024, heads, 128), jnp.bfloat16) for heads in (4, 2))

    def loss(q, k, v):
        return attention.attend_within(q, k, v, jnp.ones((2, 1024), bool)).astype(jnp.float32).sum()

    def counted(platform):
        for name in ("gpu", "tpu"):
            monkeypatch.setattr(attention, f"is_for_{name}", lambda _, name=name: name == platform)
        return count_flops(jax.jit(jax.grad(loss, (0, 1, 2))).trace(queries, keys, keys).jaxpr.jaxpr)

    assert counted("gpu") == (2 + 4) * 2 * 2 * 4 * 1024 * 1024 * 128 / 2
    assert counted("gpu") == pytest.approx(
        counted("tpu"), rel=1e-3
    )  # which has sums of products with dy outside the kernel
