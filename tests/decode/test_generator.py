"""Decoding against its definition: take the likeliest next token of a full forward pass, again and again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medplib_jax.config.experiment import MeshConfig, ShardingConfig
from medplib_jax.config.model import LoraConfig
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.decode.sampling import Sampling, answer_draws, draw_token
from medplib_jax.decode.stream import stream_answers
from medplib_jax.models.layers import abstract_module, bind, draw_params
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.parallel.mesh import make_mesh
from tests.helpers import MODEL, random_batch, tiny_experiment

MODEL = dataclasses.replace(MODEL, lora=LoraConfig())
EOS, SEG, NEW, LENGTH, ROOM = 2, 7, 6, 16, 24


@pytest.fixture(scope="module")
def params():
    params = draw_params(abstract_module(functools.partial(MedPLIB, MODEL)), 1)
    kernel = params["llm"]["head"]["kernel"]
    kernel[:, SEG] *= 2.0  # so that some answers hold <SEG>
    return params


@pytest.fixture(scope="module")
def batch():
    return random_batch(tiny_experiment(model=MODEL), LENGTH)


@pytest.fixture(scope="module")
def generation(params, batch):
    return Generator(MODEL, params, DecodeOptions(max_new_tokens=NEW, max_masks=2), stop_ids=(EOS,), seg_id=SEG)(batch)


@pytest.fixture(scope="module")
def forward(params):
    model = abstract_module(functools.partial(MedPLIB, MODEL))

    def run(params, batch):
        model_ = bind(model, params)
        output, _ = model_(batch)
        return model_.llm.logits(output.hidden), output.mask_logits

    return functools.partial(jax.jit(run), params)


def widened(batch, room):
    """The batch with empty positions on the right."""
    extra = room - batch.tokens.shape[1]
    pad = functools.partial(np.pad, pad_width=((0, 0), (0, extra)))
    return batch.replace(
        tokens=pad(batch.tokens),
        valid=pad(batch.valid),
        targets=pad(batch.targets),
        loss_weights=pad(batch.loss_weights),
        feature_index=pad(batch.feature_index, constant_values=-1),
    )


def naive(batch, forward):
    """Token by token without a cache: (tokens [B, NEW], lengths, positions that predict <SEG>)."""
    batch, rows = widened(batch, ROOM), np.arange(len(batch.tokens))
    tokens, done, segs = np.zeros((len(rows), NEW), np.int32), np.zeros(len(rows), bool), [[] for _ in rows]
    start = batch.valid.sum(-1)
    for t in range(NEW):
        logits, _ = forward(batch)
        chosen = np.asarray(logits)[rows, batch.valid.sum(-1) - 1].argmax(-1)
        done |= chosen == EOS
        for row in np.flatnonzero(~done):
            if chosen[row] == SEG:
                segs[row].append(int(batch.valid[row].sum()) - 1)
            at = batch.valid[row].sum()
            batch.tokens[row, at], batch.valid[row, at] = chosen[row], True
            tokens[row, t] = chosen[row]
    return tokens, batch.valid.sum(-1) - start, segs, batch


def test_greedy_answers_and_masks_equal_full_forward_passes(batch, generation, forward):
    tokens, lengths, segs, grown = naive(batch, forward)
    np.testing.assert_array_equal(generation.tokens, tokens)
    np.testing.assert_array_equal(generation.lengths, lengths)
    assert sum(map(len, segs)) > 0, "no answer holds <SEG>; choose other weights"
    drawn = [row[:2] for row in segs]
    np.testing.assert_array_equal(generation.mask_valid.sum(-1), list(map(len, drawn)))
    positions = np.array([row + [0] * (2 - len(row)) for row in drawn], np.int32)
    _, expected = forward(grown.replace(seg_position=positions))
    for row, found in enumerate(drawn):
        for slot in range(len(found)):
            np.testing.assert_allclose(generation.mask_logits[row, slot], expected[row, slot], rtol=1e-4, atol=1e-4)


def test_an_answer_does_not_depend_on_its_batch_or_its_padding(params, batch, generation):
    alone = Generator(MODEL, params, DecodeOptions(max_new_tokens=NEW, max_masks=2), stop_ids=(EOS,), seg_id=SEG)
    for row in (1, 4):
        single = alone(widened(jax.tree.map(lambda x, row=row: x[row : row + 1], batch), LENGTH + 4))
        np.testing.assert_array_equal(single.tokens[0], generation.tokens[row])
        np.testing.assert_allclose(single.mask_logits[0], generation.mask_logits[row], rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def generator(params):
    return Generator(MODEL, params, DecodeOptions(max_new_tokens=NEW, max_masks=2), stop_ids=(EOS,), seg_id=SEG)


@pytest.fixture(scope="module")
def one_at_a_time(generator, batch):
    """{most tokens: {record: answer made alone}}."""
    return {
        most: by_record(stream_answers(generator, [batch], slots=1, refill=1, limits=dict.fromkeys(range(8), most)))
        for most in range(1, NEW + 1)
    }


def by_record(made):
    return {int(prompt.record[0]): generation for prompt, generation in made}


def assert_same(found, expected):
    assert found.lengths == expected.lengths
    for name in ("tokens", "mask_valid", "choices"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    valid = expected.mask_valid
    np.testing.assert_allclose(found.mask_logits[valid], expected.mask_logits[valid], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.predicted_iou[valid], expected.predicted_iou[valid], rtol=1e-4, atol=1e-4)


@settings(max_examples=12)
@given(
    order=st.permutations(range(8)),
    limits=st.lists(st.integers(1, NEW), min_size=8, max_size=8),
    sizes=st.sampled_from([(4, 1, 1), (4, 4, 1), (3, 2, 1), (6, 3, 3)]),
    cuts=st.integers(1, 7),
)
def test_an_answer_is_the_same_in_any_slot_beside_any_others(
    generator, batch, one_at_a_time, order, limits, sizes, cuts
):
    parts = [jax.tree.map(lambda x, part=part: x[np.array(part)], batch) for part in (order[:cuts], order[cuts:])]
    slots, refill, lanes = sizes
    found = by_record(
        stream_answers(generator, parts, slots=slots, refill=refill, lanes=lanes, limits=dict(enumerate(limits)))
    )
    assert sorted(found) == list(range(8))
    for record, generation in found.items():
        assert_same(generation, one_at_a_time[limits[record]][record])


def test_devices_share_the_slots(params, batch, one_at_a_time):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    sharing = Generator(
        MODEL,
        params,
        DecodeOptions(max_new_tokens=NEW, max_masks=2),
        stop_ids=(EOS,),
        seg_id=SEG,
        mesh=mesh,
        rules=ShardingConfig(),
    )
    found = by_record(stream_answers(sharing, [batch], slots=1, refill=1))
    assert sorted(found) == list(range(8))
    for record, generation in found.items():
        assert_same(generation, one_at_a_time[NEW][record])


@pytest.mark.parametrize(("slots", "refill", "lanes"), [(1, 2, 1), (4, 0, 1), (0, 0, 1), (2, 2, 3), (4, 2, 0)])
def test_slots_that_could_never_be_filled_are_refused(generator, batch, slots, refill, lanes):
    with pytest.raises(ValueError, match=rf"slots {slots}, refill {refill}, lanes {lanes}: expected .*refill <= slots"):
        list(stream_answers(generator, [batch], slots=slots, refill=refill, lanes=lanes))


def test_draws_belong_to_the_record(params, batch):
    sampling = Sampling(temperature=1.0)
    drawing = Generator(
        MODEL, params, DecodeOptions(max_new_tokens=NEW, max_masks=0, sampling=sampling), stop_ids=(EOS,), seg_id=SEG
    )
    first, second = (
        by_record(stream_answers(drawing, [part], slots=4, refill=2))
        for part in (batch, jax.tree.map(lambda x: x[::-1], batch))
    )
    assert sorted(first) == sorted(second) == list(range(8))
    assert all((first[record].tokens == second[record].tokens).all() for record in first)
    assert any(
        (first[record].tokens != made.tokens).any()
        for record, made in by_record(stream_answers(drawing, [batch], slots=4, refill=2, seed=1)).items()
    )


def test_tokens_that_are_drawn_before_their_turn_are_those_of_the_answer(params, batch, generation):
    generator = Generator(MODEL, params, DecodeOptions(max_new_tokens=NEW, max_masks=2), stop_ids=(EOS,), seg_id=SEG)
    rows = len(batch.record)
    limits, index = np.full(rows, NEW, np.int32), np.arange(rows, dtype=np.int32)[None]
    slots, shown = generator.start(None, batch, limits, None, index, rows), []
    for _ in range(NEW):
        slots, tokens = generator.peek(slots)
        shown.append(np.maximum(tokens, 0))
        slots, *_ = generator.advance(slots, keep=0, steps=1)
    np.testing.assert_array_equal(np.stack(shown, 1), generation.tokens)
    np.testing.assert_array_equal(slots.tokens, generation.tokens)
    np.testing.assert_array_equal(slots.lengths, generation.lengths)


def test_filler_rows_are_not_answered(params, batch):
    empty = batch.replace(record=np.where(np.arange(len(batch.record)) < 6, batch.record, -1).astype(np.int32))
    generation = Generator(MODEL, params, DecodeOptions(max_new_tokens=NEW, max_masks=0), stop_ids=(EOS,), seg_id=SEG)(
        empty
    )
    assert (np.asarray(generation.lengths[6:]) == 0).all() and (np.asarray(generation.tokens[6:]) == 0).all()
    assert generation.mask_logits is None


def test_sampling_keeps_to_the_nucleus():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    places = np.zeros(60, np.int32)
    draws = answer_draws([Sampling(temperature=1.0, top_p=0.7)] * 60, range(60), places)
    assert set(draw_token(jnp.tile(logits, (60, 1)), draws, places).tolist()) == {0, 1}
    assert int(draw_token(logits, None, places[:1])[0]) == 0


def test_each_row_is_drawn_in_its_own_way():
    logits = jnp.tile(jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])), (200, 1))
    ways = [Sampling(), Sampling(temperature=1.0, top_p=0.6), Sampling(temperature=1.0), Sampling(temperature=50.0)]
    places = np.zeros(200, np.int32)
    drawn = np.asarray(draw_token(logits, answer_draws(ways * 50, range(200), places), places)).reshape(50, 4)
    assert set(drawn[:, 0].tolist()) == {0} and set(drawn[:, 1].tolist()) == {0, 1}
    assert set(drawn[:, 3].tolist()) == {0, 1, 2, 3}
    alone = answer_draws([ways[2]], [6], places[:1])
    assert int(draw_token(logits[:1], alone, places[:1])[0]) == drawn[1, 2]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
