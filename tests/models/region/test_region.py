"""Region tokens against the original program, for both samplers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medplib_jax.config.model import ClipConfig, RegionConfig
from medplib_jax.models.layers import Rngs, abstract_module, bind, params_of
from medplib_jax.models.region.encoder import RegionEncoder, point_weights
from medplib_jax.models.region.geometry import GeometrySampler, farthest_points, nearest_points, repeat_points
from tests.paths import GOLDEN
from tests.torch_weights import relative_error

CLIP = ClipConfig(image_size=56, patch_size=14, hidden_size=48, num_layers=3, num_heads=4, mlp_dim=192)


def points_of(mask: np.ndarray) -> np.ndarray:
    """(x, y) of the mask's cells, as the data pipeline makes them."""
    return (np.argwhere(mask) / mask.shape)[:, ::-1].astype(np.float32)


def original_encoder() -> tuple[RegionEncoder, dict[str, np.ndarray]]:
    golden = dict(np.load(GOLDEN / "region.npz"))
    params = {"adapter": {"kernel": golden["adapter_weight"].T, "bias": golden["adapter_bias"]}}
    return bind(abstract_module(lambda rngs: RegionEncoder(RegionConfig(), CLIP, 64, rngs)), params), golden


def test_mean_equals_the_original_and_finds_its_image():
    """One example holding all three images; two regions on the second and third, a third one without points."""
    encoder, golden = original_encoder()
    points, valid = np.full((1, 3, 60, 2), 0.9, np.float32), np.zeros((1, 3, 60), bool)
    for i in range(2):
        region = points_of(golden[f"region_mask_{i}"][0])
        points[0, i, 60 - len(region) :], valid[0, i, 60 - len(region) :] = region, True
    images = np.array([[*golden["region_image"], 0]])
    region = jax.jit(lambda *given: encoder(*given)[0])(golden["clip_features"][None], points, valid, images)
    for i in range(2):
        assert relative_error(region[0, i], golden[f"region_feature_{i}"][0]) < 1e-5
    assert not region[0, 2].any(), "a region without points is zero, without the adapter's bias"


def test_point_weights_equal_grid_sample():
    random = np.random.default_rng(0)
    points, features = random.random((1, 2, 9, 2), np.float32), random.standard_normal((1, 4, 4, 5), np.float32)
    grid = torch.from_numpy(2 * points - 1)
    expected = F.grid_sample(torch.from_numpy(features.transpose(0, 3, 1, 2)), grid, align_corners=True).permute(
        0, 2, 3, 1
    )
    ours = point_weights(jnp.asarray(points), 4) @ features.reshape(1, 1, 16, 5)
    assert relative_error(ours, expected) < 1e-5


def test_farthest_and_nearest_points_equal_the_original():
    golden = np.load(GOLDEN / "region_geometry.npz")
    points = jnp.asarray(golden["unit_points"])
    farthest = farthest_points(points, 17, jnp.asarray(golden["unit_start"]))
    assert (farthest == golden["unit_fps"]).all()
    centres = jnp.take_along_axis(points, farthest[..., None], axis=1)
    nearest = np.sort(nearest_points(points, centres, 9), axis=-1)
    assert (nearest == np.sort(golden["unit_knn"], axis=-1)).all()


