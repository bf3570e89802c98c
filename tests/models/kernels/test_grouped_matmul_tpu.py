"""The TPU's grouped products, interpreted, against one product per group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medplib_jax.models.kernels import grouped_matmul_tpu as module
from tests.helpers import interpreted_kernels


@pytest.mark.parametrize(
    ("transpose", "dtype", "block"), [(False, np.float32, 128), (True, np.float32, 256), (False, np.int8, 256)]
)
def test_columns_come_in_blocks(transpose, dtype, block, monkeypatch, capsys):
    """Two and a half of them here, or one and a quarter, of which 128 columns are computed at once.

    A group is empty, borders lie inside tiles, rows at the end belong to none. Products of 8-bit integers are whole
    numbers beyond 8 bits.
    """
    monkeypatch.setattr(module, "column_block", lambda *_: block)
    monkeypatch.setattr(module, "_columns_at_once", lambda *_: 128)
    rng = np.random.default_rng(0)
    x, w = ((rng.standard_normal(shape) * 40).astype(dtype) for shape in ((384, 96), (3, 96, 320)))
    wide = np.int32 if dtype == np.int8 else dtype
    parts = (
        x[:70].astype(wide) @ w[0].astype(wide),
        x[70:300].astype(wide) @ w[2].astype(wide),
        np.zeros((84, 320), wide),
    )
    expected = np.concatenate(parts)
    matrices, sizes = w.swapaxes(1, 2) if transpose else w, jnp.array([70, 0, 230, 84])
    with interpreted_kernels(capsys):
        found = jax.jit(module.gmm, static_argnames=("transpose", "device_kind"))(
            x, matrices, sizes, transpose=transpose, device_kind=f"TPU {transpose} {dtype}"
        )
    assert found.dtype == wide
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("kind", "inner", "outer", "itemsize", "block"),
    [
        ("TPU v5 lite", 11008, 4096, 2, 2048),
        ("TPU v6 lite", 4096, 11008, 2, 5632),
        ("TPU v5p", 11008, 4096, 2, 896),
        ("TPU v5", 4096, 11008, 2, 2304),
        ("TPU v4", 11008, 4096, 2, 128),
        ("TPU v5", 11008, 4096, 1, 1536),
    ],
)
def test_a_block_is_as_wide_as_the_chips_memory_allows(kind, inner, outer, itemsize, block):
    """Two of each array lie there; blocks are about equally wide."""
    assert module.column_block(inner, outer, itemsize, kind) == block
    held = 2 * itemsize * (inner * block + (inner + block) * module.ROW_TILE)
    assert held < module.memory_limit(kind) and -(-outer // block) * block - outer < 512 * -(-outer // block)
