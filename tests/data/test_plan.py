"""The plan of batches: every record once per epoch, a pure function of seed and step, whoever reads it."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medplib_jax.data.pipeline import BatchPlan

some = settings(max_examples=25)
lengths_of_sources = st.lists(st.lists(st.integers(1, 100), min_size=1, max_size=40), min_size=1, max_size=3)


def records_of(plan, epoch):
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    rows = np.concatenate([plan.batch(step)[1] for step in steps])
    return rows[rows >= 0]


@some
@given(lengths_of_sources, st.integers(1, 9), st.integers(0, 3))
def test_every_record_once_per_epoch_in_a_bucket_that_fits(lengths, batch_size, seed):
    plan = BatchPlan(lengths, (10, 40, 100), batch_size, seed)
    flat = np.concatenate(lengths)
    for epoch in (0, 5):
        np.testing.assert_array_equal(np.sort(records_of(plan, epoch)), np.arange(len(flat)))
    assert plan.steps_per_epoch == -(-len(flat) // batch_size)
    for step in range(plan.steps_per_epoch):
        bucket, rows = plan.batch(step)
        assert rows.shape == (batch_size,)
        longest = flat[rows[rows >= 0]].max()
        assert bucket == min(length for length in (10, 40, 100) if length >= longest)


@some
@given(lengths_of_sources, st.integers(1, 9), st.integers(0, 50))
def test_a_batch_is_a_pure_function_of_seed_and_step(lengths, batch_size, step):
    fresh, used = (BatchPlan(lengths, (10, 40, 100), batch_size, 3) for _ in range(2))
    for earlier in range(step):
        used.batch(earlier)
    for other in (used, pickle.loads(pickle.dumps(used))):
        assert fresh.batch(step)[0] == other.batch(step)[0]
        np.testing.assert_array_equal(fresh.batch(step)[1], other.batch(step)[1])


@some
@given(
    lengths_of_sources,
    st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 5)), min_size=1, max_size=8),
    st.integers(0, 3),
)
def test_interruptions_and_other_process_counts_lose_and_repeat_nothing(lengths, legs, seed):
    """A run in legs, each with its number of processes and steps; every process makes the plan anew and resumes at the
    step."""
    step, found, batch_size = 0, [], 4
    while step < (steps := BatchPlan(lengths, (10, 40, 100), batch_size, seed).steps_per_epoch):
        processes, count = legs[step % len(legs)]
        last = min(step + count, steps)
        for process in range(processes):
            plan = BatchPlan(lengths, (10, 40, 100), batch_size, seed)
            found += [plan.batch(now)[1][process::processes] for now in range(step, last)]
        step = last
    records = np.concatenate(found)
    np.testing.assert_array_equal(np.sort(records[records >= 0]), np.arange(sum(map(len, lengths))))


def test_epochs_and_seeds_differ():
    first, second = (BatchPlan([np.full(50, 5)], (10,), 50, seed) for seed in (0, 1))
    orders = {tuple(plan.batch(step)[1]) for plan in (first, second) for step in (0, 1)}
    assert len(orders) == 4


def test_only_leftovers_leave_their_bucket():
    plan = BatchPlan([np.array([5] * 10 + [30] * 10)], (10, 40), 4, 0)
    buckets = [plan.batch(step)[0] for step in range(plan.steps_per_epoch)]
    assert sorted(buckets) == [10, 10, 40, 40, 40]  # 2 of the 10 short ones join the long ones


def test_weights_share_the_rows_and_sources_start_over():
    plan = BatchPlan([np.full(30, 5), np.full(6, 5), np.full(4, 5)], (10,), 8, 0, (1, 1, 0))
    counts = np.bincount(np.concatenate([records_of(plan, epoch) for epoch in range(3)]), minlength=40)
    assert len(records_of(plan, 0)) == 40
    assert set(counts[:30]) == {2}  # 60 rows of 30 records
    assert set(counts[30:36]) == {10}
    assert not counts[36:].any()


def test_left_out_records_do_not_appear():
    plan = BatchPlan([np.array([5, 0, 5])], (10,), 2, 0)
    assert sorted(records_of(plan, 0)) == [0, 2]


@pytest.mark.parametrize(
    ("lengths", "weights", "message"),
    [
        ([[0, 0]], (), "no usable record"),
        ([[5, 11]], (), "length 11 does not fit the longest bucket 10"),
        ([[5, 5], [0]], (1, 1), "positive weight has no usable"),
    ],
)
def test_an_impossible_plan_is_refused(lengths, weights, message):
    with pytest.raises(ValueError, match=message):
        BatchPlan(lengths, (10,), 2, 0, weights)