def geometry_params(golden) -> dict:
    def linear(name: str) -> dict:
        return {"kernel": golden[f"param.{name}.weight"].squeeze().T, "bias": golden[f"param.{name}.bias"]}

    def norm(i: int, name: str) -> np.ndarray:
        return golden[f"param.agg_projector_list.{i}.norm.{name}"]

    stages = {
        str(i): {
            "diff": linear(f"diff_projector_list.{i}"),
            "aggregate": linear(f"agg_projector_list.{i}.net.0"),
            "norm": {"scale": norm(i, "weight"), "bias": norm(i, "bias")},
        }
        for i in range(2)
    }
    return {"stages": stages, "flatten": linear("flatten_projector"), "project": linear("dim_projector")}


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_geometry_sampler_and_its_gradients_equal_the_original(pooling):
    """The original's choices among equally far points are given, since ties are broken by chance there."""
    golden = np.load(GOLDEN / "region_geometry.npz")
    abstract = abstract_module(lambda rngs: GeometrySampler(10, 12, pooling, rngs, centres=(24, 8), neighbours=(12, 6)))
    regions = [(0, golden["mask_0"][0]), (0, golden["mask_0"][1]), (2, golden["mask_2"][0])]
    chosen = []
    for i, (_, mask) in enumerate(regions):
        cells, draws = points_of(mask)[:, ::-1], golden[f"rsr_{i}"]
        chosen.append(cells[draws] if len(draws) == 64 else np.concatenate([cells, cells[draws]]))
    rows_columns = jnp.asarray(np.stack(chosen))
    weights = point_weights(rows_columns[None, :, :, ::-1], 24)[0]

    @jax.jit
    def flat_features(params, feature_map):
        sampler, points = bind(abstract, params), rows_columns
        features = weights @ feature_map[jnp.array([image for image, _ in regions])]
        for i, stage in enumerate(sampler.stages):
            centres = jnp.asarray(golden[f"fps_{i}"])
            features = stage(features, points, centres, jnp.asarray(golden[f"knn_{i}"]))
            points = jnp.take_along_axis(points, centres[..., None], axis=1)
        return features

    params, feature_map = geometry_params(golden), jnp.asarray(golden["feature_map"])
    features = flat_features(params, feature_map)
    expected = np.concatenate([golden[f"{pooling}_region_feature_0"], golden[f"{pooling}_region_feature_2"]])
    readout = jax.jit(lambda params, features: bind(abstract, params).readout(features))
    assert relative_error(readout(params, features), expected) < 1e-5

    # The loss of the recorded gradients is not recorded. What reaches `flatten` follows from its gradient (30 unknowns,
    # 800 equations).
    flat, recorded = np.asarray(features, np.float64).reshape(3, -1), golden[f"{pooling}_grad_flatten_projector.weight"]
    incoming = recorded @ np.linalg.pinv(flat)
    assert relative_error(incoming @ flat, recorded) < 1e-4

    def loss(params, feature_map):
        return ((flat_features(params, feature_map).reshape(3, -1) @ params["flatten"]["kernel"]) * incoming.T).sum()

    of_params, of_map = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, feature_map)
    assert relative_error(of_map, golden[f"{pooling}_grad_feature_map"]) < 1e-3
    of_diff = of_params["stages"]["0"]["diff"]["kernel"].T
    assert relative_error(of_diff, golden[f"{pooling}_grad_diff_projector_list.0.weight"]) < 1e-3


def test_repeated_points_are_the_valid_ones_in_order():
    valid = jnp.array([[False, True, True, False, True], [True] * 5, [False] * 5])
    assert repeat_points(valid, 7).tolist()[:2] == [[1, 2, 4, 1, 2, 4, 1], [0, 1, 2, 3, 4, 0, 1]]


def test_geometry_encoder_reads_valid_points_of_its_image_alone():
    encoder = RegionEncoder(RegionConfig(sampler="geometry", max_points=140), CLIP, 8, Rngs(0))
    random = np.random.default_rng(0)
    features = jnp.asarray(random.standard_normal((1, 2, 16, 48), np.float32))
    points = jnp.asarray(random.random((1, 3, 12, 2), np.float32))
    valid = jnp.asarray(np.arange(12) < np.array([[[12], [7], [0]]]))
    image = jnp.array([[0, 1, 0]])
    encode = jax.jit(lambda features, points: encoder(features, points, valid, image)[0])
    region = encode(features, points)
    assert region.shape == (1, 3, 8) and jnp.isfinite(region).all()
    assert not region[0, 2].any()
    elsewhere = encode(features.at[:, 0].set(0.0), points.at[0, 1, 7:].set(0.5))
    np.testing.assert_allclose(region[0, 1], elsewhere[0, 1], rtol=1e-5, atol=1e-6)
    assert jnp.abs(region[0, 0] - elsewhere[0, 0]).max() > 1e-3
    assert set(params_of(encoder)) == {"adapter", "geometry"}
