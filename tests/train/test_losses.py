import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medplib_jax.train.losses import mask_losses, token_cross_entropy
from tests.paths import GOLDEN

golden = np.load(GOLDEN / "losses.npz")


def close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, atol=tolerance * max(np.abs(expected).max(), 1e-12), rtol=0)


def on_canvas(case, extra_rows, extra_columns):
    """The case's mask in the corner of a larger canvas whose rest holds values that must not count."""
    logits, gt = golden[f"{case}_logits"], golden[f"{case}_gt"]
    height, width = gt.shape[1:]
    inside = np.zeros((1, height + extra_rows, width + extra_columns), np.float32)
    inside[:, :height, :width] = 1
    padded_logits, padded_gt = np.full(inside.shape, 3.0, np.float32), np.ones_like(inside)
    padded_logits[:, :height, :width], padded_gt[:, :height, :width] = logits, gt
    return padded_logits[:, None], padded_gt[:, None], inside, golden[f"{case}_pred_iou"][:, None]


@pytest.mark.parametrize("case", range(4))  # among them an empty and a full mask
@pytest.mark.parametrize("term", ["bce", "dice", "focal", "iou"])
@pytest.mark.parametrize("extra", [(0, 0), (7, 5)])
def test_mask_losses_equal_the_original(case, term, extra):
    logits, gt, inside, iou = on_canvas(case, *extra)
    value, (gradient, iou_gradient) = jax.value_and_grad(
        lambda x, i: mask_losses(x, gt, inside, i)[term].sum(), argnums=(0, 1)
    )(logits, iou)
    height, width = golden[f"{case}_gt"].shape[1:]
    close(value, golden[f"{case}_{term}"], 1e-4)
    close(gradient[0, :, :height, :width], golden[f"{case}_{term}_grad"], 1e-3)
    assert not np.asarray(gradient)[0, 0][inside[0] == 0].any()
    if term == "iou":
        close(iou_gradient[0], golden[f"{case}_iou_grad_pred"], 1e-3)


def test_saturated_logits_stay_finite():
    logits = jnp.array([-200.0, 200.0, 0.0, 90.0]).reshape(1, 1, 2, 2)
    gt = jnp.array([1.0, 0.0, 1.0, 1.0]).reshape(1, 1, 2, 2)
    losses, gradients = jax.value_and_grad(
        lambda x: sum(v.sum() for v in mask_losses(x, gt, jnp.ones((1, 2, 2)), jnp.zeros((1, 1))).values())
    )(logits)
    assert np.isfinite(losses) and np.isfinite(gradients).all()


def test_a_row_without_pixels_has_finite_losses():
    losses = mask_losses(jnp.ones((1, 1, 4, 4)), jnp.ones((1, 1, 4, 4)), jnp.zeros((1, 4, 4)), jnp.zeros((1, 1)))
    assert all(np.isfinite(value).all() for value in losses.values())


@pytest.mark.parametrize("chunk", [3, 4, 12, 100])
def test_cross_entropy_and_gradients_do_not_depend_on_the_chunk(chunk):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, kernel = jax.random.normal(keys[0], (2, 12, 8)), jax.random.normal(keys[1], (8, 17))
    targets = jax.random.randint(keys[2], (2, 12), 0, 17)
    weights = (jax.random.uniform(keys[3], (2, 12)) < 0.6).astype(jnp.float32)

    def plain(hidden, kernel):
        return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, targets))

    def chunked(hidden, kernel):
        return token_cross_entropy(hidden, kernel, targets, weights, chunk)[0]

    expected, actual = (jax.value_and_grad(f, argnums=(0, 1))(hidden, kernel) for f in (plain, chunked))
    jax.tree.map(lambda a, e: close(a, e, 1e-5), actual, expected)
    assert token_cross_entropy(hidden, kernel, targets, weights, chunk)[1] == weights.sum()


def test_cross_entropy_never_holds_all_logits():
    """The largest array of the gradient's program is a chunk of logits, not [B, L, V]."""
    B, L, D, V, chunk = 2, 64, 4, 1000, 8
    arguments = (jnp.ones((B, L, D)), jnp.ones((D, V)))
    gradient = jax.grad(
        lambda h, k: token_cross_entropy(h, k, jnp.zeros((B, L), int), jnp.ones((B, L)), chunk)[0], argnums=(0, 1)
    )
    memory = jax.jit(gradient).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < B * L * V * 4
