"""Masks back at original size: against the original program and against chains of PyTorch's interpolate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from medplib_jax.models.masks.unpad import resample_to_canvas
from tests.paths import GOLDEN
from tests.torch_weights import relative_error

SAM = 64
RESAMPLE = jax.jit(resample_to_canvas, static_argnames=("canvas", "sam_size", "mode"))


def resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def run(logits: np.ndarray, box, size, canvas: int, mode: str, sam_size: int) -> tuple[np.ndarray, np.ndarray]:
    rows = len(logits)
    box, size = (jnp.asarray([value] * rows) for value in (box, size))
    out, mask = RESAMPLE(jnp.asarray(logits), box, size, canvas=(canvas, canvas), sam_size=sam_size, mode=mode)
    return np.asarray(out), np.asarray(mask)


@pytest.mark.parametrize("mode", ["exact", "reference"])
@pytest.mark.parametrize("case", [0, 1, 3, 4])
def test_equals_the_original_where_the_grid_is_sams_canvas(case, mode):
    """There the original's cut is right, so both modes give it."""
    golden = np.load(GOLDEN / "unpad.npz")
    low, (height, width), size = (golden[f"post{case}_{name}"] for name in ("low8", "input_size", "original_size"))
    logits = low.reshape(-1, *low.shape[-3:]).repeat(8, 2).repeat(8, 3)
    out, _ = run(logits, ((256 - height) // 2, (256 - width) // 2, height, width), size, 224, mode, 256)
    assert relative_error(out[:, :, : size[0], : size[1]], golden[f"post{case}_out"]) < 1e-4
    if mode == "exact" and f"post{case}_sam_out" in golden:
        out, _ = run(logits, (0, 0, height, width), size, 224, mode, 256)
        assert relative_error(out[:, :, : size[0], : size[1]], golden[f"post{case}_sam_out"]) < 1e-4


@settings(max_examples=25)
@given(
    long_side=st.tuples(st.booleans(), st.integers(5, SAM)),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    seed=st.integers(0, 9),
)
def test_equals_chains_of_interpolate(long_side, size, seed):
    is_wide, short = long_side
    box_h, box_w = (short, SAM) if is_wide else (SAM, short)
    top, left = (SAM - box_h) // 2, (SAM - box_w) // 2
    logits = np.random.default_rng(seed).standard_normal((1, 2, 16, 16), np.float32)
    theirs = torch.from_numpy(logits)

    exact = resize(resize(theirs, (SAM, SAM))[:, :, top : top + box_h, left : left + box_w], size)
    pad_h, pad_w = 16 - box_h, 16 - box_w
    start_h, start_w = pad_h // 2, pad_w // 2
    reference = resize(theirs[:, :, start_h : start_h + box_h, start_w : start_w + box_w], size)
    for mode, expected in (("exact", exact), ("reference", reference)):
        out, mask = run(logits, (top, left, box_h, box_w), size, 56, mode, SAM)
        assert relative_error(out[:, :, : size[0], : size[1]], expected) < 1e-4, mode
        inside = np.zeros((56, 56), bool)
        inside[: size[0], : size[1]] = True
        assert (mask[0] == inside).all()
        assert not out[:, :, ~inside].any()


def test_rows_of_a_batch_keep_their_own_geometry():
    logits = np.random.default_rng(0).standard_normal((2, 1, 16, 16), np.float32)
    boxes, sizes = np.array([[8, 0, 48, 64], [0, 20, 64, 24]]), np.array([[30, 40], [50, 20]])
    both, _ = RESAMPLE(
        jnp.asarray(logits), jnp.asarray(boxes), jnp.asarray(sizes), canvas=(50, 40), sam_size=SAM, mode="exact"
    )
    for row in range(2):
        alone, _ = RESAMPLE(
            jnp.asarray(logits[row : row + 1]),
            jnp.asarray(boxes[row : row + 1]),
            jnp.asarray(sizes[row : row + 1]),
            canvas=(50, 40),
            sam_size=SAM,
            mode="exact",
        )
        np.testing.assert_allclose(both[row], alone[0], rtol=1e-6, atol=1e-6)


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="'sloppy'"):
        run(np.zeros((1, 1, 4, 4), np.float32), (0, 0, 4, 4), (4, 4), 4, "sloppy", 4)
