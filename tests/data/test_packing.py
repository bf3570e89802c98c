"""Packed rows: every record once, within the limits; the same loss as one conversation a row."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medplib_jax.batch import Batch
from medplib_jax.config.experiment import DataConfig
from medplib_jax.data.packing import pack
from medplib_jax.data.pipeline import BatchPlan, make_loader, train_batches
from medplib_jax.models.language.attention import segment_positions
from medplib_jax.models.layers import bind, draw_params
from medplib_jax.train.losses import token_cross_entropy
from medplib_jax.train.step import abstract_model
from tests.datasets import collection
from tests.helpers import MODEL
from tests.paths import GOLDEN

LENGTH = 448
costs_of = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 2), st.integers(0, 2), st.booleans()), min_size=1, max_size=200
)


@settings(max_examples=40)
@given(costs_of, st.integers(0, 3), st.sets(st.integers(0, 199)))
def test_groups_keep_the_limits_and_every_usable_record(rows, seed, unusable):
    costs, alone = np.array([row[:3] for row in rows]), np.array([row[3] for row in rows])
    costs[[index for index in unusable if index < len(rows)]] = 0
    groups = pack(costs, (60, 3, 3), alone, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([*groups, []])), np.flatnonzero(costs.any(axis=1)))
    for group in groups:
        assert (costs[group].sum(axis=0) <= (60, 3, 3)).all()
        assert len(group) == 1 or not alone[group].any()
    again = pack(costs, (60, 3, 3), alone, seed)
    assert len(again) == len(groups) and all(map(np.array_equal, groups, again))


def test_short_records_fill_their_rows():
    costs = np.random.default_rng(0).integers(20, 200, (3000, 1)) * [[1, 0, 0]]
    groups = pack(costs, (1024, 1, 1), np.zeros(3000, bool), 0)
    assert costs.sum() / (1024 * len(groups)) > 0.95


def test_a_plan_of_groups_holds_every_record_once_per_epoch():
    groups = [np.array(one) for one in ([0, 3], [1], [2, 4, 5], [6])]
    plan = BatchPlan([[30, 10], [35, 5]], (10, 40), 3, 0, groups=groups)
    for epoch in (0, 1):
        numbers = np.concatenate(
            [plan.batch(epoch * plan.steps_per_epoch + step)[1] for step in range(plan.steps_per_epoch)]
        )
        assert sorted(record for number in numbers for record in plan.records(number)) == list(range(7))


@pytest.fixture
def data(tmp_path):
    """Questions about whole pictures, about regions, without a picture, and one that asks for a mask."""
    root = collection.make_images(tmp_path) / "SAMed2Dv1"
    text_only = [
        {"conversations": collection.record(0, f"What is {word}?", "A disease.")["conversations"]}
        for word in ("gout", "flu")
    ]
    mask = f"masks/{collection.CT.format(3, 3)}--0001_000.png"
    records = [collection.vqa(0), collection.region(1), *text_only, collection.grounding(3, mask), collection.vqa(2)]
    collection.write(root, "train.json", records)
    return DataConfig(
        sources=(str(root / "train.json"),),
        root=str(root),
        tokenizer=str(GOLDEN / "tokenizer"),
        bucket_lengths=(LENGTH,),
        batch_size=2,
        max_images=3,
        max_regions=2,
        mask_canvas=32,
        workers=0,
    )


def summed_loss_and_gradient(config, batches):
    """Cross-entropy summed over all answer tokens of an epoch, how many there are, and the gradient of the sum."""
    model = abstract_model(config)
    params = draw_params(model, seed=0)

    def loss(some, batch):
        bound = bind(model, params | some)
        hidden = bound(batch)[0].hidden
        return token_cross_entropy(hidden, bound.llm.head.kernel[...], batch.targets, batch.loss_weights, 1024)

    total, weight, gradient = 0.0, 0.0, None
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    trained = {name: params[name] for name in ("llm", "projector", "region")}
    for arrays in batches:
        (value, count), new = step(trained, jax.tree.map(jnp.asarray, Batch(**arrays)))
        total, weight = total + value, weight + count
        gradient = new if gradient is None else jax.tree.map(jnp.add, gradient, new)
    return total, weight, gradient


def epoch(data, config):
    loader = make_loader(data, config, data.root)
    plan, problems = loader.plan(seed=0)
    assert problems == []
    return (
        loader,
        plan,
        [arrays for arrays, _ in train_batches(loader, plan, range(data.batch_size), 0, plan.steps_per_epoch, 0)],
    )


def test_the_loss_and_its_gradient_equal_those_of_one_conversation_a_row(data):
    vocabulary = make_loader(data, MODEL, data.root).tokenizer.vocab_size
    llm = dataclasses.replace(MODEL.llm, vocab_size=vocabulary, max_positions=LENGTH, num_layers=1)
    config = dataclasses.replace(MODEL, llm=llm)
    _, _, plain = epoch(data, config)
    loader, plan, packed = epoch(dataclasses.replace(data, pack=True), config)
    rows = [row for step in range(plan.steps_per_epoch) for row in map(plan.records, plan.batch(step)[1]) if row]
    assert len(rows) < 6 and sorted(record for row in rows for record in row) == list(range(6))
    assert (4,) in rows  # the one with a mask has its row for itself
    for arrays in packed:
        np.testing.assert_array_equal(arrays["segment"] > 0, arrays["valid"] & (arrays["record"] >= 0)[:, None])
    (loss, weight, gradient), (expected, count, truth) = (
        summed_loss_and_gradient(config, batches) for batches in (packed, plain)
    )
    assert weight == count > 10
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for found, right in zip(jax.tree.leaves(gradient), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(found, right, rtol=0, atol=1e-5 * max(np.abs(right).max(), 1e-3))


def test_pictures_and_regions_of_a_row_have_their_own_slots(data):
    data = dataclasses.replace(data, pack=True)
    loader, plan, batches = epoch(data, MODEL)
    for step, arrays in enumerate(batches):
        for row, records in enumerate(map(plan.records, plan.batch(step)[1])):
            alone = [loader.load_eval([record], [0], False)[0] for record in records]
            for record, single in zip(records, alone, strict=True):
                if loader.record(record).images:
                    slots = arrays["clip_pixels"][row] == single["clip_pixels"][0, 0]
                    assert slots.all(axis=(1, 2, 3)).any()
            regions = sum(int(single["region_point_valid"].any(axis=2).sum()) for single in alone)
            assert arrays["region_point_valid"][row].any(axis=1).sum() == regions
            used = arrays["feature_index"][row]
            used = used[used >= 0]
            assert (
                len(used)
                == len(set(used.tolist()))
                == sum(int((single["feature_index"] >= 0).sum()) for single in alone)
            )


def test_a_bad_record_leaves_only_its_place_in_the_row(data):
    path = pathlib.Path(data.root) / "images" / f"{collection.CT.format(0, 0)}.png"
    path.write_bytes(b"")
    data = dataclasses.replace(data, pack=True, on_error="skip")
    loader = make_loader(data, MODEL, data.root)
    plan, _ = loader.plan(seed=0)
    batches = list(train_batches(loader, plan, range(2), 0, plan.steps_per_epoch, 0))
    assert {error.record for _, errors in batches for error in errors} == {0}
    answers = sum(int(arrays["loss_weights"].sum()) for arrays, _ in batches)
    assert answers == sum(int(loader.encode(loader.record(index)).loss_weights.sum()) for index in range(1, 6))


def test_positions_begin_anew_with_every_segment():
    segment = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2]])
    np.testing.assert_array_equal(segment_positions(segment), [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]])
