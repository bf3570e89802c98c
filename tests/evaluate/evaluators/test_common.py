"""Evaluators on stand-in answers that are known, so that every score is known, too."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numpy_arrays

from medplib_jax.batch import Batch
from medplib_jax.data.errors import DataError
from medplib_jax.data.pipeline import Loader
from medplib_jax.data.records import MASK
from medplib_jax.data.rle import decode_rle, encode_rle
from medplib_jax.data.sources import MecovqaSource
from medplib_jax.data.tokenizers import Tokenizer
from medplib_jax.decode.masks import mask_drawer
from medplib_jax.decode.slots import Generation
from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.evaluators.common import Evaluator
from medplib_jax.evaluate.kinds import find_kind
from medplib_jax.evaluate.kinds.vqa import is_closed
from tests.evaluate.evaluators import tiny

KINDS = ("grounding", "region", "vqa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data") / "root")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return tiny.make_experiment(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def answered(folder, experiment):
    """Answers the questions of one of the folder's files with `say(record, prompt)` or, without it, as expected;
    returns the rows.
    """

    def build(kind, say=lambda record, prompt: MASK.sub("", record.turns[-1][1]), change=lambda prompt: prompt):
        source = MecovqaSource(str(folder / "test" / f"{kind}.json"), str(folder))
        tokenizer = Tokenizer.load(experiment.data.tokenizer)
        loader = Loader([source], tokenizer, experiment.data, experiment.model)
        draw = (lambda prompt, generation: prompt.gt_masks > 0) if kind == "grounding" else None
        evaluator, rows = Evaluator(find_kind(kind), loader, draw_masks=draw), []
        for index in range(len(source)):
            prompt = change(Batch(**loader.load_eval([index], [0], question=True)[0]))
            ids = tokenizer.encode(say(loader.record(index), prompt))
            M = prompt.mask_valid.shape[1]
            mask_valid = np.arange(M)[None] < ids.count(tokenizer.seg_id)
            tokens, lengths = np.array([[*ids, 0]], np.int32), np.array([len(ids)])
            generation = Generation(
                tokens, lengths, mask_valid, np.zeros((1, M, 4, 4), np.float32), np.ones((1, M), np.float32)
            )
            rows.append(evaluator.row(prompt, generation))
        return rows

    return build


def values_of(rows):
    return metrics.by_modality(metrics.statistics(rows), [row["modality"] for row in rows])


def test_expected_answers_score_one(answered):
    for kind in KINDS:
        rows = answered(kind)
        values = values_of(rows)
        assert values.pop("false_mask_rate", 0) == 0
        without = ("false", "open_bleu_3", "open_bleu_4", "open_meteor")  # the answers have two words
        ones = {name: value for name, value in values.items() if not name.startswith(without)}
        assert ones and all(value == pytest.approx(1) for value in ones.values()), kind
        assert all(
            f"{name}/{modality}" in ones
            for name in ones
            if "/" not in name
            for modality in ("ct", "mr", "modality_mean")
        )


def test_masks_follow_the_answer(answered):
    # one mask always: right for one, half for two, false for none
    rows = answered("grounding", lambda record, prompt: "It is <SEG>.")
    values = values_of(rows)
    assert values["mIoU"] == pytest.approx((1 + 0.5) / 2) and values["gIoU"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert values["no_target_accuracy"] == 0 and values["false_mask_rate"] == 0  # a <SEG>, but nothing drawn
    assert rows[1]["scores"]["masks"] == 1 and len(rows[1]["masks"]) == 1 and len(rows[1]["true_masks"]) == 2
    np.testing.assert_array_equal(decode_rle(rows[1]["masks"][0]), np.broadcast_to(np.arange(30) < 15, (40, 30)))


def test_every_answer_is_kept_with_its_question(answered):
    rows = answered("vqa")
    assert [row["record"] for row in rows] == [0, 1, 2, 3]
    assert rows[1] | {"scores": None} == {
        "record": 1,
        "cut_off": False,
        "image": ["images/ct_00--a.png"],
        "modality": "ct",
        "question": "<image>\nWhat organ is it?",
        "answer": "left lung",
        "expected": "left lung",
        "answer_type": "open",
        "scores": None,
    }


def test_the_region_reaches_the_generator(answered):
    def side_of_points(record, prompt):
        x = prompt.region_points[0, 0, prompt.region_point_valid[0, 0], 0]
        return "the left lung" if x.mean() < 0.5 else "the right lung"

    rows = answered("region", side_of_points)
    assert values_of(rows)["open_exact_match"] == 1


def test_a_lost_region_is_refused(answered):
    def lose(prompt):
        return prompt.replace(region_point_valid=np.zeros_like(prompt.region_point_valid))

    with pytest.raises(
        DataError, match="record 0: region is not in the prompt; expected 1 regions, found 0 with points, 1 in the text"
    ):
        answered("region", change=lose)


def test_kind_of_question():
    assert is_closed("closed", "left") and is_closed("", "No.")
    assert not is_closed("", "left") and not is_closed("open", "yes")


@settings(max_examples=30)
@given(numpy_arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 6))))
def test_run_lengths_round_trip(mask):
    rle = json.loads(json.dumps(encode_rle(mask)))
    np.testing.assert_array_equal(decode_rle(rle), mask)
    assert sum(rle["counts"]) == mask.size and 0 not in rle["counts"][1:]


def test_run_lengths_are_column_major_and_begin_with_zeros():
    assert encode_rle(np.array([[True, False], [True, True]])) == {"size": [2, 2], "counts": [0, 2, 1, 1]}


def test_drawn_masks_lie_on_the_picture(folder, experiment):
    source = MecovqaSource(str(folder / "test" / "grounding.json"), str(folder))
    loader = Loader([source], Tokenizer.load(experiment.data.tokenizer), experiment.data, experiment.model)
    prompt = Batch(**loader.load_eval([0], [0], question=True)[0])
    upper = np.where(np.arange(8) < 4, 5.0, -5.0).astype(np.float32)[:, None].repeat(8, 1)
    generation = Generation(None, None, None, np.stack([upper, np.full((8, 8), -5, np.float32)])[None], None)
    drawn = mask_drawer(32, "exact", 64, 0.5)(prompt, generation)[0, :, :40, :30]
    assert drawn[0, :19].all() and not drawn[0, 21:].any() and not drawn[1].any()
